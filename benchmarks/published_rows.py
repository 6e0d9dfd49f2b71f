"""Rows of a table of published measurements as workloads of ours, where that needs no guess.

Such a table has a row a memory metric: `run_id` groups what one run showed, `cell` groups runs of one workload over
dates and versions, `completeness` says how fully the source specifies it (A fully, B with one or two assumptions, C
vaguely), `trusted_for` what the row may judge. How each source ran is in the functions below, with where that is known.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import ATTENTIONS, Workload
from whichlora_profiles_db import Environment

Row = Mapping[str, str]
Shapes = Mapping[str, Mapping[str, Any]]

#: Shapes of published models that the registry lacks, with their sources.
SHAPES = Path(__file__).with_name("published_models.json")

ALLOCATED, RESERVED, PROCESS = "allocated_peak_bytes", "reserved_peak_bytes", "process_bytes"
#: What is allocated once the optimizer has stepped, gradients, logits and outputs still alive: no peak.
AFTER_STEP = "allocated_after_step_bytes"
METRICS = {
    "max_allocated": ALLOCATED,
    "max_allocated [assumed]": ALLOCATED,
    "max_reserved": RESERVED,
    "avg of per-step peak reserved": RESERVED,
    "avg_allocated_after_step": AFTER_STEP,
    "nvidia-smi": PROCESS,
    "nvidia-smi (incl. CUDA context)": PROCESS,
}
PRECISIONS = {
    "bf16": "bf16-true",
    "bfloat16 pure": "bf16-true",
    "bf16 base; adapter fp32": "bf16-true",
    "bf16-true": "bf16-true",
    "bfloat16 AMP bf16": "bf16-mixed",
    "bf16 AMP": "bf16-mixed",
    "fp16": "fp16-true",
    "float16": "fp16-true",
    "float16 pure": "fp16-true",
    "float16 AMP fp16": "fp16-mixed",
    "fp32": "fp32",
}
#: Quantisations of bitsandbytes: ours, and whether its scales are quantised too.
QUANTIZATIONS = {
    "none": ("none", False),
    "nf4": ("nf4", False),
    "nf4+dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4 (bnb default)": ("fp4", False),
    "fp4+dq": ("fp4", True),
    "int8": ("int8", False),
    "int8 (threshold 6)": ("int8", False),
}
METHODS = {
    "full": "full",
    "lora": "lora",
    "qlora": "lora",
    "dora": "dora",
    "lora-fa": "lora-fa",
    "p_tuning": "p-tuning",
    "prompt_tuning": "prompt-tuning",
}
OPTIMIZERS = {
    "": "adamw",
    "AdamW": "adamw",
    "adamw": "adamw",
    "AdamW torch (HF Trainer default)": "adamw",
    "AdamW (HF Trainer default)": "adamw",
    "adamw_torch_fused": "adamw",
    "lora-fa": "lora-fa",
    "PagedAdamW": "paged-adamw",
}
#: What a source that names no exact versions asked for on that day, in its package's pyproject.toml, in the newest
#: releases of then: fms-acceleration at 00febdc (2024-06-07) has torch>2.2,<2.3, transformers<4.40, any peft and bitsandbytes.
SOFTWARE_OF_THE_DAY = {
    ("fms-acceleration", "torch 2.2.x"): "torch 2.2.2; transformers 4.39.3; peft 0.11.1; bnb 0.43.1",
}
#: Versions in full where a table names but some: fms-acceleration's scripts/benchmarks/refs/requirements*.txt beside the
#: results, at c3a069c, b6c1455, 4e81c64, and fc78b55 (granite) and 733992a (liger), whose peft differs.
SOFTWARE_IN_FULL = {
    ("fms-acceleration", "torch 2.2.2; transformers 4.39.3; peft 0.11.1"): "bnb 0.43.1",
    ("fms-acceleration", "torch 2.4.0; transformers 4.43.3; peft 0.12.0"): "bnb 0.43.2",
    ("fms-acceleration", "torch 2.4.1; transformers 4.44.2; peft 0.12.0"): "bnb 0.43.3",
    ("fms-acceleration", "torch 2.4.1; transformers 4.45.2; peft 0.12/0.13"): "bnb 0.43.3",
}
_LIBRARIES = {"pytorch": "torch", "bnb": "bitsandbytes", "fa": "flash-attn", "cuda": "cuda"}
_LIBRARIES |= {name: name for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "optimum-benchmark")}
_FIELDS = frozenset(field.name for field in dataclasses.fields(Workload))
#: PEFT's MetaMathQA batches of 4: 878 tokens on average, padding included, and about 4 x 645 in the longest.
PEFT_SEQ_LEN, PEFT_LONGEST = 220, 645


class Unmapped(Exception):
    """Why a published row says nothing that can be predicted without guessing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTime:
    """A published time: so many training steps, prefills, decoded tokens; `micro_steps` are steps less the optimizer."""

    seconds: float
    steps: float = 0
    micro_steps: float = 0
    optimizer_steps: float = 0
    prefills: float = 0
    decoded_tokens: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """A row with the workload it is of. `counter` names what `measured_bytes` is; `time` is None where none is given.

    `relative` says that the length was fitted on these same records, so that rows may only be compared with each other.
    """

    row: Row
    source: str
    gpu: Gpu
    workload: Workload
    environment: Environment
    counter: str | None
    measured_bytes: int | None
    time: PublishedTime | None
    measured_at: datetime | None
    relative: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def cell(self) -> str:
        """The workload over dates and versions."""
        return self.row["cell"]

    @property
    def ran_out(self) -> bool:
        """Whether the run is presumed to have run out of memory."""
        return self.row["status"] == "oom"


