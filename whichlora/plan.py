"""What `whichlora pick` hands on: plan.json, which later commands read, and the folder that holds it and the report."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from whichlora_calibration import Interval, Prediction, TimeSpan, Verdict
from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.files import write_whole
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.methods import find_method
from whichlora_estimators.optimizers import find_optimizer
from whichlora_estimators.quantization import find_quantization
from whichlora_estimators.workload import Workload

from .advice import Advice
from .finetune.settings import Finetune, ModelSource
from .pick import PickResult, Row, memory_limit, per_token, serving_rows
from .pickconfig import PickConfig, Stage1, Stage2
from .pickdata import Schedule, tokenizer_of
from .policy import ranked
from .records import from_json, to_json
from .report_measured import Pair

#: The layout of plan.json; one more with every change that an older reader would misread.
SCHEMA = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Predicted bytes: what is expected, and from `low_bytes` to `high_bytes` with probability `coverage`.

    A search bounds its rows by the usual slack of the allocator and names neither an expectation nor a coverage; what was
    rehearsed or measured is expected, and is both bounds.
    """

    expected_bytes: int | None
    low_bytes: int | None
    high_bytes: int | None
    coverage: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What a candidate is predicted to take: `step` and `total` time when training, of a generated `token` when serving.

    The step is the optimizer's, on the longest batch; the total is that of all batches as long as they are.
    """

    allocated: Spread
    reserved: Spread | None
    process: Spread
    step: TimeSpan | None
    total: TimeSpan | None
    token: TimeSpan | None
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration: what would run, for how many steps, what that takes, why it was dropped (if it was).

    `predicted` is None for what was dropped before any prediction, `epochs` where nothing is trained, `schedule` without a
    data set.
    """

    workload: Workload
    parameters: int
    predicted: Predicted | None
    rejected: tuple[str, ...]
    epochs: int | None
    schedule: Schedule | None

    def time_s(self, spans: Mapping[str, TimeSpan]) -> float | None:
        """Return the seconds of the whole training, or of a generated token, if its parts take so long; None if unknown."""
        if self.workload.phase == "generate":
            token = per_token(self.workload, spans)
            return None if token is None else token.expected_s
        predicted, step = self.predicted, spans.get("step")
        if step is None or predicted is None or predicted.total is None or predicted.step is None:
            return None
        return predicted.total.expected_s * step.expected_s / predicted.step.expected_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a search found: `survivors` satisfy every limit, best first, so that the first one is the choice.

    `serving` are the configurations of inference that these models were kept for, the quickest of each model first.
    `misses` holds, for each model larger than the choice (for every one if there is none), what came closest. `models`
    maps the names of all models in the plan to their config.json; `finetune` holds what else fine-tuning needs.
    """

    whichlora: str
    gpu: Gpu
    stage1: Stage1
    stage2: Stage2
    kept: tuple[str, ...]
    choice: Candidate | None
    survivors: tuple[Candidate, ...]
    serving: tuple[Candidate, ...]
    misses: tuple[Candidate, ...]
    models: Mapping[str, Mapping[str, Any]]
    finetune: Finetune


def make_plan(result: PickResult) -> Plan:
    """Sum a search up."""
    from . import __version__

    config = result.config
    choice = None if result.choice is None else _candidate(config, result.choice, result.prediction)
    others = tuple(_candidate(config, row) for row in survivors(result)[1:])
    missed = tuple(_candidate(config, row) for row in misses(result))
    candidates = (*others, *missed) if choice is None else (choice, *others, *missed)
    tuned = () if choice is None else tuple(dict.fromkeys(each.workload.model for each in (choice, *others)))
    return Plan(
        whichlora=__version__,
        gpu=config.gpu,
        stage1=config.stage1,
        stage2=config.stage2,
        kept=result.kept,
        choice=choice,
        survivors=() if choice is None else (choice, *others),
        serving=tuple(_candidate(config, row) for model in tuned for row in serving_rows(result, model)),
        misses=missed,
        models={each.workload.model: each.workload.config for each in candidates},
        finetune=_finetune(config, sorted({each.workload.model for each in candidates})),
    )


def _finetune(config: PickConfig, models: list[str]) -> Finetune:
    """Hand on data, training, tokenizers, and where models that are local files lie, whoever reads the plan from where."""

    def source(name: str) -> ModelSource:
        path = _absolute(name) if Path(name).expanduser().exists() else None
        return ModelSource(model=name, path=path, tokenizer=_absolute(tokenizer_of(config, name)))

    return Finetune(data=config.data, training=config.training, sources=tuple(map(source, models)))


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def survivors(result: PickResult) -> list[Row]:
    """Return the rows of stage 2 that satisfy every limit, best first: the choice, then what the policy ranks after."""
    rows = ranked(result.config, result.stage2)
    return [] if result.choice is None else rows[rows.index(result.choice) :]


def misses(result: PickResult) -> list[Row]:
    """Return what came closest for each model larger than the choice (for all models without one), closest first."""
    choice = result.choice
    larger = {row.model for row in result.stage1 if choice is None or row.parameters > choice.parameters}
    found = [row for model in sorted(larger) if (row := closest_miss(result, model)) is not None]
    return sorted(found, key=lambda row: _distance(result.config, row))


def closest_miss(result: PickResult, model: str) -> Row | None:
    """Return the row of a model without survivors that oversteps its limits least, in the stage that dropped it."""
    if model not in result.kept:
        rows = [row for row in result.stage1 if row.model == model and row.rejected]
    else:
        rows = [_as_miss(row) for row in result.stage2 if row.model == model]
    return min(rows, key=lambda row: _distance(result.config, row), default=None)


def _as_miss(row: Row) -> Row:
    why = "tight: the full prediction, with the allocator replayed, goes beyond the limit"
    return row if row.rejected else replace(row, rejected=(why,))


def _distance(config: PickConfig, row: Row) -> tuple[int, float, int]:
    """Order misses: what would run but oversteps one limit, or two; what does not fit; what has no prediction.

    Within these by how many times over the worse of the two limits they are, then by size.
    """
    if row.process_bytes is None:
        return 4, 0.0, row.parameters
    training = row.workload.phase == "train"
    limit_s = config.stage2.total_time_s if training else config.stage1.time_per_token_s
    slowness = 0.0 if row.time_s is None or limit_s is None else row.time_s / limit_s
    fullness = row.process_bytes[1] / memory_limit(config, row.workload.phase)
    severity = 3 if row.verdict is Verdict.DOES_NOT_FIT else len(row.rejected)
    return severity, max(fullness, slowness), row.parameters


def _candidate(config: PickConfig, row: Row, prediction: Prediction | None = None) -> Candidate:
    return Candidate(
        workload=row.workload,
        parameters=row.parameters,
        predicted=_predicted(row) if prediction is None or row.seen else _fully_predicted(row, prediction),
        rejected=row.rejected,
        epochs=config.epochs if row.workload.phase == "train" else None,
        schedule=row.schedule,
    )


def _predicted(row: Row) -> Predicted | None:
    if row.allocated_peak_bytes is None or row.process_bytes is None or row.workload is None:
        return None
    least_bytes, most_bytes = row.process_bytes
    training = row.workload.phase == "train"
    return Predicted(
        allocated=Spread(expected_bytes=row.allocated_peak_bytes, low_bytes=None, high_bytes=None, coverage=None),
        reserved=None,
        process=Spread(
            expected_bytes=most_bytes if row.seen else None, low_bytes=least_bytes, high_bytes=most_bytes, coverage=None
        ),
        step=row.step,
        total=row.time if training else None,
        token=None if training else row.time,
        evidence=row.evidence,
    )


def _fully_predicted(row: Row, prediction: Prediction) -> Predicted:
    found = prediction.estimate
    process = _spread(found.process_bytes, prediction.process)
    reserved = Spread(
        expected_bytes=found.reserved_peak_bytes,
        low_bytes=max(0, prediction.process.low_bytes - found.context_bytes),  # the context's own error is in it
        high_bytes=prediction.process.high_bytes - found.context_bytes,
        coverage=prediction.process.coverage,
    )
    return Predicted(
        allocated=_spread(found.allocated_peak_bytes, prediction.allocated),
        reserved=reserved,
        process=process,
        step=row.step,
        total=row.time,
        token=None,
        evidence=prediction.evidence,
    )


def _spread(expected_bytes: int, interval: Interval) -> Spread:
    return Spread(
        expected_bytes=expected_bytes,
        low_bytes=interval.low_bytes,
        high_bytes=interval.high_bytes,
        coverage=interval.coverage,
    )


# --- plan.json ---

_REMAKE = "Give the plan.json that `whichlora pick` writes; make it anew if it was edited."


def plan_from(result: PickResult) -> dict[str, Any]:
    """Return what plan.json holds: `schema`, then the fields of Plan; of a workload all but its model's config."""
    return {"schema": SCHEMA, **to_json(make_plan(result), {Workload: _without_config})}


