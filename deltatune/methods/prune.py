"""LoRA and pruning at once: heads and MLP channels go while training, and `dt.shrink(adapter)` leaves a smaller model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.base import Base, rows_of
from ..core.inits import ones
from ..core.method import fixed
from ..core.schedule import Schedule
from ..core.sharded import assign, whole
from ..core.shrink import fits, parts_of
from ..kernels.lora import low_rank
from .lora import LowRank


def importance(weight, a, b, grad_a, grad_b, scale, n, reads):
    """(n), the importance of each head or channel of one matrix, divided by their norm.

    An entry's is |G (W + s B A)| with G = G_B A + B G_A - G_B G_A for dL/dW, made of LoRA's gradients alone. `reads` says
    that the heads are the matrix's inputs, else they are its outputs.
    """
    grad = grad_b @ a + b @ grad_a - grad_b @ grad_a
    found = (grad * (weight + scale * (b @ a))).abs().sum(0 if reads else 1).unflatten(0, (n, -1)).sum(1)
    return found / (found.norm() + 1e-8)


class Pruner(Schedule):
    """Masks the least important heads (of grouped keys whole groups) and MLP channels of each layer, more by a cubic.

    Importance is summed over a part's matrices and smoothed over the steps. Heads stay where the model's class cannot be
    built with fewer: BERT's, GPT-2's, OPT's, T5's.
    """

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        deltas = [d for d in self.adapter.deltas.values() if isinstance(d, LoRAPrune)]
        self.config = config = self.common(deltas, "ratio", "warmup", "final", "interval", "smooth")
        self.last = min(math.ceil(n_steps - config.final * n_steps - 1e-9), n_steps - 1)
        self.parts = self._parts()
        self.scores = getattr(self, "scores", {})

    def _parts(self):
        """By "path|reader": how many, and (delta, its rows of a fused one, whether it reads them), the reader last."""
        found, model = {}, self.adapter.model
        parts = parts_of(model)
        heads = {name: torch.arange(p.n) >= int(self.config.ratio * p.n) for name, p in parts.items() if p.n_heads}
        if getattr(model, "config", None) is not None and not all(mask.all() for mask in heads.values()):
            try:
                fits(model, heads)
            except ValueError:
                parts = {name: p for name, p in parts.items() if not p.n_heads}
        for (path, name), delta in self.adapter.deltas.items():
            if isinstance(delta, LoRAPrune) and name in parts:
                there = []
                for s in parts[name].writers:
                    own, fused = (self.adapter.deltas.get((path, at)) for at in (s.name, s.module))
                    if own is not None or fused is not None:
                        there.append((own or fused, rows_of(s) if own is None else ..., False))
                found[f"{path}|{name}"] = parts[name].n, [*there, (delta, ..., True)]
        return found

    def ratio(self, step):
        """The share that is masked from step `step` on."""
        warm, cool = self.config.warmup * self.n_steps, self.config.final * self.n_steps
        if step <= warm:
            return 0.0
        if step > self.n_steps - cool:
            return self.config.ratio
        return self.config.ratio * (1 - (1 - (step - warm) / (self.n_steps - cool - warm)) ** 3)

    @torch.no_grad()
    def before_step(self, step):
        if step > self.last:
            return
        self._look(step)
        if step == self.last:
            self._mask(self.config.ratio)
        elif step % self.config.interval == 0 and self.ratio(step) > 0:
            self._mask(self.ratio(step))

    def _look(self, step):
        """The smoothed importance; what is not finite is passed over."""
        for key, (n, deltas) in self.parts.items():
            now = 0.0
            for d, rows, reads in deltas:
                if d.a.grad is None or d.b.grad is None:
                    raise ValueError(f"lora_prune: {d.site.name} has no gradient at step {step}; nothing ran it")
                weight = whole(Base(self.adapter.model.get_submodule(d.site.module), d.site).weight)
                a, b, grad_a, grad_b = map(whole, (d.a, d.b, d.a.grad, d.b.grad))
                now = now + importance(weight[rows], a, b[rows], grad_a, grad_b[rows], d.scale, n, reads)
            before = self.scores.get(key, torch.zeros_like(now)).to(now.device)
            smooth = self.config.smooth
            self.scores[key] = torch.where(now.isfinite().all(), smooth * before + (1 - smooth) * now, before)

    def _mask(self, ratio):
        """Mask the `ratio` of least importance of each part; what is masked stays so."""
        for key, (n, deltas) in self.parts.items():
            reader = deltas[-1][0]
            kept = whole(reader.keep).unflatten(0, (n, -1))[:, 0] > 0
            order = self.scores[key].masked_fill(~kept, -1.0).argsort(stable=True)
            kept[order[: int(ratio * n + 1e-9)]] = False
            assign(reader.keep, kept.repeat_interleave(reader.keep.numel() // n).to(reader.keep.dtype))

    def state_dict(self):
        return super().state_dict() | {"scores": dict(getattr(self, "scores", {}))}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = {f"{path}|{name}" for path, name in self.adapter.deltas}
        if not state["scores"].keys() <= here:
            raise ValueError(f"adapter {self.adapter.name!r}: the saved importance is of other sites")
        self.scores = dict(state["scores"])


class LoRAPrune(LowRank, name="lora_prune"):
    """W' = (W + (alpha / r) B A) M, M the 0 and 1 of an attention's heads at `o` and an MLP's channels at `down`, else 1.

    `dt.shrink(adapter)` folds the update in and takes out what M leaves out: a smaller model of the same class, for
    `save_pretrained` and `from_pretrained`. Its configuration holds one number for all layers, so none is left unpruned, as the
    paper's code leaves a Llama's first tenth and its last, and the last pruning reaches `ratio`. The paper squares what its
    code takes the magnitude of: the code's is here. What M masks is its reader's: a place without `attn.o` prunes no head, one
    without `mlp.down` no channel.
    """

    paper = "2305.18403"
    where = "all-linear"
    kinds = frozenset({"linear"})
    lr = (1e-4, 1e-2)
    schedule = Pruner
    ratio: float = 0.5  # share of the heads and channels of each layer that goes
    warmup: float = 0.1  # share of the steps before the first pruning
    final: float = 0.1  # share of the steps behind the last
    interval: int = 10  # steps from one pruning to the next
    smooth: float = 0.9  # smoothing of the importance
    keep: Tensor = fixed("n_keep", ones)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key in ("ratio", "warmup", "final", "smooth"):
            if not 0 <= getattr(config, key) < 1:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but a share lies from 0 to below 1")
        if config.warmup + config.final >= 1:
            raise ValueError(
                f"{cls.name}: warmup = {config.warmup} and final = {config.final} leave no step to prune in"
            )
        if config.interval < 1:
            raise ValueError(f"{cls.name}: interval = {config.interval}, but it must be at least 1")
        return config

    @classmethod
    def numbers(cls, config, sites):
        return {s.name: {"n_keep": s.d_in if (s.role or "").endswith((".o", ".down")) else 1} for s in sites}

    @property
    def kept(self):
        """(I), which inputs count; None where all do."""
        return None if self.keep.numel() == 1 else whole(self.keep) > 0

    def fold(self, weight, bias):
        return (weight + self.scale * (self.b @ self.a)) * self.keep, bias

    def pre(self, x):
        return x if self.n_keep == 1 else x * self.keep

    def post(self, y, x):
        h = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        return y + self.scale * F.linear(h, self.b)

    def linear(self, x, base):
        x = self.pre(x)
        return low_rank(base, x, F.dropout(x, self.dropout, self.training), self.a, self.b, self.scale)
