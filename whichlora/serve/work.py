"""Predictions in processes of their own, so that the loop that answers everybody stays free; what was found is kept.

A process that computes for longer than allowed is ended with its pool: a request can ask for the impossible, but not for
a server's life.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from whichlora_calibration.current import current_correction
from whichlora_estimators.errors import BadValue, WhichloraError

#: Answers that are kept, and different requests that may wait.
KEPT, MOST_WAITING = 20_000, 512
#: How often a computation is begun whose process another one's request ended.
TRIES = 3
#: Batch sizes that a page shows.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
#: What a config from outside may hold: a few layers more than any model has.
MOST_LAYERS, MOST_CONFIG_BYTES, MOST_NUMBER = 512, 1 << 16, 1 << 31


_Key = tuple[str, str, str]
Found = dict[str, Any]


class Busy(WhichloraError):
    """More is asked than can be answered in time."""

    def __init__(self, what: str = "too many predictions are waiting") -> None:
        super().__init__(what, todo="Try again in a few seconds, or ask for less.")


class Refused(WhichloraError):
    """What a worker refused, as it said it."""


def correction_version() -> str:
    """Return the version of the correction in use: what was predicted under another is not given out any more."""
    found = current_correction()
    return "none" if found is None else found.version


class Workers:
    """Processes that compute, and a cache of what they found, by function, arguments and correction."""

    def __init__(self, *, jobs: int, limit_s: float) -> None:
        self._jobs, self._limit_s = jobs, limit_s
        self._kept: OrderedDict[_Key, Found] = OrderedDict()
        self._under_way: dict[_Key, asyncio.Task[Found]] = {}
        self._free = asyncio.Semaphore(jobs)
        self._pool = self._new_pool()
        self.hits = self.misses = 0

    def close(self) -> None:
        """End the processes."""
        for task in self._under_way.values():
            task.cancel()
        _end(self._pool)

    async def call(self, work: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> Any:
        """Have a function of this module work on JSON fields. Raises Refused for what it refuses, and Busy.

        Who asks what somebody else is waiting for waits for the same answer.
        """
        key = (work.__name__, json.dumps(fields, sort_keys=True), correction_version())
        found = self._kept.get(key)
        if found is None:
            task = self._under_way.get(key) or self._begin(key, work, fields)
            found = await asyncio.shield(task)  # others may wait for it when this one's link is cut
        else:
            self._kept.move_to_end(key)
            self.hits += 1
        if "error" in found:
            error = found["error"]
            raise Refused(error["what"], value=_shown(error["value"]), todo=error["todo"])
        return found["found"]

    def _begin(self, key: _Key, work: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> asyncio.Task[Found]:
        if len(self._under_way) >= MOST_WAITING:
            raise Busy
        self.misses += 1
        task = asyncio.create_task(self._compute(key, work, fields))
        self._under_way[key] = task
        task.add_done_callback(lambda done: (self._under_way.pop(key, None), done.cancelled() or done.exception()))
        return task

    async def _compute(self, key: _Key, work: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> Found:
        """Compute when a process is free; the time limit counts from then on."""
        async with self._free:
            for _ in range(TRIES):
                pool = self._pool
                try:
                    running = asyncio.get_running_loop().run_in_executor(pool, _guarded, work, fields)
                    found = await asyncio.wait_for(running, self._limit_s)
                except asyncio.TimeoutError:
                    await self._replace(pool)
                    raise Busy(f"no answer within {self._limit_s:g} s") from None
                except BrokenProcessPool:  # another one's request ended it, or this one did
                    await self._replace(pool)
                else:
                    self._keep(key, found)
                    return found
        raise Busy("the prediction broke off")

    def _keep(self, key: _Key, found: Found) -> None:
        self._kept[key] = found
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    async def _replace(self, pool: ProcessPoolExecutor) -> None:
        """Put new processes in the place of `pool`, unless somebody has."""
        if pool is self._pool:
            self._pool = self._new_pool()
            await asyncio.to_thread(_end, pool)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_warm)


class _Shown:
    """A value that a worker showed already."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _shown(text: str | None) -> _Shown | None:
    return None if text is None else _Shown(text)


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


# --- in the workers ---


def _warm() -> None:
    from whichlora_estimators.models import all_models

    serve_parent()
    all_models()


