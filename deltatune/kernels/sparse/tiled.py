"""The same as one operation: no dense weight and no dense gradient is kept longer than a layer.

The forward and the backward each make W + S for their own product and drop it. The gradient of the values is that of the
masked entries alone: gathered from a dense tile dL/dW that is freed at once, or, where a sum over tokens an entry is
less work, never made (`sampled`).
"""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# by device type: up to this share of the weight's entries the sampled form was faster (benchmarks/sparse.py, docs/speed.md)
SAMPLED_UP_TO = {"cpu": 0.02, "cuda": 0.0}


def is_sampled(x: Tensor, n_entries: int, n_weight: int) -> bool:
    """Is the sampled form the faster one here, and is it there? torch has it for fp32 and fp64, on a CPU by MKL alone."""
    if torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.float64):
        return False
    if x.device.type == "cpu" and not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    return n_entries <= SAMPLED_UP_TO.get(x.device.type, 0.0) * n_weight


def sampled(grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """(K), sum over tokens of grad[:, o] x[:, i] for each ascending index o I + i; grad (N, O), x (N, I)."""
    shape = grad.shape[1], x.shape[1]
    rows, columns = (index // shape[1]).long(), index % shape[1]
    ends = F.pad(torch.bincount(rows, minlength=shape[0]).cumsum(0), (1, 0)).to(index.dtype)
    _quiet()
    mask = torch.sparse_csr_tensor(ends, columns, grad.new_zeros(len(index)), shape, check_invariants=False)
    out: Tensor = torch.sparse.sampled_addmm(mask, grad.t(), x, beta=0.0)
    return out.values()


@cache
def _quiet() -> None:
    """torch says once a process that its CSR tensors are in beta and not checked; what is used of them here is held by tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        zero, ends = torch.zeros(1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        torch.sparse_csr_tensor(ends, zero, torch.zeros(1), (1, 1), check_invariants=False)


def _sums(t: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """The entries `at` of t plus the values, each sum rounded once."""
    return (t.reshape(-1)[at].to(values.dtype) + values).to(t.dtype)


def _with(t: Tensor, at: Tensor, sums: Tensor) -> Tensor:
    """A copy of t with these entries."""
    out = t.clone(memory_format=torch.contiguous_format)
    out.view(-1)[at] = sums
    return out


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor, n_weight: int
    ) -> Tensor:
        at = index.long()
        inside, outside = at[:n_weight], at[n_weight:] - weight.numel()
        sums = _sums(weight, inside, values[:n_weight])  # kept: fewer numbers than to make them again takes operations
        ctx.n_weight, ctx.dtype = n_weight, values.dtype
        ctx.save_for_backward(x, weight, bias, index, sums)
        if bias is not None and len(outside):
            bias = _with(bias, outside, _sums(bias, outside, values[n_weight:]))
        return F.linear(x, _with(weight, inside, sums), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, index, sums = ctx.saved_tensors
        n, at = ctx.n_weight, index.long()
        out: Tensor | None = None
        if ctx.needs_input_grad[0]:
            out = grad @ _with(weight, at[:n], sums)
        moved: Tensor | None = None
        if ctx.needs_input_grad[4]:
            flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
            if is_sampled(rows, n, weight.numel()):
                moved = sampled(flat, rows, index[:n])
            else:
                moved = (flat.t() @ rows).view(-1)[at[:n]]
            if bias is not None and len(at) > n:
                moved = torch.cat([moved, flat.sum(0)[at[n:] - weight.numel()]])
            moved = moved.to(ctx.dtype)
        return out, None, None, None, moved, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor, n_weight: int) -> Tensor:
    """F.linear(x, W + S, b + s) for x (..., I), W (O, I); the first `n_weight` of the ascending `index` lie in the weight."""
    out = _Sparse.apply(x, weight, bias, index, values, n_weight)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
