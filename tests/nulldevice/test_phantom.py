"""Weightless checkpoints against those that Transformers writes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from whichlora.phantom import write_phantom
from whichlora_estimators.errors import BadValue, Unsupported, WhichloraError

pytestmark = pytest.mark.stack

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
LLAMA = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "gemma2": {**LLAMA, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256},
    "bert": {**SMALL, "intermediate_size": 128, "architectures": ["BertForSequenceClassification"]},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "qwen2_moe": {**LLAMA, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return each weights file's tensors with dtype and shape, after checking that the file is as long as it says."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        assert len(content) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        found[path.name] = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return found


def save_for_real(kind: str, fields: dict[str, Any], folder: Path, shard_bytes: int) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **fields)
    if config.architectures:
        model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.bfloat16)
    else:
        auto: Any = (
            transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        )
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_bytes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_phantom_is_laid_out_as_the_real_checkpoint(name: str, tmp_path: Path) -> None:
    """Files, shards, tensor names, dtypes, shapes, index and configurations are those that save_pretrained writes."""
    kind, fields = name.split()[0], CONFIGS[name]
    report = write_phantom({"model_type": kind, **fields}, tmp_path / "phantom", shard_bytes=60_000)
    save_for_real(kind, fields, tmp_path / "real", 60_000)
    assert len(report.shards) > 1
    assert headers(tmp_path / "phantom") == headers(tmp_path / "real")
    for path in (tmp_path / "real").glob("*.json"):
        assert json.loads((tmp_path / "phantom" / path.name).read_text()) == json.loads(path.read_text()), path.name
    assert (
        report.weights_bytes
        == json.loads((tmp_path / "real/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_tensors_of_their_own(kind: str, tmp_path: Path) -> None:
    """A mixture of experts has the tensors that save_pretrained writes, and shards that keep to their limit."""
    write_phantom({"model_type": kind, **EXPERTS[kind]}, tmp_path / "phantom", shard_bytes=100_000)
    save_for_real(kind, EXPERTS[kind], tmp_path / "real", 100_000)
    phantom, real = headers(tmp_path / "phantom"), headers(tmp_path / "real")
    merged = [{name: entry for shard in found.values() for name, entry in shard.items()} for found in (phantom, real)]
    assert merged[0] == merged[1]
    assert len(phantom) > 1
    for name in phantom:
        assert (tmp_path / "phantom" / name).stat().st_size < 100_000 + 20_000  # the header


def test_a_phantom_loads_with_zeros(tmp_path: Path) -> None:
    """from_pretrained loads a phantom without a missing or unexpected tensor; its weights read as zeros."""
    import transformers

    write_phantom({"model_type": "llama", **LLAMA}, tmp_path, dtype="float16")
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(model.dtype) == "torch.float16"
    assert all(not parameter.any() for parameter in model.parameters())


def test_a_phantom_weighs_nothing(tmp_path: Path) -> None:
    """A model of 7 billion parameters takes less than a thousandth of its bytes on disk, in shards of 5 GB."""
    seven = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    report = write_phantom({"model_type": "llama", "vocab_size": 32000, **seven}, tmp_path)
    assert report.parameters == 6_738_415_616
    assert report.weights_bytes == 2 * report.parameters
    assert len(report.shards) == 3
    assert report.disk_bytes < report.weights_bytes / 1000


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """A dtype that nobody saves in, a model that is not there, an unknown kind and quantised weights are refused."""
    with pytest.raises(BadValue, match="bfloat16"):
        write_phantom({"model_type": "llama", **LLAMA}, tmp_path, dtype="int4")
    with pytest.raises(WhichloraError, match="no configuration"):
        write_phantom(tmp_path / "nowhere", tmp_path)
    with pytest.raises(WhichloraError, match="no configuration"):
        write_phantom({"model_type": "no such thing"}, tmp_path)
    with pytest.raises(Unsupported, match="quantised"):
        write_phantom({"model_type": "llama", **LLAMA, "quantization_config": {"quant_method": "awq"}}, tmp_path)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    """A folder that holds something stays as it is, and a phantom that fails leaves no folder behind."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "config.json").write_text("mine")
    with pytest.raises(BadValue, match="something already"):
        write_phantom({"model_type": "llama", **LLAMA}, full)
    assert [path.read_text() for path in full.iterdir()] == ["mine"]
    with pytest.raises(OSError, match="missing"):
        write_phantom({"model_type": "llama", **LLAMA}, tmp_path / "new", files={"a.txt": tmp_path / "missing"})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_command_copies_what_lies_beside_the_config(tmp_path: Path) -> None:
    """`whichlora phantom` takes the tokenizer and generation config of a folder along, its weights never."""
    from click.testing import CliRunner

    from whichlora.cli import main

    source = tmp_path / "source"
    source.mkdir()
    files = {
        "config.json": {"model_type": "llama", **LLAMA},
        "tokenizer.json": {},
        "generation_config.json": {"top_k": 7},
    }
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    (source / "model.safetensors").write_bytes(b"real")
    arguments = ["phantom", str(source), str(tmp_path / "made"), "--shard-size", "100KB", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert answer["tokenizer"]
    assert len(answer["shards"]) > 1
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text()) == {"top_k": 7}
    assert CliRunner().invoke(main, arguments).exit_code == 2
