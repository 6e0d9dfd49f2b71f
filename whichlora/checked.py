"""A choice that has run: survivors of a search, best first, are rehearsed, then verified on the card if it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

from whichlora_calibration import Verdict, predict
from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import Store

from .pick import PickResult, Row, choose, memory_limit, serving_rows, with_times
from .pickconfig import PickConfig
from .policy import by_policy
from .rehearse import Rehearser
from .verify import Options, Place, find_place
from .verify.judged import Limits, Seen, broken, first_that_keeps, seen_in_rehearsal, seen_in_run
from .verify.verifications import Verifier, check_all

#: Rows of a stage that are tried, of a model's inference and of all training, before the search's own order is trusted again.
MOST_TRIED = 8

Report = Callable[[str], None]


def check(
    result: PickResult, *, on: str | Place | None = None, store: Store | None = None, report: Report = lambda _: None
) -> PickResult:
    """Return the search with its choice rehearsed; with `on` "cuda" verified on the card as well, with "null" only there.

    `on` may be a place that was found before. Rows are tried best first, those that straddle a limit included, until one
    keeps every limit with the bytes (and the time, on a card) that were seen. Before the first row of a model its
    inference is run in the same way; a model that does not serve is not kept. What was seen replaces what was predicted,
    in the row and in its evidence.
    Raises WhichloraError where the training stack or the card is missing.
    """
    config = result.config
    candidates = by_policy(config, [row for row in result.stage2 if not row.rejected or row.undecided])
    tried = candidates[:MOST_TRIED]
    with ExitStack() as workers:
        checker = _Checker(result, on, store, report, workers)
        found = first_that_keeps(tried, checker.serving, checker.keeps, satisfy=config.stage1.satisfy)
    checked = checker.result()
    if found is not None:
        choice = checker.seen[id(found)]
        prediction = predict(choice.workload, config.gpu, stack=config.stack, correction=config.correction)
        return replace(checked, choice=choice, prediction=prediction)
    report(f"none of the first {len(tried)} kept the limits; the choice is by formula again")
    gone = {id(row) for row in tried}
    left = [row for row in result.stage2 if id(row) not in gone and row.model in checked.kept]
    fallback, predicted = choose(config, left)
    same = None if fallback is None else fallback.workload
    stage2 = tuple(fallback if fallback is not None and row.workload == same else row for row in checked.stage2)
    return replace(checked, stage2=stage2, choice=fallback, prediction=predicted)


class _Checker:
    """Runs rows, remembers what they became, and which models turned out not to serve.

    One worker rehearses them all, and one verifies them all where the card lets it; `workers` ends them.
    """

    def __init__(
        self, result: PickResult, on: str | Place | None, store: Store | None, report: Report, workers: ExitStack
    ) -> None:
        self.before, self.store, self.report, self.workers = result, store, report, workers
        gpu = result.config.gpu if on == "null" else None  # any other place has its own
        self.place = find_place(on, gpu) if isinstance(on, str) else on
        self.seen: dict[int, Row] = {}

    def serving(self, model: str) -> list[Row]:
        """Return a model's inference to be run."""
        rows = serving_rows(self.before, model)
        return rows if self.before.config.stage1.satisfy == "all" else rows[:MOST_TRIED]

    def keeps(self, row: Row) -> bool:
        """Rehearse and verify a row, and say whether it keeps its limits."""
        found = row
        for name, look in self._looks():
            what = "serving" if row.workload.phase == "generate" else row.method
            self.report(f"{row.model} {what}, batch {row.workload.batch_size}: to be {name}")
            seen = look(row)
            if seen is None:
                continue
            found = with_seen(self.before.config, found, seen)
            if found.rejected:
                self.report(f"  {'; '.join(found.rejected)}")
                break
        self.seen[id(row)] = found
        return not found.rejected

    def _looks(self) -> Iterator[tuple[str, Callable[[Row], Seen | None]]]:
        if self.place is None or self.place.device != "null":  # verifying there rehearses
            yield "rehearsed", self._rehearsed
        if self.place is not None:
            yield "verified", self._verified

    def _rehearsed(self, row: Row) -> Seen | None:
        """Rehearse a row; None where that cannot be done here but a card can tell."""
        try:
            found = self._rehearser.rehearse(row.workload)
        except WhichloraError as error:
            if self.place is None:
                raise
            self.report(f"  not rehearsed: {error}")
            return None
        return seen_in_rehearsal(found)

    def _verified(self, row: Row) -> Seen:
        assert self.place is not None
        check_all([row.workload], self.place)
        return seen_in_run(self._verifier.verify(row.workload))

    @cached_property
    def _rehearser(self) -> Rehearser:
        return self.workers.enter_context(Rehearser(self.before.config.gpu, store=self.store))

    @cached_property
    def _verifier(self) -> Verifier:
        assert self.place is not None
        return self.workers.enter_context(Verifier(self.place, Options(store=self.store)))

    def result(self) -> PickResult:
        """Return the search with what was seen in it, without the training of models that do not serve."""
        result = self.before
        stage1 = tuple(self.seen.get(id(row), row) for row in result.stage1)
        kept = tuple(model for model in result.kept if self._serves(model, stage1))
        stage2 = tuple(self.seen.get(id(row), row) for row in result.stage2 if row.model in kept)
        return replace(result, stage1=stage1, kept=kept, stage2=stage2)

    def _serves(self, model: str, stage1: tuple[Row, ...]) -> bool:
        rows = [row for row in stage1 if row.model == model]
        enough = all if self.before.config.stage1.satisfy == "all" else any
        return enough(not row.rejected for row in rows)


def with_seen(config: PickConfig, row: Row, seen: Seen) -> Row:
    """Put what was seen into a row, and judge it by that."""
    ran = seen.outcome == "ok"
    found = with_times(row, seen.times) if ran else row
    limit_s = config.stage2.total_time_s if row.workload.phase == "train" else config.stage1.time_per_token_s
    limits = Limits(memory_bytes=memory_limit(config, row.workload.phase), time_s=limit_s)
    reasons = tuple(broken(seen, limits, found.time_s))
    process = None if seen.process_bytes is None or not ran else (seen.process_bytes, seen.process_bytes)
    return replace(
        found,
        allocated_peak_bytes=seen.allocated_peak_bytes or row.allocated_peak_bytes,
        process_bytes=process or row.process_bytes,
        verdict=Verdict.DOES_NOT_FIT if reasons else Verdict.FITS,
        rejected=reasons,
        evidence=seen.evidence,
    )
