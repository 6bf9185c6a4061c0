"""A weight and a bias with values added at indices, in plain PyTorch, out of place."""

import torch
from torch import Tensor


def scattered(weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """[W | b] with `values` (K) added at `index` (K) of the flattened weight, behind which the bias' entries come."""
    whole = weight.reshape(-1) if bias is None else torch.cat([weight.reshape(-1), bias])
    whole = whole.index_add(0, index, values.to(whole.dtype))
    return whole[: weight.numel()].view(weight.shape), None if bias is None else whole[weight.numel() :]
