"""The runtime on its own, called through ctypes: no PyTorch is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from whichlora.nulldevice import environment
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported

pytestmark = pytest.mark.stack

OUT_OF_MEMORY, INVALID_VALUE = 2, 1
PRELUDE = """
import ctypes
from whichlora_null import control
cuda = ctypes.CDLL(None)
MIB = 2**20
def malloc(size, function="cudaMalloc"):
    pointer = ctypes.c_void_p()
    flags = () if function == "cudaMalloc" else (0,)
    return getattr(cuda, function)(ctypes.byref(pointer), ctypes.c_size_t(size), *flags), pointer
def info():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value, total.value
def kind(pointer):
    attributes = (ctypes.c_int * 64)()
    cuda.cudaPointerGetAttributes(attributes, pointer)
    return attributes[0]
def free(pointer):
    return cuda.cudaFree(pointer)
"""


@pytest.fixture(scope="module")
def runtime(on_null: Callable[..., Any]) -> Callable[..., Any]:
    def run(program: str, **options: Any) -> Any:
        return on_null(PRELUDE + program, **options)

    return run


def test_memory_runs_out_at_the_card_s_size_and_comes_back(runtime: Callable[..., Any], small_card: Any) -> None:
    """A card of 1 GiB holds 1 GiB: one MiB more is refused, and what is freed can be had again."""
    program = """
result["before"] = info()
error, a = malloc(768 * MIB)
result["first"] = error, info()[0], control.used_bytes()
result["too_much"] = malloc(257 * MIB)[0]
error, b = malloc(256 * MIB)
result["rest"] = error, info()[0]
result["one_byte"] = malloc(1)[0]
result["freed"] = free(a), free(b), info()[0], control.used_bytes(), control.peak_bytes()
"""
    assert runtime(program, gpu=small_card).result == {
        "before": [2**30, 2**30],
        "first": [0, 256 << 20, 768 << 20],
        "too_much": OUT_OF_MEMORY,
        "rest": [0, 0],
        "one_byte": OUT_OF_MEMORY,
        "freed": [0, 0, 2**30, 0, 2**30],
    }


def test_a_context_is_missing_from_the_start(runtime: Callable[..., Any], small_card: Any) -> None:
    """Bytes that a context takes are neither free nor allocatable, and the total stays the card's."""
    ran = runtime("result['info'], result['all'] = info(), malloc(2**30)[0]", gpu=small_card, context_bytes=300 << 20)
    assert ran.result == {"info": [2**30 - (300 << 20), 2**30], "all": OUT_OF_MEMORY}


def test_use_is_the_sum_of_what_is_live_and_no_two_allocations_overlap(runtime: Callable[..., Any]) -> None:
    """Through thousands of random allocations and frees, use is the sum of live sizes in 2 MiB pages, all disjoint."""
    program = """
import random
random.seed(1)
live, wrong = {}, 0
for step in range(20000):
    if live and random.random() < 0.48:
        address = random.choice(list(live)) if step % 50 == 0 else next(iter(live))
        wrong += free(ctypes.c_void_p(address)) != 0
        del live[address]
    else:
        size = random.choice([1, 512, 2 * MIB, 20 * MIB, random.randrange(1, 600 * MIB)])
        error, pointer = malloc(size)
        if not error:
            live[pointer.value] = -(-size // (2 * MIB)) * 2 * MIB
    wrong += control.used_bytes() != sum(live.values()) if step % 500 == 0 else 0
ranges = sorted(live.items())
result["overlaps"] = sum(a + n > b for (a, n), (b, _) in zip(ranges, ranges[1:]))
result["wrong"], result["live"] = wrong, len(live) > 10
"""
    assert runtime(program).result == {"overlaps": 0, "wrong": 0, "live": True}


def test_addresses_never_run_out(runtime: Callable[..., Any]) -> None:
    """A thousand rounds of filling an 80 GiB card, more than it has addresses, succeed, with a segment kept."""
    program = """
_, kept = malloc(32 * MIB)
errors = 0
for _ in range(1000):
    pointers = [malloc(size * 2**30) for size in (40, 30, 9)]
    errors += sum(error for error, _ in pointers) + sum(free(p) for _, p in pointers)
    errors += any(abs(p.value - kept.value) < 32 * MIB for _, p in pointers)
result["errors"] = errors
"""
    assert runtime(program).result == {"errors": 0}


