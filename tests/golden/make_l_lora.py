"""What the reference makes of one LoRA layer's tangent: outputs and gradients, in fp64.

    python tests/golden/make_l_lora.py REFERENCE

where REFERENCE is GitHub's tanganke/peta at COMMIT, whose `LinearizedModelWraper` needs torch alone, in an environment with HF
PEFT 0.21.2 beside it. The wrapped module is HF PEFT's own LoRA layer, as in the reference's `linearize_lora_model`; the wrapper's
p0 is the layer as it is when it is wrapped. Writes tests/golden/l_lora.json: for each of STARTS, where B0 is 0 as in the
reference and where it is not,

    y           the output for `fill("x", (T, D_IN))` at the parameters of `after`
    grads       of the loss sum(y * fill("g", y.shape)): of A, of B and of x
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("l_lora.json")
COMMIT = "db0e76f11fadffc43f50ed2bf501fe0c92334330"
D_IN, D_OUT, R, ALPHA, T = 6, 5, 3, 4.0, 4
STARTS = {"paper": 0.0, "elsewhere": 0.8}  # size of B0


def fill(key: str, shape: Iterable[int], size: float = 0.8) -> Tensor:
    """Multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine: the tensor of that name."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def start(size: float) -> dict[str, Tensor]:
    """A0 and B0."""
    return {"a": fill("a", (R, D_IN)), "b": fill("b", (D_OUT, R), size)}


def after() -> dict[str, Tensor]:
    """A and B, trained."""
    return {"a": fill("a after", (R, D_IN)), "b": fill("b after", (D_OUT, R))}


def run(size: float) -> dict[str, Any]:
    """The reference's numbers."""
    from peft import LoraConfig, get_peft_model
    from peta.models.LinearizedModel import LinearizedModelWraper

    holder = nn.Sequential(nn.Linear(D_IN, D_OUT, dtype=torch.float64))
    config = LoraConfig(target_modules=["0"], r=R, lora_alpha=ALPHA, lora_dropout=0.0)
    layer = get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0].double()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def put(values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            a.copy_(values["a"])
            b.copy_(values["b"])

    with torch.no_grad():
        layer.base_layer.weight.copy_(fill("w", (D_OUT, D_IN)))
        layer.base_layer.bias.copy_(fill("bias", (D_OUT,)))
    put(start(size))
    wrapped = LinearizedModelWraper(layer)
    put(after())
    x = fill("x", (T, D_IN)).requires_grad_()
    y = wrapped(x)
    grads = torch.autograd.grad((y * fill("g", y.shape)).sum(), [a, b, x])
    return {"y": y.tolist(), "grads": {name: g.tolist() for name, g in zip(("a", "b", "x"), grads, strict=True)}}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    GOLDEN.write_text(json.dumps({name: run(size) for name, size in STARTS.items()}) + "\n", encoding="utf-8")
