"""What goes in and out, for checking and for the OpenAPI description; a workload's fields are those of its dataclass."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from whichlora_calibration import Verdict
from whichlora_estimators.workload import ATTENTIONS, BIASES, CACHES, PHASES, PRECISIONS, TASKS, Workload
from whichlora_profiles_db.measurement import EVIDENCES, OUTCOMES

from ..pickconfig import POLICY

#: Texts of requests: short, and without what no name holds.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]*$")]
Layer = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.]+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Above what any run has; they keep a request from asking for endless work.
_MOST = {"rank": 8192, "batch_size": 65_536, "accumulation": 65_536}
_MOST |= {"num_virtual_tokens": 65_536, "encoder_hidden_size": 65_536}
_MOST_TOKENS = 1 << 22
Number = Annotated[int, Field(ge=0, le=10_000)]
Tokens = Annotated[int, Field(ge=0, le=1 << 20)]
MOST_AT_ONCE = 256
MOST_MEASUREMENTS = 1000

_CHOICES = {
    "phase": PHASES,
    "task": TASKS,
    "precision": PRECISIONS,
    "attention": ATTENTIONS,
    "bias": BIASES,
    "cache": CACHES,
}
_TYPES: dict[str, Any] = {
    "model": Name,
    "method": Name,
    "quantization": Name,
    "optimizer": Name,
    "id": Annotated[str, StringConstraints(max_length=200)],
    "targets": Literal["all-linear"] | Annotated[list[Layer], Field(max_length=100)] | None,
    "target_parameters": Annotated[list[Layer], Field(max_length=100)],
    "rank_pattern": Annotated[dict[Layer, Annotated[int, Field(ge=1, le=8192)]], Field(max_length=100)],
    "modules_to_save": Annotated[list[Layer], Field(max_length=100)],
    "exclude_modules": Annotated[list[Layer], Field(max_length=100)],
    "layers_to_transform": Annotated[list[Number], Field(max_length=1000)],
    "layer_replication": Annotated[
        list[Annotated[list[Number], Field(min_length=2, max_length=2)]], Field(max_length=8)
    ],
    "trainable_tokens": Tokens | Annotated[dict[Layer, Tokens], Field(max_length=100)],
    "dropout": Annotated[float, Field(ge=0, lt=1)],
    "clip_grad_norm": Annotated[float, Field(gt=0, le=1e6)] | None,
    "checkpointing": bool | None,
}
_HINTS = get_type_hints(Workload)


_MEASUREMENT: dict[str, Any] = {
    "evidence": "measured",
    "device": "cuda",
    "outcome": "ok",
    "measured_at": "2026-03-01T12:00:00.000000Z",
    "workload": {"model": "example/model", "config": {"hidden_size": 64}, "batch_size": 2},
    "environment": {"gpu": "rtx-4090", "versions": {"torch": "2.14.1"}},
    "allocated_peak_bytes": 5_000_000_000,
}


class Strict(BaseModel):
    """Refuses keys that it does not know and values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _field(field: dataclasses.Field[Any]) -> tuple[Any, Any]:
    """Return the type and default of a field of a workload, bounded."""
    kind = _TYPES.get(field.name, _HINTS[field.name])
    if field.name in _CHOICES:
        kind = Literal[_CHOICES[field.name]]
    elif kind in (int, int | None):
        count = Annotated[int, Field(ge=1, le=_MOST.get(field.name, _MOST_TOKENS))]
        kind = count if kind is int else count | None
    if field.name == "checkpointing":
        return kind, None
    if field.default_factory is not dataclasses.MISSING:
        return kind, Field(default_factory=field.default_factory)
    if isinstance(field.default, tuple):
        return kind, list(field.default)
    return kind, ... if field.default is dataclasses.MISSING else field.default


_FIELDS: dict[str, Any] = {each.name: _field(each) for each in dataclasses.fields(Workload) if each.name != "config"}
_EXAMPLE: dict[str, Any] = {"gpu": "rtx-4090", "model": "meta-llama/Llama-3.1-8B", "method": "qlora", "batch_size": 4}

