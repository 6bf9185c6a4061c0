"""What a layer under HydraLoRA's reference code computes, in fp64 but for the router's softmax, which is fp32 there.

    python tests/golden/make_hydra_lora.py REFERENCE

where REFERENCE is GitHub's Clin0212/HydraLoRA at COMMIT; needs torch. Its package is one of an old transformers, of which
two classes are run as they are. Writes tests/golden/hydra_lora.json:

    settings  {n_experts, r, alpha, shape: [rows, tokens, inputs], d_out}
    out       of x = fill("x", shape)
    grads     {x, a, b, router}: the gradients, flat, under the loss sum(out * fill("y", ...))
    starts    {a, router}: the largest magnitude of a wide layer's tensors; b is 0
"""

import ast
import json
import math
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("hydra_lora.json")
COMMIT = "afb693bc12386b96431636a27168c9f656437638"
SIZES: dict[str, Any] = {"n_experts": 3, "r": 2, "alpha": 5.0}
SHAPE, D_OUT = (3, 4, 6), 7


def fill(key: str, shape: Iterable[int], size: float = 0.6) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with sixteen digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.16g}")


def layer(d_in: int, d_out: int) -> Any:
    """The reference's layer, in training without dropout."""
    path = Path(sys.argv[1]) / "HydraLoRA" / "peft" / "tuners" / "lora.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in ("LoraLayer", "Linear")]
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "math": math}
    space["transpose"] = lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight
    exec(compile(tree, str(path), "exec"), space)
    one = SimpleNamespace(**space).Linear(
        d_in, d_out, r=SIZES["r"], lora_alpha=SIZES["alpha"], lora_nums=SIZES["n_experts"], merge_weights=False
    )
    return one.double()


def adapted() -> dict[str, Any]:
    """Forward and backward."""
    one = layer(SHAPE[-1], D_OUT)
    heads = [getattr(one, f"lora_B{i}").weight for i in range(SIZES["n_experts"])]
    found = {"weight": one.weight, "bias": one.bias, "a": one.lora_A.weight, "router": one.lora_route.weight}
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
        for p, value in zip(heads, fill("b", (D_OUT, SIZES["n_experts"], SIZES["r"])).unbind(1), strict=True):
            p.copy_(value)
    x = fill("x", SHAPE).requires_grad_()
    out, _ = one(x)
    grads = torch.autograd.grad((out * fill("y", out.shape)).sum(), [x, found["a"], found["router"], *heads])
    given = {key: listed(grad.flatten()) for key, grad in zip(("x", "a", "router"), grads, strict=False)}
    return {"out": listed(out.detach()), "grads": given | {"b": listed(torch.stack(grads[3:], 1).flatten())}}


def starts() -> dict[str, float]:
    """Of a wide layer."""
    torch.manual_seed(0)
    one = layer(400, 300)
    assert not any(getattr(one, f"lora_B{i}").weight.any() for i in range(SIZES["n_experts"]))
    return {"a": one.lora_A.weight.abs().max().item(), "router": one.lora_route.weight.abs().max().item()}


if __name__ == "__main__":
    card: dict[str, Any] = {
        "command": "python tests/golden/make_hydra_lora.py REFERENCE",
        "reference": {"repository": "Clin0212/HydraLoRA", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": SIZES | {"shape": SHAPE, "d_out": D_OUT},
        "starts": starts(),
    }
    GOLDEN.write_text(json.dumps(card | adapted(), separators=(",", ":")) + "\n", encoding="utf-8")
