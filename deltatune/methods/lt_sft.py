"""Lottery tickets: all entries train, those that moved most are kept, taken back to the start, and trained alone."""

import torch
from torch import Tensor

from ..core.method import fixed, param
from ..core.schedule import Schedule
from ..core.sharded import assign
from .sparse import Sparse, deltas_of, top


class Rewind(Schedule):
    """`iterations` times: a dense phase, the choice of a part of the mask, the way back, and a phase of the mask alone.

    The way back takes all that the adapter trains, the head too, to where the dense phase began; each phase begins without
    moments. An adapter that brings its mask along, as a file does, trains on under it. Too few steps for each phase to have
    one leave the choice out.
    """

    resizes = True

    def __init__(self, adapter):
        super().__init__(adapter)
        self.done, self.phases, self.start, self.kept = 0, None, {}, {}

    @property
    def has_penalty(self):
        return any(d.config.l1_dense or d.config.l1_sparse for d in deltas_of(self).values())

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer, self.sites = optimizer, deltas_of(self)
        self.config = self.common(self.sites.values(), "iterations", "dense", "l1_dense", "l1_sparse")
        self.size = sum(d.size for d in self.sites.values())
        n = self.config.iterations
        self.opens = [round(n_steps * i / n) for i in range(n)]
        self.chooses = [round(n_steps * (i + self.config.dense) / n) for i in range(n)]
        whole = len({*self.opens, *self.chooses, n_steps}) == 2 * n + 1
        if self.phases is None:
            self.phases = whole and all(d.is_dense for d in self.sites.values())
        if not self.done:
            self._turn()

    def before_step(self, step):
        with torch.no_grad():
            for d in self.sites.values():
                weight = self.config.l1_dense if d.is_dense else self.config.l1_sparse
                if weight and d.values.grad is not None:
                    d.values.grad.add_(d.values.sign(), alpha=weight / self.size)

    @torch.no_grad()
    def after_step(self, step):
        self.done = step + 1
        self._turn()

    @torch.no_grad()
    def _turn(self):
        """What happens between two steps."""
        if not self.phases or self.done == self.n_steps:
            return
        if self.done in self.chooses:
            self._choose()
        elif self.done in self.opens:
            self._open()

    def _open(self):
        """All entries train, from where they are."""
        own = {id(d.values) for d in self.sites.values()}
        self.start = {n: p.detach().clone() for n, p in self.adapter.named_parameters() if id(p) not in own}
        self._forget()
        for key, d in self.sites.items():
            if d.is_dense:  # the first time
                self.kept[key] = {"index": d.index.clone(), "values": d.values.new_zeros(0)}
                continue
            self.kept[key] = {"index": d.index.clone(), "values": d.values.detach().clone()}
            dense = d.values.new_zeros(d.size)
            dense[d.index.long()] = d.values.detach()
            d.take(d.index[:0], dense)

    def _choose(self):
        """Of the entries that are not yet kept those that moved most, and all back to where the phase began."""
        moved = {}
        for key, d in self.sites.items():
            moved[key] = d.values.detach().abs()
            moved[key][self.kept[key]["index"].long()] = -1.0
        total = sum(d.keep * d.size for d in self.sites.values())
        new = top(moved, max(1, round(total) // self.config.iterations))
        for key, d in self.sites.items():
            old = self.kept.pop(key)
            index = torch.cat([old["index"].long(), new[key].to(d.index.device)])
            values = torch.cat([old["values"], d.values.new_zeros(len(new[key]))])
            order = index.argsort()
            d.take(index[order], values[order])
        own = dict(self.adapter.named_parameters())
        for name, value in self.start.items():
            assign(own[name], value)
        self.start = {}
        self._forget()

    def _forget(self):
        """The moments of all that the adapter trains."""
        for p in self.adapter.parameters():
            self.optimizer.state.pop(p, None)

    def state_dict(self):
        return super().state_dict() | {
            "done": self.done, "phases": self.phases, "start": dict(self.start),
            "kept": {key: dict(old) for key, old in self.kept.items()},
        }  # fmt: skip

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here, own = deltas_of(self), dict(self.adapter.named_parameters())
        if not (state["kept"].keys() <= here.keys() and state["start"].keys() <= own.keys()):
            raise ValueError(f"adapter {self.adapter.name!r}: the saved phases are of other sites")
        self.done, self.phases = state["done"], state["phases"]
        self.start = {n: t.to(own[n].device) for n, t in state["start"].items()}
        self.kept = {
            key: {k: t.to(here[key].values.device) for k, t in old.items()} for key, old in state["kept"].items()
        }


def nothing(shape, **_):
    """No position: all entries train"""
    return torch.zeros(shape, dtype=torch.int32)


class LTSFT(Sparse, name="lt_sft"):
    """W' = W + v, v a value of each entry at first; the K that moved most are kept, from 0 again: a sparse fine-tuning.

    Two of them add up, a language's and a task's, as two adapters on one model. With a learning rate that changes, each
    phase has its part of one course.
    """

    paper = "2110.07560"
    lr = (1e-5, 1e-2)
    schedule = Rewind
    keep: float = 0.01  # share of the entries that train in the end
    iterations: int = 1  # into how many equal parts the choice is cut
    dense: float = 0.5  # share of the steps in which all entries train
    l1_dense: float = 0.0  # weight of the mean distance from the start, over all entries, while all train
    l1_sparse: float = 0.0  # and while the kept ones do
    index: Tensor = fixed("k", nothing)
    values: Tensor = param("k")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.iterations < 1:
            raise ValueError(f"{cls.name}: iterations = {config.iterations}, but it must be at least 1")
        if not 0 < config.dense < 1:
            raise ValueError(f"{cls.name}: dense = {config.dense}, but it must lie between 0 and 1")
        for key in ("l1_dense", "l1_sparse"):
            if getattr(config, key) < 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 0")
        return config

    def build(self, base, dtype):
        super().build(base, dtype)
        self.take(self.index[:0], self.values.detach())

    def n_kept(self):
        return self.size
