"""LoRA of which a part does not train: matrices that freeze one after the other, or a random half of the entries."""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import shapes
from ..core.inits import constant, kaiming, uniform
from ..core.method import Method, fixed, param
from ..core.schedule import Schedule
from ..core.sharded import whole
from ..kernels.lora import low_rank
from .lora import LoRA, LowRank


class Freezing(Schedule):
    """Freezes the matrices A and B of all sites one after the other, those that are trained least first.

    The score of an entry is its |gradient|, averaged over `window` steps and smoothed, times its smoothed deviation.
    Every `window` steps between `warmup` and the `final` ones, and then at each, a matrix freezes whose mean score lies
    below the quantile 1 - c of the entries of all that train, c the cube of the share of the time that is left, 0 in
    the final steps.
    """

    def __init__(self, adapter):
        super().__init__(adapter)
        self.frozen, self.now, self.smooth, self.spread = [], {}, {}, {}

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.sites = _sites(self.adapter)
        self.config = self.common(self.sites.values(), "warmup", "final", "window", "beta1", "beta2", "square_frozen")
        self.warmup, self.final = (
            int(n * n_steps) if n < 1 else int(n) for n in (self.config.warmup, self.config.final)
        )
        if self.config.square_frozen:
            for key, d in self.sites.items():
                if d.site.d_in == d.site.d_out and f"{key}|a" not in self.frozen:
                    self.frozen += [f"{key}|a", f"{key}|b"]
        self._sleep()

    def share(self, step):
        """What share of the scores may train on, and whether anything freezes now."""
        if step <= self.warmup:
            return 1.0, False
        if step > self.n_steps - self.final:
            return 0.0, True
        left = 1 - (step - self.warmup) / (self.n_steps - self.final - self.warmup)
        return left**3, step % self.config.window == 0

    def _training(self):
        named = {f"{key}|{k}": getattr(d, k) for key, d in self.sites.items() for k in ("a", "b")}
        return {name: p for name, p in named.items() if name not in self.frozen}

    @torch.no_grad()
    def before_step(self, step):
        training = self._training()
        for name, p in training.items():
            if p.grad is None:
                raise ValueError(f"aflora: {name.replace('|', '.')} has no gradient at step {step}; nothing ran it")
            self._look(name, p, step)
        share, freezes = self.share(step)
        if freezes and training:
            self._freeze(training, share)
        for key, d in self.sites.items():
            for k in ("a", "b"):
                if f"{key}|{k}" in self.frozen:
                    getattr(d, k).grad = None  # then no optimiser moves it

    def _look(self, name, p, step):
        now = (whole(p).sign() * whole(p.grad)).abs()
        turn = step % self.config.window
        if turn:
            self.now[name] = (self.now[name] * turn + now) / (turn + 1)
            return
        past = self.now.get(name, torch.zeros_like(now))
        beta1, beta2 = self.config.beta1, self.config.beta2
        self.smooth[name] = beta1 * self.smooth.get(name, torch.zeros_like(now)) + (1 - beta1) * past
        away = (past - self.smooth[name]).abs()
        self.spread[name] = beta2 * self.spread.get(name, torch.zeros_like(now)) + (1 - beta2) * away
        self.now[name] = now

    def _freeze(self, training, share):
        score = {name: self.smooth[name] * self.spread[name] for name in training}
        every = torch.cat([s.flatten().cpu() for s in score.values()])
        at = int(every.numel() * (1 - share))
        if at < 1:
            return
        edge = float(every.kthvalue(at).values)
        for name in [name for name, s in score.items() if float(s.mean()) < edge]:
            self.frozen.append(name)
            for held in (self.now, self.smooth, self.spread):
                del held[name]
        self._sleep()

    def _sleep(self):
        """What is frozen has no backward; DDP wants one of all."""
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (there and torch.distributed.get_world_size() > 1):
            for key, d in self.sites.items():
                d.frozen = "".join(k for k in ("a", "b") if f"{key}|{k}" in self.frozen)

    def end(self):
        for d in self.sites.values():
            d.frozen = ""

    def state_dict(self):
        held = {"now": self.now, "smooth": self.smooth, "spread": self.spread}
        return super().state_dict() | {"frozen": list(self.frozen)} | {k: dict(v) for k, v in held.items()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = {f"{key}|{k}": getattr(d, k) for key, d in _sites(self.adapter).items() for k in ("a", "b")}
        if not {*state["frozen"], *state["smooth"]} <= here.keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved freezing is of other sites")
        self.frozen = list(state["frozen"])
        self.now, self.smooth, self.spread = (
            {name: value.to(here[name].device) for name, value in state[part].items()}
            for part in ("now", "smooth", "spread")
        )


def _sites(adapter):
    return {f"{path}|{site}": d for (path, site), d in adapter.deltas.items() if isinstance(d, AFLoRA)}


def he(shape, **_):
    """U(-sqrt(6 / fan_in), sqrt(6 / fan_in))"""
    return nn.init.kaiming_uniform_(torch.empty(shape))


class AFLoRA(Method, name="aflora"):
    """W' = W + diag(e) B diag(d) A, e = 0 and d = 0.1 at the start; A and B freeze one after the other while training.

    The vectors e and d train to the end. There is no scale.
    """

    paper = "2403.13269"
    category = "reparameterized"
    where = "all-linear"
    limits = {"r": "min(d_in,d_out)"}
    lr = (1e-3, 3e-2)
    schedule = Freezing
    r: int = 4  # rank
    warmup: float = 0.05  # steps before anything freezes; below 1 a share of all
    final: float = 0.7  # steps at the end in which the rest freezes; below 1 a share of all
    window: int = 10  # steps that a score is averaged over, and from one freezing to the next
    beta1: float = 0.85  # smoothing of the score
    beta2: float = 0.95  # smoothing of its deviation
    square_frozen: bool = True  # matrices of square layers (attention's) are frozen from the start
    dropout: float = 0.0  # share of the update's inputs that is dropped while training
    a: Tensor = param("r d_in", he)
    d: Tensor = param("r", constant(0.1))
    b: Tensor = param("d_out r", he)
    e: Tensor = param("d_out")

    frozen: ClassVar[str] = ""  # which of a and b have no backward, while its schedule runs

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key, least in {"window": 1, "warmup": 0, "final": 0}.items():
            if getattr(config, key) < least:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least {least}")
        for key in ("beta1", "beta2"):
            if not 0 < getattr(config, key) < 1:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must lie between 0 and 1")
        return config

    @property
    def asleep(self):
        """Is there a tensor that gets no gradient now?"""
        return bool(self.frozen) and self.training

    def factors(self):
        """diag(d) A and diag(e) B; no gradient for what is frozen."""
        a = self.a.detach() if "a" in self.frozen else self.a
        b = self.b.detach() if "b" in self.frozen else self.b
        return a * self.d[..., None], b * self.e[..., None]

    def fold(self, weight, bias):
        a, b = self.factors()
        return weight + b @ a, bias

    def post(self, y, x):
        a, b = self.factors()
        return y + F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b)

    def linear(self, x, base):
        return low_rank(base, x, F.dropout(x, self.dropout, self.training), *self.factors(), 1.0)


