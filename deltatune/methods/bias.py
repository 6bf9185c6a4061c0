"""Biases."""

from torch import Tensor

from ..core.method import Method, param


class BitFit(Method, name="bitfit"):
    """b' = b + d, the biases of linear layers and norms alone; a linear layer without a bias gets one."""

    paper = "2106.10199"
    category = "partial"
    where = "linear,norm"
    kinds = frozenset({"linear", "norm"})
    fast_kinds = kinds
    lr = (3e-4, 1e-2)
    d: Tensor = param("d_out")

    @classmethod
    def fits(cls, config, site):
        return site.kind == "linear" or site.bias  # an RMSNorm has no place for one

    def fold(self, weight, bias):
        return weight, self.d if bias is None else bias + self.d

    def post(self, y, x):
        return y + self.d
