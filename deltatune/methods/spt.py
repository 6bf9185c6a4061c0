"""Sensitivity decides where to train: a low-rank update of what is sensitive all over, single entries elsewhere."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.calibrate import Gradients, collect, looking
from ..core.inits import kaiming, seeded
from ..core.method import param
from ..core.ragged import refill
from ..core.sharded import whole
from .sparse import Chooser, Sparse, deltas_of, positive

GRID, STEPS = 79, 50  # numbers of sensitive entries that are tried: 1/50 to 79/50 of the budget


class Sensitivity(Chooser):
    """s = the mean of squared gradients of a few batches; of several numbers of sensitive entries that which fits the budget.

    A matrix with many of them gets a low-rank update, a vector with many trains as a whole, and in the others those entries do.
    """

    @property
    def looks_at(self):
        return self.common(deltas_of(self).values(), "n_batches").n_batches, "batches"

    def look(self, values, batches, loss):
        with looking(self.adapter.model, True, self.adapter.seed):
            found = collect(self.adapter.model, batches, loss, {"s": Gradients(values)}, most=self.looks_at[0])
        return found["s"]

    @property
    def needs_data(self):
        return super().needs_data and not any(bool(whole(d.b.detach()).any()) for d in deltas_of(self).values())

    def choose(self, scores):
        deltas = deltas_of(self)
        budget = max(1, round(sum(d.keep * d.size for d in deltas.values())))
        taus = [math.ceil(j * budget / STEPS) for j in range(1, GRID + 1)]
        parts = {}
        for name, d in deltas.items():
            weight, bias = scores[name].tensor_split([d.n_weight])
            parts[name, "weight"] = (weight, *d.price())
            if len(bias):
                parts[name, "bias"] = (bias, len(bias), len(bias) / d.vector_ratio)
        sensitive, full = chosen(parts, taus, budget)
        found = {}
        for name, d in deltas.items():
            matrix = (name, "weight") in full and d.site.kind != "norm"
            with seeded(name, self.adapter.seed):
                d.factors(d.r if matrix else 0)
            own = [
                torch.arange(parts[name, key][0].numel()) if (name, key) in full else sensitive[name, key]
                for key in ("weight", "bias") if (name, key) in parts
            ]  # fmt: skip
            own[0] = own[0][:0] if matrix else own[0]
            found[name] = torch.cat([own[0], *(p + d.n_weight for p in own[1:])])
        return found


def chosen(parts, taus, budget):
    """({part: its sensitive entries}, the parts that train as a whole) whose number of trained numbers is nearest to `budget`.

    `parts` is {part: (scores, what training it as a whole costs, from how many sensitive entries on it is)}, `taus` how many
    entries of all are taken as sensitive, ascending. Of two as near, the later.
    """
    flat = torch.cat([scores.flatten().cpu() for scores, *_ in parts.values()])
    order = flat.topk(min(taus[-1], flat.numel())).indices
    ends = torch.tensor([scores.numel() for scores, *_ in parts.values()]).cumsum(0)
    part_of = torch.searchsorted(ends, order, right=True)
    costs = torch.tensor([cost for _, cost, _ in parts.values()], dtype=torch.float64)
    edges = torch.tensor([edge for *_, edge in parts.values()], dtype=torch.float64)
    best = None
    for tau in taus:
        counts = torch.bincount(part_of[:tau], minlength=len(parts))
        off = abs(float(torch.where(counts >= edges, costs, counts.double()).sum()) - budget)
        if best is None or off <= best[0]:
            best = (off, tau, counts >= edges)
    _, tau, full = best
    starts = (ends - ends.diff(prepend=ends.new_zeros(1))).tolist()
    found = order[:tau].sort().values.tensor_split(torch.searchsorted(order[:tau].sort().values, ends)[:-1])
    sensitive = {key: own - start for key, own, start in zip(parts, found, starts, strict=True)}
    return sensitive, {key for key, on in zip(parts, full.tolist(), strict=True) if on}


class SPT(Sparse, name="spt"):
    """W' = W + B A where a matrix has many sensitive entries, W + v at them where it has few; sensitivity E[g^2].

    Vectors with many of them train as a whole. Without the paper's dropout and drop path on B A.
    """

    paper = "2303.08566"
    kinds = frozenset({"linear", "conv2d", "norm"})
    ragged = Sparse.ragged | {"a", "b"}
    limits = {"r": "min(d_in,d_out)"}
    schedule = Sensitivity
    exceptions = {
        "fsdp2": "torch's FSDP shards no tensor without entries, and where no update was chosen its factors have none"
    }
    keep: float = 0.005  # the budget: this share of the entries as how many numbers train
    r: int = 8  # rank of the updates
    ratio: float = 10.0  # a matrix gets one from this part of what it costs in sensitive entries on
    vector_ratio: float = 5.0  # a vector trains as a whole from this part of its entries on
    n_batches: int = 16  # batches that are looked at, at most
    a: Tensor = param("q d_in")
    b: Tensor = param("d_out q")

    @classmethod
    def configure(cls, **hyper):
        config = positive(cls, super().configure(**hyper), "n_batches")
        for key in ("ratio", "vector_ratio"):
            if getattr(config, key) <= 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be above 0")
        return config

    def build(self, base, dtype):
        super().build(base, dtype)
        self.factors(0)

    def dims(self, base):
        there = self._parameters.get("a")
        return super().dims(base) | {"q": 1 if there is None else there.shape[0]}

    def check_ragged(self, tensors):
        super().check_ragged(tensors)
        if {"a", "b"} <= tensors.keys():
            a, b = (tuple(tensors[key].shape) for key in ("a", "b"))
            if a != (b[-1], self.site.d_in) or b != (self.site.d_out, a[0]):
                raise ValueError(f"a {a} and b {b} are no factors of ({self.site.d_out}, {self.site.d_in})")

    def factors(self, r):
        """A low-rank update of rank r from its start, or none."""
        refill(self, "a", kaiming((r, self.site.d_in)) if r else self.a.new_zeros(0, self.site.d_in))
        refill(self, "b", self.b.new_zeros(self.site.d_out, r))

    def price(self):
        """What training the weight as a whole costs, and from how many sensitive entries on that is done."""
        if self.site.kind == "norm":
            return self.n_weight, self.n_weight / self.vector_ratio
        cost = self.config.r * (self.site.d_in + self.site.d_out)
        return cost, cost / self.ratio

    def entries(self):
        if self.a.numel():
            return self.values
        return self.values + (
            self.a.sum() + self.b.sum()
        )  # 0, and DDP waits for a gradient of factors without rows too

    def fold(self, weight, bias):
        weight, bias = super().fold(weight, bias)
        return weight + self.b @ self.a if self.a.numel() else weight, bias

    def product(self, x, weight, bias):
        y = super().product(x, weight, bias)
        return y + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) if self.a.numel() else y
