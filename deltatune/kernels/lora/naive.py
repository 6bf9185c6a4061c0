"""y + s B A x in plain PyTorch: the update is added by one matrix product into the base's own output."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`y` (..., O) plus `scale` B A x, for x (..., I), a (R, I), b (O, R). `y` must be fresh: it is written into.

    Nothing full-width is written twice, and of the update only A x (..., R) is kept for the backward.
    """
    h = F.linear(x, a)
    return add(y, h.reshape(h.shape[:-1].numel(), len(a)), b, scale)  # for a rank of 0 too


def add(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """`y` (..., O) plus `scale` B h for h (N, R), into `y` itself where that is possible."""
    if (
        not (y.dtype == h.dtype == b.dtype) or y._base is not None or not y.is_contiguous()
    ):  # autocast, or a view of something else
        return y + scale * F.linear(h, b).view_as(y)
    return y.view(-1, y.shape[-1]).addmm_(h, b.t(), alpha=scale).view_as(y)


def add_each(y: Tensor, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """`y` (n N, ..., O) plus, on the k-th of the N = len(pairs) blocks of equally many rows, s_k B_k A_k x.

    x (n N, ..., I), A_k (R_k, I), B_k (O, R_k). Block by block; `y` is left as it is.
    """
    blocks = zip(y.chunk(len(pairs)), x.chunk(len(pairs)), pairs, strict=True)
    return torch.cat([own + s * F.linear(F.linear(seen, a), b) for own, seen, (a, b, s) in blocks])
