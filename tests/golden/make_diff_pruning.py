"""What the reference of diff pruning computes: gates, penalty and gradients of one step, and the projection; in fp64.

    python tests/golden/make_diff_pruning.py REFERENCE

where REFERENCE is GitHub's dguo98/DiffPruning at COMMIT. Its scripts hang on a transformers of 2020 and say all in two long
functions, so the statements that matter are taken out of their syntax trees and run on the small model of `Small`; they
need torch and numpy. Writes tests/golden/diff_pruning.json:

    step     {open: {name: share of gates above 0}, y, grads: {w, gate, group: {name: gradient}}}: one backward pass of
             `Small` under the gates that `noise` gives, with the penalty PENALTY on them; the loss is sum(fill("loss") * y)
    sampled  [{gate, z, slope}] of concrete_stretched at GATES under noise("gates")
    cut      [{target, masks: {name: string}}]: which entries of `moved` the magnitude pruning keeps

A mask is a string of 0 and 1 in row-major order. Weights, differences, gates and noise are `fill`, `gate_of` and `noise` of
their names. The parts without the reference are imported by the test on our side.
"""

import ast
import contextlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("diff_pruning.json")
COMMIT = "085fa7d9e2bcbcd19f705a08b1c0c6c74c54bada"
LOW, HIGH, PENALTY = -1.5, 1.5, 0.03
GATES = [-9.0, -2.0, -1.0, -0.6, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 5.0]
TARGETS = [0.125, 0.25, 0.625]  # the reference keeps at most that share, which is a whole number here
N = 4  # width of the model


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name."""
    return spread(shape, zlib.crc32(key.encode()) % 10007, 0.8)


def gate_of(key: str, shape: Iterable[int]) -> Tensor:
    """Gates on both sides of the slope; a tensor's own is open by a part, so that everything behind it has a gradient."""
    return fill(f"gate.{key}", shape) * 3 if tuple(shape) != (1,) else torch.full((1,), 0.2).double()


def noise(key: str, shape: Iterable[int]) -> Tensor:
    """Between 0 and 1; of a tensor's own gate 1/2."""
    return fill(f"noise.{key}", shape) / 1.6 + 0.5 if tuple(shape) != (1,) else torch.full((1,), 0.5).double()


def moved(key: str, shape: Iterable[int]) -> Tensor:
    """What is cut."""
    return fill(f"moved.{key}", shape)


class Layer(nn.Module):
    """norm(dense(x))"""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(N, N), nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x))


class Small(nn.Module):
    """Two layers, named as in a BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList([Layer(), Layer()])})}).double()
        with torch.no_grad():
            for key, p in self.named_parameters():
                p.copy_(fill(key, p.shape) + (p.ndim == 1 and key.endswith("weight")))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.bert["encoder"]["layer"]:  # type: ignore[index, union-attr]
            x = torch.tanh(layer(x))
        return x


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def bits(mask: Tensor) -> str:
    return "".join(str(int(bit)) for bit in mask.flatten().tolist())


class Script:
    """A script of the reference, statement by statement."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def named(self, name: str, inside: str = "") -> ast.FunctionDef:
        root = self.named(inside) if inside else self.tree
        return next(n for n in ast.walk(root) if isinstance(n, ast.FunctionDef) and n.name == name)

    def run(self, statements: Iterable[ast.stmt], names: dict[str, Any]) -> None:
        body = list(statements)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(ast.Module(body=body, type_ignores=[]), "reference", "exec"), names)


@contextlib.contextmanager
def drawn(keys: list[str]) -> Iterator[None]:
    """Uniform noise is `noise` of these names, one after the other."""
    plain, left = torch.Tensor.uniform_, list(keys)

    def uniform(self: Tensor) -> Tensor:
        return self.copy_(noise(left.pop(0), self.shape))

    torch.Tensor.uniform_ = uniform  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.Tensor.uniform_ = plain  # type: ignore[method-assign]
    assert not left


