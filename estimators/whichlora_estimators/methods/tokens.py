"""Embeddings of single tokens that train beside adapters (peft/tuners/trainable_tokens/layer.py, read in 0.21).

Every pass copies the whole table, the trained rows in their places, and backward makes a gradient of the whole copy. A head that
shares the table makes a copy of its own.

# V rows of the table, D width, N trained rows
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops, products
from ..errors import BadValue, Unsupported
from ..families.base import Model
from ..layers import Build, Embedding, Linear
from ..tape import INT64, Tensor
from ..workload import Workload
from .base import trained, upcast, widen
from .tying import Tie, tie_of


class TrainedRows:
    """Rows [N, D] that train, and what they were."""

    def __init__(self, build: Build, table: Embedding | Linear, count: int) -> None:
        assert table.weight is not None
        self.weight, self.count = table.weight, count
        tape, shape, dtype = build.tape, (count, table.weight.shape[1]), table.weight.dtype
        taken = tape.new(shape, dtype)
        self.rows = trained(build, f"{table.name}.trainable_tokens_delta", *shape, dtype=dtype)
        self.original = tape.new(shape, dtype)
        build.originals.append(self.original)
        del taken

    def merged(self) -> Tensor:
        """Copy the table with the rows in their places."""
        tape, weight = self.weight.tape, self.weight
        places = tape.new((self.count,), INT64)
        rows = ops.cast(self.rows, weight.dtype)
        whole, part, dtype = tape.new(weight.shape, weight.dtype), rows.shape, rows.dtype
        tape.launch(2 * whole.bytes)
        tape.record(whole, (rows,), (places, rows), lambda g, *_: (tape.new(part, dtype),))
        return whole

    def looked_up(self, ids: Tensor) -> Tensor:
        """Take rows of the copy."""
        whole = self.merged()
        return ops.embedding(ids, whole)

    def looked_up_scaled(self, ids: Tensor) -> Tensor:
        """Take rows of the copy and scale them."""
        whole = self.merged()
        rows = ops.embedding(ids, whole)
        scaled = ops.scale(rows)
        del whole
        return scaled

    def scored(self, x: Tensor) -> Tensor:
        """Multiply with the copy."""
        whole = self.merged()
        return products.linear(x, whole)


def train_tokens(model: Model, workload: Workload) -> None:
    """Let the rows of the workload's tokens train in the modules that have them. Raises BadValue or Unsupported."""
    if not workload.trainable_tokens:
        return
    build, tie, rows = model.build, tie_of(model), dict[str, TrainedRows]()
    counts = workload.trainable_tokens
    counts = {tie.source.name: counts} if isinstance(counts, int) else dict(counts)
    followers = _followers(tie, counts, workload)
    with upcast(build):
        for name, count in counts.items():
            if len(counts) == 1 or name not in followers:
                rows |= {module.name: TrainedRows(build, module, count) for module in _found(model, workload, name)}
    widen(build, (each.original for each in rows.values()))
    if tie.source.name in rows:
        rows = dict.fromkeys(followers, rows[tie.source.name]) | rows
    for table in build.embeddings:
        if table.name in rows:
            table.adapter = rows[table.name].looked_up_scaled if table.scaled else rows[table.name].looked_up
    for head in build.heads:
        if head.name in rows:
            head.adapter = rows[head.name].scored


def _followers(tie: Tie, counts: Mapping[str, int], workload: Workload) -> tuple[str, ...]:
    """Return what follows the input embeddings: all that shares them, unless it is given other tokens."""
    meant = [name for name in counts if tie.source.name.endswith(name) or any(_means(name, each) for each in tie.names)]
    several = len({counts[name] for name in meant}) > 1
    if several and workload.ensure_weight_tying:
        todo = "Give all of them the same tokens, or leave ensure_weight_tying out."
        raise Unsupported("tied modules with tokens of their own", value=dict(counts), todo=todo)
    return () if several else tie.names


def _means(name: str, module: str) -> bool:
    return module.endswith(name) or name in module.split(".")


def _found(model: Model, workload: Workload, name: str) -> list[Embedding | Linear]:
    """Return the modules with the end of a name. Raises BadValue or Unsupported."""
    build = model.build
    known: list[Embedding | Linear] = [*build.embeddings, *build.heads]
    found = [module for module in known if module.name.endswith(name)]
    if not found:
        todo = f"Known: {', '.join(module.name for module in known)}."
        raise BadValue("no embeddings and no head of this name to train tokens of", value=name, todo=todo)
    adapted = [module for module in found if module.adapter is not None]
    if adapted:
        todo = "Leave it out of the targets, or leave trainable_tokens out."
        raise Unsupported("trainable tokens of a module that is adapted", value=adapted[0].name, todo=todo)
    if any(name.endswith(saved) for saved in workload.modules_to_save):
        todo = "Name it in modules_to_save or in trainable_tokens, not in both."
        raise Unsupported("trainable tokens of a module that trains whole", value=name, todo=todo)
    return found
