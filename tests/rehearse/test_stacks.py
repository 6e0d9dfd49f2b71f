"""Rehearsals under other versions, and of models that are loaded."""

from __future__ import annotations

from importlib import metadata

import pytest

from whichlora.nulldevice.compiler import cache_folder
from whichlora.rehearse import CHECKPOINT, make_stack, rehearse
from whichlora.rehearse.stacks import parse_stack
from whichlora_estimators.errors import BadValue, WhichloraError

from .conftest import tiny

pytestmark = pytest.mark.stack

OLDER = "peft==0.18.1"


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("transformers==5.8.1,torch==2.6.0", ("torch==2.6.0", "transformers==5.8.1")),
        ("transformers>=4.45,<5, peft", ("peft", "transformers>=4.45,<5")),
        ("bitsandbytes == 0.45.0", ("bitsandbytes==0.45.0",)),
    ],
)
def test_requirements_are_read(text: str, requirements: tuple[str, ...]) -> None:
    """Requirements stand between commas, in any order and spacing."""
    assert parse_stack(text) == requirements


@pytest.mark.parametrize("text", ["", "torch=2.6", "torch==2.6,torch==2.7", "--index-url x", "a;b"])
def test_what_is_no_requirement_is_refused(text: str) -> None:
    """Nothing that is no list of requirements reaches pip."""
    with pytest.raises(BadValue):
        parse_stack(text)


def test_another_release_runs() -> None:
    """A rehearsal under another PEFT says so in its versions and quantises as here; the environment is made once."""
    try:
        older = make_stack(OLDER)
    except WhichloraError as error:
        pytest.skip(f"pip cannot get it here: {error}"[:200])
    told: list[str] = []
    assert make_stack(OLDER, told.append) == older
    assert told == []
    assert older.python.is_relative_to(cache_folder().parent / "stacks")
    (seen,) = rehearse([tiny(quantization="nf4")], "rtx-4090", stack=older)
    assert seen.outcome == "ok", seen.error
    assert (seen.stack, seen.versions["peft"]) == (OLDER, OLDER.partition("==")[2])
    assert seen.versions["torch"] == metadata.version("torch")


def test_models_are_loaded_from_checkpoints() -> None:
    """from_pretrained leaves the weights that the config says, of whatever quantisation; it trains and generates."""
    asked = [tiny(id=name, quantization=name, precision="bf16-true") for name in ("none", "nf4", "int8")]
    asked += [tiny(phase="generate", prefill_len=32, decode_len=3)]
    loaded = list(rehearse(asked, "rtx-4090", jobs=1, load=CHECKPOINT))
    made = list(rehearse(asked, "rtx-4090", jobs=1))
    for each, other in zip(loaded, made, strict=True):
        assert each.outcome == "ok", each.error
        assert each.weights_bytes == pytest.approx(other.weights_bytes, rel=0.02)
        assert each.trainable_params == other.trainable_params
        assert each.allocated_peak_bytes == pytest.approx(other.allocated_peak_bytes, rel=0.02)