def test_what_is_not_allocated_cannot_be_freed(runtime: Callable[..., Any]) -> None:
    """Freeing twice, inside an allocation or on the host is an error and changes no sum; freeing nothing is none."""
    program = """
_, pointer = malloc(4 * MIB)
inside = ctypes.c_void_p(pointer.value + 2 * MIB)
result["errors"] = free(inside), free(ctypes.c_void_p(4096)), free(pointer), free(pointer), free(None)
result["used"], result["last"] = control.used_bytes(), (cuda.cudaGetLastError(), cuda.cudaGetLastError())
"""
    expected = {"errors": [1, 1, 0, 1, 0], "used": 0, "last": [INVALID_VALUE, 0]}
    assert runtime(program).result == expected


def test_managed_memory_is_counted_apart(runtime: Callable[..., Any], small_card: Any) -> None:
    """Managed memory may exceed the card, takes none of it, reads as zeros from the host, and is freed as any other."""
    program = """
error, pointer = malloc(5 * 2**30, "cudaMallocManaged")
result["error"], result["free"] = error, info()[0]
result["bytes"] = control.managed_bytes(), control.used_bytes()
result["read"] = ctypes.string_at(pointer.value + 3 * 2**30, 4).hex()
result["kind"] = kind(pointer)
result["freed"] = free(pointer), control.managed_bytes(), control.managed_peak_bytes()
"""
    assert runtime(program, gpu=small_card).result == {
        "error": 0,
        "free": 2**30,
        "bytes": [5 * 2**30, 0],
        "read": "00000000",
        "kind": 3,
        "freed": [0, 0, 5 * 2**30],
    }


def test_pinned_memory_is_the_host_s(runtime: Callable[..., Any]) -> None:
    """Pinned memory holds what is written to it, is told from other memory, and takes nothing of the card."""
    program = """
error, pointer = malloc(3 * MIB, "cudaHostAlloc")
ctypes.memmove(pointer, b"kept", 4)
copy = ctypes.create_string_buffer(4)
cuda.cudaMemcpy(copy, pointer, ctypes.c_size_t(4), 0)
result["read"] = copy.raw.decode()
result["kinds"] = kind(pointer), kind(malloc(1)[1]), kind(copy)
result["registered"] = cuda.cudaHostRegister(copy, ctypes.c_size_t(4), 0), kind(copy)
result["unregistered"] = cuda.cudaHostUnregister(copy), kind(copy), cuda.cudaHostUnregister(copy)
result["used"] = control.used_bytes(), control.pinned_bytes()
result["freed"] = cuda.cudaFreeHost(pointer), control.pinned_bytes()
"""
    expected = {"read": "kept", "kinds": [1, 2, 0], "used": [2 << 20, 4 << 20], "freed": [0, 0]}
    expected |= {"registered": [0, 1], "unregistered": [0, 0, INVALID_VALUE]}
    assert runtime(program).result == expected


def test_device_memory_faults_on_the_host(runtime: Callable[..., Any]) -> None:
    """Touching a device address from the host ends the process, as it would with a real card."""
    ran = runtime("ctypes.string_at(malloc(MIB)[1].value, 1)")
    assert ran.exit_code == -11


def test_mapped_memory_counts_until_released_and_unmapped(runtime: Callable[..., Any], small_card: Any) -> None:
    """Created memory counts until its handle is released and no address maps it; addresses alone are free."""
    program = """
u64, prop = ctypes.c_ulonglong, (ctypes.c_int * 16)(1, 0, 1, 0)
def reserve(size):
    address = u64()
    return cuda.cuMemAddressReserve(ctypes.byref(address), ctypes.c_size_t(size), 0, None, 0), address
def create(size):
    handle = u64()
    return cuda.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(size), prop, 0), handle
error, address = reserve(4 * 2**30)
result["reserve"] = error, control.used_bytes()
error, handle = create(20 * MIB)
result["create"] = error, control.used_bytes()
result["map"] = cuda.cuMemMap(address, ctypes.c_size_t(20 * MIB), 0, handle, 0), control.used_bytes()
result["map_again"] = cuda.cuMemMap(address, ctypes.c_size_t(20 * MIB), 0, handle, 0)
result["release"] = cuda.cuMemRelease(handle), control.used_bytes()
result["unmap"] = cuda.cuMemUnmap(address, ctypes.c_size_t(20 * MIB)), control.used_bytes()
result["unmap_again"] = cuda.cuMemUnmap(address, ctypes.c_size_t(20 * MIB))
handles = [create(20 * MIB) for _ in range(52)]
result["full"] = [error for error, _ in handles].count(2), control.used_bytes()
result["emptied"] = sum(cuda.cuMemRelease(h) for e, h in handles if not e), control.used_bytes()
result["address_free"] = cuda.cuMemAddressFree(address, ctypes.c_size_t(4 * 2**30)), control.peak_bytes()
"""
    mib = 2**20
    assert runtime(program, gpu=small_card).result == {
        "reserve": [0, 0],
        "create": [0, 20 * mib],
        "map": [0, 20 * mib],
        "map_again": INVALID_VALUE,
        "release": [0, 20 * mib],
        "unmap": [0, 0],
        "unmap_again": INVALID_VALUE,
        "full": [1, 51 * 20 * mib],
        "emptied": [0, 0],
        "address_free": [0, 51 * 20 * mib],
    }


