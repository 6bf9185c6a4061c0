"""What two layers under MOELoRA's reference code compute, which share one gate, in fp64.

    python tests/golden/make_moelora.py REFERENCE

where REFERENCE is GitHub's liuqidong07/MOELoRA-peft at COMMIT; needs torch, and transformers for a name. Its package is one of
an old transformers, of which the classes are run as they are. Writes tests/golden/moelora.json:

    settings  {n_experts, r, alpha, d_task, n_tasks, tasks: one of each row, widths, shape: [rows, tokens]}
    out       what the second layer gives of what the first gives of x = fill("x", ...)
    grads     {x, z, gate, 0.a, ...}: the gradients of each tensor, flat, under the loss sum(out * fill("y", ...))
    merged    for each task, the second layer's weight as the reference merges it, flat
    starts    {a, z, gate}: the standard deviation of a wide layer's tensors; b is 0

Layers have fill("0.weight") and so on. The reference's ChatGLM has its batch in the second dimension, and so have its gates.
"""

import ast
import json
import math
import sys
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("moelora.json")
COMMIT = "2d9efa4eec0644b8a111fb5e5abce03edba3c813"
SIZES: dict[str, Any] = {"n_experts": 4, "r": 8, "alpha": 12.0, "d_task": 5, "n_tasks": 3}
TASKS, WIDTHS, SHAPE = (2, 0, 2), (6, 7, 5), (3, 4)


def fill(key: str, shape: Iterable[int], size: float = 0.6) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with sixteen digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.16g}")


def reference() -> SimpleNamespace:
    """The reference's classes, out of files whose other imports are gone."""
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "math": math, "warnings": warnings}
    space |= {"PeftConfig": object, "transpose": lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight}
    for file, names in (
        ("tuners/lora.py", ["LoraLayer"]),
        ("tuners/mmoelora.py", ["MMOELoraLayer", "MMOELoraLinear", "MMOELinearA", "MMOELinearB", "Expert", "Gate"]),
        ("tuners/mmoeloraS.py", ["MMOELoraLinearS"]),
        ("shared.py", ["GateN"]),
    ):
        path = Path(sys.argv[1]) / "src" / "MLoRA" / "peft" / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
        exec(compile(tree, str(path), "exec"), space)
    return SimpleNamespace(**space)


def layer(cls: Any, i: int, widths: tuple[int, ...] = WIDTHS, r: int = SIZES["r"]) -> Any:
    """The reference's layer number i."""
    known = {"task_num": SIZES["n_tasks"] - 1, "task_embedding_dim": SIZES["d_task"], "expert_num": SIZES["n_experts"]}
    return cls("one", widths[i], widths[i + 1], r=r, lora_alpha=SIZES["alpha"], **known).double()


def tensors(one: Any, i: int) -> dict[str, list[nn.Parameter]]:
    """Our tensors of that layer -> the reference's, an expert each."""
    a, b = ([expert.mlp.weight for expert in part] for part in (one.lora_A["one"].loraA, one.lora_B["one"].loraB))
    return {f"{i}.a": a, f"{i}.b": b}


def filled(found: dict[str, list[nn.Parameter]]) -> None:
    """A of an expert is a part of ours along the first dimension, B along the second."""
    with torch.no_grad():
        for key, parts in found.items():
            dim = 1 if key.endswith("b") else 0
            whole = fill(key, torch.stack([p.detach() for p in parts], dim).shape)
            for p, value in zip(parts, whole.unbind(dim), strict=True):
                p.copy_(value)


def two_layers(space: SimpleNamespace) -> dict[str, Any]:
    """Forward and backward."""
    layers = [layer(space.MMOELoraLinearS, i) for i in range(2)]
    z = nn.Embedding(SIZES["n_tasks"], SIZES["d_task"]).double()
    gate = space.GateN(SIZES["n_experts"], SIZES["d_task"]).double()
    found = tensors(layers[0], 0) | tensors(layers[1], 1)
    filled(found)
    with torch.no_grad():
        for key, p in (("z", z.weight), ("gate", gate.GateL.weight)):
            p.copy_(fill(key, p.shape))
        for i, one in enumerate(layers):
            one.weight.copy_(fill(f"{i}.weight", one.weight.shape))
            one.bias.copy_(fill(f"{i}.bias", one.bias.shape))
    x = fill("x", (*SHAPE, WIDTHS[0])).requires_grad_()
    w = gate(z(torch.tensor(TASKS)))
    h = x.transpose(0, 1)
    for one in layers:
        h = one(h, task_id=w)
    out = h.transpose(0, 1)
    every = [x, z.weight, gate.GateL.weight, *(p for parts in found.values() for p in parts)]
    grads = iter(torch.autograd.grad((out * fill("y", out.shape)).sum(), every))
    given = {key: listed(next(grads).flatten()) for key in ("x", "z", "gate")}
    for key, parts in found.items():
        given[key] = listed(torch.stack([next(grads) for _ in parts], 1 if key.endswith("b") else 0).flatten())
    return {"out": listed(out.detach()), "grads": given, "merged": merged(space, z, gate)}


def merged(space: SimpleNamespace, z: nn.Embedding, gate: nn.Module) -> list[Any]:
    """By the reference's `merge`, which its layer with a gate of its own has."""
    found = []
    for task in range(SIZES["n_tasks"]):
        one = layer(space.MMOELoraLinear, 1)
        filled(tensors(one, 1))
        one.lora_gate["one"].load_state_dict(gate.state_dict())
        one.lora_task_embedding["one"].load_state_dict(z.state_dict())
        with torch.no_grad():
            one.weight.copy_(fill("1.weight", one.weight.shape))
            one.merge(torch.tensor([task]))
        found.append(listed(one.weight.detach().flatten()))
    return found


def starts(space: SimpleNamespace) -> dict[str, float]:
    """Of a wide layer and many tasks."""
    torch.manual_seed(0)
    one = layer(space.MMOELoraLinearS, 0, (400, 300), 40)
    assert not any(part.mlp.weight.any() for part in one.lora_B["one"].loraB)
    a = torch.cat([part.mlp.weight.flatten() for part in one.lora_A["one"].loraA])
    z, gate = nn.Embedding(500, 64).weight, space.GateN(100, 64).GateL.weight
    return {key: t.detach().std().item() for key, t in (("a", a), ("z", z), ("gate", gate))}


if __name__ == "__main__":
    space = reference()
    card: dict[str, Any] = {
        "command": "python tests/golden/make_moelora.py REFERENCE",
        "reference": {"repository": "liuqidong07/MOELoRA-peft", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": SIZES | {"tasks": TASKS, "widths": WIDTHS, "shape": SHAPE},
        "starts": starts(space),
    }
    GOLDEN.write_text(json.dumps(card | two_layers(space), separators=(",", ":")) + "\n", encoding="utf-8")
