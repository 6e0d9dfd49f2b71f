"""What estimate says of whole trainings and of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from whichlora.cli import main

MODEL = "HuggingFaceTB/SmolLM2-135M"


def estimate(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["estimate", MODEL, "--gpu", "l4", "--offline", "--json", *words])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["predictions"][0]
    return found


def test_packing_computes_no_padding_and_takes_less_time_than_padding(tmp_path: Path) -> None:
    """Of the same lengths, packed samples take fewer tokens and less time than padded ones, in the same setup."""
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(["30", "200"] * 200))
    words = ("--lengths", str(lengths), "--batch-size", "8", "--seq-len", "256", "--collate")
    padded, packed = estimate(*words, "pad"), estimate(*words, "pack")
    assert padded["real_tokens"] == packed["real_tokens"] == 200 * 230
    assert padded["longest_tokens"] == 200
    assert padded["padding_share"] > 0.4 > packed["padding_share"]
    assert packed["total_s"] < padded["total_s"]
    assert padded["total_interval_s"][0] < padded["total_s"] < padded["total_interval_s"][1]


def test_a_draft_and_examples_change_what_they_should() -> None:
    """Examples lengthen the prompt; a draft as large as the model itself pays for no token."""
    plain = estimate("--generate", "--prefill-len", "64", "--decode-len", "16")
    found = estimate("--generate", "--prefill-len", "64", "--decode-len", "16", "--shots", "2", "--draft", MODEL)
    assert found["prefill_len"] == 64 + 2 * 200
    assert found["prefill_s"] >= plain["prefill_s"]
    assert found["speculative"]["decode_s_per_token"] > found["decode_s_per_token"]


@pytest.mark.parametrize(
    "words",
    [
        ("--lengths", "mean=210,p95=430"),
        ("--lengths", "mean=210", "--samples", "10"),
        ("--lengths", "/no/such/file"),
        ("--samples", "0"),
        ("--samples", "10", "--epochs", "0"),
        ("--samples", "10", "--price-per-hour", "-1"),
        ("--generate", "--draft", MODEL, "--acceptance", "2"),
    ],
)
def test_wrong_words_are_refused_with_what_to_do(words: tuple[str, ...]) -> None:
    """A distribution without samples, a file that is not there, counts and rates that are none: exit code 2."""
    result = CliRunner().invoke(main, ["estimate", MODEL, "--gpu", "l4", "--offline", *words])
    assert result.exit_code == 2, result.output
