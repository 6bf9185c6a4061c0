"""Low-rank updates that move on: what was learned goes into the weight, and the factors learn from there.

The base itself keeps every bit: the weight's change is held beside the factors, as factors where it is of low rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import zeros
from ..core.method import fixed
from ..core.ragged import refill
from ..core.schedule import Schedule
from ..core.sharded import assign, whole
from ..kernels.lora import add_low_rank, low_rank
from .lora import LowRank


class Start(Schedule):
    """Notes A and B behind step `start`, counted from 0: from there on the weight follows."""

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.sites = [d for d in self.adapter.deltas.values() if isinstance(d, DeltaLoRA)]

    @torch.no_grad()
    def after_step(self, step):
        for d in self.sites:
            start = int(d.start * self.n_steps) if d.start < 1 else int(d.start)
            if step == start:
                refill(d, "a0", whole(d.a).clone())
                refill(d, "b0", whole(d.b).clone())


class DeltaLoRA(LowRank, name="delta_lora"):
    """W' = W + s B A + ratio s (B A - B0 A0), s = alpha / r; A0, B0 are A, B behind step `start`, no gradient in ().

    The paper adds ratio s (B A - what it was) to W after each later step: of that sum only the first and last product
    are left. There is no dropout, as in the paper.
    """

    paper = "2309.02411"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    ragged = frozenset({"a0", "b0"})
    lr = (1e-4, 1e-2)
    schedule = Start
    ratio: float = 2.0  # how far the weight moves in multiples of the update
    start: float = 500.0  # step behind which it begins to; below 1 a share of all
    a0: Tensor = fixed("r d_in", zeros)
    b0: Tensor = fixed("d_out r", zeros)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.dropout:
            raise ValueError(f"{cls.name}: dropout = {config.dropout}, but the weight follows the update without it")
        for key in ("ratio", "start"):
            if getattr(config, key) < 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 0")
        return config

    def build(self, base, dtype):
        super().build(base, dtype)
        _empty(self, "a0", "b0")

    def check_ragged(self, tensors):
        _check_factors(self, tensors["a0"], tensors["b0"])

    def factors(self):
        """A and B of the update and of what the weight moved by, one behind the other."""
        if not len(self.a0):
            return self.a, self.b
        a = torch.cat([self.a, self.a.detach(), self.a0])
        return a, torch.cat([self.b, self.ratio * self.b.detach(), -self.ratio * self.b0], 1)

    def fold(self, weight, bias):
        a, b = self.factors()
        return weight + self.scale * (b @ a), bias

    def post(self, y, x):
        a, b = self.factors()
        return y + self.scale * F.linear(F.linear(x, a), b)

    def linear(self, x, base):
        return low_rank(base, x, x, *self.factors(), self.scale)


class Unload(Schedule):
    """At the end of each of `stages` equal parts of the run but the last the product goes into the weight.

    With `momentum` m the share 1 - m goes and B keeps m times itself; with 0 A is new, by the adapter's seed, the
    step and the site. Moments begin anew; the learning rate keeps the run's own course.
    """

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer = optimizer
        self.sites = [d for d in self.adapter.deltas.values() if isinstance(d, PeriodicLoRA)]

    @torch.no_grad()
    def after_step(self, step):
        for at, d in enumerate(self.sites):
            if step + 1 in {k * self.n_steps // d.stages for k in range(1, d.stages)} - {self.n_steps}:
                self._unload(d, (self.adapter.seed * 1_000_003 + step) * 8191 + at)

    def _unload(self, d, seed):
        a, b = whole(d.a), whole(d.b)
        d.take((1 - d.momentum) * d.scale * b, a)
        assign(d.b, d.momentum * b)
        if not d.momentum:
            new = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed % 2**63))
            assign(d.a, ((2 * new - 1) / d.site.d_in**0.5).to(a.device, a.dtype))
        for p in (d.a, d.b):
            self.optimizer.state.pop(p, None)


class PeriodicLoRA(LowRank, name="periodic_lora"):
    """W' = W + U D + s B A, s = alpha / r; at the end of a stage of training U and D take s B A over, B begins at 0.

    U and D grow by r each time; where they would be larger than the layer, U is their product itself and D is empty.
    """

    paper = "2402.16141"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    ragged = frozenset({"up", "down"})
    lr = (1e-4, 1e-2)
    schedule = Unload
    stages: int = 4  # equal parts of the run
    momentum: float = 0.0  # share of the product that stays in the factors
    down: Tensor = fixed("r d_in", zeros)
    up: Tensor = fixed("d_out r", zeros)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.stages < 1:
            raise ValueError(f"{cls.name}: stages = {config.stages}, but it must be at least 1")
        if not 0 <= config.momentum < 1:
            raise ValueError(f"{cls.name}: momentum = {config.momentum}, but it must lie between 0 and 1")
        return config

    def build(self, base, dtype):
        super().build(base, dtype)
        _empty(self, "down", "up")

    def check_ragged(self, tensors):
        down, up = tensors["down"], tensors["up"]
        if tuple(up.shape) != (self.site.d_out, self.site.d_in) or len(down):
            _check_factors(self, down, up)

    @property
    def dense(self):
        """Is what was unloaded kept as one matrix?"""
        return not len(self.down) and self.up.shape[1] > 0

    def take(self, b, a):
        """Add b a, (O, r) and (r, I), to what was unloaded."""
        if self.dense:
            refill(self, "up", self.up + b @ a)
            return
        up, down = torch.cat([self.up, b], 1), torch.cat([self.down, a])
        if up.numel() + down.numel() > self.site.d_out * self.site.d_in:
            up, down = up @ down, down[:0]
        refill(self, "up", up)
        refill(self, "down", down)

    def fold(self, weight, bias):
        moved = self.up if self.dense else self.up @ self.down
        return weight + moved + self.scale * (self.b @ self.a), bias

    def post(self, y, x):
        y = y + self.scale * F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.a), self.b)
        return y + (F.linear(x, self.up) if self.dense else F.linear(F.linear(x, self.down), self.up))

    def linear(self, x, base):
        y = low_rank(base, x, F.dropout(x, self.dropout, self.training), self.a, self.b, self.scale)
        if self.dense:
            return y + F.linear(x, self.up)
        return add_low_rank(y, x, self.down, self.up, 1.0) if len(self.down) else y


def _empty(delta, down, up):
    """No factors yet."""
    refill(delta, down, getattr(delta, down)[:0])
    refill(delta, up, getattr(delta, up)[:, :0])


def _check_factors(delta, down, up):
    if down.ndim != 2 or up.ndim != 2 or (down.shape[1], up.shape[0]) != (delta.site.d_in, delta.site.d_out):
        raise ValueError(
            f"{tuple(up.shape)} and {tuple(down.shape)} are no factors of ({delta.site.d_out}, {delta.site.d_in})"
        )
    if up.shape[1] != len(down):
        raise ValueError(f"the factors {tuple(up.shape)} and {tuple(down.shape)} do not fit each other")
