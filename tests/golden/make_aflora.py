"""What AFLoRA's reference layer computes, and which matrices its reference freezes at which step, in fp64.

    python tests/golden/make_aflora.py REFERENCE/glue

where REFERENCE is GitHub's zeyuliu1037/AFLoRA at COMMIT; needs torch, transformers 4.40 and wandb beside it. Writes
tests/golden/aflora.json:

    settings  in the reference's words
    series    {final_warmup: [{step, share, edge, frozen}]}: share is its threshold, edge the score below which a matrix freezes
              (null where nothing is masked), frozen the names of all that are frozen after the step
    layer     {out, grads} for x = fill("x", (3, d_in)) under the loss sum(out * fill("y", (3, d_out)))
    start     its vectors at the start: {d, e}

Matrices are MODULE.a (R, d_in) and MODULE.b (d_out, R), `fill` of their names; they never move, and a step's gradient is
gradient(step, name, shape). The layer's A, B, d and e are `fill` of "a", "b", "d" and "e".
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("aflora.json")
COMMIT = "23f632fcadb6b192700680dbbe1e417ea24a5abd"
R, STEPS, EPOCHS = 2, 40, 10
SHAPES = {"0": (5, 6), "1": (6, 4), "2": (7, 3)}  # d_out, d_in; square layers are frozen from the start
SETTINGS = {"initial_threshold": 1, "final_threshold": 0.0, "initial_warmup": 1, "beta1": 0.85, "beta2": 0.95,
            "deltaT": 3, "pruner_name": "PLATON", "num_train_epochs": EPOCHS}  # fmt: skip
FINAL = (5, 1)  # epochs


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def gradient(step: int, name: str, shape: Iterable[int]) -> Tensor:
    """The gradient of that matrix at that step; each has its own loudness, and loud times."""
    loud = 1.0 + zlib.crc32(name.encode()) % 5
    return fill(f"{name}.{step}", shape) * loud * (3.0 if (step // 5 + int(name[0])) % 3 == 0 else 1.0)


def matrices() -> dict[str, tuple[int, int]]:
    """The shapes of all of them."""
    return {f"{n}.{k}": s for n, (o, i) in SHAPES.items() for k, s in (("a", (R, i)), ("b", (o, R)))}


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


class Model(nn.Module):
    """Matrices under the names that the reference looks for."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in matrices().items():
            module = nn.Module()
            module.weight = nn.Parameter(fill(name, shape))
            self.add_module(f"lora_{name[2].upper()}_{name[0]}", module)

    def own(self) -> dict[str, nn.Parameter]:
        """Them by our names."""
        return {f"{n[7]}.{n[5].lower()}": p for n, p in self.named_parameters()}


def series(final_warmup: int) -> list[dict[str, Any]]:
    """Each step of the reference."""
    from utils import Pruner

    model = Model()
    pruner = Pruner(SETTINGS | {"final_warmup": final_warmup})
    pruner.total_step = STEPS
    steps = []
    for step in range(STEPS):
        for name, p in model.own().items():
            p.grad = gradient(step, name, p.shape)
        share, edge = pruner.update_and_pruning(model, step)
        frozen = sorted(name for name, p in model.own().items() if not p.requires_grad)
        steps.append({"step": step, "share": share, "edge": edge, "frozen": frozen})
    return steps


def layer() -> tuple[dict[str, Any], dict[str, Any]]:
    """The reference's layer, and its vectors at the start."""
    from peft.tuners.lora import Linear

    custom = {"mode": "elora", "submode": "none", "shared_dim": None, "use_float64": True, "trainable_uv": 1, "d_init_type": 94,
              "shared_d": False, "init_type": 1, "sqrt_a": 5, "identity": 0, "custom_scaling": 0, "nonlin": 0}  # fmt: skip
    d_out, d_in = SHAPES["0"]
    own = Linear("one", d_in, d_out, r=R, bias=False, custom=custom).double()
    tensors = {
        "a": own.lora_A["one"].weight,
        "d": own.lora_d["one"],
        "b": own.lora_B["one"].weight,
        "e": own.lora_db["one"],
    }
    start = {k: listed(tensors[k].detach()) for k in ("d", "e")}
    with torch.no_grad():
        own.weight.copy_(fill("w", own.weight.shape))
        for key, p in tensors.items():
            p.copy_(fill(key, p.shape))
    out = own(fill("x", (3, d_in)))
    (out * fill("y", (3, d_out))).sum().backward()
    return {"out": listed(out.detach()), "grads": {k: listed(p.grad) for k, p in tensors.items()}}, start


if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "peft" / "src")]
    import wandb

    wandb.init(mode="disabled")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made, start = layer()
    card: dict[str, Any] = {
        "command": "python tests/golden/make_aflora.py REFERENCE/glue",
        "reference": {"repository": "zeyuliu1037/AFLoRA", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": SETTINGS | {"total_step": STEPS, "r": R},
        "series": {str(final): series(final) for final in FINAL},
        "layer": made,
        "start": start,
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
