"""Masks on the base's own weights: which of its entries train."""

import math
import zlib

import torch

from ..core import bits
from ..core.calibrate import gradients
from ..core.method import Method
from ..core.record import EVERYTHING
from ..core.schedule import Schedule
from ..core.sharded import assign, local, whole


class RandomMask(Schedule):
    """g' = g m / p with m ~ Bernoulli(p), drawn anew each step from the adapter's seed."""

    @torch.no_grad()
    def before_step(self, step):
        (_, leaf), *_ = self.adapter.tree.leaves()
        for name, p in self.adapter.owned().items():
            if p.grad is None:
                continue
            grad = local(p.grad)
            rank = torch.distributed.get_rank() if grad is not p.grad else 0  # each rank draws for its own shard
            seed = zlib.crc32(f"{name} {step} {rank}".encode()) ^ self.adapter.seed
            draw = torch.empty(grad.shape, device=grad.device)
            draw.bernoulli_(leaf.config.p, generator=torch.Generator(grad.device).manual_seed(seed))
            grad.mul_(draw.to(grad.dtype)).div_(leaf.config.p)


class ChildTuningF(Method, name="child_tuning_f"):
    """g' = g m / p with m ~ Bernoulli(p), drawn anew each step: a random share of all gradients, the base trained in place.

    An entry that is not drawn still moves by the optimiser's momentum and weight decay, as in the paper's code.
    """

    paper = "2109.05687"
    category = "partial"
    where = EVERYTHING
    in_place = True
    lr = (2e-5, 5e-4)
    schedule = RandomMask
    p: float = 0.3  # share of the gradients that a step takes

    @classmethod
    def configure(cls, **hyper):
        return _share(cls, super().configure(**hyper))


class FisherMask(Schedule):
    """g' = g m with m fixed: the entries of largest Fisher information over the calibration data."""

    needs_groups = True  # weight decay is the schedule's: an optimiser's own would move what is frozen
    needs_data = True

    def calibrate(self, batches, loss):
        """m = the p of all entries with the largest mean of squared batch gradients, each tensor's clipped to norm 1."""
        (_, leaf), *_ = self.adapter.tree.leaves()
        found = gradients(
            self.adapter.model, self.adapter.owned(), batches, loss,
            lambda g: (g * (1.0 / (g.norm() + 1e-6)).clamp(max=1.0)).square(),
        )  # fmt: skip
        flat = torch.cat([f.flatten().cpu() for f in found.values()])
        edge = flat.kthvalue(flat.numel() - leaf.method.n_moving(leaf.config, flat.numel()) + 1).values
        self.adapter.calibrated = {n: f >= edge.to(f.device) for n, f in found.items()}

    def groups(self, lr, weight_decay=0.0, head_lr=None):
        owned = {id(p) for p in self.adapter.owned().values()}
        found = super().groups(lr, weight_decay, head_lr)
        for g in found:
            if all(id(p) in owned for p in g["params"]):
                g["masked_decay"], g["weight_decay"] = g["weight_decay"], 0.0
        return found

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        owned = {id(p) for p in self.adapter.owned().values()}
        for g in optimizer.param_groups:  # a group of the same parameters is not enough
            if any(id(p) in owned for p in g["params"]) and ("masked_decay" not in g or g["weight_decay"]):
                raise ValueError(
                    f"adapter {self.adapter.name!r}: the optimiser's own weight decay would move what is frozen; build it from "
                    f"adapter.groups(lr, weight_decay)"
                )
        self.optimizer = optimizer

    @torch.no_grad()
    def before_step(self, step):
        masks = {id(p): self.adapter.calibrated[n] for n, p in self.adapter.owned().items()}
        for g in self.optimizer.param_groups:
            for p in g["params"]:
                if id(p) not in masks or p.grad is None:
                    continue
                mask = masks[id(p)].to(p.device)
                assign(p.grad, mask * whole(p.grad))
                if g["masked_decay"]:
                    now = whole(p)  # the other entries keep every bit
                    assign(p, torch.where(mask, now * (1 - g["lr"] * g["masked_decay"]), now))

    def state_dict(self):
        return super().state_dict() | {"masks": {n: bits.pack(m).cpu() for n, m in self.adapter.calibrated.items()}}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        owned = self.adapter.owned()
        if state["masks"].keys() != owned.keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved masks are of other parameters")
        self.adapter.calibrated = {
            n: bits.unpack(b.to(owned[n].device), tuple(owned[n].shape)) for n, b in state["masks"].items()
        }


class ChildTuningD(Method, name="child_tuning_d"):
    """g' = g m, m fixed: the share p of the blocks' entries with the largest Fisher information trains, in place.

    `adapter.calibrate(batches)` finds m before training; our trainer does so by itself. Weight decay falls on those entries
    alone: in the paper's code it moves the frozen ones too, and embeddings and pooler, which have no mask, train in full
    (here they stay frozen; `where` takes them in, under the mask).
    """

    paper = "2109.05687"
    category = "partial"
    where = "block"
    in_place = True
    lr = (2e-5, 5e-4)
    schedule = FisherMask
    p: float = 0.3  # share of the entries that train

    @classmethod
    def configure(cls, **hyper):
        return _share(cls, super().configure(**hyper))

    @classmethod
    def n_moving(cls, config, n):
        return n - math.ceil((1 - config.p) * (n - 1)) if n else 0


def _share(cls, config):
    if not 0 < config.p <= 1:
        raise ValueError(f"{cls.name}: p = {config.p}, but a share lies above 0 and not above 1")
    return config
