"""What BitDelta's reference makes of a base and its fine-tuning, in fp32.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/python tests/golden/make_bitdelta.py REFERENCE/bitdelta

where REFERENCE is GitHub's FasterDecoding/BitDelta at COMMIT. Of its files only the definitions in NEEDED run, on the CPU. Its
kernel `binary_bmm` needs a GPU: here the same product is made of the reference's own `unpack`. Writes
tests/golden/bitdelta.json:

    compressed  the names that `compress_diff` compresses in `Model`
    layers      {name: {alpha, signs, out, grad, merged}}: the scale and the signs (a string of 0 and 1 in the order of the
                (O, I) weight), BinaryDiff's output for x = fill("x", (1, T, I)), the gradient of alpha of
                sum(fill("loss", (1, T, O)) * out), and of MERGED the weight that `load_diff` leaves in the base

No weight is stored: the base's are `fill` of their names, the fine-tuned ones' `tuned`.
"""

import ast
import gc
import json
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("bitdelta.json")
COMMIT = "ecbee1e28f6b02444d535e0a165b48cba3fe217a"
NEEDED = {
    "binary_gemm_kernel.py": {"pack", "unpack"},
    "diff.py": {"BinaryDiff", "compress_diff", "save_diff", "load_diff"},
}
T, WIDTH, WIDE = 3, 32, 64
MERGED = "layers.0.self_attn.o_proj"


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of an odd number modulo 2^16, even over (-0.4, 0.4), exact on every machine."""
    shape = tuple(shape)
    n = torch.Size(shape).numel()
    steps = (torch.arange(n, dtype=torch.int64) * 40503 + zlib.crc32(key.encode()) % 65536) % 65536
    return ((steps.double() / 65536 - 0.5) * 0.8).float().reshape(shape)


def tuned(name: str, weight: Tensor) -> Tensor:
    """The fine-tuned weight: every seventh entry stays as it was."""
    moved = weight + 0.01 * fill(f"tuned {name}", weight.shape)
    return torch.where(torch.arange(weight.numel()).view(weight.shape) % 7 == 0, weight, moved)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with nine digits, which are all that fp32 has."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.9g}")


class Block(nn.Module):
    """The layers of one block, under Llama's names."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH, bias=False) for n in ("q_proj", "o_proj")})
        self.mlp = nn.ModuleDict(
            {"up_proj": nn.Linear(WIDTH, WIDE, bias=False), "down_proj": nn.Linear(WIDE, WIDTH, bias=False)}
        )
        self.norm = nn.LayerNorm(WIDTH)


class Model(nn.Module):
    """One block, and a head."""

    def __init__(self, fine: bool = False) -> None:
        super().__init__()
        self.device, self.config = torch.device("cpu"), SimpleNamespace()
        self.layers = nn.ModuleList([Block()])
        self.lm_head = nn.Linear(WIDTH, 8, bias=False)
        for name, p in self.named_parameters():
            p.data = fill(name, p.shape)
            p.data = tuned(name, p.data) if fine else p.data


def needed(folder: Path) -> dict[str, Any]:
    """The definitions of NEEDED, run together."""
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "gc": gc}
    for file, names in NEEDED.items():
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
        exec(compile(tree, file, "exec"), scope)
    scope["binary_bmm"] = lambda x, mask: x @ (2 * scope["unpack"](mask).to(x.dtype) - 1)
    return scope


def main(folder: Path) -> None:
    """Write the file."""
    warnings.simplefilter("ignore")
    scope = needed(folder)
    base, fine, made = Model(), Model(fine=True), Model(fine=True)
    scope["compress_diff"](base, fine, made)
    layers: dict[str, Any] = {}
    for name, module in made.named_modules():
        if not isinstance(module, scope["BinaryDiff"]):
            continue
        d_in, d_out = module.base.shape
        out = module(fill("x", (1, T, d_in)))
        (fill("loss", (1, T, d_out)) * out).sum().backward()
        signs = "".join(str(int(bit)) for bit in scope["unpack"](module.mask).T.flatten())
        alpha, grad = listed(module.coeff), listed(module.coeff.grad)
        layers[name] = {"alpha": alpha, "signs": signs, "out": listed(out), "grad": grad}
    with tempfile.TemporaryDirectory() as place:
        scope["save_diff"](made, f"{place}/diff.pt")
        scope["load_diff"](base, f"{place}/diff.pt")
    layers[MERGED]["merged"] = listed(base.get_parameter(f"{MERGED}.weight"))
    result = {"commit": COMMIT, "compressed": [*layers], "layers": layers}
    GOLDEN.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
