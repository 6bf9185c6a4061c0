"""Blocks of rows with a low-rank change each, as one product for all: y_k + s_k B_k A_k x_k, k = 1..N, equally many rows a block.

    forward    h_k = s_k x_k A_k'            y_k += h_k B_k'
    backward   g_k = s_k dy_k B_k            dB_k = dy_k' h_k      dA_k = g_k' x_k      dx_k = g_k A_k

Ranks below the largest are filled up with zeros. The factors come in their own dtype, and their gradients leave in it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import product


def add_grouped(y: Tensor, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """`y` (n N, ..., O) plus, on the k-th of the N = len(pairs) blocks, s_k B_k A_k x; x (n N, ..., I), A_k (R_k, I), B_k (O, R_k).

    A fresh `y` is written into. Raises ValueError where the rows do not come in N equal blocks.
    """
    if len(y) % len(pairs) or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{tuple(x.shape)} and {tuple(y.shape)} are not {len(pairs)} blocks of equally many rows")
    if y._base is not None or not y.is_contiguous():
        y = y.contiguous().clone()
    a, b, scales = zip(*pairs, strict=True)
    out: Tensor = _Grouped.apply(y, x.to(y.dtype), scales, *a, *b)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, scales: tuple[float, ...], *factors: Tensor) -> Tensor:
        n = len(scales)
        r = max(len(a) for a in factors[:n])
        down = torch.stack([F.pad(a, (0, 0, 0, r - len(a))) if len(a) < r else a for a in factors[:n]]).to(y.dtype)
        up = torch.stack([F.pad(b, (0, r - b.shape[1])) if b.shape[1] < r else b for b in factors[n:]]).to(y.dtype)
        rows = x.reshape(n, -1, x.shape[-1])
        h = _scaled(torch.bmm(rows, down.mT), scales)
        y.view(n, -1, y.shape[-1]).baddbmm_(h, up.mT)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, down, up)
        ctx.scales, ctx.like = scales, [(t.shape, t.dtype) for t in factors]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, h, down, up = ctx.saved_tensors
        n = len(ctx.scales)
        rows, dy = x.reshape(n, -1, x.shape[-1]), grads[0].reshape(n, -1, grads[0].shape[-1])
        g = _scaled(torch.bmm(dy, up), ctx.scales)
        of_x = torch.bmm(g, down).view(x.shape) if ctx.needs_input_grad[1] else None
        of_a, of_b = (product(*two, ctx.like[0][1]) for two in ((g.mT, rows), (dy.mT, h)))
        cut_a = [of_a[k, : shape[0]].to(dtype) for k, (shape, dtype) in enumerate(ctx.like[:n])]
        cut_b = [of_b[k, :, : shape[1]].to(dtype) for k, (shape, dtype) in enumerate(ctx.like[n:])]
        return (grads[0], of_x, None, *cut_a, *cut_b)


def _scaled(t: Tensor, scales: tuple[float, ...]) -> Tensor:
    """`t` (N, ...) in place times each block's own."""
    if len(set(scales)) == 1:
        return t if scales[0] == 1 else t.mul_(scales[0])
    return t.mul_(_column(scales, t.dtype, t.device))


@functools.lru_cache(maxsize=64)
def _column(scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=dtype, device=device).view(-1, 1, 1)
