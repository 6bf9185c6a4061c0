"""Biases that are pruned while training: single entries, or whole vectors."""

import torch
from torch import Tensor

from ..core.method import fixed, param
from .first_order import Groups, Pruned, check_entries, every
from .vectors import Vectors


class PrunedBias(Pruned, Vectors):
    """The common part: b' = b + d where d is left, from all biases that the base has."""

    where = "linear,norm"
    kinds = frozenset({"linear", "norm"})
    fast_kinds = kinds

    @classmethod
    def fits(cls, config, site):
        return site.bias


class UBitFit(PrunedBias, name="u_bitfit"):
    """b'[i] = b[i] + d, the entries of biases of largest |d dL/dd| over all layers: the others are pruned while training.

    What is trained, optimised and saved in the end is the values at the indices that are left.
    """

    ragged = frozenset({"index", "d"})
    index: Tensor = fixed("d_out", every)
    d: Tensor = param("d_out")

    def units(self, scores):
        return {"d": (scores["d"], 1)}

    def parts(self, kept):
        return {"index": kept["d"], "d": kept["d"]}

    def anew(self):
        return {"d": torch.zeros_like(self.d)}

    def check_ragged(self, tensors):
        check_entries(tensors, "index", "d", self.site.d_out)

    def spread(self):
        """d at its entries, 0 elsewhere."""
        return self.d.new_zeros(self.site.d_out).index_add(0, self.index, self.d)

    def fold(self, weight, bias):
        return weight, bias + self.spread()

    def post(self, y, x):
        return y + self.spread() if self.d.numel() else y


class SBitFit(Groups, PrunedBias, name="s_bitfit"):
    """b' = b + d, the bias vectors of largest mean |d dL/dd|: the others are pruned as a whole while training.

    Vectors are taken in the order of their scores, each that still fits the budget, one at least.
    """

    groups = {"vector": {"d": None}}
    d: Tensor = param("d_out")

    def fold(self, weight, bias):
        return weight, bias + self.d if self.d.numel() else bias

    def post(self, y, x):
        return y + self.d if self.d.numel() else y
