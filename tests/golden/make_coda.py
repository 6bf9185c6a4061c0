"""What the public coordinate-descent router computes: the soft top-k that CoDA's paper describes, and its gradients.

    git clone https://github.com/lucidrains/CoLT5-attention REPOSITORY    # f2a8da09644615e827fc49883d2652c5c1c22792
    pip install torch==2.13.0 einops
    python tests/golden/make_coda.py REPOSITORY

CoDA's own code is not public; the function's docstring names its paper and the settings that it takes from it: 20 iterations,
a temperature that starts at 4 and falls by 0.7. The script writes tests/golden/coda.json: for each case the scores and what
`coor_descent` makes of them, in float64.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().with_name("coda.json")
ROWS, TOKENS = 3, 9
REAL = (9, 6, 4)  # real tokens of the rows, padded on the right
CASES = {
    f"k={k} eps={eps} size={size}": (k, eps, size) for k in (1, 3) for eps in (0.02, 0.1, 1.0) for size in (0.5, 3.0)
}


def scores(size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1, over (-size, size)."""
    k = torch.arange(ROWS * TOKENS)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(ROWS, TOKENS)


def real() -> Tensor:
    """(B, T), the real tokens."""
    return torch.arange(TOKENS) < torch.tensor(REAL)[:, None]


def upstream() -> Tensor:
    """(B, T), the gradient that the soft top-k gets."""
    return torch.linspace(-1, 1, ROWS * TOKENS, dtype=torch.float64).view(ROWS, TOKENS)


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(
        "coor_descent", Path(sys.argv[1]) / "colt5_attention" / "coor_descent.py"
    )
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = {}
    for name, (k, eps, size) in CASES.items():
        s = scores(size).requires_grad_()
        out = module.coor_descent(s, n_iters=20, k=k, eps=eps, eps_init=4.0, eps_decay=0.7, mask=real())
        out.backward(upstream())
        assert s.grad is not None
        found[name] = {"soft": out.tolist(), "gradient": s.grad.tolist()}
    text = json.dumps({"command": "python tests/golden/make_coda.py REPOSITORY", "cases": found}, separators=(",", ":"))
    GOLDEN.write_text(text.replace("},", "},\n") + "\n", encoding="utf-8")
