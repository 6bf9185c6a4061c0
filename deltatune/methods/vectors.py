"""Vectors of the base that move: biases, and the gains of norms."""

from torch import Tensor

from ..core.method import Method, param


class Vectors(Method):
    """The common part: w' = w + g and b' = b + d, with those of g and d that the method has at this site."""

    category = "partial"
    kinds = frozenset({"norm"})
    lr = (3e-4, 1e-2)

    def fold(self, weight, bias):
        if "g" in self._parameters:
            weight = weight + self.g
        if "d" in self._parameters:
            bias = self.d if bias is None else bias + self.d
        return weight, bias


class BitFit(Vectors, name="bitfit"):
    """b' = b + d, the biases of linear layers and norms alone; a linear layer without a bias gets one."""

    paper = "2106.10199"
    where = "linear,norm"
    kinds = frozenset({"linear", "norm"})
    fast_kinds = kinds
    d: Tensor = param("d_out")

    @classmethod
    def fits(cls, config, site):
        return site.kind == "linear" or site.bias  # an RMSNorm has no place for one

    def post(self, y, x):
        return y + self.d


class LNTuning(Vectors, name="ln_tuning"):
    """w' = w + g and b' = b + d, the gains and the biases of norms alone; an RMSNorm has no place for d."""

    paper = "2312.11420"
    where = "norm"
    g: Tensor = param("d_out")
    d: Tensor = param("d_out")

    def build(self, base, dtype):
        super().build(base, dtype)
        if not self.site.bias:
            del self.d

    def dims(self, base):
        return super().dims(base) | {"n_bias": self.site.d_out if self.site.bias else 0}

    @classmethod
    def count(cls):
        return "d_out + n_bias"
