"""Published times as cases that the roofline can predict: a measured time and the launches that it is the time of.

Rows of four tables: single operators (layers of vLLM by number of tokens; baselines of Liger-Kernel's benchmarks), and
published runs, mapped to workloads where that needs no guess.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from benchmarks.published_rows import PublishedRow, PublishedTime, Row, Unmapped, map_row, source_name, trusted
from whichlora_estimators import layers, ops, products
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.roofline import RooflineConstants, lane_times
from whichlora_estimators.stack import Stack, stack_of
from whichlora_estimators.tape import BF16, FP32, Dtype, Kernel, Leaf, Tape, Tensor
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import Workload, workload_from_json


def chip_of(gpu: Gpu) -> str:
    """Name a card without memory size, socket and machine."""
    return "-".join(gpu.slug.split("-")[: 2 if gpu.slug.startswith("rtx") else 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A published time and the launches that it is the time of: each sequence happens so many times.

    `on_device` says that the host's launches were not part of what was timed; `phase` is train, prefill or decode.
    """

    source: str
    gpu: Gpu
    name: str
    measured_s: float
    parts: tuple[tuple[float, tuple[Kernel, ...]], ...]
    on_device: bool = False
    phase: str = ""

    @property
    def recording(self) -> bool:
        """Whether autograd recorded."""
        return self.phase == "train"

    @property
    def chip(self) -> str:
        """The card without memory size, socket and machine: what must be held out together."""
        return chip_of(self.gpu)

    @property
    def host(self) -> str:
        """The machine: its source and card."""
        return f"{self.source.split()[0]}, {self.gpu.slug}"

    def predicted_s(self, constants: RooflineConstants) -> float:
        """Predict it as the library does."""
        times = [
            (count, lane_times(kernels, self.gpu, constants=constants, recording=self.recording))
            for count, kernels in self.parts
        ]
        return sum(count * (t.device_s if self.on_device else t.total_s) for count, t in times)


# Operators ------------------------------------------------------------------------------------------------------------

VIDUR_GPUS = {"a100": "a100-sxm-80gb", "a40": "a40", "h100": "h100-sxm-80gb"}
#: Times are given in whole microseconds: shorter ones say too little.
SHORTEST_VIDUR_S = 2e-6
#: A chain of operators was timed with the host issuing them: below this a launch, the host was what was timed.
SHORTEST_LAUNCH_S = 15e-6


def vidur_cases(rows: Iterable[Row]) -> Iterator[Case]:
    """Read single fp16 products and additions of a layer, [tokens, k] x [k, n]."""
    for row in rows:
        gpu, tokens = find_gpu(VIDUR_GPUS[row["gpu"]]), int(row["num_tokens"])
        width, inner = int(row["n_embd"]), int(row["n_expanded_embd"])
        qkv = width + 2 * width // int(row["n_head"]) * int(row["n_kv_head"])
        up = inner * (2 if row["use_gated_mlp"] == "True" else 1)
        shapes = {"attn_pre_proj": (qkv, width), "attn_post_proj": (width, width)}
        shapes |= {"mlp_up_proj": (up, width), "mlp_down_proj": (width, inner)}
        kernels = {name: _product(tokens, n, k) for name, (n, k) in shapes.items()}
        kernels["add"] = Kernel(3 * tokens * width * 2)
        for name, kernel in kernels.items():
            measured_s = float(row[f"{name}_ms"] or 0) * 1e-3
            if measured_s >= SHORTEST_VIDUR_S:
                source = "vidur addition" if name == "add" else "vidur products"
                label = f"{row['model']} {name} {tokens}"
                parts = ((1.0, (kernel,)),)
                yield Case(source=source, gpu=gpu, name=label, measured_s=measured_s, parts=parts, on_device=True)


def _product(m: int, n: int, k: int) -> Kernel:
    return Kernel(2 * (m * k + k * n + m * n), 1, m, n, k, "fp16")