EstimateRequest: Any = create_model(
    "EstimateRequest",
    __base__=Strict,
    __doc__="A workload on a card. `config` (the fields of a config.json) is for a model that is not bundled; "
    "`stack` names library versions; `checkpointing` is on above 1B parameters unless given.",
    **{
        "gpu": (Name, Field(examples=["rtx-4090"])),
        **_FIELDS,
        "config": (dict[str, Any] | None, None),
        "stack": (Annotated[str, StringConstraints(max_length=500)], ""),
    },
)
EstimateRequest.model_config["json_schema_extra"] = {"examples": [_EXAMPLE]}


class EstimatesRequest(Strict):
    """Several workloads, each on its card."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests": [_EXAMPLE, {**_EXAMPLE, "gpu": "a100-sxm-80gb"}]}]}
    )
    requests: Annotated[list[EstimateRequest], Field(min_length=1, max_length=MOST_AT_ONCE)]


class Said(BaseModel):
    """What is wrong, its value where there is one, and what to do."""

    what: str
    value: str | None = None
    todo: str


class Problem(BaseModel):
    """Every answer that is not what was asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"error": {"what": "unknown GPU", "value": "'rtx-9999'", "todo": "Nearest known: rtx-4090."}}]
        }
    )
    error: Said


class Answer(BaseModel):
    """A prediction, as `whichlora estimate --json` prints it: bytes and seconds, the times that its phase has."""

    model_config = ConfigDict(extra="allow")
    id: str
    model: str
    gpu: str
    trainable_params: int
    allocated_peak_bytes: int
    reserved_peak_bytes: int
    process_bytes: int
    process_interval_bytes: list[int]
    coverage: float
    verdict: Literal["fits", "tight", "does-not-fit"]
    step_s: float | None = None
    prefill_s: float | None = None
    decode_s_per_token: float | None = None
    peak_phase: str
    breakdown: dict[str, int]
    evidence: str
    caveats: list[str] = []


assert {verdict.value for verdict in Verdict} == {"fits", "tight", "does-not-fit"}


class Estimates(BaseModel):
    """Answers in the order asked; one that must be refused is a problem."""

    predictions: list[Answer | Problem]


class ExploreRequest(Strict):
    """Fine-tuning of several models on a card, in a few batch sizes each: what the page draws."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"gpu": "rtx-4090", "seq_len": 1024}]})
    gpu: Name
    models: Annotated[list[Name], Field(max_length=64)] = []
    methods: Annotated[list[Name], Field(min_length=1, max_length=6)] = ["lora", "qlora"]
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    seq_len: Annotated[int, Field(ge=1, le=1 << 17)] = 1024
    precision: Literal[PRECISIONS] = "bf16-true"  # type: ignore[valid-type]


class Explored(BaseModel):
    """Rows of setups; `rejected` says why one has no numbers."""

    gpu: str
    total_bytes: int
    rows: list[dict[str, Any]]


_Positive = Annotated[float, Field(gt=0, le=1e9)]
_Count = Annotated[int, Field(ge=1, le=10**9)]
_Batches = Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=12)]
_Lengths = Annotated[list[Annotated[int, Field(ge=1, le=1 << 17)]], Field(min_length=1, max_length=6)]


class PickStage1(Strict):
    """Limits of serving, and the grid to try."""

    model_names: Annotated[list[Name], Field(min_length=1, max_length=64)] | None = None
    batch_size: _Batches | None = None
    prefill_length: _Lengths | None = None
    tokens_to_generate: _Lengths | None = None
    time_per_token_ms: _Positive | None = None
    peak_memory_gb: _Positive | None = None
    quantization: Name | None = None
    satisfy: Literal["any", "all"] = "any"


class PickStage2(Strict):
    """Limits of fine-tuning, and the batch sizes to try."""

    batch_size: _Batches | None = None
    total_time_mins: _Positive | None = None
    peak_memory_gb: _Positive | None = None


class PickData(Strict):
    """How many samples there are."""

    samples: _Count


class PickRequest(Strict):
    """The config of `whichlora pick` (docs/pick.md), but for what names files."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "gpu": "rtx-4090",
                    "stage1_profile": {"model_names": ["Qwen/Qwen2.5-0.5B"], "time_per_token_ms": 60},
                    "stage2_profile": {"total_time_mins": 600},
                    "dataset": {"samples": 5000},
                }
            ]
        }
    )
    gpu: Name
    stage1_profile: PickStage1 | None = None
    stage2_profile: PickStage2 | None = None
    dataset: PickData | None = None
    methods: Annotated[list[Name], Field(min_length=1, max_length=8)] | None = None
    ranks: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)] | None = None
    seq_len: Annotated[int, Field(ge=1, le=1 << 17)] | None = None
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    precision: Literal[PRECISIONS] | None = None  # type: ignore[valid-type]
    attention: Literal[ATTENTIONS] | None = None  # type: ignore[valid-type]
    optimizer: Name | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    policy: Annotated[list[Literal[POLICY]], Field(min_length=1, max_length=6)] | None = None  # type: ignore[valid-type]


