"""What another's Delta-LoRA layer, which writes into its weight, comes to, in fp64.

    python tests/golden/make_delta_lora.py REFERENCE

where REFERENCE is GitHub's hhnqqq/MyTransformers at COMMIT (the paper's authors published no code); needs torch alone beside
it. Writes tests/golden/delta_lora.json:

    settings  {r, alpha, shape: [d_out, d_in], ratio, start, steps, lr, weight_decay}
    steps     {n: {out, a, b}} after each n of SEEN steps: the layer's output for x = fill("x", (3, d_in)), and its A and B

A and W are `fill` of "a" and "w", B is 0 at the start; AdamW moves A and B under loss(step, out). The layer follows when more
than `start` steps are done, as its training loop has it.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("delta_lora.json")
COMMIT = "f8665cab581c219277d5f9accb2b803636e0748f"
R, ALPHA, SHAPE, RATIO, START = 2, 6.0, (5, 6), 2.0, 3
STEPS, LR, DECAY, SEEN = 12, 0.05, 0.1, (1, 3, 4, 5, 12)


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def inputs(step: int) -> Tensor:
    """The rows of a step."""
    return fill(f"x {step}", (4, SHAPE[1]), 1.0)


def loss(step: int, out: Tensor) -> Tensor:
    """The squared distance to a target."""
    return (out - fill(f"y {step}", out.shape, 1.0)).square().mean()


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def steps() -> dict[int, Any]:
    """The other's layer after each of SEEN."""
    from common.lora_modules.delta_lora import LinearWithDeltaLoRA
    from common.lora_modules.lora import LoRAConfig

    d_out, d_in = SHAPE
    layer = LinearWithDeltaLoRA(LoRAConfig(d_in, d_out, lora_rank=R, lora_scaler=ALPHA), update_ratio=RATIO).double()
    layer.bias = None
    layer.weight_a = nn.Parameter(fill("a", (R, d_in)))
    layer.weight_b = nn.Parameter(torch.zeros(d_out, R, dtype=torch.float64))
    layer.weight.data.copy_(fill("w", SHAPE))
    optimizer = torch.optim.AdamW([layer.weight_a, layer.weight_b], lr=LR, weight_decay=DECAY)
    seen = {}
    for step in range(STEPS):
        loss(step, layer(inputs(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 > START:
            layer.update_pretrained_weight()
        if step + 1 in SEEN:
            out = layer(fill("x", (3, d_in))).detach()
            seen[step + 1] = {
                "out": listed(out),
                "a": listed(layer.weight_a.detach()),
                "b": listed(layer.weight_b.detach()),
            }
    return seen


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    card: dict[str, Any] = {
        "command": "python tests/golden/make_delta_lora.py REFERENCE",
        "reference": {"repository": "hhnqqq/MyTransformers", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": {"r": R, "alpha": ALPHA, "shape": SHAPE, "ratio": RATIO, "start": START, "steps": STEPS, "lr": LR,
                     "weight_decay": DECAY},
        "steps": steps(),
    }  # fmt: skip
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