def liger_cases(rows: Iterable[Row]) -> Iterator[Case]:
    """Read chains of operators of Transformers' layers, timed with a cold cache; a tape says which kernels they are."""
    for row in rows:
        build = CHAINS.get((row["kernel_name"], row["kernel_provider"]))
        if build is None or row["metric_name"] != "speed":
            continue
        settings = json.loads(row["extra_benchmark_config_str"]) | {row["x_name"]: int(row["x_value"])}
        forward, backward = build(settings)
        mode = row["kernel_operation_mode"]
        if mode != "forward" and row["kernel_name"] in FORWARD_ONLY:
            continue
        kernels = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
        measured_s = float(row["y_value_50"]) * 1e-3
        gpu = find_gpu(row["gpu_name"])
        largest = max(kernel.moved_bytes for kernel in kernels)
        if measured_s < SHORTEST_LAUNCH_S * len(kernels) or largest < 2 * (gpu.l2_bytes or 0):
            continue  # the host's time, or that of a cache that was emptied before every run
        name = f"{row['kernel_name']} {mode} {row['x_name']}={row['x_value']}"
        source = "liger layers with products" if any(kernel.m for kernel in kernels) else "liger pointwise"
        parts = ((1.0, tuple(kernels)),)
        yield Case(source=source, gpu=gpu, name=name, measured_s=measured_s, parts=parts, on_device=True)


Chain = tuple[list[Kernel], list[Kernel]]


def _chain(
    dtype: Dtype, shape: tuple[int, ...], weights: Mapping[str, tuple[int, ...]], run: Callable[..., Tensor]
) -> Chain:
    """Run a layer on a tape; the launches of forward and of backward."""
    tape = Tape()
    x = tape.new(shape, dtype)
    x.node = Leaf()
    trained = {name: tape.new(size, dtype) for name, size in weights.items()}
    for weight in trained.values():
        weight.node = Leaf()
    tape.grad_enabled = True
    out = run(x, **trained)
    forward = len(tape.kernels)
    tape.backward(out)
    return tape.kernels[:forward], tape.kernels[forward:]


def _dtype(settings: Mapping[str, Any]) -> Dtype:
    return {"torch.bfloat16": BF16, "torch.float32": FP32}[settings["dtype"]]


def _norm_chain(settings: Mapping[str, Any]) -> Chain:
    width = settings["H"]
    return _chain(_dtype(settings), (settings["M"], width), {"weight": (width,)}, layers.rms_norm)


def _layer_norm_chain(settings: Mapping[str, Any]) -> Chain:
    width = settings["N"]
    weights = {"weight": (width,), "bias": (width,)}
    return _chain(_dtype(settings), (settings["M"], width), weights, ops.layer_norm)


def _add_norm_chain(settings: Mapping[str, Any]) -> Chain:
    shape = (settings["M"], settings["H"])

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return layers.rms_norm(ops.add(x, residual), weight)

    return _chain(_dtype(settings), shape, {"residual": shape, "weight": shape[1:]}, run)


def _mlp_chain(settings: Mapping[str, Any]) -> Chain:
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    weights = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}

    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return products.linear(ops.mul(ops.activation(products.linear(x, gate)), products.linear(x, up)), down)

    batch = settings.get("B") or settings["bsz"]
    return _chain(_dtype(settings), (batch, settings["T"], width), weights, run)


CHAINS: dict[tuple[str, str], Callable[[Mapping[str, Any]], Chain]] = {
    ("rms_norm", "huggingface"): _norm_chain,
    ("layer_norm", "huggingface"): _layer_norm_chain,
    ("fused_add_rms_norm", "huggingface"): _add_norm_chain,
    ("swiglu", "huggingface"): _mlp_chain,
    ("geglu", "huggingface"): _mlp_chain,
    ("tiled_swiglu", "huggingface"): _mlp_chain,
}

#: Their backward is more than the tape's launches: the weight's gradient in a kernel of its own, the sum's two outputs.
FORWARD_ONLY = {"layer_norm", "fused_add_rms_norm"}

# Whole steps ----------------------------------------------------------------------------------------------------------


#: Shapes given as an argument, for models that the registry lacks.
MODELS: dict[str, dict[str, Any]] = {}
Parts = tuple[tuple[float, tuple[Kernel, ...]], ...]