def _without_config(workload: Workload) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(workload))
    return {name: to_json(getattr(workload, name)) for name in names if name != "config"}


def read_plan(path: Path) -> Plan:
    """Read a plan.json, or the one in a folder. Raises BadValue if it is missing, foreign, newer or malformed."""
    file = path / "plan.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadValue("cannot read the plan", value=str(file), todo=f"{error.strerror}. {_REMAKE}") from None
    except (ValueError, RecursionError):
        raise BadValue("not a JSON file", value=str(file), todo=_REMAKE) from None
    try:
        return plan_from_json(fields)
    except WhichloraError as error:
        raise BadValue(f"cannot use the plan in {file}: {error.what}", value=error.value, todo=error.todo) from None


def plan_from_json(fields: Any) -> Plan:
    """Validate what a plan.json holds. Raises WhichloraError that names the place."""
    if not isinstance(fields, dict) or type(fields.get("schema")) is not int or "whichlora" not in fields:
        raise BadValue("not a plan of whichlora", todo=_REMAKE)
    if fields["schema"] > SCHEMA:
        todo = f"This version reads schema {SCHEMA}: upgrade whichlora, or pick anew with this one."
        raise BadValue("the plan is newer than this whichlora", value=fields["schema"], todo=todo)
    if fields["schema"] < SCHEMA:
        raise BadValue("the plan has an unknown schema", value=fields["schema"], todo=_REMAKE)
    models = fields.get("models")
    if not isinstance(models, dict) or not all(isinstance(config, dict) for config in models.values()):
        raise BadValue("models must map names to configs", todo=_REMAKE)
    rest = {key: value for key, value in fields.items() if key != "schema"}
    plan = from_json(Plan, rest, "", {Workload: partial(_read_workload, models)})
    if plan.survivors[:1] != (() if plan.choice is None else (plan.choice,)):
        raise BadValue("the first survivor must be the choice", todo=_REMAKE)
    return plan


