"""What AdaLoRA's reference allocator keeps, step by step, in fp64.

    python tests/golden/make_adalora.py REFERENCE/loralib

where REFERENCE is GitHub's QingruZhang/AdaLoRA at COMMIT; needs torch alone beside it. Writes tests/golden/adalora.json:

    settings       of the allocator, in the reference's words
    series         {name: {final_warmup, steps}} for each of FINAL; a step is {step, budget, threshold, kept, e}: threshold
                   is null where nothing is masked, kept has one bit for each E that is not 0 after the step, MODULE after
                   MODULE joined by a blank, e the values (R) of each module
    scores         {series: {tensor: [sensitivity, uncertainty]}} after the last step
    orthogonality  {weight, loss, grads: {tensor: gradient}} of the reference's penalty at the start
    outputs        {module: y} of its layer at the start, without bias: x W^T + the scaled product, for x = fill("x", (2, d_in))
                   and W = fill("MODULE.w", (d_out, d_in)); settings.lora_alpha / (R + 1e-5) scales
    full_budget    the reference's error where the budget never falls, so that nothing is left to mask

Tensors are MODULE.a (R, d_in), MODULE.e (R, 1), MODULE.b (d_out, R), each `fill` of its name at the start. A step is
p <- p - LR * gradient(step, name, shape), then the allocator with that gradient: in this order, as in the reference.
The parts without the reference are imported by the test on our side.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("adalora.json")
COMMIT = "d10f5ebee16c478fa2f41a44a237b38e8c9b0338"
R, ALPHA, LR, STEPS = 4, 6.0, 0.05, 30
SHAPES = {"0": (5, 6), "1": (6, 6), "2": (7, 3)}  # d_out, d_in
SETTINGS = {"init_warmup": 4, "mask_interval": 3, "target_rank": 2, "beta1": 0.85, "beta2": 0.8}
# The last allocation falls on step 21, a multiple of the interval, or on 22, which is none.
FINAL = {"aligned": 9, "unaligned": 8}


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).float().view(shape)


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name."""
    return spread(shape, zlib.crc32(key.encode()) % 10007, size)


def gradient(step: int, key: str, shape: Iterable[int]) -> Tensor:
    """The gradient of that tensor at that step; each module has its loud times, so that what was dropped can return."""
    loud = (step // 4 + int(key[0])) % 3 == 0
    return fill(f"{key}.{step}", shape, 1.0 if loud else 0.25)


def start() -> dict[str, Tensor]:
    """Every trained tensor at step 0."""
    shapes = {}
    for name, (d_out, d_in) in SHAPES.items():
        shapes |= {f"{name}.a": (R, d_in), f"{name}.e": (R, 1), f"{name}.b": (d_out, R)}
    return {key: fill(key, shape) for key, shape in shapes.items()}


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def reference() -> nn.ModuleDict:
    """The reference's layers at the start, trained tensors alone with gradients."""
    from loralib import SVDLinear, mark_only_lora_as_trainable

    layers = {
        name: SVDLinear(d_in, d_out, r=R, lora_alpha=ALPHA, bias=False, merge_weights=False)
        for name, (d_out, d_in) in SHAPES.items()
    }
    model = nn.ModuleDict(layers).double()
    mark_only_lora_as_trainable(model)
    values = start()
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(fill(f"{name}.w", layer.weight.shape))
            for word, p in {"a": layer.lora_A, "e": layer.lora_E, "b": layer.lora_B}.items():
                p.copy_(values[f"{name}.{word}"])
    return model


def ours(name: str) -> str:
    """The reference's "0.lora_A" is our "0.a"."""
    module, _, word = name.partition(".lora_")
    return f"{module}.{word.lower()}"


def allocator(model: nn.Module, final_warmup: int, **changed: Any) -> Any:
    """The reference's, over STEPS steps."""
    from loralib import RankAllocator

    return RankAllocator(model, lora_r=R, final_warmup=final_warmup, total_step=STEPS, **SETTINGS | changed)


def trained(parts: nn.Module) -> dict[str, nn.Parameter]:
    """Our name of each of the reference's trained tensors."""
    return {ours(name): p for name, p in parts.named_parameters() if "lora_" in name}


def series(final_warmup: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Each step, and the scores at the end."""
    model = reference()
    ranks, tensors = allocator(model, final_warmup), trained(model)
    steps = []
    for step in range(STEPS):
        for key, p in tensors.items():
            p.grad = gradient(step, key, p.shape).double()
            p.data -= LR * p.grad
        budget, threshold = ranks.update_and_mask(model, step)
        e = {name: tensors[f"{name}.e"].detach().flatten() for name in SHAPES}
        kept = " ".join("".join(str(int(value != 0)) for value in row) for row in e.values())
        row = {"step": step, "budget": budget, "threshold": threshold, "kept": kept}
        steps.append(row | {"e": [listed(values) for values in e.values()]})
    average, spreads = ranks.exp_avg_ipt, ranks.exp_avg_unc
    return steps, {ours(name): [listed(average[name]), listed(spreads[name])] for name in average}


def orthogonality() -> dict[str, Any]:
    """The reference's penalty and its gradients at the start."""
    from loralib import compute_orth_regu

    model, weight = reference(), 0.1
    loss = compute_orth_regu(model, regu_weight=weight)
    loss.backward()
    grads = {key: listed(p.grad) for key, p in trained(model).items() if p.grad is not None}
    return {"weight": weight, "loss": loss.item(), "grads": grads}


def outputs() -> dict[str, Any]:
    """Each layer of the reference at the start."""
    model = reference()
    with torch.no_grad():
        return {name: listed(model[name](fill("x", (2, d_in)).double())) for name, (_, d_in) in SHAPES.items()}


def full_budget() -> str:
    """The reference's error where target and first rank are one."""
    model = reference()
    ranks = allocator(model, FINAL["aligned"], target_rank=R)
    try:
        for step in range(STEPS):
            for key, p in trained(model).items():
                p.grad = gradient(step, key, p.shape).double()
            ranks.update_and_mask(model, step)
    except RuntimeError as error:
        return f"step {step}: {error}"
    raise AssertionError("the reference has learnt to keep everything")


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    every = {name: series(final) for name, final in FINAL.items()}
    card: dict[str, Any] = {
        "command": "python tests/golden/make_adalora.py REFERENCE/loralib",
        "reference": {"repository": "QingruZhang/AdaLoRA", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": SETTINGS | {"lora_r": R, "lora_alpha": ALPHA, "total_step": STEPS, "lr": LR},
        "series": {name: {"final_warmup": FINAL[name], "steps": steps} for name, (steps, _) in every.items()},
        "scores": {name: scores for name, (_, scores) in every.items()},
        "orthogonality": orthogonality(),
        "outputs": outputs(),
        "full_budget": full_budget(),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