class PickState(BaseModel):
    """How a search stands: `result` is what `whichlora pick --json` prints, once it is done."""

    id: str
    state: Literal["running", "done", "failed", "cancelled"]
    progress: list[str]
    result: dict[str, Any] | None = None
    error: Said | None = None


class StatsRequest(Strict):
    """Which measurements to count; names are compared without case, and may be patterns with * and ?."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"gpu": ["rtx-4090"], "evidence": ["measured"]}]})
    gpu: list[Name] | None = None
    model: list[Name] | None = None
    method: list[Name] | None = None
    evidence: list[Literal[EVIDENCES]] | None = None  # type: ignore[valid-type]
    outcome: list[Literal[OUTCOMES]] | None = None  # type: ignore[valid-type]
    device: list[Name] | None = None
    phase: list[Literal[PHASES]] | None = None  # type: ignore[valid-type]
    task: list[Name] | None = None
    precision: list[Name] | None = None
    quantization: list[Name] | None = None
    source: list[Name] | None = None
    workload_id: list[Name] | None = None
    since: Name | None = None
    until: Name | None = None


class Group(BaseModel):
    """Counts of one card and evidence."""

    gpu: str | None
    evidence: str
    counts: dict[str, int]
    models: int
    workloads: int
    first_at: str | None
    last_at: str | None


class Stats(BaseModel):
    """How much the store holds."""

    total: int
    groups: list[Group]


class Measurements(BaseModel):
    """Measurements, the latest first, in their JSON form."""

    measurements: list[dict[str, Any]]


class Submit(Strict):
    """Measurements in their JSON form (`whichlora profiles show --json`); names of hosts and users are dropped."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"measurements": [_MEASUREMENT]}]})
    measurements: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MEASUREMENTS)]


class Accepted(BaseModel):
    """What was taken, and is on disk now: of so many rows, so many were new."""

    pack: str
    rows: int
    added: int


class Packs(BaseModel):
    """The names of all packs: together they hold every measurement."""

    packs: list[str]


class ModelEntry(BaseModel):
    """A bundled model."""

    name: str
    family: str
    parameters: int | None
    gated: bool
    caveat: str
    source: str


class Models(BaseModel):
    """Bundled models, smallest first."""

    models: list[ModelEntry]


class GpuEntry(BaseModel):
    """A card."""

    slug: str
    name: str
    architecture: str
    total_bytes: int
    memory_basis: str
    hbm_bytes_per_s: float


class Gpus(BaseModel):
    """All cards that are known by name."""

    gpus: list[GpuEntry]


class Corrections(BaseModel):
    """Corrections, the one in use first; empty where predictions are the formula's alone."""

    corrections: list[dict[str, Any]]


class TokenEntry(BaseModel):
    """A token without its secret."""

    id: str
    role: str
    label: str
    created_at: str
    revoked_at: str | None


class TokenList(BaseModel):
    """All tokens, the oldest first."""

    tokens: list[TokenEntry]


class SubmissionList(BaseModel):
    """What came in with which token, the latest first."""

    submissions: list[dict[str, Any]]


class Health(BaseModel):
    """A server that answers."""

    status: Literal["ok"]
    whichlora: str
    read_only: bool
