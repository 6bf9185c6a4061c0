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
    """torch says once a process that its CSR tensors are in beta; what is used of them here is held by tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.eye(1).to_sparse_csr()


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
            if is_sampled(rows, n, weight.numel()):
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
