"""Values at indices: a few entries of a weight and its bias, all that is trained, optimised and saved."""

import torch
from torch import Tensor

from ..core.method import Method, fixed, param
from ..kernels import sparse


def drawn(shape, *, delta, **_):
    """A random set of positions, ascending, from torch's generator"""
    return torch.randperm(delta.size)[: shape[0]].sort().values.to(torch.int32)


class Sparse(Method):
    """The common part: [W | b]' = [W | b] + v at the indices of the flattened matrix, behind which the bias' entries come.

    Weight decay acts on v, which is the change: nothing else can move. The share is of each layer's own entries; a method
    that chooses over all layers has the same total.
    """

    category = "partial"
    where = "linear,norm"
    kinds = frozenset({"linear", "conv2d", "embedding", "norm"})
    ragged = frozenset({"index", "values"})
    lr = (1e-4, 1e-2)
    keep: float = 0.005  # share of the entries that train
    index: Tensor = fixed("k", drawn)
    values: Tensor = param("k")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        return config

    def build(self, base, dtype):
        self.n_weight = base.weight.numel()
        self.size = self.n_weight + (0 if base.bias is None else base.bias.numel())
        self.__dict__.update(_seen=None, _in_weight=0)
        super().build(base, dtype)

    def dims(self, base):
        there = self._parameters.get("values")
        return super().dims(base) | {"k": max(1, round(self.keep * self.size)) if there is None else there.numel()}

    def check_ragged(self, tensors):
        index, values = tensors["index"], tensors["values"]
        if index.ndim != 1 or index.shape != values.shape or index.dtype != torch.int32:
            raise ValueError(f"index {tuple(index.shape)} and values {tuple(values.shape)} are no list of entries")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.size or bool((index.diff() <= 0).any())):
            raise ValueError(f"index must ascend within the {self.size} entries of the layer")

    def in_weight(self):
        """How many of the indices lie in the weight; looked up again when the index is another."""
        seen = self.index.data_ptr(), self.index._version, self.index.numel()
        if self._seen != seen:
            self.__dict__.update(_seen=seen, _in_weight=int((self.index < self.n_weight).sum()))
        return self._in_weight

    def fold(self, weight, bias):
        return sparse.scattered(weight, bias, self.index, self.values)

    def product(self, x, weight, bias):
        return sparse.linear(x, weight, bias, self.index, self.values, self.in_weight())


class SHiRA(Sparse, name="shira"):
    """W' = W + v at random indices, drawn once; v = 0 at the start: a sparse high-rank adapter."""

    paper = "2406.13175"
    where = "q,v"
