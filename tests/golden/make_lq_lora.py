"""How LQ-LoRA's reference splits a matrix, and which widths its integer program chooses.

    python tests/golden/make_lq_lora.py REFERENCE

where REFERENCE is GitHub's HanGuo97/lq-lora at COMMIT; its functions are run as they are, on the CPU, with exact SVDs. Writes
tests/golden/lq_lora.json:

    plain, fisher   by "nf2 64": for num_iterations = 1 to STEPS {error, q, ba}, error the norm of sqrt(F) (W - Q - L1 L2), q and
                    ba the probes of make_loftq.py. Once the error grows, the reference stops: all behind are alike
    program         {costs (n, c), choices, weights (n, c), budget, assignment}: what `mip_solve` chooses, by scipy, of MATRICES

Q is the reference's normal floats (`quantize_with_scheme_2`) with each block's largest value as its scale, in fp32 as ours are;
its own scales are quantised once more, for which it needs a GPU's library.
"""

import ast
import importlib
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import scipy.special
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().with_name("lq_lora.json")
ONE = runpy.run_path(str(GOLDEN.with_name("make_loftq.py")))
matrix, found = ONE["matrix"], ONE["found"]
COMMIT = "c2424b3adc27197815da1ac9e1304565168d824d"
SHAPE, RANK, STEPS, BUDGET = ONE["SHAPE"], ONE["RANK"], 12, 3.3
SPLITS = [(2, 64), (3, 64), (4, 32)]
CHOICES = [(bits, group) for bits in (2, 3, 4) for group in (32, 64, 128)]
MATRICES = {f"m{i}": (32 * (1 + i % 3), 128) for i in range(8)}


def fisher(name: str, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Positive, some rows and columns far larger than others, and each of MATRICES three times the one before."""
    rows, columns = matrix(f"{name} rows", (shape[0], 1)), matrix(f"{name} columns", (1, shape[1]))
    out: Tensor = matrix(f"{name} fisher", shape).square() * (rows + columns).exp()
    return out * 3.0 ** list(MATRICES).index(name) if name in MATRICES else out


def functions(path: Path, names: set[str], scope: dict[str, Any]) -> None:
    """These functions and classes of a module, into `scope`; its imports are not needed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    picked: list[Any] = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]
    assert {node.name for node in picked} == names
    exec(compile(ast.Module(picked, []), str(path), "exec"), scope)


def main(reference: Path) -> None:
    """Run it."""
    scope: dict[str, Any] = {
        "torch": torch, "np": np, "math": math, "scipy": scipy, "Tuple": tuple, "Optional": Optional, "NamedTuple": NamedTuple,
        "NF4_OFFSET": 0.9677083, "QuantConfig": tuple, "misc_utils": type("Quiet", (), {"swarn": staticmethod(lambda *a, **k: None)}),
        "scipy_milp": importlib.import_module("scipy.optimize._milp"),
        "scipy_optimize": importlib.import_module("scipy.optimize._optimize"),
        "scipy_constraints": importlib.import_module("scipy.optimize._constraints"),
    }  # fmt: skip
    models = reference / "models"
    functions(
        models / "quantization_utils.py",
        {"QuantScheme", "create_quantization_scheme", "quantize_with_scheme", "create_normal_float_scheme", "quantize_with_scheme_2"},
        scope,
    )  # fmt: skip
    functions(models / "factorizations_utils.py", {"svd_decomposition", "weighted_svd_decomposition"}, scope)
    functions(models / "lq_utils.py", {"lowrank_quantized_sparse_decomposition", "mip_solve"}, scope)

    def quantised(A: Tensor, qconfig: tuple[int, int]) -> Tensor:
        bits, group = qconfig
        scales = A.view(-1, group).abs().amax(1, keepdim=True).expand(-1, group).reshape(A.shape)
        out: Tensor = scope["quantize_with_scheme_2"](A, scales=scales, num_bits=bits, dtype="nf")
        return out

    scope["maybe_sparsify_or_quantize"] = quantised

    def split(w: Tensor, f: Tensor | None, choice: tuple[int, int], steps: int) -> tuple[Tensor, Tensor, Tensor, float]:
        b, a, q, _ = scope["lowrank_quantized_sparse_decomposition"](
            w, RANK, num_iterations=steps, randomized=False, qconfig=choice, W=f, heuristic="two-sided"
        )
        rest = w - q - b @ a
        return q, b, a, float((rest if f is None else f.sqrt() * rest).norm())

    out: dict[str, Any] = {"commit": COMMIT}
    for key, f in (("plain", None), ("fisher", fisher("w"))):
        out[key] = {}
        for choice in SPLITS:
            each = []
            for steps in range(1, STEPS + 1):
                q, b, a, error = split(matrix("w"), f, choice, steps)
                each.append(found(matrix("w"), q, b, a) | {"error": error})
            out[key]["nf{} {}".format(*choice)] = each
    costs = np.array([[split(matrix(n, s), fisher(n, s), c, 2)[-1] ** 2 for c in CHOICES] for n, s in MATRICES.items()])
    numel = np.array([math.prod(s) for s in MATRICES.values()], dtype=float)
    weights = numel[:, None] * np.array([bits + 32 / group for bits, group in CHOICES])
    normal = costs / np.linalg.norm(costs) * 1000.0
    solved = scope["mip_solve"](BUDGET * numel.sum() / 1024**3, normal, weights / 1024**3, backend="scipy")
    assignment = solved.x.reshape(costs.shape).argmax(1).tolist()
    out["program"] = {"choices": CHOICES, "costs": costs.tolist(), "weights": weights.tolist()}
    out["program"] |= {"budget": BUDGET * numel.sum(), "assignment": assignment}
    GOLDEN.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
