"""Adapters whose matrices are Kronecker products: Compacter behind a sub-layer, KronA beside the MLP."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import constant, normal
from ..core.method import Delta, bank, param
from .bottleneck import Sequential
from .products import KronA


def glorot(shape, **_):
    """U(-b, b) with b^2 = 12 / (m + n) for matrices (m, n): Glorot's with a gain of sqrt(2), as in the paper's code."""
    bound = math.sqrt(12 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound)


def phm(rule, left, right):
    """(O, I), the transpose of sum_i A_i (x) (S_i T_i), from A (n, n, n), S (n, I / n, R) and T (n, R, O / n)."""
    total = torch.einsum("iab,ikr,irp->akbp", rule, left, right)
    return total.flatten(2).flatten(0, 1).t()


class Compacter(Sequential, name="compacter"):
    """y' = y + U f(D y + c) + e, D^T and U^T each a sum_i A_i (x) (S_i T_i), i = 1 .. n; the n x n rules A_i are one for all.

    Behind self-attention and MLP, each before the residual add; near 0 at the start, S_i T_i of rank 1. On the norm that
    ends a block it is adapters' form of it, as Pfeiffer's adapter is. The paper's code trains the base's norms too:
    `dt.Sum(dt.Compacter(), dt.LNTuning())`.
    """

    paper = "2106.04647"
    category = "hybrid"
    where = "attn.o,mlp.down"
    lr = (1e-3, 3e-2)
    exceptions = {"identity": "the paper starts near the identity, the rules at N(0, 0.0001^2), not at it"}
    r: int = 24  # bottleneck width
    n: int = 4  # how many Kronecker products; it divides r and the model's width
    rank: int = 1  # of S_i T_i
    f: Literal["gelu_new", "gelu", "relu", "silu", "tanh"] = "gelu_new"  # activation; gelu_new is gelu by tanh
    rule: Tensor = bank("n n n", normal(1e-4), train=True)
    down_left: Tensor = param("n d_out//n rank", glorot)
    down_right: Tensor = param("n rank r//n", glorot)
    up_left: Tensor = param("n r//n rank", glorot)
    up_right: Tensor = param("n rank d_out//n", glorot)

    @classmethod
    def slots_of(cls, config):
        return {key: slot for key, slot in cls.slots.items() if key not in ("down", "up")}

    def dims(self, base):
        both = math.gcd(self.site.d_out, self.r)
        if self.n < 1 or both % self.n:
            near = min((m for m in range(1, both + 1) if both % m == 0), key=lambda m: (abs(m - self.n), m))
            raise ValueError(f"n = {self.n} must divide r = {self.r} and d_out = {self.site.d_out}, as {near} does")
        return super().dims(base)

    @property
    def down(self):
        return phm(self.rule, self.down_left, self.down_right)

    @property
    def up(self):
        return phm(self.rule, self.up_left, self.up_right)

    def mlp(self, h, dropout=0.0):
        u = F.linear(h, self.down, self.down_bias)
        u = F.gelu(u, approximate="tanh") if self.f == "gelu_new" else getattr(F, self.f)(u)
        return F.linear(u, self.up, self.up_bias)


class CompacterPlus(Compacter, name="compacter++"):
    """Compacter behind the MLP alone; `where="post_norm|block"` is the place that adapters has for it."""

    where = "mlp.down"


class KronARes(KronA, name="krona_res"):
    """y' = y + s (A (x) B) x + s_res x, x what the MLP's first matrix reads: KronA beside the MLP, and a trained residual.

    B = 0 at the start. Where the paper starts s_res we do not know; from 0 the whole starts at the identity.
    """

    category = "hybrid"
    where = "mlp"
    kinds = frozenset({"span"})
    s_res: float = 0.0  # the residual's scale at the start
    residual: Tensor = param("1", constant("s_res"))
    fold = Delta.fold  # beside a whole MLP there is no weight to fold into

    @classmethod
    def fits(cls, config, site):
        return site.layer is not None  # a span over several blocks has no input to be beside

    def post(self, y, x):
        # no super(): this may run on a view that casts. Under autocast x may be wider than y
        return KronA.post(self, y, x) + (self.residual * x).to(y.dtype)
