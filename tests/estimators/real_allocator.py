"""Random traces of malloc and free, run on PyTorch's real caching allocator (on the null device) and on our model.

Run as a program it is the process that holds the real allocator: a trace in on each line, its counters out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from random import Random
from typing import IO, Any

MIB = 2**20
DEVICE_BYTES = 8 * 2**30  # small, so that the null device has new addresses for many expandable segments of 9/8 of it
MALLOC, FREE, EMPTY_CACHE, RESET_PEAKS = range(4)
COUNTERS = (
    "allocated_bytes",
    "allocated_peak_bytes",
    "reserved_bytes",
    "reserved_peak_bytes",
    "active_bytes",
    "inactive_split_bytes",
    "requested_bytes",
    "segment_count",
    "retry_count",
    "oom_count",
    "device_malloc_count",
    "device_free_count",
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Events on a device that has `limit_bytes` left for this process, under settings as AllocatorConfig names them.

    An event is (MALLOC, bytes, stream), (FREE, which malloc), (EMPTY_CACHE,) or (RESET_PEAKS,). Freeing a malloc that
    failed does nothing.
    """

    settings: dict[str, Any]
    limit_bytes: int
    events: list[tuple[int, ...]]


def environment() -> dict[str, str]:
    """Return the environment variables of a process that has a null device of DEVICE_BYTES for a GPU."""
    from whichlora.nulldevice import environment as null_device
    from whichlora_estimators.gpus import find_gpu

    gpu = replace(find_gpu("a100-sxm-80gb"), total_bytes=DEVICE_BYTES)
    # torch logs every failed cudaMalloc, and they are what these traces are about
    return {**os.environ, **null_device(gpu, answers=False), "TORCH_CPP_LOG_LEVEL": "ERROR"}


class RealAllocator:
    """The real allocator, waiting in another process for traces."""

    def __init__(self, to: IO[str], answers: IO[str]) -> None:
        self._to, self._answers = to, answers

    def run(self, trace: Trace) -> list[list[int]]:
        """Return COUNTERS after every event."""
        counters: list[list[int]] = self._ask({**asdict(trace), "text": settings_text(trace.settings)})
        return counters

    def settings(self, text: str) -> dict[str, Any] | None:
        """Return how torch understands PYTORCH_CUDA_ALLOC_CONF, None where it refuses it."""
        settings: dict[str, Any] | None = self._ask({"settings": text})
        return settings

    def _ask(self, question: dict[str, Any]) -> Any:
        self._to.write(json.dumps(question) + "\n")
        self._to.flush()
        return json.loads(self._answers.readline())


