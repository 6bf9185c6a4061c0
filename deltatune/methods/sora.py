"""A rank that falls while training: gates between A and B that a proximal step sets to exactly 0."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal
from ..core.method import param
from ..core.schedule import Schedule, ride
from ..core.sharded import assign, whole
from ..kernels.lora import low_rank
from .lora import LowRank


class Threshold(Schedule):
    """g <- sign(g) max(|g| - xi, 0) behind each step; over `stages` equal parts of the run xi goes to the last one."""

    has_penalty = True

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.sites = [d for d in self.adapter.deltas.values() if isinstance(d, SoRA)]
        n_gates = sum(d.g.numel() for d in self.sites)
        for d in self.sites:
            d.l1_now = d.config.l1 / (max(n_gates, 1) * n_micro)

    @torch.no_grad()
    def after_step(self, step):
        for d in self.sites:
            xi = d.xi_at(step, self.n_steps)
            g = whole(d.g)
            assign(d.g, g.sign() * (g.abs() - xi).clamp_min(0))

    def end(self):
        for d in self.sites:
            d.l1_now = 0.0


class SoRA(LowRank, name="sora"):
    """W' = W + (alpha / r) B diag(g) A, B = 0 and g ~ N(0, 1) at the start; gates that nothing holds up become 0.

    The loss gains l1 mean |g| over all gates, and each step is followed by a soft threshold. What is saved has only the
    rows of A and columns of B whose gate is not 0, a number of each site's own. Where a model runs one layer several times
    (ALBERT) its penalty counts as often.
    """

    paper = "2311.11696"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    ragged = frozenset({"a", "g", "b"})
    lr = (3e-4, 2e-2)
    schedule = Threshold
    xi: float = 3e-4  # soft threshold of each step
    last_xi: float | None = None  # its value in the last of the stages; None: it stays
    stages: int = 1  # equal parts of the run, each with a threshold of its own
    l1: float = 10.0  # weight of the gates' mean absolute value in the loss
    a: Tensor = param("rank d_in", kaiming)
    g: Tensor = param("rank", normal(1.0))
    b: Tensor = param("d_out rank")

    l1_now: ClassVar[float] = 0.0  # of one gate and backward pass, while its schedule runs

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key, least in {"xi": 0, "last_xi": 0, "stages": 1, "l1": 0}.items():
            value = getattr(config, key)
            if value is not None and value < least:
                raise ValueError(f"{cls.name}: {key} = {value}, but it must be at least {least}")
        return config

    def dims(self, base):
        there = self._parameters.get("g")
        return super().dims(base) | {"rank": self.r if there is None else there.numel()}

    def check_ragged(self, tensors):
        a, g, b = (tensors[key] for key in "agb")
        want = ((g.numel(), self.site.d_in), (g.numel(),), (self.site.d_out, g.numel()))
        if (tuple(a.shape), tuple(g.shape), tuple(b.shape)) != want:
            raise ValueError(f"a {tuple(a.shape)}, g {tuple(g.shape)} and b {tuple(b.shape)} are no gated rank")

    def xi_at(self, step, n_steps):
        """The threshold behind a step."""
        if self.last_xi is None or self.stages < 2:
            return self.xi
        stage = min(math.floor(step * self.stages / n_steps), self.stages - 1)
        return self.xi + (self.last_xi - self.xi) * stage / (self.stages - 1)

    def rows(self):
        """diag(g) A; while training its gradient brings the penalty's along."""
        g = self.g
        if self.l1_now and torch.is_grad_enabled():
            own = self.exact
            g = ride(g, own.g.abs().sum(), self.l1_now)
        return self.a * g[:, None]

    def fold(self, weight, bias):
        return weight + self.scale * (self.b @ self.rows()), bias

    def post(self, y, x):
        h = F.linear(F.dropout(x, self.dropout, self.training), self.rows())
        return y + self.scale * F.linear(h, self.b)

    def linear(self, x, base):
        return low_rank(base, x, F.dropout(x, self.dropout, self.training), self.rows(), self.b, self.scale)

    def finished(self, leaf):
        kept = self.g != 0
        return leaf, {"a": self.a[kept], "g": self.g[kept], "b": self.b[:, kept]}