Mapped = tuple[Workload, PublishedTime | None, tuple[str, ...]]


def trusted(row: Row, question: str) -> bool:
    """Return whether a row may judge a question: memory, time, memory_relative, feasibility."""
    return question in row["trusted_for"].split()


def map_row(row: Row, shapes: Shapes | None = None) -> PublishedRow:
    """Map one row; `shapes` are configs of models that neither registry nor `published_models.json` knows.

    Raises Unmapped with the reason.
    """
    source, mapper = _source(row)
    if row["completeness"] == "C":
        raise Unmapped("class C: its source leaves too much open")
    if row["n_gpus"] != "1":
        raise Unmapped(f"several GPUs ({row['n_gpus']})" if row["n_gpus"] else "how many GPUs is not said")
    try:
        workload, time, remarks = mapper(row, shapes or {})
        card = "a100-dgx-station" if source == "optimum-benchmark" else re.sub(r" *\(.*\)", "", row["gpu"])
        gpu = find_gpu(card or _unmapped("no card is named"))
        environment = _environment(_software(source, row["software"]), gpu)
    except Unmapped:
        raise
    except WhichloraError as error:
        raise Unmapped(str(error)) from error
    except (ValueError, IndexError) as error:
        raise Unmapped(f"a number is missing or none ({error})") from error
    relative = row["mem_metric"] == "max_reserved" and source == "peft"
    if (source, row["software"]) in SOFTWARE_OF_THE_DAY:
        remarks = (*remarks, "versions: the newest that the source's package of that day asks for")
    return PublishedRow(
        row=row,
        source=source,
        gpu=gpu,
        workload=_with_versions(workload, environment.versions),
        environment=environment,
        counter=METRICS.get(row["mem_metric"]) if row["mem_value_bytes"] else None,
        measured_bytes=round(float(row["mem_value_bytes"])) if row["mem_value_bytes"] else None,
        time=time,
        measured_at=_date(row),
        relative=relative,
        remarks=remarks,
    )


def _unmapped(reason: str) -> Any:
    raise Unmapped(reason)


def _source(row: Row) -> tuple[str, Callable[[Row, Shapes], Mapped]]:
    for beginning, (name, mapper) in SOURCES.items():
        if row["source"].startswith(beginning):
            return name, mapper
    raise Unmapped("no mapping for this source")


def source_name(citation: str) -> str:
    """Return the short name of a source, the beginning of its citation where it has none."""
    names = [name for beginning, (name, _) in SOURCES.items() if citation.startswith(beginning)]
    return names[0] if names else " ".join(citation.split()[:2])


