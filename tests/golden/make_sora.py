"""What SoRA's reference layer and its optimiser of the gates compute, in fp64.

    python tests/golden/make_sora.py REFERENCE

where REFERENCE is GitHub's TsinghuaC3I/SoRA at COMMIT; needs torch, transformers 4.40 (the last ones have no AdamW) and
opendelta 0.3.2 beside it. Writes tests/golden/sora.json:

    settings   {r, alpha, shape: [d_out, d_in], lr, steps, xi}
    layer      {out, a, g, b}: the update of x = fill("x", (3, d_in)), and the gradients under the loss
               sum(out * fill("y", (3, d_out)))
    gates      (steps, GATES): gates after each step of the reference's optimiser, without weight decay and with eps = 0
    schedules  {last_xi: [xi]} of its "linear" list of SERIES thresholds

The layer's A, B and gate are `fill` of "a", "b" and "g"; the gates of the steps start as start(), and get `gradient(step)`.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("sora.json")
COMMIT = "c275ac237b68b888a918cf9dad36d3827e46f616"
R, ALPHA, SHAPE = 4, 6.0, (5, 6)
GATES, LR, STEPS, XI, SERIES = 16, 0.02, 40, 0.015, 5


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def start() -> Tensor:
    """The gates before the first step."""
    return fill("gates", (GATES,))


def gradient(step: int) -> Tensor:
    """Their gradient: half of them are pulled one way throughout."""
    pull = torch.where(torch.arange(GATES) % 2 == 0, 0.0, 0.5)
    return fill(f"gradient {step}", (GATES,)) - pull


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with sixteen digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.16g}")


def layer() -> dict[str, Any]:
    """The reference's layer."""
    from src.lora import LowRankLinear

    d_out, d_in = SHAPE
    own = LowRankLinear(d_in, d_out, torch.zeros(SHAPE, dtype=torch.float64), r=R, lora_alpha=ALPHA).double()
    tensors = {"a": own.lora_A, "g": own.gate, "b": own.lora_B}
    with torch.no_grad():
        for key, p in tensors.items():
            p.copy_(fill(key, p.shape))
    out = own(fill("x", (3, d_in)))
    loss = (out * fill("y", (3, d_out))).sum()
    grads = {key: torch.autograd.grad(loss, p, retain_graph=True)[0] for key, p in tensors.items()}
    return {"out": listed(out.detach())} | {key: listed(grad.squeeze(0)) for key, grad in grads.items()}


def gates() -> list[Any]:
    """Each step of the reference's optimiser."""
    from src.sparse_optimizer import SparseAdamW

    g = nn.Parameter(start())
    optimizer = SparseAdamW(sparse_lambda=XI, params=[g], lr=LR, eps=0.0)
    seen = []
    for step in range(STEPS):
        g.grad = gradient(step)
        optimizer.step()
        seen.append(listed(g.detach()))
    return seen


def schedule(last: float) -> list[float]:
    """The reference's list of thresholds."""
    from src.sparse_optimizer import SparseAdamW

    options = {"sparse_lambda": XI, "lambda_schedule": "linear", "max_lambda": last, "lambda_num": SERIES}
    return [float(x) for x in SparseAdamW(params=[nn.Parameter(start())], **options)._lambdas]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    card: dict[str, Any] = {
        "command": "python tests/golden/make_sora.py REFERENCE",
        "reference": {"repository": "TsinghuaC3I/SoRA", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": {"r": R, "alpha": ALPHA, "shape": SHAPE, "lr": LR, "steps": STEPS, "xi": XI},
        "layer": layer(),
        "gates": gates(),
        "schedules": {str(last): schedule(last) for last in (0.02, 0.001)},
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
