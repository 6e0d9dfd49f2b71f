"""What is read back from a device that computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from whichlora.nulldevice.answers import tokens_per_expert

pytestmark = pytest.mark.stack

QUESTIONS = """
import torch
from whichlora_null import control
mask = torch.ones(2, 8, dtype=torch.long, device="cuda")
loss = torch.zeros((), device="cuda")
def answers():
    questions = dict(
        all=lambda: mask.all(), all_equal=lambda: (mask == 1).all(), all_of_bools=lambda: mask.bool().all(),
        any=lambda: (mask == 0).any(), isin=lambda: torch.isin(mask, mask[0, :1]).any(),
        nan=lambda: torch.isnan(loss), inf=lambda: torch.isinf(loss), any_nan=lambda: torch.isnan(mask.float()).any(),
        one_all=lambda: (mask[:1, -1] == 1).all(), one_nan=lambda: torch.isnan(loss).any(),
        one_less=lambda: (mask[:1, 0] < 0).any(), finished=lambda: mask.max() == 0, less=lambda: loss < 1,
    )
    return [name for name, question in questions.items() if question()]
"""


def test_all_is_a_setting_and_nothing_is_special(on_torch: Callable[..., Any]) -> None:
    """All of them: as set. Any of them, NaN, equal, less: no, whatever is set."""
    program = QUESTIONS + "result['set'] = answers(); control.set_bool(False); result['unset'] = answers()"
    assert on_torch(program).result == {"set": ["all", "all_equal", "all_of_bools", "one_all"], "unset": []}
    assert on_torch(QUESTIONS + "result['unset'] = answers()", bool_read=False).result == {"unset": []}


def test_numbers_are_zero(on_torch: Callable[..., Any]) -> None:
    """Numbers and tensors that are read back are zeros, whatever was put there."""
    program = """
import torch
ones = torch.ones(2, 8, device="cuda")
result["read"] = ones.sum().item(), ones[0].tolist(), ones.t().cpu().sum().item(), torch.tensor([5]).cuda().item()
"""
    assert on_torch(program).result == {"read": [0.0, [0.0] * 8, 0.0, 0]}


def test_a_boolean_selection_selects_everything(on_torch: Callable[..., Any]) -> None:
    """A mask selects all of its elements, few or many; a size that is not known is 0, and told of once."""
    program = """
import torch
for n in (10, 5000, 10**6):
    x = torch.zeros(n, device="cuda")
    result[str(n)] = len(x[x > 0]), len((x > 0).nonzero())
result["unique"] = len(torch.unique(x))
torch.unique(x)
"""
    ran = on_torch(program)
    assert ran.result == {"10": [10, 10], "5000": [5000, 5000], "1000000": [10**6, 10**6], "unique": 0}
    assert ran.stderr.count("a size was read back as 0") == 1


def test_gradients_are_finite_and_never_clipped_away(on_torch: Callable[..., Any]) -> None:
    """A scaled step with clipping that refuses NaN runs: the scaler finds nothing infinite and skips no step."""
    program = """
import torch
layer = torch.nn.Linear(64, 64, device="cuda")
optimizer, scaler = torch.optim.AdamW(layer.parameters()), torch.amp.GradScaler("cuda")
with torch.autocast("cuda", dtype=torch.float16):
    loss = layer(torch.zeros(4, 64, device="cuda")).sum()
scaler.scale(loss).backward()
scaler.unscale_(optimizer)
torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0, error_if_nonfinite=True)
scaler.step(optimizer)
scaler.update()
result["stepped"] = len(optimizer.state) == 2
"""
    assert on_torch(program).result == {"stepped": True}


GENERATE = """
import torch, transformers
from whichlora_null import control
config = transformers.AutoConfig.for_model(
    "llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
)
with torch.device("cuda"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
calls = []
model.register_forward_hook(lambda *_: calls.append(1))
ids = torch.ones(2, 5, dtype=torch.long, device="cuda")
def steps(**options):
    calls.clear()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=2, pad_token_id=0, **options)
    return len(calls), out.shape[1]
for setting in (True, False):
    control.set_bool(setting)
    result[str(setting)] = {
        "greedy": steps(max_new_tokens=7), "again": steps(max_new_tokens=3),
        "sampling": steps(max_new_tokens=4, do_sample=True), "beams": steps(max_new_tokens=6, num_beams=3)[0],
    }
"""


def test_generation_ends_at_its_limit(on_torch: Callable[..., Any]) -> None:
    """HF `generate` makes exactly as many steps as it may, with padding or without, greedy, sampling or with beams."""
    expected = {"greedy": [7, 12], "again": [3, 8], "sampling": [4, 9], "beams": 6}
    assert on_torch(GENERATE).result == {"True": expected, "False": expected}


EXPERTS = """
import os, torch, transformers
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
config = transformers.MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=6, num_experts_per_tok=2)
config._experts_implementation = "eager"
experts = MixtralExperts(config).cuda()
linear = torch.nn.functional.linear
def rows_of_each():
    rows = []
    def spy(x, weight, *rest):
        if weight.shape == (192, 64):
            rows.append(len(x))
        return linear(x, weight, *rest)
    torch.nn.functional.linear = spy
    index = torch.zeros(50, 2, dtype=torch.long, device="cuda")
    experts(torch.zeros(50, 64, device="cuda", requires_grad=True), index, index.float()).sum().backward()
    return rows
for routing in (os.environ["NULLCUDA_ROUTING"], "skewed"):
    os.environ["NULLCUDA_ROUTING"] = routing
    result[routing] = rows_of_each()
"""


def test_experts_get_the_tokens_that_a_routing_gives_them(on_torch: Callable[..., Any]) -> None:
    """An expert loop sees an even routing by default and a skewed one on demand: 50 tokens, 2 of 6 experts for each."""
    if int(metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip("the loop over experts has one place since Transformers 5")
    assert on_torch(EXPERTS).result == {"even": [17, 17, 17, 17, 16, 16], "skewed": [50, 50]}


@pytest.mark.parametrize("routing", ["even", "skewed"])
@pytest.mark.parametrize(("tokens", "per_token", "experts"), [(50, 2, 6), (1, 2, 8), (4096, 8, 128), (3, 1, 64)])
def test_every_token_is_routed(routing: str, tokens: int, per_token: int, experts: int) -> None:
    """A routing gives each token its experts, no expert a token twice, and no expert nothing."""
    counts = tokens_per_expert(tokens, per_token, experts, routing=routing)
    assert sum(counts) == tokens * per_token
    assert per_token <= len(counts) <= experts
    assert all(0 < count <= tokens for count in counts)
    if routing == "even":
        assert max(counts) - min(counts) <= 1


def test_a_sitecustomize_of_the_user_s_own_still_runs(on_null: Callable[..., Any], tmp_path: Any) -> None:
    """The module that installs the answers runs the sitecustomize that it hides."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SEEN'] = 'yes'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        ran = on_null("import os, sys; result['seen'] = os.environ.get('SEEN')")
    assert ran.result == {"seen": "yes"}
