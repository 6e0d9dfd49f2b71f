"""Training steps of the real libraries on the null device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..stack import needs
from .conftest import card

pytestmark = pytest.mark.stack

MIB = 2**20

MODEL = """
import torch, transformers, peft
from whichlora_null import control
config = transformers.AutoConfig.for_model(
    "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False,
)
WEIGHTS = 2 * 32000 * 1024 + 4 * 1024**2 + 3 * 1024 * 2816 + 3 * 1024
def build(dtype=torch.bfloat16):
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
def step(model, optimizer):
    ids = torch.zeros(2, 256, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()
"""


@pytest.fixture(scope="module")
def lora(on_torch: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return what two processes saw that trained one LoRA step each."""
    needs("peft")
    program = f"""{MODEL}
model = build()
result["weights"] = torch.cuda.memory_allocated(), 2 * WEIGHTS
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
trainable = [p for p in model.parameters() if p.requires_grad]
adapters = sum(p.nbytes for p in trainable)
result["adapters"] = adapters, 4 * 8 * (4 * 2048 + 3 * (1024 + 2816))
optimizer = torch.optim.AdamW(trainable, lr=1e-4)
result["peak"], result["reserved"] = step(model, optimizer), torch.cuda.max_memory_reserved()
result["workspace"] = torch.cuda.memory_allocated() - result["weights"][0] - 3 * adapters
result["peak_over_rest"] = (result["peak"] - torch.cuda.memory_allocated()) / (2 * 256 * 32000)
result["device"] = control.peak_bytes()
"""
    return [on_torch(program).result for _ in range(2)]


def test_a_lora_step_takes_what_its_tensors_take(lora: Any) -> None:
    """There are weights, adapters and two moments of these, a matrix product's workspace, and logits at the peak."""
    seen = lora[0]
    assert seen["weights"][0] == pytest.approx(seen["weights"][1], abs=2 * MIB)  # remainders that are not split off
    assert seen["adapters"][0] == seen["adapters"][1]
    assert 0 <= seen["workspace"] < 65 * MIB
    assert seen["peak_over_rest"] > 10  # logits in 16 bit, their fp32 copy and its gradient: 2 + 4 + 4 bytes each


def test_a_second_run_takes_the_same_bytes(lora: Any) -> None:
    """Two processes that train the same model take the same bytes everywhere, and reserved is what the device gave."""
    assert lora[0] == lora[1]
    assert lora[0]["device"] == lora[0]["reserved"]


def test_a_step_that_does_not_fit_raises(on_torch: Callable[..., Any]) -> None:
    """Training that needs more than the card is out of memory in the step, and fits a card of twice the size."""
    program = """
import torch
layers = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False, device="cuda") for _ in range(6)))
result["weights"] = torch.cuda.memory_allocated()
try:
    layers(torch.zeros(8, 4096, device="cuda")).sum().backward()
    torch.optim.AdamW(layers.parameters()).step()
    result["fits"] = True
except torch.OutOfMemoryError:
    result["fits"] = False
"""
    small, large = (on_torch(program, card(gib=gib)).result for gib in (1, 2))
    assert small == {"weights": 6 * 4 * 4096**2, "fits": False}
    assert large == {"weights": 6 * 4 * 4096**2, "fits": True}


@pytest.fixture(scope="module")
def bits(on_torch: Callable[..., Any]) -> Any:
    """Return what bitsandbytes' layers and optimizers took."""
    needs("bitsandbytes")
    program = """
import gc, io, torch
import bitsandbytes as bnb
from whichlora_null import control
def taken(make):
    gc.collect()
    before = torch.cuda.memory_allocated()
    kept = make()
    return torch.cuda.memory_allocated() - before
def four(**options):
    layer = bnb.nn.Linear4bit(1024, 4096, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", **options)
    return layer.to("cuda")
def eight():
    layer = bnb.nn.Linear8bitLt(1024, 4096, bias=False, has_fp16_weights=False).to("cuda")
    layer(torch.zeros(2, 1024, dtype=torch.float16, device="cuda"))
    return layer
def state(kind):
    parameter = torch.nn.Parameter(torch.zeros(2048, 2048, device="cuda"))
    optimizer = kind([parameter])
    gc.collect()
    parameter.grad = torch.zeros_like(parameter)
    before = torch.cuda.memory_allocated(), control.managed_bytes()
    optimizer.step()
    torch.save(optimizer.state_dict(), io.BytesIO())
    return torch.cuda.memory_allocated() - before[0], control.managed_bytes() - before[1]
result["nf4"] = taken(lambda: four(compress_statistics=False))
result["double"] = taken(lambda: four(compress_statistics=True))
result["int8"] = taken(eight)
result["adamw8bit"], result["paged"] = state(bnb.optim.AdamW8bit), state(bnb.optim.PagedAdamW)
"""
    return on_torch(program).result


def test_bitsandbytes_layers_take_their_bits(bits: Any) -> None:
    """A weight takes half a byte in nf4, with 4 bytes for 64 of them, or 1 if doubly quantised; in int8 a byte."""
    weights = 4096 * 1024
    assert bits["nf4"] == pytest.approx(weights / 2 + weights / 64 * 4, abs=4096)
    assert bits["double"] == pytest.approx(weights / 2 + weights / 64 + weights / 64 / 256 * 4, abs=4096)
    assert bits["int8"] == pytest.approx(weights + 4096 * 4, rel=0.01)


def test_optimizer_state_lies_where_it_should(bits: Any) -> None:
    """8-bit state takes two bytes a parameter on the card, paged state managed memory instead; both can be saved."""
    parameters = 2048 * 2048
    assert bits["adamw8bit"] == [pytest.approx(2 * parameters, rel=0.05), 0]
    assert bits["paged"] == [pytest.approx(0, abs=1 << 16), 8 * parameters]


def test_a_qlora_script_from_loading_to_the_step(on_torch: Callable[..., Any], tmp_path: Any) -> None:
    """`from_pretrained` of a phantom in 4 bits, k-bit preparation, LoRA and a paged 8-bit optimizer train a step."""
    needs("bitsandbytes", "peft", "accelerate")
    program = f"""{MODEL}
import bitsandbytes as bnb
from whichlora.phantom import write_phantom
write_phantom(config, {str(tmp_path)!r}, shard_bytes=50_000_000)
load = dict(device_map={{"": 0}}, dtype=torch.bfloat16)
plain = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, **load)
result["plain"] = torch.cuda.memory_allocated(), 2 * WEIGHTS
del plain
four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
before = torch.cuda.memory_allocated()
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, quantization_config=four, **load)
linear = 4 * 1024**2 + 3 * 1024 * 2816
expected = 2 * (WEIGHTS - linear) + linear / 2 + linear / 64 * (1 + 4 / 256)
result["four_bit"] = (torch.cuda.memory_allocated() - before) / expected
model = peft.prepare_model_for_kbit_training(model)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad])
result["peak"] = step(model, optimizer) > 0
"""
    seen = on_torch(program).result
    assert seen["plain"][0] == pytest.approx(seen["plain"][1], abs=2 * MIB)
    assert seen["four_bit"] == pytest.approx(1, abs=0.02)
    assert seen["peak"]