# Fields that all sources share -----------------------------------------------------------------------------------------


@cache
def _known_shapes() -> dict[str, Any]:
    known: dict[str, Any] = json.loads(SHAPES.read_text(encoding="utf-8"))
    return known


def _config(model: str, shapes: Shapes) -> Mapping[str, Any]:
    """Return a model's config: from our registry, from what this folder knows, from the caller."""
    entry = _known_shapes().get(model)
    if entry is not None:
        config: Mapping[str, Any] = entry["config"]
        return config
    try:
        return load_model(model, offline=True).config
    except WhichloraError:
        if model not in shapes:
            raise Unmapped(f"no shape of {model} is known") from None
        return {key: value for key, value in shapes[model].items() if not key.startswith("_")}


def _known(table: Mapping[str, Any], row: Row, column: str) -> Any:
    return table[row[column]] if row[column] in table else _unmapped(f"{column} {row[column]!r} has no counterpart")


def _workload(row: Row, shapes: Shapes, **changes: Any) -> Workload:
    """Fill in what the columns say; fields that this version of Workload lacks are left out."""
    quantization, double = _known(QUANTIZATIONS, row, "quant")
    given = {
        "model": row["model_id"],
        "config": _config(row["model_id"], shapes),
        "precision": _known(PRECISIONS, row, "dtype"),
        "attention": _attention(row),
        "quantization": quantization,
        "double_quantization": double,
        "batch_size": int(row["micro_batch_size"]),
    }
    if row["phase"] == "train":
        given |= _training(row)
    else:
        given |= {"phase": "generate"}
    return Workload(**{name: value for name, value in (given | changes).items() if name in _FIELDS})


def _training(row: Row) -> dict[str, Any]:
    checkpointing = row["grad_checkpointing"]
    if checkpointing not in ("yes", "no"):
        raise Unmapped(f"grad_checkpointing {checkpointing!r}")
    tokens = row["rank"].partition("num_virtual_tokens=")[2]
    return {
        **({"num_virtual_tokens": int(tokens)} if tokens else {}),
        "method": _known(METHODS, row, "method"),
        "rank": int(float(row["rank"]))
        if row["rank"] and not tokens
        else Workload.__dataclass_fields__["rank"].default,
        "targets": _targets(row["target_modules"]),
        "optimizer": _known(OPTIMIZERS, row, "optimizer"),
        "checkpointing": checkpointing == "yes",
    }


def _targets(text: str) -> str | tuple[str, ...] | None:
    """Return target modules; layers that the model lacks (`c_attn` of another family) match nothing and are dropped."""
    if text == "all-linear":
        return text
    return tuple(name for name in text.split(" (")[0].split() if name.endswith("_proj")) or None


def _attention(row: Row) -> str:
    name = row["attn_impl"].split(" (")[0].removeprefix("bettertransformer ")
    if name == "flash_attention_2" and name not in ATTENTIONS:
        return "sdpa"
    return name if name in ATTENTIONS else _unmapped(f"attn_impl {row['attn_impl']!r} has no counterpart")


def _software(source: str, named: str) -> str:
    """Return the versions that a row names, and those that its source is known to have had beside them."""
    full = SOFTWARE_OF_THE_DAY.get((source, named), named)
    more = SOFTWARE_IN_FULL.get((source, named))
    return f"{full}; {more}" if more else full


def _environment(software: str, gpu: Gpu) -> Environment:
    """Return the card and the versions that the text gives exactly; ranges and alternatives are unknown."""
    versions = {}
    for part in software.split(";"):
        name, _, version = part.strip().partition(" ")
        library = _LIBRARIES.get(name.lower())
        if library and re.fullmatch(r"[0-9a-f]{8}|\d+(\.\d+)+([.+]?(dev|cu|rc)\d*)*", version):
            versions[library] = version
    return Environment(gpu=gpu.slug, gpu_name=gpu.name, compute_capability=gpu.compute_capability, versions=versions)


