"""Random values for weights that no checkpoint gave: finite through a whole model, quantised or not."""

from __future__ import annotations

import pytest

from whichlora.rehearse.values import give_values

from .conftest import on_host

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(("quantization", "double_quantization"), [("none", False), ("nf4", True), ("fp4", False)])
def test_a_model_with_such_values_computes_numbers(quantization: str, double_quantization: bool) -> None:
    """Whatever memory held before, logits are finite and differ between tokens."""
    import torch

    from whichlora.rehearse.models import build_model

    workload = on_host(quantization=quantization, double_quantization=double_quantization)
    model = build_model(workload, "cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and quantization != "none":
                tensor.data.fill_(float("nan"))
        give_values(model, quantized=quantization != "none")
        logits = model(input_ids=torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