def serve_parent() -> None:
    """Leave a Ctrl-C to the server, which ends its processes last, and end where it was killed."""
    import os
    import signal
    import threading
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _guarded(work: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"found": work(fields)}
    except WhichloraError as error:
        shown = None if error.value is None else repr(error.value)[:300]
        return {"error": {"what": error.what, "value": shown, "todo": error.todo}}
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError, IndexError) as error:
        if fields.get("config") is None and work is not forecast:
            raise
        what = f"a config that no model has ({type(error).__name__})"
        return {"error": {"what": what, "value": None, "todo": "Send the config.json of the model as it is."}}


def estimate(fields: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    from whichlora_calibration import predict
    from whichlora_estimators.gpus import find_gpu
    from whichlora_estimators.models import bundled_model, shape_from_config
    from whichlora_estimators.stack import parse_stack

    from ..api import answer, make_workload

    setup = dict(fields)
    gpu, stack, config = find_gpu(setup.pop("gpu")), parse_stack(setup.pop("stack")), setup.pop("config")
    model = setup.pop("model")
    shape = bundled_model(model) if config is None else shape_from_config(_bounded(config), name=model)
    for name in ("targets", "target_parameters", "modules_to_save", "exclude_modules", "layers_to_transform"):
        if isinstance(setup.get(name), list):
            setup[name] = tuple(setup[name])
    setup["layer_replication"] = _ranges(setup.get("layer_replication") or ())
    return answer(predict(make_workload(shape, **setup), gpu, stack=stack))


def forecast(fields: dict[str, Any]) -> dict[str, float]:
    """Predict what ran on a card under its versions: bytes and seconds by what they are of."""
    from whichlora_calibration import predict
    from whichlora_estimators.gpus import find_gpu
    from whichlora_estimators.stack import stack_of
    from whichlora_profiles_db.workload_form import workload_from_stored

    workload = workload_from_stored(fields["workload"])
    _bounded(dict(workload.config))
    for named in (workload.targets, workload.exclude_modules):
        if named != "all-linear" and isinstance(named, str):
            raise BadValue("an expression as names of layers", value=named, todo="Expressions of others are not run.")
    _ranges(workload.layer_replication)
    found = predict(workload, find_gpu(fields["gpu"]), stack=stack_of(fields["versions"]))
    counters = {"allocated": found.allocated, "reserved": found.reserved, "process": found.process}
    times = {name: span.expected_s for name, span in found.times.items()}
    return {name: float(interval.expected_bytes) for name, interval in counters.items()} | times


def explore(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer one model of an exploration: its setups in every batch size, with nothing to keep within."""
    from whichlora_calibration import Verdict
    from whichlora_estimators.caveats import caveats
    from whichlora_estimators.models import bundled_model

    from ..pick import stage2_rows
    from ..pickconfig import config_from_fields

    config = config_from_fields(
        {
            "gpu": fields["gpu"],
            "stage1_profile": {"model_names": [fields["model"]]},
            "stage2_profile": {"batch_size": list(BATCHES)},
            "methods": fields["methods"],
            "ranks": [fields["rank"]],
            "seq_len": fields["seq_len"],
            "precision": fields["precision"],
        }
    )
    rows = []
    for row in stage2_rows(config, bundled_model(fields["model"])):
        known = row.process_bytes is not None
        said = caveats(row.workload, config.stack) if known else ()
        rows.append(
            {
                "model": row.model,
                "parameters": row.parameters,
                "method": row.method,
                "rank": row.workload.rank,
                "checkpointing": row.workload.checkpointing,
                "batch_size": row.workload.batch_size if known else None,
                "process_bytes": list(row.process_bytes) if row.process_bytes else None,
                "step_s": row.step_s,
                "trainable_params": row.trainable_params,
                "evidence": row.evidence if known else None,
                "rejected": list(row.rejected) if row.verdict is Verdict.DOES_NOT_FIT else [],
                **({"caveats": list(said)} if said else {}),
            }
        )
    return rows


def _ranges(pairs: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Refuse more layers than any model has."""
    ranges = tuple((first, last) for first, last in pairs)
    count = sum(last - first for first, last in ranges)
    if count > MOST_LAYERS:
        raise BadValue(
            "layer_replication of more layers than any model has", value=count, todo=f"At most {MOST_LAYERS}."
        )
    return ranges


def _bounded(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse a config of a size that no model has."""
    if len(json.dumps(config)) > MOST_CONFIG_BYTES:
        raise BadValue("a config longer than any may be", todo=f"At most {MOST_CONFIG_BYTES} bytes.")
    for key, value in config.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and abs(value) > (MOST_LAYERS if "layer" in key else MOST_NUMBER):
            raise BadValue(f"{key} is larger than any model has", value=value, todo="Send the config.json as it is.")
    return config