def drawn(size):
    """Random positions, ascending, of as many entries as a dimension in the language of shapes says."""

    def init(shape, *, delta, **_):
        (n,) = shapes.sizes(size, delta.dims(None))
        return torch.randperm(n)[: shape[0]].sort().values.to(torch.int32)

    return init


class LoRASP(LowRank, name="lora_sp"):
    """W' = W + (alpha / r) B A, B = 0 at the start; of A and of B a random share of the entries is frozen as it starts.

    Only the others, `a` and `b`, are trained and have moments. What is saved is a LoRA.
    """

    paper = "2403.08822"
    keep: float = 0.5  # share of the entries that train
    a0: Tensor = fixed("r d_in", kaiming)
    at_a: Tensor = fixed("n_a", drawn("r*d_in"))
    at_b: Tensor = fixed("n_b", drawn("r*d_out"))
    a: Tensor = param("n_a", uniform("d_in"))
    b: Tensor = param("n_b")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        return config

    def dims(self, base):
        dims = super().dims(base)
        return dims | {
            f"n_{k}": max(1, round(self.keep * self.r * dims[d])) for k, d in (("a", "d_in"), ("b", "d_out"))
        }

    def factors(self):
        """A (r, I) and B (O, r), the trained entries in their places."""
        a = self.a0.flatten(-2).scatter(-1, self.at_a.long(), self.a).view_as(self.a0)
        lead = self.b.shape[:-1]
        b = self.b.new_zeros(*lead, self.site.d_out * self.r).scatter(-1, self.at_b.long(), self.b)
        return a, b.view(*lead, self.site.d_out, self.r)

    def fold(self, weight, bias):
        a, b = self.factors()
        return weight + self.scale * (b @ a), bias

    def post(self, y, x):
        a, b = self.factors()
        return y + self.scale * F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b)

    def linear(self, x, base):
        return low_rank(base, x, F.dropout(x, self.dropout, self.training), *self.factors(), self.scale)

    def finished(self, leaf):
        given = {key: getattr(leaf.config, key) for key in ("r", "alpha", "power", "dropout")}
        flat = replace(leaf.changed(keep=leaf.config.keep), method=LoRA, config=LoRA.configure(**given))
        return flat, dict(zip("ab", self.factors(), strict=True))
