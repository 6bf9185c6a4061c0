"""Deltas that are meant for a quantised base, which `dt.quantise` or `dt.load_base` makes. On every format, the formulas are these."""

import torch.nn.functional as F
from torch import Tensor

from ..core.inits import glorot
from ..core.method import Method, param
from ..kernels.lora import low_rank
from .dylora import DyLoRA
from .lora import LoRA


class QLoRA(LoRA, name="qlora"):
    """W' = dequant(W) + (alpha / r) B A on all linear layers of a base in 4 bits, NF4 with scales quantised again."""

    paper = "2305.14314"
    category = "quantisation"
    where = "linear"
    quantised = "bnb-nf4"
    paged = True
    lr = (5e-5, 2e-3)
    r: int = 64  # rank
    dropout: float = 0.1  # share of the update's inputs that is dropped while training


class QDyLoRA(DyLoRA, name="qdylora"):
    """DyLoRA on a base in 4 bits: one training, then any rank up to r."""

    paper = "2402.10462"
    category = "quantisation"
    where = "linear"
    quantised = "bnb-nf4"
    paged = True
    lr = (5e-5, 2e-3)
    r: int = 64  # rank


class Grouped(Method):
    """The common part: one number of the method for each group of inputs."""

    category = "quantisation"
    where = "linear"
    quantised = "int4"
    group: int = 0  # inputs of a group; 0: the base's own, 32 where it has none

    def dims(self, base):
        size = self.group or getattr(base.module, "group", getattr(base.module, "group_size", 32))
        if size < 1 or self.site.d_in % size:
            raise ValueError(f"group is {size}; it must divide the layer's {self.site.d_in} inputs")
        self.size = size
        return super().dims(base) | {"n_groups": self.site.d_in // size}


class QALoRA(Grouped, name="qa_lora"):
    """y = W x + (alpha / r) B A m(x), m the mean over each group of inputs: a change of W that is constant in a group.

    Where the base has integer codes in the same groups, `adapter.merge(requantise=True)` moves their zeros alone, and the base
    keeps its few bits: z' = z - (alpha / r) B A / (g scale).
    """

    paper = "2309.14717"
    lr = (5e-5, 2e-3)
    r: int = 64  # rank
    alpha: float = 16.0  # scale of the update, divided by r
    dropout: float = 0.0  # share of the update's inputs that is dropped while training
    limits = {"r": "min(d_in,d_out)"}
    a: Tensor = param("r n_groups", glorot)
    b: Tensor = param("d_out r")

    @property
    def scale(self):
        return self.alpha / self.r

    def means(self, x):
        """(..., I / g) of (..., I)"""
        return F.dropout(x, self.dropout, self.training).unflatten(-1, (-1, self.size)).mean(-1)

    def fold(self, weight, bias):
        update = (self.scale / self.size) * (self.b @ self.a)
        return weight + update.repeat_interleave(self.size, -1), bias

    def post(self, y, x):
        return y + self.scale * F.linear(F.linear(self.means(x), self.a), self.b)

    def linear(self, x, base):
        return low_rank(base, x, self.means(x), self.a, self.b, self.scale)


class PEQA(Grouped, name="peqa"):
    """W' = (s + ds) (q - z) on the codes q of a base, with d = ds / s trained, a number for each row and group; 0 at the start.

    `adapter.merge(requantise=True)` moves the scales alone where the base has codes in the same groups.
    """

    paper = "2305.14152"
    lr = (1e-4, 1e-2)
    d: Tensor = param("d_out n_groups")

    def fold(self, weight, bias):
        return weight * (1 + self.d).repeat_interleave(self.size, -1), bias
