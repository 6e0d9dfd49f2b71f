"""PyTorch on the null device: its allocator, streams, kernels, and what happens where the device ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..stack import needs
from .conftest import card

pytestmark = pytest.mark.stack

GIB = 2**30


@pytest.fixture(scope="module")
def filled(on_torch: Callable[..., Any]) -> Any:
    """Return what a program saw that fills a card of 16 GiB in pieces of half a GiB."""
    program = """
import torch
from whichlora_null import control
half, held = 2**29, []
try:
    while True:
        held.append(torch.empty(half, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError as error:
    result["message"] = str(error)
result["pieces"], result["free"] = len(held), torch.cuda.mem_get_info()[0]
result["reserved"], result["used"] = torch.cuda.memory_reserved(), control.used_bytes()
result["allocated_peak"], result["ooms"] = torch.cuda.max_memory_allocated(), torch.cuda.memory_stats()["num_ooms"]
del held
torch.cuda.empty_cache()
result["after"] = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0], control.used_bytes()
"""
    return on_torch(program, card("8.9", gib=16)).result


def test_pytorch_runs_out_at_the_card_s_size(filled: Any) -> None:
    """A 16 GiB card holds 32 halves of a GiB; the 33rd is PyTorch's own out-of-memory error, with the card's size."""
    assert filled["pieces"] == 32
    assert filled["ooms"] == 1
    assert "total capacity of 16.00 GiB of which 0 bytes is free" in filled["message"]
    assert "this process has 16.00 GiB memory in use" in filled["message"]


def test_reserved_is_what_the_device_gave(filled: Any) -> None:
    """PyTorch's reserved bytes are the device's bytes in use, and both are zero after emptying the cache."""
    assert filled["reserved"] == filled["used"] == filled["allocated_peak"] == 16 * GIB
    assert filled["free"] == 0
    assert filled["after"] == [0, 16 * GIB, 0]


def test_fragmentation_runs_out_and_expandable_segments_do_not(on_torch: Callable[..., Any]) -> None:
    """Half a split segment cannot serve a larger block, unless segments expand: the allocator is PyTorch's own."""
    program = """
import torch
from whichlora_null import control
def piece(mib):
    return torch.empty(mib * 2**20, dtype=torch.uint8, device="cuda")
piece(1600)
pieces = [piece(100) for _ in range(16)]
kept = pieces[::2]
del pieces
try:
    big = piece(900)
    result["fits"] = True
except torch.OutOfMemoryError:
    result["fits"] = False
result["same"] = torch.cuda.memory_reserved() == control.used_bytes()
"""
    two_gib = card("8.0", gib=2)
    assert on_torch(program, two_gib, alloc_conf="").result == {"fits": False, "same": True}
    assert on_torch(program, two_gib, alloc_conf="expandable_segments:True").result == {"fits": True, "same": True}


def test_the_driver_s_own_pool_fails_by_name(on_null: Callable[..., Any]) -> None:
    """A script that asks for cudaMallocAsync itself is told which call the null device does not have."""
    program = """
import os
os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
import torch
torch.zeros(1, device="cuda")
"""
    ran = on_null(program)
    assert ran.exit_code == 1
    assert "cudaDeviceGetDefaultMemPool is not implemented" in ran.stderr


def test_streams_events_and_graphs(on_torch: Callable[..., Any]) -> None:
    """Events are reached at once and in order, pinned tensors say so, and a captured graph has a pool of its own."""
    program = """
import torch
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
with torch.cuda.stream(torch.cuda.Stream()):
    start.record()
    on_device = torch.ones(64).pin_memory().to("cuda", non_blocking=True)
    end.record()
end.synchronize()
result["reached"] = start.query() and end.query() and start.elapsed_time(end) >= 0
result["pinned"] = torch.ones(64).pin_memory().is_pinned(), torch.ones(64).is_pinned()
graph = torch.cuda.CUDAGraph()
before = torch.cuda.memory_allocated()
with torch.cuda.graph(graph):
    product = torch.zeros(1024, 1024, device="cuda") @ torch.zeros(1024, 1024, device="cuda")
graph.replay()
torch.cuda.synchronize()
pools = {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory._snapshot()["segments"]}
result["pools"] = len(pools) > 1 and product.shape == (1024, 1024)
"""
    assert on_torch(program).result == {"reached": True, "pinned": [True, False], "pools": True}


@pytest.fixture(scope="module")
def built_for(on_torch: Callable[..., Any]) -> Any:
    """Return the architectures that PyTorch's build has code for, as PyTorch names them."""
    return on_torch("import torch; result['built'] = torch.cuda.get_arch_list()").result["built"]


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_attention_and_sorting_run_on_every_capability(
    on_torch: Callable[..., Any], built_for: list[str], capability: str
) -> None:
    """From 7.5 to 12.0 the card is the one asked for, attention runs both ways, and from 8.0 on it is flash."""
    program = """
import torch
query = torch.zeros(2, 4, 128, 64, device="cuda", dtype=torch.float16, requires_grad=True)
out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
out.sum().backward()
torch.sort(torch.zeros(5000, device="cuda"))
properties = torch.cuda.get_device_properties(0)
result["kernel"] = "Flash" in out.grad_fn.name()
result["card"] = properties.name, torch.cuda.get_device_capability(), properties.multi_processor_count
result["cudnn"] = torch.backends.cudnn.version() > 0
"""
    ran = on_torch(program, card(capability))
    major, minor = map(int, capability.split("."))
    if "no kernel image" in ran.stderr and not any(code.startswith(f"sm_{major}") for code in built_for):
        pytest.skip("this build of PyTorch has no code for it")
    assert ran.result == {"kernel": major >= 8, "card": [f"Null {capability}", [major, minor], 100], "cudnn": True}
    assert "not implemented" not in ran.stderr


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_cudnn_attention_is_told_and_not_preferred(on_torch: Callable[..., Any], capability: str) -> None:
    """Where PyTorch would prefer cuDNN's attention flash runs; asked for by name, cuDNN fails with the call's name."""
    program = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
query = torch.zeros(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
attend = torch.nn.functional.scaled_dot_product_attention
result["chosen"] = "Flash" in attend(query, query, query).grad_fn.name()
try:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attend(query, query, query)
except RuntimeError:
    result["asked"] = "raised"
"""
    ran = on_torch(program, card(capability))
    assert ran.result == {"chosen": True, "asked": "raised"}
    assert "null device: cudnn" in ran.stderr


def test_a_card_that_pytorch_was_not_built_for_runs_nothing(on_torch: Callable[..., Any]) -> None:
    """Where PyTorch's build has no code for a card, its kernels fail as they would there; others of the build run."""
    program = """
import torch
from whichlora_null import control
major, minor = torch.cuda.get_device_capability()
built = [name.split("_")[1] for name in torch.cuda.get_arch_list()]
result["built"] = any(code.startswith(str(major)) and int(code) <= 10 * major + minor for code in built)
try:
    torch.zeros(1, device="cuda")
    result["runs"] = True
except RuntimeError as error:
    result["runs"] = "no kernel image" not in str(error)
"""
    for capability in ("7.0", "12.1"):
        seen = on_torch(program, card(capability)).result
        assert seen["runs"] == seen["built"], capability


def test_convolutions_fail_by_name(on_torch: Callable[..., Any]) -> None:
    """What needs cuDNN raises in PyTorch, and the missing function's name is on stderr and kept."""
    program = """
import torch
from whichlora_null import control
try:
    torch.nn.Conv2d(3, 8, 3).cuda()(torch.zeros(1, 3, 8, 8, device="cuda"))
except RuntimeError:
    result["raised"] = True
result["missing"] = control.last_missing()[:5]
"""
    ran = on_torch(program)
    assert ran.result == {"raised": True, "missing": "cudnn"}
    assert "null device: cudnn" in ran.stderr


@pytest.mark.parametrize(("visible", "devices"), [("2,3", 1), ("", 0)])
def test_a_script_may_choose_its_card(on_torch: Callable[..., Any], visible: str, devices: int) -> None:
    """A script that sets CUDA_VISIBLE_DEVICES finds one card whichever it names, and none if it names none."""
    program = f"""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "{visible}"
import torch
result["devices"], result["available"] = torch.cuda.device_count(), torch.cuda.is_available()
"""
    assert on_torch(program).result == {"devices": devices, "available": devices == 1}


def test_compiled_functions_run(on_torch: Callable[..., Any], tmp_path: Any) -> None:
    """torch.compile makes Triton kernels for the card, launches them without effect, and their outputs take memory."""
    needs("triton")
    program = """
import torch
function = torch.compile(lambda x: (x * 2 + 1).relu())
x = torch.zeros(2**20, device="cuda")
before = torch.cuda.memory_allocated()
y = function(x)
result["bytes"] = torch.cuda.memory_allocated() - before
"""
    extra = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    extra |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    assert on_torch(program, card("8.6"), extra=extra).result == {"bytes": 4 * 2**20}
    assert list((tmp_path / "triton").rglob("*.cubin"))
