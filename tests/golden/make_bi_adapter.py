"""What Bi-Adapter's reference computes of matrices of a few bits, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0 numpy scipy
    /tmp/venv/bin/python tests/golden/make_bi_adapter.py REFERENCE/binary_adapter

where REFERENCE is GitHub's JieShibo/PETL-ViT at COMMIT. Of its files only the definitions in NEEDED run; their other imports
(timm, the data sets) are not needed for them. The file writes tests/golden/bi_adapter.json:

    levels    {bits: {values, edges}} in fp32, as it computes with them
    matrices  {bits: {mean, std, bytes, runs, loaded, grad}} of fill("w", (6, 8)): what `dump` gives, the weight that runs,
              the one that comes back from `load`, and the gradient of sum(fill("loss", (6, 8)) * runs)
    forms     {adaptformer, lora: (D)}: what each adds before the scale for x = fill("x", (1, 1, D)), of one bit and width R

No weight is stored: each is `fill` of its name, "down" (R, D) and "up" (D, R).
"""

import ast
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("bi_adapter.json")
COMMIT = "026e4f12cfbe1e46bfb4d3ed5ba09f2d9f83e91e"
NEEDED = {"utils.py": {"QLinear"}, "adaptformer.py": {"Adapter"}, "lora.py": {"Adapter"}}
BITS, SHAPE, D, R = (1, 2, 4, 8), (6, 8), 768, 4  # the reference's adapters have the width 768 written in


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine."""
    shape = tuple(shape)
    n = torch.Size(shape).numel()
    steps = (torch.arange(n, dtype=torch.int64) * 40503 + zlib.crc32(key.encode()) % 65536) % 65536
    return ((steps.double() / 65536 - 0.5) * 0.8).reshape(shape)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def needed(folder: Path, file: str, names: dict[str, Any]) -> dict[str, Any]:
    """The definitions of NEEDED in one of its files, run."""
    import math
    import struct

    import numpy as np
    from scipy.stats import norm

    tree = ast.parse((folder / file).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in NEEDED[file]]
    scope = {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "math": math,
        "struct": struct,
        "np": np,
        "norm": norm,
    } | names
    exec(compile(tree, file, "exec"), scope)
    return scope


def main(folder: Path) -> None:
    """Write the file."""
    quantised = needed(folder, "utils.py", {})["QLinear"]
    found: dict[str, Any] = {"commit": COMMIT, "levels": {}, "matrices": {}, "forms": {}}
    for bits in BITS:
        layer = quantised(SHAPE[1], SHAPE[0], bits).double()
        layer.weight.data = fill("w", SHAPE)
        inner = dict(zip(layer.q.__code__.co_freevars, (c.cell_contents for c in layer.q.__closure__), strict=True))
        found["levels"][bits] = {"values": listed(layer.code), "edges": listed(inner["pos"])}
        runs = layer(torch.eye(SHAPE[1], dtype=torch.double)).T
        (fill("loss", SHAPE) * runs).sum().backward()
        text, mean, std = layer.dump()
        grad, seen = listed(layer.weight.grad), listed(runs)
        layer.load(text, mean.detach(), std.detach())
        found["matrices"][bits] = {
            "mean": listed(mean), "std": listed(std), "bytes": list(text), "runs": seen,
            "loaded": listed(layer.weight), "grad": grad,
        }  # fmt: skip
    for form in ("adaptformer", "lora"):
        adapter = needed(folder, f"{form}.py", {"QLinear": quantised})["Adapter"](R, 1).double().eval()
        adapter.adapter_down.weight.data, adapter.adapter_up.weight.data = fill("down", (R, D)), fill("up", (D, R))
        found["forms"][form] = listed(adapter(fill("x", (1, 1, D))).flatten())
    GOLDEN.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
