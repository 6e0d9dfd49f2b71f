"""Embeddings of single tokens that train beside adapters (peft/tuners/trainable_tokens/layer.py, read in 0.21).

Every pass copies the whole table, the trained rows in their places, and backward makes a gradient of the whole copy. A head that
shares the table makes a copy of its own.

# V rows of the table, D width, N trained rows
"""

from __future__ import annotations

from .. import ops, products
from ..errors import Unsupported
from ..families.base import Model
from ..layers import Build, Embedding, Linear
from ..tape import INT64, Tensor
from ..workload import Workload
from .base import trained, upcast


class TrainedRows:
    """Rows [N, D] that train, and what they were."""

    def __init__(self, build: Build, table: Embedding, count: int) -> None:
        self.weight, self.count = table.weight, count
        tape, shape, dtype = build.tape, (count, table.weight.shape[1]), table.weight.dtype
        taken = tape.new(shape, dtype)
        self.rows = trained(build, f"{table.name}.trainable_tokens_delta", *shape, dtype=dtype)
        build.originals.append(tape.new(shape, dtype))
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
    """Let the rows of the workload's tokens train in every module that has the table. Raises Unsupported."""
    if not workload.trainable_tokens:
        return
    build, words = model.build, model.words.weight
    tables = [table for table in build.embeddings if table.weight is words]
    heads = [head for head in build.heads if head.weight is words]
    modules: list[Embedding | Linear] = [*tables, *heads]
    adapted = [module for module in modules if module.adapter is not None]
    if adapted:
        todo = "Leave it out of the targets, or leave trainable_tokens out."
        raise Unsupported("trainable tokens of a module that is adapted", value=adapted[0].name, todo=todo)
    with upcast(build):
        rows = TrainedRows(build, tables[0], workload.trainable_tokens)
    for table in tables:
        table.adapter = rows.looked_up_scaled if table.scaled else rows.looked_up
    for head in heads:
        head.adapter = rows.scored
