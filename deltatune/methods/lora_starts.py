"""LoRA with another start, with another rate of learning, or with a half that stays: the formula is LoRA's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.base import Base
from ..core.inits import kaiming, zeros
from ..core.method import fixed, param
from ..core.schedule import Schedule
from ..core.sharded import assign, whole
from ..kernels.lora import low_rank
from .lora import LoRA, LowRank


class PiSSA(LowRank, name="pissa"):
    """W' = W + s (B A - B0 A0), s B0 A0 the part of W of largest singular values, A = A0 and B = B0 at the start, s = alpha / r.

    The paper trains A and B beside W - s B0 A0; here the base keeps its values, and the start is the identity exactly.
    """

    paper = "2404.02948"
    lr = (2e-5, 5e-3)
    alpha: float = 8.0  # scale of the update, divided by r^power; the paper's is r
    niter: int | None = None  # subspace iterations of the fast, random SVD; None: the exact one
    a0: Tensor = fixed("r d_in", zeros)
    b0: Tensor = fixed("d_out r", zeros)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.niter is not None and config.niter < 0:
            raise ValueError(f"{cls.name}: niter = {config.niter}, but it must be at least 0")
        if config.alpha <= 0:
            raise ValueError(f"{cls.name}: alpha = {config.alpha}, but the start divides by it: it must lie above 0")
        return config

    def build(self, base, dtype):
        super().build(base, dtype)
        n = self.site.n_experts if self.site.kind == "experts" else 0
        each = [self.principal(Base(base.module, base.site, i).weight) for i in range(n)] or [
            self.principal(base.weight)
        ]
        with torch.no_grad():
            for key, values in zip("ab", zip(*each, strict=True), strict=True):
                value = torch.stack(values) if n else values[0]
                getattr(self, key).copy_(value)
                getattr(self, f"{key}0").copy_(value)

    def principal(self, weight):
        """A0 (r, I) and B0 (O, r), equally scaled, whose product times s is the best approximation of `weight` by rank r."""
        if self.niter is None:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            u, s, v = u[:, : self.r], s[: self.r], v[: self.r]
        else:
            u, s, v = torch.svd_lowrank(weight, self.r, niter=self.niter)
            v = v.t()
        root = (s / self.scale).sqrt()
        return root[:, None] * v, u * root

    def fold(self, weight, bias):
        moved = self.b @ (self.a - self.a0) + (self.b - self.b0) @ self.a0
        return weight + self.scale * moved, bias

    def linear(self, x, base):
        """B A - B0 A0 = B (A - A0) + (B - B0) A0: each difference keeps its digits, and is 0 at the start."""
        own, dropped = self.exact, F.dropout(x, self.dropout, self.training)
        b = torch.cat([own.b, own.b - own.b0], 1).to(x.dtype)
        if dropped is x:
            return low_rank(base, x, x, torch.cat([own.a - own.a0, own.a0]).to(x.dtype), b, self.scale)
        h0 = F.linear(x, self.a0)
        return base(x) + self.scale * F.linear(torch.cat([F.linear(dropped, self.a) - h0, h0], -1), b)


class LoRAPlus(LoRA, name="lora_plus"):
    """W' = W + (alpha / r) B A, B = 0 at the start; B's learning rate, and the biases', is `ratio` times A's."""

    paper = "2402.12354"
    lr = (5e-5, 4e-3)
    ratio: float = 16.0  # learning rate of B in multiples of A's, which is the run's
    b: Tensor = param("d_out r", lr="ratio")
    d: Tensor = param("d_out", lr="ratio")


class Corrected(Schedule):
    """g_B' = g_B (A A^T)^-1 / s^2: the gradient of the whole weight that B can follow best, s (g_B' A) nearest to it."""

    @torch.no_grad()
    def before_step(self, step):
        for delta in self.adapter.deltas.values():
            if isinstance(delta, LoRAFA) and delta.corrected and delta.b.grad is not None:
                a = whole(delta.a)
                square = a @ a.mT + 1e-8 * torch.eye(delta.r, dtype=a.dtype, device=a.device)
                grad = torch.linalg.solve(square, whole(delta.b.grad), left=False) / delta.scale**2
                assign(delta.b.grad, grad)


class LoRAFA(LoRA, name="lora_fa"):
    """W' = W + (alpha / r) B A with A random and frozen, B = 0 at the start: A x is kept for the backward, and not x.

    With `corrected` the optimiser gets g_B (A A^T)^-1 / s^2, s = alpha / r, as HF PEFT's optimiser for it has it.
    """

    paper = "2308.03303"
    lr = (3e-4, 2e-2)
    schedule = Corrected
    corrected: bool = False  # the gradient as that of the whole weight, projected
    a: Tensor = fixed("r d_in", kaiming)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.corrected and not config.alpha:
            raise ValueError(f"{cls.name}: alpha = 0 leaves no gradient to correct")
        return config