def _with_versions(workload: Workload, versions: Mapping[str, str]) -> Workload:
    if "versions" not in _FIELDS:
        return workload
    known = {name: versions[name] for name in ("torch", "transformers", "peft", "bitsandbytes") if name in versions}
    return workload.with_(versions=known)


def _date(row: Row) -> datetime | None:
    """Return when a run was made, or its table written: the first date in its names, as midnight UTC."""
    found = re.search(r"20\d\d-\d\d-\d\d", f"{row['run_id']} {row['source']}")
    return datetime.fromisoformat(found[0]).replace(tzinfo=timezone.utc) if found else None


def _per_step(seconds: float) -> PublishedTime:
    return PublishedTime(seconds=seconds, steps=1)


# Sources ---------------------------------------------------------------------------------------------------------------

#: fms-acceleration's framework configurations that run Transformers' own kernels: does k-bit preparation upcast?
_FRAMEWORKS = {"none": True, "baseline-peft-bnb": True, "accelerated-peft-bnb": False}
#: From this commit's date on its scenarios.yaml has lora_dropout 0.1, before it 0.0.
_FMS_DROPOUT_SINCE = datetime(2024, 6, 19, tzinfo=timezone.utc)


def _fms(row: Row, shapes: Shapes) -> Mapped:
    """HF Trainer (TRL): packed samples, clipped gradients, reentrant checkpointing, AdamW (scenarios.yaml, defaults.yaml)."""
    framework = row["notes"].split(";")[0].removeprefix("framework_config=")
    if framework not in _FRAMEWORKS:
        raise Unmapped(f"framework {framework}: kernels or formats that are not Transformers' own")
    if framework == "baseline-peft-bnb" and row["dtype"].startswith("bfloat16"):
        # 532,480 bytes more before training than without preparation: 65 norms of 4,096 in fp32, and nothing else
        raise Unmapped("in bf16 the trainer casts embeddings and head back after k-bit preparation: no field says so")
    seq_len = int(row["seq_len"].split()[1])
    date = _date(row)
    # its scenarios load weights in 16 bit whatever autocast does, and those with bitsandbytes all run under autocast,
    # though one of the tables has no column that says so
    kind = _known({"float16": "fp16", "bfloat16": "bf16"}, {"dtype": row["dtype"].partition(" ")[0]}, "dtype")
    mixed = row["quant"] != "none"
    workload = _workload(
        row,
        shapes,
        precision=f"{kind}-{'mixed' if mixed else 'true'}",
        seq_len=seq_len,
        kbit_preparation=_FRAMEWORKS[framework],
        dropout=0.0 if row["method"] == "full" or (date and date < _FMS_DROPOUT_SINCE) else 0.1,
        reentrant=True,
        clip_grad_norm=1.0,
        output_kept=False,
    )
    value = row["time_value"]
    time = _per_step(workload.batch_size * seq_len / float(value)) if value else None
    autocast = ("16-bit weights under autocast, taken as without",) if "AMP" in row["dtype"] and not mixed else ()
    return workload, time, autocast


#: Its forward passes were measured while the output of the one before was held.
_HOLDS_OUTPUTS = "optimum-benchmark 6a25a6db"


def _optimum(row: Row, shapes: Shapes) -> Mapped:
    """Random weights and inputs of fixed lengths; training through HF Trainer, LoRA with PEFT's default targets."""
    value = float(row["time_value"]) if row["time_value"] else None
    if row["phase"] == "train":
        # its backend at that time called PEFT without k-bit preparation
        setup = {"kbit_preparation": False, "clip_grad_norm": 1.0, "output_kept": False}
        workload = _workload(row, shapes, seq_len=int(row["seq_len"]), **setup)
        return workload, _per_step(workload.batch_size / value) if value else None, ()
    prompt, new = _lengths(row["seq_len"])
    # in these versions a forward pass computes the logits of every position
    # the forward passes of one revision hold what the pass before returned: their bytes tell, those of other tables do not
    held = not new and _HOLDS_OUTPUTS in row["software"]
    setup = {"last_logits_only": False, "previous_kept": held}
    workload = _workload(row, shapes, prefill_len=prompt, decode_len=new or 1, **setup)
    decoded = max(0, new - 1)
    time = PublishedTime(seconds=value, prefills=1, decoded_tokens=decoded) if value else None
    return workload, time, ("the output of the pass before held",) if held else ()


