"""y + s B A x in plain PyTorch: the update is added by one matrix product into the base's own output."""

import torch.nn.functional as F
from torch import Tensor


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`y` (..., O) plus `scale` B A x, for x (..., I), a (R, I), b (O, R). `y` must be fresh: it is written into.

    Nothing full-width is written twice, and of the update only A x (..., R) is kept for the backward.
    """
    h = F.linear(x, a).flatten(0, -2)
    if (
        not (y.dtype == h.dtype == b.dtype) or y._base is not None or not y.is_contiguous()
    ):  # autocast, or a view of something else
        return y + scale * F.linear(h, b).view_as(y)
    return y.view(-1, y.shape[-1]).addmm_(h, b.t(), alpha=scale).view_as(y)