def step(script: Script) -> dict[str, Any]:
    """One step of the reference's training loop, without its optimiser."""
    import numpy as np

    model = Small()
    args = SimpleNamespace(concrete_lower=LOW, concrete_upper=HIGH, per_params_alpha=1, per_layer_alpha=0)
    params: dict[str, list[Tensor]] = {}
    groups: dict[str, Tensor] = {}
    for key, p in model.named_parameters():
        parts = [fill(f"w.{key}", p.shape).requires_grad_(), gate_of(key, p.shape).requires_grad_()]
        groups[key] = gate_of(f"group.{key}", (1,)).requires_grad_()
        for t in (*parts, groups[key]):
            t.grad = torch.zeros_like(t)
        params[key] = [p.detach().clone(), *parts]
    names: dict[str, Any] = {
        "torch": torch, "np": np, "args": args, "model": model, "bert_params": params, "per_params_alpha": groups,
        "total_layers": 14, "sparsity_pen": [PENALTY] * 14, "modelname": "bert",
    }  # fmt: skip
    script.run([script.named("concrete_stretched"), script.named("get_layer_ind", "train")], names)
    loop = next(
        n for n in ast.walk(script.named("train"))
        if isinstance(n, ast.For) and ast.unparse(n.iter) == "enumerate(epoch_iterator)"
    )  # fmt: skip
    of_parameters = [isinstance(n, ast.For) and ast.unparse(n.iter) == "model.named_parameters()" for n in loop.body]
    first, last = next(i for i, n in enumerate(loop.body) if isinstance(n, ast.Assign)), of_parameters.index(True)
    with drawn([key for n, _ in model.named_parameters() for key in (f"group.{n}", n)]):
        script.run(loop.body[first : last + 1], names)
    y = model(fill("x", (3, N)))
    (fill("loss", y.shape) * y).sum().backward()
    update = next(n for n in loop.body if isinstance(n, ast.If) and "(step + 1) %" in ast.unparse(n.test))
    end = next(i for i, n in enumerate(update.body) if ast.unparse(n) == "sum_l0_pen.sum().backward()")
    script.run(update.body[: end + 1], names)
    z = {n: parts[1] for n, parts in names["grad_params"].items()}
    return {
        "open": {n: float((t > 0).double().mean()) for n, t in z.items()},
        "y": listed(y.detach()),
        "grads": {
            "w": {n: listed(p[1].grad) for n, p in params.items()},
            "gate": {n: listed(p[2].grad) for n, p in params.items()},
            "group": {n: listed(t.grad) for n, t in groups.items()},
        },
    }


def sampled(script: Script) -> list[dict[str, Any]]:
    """The reference's hard concrete and its slope."""
    names: dict[str, Any] = {"torch": torch}
    script.run([script.named("concrete_stretched")], names)
    with drawn(["gates"]):
        z, slope = names["concrete_stretched"](torch.tensor(GATES, dtype=torch.float64), LOW, HIGH)
    return [{"gate": g, "z": z_, "slope": s} for g, z_, s in zip(GATES, listed(z), listed(slope), strict=True)]


def cut(script: Script) -> list[dict[str, Any]]:
    """The reference's magnitude pruning to a share of all entries."""
    main = script.named("main").body
    start = next(i for i, n in enumerate(main) if isinstance(n, ast.FunctionDef) and n.name == "get_sparsity")
    end = next(i for i, n in enumerate(main) if ast.unparse(n).startswith("for n in saved['model']"))
    found = []
    for target in TARGETS:
        model = Small()
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.zero_().add_(moved(n, p.shape))
        zeros = {n: [torch.zeros_like(p)] for n, p in base.items()}  # what moved, without a base's rounding
        saved = {"model": {n: t.clone() for n, t in model.state_dict().items()}, "bert_params": zeros}
        args = SimpleNamespace(threshold=-1.0, target_sparsity=target, device="cpu")
        names: dict[str, Any] = {"torch": torch, "model": model, "saved": saved, "args": args}
        script.run(main[start : end + 1], names)
        kept = {n: t != 0 for n, t in names["new_state_dict"].items()}
        found.append({"target": target, "masks": {n: bits(t) for n, t in kept.items()}})
    return found


if __name__ == "__main__":
    import sys

    examples = Path(sys.argv[1]) / "examples"
    training, pruning = Script(examples / "run_glue_diffpruning.py"), Script(examples / "run_glue_mag.py")
    card = {
        "command": "python tests/golden/make_diff_pruning.py REFERENCE",
        "reference": {"repository": "dguo98/DiffPruning", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "step": step(training),
        "sampled": sampled(training),
        "cut": cut(pruning),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