def published_cases(rows: Iterable[Row]) -> tuple[list[Case], Counter[str]]:
    """Map runs to workloads, a case a cell (its median over dates), and count the reasons where that needs guessing."""
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["time_value"] and trusted(row, "time"):
            cells[row["cell"], row["time_metric"]].append(row)
    cases, reasons = [], Counter[str]()
    for group in cells.values():
        try:
            mapped = [map_row(row, MODELS) for row in group]
            if mapped[0].source == "qwen3" and mapped[0].workload.prefill_len > 1:
                raise Unmapped("decoding over long caches took time by query heads: which attention ran is unclear")
            case = published_case(mapped[0])
            seconds = statistics.median(each.time.seconds for each in mapped if each.time)
            cases.append(_plausible(replace(case, measured_s=seconds)))
        except (Unmapped, WhichloraError, TypeError) as error:
            reasons[f"{source_name(group[0]['source'])}: {error}"] += 1
    return cases, reasons


def published_case(mapped: PublishedRow) -> Case:
    """Return the launches that a row's time is the time of. Raises Unmapped where it gives none."""
    if mapped.time is None:
        raise Unmapped(f"no time of a step or a token: {mapped.row['time_metric'] or 'none given'}")
    return timed_case(mapped.source, mapped.gpu, mapped.workload, mapped.time, mapped.environment.versions)


def timed_case(
    source: str, gpu: Gpu, workload: Workload, time: PublishedTime, versions: Mapping[str, str] | None = None
) -> Case:
    """Return the launches that a source's time is the time of. Raises Unmapped for what ran otherwise than the tape."""
    versions = versions or {}
    if workload.quantization == "int8" and versions.get("bitsandbytes", "").startswith("0.44"):
        raise Unmapped("bitsandbytes before 0.45 ran other int8 kernels")
    if workload.config.get("model_type") in ("mixtral", "qwen3_moe"):
        raise Unmapped("Transformers then looped over experts that were modules of their own, quantized like others")
    timeline = _timeline(workload, stack_of(versions))
    parts = [
        (time.steps, _kernels(timeline, "forward", "backward", "optimizer step")),
        (time.micro_steps, _kernels(timeline, "forward", "backward")),
        (time.optimizer_steps, _kernels(timeline, "optimizer step")),
        (time.prefills, _kernels(timeline, "prefill")),
        *_decode(timeline, time.decoded_tokens),
    ]
    run = f"b{workload.batch_size} s{workload.seq_len}" if workload.phase == "train" else f"b{workload.batch_size}"
    name = f"{workload.model} {workload.method} {workload.quantization} {run} {workload.prefill_len}"
    happened = tuple((count, kernels) for count, kernels in parts if count)
    phase = "train" if workload.phase == "train" else "decode" if time.decoded_tokens else "prefill"
    return Case(source=_part_of(source, time), gpu=gpu, name=name, measured_s=time.seconds, parts=happened, phase=phase)


def _part_of(source: str, time: PublishedTime) -> str:
    """Tell apart what optimum-benchmark timed."""
    if source != "optimum-benchmark":
        return source
    return f"{source} {'training' if time.steps else 'generate' if time.decoded_tokens else 'forward'}"


def _plausible(case: Case) -> Case:
    flops = sum(count * 2 * k.batch * k.m * k.n * k.k for count, kernels in case.parts for k in kernels)
    rates = case.gpu.matmul_flops_per_s
    if flops / case.measured_s > max(rates.bf16 or 0, rates.fp16 or 0, rates.fp32):
        raise Unmapped("faster than the rated FLOP/s of the card")
    return case


@cache
def _laid(key: str, stack: Stack) -> Timeline:
    return lay(workload_from_json(json.loads(key)), stack=stack)


def _timeline(workload: Workload, stack: Stack) -> Timeline:
    return _laid(json.dumps(asdict(workload)), stack)


def _kernels(timeline: Timeline, *labels: str) -> tuple[Kernel, ...]:
    segments = {segment.label: segment for segment in timeline.order if segment.label in labels}.values()
    return tuple(k for s in segments for k in timeline.tape.kernels[s.first.kernel : s.last.kernel])


def _decode(timeline: Timeline, tokens: float) -> list[tuple[float, tuple[Kernel, ...]]]:
    """Let the first and the last decode step stand for all: time is linear in the cache."""
    steps = [segment.label for segment in timeline.order if segment.label.startswith("decode")]
    return [(tokens / 2, _kernels(timeline, label)) for label in (steps[0], steps[-1])] if tokens else []
