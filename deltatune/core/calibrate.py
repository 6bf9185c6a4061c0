"""Statistics of a frozen model over a few batches, taken before training: what masks, prunings and starts are made of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def gradients(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    of: Callable[[Tensor], Tensor] = torch.square,
) -> dict[str, Tensor]:
    """mean over `batches` of `of(d loss / d tensor)`, in fp32, one tensor per name of `tensors`.

    `of=torch.square` with one example a batch is the empirical Fisher information's diagonal; `of=torch.abs` a
    first-order saliency; the identity the mean gradient. The tensors' `requires_grad` and `.grad` are left as they were.

    Raises ValueError where there is no batch, or where the loss does not depend on a tensor.
    """
    total = {n: torch.zeros(t.shape, dtype=torch.float32, device=t.device) for n, t in tensors.items()}
    before = {n: t.requires_grad for n, t in tensors.items()}
    n_batches = 0
    try:
        for t in tensors.values():
            t.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(model, batch), list(tensors.values()), allow_unused=True)
            for name, grad in zip(tensors, grads, strict=True):
                if grad is None:
                    raise ValueError(f"calibrate: the loss does not depend on {name}")
                total[name] += of(grad.float())
            n_batches += 1
    finally:
        for n, t in tensors.items():
            t.requires_grad_(before[n])
    if not n_batches:
        raise ValueError("calibrate: no batch was given")
    return {n: t / n_batches for n, t in total.items()}
