"""Tensors that may be sharded: gathered where the whole is needed, written each rank its shard."""

from torch import Tensor


def whole(t: Tensor) -> Tensor:
    """The tensor, gathered where it is sharded; then every rank has to ask."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t: Tensor) -> Tensor:
    """This rank's part of the tensor, a view: all of it where it is not sharded."""
    return t.to_local() if hasattr(t, "to_local") else t


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor's values into `target`, each rank its shard."""
    if hasattr(target, "full_tensor") and not hasattr(value, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # late: torch without distributed has none

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)
