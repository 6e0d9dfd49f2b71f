"""Lengths and their laws, tokens and labels, what is kept, and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from whichlora.cli import main
from whichlora.data import DataSpec, Lengths, Sample, advise_seq_len, measure_lengths
from whichlora.data.lengths import from_lengths, padded
from whichlora.data.measure import cache_folder
from whichlora.data.tokens import IGNORED_LABEL, encode
from whichlora.finetune.examples import Collator, LongestFirst, _cut, _packed, make_examples

from ..finetune.conftest import UNITS, save_tokenizer

pytestmark = pytest.mark.stack
LISTS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@given(LISTS, st.integers(1, 320), st.integers(1, 8))
def test_lengths_say_what_the_list_says(values: list[int], seq_len: int, batch_size: int) -> None:
    """Counts, sums and cuts are those of the list; padding only adds, less where samples are grouped or packed."""
    lengths = from_lengths(values, learnt=sum(values))
    assert list(lengths.each()) == sorted(values)
    assert (lengths.samples, lengths.tokens, lengths.longest) == (len(values), sum(values), max(values))
    longer = [value - seq_len for value in values if value > seq_len]
    assert lengths.cut(seq_len) == (len(longer), sum(longer))
    kept = lengths.truncated(seq_len)
    assert kept.tokens == sum(min(value, seq_len) for value in values)
    assert kept.longest <= seq_len
    epochs = {how: lengths.epoch(batch_size, collation=how, seq_len=seq_len) for how in ("pad", "group", "pack")}
    assert epochs["pad"].longest_tokens == min(seq_len, padded(max(values)))
    for how in ("pad", "group"):
        assert kept.tokens == epochs[how].real_tokens <= epochs[how].computed_tokens + 1e-6
        assert epochs[how].computed_tokens <= len(values) * epochs[how].longest_tokens + 1e-6
        assert epochs[how].steps == -(-len(values) // batch_size)
    assert epochs["pack"].real_tokens == epochs["pack"].computed_tokens <= lengths.tokens


@pytest.mark.parametrize("how", ["pad", "group", "pack"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_epochs_are_those_of_the_batches_that_are_trained_on(how: str, batch_size: int) -> None:
    """Batches, padded tokens and the longest batch equal those of the order and the collator of a fine-tuning."""
    draw = random.Random(0)
    values = [min(700, int(draw.lognormvariate(5, 0.6)) + 3) for _ in range(2000)]
    pairs = [([5] * length, [5] * length) for length in values]
    examples = _packed(pairs, 512) if how == "pack" else _cut(pairs, 512)
    order = LongestFirst(
        [len(each["input_ids"]) for each in examples], first=batch_size, seed=0, grouped=how == "group"
    )
    order.set_epoch(1)
    collate, places = Collator(pad_id=0, seq_len=512), list(order)
    batches = [
        collate([examples[place] for place in places[start : start + batch_size]])["input_ids"]
        for start in range(0, len(places), batch_size)
    ]
    found = from_lengths(values, learnt=1).epoch(batch_size, collation=how, seq_len=512)
    assert found.steps == len(batches)
    assert found.longest_tokens == max(batch.shape[1] for batch in batches)
    assert found.computed_tokens == pytest.approx(sum(batch.numel() for batch in batches), rel=0.02)
    assert found.real_tokens == sum(len(each["input_ids"]) for each in examples)


@given(LISTS, st.floats(0.01, 1))
def test_a_quantile_is_a_length_that_so_many_do_not_exceed(values: list[int], share: float) -> None:
    """So large a share of the samples is no longer, and no shorter length would do."""
    found = from_lengths(values, learnt=1).quantile(share)
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


@given(LISTS, st.integers(1, 320))
def test_the_advised_length_cuts_at_most_one_in_a_hundred(values: list[int], limit: int) -> None:
    """Unless the model has fewer positions: then it is those."""
    lengths = from_lengths(values, learnt=1)
    advised, _ = advise_seq_len(lengths)
    assert lengths.cut(advised)[0] <= 0.01 * len(values)
    limited, why = advise_seq_len(lengths, limit=limit)
    assert limited == min(advised, limit)
    assert ("positions" in why) == (advised > limit)


@pytest.mark.parametrize("prompt", ["", "Say it:", "Wörter,\n"])
def test_the_completion_alone_is_learnt(tokenizer: Any, prompt: str) -> None:
    """Tokens that are learnt read as the completion and the end; all tokens read as the whole text."""
    sample = Sample(prompt=prompt, completion=" forty-two, ünd done")
    found = encode(sample, tokenizer)
    learnt = [label for label in found.labels(completion_only=True) if label != IGNORED_LABEL]
    assert tokenizer.decode(learnt) == f"{sample.completion}</s>"
    assert tokenizer.decode(found.ids) == f"{sample.text}</s>"
    assert found.labels(completion_only=False) == list(found.ids)


def test_packing_loses_nothing_but_the_rest(tokenizer: Any) -> None:
    """Full sequences, end to end, are the samples end to end."""
    samples = [Sample(prompt=f"{n}?", completion="x" * n) for n in range(1, 30)]
    spec = DataSpec(source="", packing=True)
    whole = [token for sample in samples for token in encode(sample, tokenizer).ids]
    packed = make_examples(samples, spec, tokenizer, 32)
    assert {len(each["input_ids"]) for each in packed} == {32}
    joined = [token for each in packed for token in each["input_ids"]]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) < 32


def test_a_batch_hides_its_padding() -> None:
    """Masked places are padded, and none of them is learnt; a batch without padding has no mask."""
    examples = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 8)]
    batch = Collator(pad_id=0, seq_len=64)(examples)
    assert batch["input_ids"].shape == (2, 8)
    hidden = batch["attention_mask"] == 0
    assert hidden.sum() == 5
    assert (batch["labels"][hidden] == IGNORED_LABEL).all()
    assert (batch["input_ids"][hidden] == 0).all()
    assert "attention_mask" not in Collator(pad_id=0, seq_len=64)(examples[1:])


@given(LISTS, st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_an_order_has_every_example_once(values: list[int], first: int, epoch: int, grouped: bool) -> None:
    """In each epoch, grouped by length or not; the first batch of the first epoch holds the longest."""
    order = LongestFirst(values, first=first, seed=1, grouped=grouped)
    order.set_epoch(epoch)
    found = list(order)
    assert sorted(found) == list(range(len(values)))
    assert found == list(order)
    if epoch == 0:
        assert sorted(values[index] for index in found[:first]) == sorted(values)[-first:]


def test_lengths_are_kept_by_content(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is used, until the data or the format changes; what is kept and broken is made anew."""
    monkeypatch.setenv("WHICHLORA_CACHE_DIR", str(tmp_path / "cache"))
    data = tmp_path / "units.jsonl"
    data.write_bytes(UNITS.read_bytes())
    spec = DataSpec(source=str(data))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    first = measure_lengths(spec, str(tmp_path / "tokenizer"))
    (kept,) = (cache_folder() / "lengths").iterdir()
    content = json.loads(kept.read_text(encoding="utf-8"))
    content["validation"] = 12345
    kept.write_text(json.dumps(content), encoding="utf-8")
    assert measure_lengths(spec, str(tmp_path / "tokenizer")).validation == 12345
    kept.write_text("{", encoding="utf-8")
    assert measure_lengths(spec, str(tmp_path / "tokenizer")) == first
    with data.open("a", encoding="utf-8") as file:
        file.write('{"question": "And?", "answer": "No.", "context": ""}\n')
    assert measure_lengths(spec, str(tmp_path / "tokenizer")).train.samples == first.train.samples + 1


def test_without_a_tokenizer_tokens_are_estimated_and_it_is_said() -> None:
    """Evidence and error are told; the error's range holds zero."""
    found = measure_lengths(DataSpec(source=str(UNITS)), "nobody/nothing-here", offline=True).train
    assert isinstance(found, Lengths)
    assert found.evidence == "characters"
    assert found.error[0] < 0 < found.error[1]


def test_the_command_tells_people_and_machines() -> None:
    """Both name the samples and the longest; a file that is not there is exit status 2."""
    words = ["data", str(UNITS), "--model", "meta-llama/Llama-3.1-8B", "--offline"]
    text = CliRunner().invoke(main, words)
    assert text.exit_code == 0, text.output
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert found["samples"] == {"train": 76, "validation": 4, "test": 0}
    assert f"longest {found['longest']}" in text.output
    assert f"advised seq_len: {found['advised_seq_len']}" in text.output
    wrong = CliRunner().invoke(main, ["data", "nowhere.jsonl", *words[2:]])
    assert wrong.exit_code == 2
    assert "nowhere.jsonl" in wrong.output
