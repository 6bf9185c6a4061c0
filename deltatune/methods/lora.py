"""Low-rank updates: W' = W + s B A and its relatives."""

import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming
from ..core.method import Method, param
from ..kernels.lora import add_low_rank


class LoRA(Method, name="lora"):
    """W' = W + (alpha / r) B A, with B = 0 at the start."""

    paper = "2106.09685"
    category = "reparameterized"
    where = "q,v"
    limits = {"r": "min(d_in,d_out)"}
    lr = (3e-4, 2e-2)
    r: int = 8  # rank
    alpha: float = 16.0  # scale of the update, divided by the rank
    a: Tensor = param("r d_in", kaiming)
    b: Tensor = param("d_out r")

    def fold(self, weight, bias):
        return weight + self.alpha / self.r * (self.b @ self.a), bias

    def post(self, y, x):
        return y + self.alpha / self.r * F.linear(F.linear(x, self.a), self.b)

    def linear(self, x, base):
        return add_low_rank(base(x), x, self.a, self.b, self.alpha / self.r)
