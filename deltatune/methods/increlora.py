"""A rank that grows while training, where the update's change matters most."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import normal
from ..core.method import Method, param
from ..core.ragged import refill
from ..core.refold import linear as refolded
from ..core.refold import plain_autograd
from ..core.schedule import Schedule, ride
from ..kernels.lora import low_rank

RESERVE = 1e-5  # e of the triplets that train in advance


class Growth(Schedule):
    """Gives `add` triplets to each of the `top` sites of largest importance, every `interval` steps, up to the target.

    A site's importance is sum |dW o dL/d(dW)| / sqrt(d_out d_in), smoothed, times its smoothed deviation. dL/d(dW) is
    as large as the layer: it lives while the layer's backward runs, and with several backward passes of a step until the
    last of them. Each site trains the A and B of `add` triplets in advance; those that wait at the end go. Where a site
    grows its moments begin anew.
    """

    has_penalty = True
    resizes = True

    def __init__(self, adapter):
        super().__init__(adapter)
        self.smooth, self.spread = {}, {}

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer, self.sites = optimizer, _sites(self.adapter)
        alike = ("target", "add", "top", "warmup", "interval", "beta1", "beta2", "orth")
        self.config = self.common(self.sites.values(), *alike)
        self.target = self.config.target * len(self.sites)
        warmup, interval = (int(n * n_steps) if n < 1 else int(n) for n in (self.config.warmup, self.config.interval))
        self.warmup, self.interval = warmup, max(interval, 1)
        for d in self.sites.values():
            d.orth_now = self.config.orth / (2 * len(self.sites) * n_micro)
            d.watch = Watch(n_micro > 1) if self.total < self.target else None

    @property
    def total(self):
        """How many triplets live, over all sites."""
        return sum(d.e.numel() for d in self.sites.values())

    @torch.no_grad()
    def before_step(self, step):
        if self.total >= self.target:
            return
        for key, d in self.sites.items():
            now = d.watch.score(d, step)
            smooth = self.config.beta1 * self.smooth.get(key, 0.0) + (1 - self.config.beta1) * now
            away = (now - smooth).abs()
            self.smooth[key] = smooth
            self.spread[key] = self.config.beta2 * self.spread.get(key, 0.0) + (1 - self.config.beta2) * away

    @torch.no_grad()
    def after_step(self, step):
        if self.total >= self.target:
            return
        if step == 0:
            for key in self.sites:
                self._reserve(key, step)
        if step > self.warmup and step % self.interval == 0:
            self._grow(step)
        if step + 1 == self.n_steps:
            self._finish()

    def _grow(self, step):
        """Those at or above the edge, so that with ties it is more than `top` that grow."""
        score = {key: float(self.smooth[key] * self.spread[key]) for key in self.sites}
        edge = sorted(score.values(), reverse=True)[: min(self.config.top, self.target - self.total)][-1]
        for key in [key for key, s in score.items() if s >= edge]:
            d = self.sites[key]
            refill(d, "e", torch.cat([d.e, d.e.new_full((len(d.a) - len(d.e),), RESERVE)]))
            self._reserve(key, step)
        if self.total >= self.target:
            self._finish()

    def _reserve(self, key, step):
        """`add` new triplets behind those of the site, drawn by the adapter's seed, the step and the site."""
        d, at = self.sites[key], list(self.sites).index(key)
        generator = torch.Generator().manual_seed(((self.adapter.seed * 1_000_003 + step) * 8191 + at) % 2**63)
        for name, dim in (("a", 0), ("b", 1)):
            old = getattr(d, name)
            shape = [self.config.add if i == dim else n for i, n in enumerate(old.shape)]
            new = 0.02 * torch.randn(shape, generator=generator)
            refill(d, name, torch.cat([old, new.to(old.device, old.dtype)], dim))
        self._forget(d)

    def _finish(self):
        """Without those that wait, and without looking on."""
        for d in self.sites.values():
            d.watch = None
            if len(d.a) > len(d.e):
                refill(d, "a", d.a[: len(d.e)].clone())
                refill(d, "b", d.b[:, : len(d.e)].clone())
                self._forget(d)

    def _forget(self, d):
        for p in d.parameters():
            self.optimizer.state.pop(p, None)

    @torch.no_grad()
    def end(self):
        self._finish()
        for d in self.sites.values():
            d.orth_now = 0.0

    def state_dict(self):
        return super().state_dict() | {"smooth": dict(self.smooth), "spread": dict(self.spread)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = _sites(self.adapter)
        if not state["smooth"].keys() <= here.keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved importance is of other sites")
        self.smooth, self.spread = (
            {key: value.to(here[key].e.device) for key, value in state[part].items()} for part in ("smooth", "spread")
        )


def _sites(adapter):
    return {f"{path}|{site}": d for (path, site), d in adapter.deltas.items() if isinstance(d, IncreLoRA)}


class Watch:
    """The importance of one site in one step, from the gradients of its dW in all the times that it ran."""

    def __init__(self, gathers):
        self.gathers, self.found = gathers, None  # gathers: several backward passes make a step

    def __call__(self, change, grad):
        found = grad.detach() if self.gathers else _importance(change, grad)
        self.found = found if self.found is None else self.found + found

    def score(self, d, step):
        found, self.found = self.found, None
        if found is None:
            raise ValueError(f"increlora: {d.site.name} has no gradient at step {step}; nothing ran it")
        return _importance(d.change(), found) if self.gathers else found


def _importance(change, grad):
    exact = torch.promote_types(grad.dtype, torch.float32)
    return (change * grad).abs().sum(dtype=exact) / grad.numel() ** 0.5


class IncreLoRA(Method, name="increlora"):
    """W' = W + (alpha / r) B diag(e) A, e = 0 at the start; r, a site's own, grows where training needs it most.

    A and B are pulled towards orthogonal rows and columns: + orth mean(|A A^T - I|, |B^T B - I|). Where a model runs one layer
    several times (ALBERT) its penalty counts as often.
    """

    paper = "2308.12043"
    category = "reparameterized"
    where = "all-linear"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    ragged = frozenset({"a", "e", "b"})
    limits = {"r": "min(d_in,d_out)"}
    lr = (3e-4, 2e-2)
    schedule = Growth
    r: int = 1  # rank at the start
    target: int = 2  # mean rank at the end
    add: int = 1  # triplets that a site gains at once; the paper's code takes half of the target
    top: int = 5  # sites that gain at once
    alpha: float = 16.0  # scale of the update, divided by the site's rank
    warmup: float = 0.05  # steps before the first growth; below 1 a share of all
    interval: float = 0.02  # steps from one growth to the next; below 1 a share of all
    beta1: float = 0.85  # smoothing of the importance
    beta2: float = 0.85  # smoothing of its deviation
    orth: float = 0.1  # weight of the orthogonality penalty
    dropout: float = 0.0  # share of the update's inputs that is dropped while training
    a: Tensor = param("rank d_in", normal(0.02))
    e: Tensor = param("rank")
    b: Tensor = param("d_out rank", normal(0.02))

    orth_now: ClassVar[float] = 0.0  # of one site and backward pass, while its schedule runs
    watch: ClassVar[Watch | None] = None  # while its schedule looks for where to grow

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key, least in {"target": 1, "add": 1, "top": 1, "interval": 0, "warmup": 0, "orth": 0}.items():
            if getattr(config, key) < least:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least {least}")
        for key in ("beta1", "beta2"):
            if not 0 < getattr(config, key) < 1:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must lie between 0 and 1")
        return config

    def build(self, base, dtype):
        super().build(base, dtype)
        if self.r > self.target:
            raise ValueError(f"r = {self.r} at the start, but the mean at the end is target = {self.target}")

    def dims(self, base):
        there = self._parameters.get("e")
        return super().dims(base) | {"rank": self.r if there is None else there.numel()}

    def check_ragged(self, tensors):
        a, e, b = (tensors[key] for key in "aeb")
        sizes = (self.site.d_in, self.site.d_out)
        if a.ndim != 2 or e.ndim != 1 or b.ndim != 2 or (a.shape[1], b.shape[0]) != sizes:
            raise ValueError(
                f"a {tuple(a.shape)}, e {tuple(e.shape)} and b {tuple(b.shape)} do not fit the layer {sizes}"
            )
        if not 1 <= len(e) <= len(a) == b.shape[1]:
            raise ValueError(f"a {tuple(a.shape)}, e {tuple(e.shape)} and b {tuple(b.shape)} are no list of triplets")

    def rows(self):
        """(alpha / r) diag(e) A, behind it the reserve's; while training their gradient brings the penalty's along."""
        e, a = self.e, self.a
        if len(a) > len(e):
            e = torch.cat([e, e.new_full((len(a) - len(e),), RESERVE)])
        if self.orth_now and torch.is_grad_enabled():
            own = self.exact
            with torch.autocast(own.a.device.type, enabled=False):
                eye = torch.eye(len(own.a), dtype=own.a.dtype, device=own.a.device)
                a = ride(a, (own.a @ own.a.t() - eye).norm() + (own.b.t() @ own.b - eye).norm(), self.orth_now)
        return a * (self.alpha / (len(self.e) + 1e-5) * e)[:, None]

    def change(self):
        """dW (O, I), whose gradient is looked at while the rank may grow."""
        change = self.b @ self.rows()
        if self.exact.watch is not None and change.requires_grad:
            change.register_hook(partial(self.exact.watch, change.detach()))
        return change

    def fold(self, weight, bias):
        return weight + self.change(), bias

    def linear(self, x, base):
        dropped = F.dropout(x, self.dropout, self.training)
        if self.exact.watch is None or not torch.is_grad_enabled():
            return low_rank(base, x, dropped, self.rows(), self.b, 1.0)
        if not plain_autograd(x):
            return base(x) + F.linear(dropped, self.change())
        return base(x) + refolded(dropped, lambda: (self.change(), None), [self.exact])