def _lengths(text: str) -> tuple[int, int]:
    """Return prompt and new tokens of `prompt 256 + 512 new`; no new ones for a forward pass."""
    found = re.match(r"prompt (\d+)(?: \+ (\d+) new)?", text)
    return (int(found[1]), int(found[2] or 0)) if found else _unmapped(f"seq_len {text!r}")


def _peft(row: Row, shapes: Shapes) -> Mapped:
    """PEFT's MetaMathQA loop: batches of 4 padded to their longest sample, no checkpointing, outputs kept over a step."""
    longest = row["mem_metric"] == "max_reserved"
    workload = _workload(row, shapes, seq_len=PEFT_LONGEST if longest else PEFT_SEQ_LEN, padded=True)
    time = None
    if row["time_metric"] == "mean step time s" and row["time_value"]:
        time = _per_step(float(row["time_value"]))
    length = f"longest batch of 4 x {PEFT_LONGEST} tokens: fitted" if longest else f"mean batch as 4 x {PEFT_SEQ_LEN}"
    return workload, time, (length,)


def _bitsandbytes(row: Row, shapes: Shapes) -> Mapped:
    """Generate 64 tokens after 64; the time of a token is that of all of it over the new ones."""
    workload = _workload(row, shapes, prefill_len=64, decode_len=64)
    return workload, PublishedTime(seconds=float(row["time_value"]), decoded_tokens=1), ()


def _qwen3(row: Row, shapes: Shapes) -> Mapped:
    """Qwen's speed_benchmark script: generate() of 2,048 tokens, tokens/s of prompt and answer together."""
    prompt, new = _lengths(row["seq_len"])
    workload = _workload(row, shapes, prefill_len=prompt, decode_len=new)
    seconds = (prompt + new) / float(row["time_value"])
    return workload, PublishedTime(seconds=seconds, prefills=1, decoded_tokens=new - 1), ()


def _philschmid(row: Row, shapes: Shapes) -> Mapped:
    """TRL on packed samples, bf16 autocast over 4-bit weights, accumulated over 8 batches."""
    steps, accumulated = int(row["n_tokens_or_samples"].split()[0]), int(row["grad_accum"])
    changes = {
        "precision": "bf16-mixed",
        "dropout": 0.05,
        "reentrant": True,
        "clip_grad_norm": 0.3,
        "output_kept": False,
    }
    workload = _workload(row, shapes, seq_len=2048, accumulation=accumulated, **changes)
    seconds = float(row["time_value"])
    time = PublishedTime(seconds=seconds, micro_steps=steps * accumulated, optimizer_steps=steps)
    return workload, time, ("includes saving checkpoints",)


def _opt(row: Row, shapes: Shapes) -> Mapped:
    """Figures fit weights and gradients without AdamW's states; loss and optimizer are not stated."""
    raise Unmapped("the source states neither optimizer nor loss")


def _litgpt(row: Row, shapes: Shapes) -> Mapped:
    raise Unmapped("litgpt runs model code of its own, not Transformers'")


def _qwen1(row: Row, shapes: Shapes) -> Mapped:
    raise Unmapped("Qwen's first models run code of their own, under DeepSpeed")


SOURCES: dict[str, tuple[str, Callable[[Row, Shapes], Mapped]]] = {
    "foundation-model-stack/fms-acceleration": ("fms-acceleration", _fms),
    "huggingface/optimum-benchmark": ("optimum-benchmark", _optimum),
    "huggingface/peft method_comparison": ("peft", _peft),
    "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "QwenLM/Qwen3": ("qwen3", _qwen3),
    "QwenLM/Qwen README": ("qwen", _qwen1),
    "philschmid training/fine-tune-llms-in-2024": ("philschmid", _philschmid),
    "huggingface/transformers docs model_doc/opt": ("opt-350m", _opt),
    "Lightning-AI/litgpt": ("litgpt", _litgpt),
    "litgpt": ("litgpt", _litgpt),
}
