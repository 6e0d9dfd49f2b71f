"""LoRA-FA's own optimizer in the formula: what its decompositions and waits take."""

from __future__ import annotations

import pytest

from whichlora_estimators.decomposed import SVD_S, WAIT_S, svd_seconds
from whichlora_estimators.errors import Unsupported
from whichlora_estimators.estimate import times_of
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.tensor import WAITS
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from .small import SMALL

GPU = find_gpu("l40s")


def trained(optimizer: str, method: str = "lora-fa", **setup: object) -> Workload:
    shared = {"model": "small", "config": SMALL, "seq_len": 64, "rank": 32, "precision": "bf16-true"}
    return Workload(**{**shared, **setup}, method=method, optimizer=optimizer)  # type: ignore[arg-type]


def step_s(workload: Workload) -> float:
    timeline = lay(workload)
    seconds = times_of(timeline, timeline.tape.kernels, GPU).step_s
    assert seconds is not None
    return seconds


def test_every_matrix_is_inverted_and_waited_for() -> None:
    """Beside AdamW's, a step takes at least a decomposition and two waits for each adapted layer, as many as wait."""
    own = trained("lora-fa")
    timeline = lay(own)
    update = next(s for s in timeline.order if s.label == "optimizer step")
    waits = sum(kernel.dtype == WAITS for kernel in timeline.tape.kernels[update.first.kernel : update.last.kernel])
    assert waits == 7 * SMALL["num_hidden_layers"]
    assert step_s(own) > step_s(trained("adamw")) + waits * svd_seconds(32)


@pytest.mark.parametrize("rank", [n for n, _ in SVD_S])
def test_a_larger_rank_takes_longer_to_invert(rank: int) -> None:
    """A decomposition of twice the rank, up to the largest published, adds to the step what was published and no less."""
    assert step_s(trained("lora-fa", rank=2 * rank)) >= step_s(trained("lora-fa", rank=rank))
    assert svd_seconds(rank) > WAIT_S


def test_it_trains_nothing_else() -> None:
    """Where A trains as well, or a whole model, PEFT's optimizer for LoRA-FA is refused."""
    for method in ("lora", "full"):
        with pytest.raises(Unsupported, match="lora-fa only"):
            lay(trained("lora-fa", method=method))
