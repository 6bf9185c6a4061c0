"""What every method is measured against: all of the weights, and none but the task head."""

import torch
from torch import Tensor, nn

from ..core.method import Method
from ..core.record import EVERYTHING


class Full(Method, name="full"):
    """theta' = theta, every parameter trained in place: full fine-tuning."""

    category = "baseline"
    where = EVERYTHING
    in_place = True
    lr = (2e-5, 5e-4)


class Own(Method):
    """W' = V, b' = c: tensors of the adapter's own in the layer's place, equal to the layer's at the start."""

    category = "baseline"
    kinds = frozenset({"linear", "conv2d", "embedding", "norm"})
    lr = (1e-4, 1e-2)
    replaces = True

    def build(self, base, dtype):
        self.weight = nn.Parameter(base.weight.to(dtype, copy=True, memory_format=torch.contiguous_format))
        self.bias = None if base.bias is None else nn.Parameter(base.bias.to(dtype, copy=True))

    def dims(self, base):
        return {"n_weight": self.weight.numel(), "n_bias": 0 if self.bias is None else self.bias.numel()}

    @classmethod
    def count(cls):
        return "n_weight + n_bias"

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class Copy(Own, name="copy"):
    """W' = V, b' = c: a layer trained as a copy of its own; what trains a task head beside every other method."""

    where = "head"
    helper = True


class Head(Own, name="head"):
    """The task head alone, on a frozen backbone: what features that nobody adapted are worth."""

    where = "head"
