"""Frozen layers of one input with their low-rank changes, as one operation: y_i = x W_i' + b_i + s_i (x A_i') B_i'.

    forward    h = x A'                 A of all layers one below the other: x is read once
               s_i h_i B_i' + x W_i'    on a GPU in this order: the second product adds to the first, and y_i is written once
    backward   g_i = s_i dy_i B_i       dB_i = s_i dy_i' h_i        dA = g' x
               dx = g A + sum dy_i W_i  each product adds to the one before it: none is written by itself, and no sum is left over

Kept for the backward are h and x, once, or what x is made again from. A quantised W is read in numbers for the product at hand
alone. The factors come in their own dtype, and their gradients leave in it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kept import recipe
from .naive import add, add_low_rank

# where the narrow product comes first: elsewhere the order is that of the plain form, and with it the last bits
NARROW_FIRST = {"cuda"}
# where an input is made again in the backward rather than kept: memory is what a GPU is short of
REMADE = {"cuda"}


class Part(NamedTuple):
    """A frozen layer, W (O, I) as it is kept or as `read` gives it, and its change: A (R, I), B (O, R), both in `low` too, and s."""

    weight: Tensor | None
    bias: Tensor | None
    read: Callable[[], Tensor] | None
    a: Tensor
    b: Tensor
    low: tuple[Tensor, Tensor]  # A and B in x's dtype
    scale: float


def low_rank(layer: Any, x: Tensor, seen: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`layer(x)` (..., O) plus `scale` B A `seen`, for x and seen (..., I), a (R, I), b (O, R); dropout makes `seen` of x.

    A `layer` that can be called and no more is run by itself. One with `parts` (core/beneath.py) says what it is as a `Part`, and
    which layers beside it read x too: where A is trained these run in one operation. Where it is not, autograd keeps no x.
    """
    if seen is x and a.requires_grad and torch.is_grad_enabled() and hasattr(layer, "parts"):
        if (made := layer.made(x)) is not None:
            return made  # type: ignore[no-any-return]
        names, parts = layer.parts(x, a, b, scale)
        if parts:
            first, *rest = together(x, [Part(*part) for part in parts])
            layer.leave(x, names, rest)
            return first
    return add_low_rank(layer(x), seen, a.to(x.dtype), b.to(x.dtype), scale)


def together(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The outputs (..., O_i) of layers with their changes, all of the input x."""
    out: tuple[Tensor, ...] = _LowRank.apply(  # type: ignore[no-untyped-call]
        x, parts, *(p.weight for p in parts), *(p.a for p in parts), *(p.b for p in parts)
    )
    return out


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Part], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        n, shape = len(parts), x.shape[:-1]
        down = parts[0].low[0] if n == 1 else torch.cat([p.low[0] for p in parts])
        h = _flat(F.linear(x, down))
        made_of, ctx.make = recipe(x) if x.device.type in REMADE else ((x,), None)
        ctx.parts, ctx.n_kept = [(p.read, p.scale, p.bias) for p in parts], len(made_of)
        ctx.save_for_backward(*made_of, down, h, *(p.low[1] for p in parts), *tensors)
        ctx.set_materialize_grads(False)
        flat, found = _flat(x), []
        for p, own in zip(parts, _columns(h, [p.a for p in parts]), strict=True):
            weight = _matrix(p.weight, p.read)
            if x.device.type in NARROW_FIRST:
                if p.bias is None:
                    y = torch.addmm(flat[:1, :1], own, p.low[1].t(), beta=0, alpha=p.scale)
                else:
                    y = torch.addmm(p.bias, own, p.low[1].t(), alpha=p.scale)
                # not `view`, which autograd would let nobody write into
                found.append(torch.ops.aten._unsafe_view(y.addmm_(flat, weight.t()), (*shape, len(weight))))
            else:
                y = F.linear(x, weight, p.bias)
                added = add(y, own, p.low[1], p.scale)
                found.append(y if added.data_ptr() == y.data_ptr() else added)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n, kept = len(ctx.parts), ctx.saved_tensors  # once: a checkpoint gives each of them away once
        x = kept[0] if ctx.make is None else ctx.make(*kept[: ctx.n_kept])
        down, h, *rest = kept[ctx.n_kept :]
        ups, weights, a, b = (rest[i * n : (i + 1) * n] for i in range(4))
        needed = ctx.needs_input_grad[:1] + ctx.needs_input_grad[2 + n :]
        if torch.is_grad_enabled():
            return _again(ctx, x, weights, a, b, grads, needed)
        flat, g, flats, of_b = (
            _flat(x),
            torch.empty_like(h),
            list[Tensor | None](),
            list[Tensor | None](),
        )
        columns = zip(ctx.parts, grads, ups, _columns(g, a), _columns(h, a), b, needed[1 + n :], strict=True)
        for (_, scale, _), grad, up, into, own, to, on in columns:
            dy = None if grad is None else _flat(grad)
            flats.append(dy)
            if dy is None:
                into.zero_()
            else:
                torch.addmm(into, dy, up, beta=0, alpha=scale, out=into)
            of_b.append(
                product(dy.t(), own if scale == 1 else own * scale, to.dtype) if on and dy is not None else None
            )
        of_a: Sequence[Tensor | None] = [None] * n
        if any(needed[1 : 1 + n]):
            of_a = _rows(product(g.t(), flat, a[0].dtype), a)
        dx: Tensor | None = None
        if needed[0]:
            dx = g @ down
            for (read, *_), weight, dy in zip(ctx.parts, weights, flats, strict=True):
                if dy is not None:
                    dx.addmm_(dy, _matrix(weight, read))
            dx = dx.view(x.shape)
        return (dx, None, *[None] * n, *of_a, *of_b)


def _flat(t: Tensor) -> Tensor:
    """(..., I) as (N, I), for I of 0 too."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _matrix(weight: Tensor | None, read: Callable[[], Tensor] | None) -> Tensor:
    if weight is None:
        assert read is not None
        return read()
    return weight


def _columns(t: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    return (t,) if len(a) == 1 else t.split_with_sizes([len(one) for one in a], 1)


def _rows(t: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    return (t,) if len(a) == 1 else t.split_with_sizes([len(one) for one in a])


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, of matrices or of a batch of them, in `dtype`, rounded once."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _again(ctx: Any, x: Tensor, weights: Any, a: Any, b: Any, grads: Any, needed: Sequence[bool]) -> tuple[Any, ...]:
    """The gradient in plain PyTorch, which will be differentiated itself."""
    live = [t for t, on in zip((x, *a, *b), needed, strict=True) if on]
    ends, given = [], []
    for (read, scale, bias), weight, one, other, grad in zip(ctx.parts, weights, a, b, grads, strict=True):
        if grad is not None:
            y = F.linear(x, _matrix(weight, read), bias)
            ends.append(y + scale * F.linear(F.linear(x, one.to(x.dtype)), other.to(x.dtype)))
            given.append(grad)
    made = iter(torch.autograd.grad(ends, live, given, create_graph=True, allow_unused=True))
    of_x, *of_rest = (next(made) if on else None for on in needed)
    return (of_x, None, *[None] * len(a), *of_rest)
