"""Biases that are pruned while training: single entries, or whole vectors."""

import torch
from torch import Tensor

from ..core.method import fixed, param
from ..core.ragged import refill
from ..core.schedule import Schedule
from .vectors import Vectors


class Pruning(Schedule):
    """Trains all, prunes in rounds to a budget that falls geometrically, starts what is left anew at 0, and trains it.

    The score of an entry is the sum of |d dL/dd|, the first-order change of the loss where it is taken out, over the steps
    of the round. A task head trains on throughout.
    """

    resizes = True

    def __init__(self, adapter):
        super().__init__(adapter)
        self.done, self.scores = 0, {}

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer = optimizer
        deltas = self.deltas()
        first = next(iter(deltas.values()))
        config = first.config
        if any(type(d) is not type(first) or d.config != config for d in deltas.values()):
            raise ValueError(f"{self.name}: one budget is for all biases; its hyperparameters are the same everywhere")
        self.search = int(config.search * n_steps) if config.search < 1 else int(config.search)
        if self.search >= n_steps:
            raise ValueError(f"{self.name}: search = {self.search} steps leave none of {n_steps} to train what is kept")
        total = sum(d.site.d_out for d in deltas.values())
        self.budgets = {
            self.search * i // config.rounds: max(1, round(total * config.keep ** (i / config.rounds)))
            for i in range(1, config.rounds + 1)
        }
        if not self.scores and self.done < self.search:
            self._look_anew()

    def deltas(self):
        """The pruned ones by "path|site"."""
        return {f"{path}|{site}": d for (path, site), d in self.adapter.deltas.items() if isinstance(d, PrunedBias)}

    @property
    def name(self):
        """The method's."""
        return next(iter(self.deltas().values())).name

    def _look_anew(self):
        self.scores = {key: torch.zeros_like(d.d) for key, d in self.deltas().items()}

    @torch.no_grad()
    def before_step(self, step):
        for key, d in self.deltas().items() if self.scores else ():
            if d.d.grad is not None:
                self.scores[key] += (d.d * d.d.grad).abs()

    @torch.no_grad()
    def after_step(self, step):
        self.done = step + 1
        if self.done in self.budgets and self.done <= self.search:
            self._prune(self.budgets[self.done])
            self._look_anew()
        if self.done == self.search:
            self.scores = {}
            for d in self.deltas().values():
                d.d.zero_()
                self.optimizer.state.pop(d.d, None)

    def _prune(self, budget):
        deltas = self.deltas()
        kept = next(iter(deltas.values())).chosen(self.scores, budget)
        for key, d in deltas.items():
            state = self.optimizer.state.get(d.d, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == d.d.shape:
                    state[name] = value[kept[key]]
            d.cut(kept[key])

    def state_dict(self):
        return super().state_dict() | {"done": self.done, "scores": dict(self.scores)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = self.deltas()
        if state["scores"] and state["scores"].keys() != here.keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved scores are of other sites")
        self.done = state["done"]
        self.scores = {key: value.to(here[key].d.device) for key, value in state["scores"].items()}


class PrunedBias(Vectors):
    """The common part: b' = b + d where d is left, from all biases that the base has.

    A share of the steps that comes to none leaves the pruning out.
    """

    paper = "2305.16597"
    where = "linear,norm"
    kinds = frozenset({"linear", "norm"})
    fast_kinds = kinds
    schedule = Pruning
    keep: float = 0.1  # share of the biases' entries that is left
    search: float = 0.5  # steps that train and prune; below 1 a share of all
    rounds: int = 5  # of pruning, each to the same share of what the last one left

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        for key, least in {"search": 0, "rounds": 1}.items():
            if getattr(config, key) < least:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least {least}")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.bias

    def cut(self, kept):
        """Leave the entries `kept`, a mask over d."""
        refill(self, "d", self.d[kept])


def every(shape, **_):
    """0, 1, 2, ..."""
    return torch.arange(shape[0], dtype=torch.int32)


class UBitFit(PrunedBias, name="u_bitfit"):
    """b'[i] = b[i] + d, the entries of biases of largest |d dL/dd| over all layers: the others are pruned while training.

    What is trained, optimised and saved in the end is the values at the indices that are left.
    """

    ragged = frozenset({"index", "d"})
    index: Tensor = fixed("d_out", every)
    d: Tensor = param("d_out")

    @staticmethod
    def chosen(scores, budget):
        """The `budget` entries of largest score, over all sites."""
        flat = torch.cat([s.cpu() for s in scores.values()])
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[flat.argsort(descending=True, stable=True)[:budget]] = True
        parts = mask.split([len(s) for s in scores.values()])
        return {key: part.to(s.device) for (key, s), part in zip(scores.items(), parts, strict=True)}

    def cut(self, kept):
        refill(self, "index", self.index[kept])
        super().cut(kept)

    def check_ragged(self, tensors):
        index, d = tensors["index"], tensors["d"]
        if index.ndim != 1 or index.shape != d.shape or index.dtype != torch.int32:
            raise ValueError(f"index {tuple(index.shape)} and d {tuple(d.shape)} are no list of entries")
        if index.numel() and (index[0] < 0 or index[-1] >= self.site.d_out or bool((index.diff() <= 0).any())):
            raise ValueError(f"index must ascend within the {self.site.d_out} entries of the bias")

    def spread(self):
        """d at its entries, 0 elsewhere."""
        return self.d.new_zeros(self.site.d_out).index_add(0, self.index, self.d)

    def fold(self, weight, bias):
        return weight, bias + self.spread()

    def post(self, y, x):
        return y + self.spread() if self.d.numel() else y


class SBitFit(PrunedBias, name="s_bitfit"):
    """b' = b + d, the bias vectors of largest mean |d dL/dd|: the others are pruned as a whole while training.

    Vectors are taken in the order of their scores, each that still fits the budget, one at least.
    """

    ragged = frozenset({"d"})
    d: Tensor = param("d_out")

    @staticmethod
    def chosen(scores, budget):
        """Whole vectors within `budget` entries."""
        means = torch.stack([s.mean().cpu() if len(s) else torch.tensor(-1.0, dtype=s.dtype) for s in scores.values()])
        keys, kept, left = list(scores), {}, budget
        for i in means.argsort(descending=True, stable=True).tolist():
            s = scores[keys[i]]
            takes = len(s) > 0 and (len(s) <= left or not any(bool(k.any()) for k in kept.values()))
            left -= len(s) if takes else 0
            kept[keys[i]] = torch.full_like(s, takes, dtype=torch.bool)
        return kept

    def check_ragged(self, tensors):
        shape = tuple(tensors["d"].shape)
        if shape not in ((0,), (self.site.d_out,)):
            raise ValueError(f"d is {shape}, but a bias of {self.site.d_out} is there as a whole or not at all")

    def fold(self, weight, bias):
        return weight, bias + self.d if self.d.numel() else bias

    def post(self, y, x):
        return y + self.d if self.d.numel() else y
