"""Models of the Hub that are not at hand, in a script that knows nothing of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from whichlora.checkpoints import find_sources
from whichlora.rehearse.hub import HUB
from whichlora.rehearse.phases import Phases
from whichlora.rehearse.script import rehearse_script
from whichlora.rehearse.standin import made_up_tokenizer

from .conftest import TINY

pytestmark = pytest.mark.stack

SCRIPT = """
import sys
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name)
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bit, device_map={"": 0})
assert len(tokenizer) == model.config.vocab_size
model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
text = tokenizer.apply_chat_template([{"role": "user", "content": "Where are the bytes? " * 40}], tokenize=False)
batch = tokenizer([text, text[:99]], return_tensors="pt", padding=True).to("cuda")
assert 200 < batch["input_ids"].shape[1] < 250, batch["input_ids"].shape
model.train()
for _ in range(2):
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
torch.cuda.reset_peak_memory_stats()
with torch.no_grad():
    model.generate(**tokenizer("How many?", return_tensors="pt").to("cuda"), max_new_tokens=2)
print("peak since then", torch.cuda.max_memory_allocated())
"""


def model_in_cache(cache: Path, config: dict[str, Any]) -> str:
    """Put a model's config alone into a cache of the Hub's layout, as asking for it would."""
    snapshot = cache / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    refs = cache / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    return "org/model"


def test_a_qlora_script_runs_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """It loads weights that are not there in 4 bits, tokenizes, trains and generates; what stood in is told."""
    cache = tmp_path / "hub"
    name = model_in_cache(cache, {**TINY, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000})
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = rehearse_script([sys.executable, str(script), name], "rtx-4090")
    said = capfd.readouterr()
    assert run.outcome == "ok", said.err
    (made,) = run.stand_ins
    assert (made["model"], made["tokenizer"]) == ("org/model", "made up")
    assert not list(cache.rglob("*.safetensors"))
    assert {"loading", "forward", "backward", "optimizer", "generation"} <= run.phases.keys()
    peaks = {phase: peak.allocated_peak_bytes or 0 for phase, peak in run.phases.items()}
    assert max(peaks.values()) == run.allocated_peak_bytes == peaks["backward"]
    whole_weight, quantized = 2 * 1024 * 4096, 2 * (4 * 1024**2 + 3 * 1024 * 4096) // 2
    assert peaks["loading"] > 2 * 2 * 8000 * 1024 + quantized + whole_weight // 2
    (told,) = [line for line in said.out.splitlines() if line.startswith("peak since then")]
    assert int(told.split()[-1]) <= max(peaks["generation"], peaks["between steps"]) < peaks["backward"]


def test_what_cannot_be_stood_in_for_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that nobody knows fails in the script, as it would there, and the run says that no stand-in was made."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = "import huggingface_hub; huggingface_hub.hf_hub_download('org/nothing-at-all', 'config.json')"
    run = rehearse_script([sys.executable, "-c", program], "rtx-4090", stderr=subprocess.DEVNULL)
    assert run.outcome == "failed"
    assert [("org/nothing-at-all", "offline" in made["error"]) for made in run.stand_ins] == [
        ("org/nothing-at-all", True)
    ]


@pytest.mark.parametrize(
    "tokens",
    [{}, {"bos_token_id": 7, "eos_token_id": [9, 5]}, {"bos_token_id": 0, "eos_token_id": 0}, {"eos_token_id": 1}],
)
def test_a_made_up_tokenizer_has_the_model_s_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, Any]
) -> None:
    """As many tokens as the vocabulary, the config's own ids for begin and end, every text to about a quarter of it."""
    from tokenizers import Tokenizer

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **tokens}))
    files = made_up_tokenizer(find_sources(str(tmp_path), offline=True), tmp_path)
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    assert tokenizer.get_vocab_size() == TINY["vocab_size"]
    settings = json.loads(files["tokenizer_config.json"].read_text())
    for name, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id")):
        if key in tokens:
            value = tokens[key][0] if isinstance(tokens[key], list) else tokens[key]
            assert tokenizer.token_to_id(settings[name]) == value
    assert len(tokenizer.encode("a text of 23 characters").ids) == 6


def test_phases_are_named_at_their_end() -> None:
    """What ran before backward was forward, and what failed in the optimizer's step is known to be its."""
    phases = Phases()
    phases.begin("backward")
    assert phases.now() == "backward"
    phases.end()
    phases.begin("optimizer")
    assert phases.now() == "optimizer"
    phases.begin("optimizer")  # the first step raised, and somebody caught it
    phases.end()
    assert phases.now() == "between steps"
    assert phases.now(ValueError()) == "forward"
    assert HUB not in os.environ
