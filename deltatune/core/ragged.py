"""Tensors whose shape the course of the training decides: values at chosen indices, ranks that grow, what was emptied."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .sharded import assign

if TYPE_CHECKING:
    from .method import Method


def ragged_in(
    path: object, tensors: Mapping[str, Tensor], deltas: "Mapping[str, Method]"
) -> "dict[str, tuple[Method, str]]":
    """Of a file's tensors those that bring their own shape: key -> its delta, and its name there.

    `deltas` are by how their keys begin in the file. Raises ValueError where the shapes do not fit a delta.
    """
    ragged: dict[str, tuple[Method, str]] = {}
    for at, delta in deltas.items():
        own = delta.state_dict().keys() & delta.ragged
        found = {n: tensors[f"{at}.{n}"] for n in own if f"{at}.{n}" in tensors}
        ragged |= {f"{at}.{n}": (delta, n) for n in found}
        if found and found.keys() == own:  # else `check_keys` says what is missing
            try:
                delta.check_ragged(found)
            except ValueError as error:
                raise ValueError(f"{path}: {delta.site.name}: {error}") from None
    return ragged


@torch.no_grad()
def refill(delta: nn.Module, key: str, value: Tensor) -> None:
    """Give the tensor `key` of `delta` other contents, of another shape where that is so.

    It stays the same object, so an optimiser that was built at the start goes on with it; its moments there are the
    caller's. Raises ValueError where it is sharded and the shape would change.
    """
    target: Tensor | None = delta._parameters.get(key)
    if target is None:
        target = delta._buffers.get(key)
    assert target is not None, key
    if target.shape == value.shape:
        assign(target, value)
        return
    if hasattr(target, "full_tensor"):
        raise ValueError(f"{key} of {tuple(target.shape)} is sharded; it cannot become {tuple(value.shape)}")
    # the graph of a loss that someone still holds keeps a node for the old shape; for another dtype torch drops it
    dtype = target.dtype
    target.data = torch.empty(0, dtype=torch.float16 if dtype != torch.float16 else torch.float32, device=target.device)
    target.data = torch.empty(value.shape, dtype=dtype, device=target.device)
    target.copy_(value)  # which also tells who looked at it that it is another
    target.grad = None
