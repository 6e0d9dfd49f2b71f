"""Rehearsals under other versions, and of models that are loaded."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from whichlora.nulldevice.compiler import cache_folder
from whichlora.rehearse import CHECKPOINT, OtherStack, make_stack, rehearse
from whichlora.rehearse.stacks import parse_stack
from whichlora_estimators.errors import BadValue, UnknownName, WhichloraError

from .conftest import tiny

pytestmark = pytest.mark.stack


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


@pytest.fixture(scope="module")
def same() -> OtherStack:
    """Return an environment of the installed PyTorch, over what a killed process left of it."""
    text = f"torch=={metadata.version('torch').partition('+')[0]}"
    made = make_stack(text)
    folder = made.python.parents[1]
    (folder / "whichlora-complete.json").unlink()
    (folder / "bin" / "python").unlink()
    return make_stack(text)


def test_an_environment_with_equal_versions_gives_equal_bytes(same: OtherStack) -> None:
    """Over the installed libraries, with none that differs, a rehearsal takes what it takes here."""
    (here,), (there,) = (list(rehearse([tiny()], "rtx-4090", stack=stack)) for stack in (None, same))
    assert there.outcome == "ok", there.error
    assert (there.stack, here.stack) == (same.text, "")
    assert there.phases == here.phases
    assert there.versions == here.versions


def test_an_environment_is_made_once(same: OtherStack) -> None:
    """The second time it is there, half-made ones are made anew, and nothing is told."""
    told: list[str] = []
    assert make_stack(same.text, told.append) == same
    assert told == []
    assert same.python.is_relative_to(cache_folder().parent / "stacks")


def test_what_pip_says_is_shown() -> None:
    """A version that there is not ends with pip's own words."""
    with pytest.raises(WhichloraError, match=r"peft==0\.0\.0\.1"):
        make_stack("peft==0.0.0.1")


def test_another_release_runs() -> None:
    """A rehearsal under another Transformers says so in its versions, and runs."""
    try:
        older = make_stack("transformers==4.57.6")
    except WhichloraError as error:
        pytest.skip(f"pip cannot get it here: {error}"[:200])
    (seen,) = rehearse([tiny()], "rtx-4090", stack=older)
    assert seen.outcome == "ok", seen.error
    assert seen.versions["transformers"] == "4.57.6"
    assert seen.versions["torch"] == metadata.version("torch")


def test_models_are_loaded_from_checkpoints(tmp_path: Path) -> None:
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
    with pytest.raises(UnknownName):
        rehearse([tiny()], "rtx-4090", load="download")
