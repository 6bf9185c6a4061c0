"""Masks in one bit an entry, and the rule by which a trained mask is drawn from scores."""

import torch
from torch import Tensor

_PLACES = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as ceil(n / 8) bytes, the first entry in the lowest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat * torch.tensor(_PLACES, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `pack` packed, as a bool tensor of `shape`."""
    places = torch.tensor(_PLACES, dtype=torch.uint8, device=bits.device)
    flat = bits[:, None].bitwise_and(places).ne(0).flatten()
    return flat[: torch.Size(shape).numel()].view(shape)


def top(scores: Tensor, keep: float) -> Tensor:
    """The mask of the `keep` share of entries that are largest in absolute value: all but int((1 - keep) n) of them."""
    flat = scores.detach().abs().reshape(-1)
    n_dropped = int((1 - keep) * flat.numel())
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[:n_dropped]] = False
    return mask.view(scores.shape)


def straight_through(scores: Tensor, keep: float) -> Tensor:
    """`top` as numbers; the gradient of the mask goes to |scores| as if it were the mask."""
    size = scores.abs()
    return top(scores, keep).to(scores.dtype) + (size - size.detach())