def test_nvml_says_what_the_process_holds(runtime: Callable[..., Any], small_card: Any) -> None:
    """To NVML, memory in use is context plus allocations, and this process holds all of it."""
    program = """
import os
malloc(100 * MIB)
nvml, device = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
result["open"] = nvml.nvmlInit_v2(), nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
memory = (ctypes.c_ulonglong * 3)()
nvml.nvmlDeviceGetMemoryInfo(device, memory)
class Process(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong)]
count, process = ctypes.c_uint(1), Process()
nvml.nvmlDeviceGetComputeRunningProcesses(device, ctypes.byref(count), ctypes.byref(process))
result["memory"], result["process"] = list(memory), (count.value, process.pid == os.getpid(), process.used)
"""
    used = 150 << 20
    assert runtime(program, gpu=small_card, context_bytes=50 << 20).result == {
        "open": [0, 0],
        "memory": [2**30, 2**30 - used, used],
        "process": [1, True, used],
    }


def test_libcuda_is_the_null_device_by_any_name(runtime: Callable[..., Any], small_card: Any) -> None:
    """Whoever opens libcuda.so.1 finds the same card, with the same memory in use."""
    program = """
malloc(64 * MIB)
for name in ("libcuda.so.1", "libcuda.so"):
    driver = ctypes.CDLL(name)
    free_bytes, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver.cuMemGetInfo_v2(ctypes.byref(free_bytes), ctypes.byref(total))
    result[name] = free_bytes.value, total.value
"""
    expected = [2**30 - (64 << 20), 2**30]
    assert runtime(program, gpu=small_card).result == {"libcuda.so.1": expected, "libcuda.so": expected}


def test_a_call_that_is_not_written_fails_by_name(runtime: Callable[..., Any]) -> None:
    """Each library's missing function names itself once on stderr and returns that library's own error."""
    program = """
names = ["cudaMallocPitch", "cuMemAllocPitch_v2", "cublasSsyrk_v2", "cudnnConvolutionForward", "cusolverDnSgetrf"]
names += ["cufftExecC2C", "ncclAllReduce", "cusparseSpMM"]
result["errors"] = [getattr(cuda, name)() for name in names]
result["again"], result["last"] = cuda.ncclAllReduce(), control.last_missing()
control.reset()
result["forgotten"] = control.last_missing()
"""
    ran = runtime(program)
    expected = {"errors": [801, 801, 15, 3000, 9, 16, 3, 10], "again": 3, "last": "ncclAllReduce", "forgotten": ""}
    assert ran.result == expected
    assert ran.stderr.count("null device: cufftExecC2C is not implemented") == 1
    assert ran.stderr.count("null device: ncclAllReduce is not implemented") == 1


def test_a_process_without_its_variables_stops(runtime: Callable[..., Any]) -> None:
    """Without its card's variables the null device ends the process and names what is missing: it has no default."""
    ran = runtime("malloc(1)", extra={"NULLCUDA_TOTAL_BYTES": ""})
    assert ran.exit_code == 70
    assert "NULLCUDA_TOTAL_BYTES" in ran.stderr


def test_an_ordinary_process_is_not_on_a_null_device() -> None:
    """Outside, the control module says so, and refuses to answer."""
    from whichlora.nulldevice import control

    assert not control.is_null_device()
    with pytest.raises(RuntimeError, match="null device"):
        control.used_bytes()


def test_what_cannot_be_right_is_refused(small_card: Any) -> None:
    """The driver's pool, an unknown compute capability, a context larger than the card, a routing nobody knows."""
    with pytest.raises(Unsupported, match="cudaMallocAsync"):
        environment(small_card, alloc_conf="backend:cudaMallocAsync")
    with pytest.raises(Unsupported, match=r"6\.1"):
        environment(dataclasses.replace(small_card, compute_capability=(6, 1)))
    with pytest.raises(BadValue, match="context"):
        environment(small_card, context_bytes=2**30)
    with pytest.raises(UnknownName, match="routing"):
        environment(small_card, routing="lopsided")
    assert environment(small_card, routing="skewed")["NULLCUDA_ROUTING"] == "skewed"