def _read_workload(models: Mapping[str, Any], value: Any, where: str) -> Workload:
    """Read a workload with the config of its model, which the plan holds once; fields newer than the plan have defaults."""
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, str) or model not in models:
        raise BadValue(f"{where}.model is not among the models of the plan", value=model, todo=_REMAKE)
    defaults = _without_config(Workload(model=model, config={}))
    workload = from_json(Workload, {**defaults, **value, "config": models[model]}, where)
    find_method(workload.method)
    find_quantization(workload.quantization)
    find_optimizer(workload.optimizer)
    return workload


# --- the folder ---


def write_outputs(
    result: PickResult, folder: Path, advice: Advice | None = None, measured: Sequence[Pair] = ()
) -> list[Path]:
    """Write report.html and plan.json to a folder, new or not, and return their paths.

    A new folder appears whole, and in an old one each file is replaced once all are written. Raises BadValue for a place
    that cannot be written; nothing half-written stays.
    """
    from .report import report_html

    texts = {
        "report.html": report_html(result, advice, measured),
        "plan.json": json.dumps(plan_from(result), indent=1) + "\n",
    }
    try:
        _publish(texts, folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, before Python 3.13
        todo = f"{getattr(error, 'strerror', None) or error}. Name another folder, or mend this one."
        raise BadValue("cannot write the results", value=str(folder), todo=todo) from None
    return [folder / name for name in texts]


def _publish(texts: Mapping[str, str], folder: Path) -> None:
    """Replace files in an old folder; make a new one beside its place, so that it appears whole."""
    if folder.exists():
        write_whole({folder / name: text for name, text in texts.items()})
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".whichlora-{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        write_whole({temporary / name: text for name, text in texts.items()})
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
