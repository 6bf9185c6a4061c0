"""What SPT's reference chooses to train, of layers whose gradients are given.

    python tests/golden/make_spt.py REFERENCE

where REFERENCE is GitHub's ziplab/SPT at COMMIT; its `get_sensitivity` is run as it is, on the CPU. Writes
tests/golden/spt.json:

    settings  {low_rank_dim, alpha, beta}
    sweep     by budget in millions: {params, structured_params, unstructured_params, matrices, vectors, counts, crc}: the
              weights that get a low-rank update, the vectors that train in full, how many single entries train in each of the
              others, and the CRC-32 of all their positions as int64, one parameter's after the other's

`Blocks` are 12 blocks of the layers of a ViT, biases and norms included; the gradient of each parameter in each of BATCHES
batches is `gradient` of its name. The parts without the reference are imported by the test on our side.
"""

import ast
import json
import math
import random
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("spt.json")
COMMIT = "e385f67ef0cba524b44072d52ec0650a7022f4e2"
SETTINGS = {"low_rank_dim": 8, "alpha": 10.0, "beta": 5.0}
WIDTH, BATCHES = 112, 2


class Block(nn.Module):
    """The layers of one block, under the reference's names."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.ModuleDict({name: nn.Linear(d, d) for name in ("q", "k", "v", "proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})


class Blocks(nn.Module):
    """Twelve of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(12))


def gradient(name: str, shape: Iterable[int], batch: int) -> Tensor:
    """No two alike in size: multiples of an odd number modulo 2^24, cubed; how loud a parameter is, its name says."""
    shape = tuple(shape)
    offset = zlib.crc32(f"{name}.{batch}".encode()) % 2**24
    k = (torch.arange(math.prod(shape), dtype=torch.int64) * 10368889 + offset) % 2**24
    loud = 10 ** (-4 * (zlib.crc32(name.encode()) % 97) / 97)
    return (loud * (k.double() / 2**24 - 0.5) ** 3).float().view(shape)


def functions(path: Path, names: set[str], scope: dict[str, Any]) -> dict[str, Any]:
    """These functions of a module whose other imports are not needed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    picked = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in picked} == names
    exec(compile(ast.Module(picked, []), str(path), "exec"), scope)
    return scope


def on_cpu(like: Tensor, device: Any = None) -> Tensor:
    """torch.zeros_like, where the reference asks for a GPU."""
    return torch.zeros(like.shape)


class Linear(nn.Module):
    """A loss whose gradients are `gradient`'s."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks, self.batch = model.blocks, 0

    def forward(self, samples: Tensor) -> Tensor:
        batch = int(samples)
        return torch.stack([(p * gradient(n, p.shape, batch)).sum() for n, p in self.named_parameters()]).sum()


def sweep(folder: str) -> dict[str, Any]:
    """By budget."""
    kept: dict[str, dict[str, Any]] = {}

    def save(result: dict[str, Any], path: str) -> None:
        kept[Path(path).stem.removeprefix("param_req_")] = result  # the later ones are nearer to the budget

    quiet_meter = dict.fromkeys(("add_meter", "update", "synchronize_between_processes"), lambda *a, **k: None)
    meter = SimpleNamespace(**quiet_meter, meters={})
    utils = SimpleNamespace(MetricLogger=lambda **k: meter, SmoothedValue=lambda **k: None, save_on_master=save)
    quiet = SimpleNamespace(**{k: getattr(torch, k) for k in ("cat", "nonzero", "zeros")},
                            zeros_like=on_cpu, nn=torch.nn, cuda=SimpleNamespace(synchronize=lambda: None),
                            device=torch.device)  # fmt: skip
    os = SimpleNamespace(path=SimpleNamespace(exists=lambda p: True), makedirs=None)
    scope = {
        "torch": quiet, "math": math, "np": np, "random": random, "sys": sys, "os": os, "utils": utils, "Iterable": Iterable,
        "tqdm": lambda it: it, "print": lambda *a: None,
        "vit_operation_dict": {"q": 0, "k": 1, "v": 2, "proj": 3, "fc1": 4, "fc2": 5},
    }  # fmt: skip
    functions(Path(folder) / "engine.py", {"get_structured_param_num", "get_sensitivity"}, scope)

    class Criterion(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs

    torch.manual_seed(0)
    model = Linear(Blocks())
    loader = [(torch.tensor(i), torch.tensor(0)) for i in range(BATCHES)]
    scope["get_sensitivity"](
        model, Criterion(), loader, "cpu", amp=False, dataset="d", structured_vector=True, exp_name="e",
        structured_type="lora", low_rank_dim=SETTINGS["low_rank_dim"], alpha=SETTINGS["alpha"], beta=SETTINGS["beta"],
        sensitivity_batch_num=BATCHES,
    )  # fmt: skip
    return {budget: shown(result) for budget, result in kept.items()}


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """What is compared of one choice."""
    names = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = [
        f"blocks.{i}.{names[j]}.weight"
        for i, row in enumerate(result["tuned_matrices"])
        for j, on in enumerate(row)
        if on
    ]
    flat = np.asarray(result["unstructured_indexes"])
    counts, positions, at = {}, [], 0
    for name, size in result["unstructured_name_shapes_int"].items():
        own = flat[(flat >= at) & (flat < at + size)] - at
        counts[name], at = len(own), at + int(size)
        positions.append(own.astype(np.int64))
    return {
        "params": float(result["params"]),
        "structured_params": int(result["structured_params"]),
        "unstructured_params": int(result["unstructured_params"]),
        "matrices": matrices,
        "vectors": list(result["tuned_vectors"]),
        "counts": counts,
        "crc": zlib.crc32(b"".join(own.tobytes() for own in positions)),
    }


if __name__ == "__main__":
    card = {
        "command": "python tests/golden/make_spt.py REFERENCE",
        "reference": {"repository": "ziplab/SPT", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": SETTINGS,
        "sweep": sweep(sys.argv[1]),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
