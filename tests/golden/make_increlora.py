"""Which sites IncreLoRA's reference allocator gives rank to, step by step, in fp64.

    python tests/golden/make_increlora.py REFERENCE/loralib

where REFERENCE is GitHub's FeiyuZhang98/IncreLoRA at COMMIT; needs torch, numpy and ipdb beside it. Writes
tests/golden/increlora.json:

    settings  of the allocator, in the reference's words
    series    {name: {settings, steps}} for each of SERIES; a step is {step, ranks, total, importance, smooth, spread}: rank and
              numbers of each module after it, in the modules' order
    grads     {tensor: gradient} of the penalty and of the loss of step 0 on the tensors as they start
    out       {module: y} at the start
    penalty   {weight, loss, grads} of the reference's orthogonality penalty on the tensors as they start, with e = 0

A module's tensors are `fill` of MODULE.a (1, d_in), MODULE.e (1, 1) and MODULE.b (d_out, 1); a new triplet's are
`triplet(MODULE, k, ...)`, k its number in the module. A step's loss is loss(step): the sum over modules of
sum(y * fill("MODULE.STEP", y.shape)) with y the module's output for x = fill("x.STEP", (2, d_in)), times its loudness. After
the allocator of a step, which is called before it, the optimiser (SGD without momentum, rate LR) moves all that it holds.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("increlora.json")
COMMIT = "51a2d734af7883ef90425206057c1ef25997b359"
ALPHA, LR, STEPS, RESERVE = 6.0, 0.2, 24, 1e-5
SHAPES = {"0": (5, 6), "1": (6, 6), "2": (7, 3), "3": (4, 8)}  # d_out, d_in
BASE = {"beta1": 0.85, "beta2": 0.8}
SERIES: dict[str, dict[str, int]] = {
    "one": {"target_rank": 3, "init_warmup": 3, "incre_interval": 2, "top_h": 1, "incre_rank_num": 1},
    "two": {"target_rank": 3, "init_warmup": 4, "incre_interval": 3, "top_h": 2, "incre_rank_num": 1},
    "pairs": {"target_rank": 4, "init_warmup": 0, "incre_interval": 4, "top_h": 2, "incre_rank_num": 2},
    "over": {"target_rank": 2, "init_warmup": 1, "incre_interval": 2, "top_h": 3, "incre_rank_num": 2},
}


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def triplet(module: str, k: int) -> dict[str, Tensor]:
    """A and B of the module's triplet number k, behind those that it starts with."""
    d_out, d_in = SHAPES[module]
    return {"a": fill(f"{module}.a{k}", (1, d_in)), "b": fill(f"{module}.b{k}", (d_out, 1))}


def loudness(module: str, step: int) -> float:
    """Each module has its loud times."""
    return 1.0 if (step // 3 + int(module)) % 4 == 0 else 0.3


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def reference(e: bool = True) -> nn.ModuleDict:
    """The reference's layers at the start."""
    from loralib.increlora import SVDLinear

    layers = {}
    for name, (d_out, d_in) in SHAPES.items():
        layer = SVDLinear(d_in, d_out, r=1, lora_alpha=ALPHA, bias=False, merge_weights=False).double()
        with torch.no_grad():
            layer.weight.copy_(fill(f"{name}.w", layer.weight.shape))
            for word, p in {"a": layer.lora_A[0], "e": layer.lora_E[0], "b": layer.lora_B[0]}.items():
                p.copy_(fill(f"{name}.{word}", p.shape) if e or word != "e" else torch.zeros(p.shape))
        layers[name] = layer
    return nn.ModuleDict(layers)


def loss(layers: Any, step: int) -> Tensor:
    """The loss of a step."""
    total = torch.zeros((), dtype=torch.float64)
    for name, (d_out, d_in) in SHAPES.items():
        y = layers[name](fill(f"x.{step}", (2, d_in)))
        total = total + loudness(name, step) * (y * fill(f"{name}.{step}", (2, d_out))).sum()
    return total


def named(model: nn.ModuleDict) -> None:
    """The triplets that came last get their names' values."""
    for name, layer in model.items():
        for k in range(1, len(layer.lora_A)):
            if not hasattr(layer.lora_A[k], "named"):
                for word, p in {"a": layer.lora_A[k], "b": layer.lora_B[k]}.items():
                    p.data.copy_(triplet(name, k)[word])
                    p.named = True


def series(settings: dict[str, int]) -> list[dict[str, Any]]:
    """Each step."""
    from loralib.increlora import RankAllocator

    model = reference()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=LR)
    ranks = RankAllocator(model, lora_r=1, advance_learn=True, total_step=STEPS, weight_decay=0.0, **BASE, **settings)
    steps = []
    for step in range(STEPS):
        loss(model, step).backward()
        ranks.update_and_increase(model, step, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        named(model)
        numbers = {
            "importance": [listed(ranks.ipt[n]) for n in SHAPES],
            "smooth": [listed(ranks.exp_avg_ipt[n]) for n in SHAPES],
            "spread": [listed(ranks.exp_avg_unc[n]) for n in SHAPES],
        }
        grown = [int(model[n].ranknum) for n in SHAPES]
        steps.append({"step": step, "ranks": grown, "total": ranks.total_rank} | numbers)
    return steps


def start() -> dict[str, Any]:
    """The layers' outputs and gradients as they start."""
    model = reference()
    loss(model, 0).backward()
    grads = {}
    for name, layer in model.items():
        for word, p in {"a": layer.lora_A[0], "e": layer.lora_E[0], "b": layer.lora_B[0]}.items():
            grads[f"{name}.{word}"] = listed(p.grad)
    out = {n: listed(layer(fill("x.0", (2, layer.in_features))).detach()) for n, layer in model.items()}
    return {"grads": grads, "out": out}


def penalty() -> dict[str, Any]:
    """The reference's penalty; with one triplet a module it is the trainer's too."""
    from loralib.increlora import compute_orth_regu

    model, weight = reference(e=False), 0.1
    value = compute_orth_regu(model, regu_weight=weight)
    value.backward()
    grads = {}
    for name, layer in model.items():
        grads |= {f"{name}.a": listed(layer.lora_A[0].grad), f"{name}.b": listed(layer.lora_B[0].grad)}
    return {"weight": weight, "loss": value.item(), "grads": grads}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    torch.set_default_dtype(torch.float64)  # the allocator compares scores with an edge in the default dtype
    card: dict[str, Any] = {
        "command": "python tests/golden/make_increlora.py REFERENCE/loralib",
        "reference": {"repository": "FeiyuZhang98/IncreLoRA", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": BASE | {"lora_r": 1, "lora_alpha": ALPHA, "total_step": STEPS, "lr": LR},
        "series": {name: {"settings": settings, "steps": series(settings)} for name, settings in SERIES.items()},
        "penalty": penalty(),
    } | start()
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
