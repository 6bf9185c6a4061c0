"""(IA)3 against T-Few's own code: keys, values and the MLP's hidden units of a gated T5, outputs and gradients."""

import json
import runpy
from pathlib import Path
from typing import Any

import torch

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).parent.parent / "golden" / "make_ia3.py"))
GOLDEN: dict[str, Any] = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def test_as_the_reference_computes() -> None:
    """It scales what wi_1 gives, ours what wo reads: the gate's product is the same."""
    model, fill = MAKE["backbone"](), MAKE["fill"]
    adapter = dt.attach(model, "ia3", head=None)
    scales = {}
    for name, p in adapter.named_parameters():
        layer = name.removeprefix("0.").removesuffix(".scale").replace("DenseReluDense.wo", "DenseReluDense.wi_1")
        scales[layer] = p
        with torch.no_grad():
            p.copy_(1 + fill(f"scale {layer}", p.shape))
    assert scales.keys() == GOLDEN["grads"].keys()
    logits = model(**MAKE["rows"]()).logits
    want = torch.tensor(GOLDEN["logits"], dtype=torch.float64).view(logits.shape)
    # T5's norms and softmaxes are fp32 in an fp64 model too
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-7)
    (fill("loss", logits.shape) * logits).sum().backward()
    for layer, p in scales.items():
        assert p.grad is not None
        grad = torch.tensor(GOLDEN["grads"][layer], dtype=torch.float64)
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm().clamp_min(1e-3), layer
    assert (model(**MAKE["rows"]()).logits - MAKE["backbone"]()(**MAKE["rows"]()).logits).abs().max() > 1e-2