@contextmanager
def real_allocator() -> Iterator[RealAllocator]:
    """Start one process that answers any number of traces."""
    command = [sys.executable, "-W", "ignore", __file__]
    with subprocess.Popen(
        command, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield RealAllocator(process.stdin, process.stdout)
        finally:
            process.stdin.close()


def run_model(trace: Trace) -> list[list[int]]:
    """Return COUNTERS of our model after every event."""
    from whichlora_estimators.allocator import AllocatorConfig, CachingAllocator, OutOfMemory

    allocator = CachingAllocator(
        AllocatorConfig(**trace.settings), limit_bytes=trace.limit_bytes, device_bytes=DEVICE_BYTES
    )
    handles: list[int | None] = []
    counters = []
    for kind, *arguments in trace.events:
        if kind == MALLOC:
            try:
                handles.append(allocator.malloc(*arguments))
            except OutOfMemory:
                handles.append(None)
        elif kind == FREE:
            if (handle := handles[arguments[0]]) is not None:
                allocator.free(handle)
        elif kind == EMPTY_CACHE:
            allocator.empty_cache()
        else:
            allocator.reset_peaks()
        state = allocator.state()
        counters.append([getattr(state, name) for name in COUNTERS])
    return counters


def settings_text(settings: dict[str, Any]) -> str:
    """Write settings as PYTORCH_CUDA_ALLOC_CONF, naming every key whose last value torch would keep."""
    divisions = settings.get("roundup_power2_divisions", 0)
    if isinstance(divisions, tuple | list):
        divisions = f"[{','.join(f'{2**i}:{n}' for i, n in enumerate(divisions))}]"
    return ",".join(
        f"{key}:{value}"
        for key, value in {
            "expandable_segments": settings.get("expandable_segments", False),
            "large_segment_size_mb": settings.get("large_segment_bytes", 20 * MIB) // MIB,
            "max_split_size_mb": settings.get("max_split_size_bytes", 0) // MIB,
            "max_non_split_rounding_mb": settings.get("max_non_split_rounding_bytes", 0) // MIB,
            "garbage_collection_threshold": settings.get("garbage_collection_threshold", 0),
            "roundup_power2_divisions": divisions,
        }.items()
        if value != 0 or value is False
    )


def random_settings(random: Random) -> dict[str, Any]:
    """Return settings that are the default about as often as not, each for itself."""
    settings: dict[str, Any] = {"expandable_segments": random.random() < 0.35}
    large_mib = 20
    if random.random() < 0.2:
        # the driver maps whole pages of 2 MiB
        large_mib = random.choice([12, 22, 40] if settings["expandable_segments"] else [11, 12, 22, 25, 40])
        settings["large_segment_bytes"] = large_mib * MIB
    if random.random() < 0.4:
        settings["max_split_size_bytes"] = random.choice([large_mib, large_mib + 1, large_mib + 2, 64, 128, 512]) * MIB
    if random.random() < 0.2:
        settings["max_non_split_rounding_bytes"] = random.choice([large_mib, large_mib + 9, 200]) * MIB
    if random.random() < 0.4:
        settings["per_process_memory_fraction"] = random.choice([0.9, 0.5, 0.01, 1 / 64, 1 / 256])
        if random.random() < 0.7:
            settings["garbage_collection_threshold"] = random.choice([0.1, 0.5, 0.6, 0.8])
    if random.random() < 0.3:
        by_size = ((1,) * 9 + (2, 4) + (8,) * 5, (0, 4) * 8)
        settings["roundup_power2_divisions"] = random.choice([1, 2, 4, 8, 64, 1024, *by_size])
    return settings


def random_size(random: Random, most_bytes: int, marks: list[int]) -> int:
    """Return a size near one of the allocator's bounds, near a mark, or anywhere."""
    kind = random.randrange(7)
    if kind == 0:
        return random.randint(0, 1024)
    if kind == 1:
        return random.randint(1, 2 * MIB)
    if kind == 2:
        return random.randint(MIB, 24 * MIB)
    if kind == 3:
        return random.choice([1, 2, 9, 10, 11, 12, 19, 20, 21, 22]) * MIB + random.choice([-513, -512, -1, 0, 1, 512])
    if kind == 4:
        return random.randint(1, 40) * 2 * MIB
    if kind == 5:
        return max(0, random.choice(marks) + random.choice([-2 * MIB, -MIB, -512, 0, 512, MIB, 2 * MIB]))
    return random.randint(1, most_bytes)


def random_trace(random: Random, *, longest: int = 90) -> Trace:
    """Return a trace that fills its device, frees in no order, and asks again for sizes that it asked for before."""
    settings = random_settings(random)
    limit_bytes = random.choice([24, 60, 102, 200, 450, 1000, 3000, DEVICE_BYTES // MIB]) * MIB
    most_bytes = random.choice([limit_bytes // 3, limit_bytes // 8, 30 * MIB])
    streams = random.choice([1, 1, 1, 2, 3])
    reuse, empty, free = random.choice([0.2, 0.8]), random.choice([0, 0, 0.05]), random.choice([0.3, 0.45, 0.6])
    split_bytes = settings.get("max_split_size_bytes", 64 * MIB)
    slack_bytes = settings.get("max_non_split_rounding_bytes", settings.get("large_segment_bytes", 20 * MIB))
    sizes: list[int] = []
    live: list[int] = []
    events: list[tuple[int, ...]] = []
    for _ in range(random.randint(1, longest)):
        chance = random.random()
        if chance < empty:
            events.append((EMPTY_CACHE,))
        elif chance < empty + 0.02:
            events.append((RESET_PEAKS,))
        elif live and chance < free:
            events.append((FREE, live.pop(random.randrange(len(live)))))
        else:
            marks = [split_bytes] + [mark for size in sizes[-1:] for mark in (size, abs(size - slack_bytes))]
            again = sizes and random.random() < reuse
            sizes.append(random.choice(sizes) if again else random_size(random, most_bytes, marks))
            live.append(len(sizes) - 1)
            events.append((MALLOC, sizes[-1], random.randrange(streams)))
    return Trace(settings=settings, limit_bytes=limit_bytes, events=events)


class _Device:
    """What the process with the real allocator does, on torch's own names."""

    def __init__(self) -> None:
        import ctypes

        self.torch: Any = import_module("torch")
        self.torch.cuda.init()
        self.c = self.torch._C
        self.cuda = ctypes.CDLL(None)
        self.streams = [0, *sorted(self.torch.cuda.Stream().cuda_stream for _ in range(2))]

    def answer(self, question: dict[str, Any]) -> Any:
        return self.settings(question["settings"]) if len(question) == 1 else self.run(**question)

    def settings(self, text: str) -> dict[str, Any] | None:
        try:
            self.c._accelerator_setAllocatorSettings(text)
        except (RuntimeError, ValueError):
            return None
        settings: dict[str, Any] = self.torch.cuda.memory._snapshot()["allocator_settings"]
        return settings

    def run(self, *, text: str, settings: dict[str, Any], limit_bytes: int, events: list[list[int]]) -> list[list[int]]:
        self.c._accelerator_setAllocatorSettings(text)
        self.torch.cuda.set_per_process_memory_fraction(settings.get("per_process_memory_fraction", 1.0))
        with self.only(limit_bytes):
            self.torch.cuda.reset_peak_memory_stats()
            self.torch.cuda.reset_accumulated_memory_stats()
            pointers: list[int] = []
            counters = []
            for kind, *arguments in events:
                self.event(kind, arguments, pointers)
                counters.append(self.counters())
            self.free_all(pointers)
        # an expandable segment that could not be mapped even once stays, with its size of page, until it is used
        self.torch.cuda.set_per_process_memory_fraction(1.0)
        self.free_all([self.malloc(size, stream) for size in (1, 2 * MIB) for stream in range(len(self.streams))])
        return counters

    @contextmanager
    def only(self, limit_bytes: int) -> Iterator[None]:
        """Hold all device memory but so much, as another process would."""
        import ctypes

        ballast = ctypes.c_void_p()
        if limit_bytes < DEVICE_BYTES:
            assert self.cuda.cudaMalloc(ctypes.byref(ballast), ctypes.c_size_t(DEVICE_BYTES - limit_bytes)) == 0
        assert self.torch.cuda.mem_get_info() == (limit_bytes, DEVICE_BYTES)
        yield
        self.cuda.cudaFree(ballast)

    def event(self, kind: int, arguments: list[int], pointers: list[int]) -> None:
        if kind == MALLOC:
            try:
                pointers.append(self.malloc(*arguments))
            except self.torch.OutOfMemoryError:
                pointers.append(0)
        elif kind == FREE and pointers[arguments[0]]:
            self.c._cuda_cudaCachingAllocator_raw_delete(pointers[arguments[0]])
            pointers[arguments[0]] = 0
        elif kind == EMPTY_CACHE:
            self.torch.cuda.empty_cache()
        elif kind == RESET_PEAKS:
            self.torch.cuda.reset_peak_memory_stats()

    def malloc(self, size: int, stream: int) -> int:
        pointer: int = self.c._cuda_cudaCachingAllocator_raw_alloc(size, self.streams[stream])
        return pointer

    def free_all(self, pointers: list[int]) -> None:
        for pointer in filter(None, pointers):
            self.c._cuda_cudaCachingAllocator_raw_delete(pointer)
        self.torch.cuda.empty_cache()

    def counters(self) -> list[int]:
        stats = self.c._cuda_memoryStats(0)

        def of(name: str, kind: str = "current") -> int:
            value: int = stats[name]["all"][kind]
            return value

        return [
            of("allocated_bytes"),
            of("allocated_bytes", "peak"),
            of("reserved_bytes"),
            of("reserved_bytes", "peak"),
            of("active_bytes"),
            of("inactive_split_bytes"),
            of("requested_bytes"),
            of("segment"),
            stats["num_alloc_retries"],
            stats["num_ooms"],
            stats["num_device_alloc"],
            stats["num_device_free"],
        ]


if __name__ == "__main__":
    device = _Device()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(device.answer(json.loads(line))) + "\n")
        sys.stdout.flush()
