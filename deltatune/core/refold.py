"""A linear layer under a folded weight that is computed again in the backward: neither it nor its gradient outlives a layer.

Plain autograd would keep every layer's folded weight, and what `fold` made on the way, until the backward: a copy of the
model. The gradients are the same; the products are those of a layer that is trained itself, and `fold` runs twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Folded = tuple[Tensor, Tensor | None]


def plain_autograd(x: Tensor) -> bool:
    """Is nothing but eager reverse-mode autograd at work, which functions with a backward of their own go along with?"""
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def trained_by(delta: nn.Module) -> list[Tensor]:
    """What a delta's `fold` may read that takes a gradient: its own tensors, and its shared ones."""
    found: dict[int, Tensor] = {}
    for part in delta.modules():
        own = list(part._parameters.values())
        if "_bank" in part.__dict__:
            bank, keys = part.__dict__["_bank"]
            own += [bank._parameters.get(key) for key in keys.values()]
        found |= {id(t): t for t in own if t is not None and t.requires_grad}
    return list(found.values())


class _Refolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fold: Callable[[], Folded], *trained: Tensor) -> Tensor:
        ctx.fold, ctx.trained = fold, trained
        ctx.save_for_backward(x, *trained)  # what changed before the backward is found out
        with torch.enable_grad():  # as `fold` sees it everywhere else
            weight, bias = fold()
        return F.linear(x, weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x: Tensor = ctx.saved_tensors[0]
        on_x, _, *on_trained = ctx.needs_input_grad
        live = [t for t, needed in zip(ctx.trained, on_trained, strict=True) if needed]
        again = torch.is_grad_enabled()  # the gradient itself will be differentiated
        with torch.enable_grad():
            weight, bias = ctx.fold()
        found: list[Tensor | None]
        if again:
            wanted = [x, *live] if on_x else live
            y = F.linear(x, weight, bias)
            found = list(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
            of_x = found.pop(0) if on_x else None
        else:
            of_x = grad @ weight.detach() if on_x else None
            flat = grad.flatten(0, -2)
            ends, given = [], []
            if weight.requires_grad:
                ends, given = [weight], [flat.t() @ x.flatten(0, -2)]
            if bias is not None and bias.requires_grad:
                ends, given = [*ends, bias], [*given, flat.sum(0)]
            some = bool(ends and live)
            found = list(torch.autograd.grad(ends, live, given, allow_unused=True)) if some else [None] * len(live)
        of_live = iter(found)
        return of_x, None, *(next(of_live) if needed else None for needed in on_trained)


def linear(x: Tensor, fold: Callable[[], Folded], deltas: Sequence[nn.Module]) -> Tensor:
    """F.linear(x, *fold()) for (..., I); `fold` gives the same (O, I) and (O) each time, in x's dtype."""
    trained = list({id(t): t for d in deltas for t in trained_by(d)}.values())
    if not (torch.is_grad_enabled() and trained):
        return F.linear(x, *fold())
    out = _Refolded.apply(x, fold, *trained)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
