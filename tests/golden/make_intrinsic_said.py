"""The Fastfood projection of rabeehk/compacter (after the paper's authors), with its random parts, on given vectors.

    python tests/golden/make_intrinsic_said.py REFERENCE/seq2seq/projections/intrinsic.py

where REFERENCE is GitHub's rabeehk/compacter at COMMIT; needs torch and numpy beside it. Writes tests/golden/intrinsic_said.json:
{case: {n, x, sign, order, gauss, y, grad}}, the projection y of x on n numbers and the gradient of (y * w).sum() for x, w =
1, 2, ... n. The reference's backward divides by the root of the size once for each of its two transforms; `grad` has that
taken back: it is what the reference gives, times the size. Its import of a CUDA kernel is met by an empty module.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().with_name("intrinsic_said.json")
COMMIT = "e123daaaee59488e305297b9685c084edc07b5c0"
CASES = {"filled up": (11, 100), "a power of two": (32, 64), "cut": (50, 20)}  # numbers of x, n


def reference(path: str) -> Any:
    """The reference's file as a module."""
    for name in ("seq2seq", "seq2seq.projections", "seq2seq.projections.fwh_cuda"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["seq2seq.projections.fwh_cuda"].fast_walsh_hadamard_transform = None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("intrinsic", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str) -> None:
    """Write the file."""
    module, found = reference(path), {}
    for name, (d, n) in CASES.items():
        torch.manual_seed(d)
        np.random.seed(d)
        sign, order, gauss, divisor, size = parts = module.fastfood_vars(n, "cpu")
        x = torch.randn(d, requires_grad=True)
        y = module.fastfood_torched(x, n, parts)
        (y * torch.arange(1, n + 1)).sum().backward()
        found[name] = {"n": n, "x": x.tolist(), "sign": sign.tolist(), "order": order.tolist(), "gauss": gauss.tolist()}
        found[name] |= {"y": y.tolist(), "grad": (x.grad * size).tolist()}
        assert float(divisor) > 0
    GOLDEN.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
