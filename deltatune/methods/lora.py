"""Low-rank updates: W' = W + s B A and its relatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, row_norm, row_square
from ..core.method import Method, fixed, param
from ..kernels.lora import low_rank


class LowRank(Method):
    """The common part: two factors, and a scale alpha / r^power."""

    category = "reparameterized"
    where = "q,v"
    limits = {"r": "min(d_in,d_out)"}
    lr = (3e-4, 2e-2)
    r: int = 8  # rank
    alpha: float = 16.0  # scale of the update, divided by r^power
    power: float = 1.0  # 1 is LoRA's alpha / r, 0.5 rsLoRA's alpha / sqrt(r) (2312.03732)
    dropout: float = 0.0  # share of the update's inputs that is dropped while training
    a: Tensor = param("r d_in", kaiming)
    b: Tensor = param("d_out r")

    @property
    def scale(self):
        return self.alpha / self.r**self.power


class LoRA(LowRank, name="lora"):
    """W' = W + (alpha / r) B A, with B = 0 at the start."""

    paper = "2106.09685"
    bias: bool = False  # train the layers' biases too: b' = b + d
    d: Tensor = param("d_out")

    @classmethod
    def slots_of(cls, config):
        return {key: slot for key, slot in cls.slots.items() if key != "d" or config.bias}

    def fold(self, weight, bias):
        if self.bias:
            bias = self.d if bias is None else bias + self.d
        return weight + self.scale * (self.b @ self.a), bias

    def post(self, y, x):
        h = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        y = y + self.scale * F.linear(h, self.b)
        return y + self.d if self.bias else y

    def pair(self):
        return self.a, self.b, self.scale

    def linear(self, x, base):
        own = self.exact  # the operation casts
        y = low_rank(base, x, F.dropout(x, own.dropout, own.training), *own.pair())
        return y + self.d if own.bias else y


class DoRA(LowRank, name="dora"):
    """W' = m (W + s B A) / |W + s B A|, the norm a row's and no part of the gradient; m = |W| at the start.

    Dropout falls on the input of all that training changes, B A and m alike, as in the paper's code. The fast path never
    forms a weight: |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2, and W A^T is the layer's own product with A.
    """

    paper = "2402.09353"
    m: Tensor = param("d_out", row_norm)
    square: Tensor = fixed("d_out", row_square)

    def fold(self, weight, bias):
        weight = weight + self.scale * (self.b @ self.a)
        return weight * (self.m / weight.detach().norm(dim=1))[:, None], bias

    def linear(self, x, base):
        own, y = self.exact, base(x)
        bias = base(x.new_zeros(1, x.shape[-1]))
        with torch.no_grad():
            cross = ((base(self.a) - bias).t().to(own.b.dtype) * own.b).sum(1)
            update = ((own.b @ (own.a @ own.a.t())) * own.b).sum(1)
            norm = (own.square + 2 * self.scale * cross + self.scale**2 * update).clamp_min(0).sqrt()
        ratio = own.m / norm
        dropped = F.dropout(x, self.dropout, self.training)
        plain = (y if dropped is x else base(dropped)) - bias
        h = F.linear(F.linear(dropped, self.a), self.b)
        # (ratio - 1) keeps its digits where the activations are bf16; ratio itself, near 1, would not
        return y + plain * (ratio - 1).to(y.dtype) + h * (self.scale * ratio).to(y.dtype)
