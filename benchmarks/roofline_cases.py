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

from whichlora_estimators import layers, ops, products
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.roofline import RooflineConstants, lane_times
from whichlora_estimators.tape import BF16, FP32, Dtype, Kernel, Leaf, Tape, Tensor
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import Workload, workload_from_json

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A published time and the launches that it is the time of: each sequence happens so many times.

    `on_device` says that the host's launches were not part of what was timed.
    """

    source: str
    gpu: Gpu
    name: str
    measured_s: float
    parts: tuple[tuple[float, tuple[Kernel, ...]], ...]
    on_device: bool = False

    @property
    def chip(self) -> str:
        """The card without memory size, socket and machine: what must be held out together."""
        return "-".join(self.gpu.slug.split("-")[: 2 if self.gpu.slug.startswith("rtx") else 1])

    @property
    def host(self) -> str:
        """The machine: its source and card."""
        return f"{self.source.split()[0]}, {self.gpu.slug}"

    def predicted_s(self, constants: RooflineConstants) -> float:
        """Predict it as the library does."""
        times = [(count, lane_times(kernels, self.gpu, constants=constants)) for count, kernels in self.parts]
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


class Unmapped(Exception):
    """Why a published row says nothing that can be predicted without guessing."""


FRAMEWORKS = {"none": True, "baseline-peft-bnb": True, "accelerated-peft-bnb": False}
PRECISIONS = {"float16 pure": "fp16-true", "bfloat16 pure": "bf16-true", "float16": "fp16-true", "bf16": "bf16-true"}
PRECISIONS |= {
    "float16 AMP fp16": "fp16-mixed",
    "bfloat16 AMP bf16": "bf16-mixed",
    "bf16 base; adapter fp32": "bf16-true",
}
QUANTIZATIONS = {
    "none": ("none", False),
    "nf4": ("nf4", False),
    "nf4+dq": ("nf4", True),
    "fp4 (bnb default)": ("fp4", False),
}
ATTENTIONS = {"eager": "eager", "flash_attention_2": "sdpa", "bettertransformer sdpa": "sdpa"}
ATTENTIONS |= {"sdpa (default)": "sdpa", "sdpa (transformers default)": "sdpa"}
METHODS = {"full": "full", "lora": "lora", "qlora": "lora", "dora": "dora", "none": "lora"}
#: Shapes given as an argument, for models that the registry lacks.
MODELS: dict[str, dict[str, Any]] = {}
#: PEFT's MetaMathQA batches of 4 have 878 tokens on average, padding included.
PEFT_SEQ_LEN = 220
Parts = tuple[tuple[float, tuple[Kernel, ...]], ...]


def published_cases(rows: Iterable[Row]) -> tuple[list[Case], Counter[str]]:
    """Map runs to workloads, a case a cell (its median over dates), and count the reasons where that needs guessing."""
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["time_value"] and "time" in row["trusted_for"].split() and row["n_gpus"] == "1":
            cells[row["cell"], row["time_metric"]].append(row)
    cases, reasons = [], Counter[str]()
    for group in cells.values():
        source = next((name for name in SOURCES if group[0]["source"].startswith(name)), "")
        try:
            mapped = [SOURCES[source](row) for row in group] if source else _unmapped("no mapping for this source")
            case = replace(mapped[0], measured_s=statistics.median(case.measured_s for case in mapped))
            cases.append(_plausible(case))
        except (Unmapped, WhichloraError, TypeError) as error:
            reasons[f"{source or group[0]['source'][:30]}: {error}"] += 1
    return cases, reasons


def _unmapped(reason: str) -> Any:
    raise Unmapped(reason)


def _plausible(case: Case) -> Case:
    flops = sum(count * 2 * k.batch * k.m * k.n * k.k for count, kernels in case.parts for k in kernels)
    rates = case.gpu.matmul_flops_per_s
    if flops / case.measured_s > max(rates.bf16 or 0, rates.fp16 or 0, rates.fp32):
        raise Unmapped("faster than the rated FLOP/s of the card")
    return case


def _case(row: Row, source: str, measured_s: float, parts: Parts) -> Case:
    gpu = find_gpu(row["gpu"].split("(")[0])
    name = " ".join([row["model_id"], row["method"], row["quant"], f"bs{row['micro_batch_size']}", row["seq_len"][:24]])
    return Case(source=source, gpu=gpu, name=name, measured_s=measured_s, parts=parts)


def _known(table: Mapping[str, Any], row: Row, column: str) -> Any:
    return table[row[column]] if row[column] in table else _unmapped(f"{column} {row[column]!r}")


def _workload(row: Row, **changes: Any) -> Workload:
    quantization, double = _known(QUANTIZATIONS, row, "quant")
    targets = tuple(name for name in row["target_modules"].split(" (")[0].split() if name.endswith("_proj"))
    return Workload(
        model=row["model_id"],
        config=MODELS.get(row["model_id"]) or load_model(row["model_id"], offline=True).config,
        method=_known(METHODS, row, "method"),
        rank=int(float(row["rank"] or 8)),
        targets="all-linear" if row["target_modules"] == "all-linear" else targets or None,
        precision=_known(PRECISIONS, row, "dtype"),
        attention=_known(ATTENTIONS, row, "attn_impl"),
        quantization=quantization,
        double_quantization=double,
        checkpointing=row["grad_checkpointing"] == "yes",
        batch_size=int(row["micro_batch_size"]),
    ).with_(**changes)


@cache
def _laid(key: str) -> Timeline:
    return lay(workload_from_json(json.loads(key)))


def _timeline(workload: Workload) -> Timeline:
    return _laid(json.dumps(asdict(workload)))


def _kernels(timeline: Timeline, *labels: str) -> tuple[Kernel, ...]:
    segments = {segment.label: segment for segment in timeline.order if segment.label in labels}.values()
    return tuple(k for s in segments for k in timeline.tape.kernels[s.first.kernel : s.last.kernel])


def _step(workload: Workload) -> Parts:
    return ((1.0, _kernels(_timeline(workload), "forward", "backward", "optimizer step")),)


def _generation(workload: Workload, prefill: float, decode: float) -> Parts:
    """Weigh prefill and the decode steps, of which first and last stand for all: time is linear in the cache."""
    timeline = _timeline(workload.with_(phase="generate"))
    parts = [(prefill, _kernels(timeline, "prefill"))] if prefill else []
    if decode:
        steps = [segment.label for segment in timeline.order if segment.label.startswith("decode")]
        parts += [(decode / 2, _kernels(timeline, label)) for label in (steps[0], steps[-1])]
    return tuple(parts)


#: optimum-benchmark ran on a machine with one EPYC 7742 and 512 GiB (its environment records): a DGX Station A100.
#: nvidia-smi shows a limit of 275 W for each of its cards.
DGX_STATION_W = 275.0


def _fms(row: Row) -> Case:
    framework = row["notes"].split(";")[0].removeprefix("framework_config=")
    seq_len = int(row["seq_len"].split()[1])
    prepared = FRAMEWORKS[framework] if framework in FRAMEWORKS else _unmapped(f"framework {framework}")
    workload = _workload(row, seq_len=seq_len, kbit_preparation=prepared)
    return _case(row, "fms-acceleration", workload.batch_size * seq_len / float(row["time_value"]), _step(workload))


def _optimum(row: Row) -> Case:
    case = _optimum_case(row)
    return replace(case, gpu=replace(case.gpu, slug="a100-dgx-station", power_w=DGX_STATION_W))


def _optimum_case(row: Row) -> Case:
    value = float(row["time_value"])
    if row["phase"] == "train":
        # its backend at that time called PEFT without k-bit preparation
        workload = _workload(row, seq_len=int(row["seq_len"]), kbit_preparation=False)
        return _case(row, "optimum-benchmark training", workload.batch_size / value, _step(workload))
    words = row["seq_len"].split()  # "prompt 256 + 512 new": in these versions prefill computes every position's logits
    new = int(words[3]) if len(words) > 3 else 1
    workload = _workload(row, prefill_len=int(words[1]), decode_len=new, last_logits_only=False)
    source = "optimum-benchmark generate" if new > 1 else "optimum-benchmark forward"
    return _case(row, source, value, _generation(workload, 1, new - 1))


def _peft(row: Row) -> Case:
    if row["time_metric"] != "mean step time s":
        raise Unmapped(row["time_metric"])
    parts = _step(_workload(row, seq_len=PEFT_SEQ_LEN, padded=True))
    return _case(row, "peft", float(row["time_value"]), parts)


def _bitsandbytes(row: Row) -> Case:
    if row["quant"] != "none":
        raise Unmapped("the tape counts dequantized bytes for products that read packed weights")
    workload = _workload(row, prefill_len=64, decode_len=64)
    return _case(row, "bitsandbytes", float(row["time_value"]), _generation(workload, 0, 1))


def _qwen3(row: Row) -> Case:
    if not row["seq_len"].startswith("prompt 1 "):
        raise Unmapped("flash_attention_2 over long caches, which does not split the keys")
    workload = _workload(row, prefill_len=1, decode_len=2048)
    return _case(row, "qwen3", 2049 / float(row["time_value"]), _generation(workload, 1, 2047))


def _philschmid(row: Row) -> Case:
    timeline = _timeline(_workload(row, seq_len=2048, precision="bf16-mixed", dropout=0.05))
    steps = int(row["n_tokens_or_samples"].split()[0])
    micro = steps * int(row["grad_accum"])
    parts = ((micro, _kernels(timeline, "forward", "backward")), (steps, _kernels(timeline, "optimizer step")))
    return _case(row, "philschmid", float(row["time_value"]), parts)


SOURCES: dict[str, Callable[[Row], Case]] = {
    "foundation-model-stack": _fms,
    "huggingface/optimum-benchmark": _optimum,
    "huggingface/peft method_comparison": _peft,
    "bitsandbytes": _bitsandbytes,
    "QwenLM/Qwen3": _qwen3,
    "philschmid": _philschmid,
}
