"""LoRA and DoRA of embeddings (peft/tuners/lora/layer.py, Embedding; dora.py, DoraEmbeddingLayer; read in 0.21).

A [R, V] is looked up by columns, B [D, R] multiplies what was found. DoRA adds the norm of each of the D columns of
the whole table, made anew in every pass.

# B batch, T tokens, D width, V rows of the table, R rank
"""

from __future__ import annotations

from .. import ops, products
from ..families.base import InputLeaf
from ..layers import Build, Embedding
from ..reductions import column_sum_bytes
from ..tape import FP16, FP32, UINT8, Tensor
from ..workload import Workload
from .base import trained
from .targets import rank_of


class LoraEmbedding:
    """base(ids) + A[ids] B * scaling."""

    def __init__(self, table: Embedding, build: Build, workload: Workload) -> None:
        self.table, dtype = table, table.weight.dtype
        rank, (rows, width) = rank_of(table, workload), table.weight.shape
        self.a = trained(build, f"{table.name}.lora_embedding_A", rank, rows, dtype=dtype)
        self.b = trained(build, f"{table.name}.lora_embedding_B", width, rank, dtype=dtype)
        #: Whether k-bit preparation made the table's rows ask for a gradient, before the adapter was there.
        self.rows_ask = workload.checkpointing and workload.kbit_preparation and workload.quantization != "none"

    def __call__(self, ids: Tensor) -> Tensor:
        """Map [B, T] to [B, T, D]."""
        result = self.rows(ids)
        dtype = result.dtype
        found = ops.embedding(ids, _columns(self.a))
        update = ops.scale(products.linear(found, products.turned(self.b)))
        del found
        if self.table.scaled:
            update = ops.scale(update)
        result = ops.add(result, update)
        return ops.cast(result, dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Take the table's own rows."""
        rows = self.table.base(ids)
        if self.rows_ask and rows.tape.grad_enabled:
            rows.node = InputLeaf(rows.detach())
        return rows


class DoraEmbedding(LoraEmbedding):
    """LoRA with the norm of the table's columns and a trained magnitude of each."""

    def __init__(self, table: Embedding, build: Build, workload: Workload) -> None:
        super().__init__(table, build, workload)
        a, b = self.a, self.b
        if a.dtype is FP16:
            a, b = ops.cast(a, FP32), ops.cast(b, FP32)
        update = ops.cast(self._update(a, b), self.a.dtype)
        dtype = self._norm(update).dtype
        self.magnitude = trained(build, f"{table.name}.lora_magnitude_vector", table.weight.shape[1], dtype=dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        """Map [B, T] to [B, T, D]: m base(ids) + m A[ids] B * scaling, where m is the magnitude over the norm."""
        result = self.rows(ids)
        dtype = result.dtype
        update = self._update(self.a, self.b)
        norm = self._norm(update.detach())
        magnitude = ops.mul(self.magnitude, norm)
        columns = _columns(self.a)
        low = ops.embedding(ids, columns)
        found = ops.scale(ops.mul(magnitude, products.linear(low, products.turned(self.b))))
        del update, norm, columns, low
        if self.table.scaled:
            found = ops.scale(found)
        result = ops.add(ops.mul(magnitude, result), found)
        return ops.cast(result, dtype)

    def _update(self, a: Tensor, b: Tensor) -> Tensor:
        """Aᵀ Bᵀ, [V, D], as the table lies in memory."""
        return products.linear(_columns(a), products.turned(b))

    def _norm(self, update: Tensor) -> Tensor:
        weight = ops.add(self.table.weight.detach(), ops.scale(update))
        rows, width = weight.shape
        weight.tape.launch(weight.bytes)
        norm = weight.tape.new((width,), weight.dtype)
        weight.tape.new((column_sum_bytes(rows, width, card=weight.tape.card),), UINT8)
        return norm


def _columns(a: Tensor) -> Tensor:
    """View A turned, [V, R]; its gradient is copied back, unless it is added to an earlier one."""
    seen = Tensor(a.tape, a.storage, (a.shape[1], a.shape[0]), a.dtype)
    shape = a.shape
    a.tape.record(seen, (a,), (), lambda g: (ops.fitted(g, shape),))
    return seen
