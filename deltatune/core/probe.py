"""The effect probe: perturb every delta, run the model once, and see that each of them moves the output.

Attach refuses what cannot have an effect by its structure; the probe finds what only a run can show: a branch that is
never taken, a module beside the forward, code that reads a weight past its layer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .adapter import Adapter


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


def probe(adapter: "Adapter", *args: Any, **kwargs: Any) -> None:
    """Run the model on one batch and raise ValueError naming every delta that has no effect on its outputs.

    Tensors, generators, gradients and flags are left as they were, bit for bit.
    """
    model = adapter.model
    trained = dict(adapter.named_parameters())
    kept = {name: p.detach().clone() for name, p in trained.items()}
    flags = {name: p.requires_grad for name, p in trained.items()}
    was = model.training
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.eval()
            for p in trained.values():
                p.requires_grad_(True)
                with torch.no_grad():
                    p.add_(torch.randn_like(p), alpha=0.1)
            outputs = [t for t in _tensors(model(*args, **kwargs)) if t.is_floating_point() and t.requires_grad]
            weighted = [(t.float() * torch.randn_like(t, dtype=torch.float32)).sum() for t in outputs]
            total = torch.stack([w.to(weighted[0].device) for w in weighted]).sum() if weighted else None
            if total is None:
                grads: tuple[Tensor | None, ...] = (None,) * len(trained)
            else:
                grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        finally:
            model.train(was)
            for name, p in trained.items():
                with torch.no_grad():
                    p.copy_(kept[name])
                p.requires_grad_(flags[name])
    moved: dict[str, bool] = {}
    for name, grad in zip(trained, grads, strict=True):
        owner = name.rpartition(".")[0]
        moved[owner] = moved.get(owner, False) or (grad is not None and bool((grad != 0).any()))
    dead = [owner for owner, effect in moved.items() if not effect]
    if dead:
        shown = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
        raise ValueError(
            f"adapter {adapter.name!r} has no effect at {shown}: the forward does not call these layers, or reads their "
            f"weights past them"
        )
