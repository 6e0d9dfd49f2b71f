"""report.html: one self-contained page that says what was chosen, why, and what was tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .advice import Advice
from .pick import PickResult, Row, row_notes
from .report_advice import advice_list, data_figure, frontier_table, rank_figure
from .report_answer import asked, assumptions, breakdown, headline, numbers, title, training
from .report_charts import (
    DOTS,
    dots_of,
    drawn_setups,
    least_width_px,
    memory_bars,
    model_bars,
    scatter,
    time_bars,
)
from .report_measured import Pair, bytes_figure, times_figure
from .report_page import chart, page, paragraph, section
from .report_tables import models_table, rows_table
from .report_view import Stage, stages_of

#: Models whose every configuration gets a bar; of more, the choice and its neighbours in size.
DETAILED = 3
#: Models that have a colour of their own where dots of all are drawn.
COLOURED = 7


def report_html(result: PickResult, advice: Advice | None = None, measured: Sequence[Pair] = ()) -> str:
    """Write the page of a search: plotly.js is in it, nothing is loaded, all names are escaped."""
    return page(title(result), _body(result, advice, measured))


def _body(result: PickResult, advice: Advice | None, measured: Sequence[Pair]) -> str:
    stages = stages_of(result)
    parts = [headline(result), asked(result)]
    if result.choice is not None and result.prediction is not None:
        parts += [numbers(result, result.choice, result.prediction), training(result)]
        parts += [paragraph(f"{text[0].upper()}{text[1:]}.") for text in result.prediction.caveats]
        parts.append(breakdown(result, result.prediction))
    if advice is not None and (said := advice_list(advice)):
        parts.append(section("What it hangs on", said))
    if any(not row.rejected for row in result.stage2):
        note = "No other configuration is at least as large, as lean and as quick. Differences below a percent count as none."
        parts.append(section("The frontier", paragraph(note), frontier_table(result)))
    note = "Largest first. Both stages count configurations that satisfy their limits, out of those tried."
    parts.append(section("Every model", paragraph(note), models_table(result, stages), *_notes(result)))
    parts += [_charts(result, stage) for stage in stages if stage.rows]
    parts += _costs(result, advice)
    parts += _measured(measured)
    for stage in stages:
        table = rows_table(stage) if stage.rows else paragraph("No model came this far.")
        parts.append(section(f"All configurations of {stage.title.lower()}", table))
    parts.append(assumptions(result))
    return "\n".join(parts)


def _notes(result: PickResult) -> Iterator[str]:
    """Say below the table what one would not expect of the configurations that were tried."""
    for text, models in row_notes((*result.stage1, *result.stage2), result.config.stack).items():
        yield paragraph(f"{', '.join(models)}: {text}.")


def _measured(found: Sequence[Pair]) -> Iterator[str]:
    """Compare predictions with what the store holds of this card."""
    text = "Of these models on this card, from the store. Filled: measured; open: rehearsed. On the line: as predicted."
    drawn = (("bytes", bytes_figure(found)), ("times", times_figure(found)))
    charts = [chart(f"measured-{what}", f"measured against predicted {what}", text, it) for what, it in drawn if it]
    if charts:
        yield section("Predicted against measured", *charts)


def _costs(result: PickResult, advice: Advice | None) -> Iterator[str]:
    if any(not row.rejected for row in result.stage2):
        text = (
            "The largest models, each at its quickest configuration within every limit. Loading, evaluation left out."
        )
        yield section("Data sets", chart("data", "fine-tuning time against data size", text, data_figure(result)))
    if result.choice is not None and advice is not None and len(advice.ranks) > 1:
        text = (
            "The chosen setup at other ranks; the chosen one is large. A rank changes what an adapter can learn, which"
            " nothing here predicts: these are its costs."
        )
        figure = rank_figure(advice.ranks, result.choice.workload.rank)
        yield section("Ranks", chart("ranks", "adapter size, memory and time against rank", text, figure, 640))


def _charts(result: PickResult, stage: Stage) -> str:
    detailed = _neighbours(stage, result.choice, DETAILED)
    parts = []
    if len(stage.models) > DETAILED:
        parts += [_by_model(stage, "time"), _by_model(stage, "bytes")]
    parts += [_by_configuration(result, stage, detailed, what) for what in ("time", "bytes")]
    parts.append(_against(stage, _neighbours(stage, result.choice, COLOURED)))
    return section(stage.title, *parts)


def _neighbours(stage: Stage, choice: Row | None, most: int) -> list[str]:
    """Select the choice, or else the largest that satisfies this stage, and what is next to it in size."""
    models = stage.models
    if len(models) <= most:
        return list(models)
    satisfying = [row.model for row in stage.rows if not row.rejected]
    middle = models.index(choice.model if choice is not None else (satisfying or models[:1])[-1])
    start = min(max(0, middle - most // 2), len(models) - most)
    return list(models[start : start + most])


def _by_model(stage: Stage, what: str) -> str:
    name = f"{stage.time_name if what == 'time' else 'peak process bytes'} by model"
    text = (
        "From the lowest to the highest of its configurations: pale all, solid those within every limit."
        " ✕: none fits. Smallest model at the bottom."
    )
    return chart(f"{stage.key}-{what}-models", name, text, model_bars(stage, what=what))


def _by_configuration(result: PickResult, stage: Stage, models: list[str], what: str) -> str:
    accumulations, stage = stage.accumulations, stage.at_one_accumulation()
    if what == "time":
        name, figure = f"{stage.time_name} by configuration", time_bars(stage, models)
        text = "Full colour: satisfies every limit. Pale: dropped. ✕: does not fit the memory, so that it has no time."
    else:
        name, figure = "peak process bytes by configuration", memory_bars(stage, models)
        text = (
            "Solid: needed at least; the pale top: room that PyTorch's allocator may take; pale altogether: dropped."
            " Bars cut at the upper edge go on beyond it. ✕: not even its weights fit, or it was refused."
        )
    if len(models) < len(stage.models):
        middle = "the choice" if result.choice is not None else "the largest within every limit"
        text += f" Shown: {len(models)} of {len(stage.models)} models, around {middle}."
    if len(accumulations) > 1:
        text += f" Steps of {stage.accumulations[0]} micro-batches; others are in the table."
    if drawn_setups(stage) < len(stage.setups):
        text += f" Shown: {drawn_setups(stage)} of {len(stage.setups)} setups, evenly selected."
    return chart(f"{stage.key}-{what}", name, text, figure, least_width_px(stage, len(models)))


def _against(stage: Stage, models: list[str]) -> str:
    found = len(dots_of(stage))
    timeless = len(stage.rows) - found
    text = "Dots are within every limit, crosses are not; dashed lines: the limits. Bytes: upper end of the range."
    if timeless:
        text += f" Not shown: {timeless:,} configurations without a time, because they do not fit."
    if found > DOTS:
        text += f" Drawn: {DOTS:,} of {found:,}, evenly selected."
    return chart(f"{stage.key}-scatter", f"process bytes against {stage.time_name}", text, scatter(stage, models))
