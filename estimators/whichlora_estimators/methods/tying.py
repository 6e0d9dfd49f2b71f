"""What shares the tokens' embeddings, and adapters or copies that go on sharing (`ensure_weight_tying`), as PEFT does it.

States _check_tied_modules (peft/tuners/tuners_utils.py), _add_modules_to_save_to_tie and _add_targets_to_tie
(peft/tuners/lora/model.py); read in 0.21. Asked for where nothing is tied, or nothing that is tied is named, it does nothing.

# V rows of the table, D width, R rank
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import Unsupported
from ..families.base import Model
from ..layers import Build, Embedding, Linear
from ..tape import Leaf, Tensor
from ..workload import Workload

#: The last names by which PEFT knows that embeddings, or heads that share them, are meant.
NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """The input embeddings, and what shares their table beside them."""

    source: Embedding
    tables: tuple[Embedding, ...] = ()
    heads: tuple[Linear, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of what shares the table."""
        return (*(table.name for table in self.tables), *(head.name for head in self.heads))


def tie_of(model: Model) -> Tie:
    """Return what shares the table of the input embeddings: of those that look up in it, the first."""
    build = model.build
    first, *tables = (table for table in build.embeddings if table.weight is model.words.weight)
    heads = tuple(head for head in build.heads if head.weight is first.weight)
    return Tie(source=first, tables=tuple(tables), heads=heads)


def tied_saves(model: Model, workload: Workload) -> Tie | None:
    """Return what trains one copy of the table, if that is asked for. Raises Unsupported where PEFT's model then fails."""
    named = any(name.rpartition(".")[2] in NAMES for name in workload.modules_to_save)
    tie = tie_of(model) if workload.ensure_weight_tying and named else None
    if tie is None or not tie.names:
        return None
    if tie.tables:
        todo = "Leave ensure_weight_tying out: PEFT puts a linear layer in the place of each."
        raise Unsupported("tied copies of several embeddings", value=tie.tables[0].name, todo=todo)
    return tie


def tied_targets(model: Model, workload: Workload) -> tuple[Workload, Tie]:
    """Return the workload with the input embeddings among its targets, and what is adapted behind them.

    Where no adapters are to be tied, the workload is the same and the tie names nothing but the embeddings.
    """
    tie = tie_of(model)
    if not workload.ensure_weight_tying or not tie.names or not _named(workload.targets) or tied_saves(model, workload):
        return workload, Tie(source=tie.source)
    left_out: str | tuple[str, ...] = (*workload.exclude_modules, *tie.names)
    if isinstance(workload.exclude_modules, str):
        left_out = "|".join((f"(?:{workload.exclude_modules})", *map(re.escape, tie.names)))
    targets: str | tuple[str, ...] = f"(?:{workload.targets}|{re.escape(tie.source.name)})"
    if isinstance(workload.targets, tuple):
        targets = (*workload.targets, tie.source.name)
    return workload.with_(targets=targets, exclude_modules=left_out), tie


def _named(targets: str | tuple[str, ...] | None) -> bool:
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in NAMES)
    return any(name.rpartition(".")[2] in NAMES for name in targets or ())


def shared_factors(build: Build, name: str, a: Tensor, b: Tensor, *, freeze_a: bool) -> tuple[Tensor, Tensor]:
    """Make the factors [R, D] and [V, R] of a head from those of the embeddings, A [R, V] and B [D, R].

    They begin in the same memory as parameters of their own: each gets its gradient, and memory once it is converted.
    """
    low, high = (Tensor(build.tape, each.storage, each.shape[::-1], each.dtype) for each in (b, a))
    build.originals += [low.detach(), high.detach()]  # PEFT's layer holds on to what it was given
    high.node = Leaf()
    low.node = None if freeze_a else Leaf()
    return build.add(f"{name}.lora_A", low), build.add(f"{name}.lora_B", high)
