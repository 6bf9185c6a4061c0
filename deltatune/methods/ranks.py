"""Low-rank updates whose rank moves while training."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import normal
from ..core.method import Method, param
from ..core.schedule import Schedule, ride
from ..core.sharded import assign, whole
from ..kernels.lora import low_rank


class Allocator(Schedule):
    """Keeps the triplets (e_i, A_i, B_i) of largest importance, over all sites, within a budget that falls by a cubic.

    Importance is |p dL/dp|, smoothed, times its smoothed deviation; a triplet's is that of e_i plus the means over A_i and
    B_i. Its budget falls from all to `target` a site between `warmup` and the `final` steps; from there on the kept ones stay.
    A masked e_i is set to 0 and not frozen: until the next masking it may grow back.
    """

    has_penalty = True

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.sites = {key: d for key, d in self.adapter.deltas.items() if isinstance(d, AdaLoRA)}
        self.config = next(iter(self.sites.values())).config
        self.warmup, self.final = (_steps(n, n_steps) for n in (self.config.warmup, self.config.final))
        if self.warmup + self.final >= n_steps:
            raise ValueError(
                f"adalora: warmup = {self.warmup} and final = {self.final} leave no step of {n_steps} to prune in"
            )
        self.total = sum(d.e.numel() for d in self.sites.values())
        self.target = min(self.config.target * len(self.sites), self.total)
        for d in self.sites.values():  # the mean over both factors of all sites, once a step
            d.orth_now = self.config.orth / (2 * len(self.sites) * n_micro)
        if not hasattr(self, "smooth"):
            self.smooth = {n: torch.zeros_like(p) for n, p in self._tensors()}
            self.spread = {n: torch.zeros_like(p) for n, p in self._tensors()}
            self.kept = {}

    def _tensors(self):
        return [
            (f"{path}|{site}|{k}", getattr(d, k)) for (path, site), d in self.sites.items() for k in ("a", "b", "e")
        ]

    def budget(self, step):
        """How many triplets may live after step `step`."""
        if step <= self.warmup:
            return self.total
        if step > self.n_steps - self.final:
            return self.target
        left = 1 - (step - self.warmup) / (self.n_steps - self.final - self.warmup)
        return int((self.total - self.target) * left**3 + self.target)

    @torch.no_grad()
    def after_step(self, step):
        last = self.n_steps - self.final
        if step < last:
            self._look(step)
        if step == last or self.warmup < step < last and step % self.config.interval == 0:
            self._mask(self.budget(step))
        elif step > last:
            self._keep()

    def _look(self, step):
        """The smoothed importance and its deviation, of all tensors in a few launches."""
        named = self._tensors()
        for name, p in named:
            if p.grad is None:
                raise ValueError(f"adalora: {name.replace('|', '.')} has no gradient at step {step}; nothing ran it")
        smooth, spread = ([held[n] for n, _ in named] for held in (self.smooth, self.spread))
        now = torch._foreach_abs(torch._foreach_mul([p.detach() for _, p in named], [p.grad for _, p in named]))
        torch._foreach_mul_(smooth, self.config.beta1)
        torch._foreach_add_(smooth, now, alpha=1 - self.config.beta1)
        away = torch._foreach_abs(torch._foreach_sub(now, smooth))
        torch._foreach_mul_(spread, self.config.beta2)
        torch._foreach_add_(spread, away, alpha=1 - self.config.beta2)

    def _mask(self, budget):
        """Zero every e_i but those of the `budget` most important triplets; ties at the edge all go."""
        score = {n: whole(s) * whole(self.spread[n]) for n, s in self.smooth.items()}
        of = {
            (path, site): score[f"{path}|{site}|e"]
            + score[f"{path}|{site}|a"].mean(1)
            + score[f"{path}|{site}|b"].mean(0)
            for path, site in self.sites
        }
        if budget < self.total:
            edge = torch.cat([s.cpu() for s in of.values()]).kthvalue(self.total - budget).values
            self.kept = {key: s.cpu() > edge for key, s in of.items()}
            self._keep()

    def _keep(self):
        for key, kept in self.kept.items():
            e = self.sites[key].e
            assign(e, whole(e).where(kept.to(e.device), 0.0))

    def end(self):
        for d in self.sites.values():
            d.orth_now = 0.0

    def state_dict(self):
        kept = {f"{path}|{site}": k for (path, site), k in self.kept.items()}
        parts = {"smooth": self.smooth, "spread": self.spread}
        return (
            super().state_dict() | {k: {n: whole(t) for n, t in v.items()} for k, v in parts.items()} | {"kept": kept}
        )

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = {f"{path}|{site}|{k}": getattr(d, k) for (path, site), d in self.adapter.deltas.items()
                for k in ("a", "b", "e") if isinstance(d, AdaLoRA)}  # fmt: skip
        if here.keys() != state["smooth"].keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved allocator is of other sites")
        self.smooth, self.spread = ({n: torch.zeros_like(p) for n, p in here.items()} for _ in range(2))
        for part, own in (("smooth", self.smooth), ("spread", self.spread)):
            for name, value in state[part].items():
                assign(own[name], value)
        self.kept = {tuple(key.split("|")): kept for key, kept in state["kept"].items()}


def _steps(n, n_steps):
    """A number of steps, or where below 1 a share of all."""
    return int(n * n_steps) if n < 1 else int(n)


class AdaLoRA(Method, name="adalora"):
    """W' = W + (alpha / r) B diag(e) A, e = 0 at the start; the least important triplets are pruned while training.

    A and B are pulled towards orthogonal rows and columns: + orth mean(|A A^T - I|, |B^T B - I|).
    """

    paper = "2303.10512"
    category = "reparameterized"
    where = "all-linear"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    limits = {"r": "min(d_in,d_out)"}
    lr = (3e-4, 2e-2)
    schedule = Allocator
    r: int = 12  # rank at the start
    target: int = 8  # mean rank at the end
    alpha: float = 16.0  # scale of the update, divided by the rank at the start
    warmup: float = 0.1  # steps before the first pruning; below 1 a share of all
    final: float = 0.3  # steps at the end with the kept ranks; below 1 a share of all
    interval: int = 10  # steps from one pruning to the next
    beta1: float = 0.85  # smoothing of the importance
    beta2: float = 0.85  # smoothing of its deviation
    orth: float = 0.1  # weight of the orthogonality penalty
    dropout: float = 0.0  # share of the update's inputs that is dropped while training
    a: Tensor = param("r d_in", normal(0.02))
    e: Tensor = param("r")
    b: Tensor = param("d_out r", normal(0.02))

    orth_now: ClassVar[float] = 0.0  # of one site and backward pass, while its schedule runs

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key, least in {"target": 1, "interval": 1, "warmup": 0, "final": 0, "orth": 0}.items():
            if getattr(config, key) < least:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least {least}")
        for key in ("beta1", "beta2"):
            if not 0 < getattr(config, key) < 1:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must lie between 0 and 1")
        return config

    @property
    def scale(self):
        return self.alpha / (self.r + 1e-5)

    @property
    def rank(self):
        """How many triplets live."""
        return int((whole(self.e) != 0).sum())

    @property
    def gates(self):
        """e; while training its gradient brings the penalty's along, in fp32."""
        if not (self.orth_now and torch.is_grad_enabled()):
            return self.e
        with torch.autocast(self.a.device.type, enabled=False):
            eye = torch.eye(self.r, dtype=self.a.dtype, device=self.a.device)
            return ride(self.e, (self.a @ self.a.t() - eye).norm() + (self.b.t() @ self.b - eye).norm(), self.orth_now)

    def fold(self, weight, bias):
        return weight + self.scale * (self.b * self.gates) @ self.a, bias

    def post(self, y, x):
        h = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        return y + self.scale * F.linear(h * self.gates, self.b)

    def linear(self, x, base):
        dropped = F.dropout(x, self.dropout, self.training)
        return low_rank(base, x, dropped, self.a * self.gates[:, None], self.b, self.scale)
