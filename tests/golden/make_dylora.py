"""What DyLoRA's reference layer computes at every rank, in fp64.

    python tests/golden/make_dylora.py REFERENCE/DyLoRA

where REFERENCE is GitHub's huawei-noah/Efficient-NLP at COMMIT; needs torch alone beside it. Writes tests/golden/dylora.json:

    settings  {r, alpha, shape: [d_out, d_in]}
    ranks     {b: {out, plain: {a, b}, frozen: {a, b}}} for b from 1 to r: the layer's output for x = fill("x", (3, d_in)), and the
              gradients of A and B under the loss sum(out * fill("g", (3, d_out))), with and without its frozen mode
    eval      {b: out} of the layer in evaluation

A (r, d_in), B (d_out, r) and W (d_out, d_in) are `fill` of "a", "b" and "w". The reference counts ranks from 0.
"""

import json
import sys
import types
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().with_name("dylora.json")
COMMIT = "bb44348bc897779be9357cef8dfd8e397d17ed49"
R, ALPHA, SHAPE = 4, 6.0, (5, 6)


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def at(rank: int, frozen: bool, training: bool = True) -> dict[str, Any]:
    """The reference's layer at that rank."""
    from loralib.layers import Linear

    d_out, d_in = SHAPE
    layer = Linear(d_in, d_out, r=R, lora_alpha=ALPHA, bias=False, merge_weights=False).double()
    with torch.no_grad():
        for key, p in {"w": layer.weight, "a": layer.lora_A, "b": layer.lora_B}.items():
            p.copy_(fill(key, p.shape))
    layer.train() if training else layer.eval()
    layer.set_rank(rank - 1, frozen=frozen)
    out = layer(fill("x", (3, d_in)))
    (out * fill("g", (3, d_out))).sum().backward()
    return {"out": listed(out.detach()), "a": listed(layer.lora_A.grad), "b": listed(layer.lora_B.grad)}


if __name__ == "__main__":
    package = types.ModuleType("loralib")  # its own __init__ names a file that is not in the repository
    package.__path__ = [str(Path(sys.argv[1]) / "loralib")]
    sys.modules["loralib"] = package
    ranks = {}
    for b in range(1, R + 1):
        plain, frozen = at(b, False), at(b, True)
        out = plain.pop("out")
        assert out == frozen.pop("out")
        ranks[b] = {"out": out, "plain": plain, "frozen": frozen}
    card = {
        "command": "python tests/golden/make_dylora.py REFERENCE/DyLoRA",
        "reference": {"repository": "huawei-noah/Efficient-NLP", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": {"r": R, "alpha": ALPHA, "shape": SHAPE},
        "ranks": ranks,
        "eval": {b: at(b, False, training=False)["out"] for b in range(1, R + 1)},
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
