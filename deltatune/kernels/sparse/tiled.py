"""The same as one operation: no dense weight and no dense gradient is kept longer than a layer.

The forward and the backward each make W + S for their own product and drop it. The gradient of the values is that of the
masked entries alone: gathered from a dense tile dL/dW that is freed at once, or, where a sum over tokens an entry is
less work, never made (`sampled`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# by device type: below this share of the weight's entries the sampled form was faster (benchmarks/sparse.py, docs/speed.md)
SAMPLED_BELOW = {"cpu": 0.02, "cuda": 0.0}
CHUNK = 2**24  # numbers that the sampled form gathers at once


def sampled(grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """(K), sum over tokens of grad[:, o] x[:, i] for each index o I + i; grad (N, O), x (N, I)."""
    rows, columns = index // x.shape[1], index % x.shape[1]
    grad, x = grad.t().contiguous(), x.t().contiguous()
    size = max(1, CHUNK // x.shape[1])
    parts = [
        torch.linalg.vecdot(grad[rows[at : at + size]], x[columns[at : at + size]]) for at in range(0, len(index), size)
    ]
    return torch.cat(parts) if parts else grad.new_zeros(0)


def _changed(
    weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor, n_weight: int
) -> tuple[Tensor, Tensor | None]:
    """W + S and b + s, each entry's sum rounded once."""

    def add(t: Tensor, at: Tensor, v: Tensor) -> Tensor:
        out = t.clone(memory_format=torch.contiguous_format)
        flat = out.view(-1)
        flat[at] = (flat[at].to(v.dtype) + v).to(out.dtype)
        return out

    weight = add(weight, index[:n_weight], values[:n_weight])
    return weight, None if bias is None else add(bias, index[n_weight:] - weight.numel(), values[n_weight:])


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor, n_weight: int
    ) -> Tensor:
        ctx.n_weight = n_weight
        ctx.save_for_backward(x, weight, bias, index, values)
        return F.linear(x, *_changed(weight, bias, index, values, n_weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, index, values = ctx.saved_tensors
        n = ctx.n_weight
        out: Tensor | None = None
        if ctx.needs_input_grad[0]:
            out = grad @ _changed(weight, None, index[:n], values[:n], n)[0]
        moved: Tensor | None = None
        if ctx.needs_input_grad[4]:
            flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
            if n < SAMPLED_BELOW.get(x.device.type, 0.0) * weight.numel():
                moved = sampled(flat, rows, index[:n])
            else:
                moved = (flat.t() @ rows).view(-1)[index[:n]]
            if bias is not None:
                moved = torch.cat([moved, flat.sum(0)[index[n:] - weight.numel()]])
            moved = moved.to(values.dtype)
        return out, None, None, None, moved, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor, n_weight: int) -> Tensor:
    """F.linear(x, W + S, b + s) for x (..., I), W (O, I); the first `n_weight` of the ascending `index` lie in the weight."""
    out = _Sparse.apply(x, weight, bias, index, values, n_weight)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
