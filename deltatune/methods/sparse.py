"""Values at indices: a few entries of a weight and its bias, all that is trained, optimised and saved."""

import contextlib
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..core.base import own_class
from ..core.calibrate import Gradients, collect, looking, predicts_next
from ..core.method import Method, fixed, param
from ..core.ragged import refill
from ..core.refold import linear
from ..core.schedule import Schedule
from ..core.sharded import whole
from ..kernels import sparse


def drawn(shape, *, delta, **_):
    """A random set of positions, ascending, from torch's generator"""
    return torch.randperm(delta.size)[: shape[0]].sort().values.to(torch.int32)


class Sparse(Method):
    """The common part: [W | b]' = [W | b] + v at the indices of the flattened matrix, behind which the bias' entries come.

    Weight decay acts on v, which is the change: nothing else can move. The share is of each layer's own entries; a method
    that chooses over all layers has the same total. Without an index, v is one value for each entry.
    """

    category = "partial"
    where = "linear,norm"
    kinds = frozenset({"linear", "conv2d", "embedding", "norm"})
    ragged = frozenset({"index", "values"})
    lr = (1e-4, 1e-2)
    keep: float = 0.005  # share of the entries that train
    index: Tensor = fixed("k", drawn)
    values: Tensor = param("k")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        return config

    def build(self, base, dtype):
        self.n_weight = base.weight.numel()
        self.size = self.n_weight + (0 if base.bias is None else base.bias.numel())
        if self.size >= 2**31:
            raise ValueError(f"{self.size} entries are more than an index of 32 bits can name")
        self.__dict__.update(_seen=None, _in_weight=0)
        super().build(base, dtype)

    def n_kept(self):
        """How many entries of this layer the share is."""
        return max(1, round(self.keep * self.size))

    def dims(self, base):
        there = self._parameters.get("values")
        return super().dims(base) | {"k": self.n_kept() if there is None else there.numel()}

    def check_ragged(self, tensors):
        if not {"index", "values"} <= tensors.keys():  # who reads the file says what is missing
            return
        index, values = tensors["index"], tensors["values"]
        if not index.numel() and values.shape == (self.size,):
            return
        if index.ndim != 1 or index.shape != values.shape or index.dtype != torch.int32:
            raise ValueError(f"index {tuple(index.shape)} and values {tuple(values.shape)} are no list of entries")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.size or bool((index.diff() <= 0).any())):
            raise ValueError(f"index must ascend within the {self.size} entries of the layer")

    @property
    def is_dense(self):
        """Is there a value for each entry, and no index?"""
        return bool(self.values.numel()) and not self.index.numel()

    def take(self, index, values=None):
        """Train these entries, from 0 or from `values`; values without an index are those of all entries."""
        values = self.values.new_zeros(len(index)) if values is None else values
        refill(self, "index", index.to(torch.int32))
        refill(self, "values", values)

    def in_weight(self):
        """How many of the indices lie in the weight; looked up again when the index is another."""
        seen = self.index.data_ptr(), self.index._version, self.index.numel()
        if self._seen != seen:
            self.__dict__.update(_seen=seen, _in_weight=int((self.index < self.n_weight).sum()))
        return self._in_weight

    def entries(self):
        """The values, as they are added."""
        return self.values

    def fold(self, weight, bias):
        if not self.is_dense:
            return sparse.scattered(weight, bias, self.index, self.entries())
        n, v = self.n_weight, self.entries()
        if bias is not None and self.size > n:  # what stands inside may have given a layer its bias
            bias = bias + v[n:]
        return weight + v[:n].view_as(weight), bias

    def product(self, x, weight, bias):
        if self.is_dense:
            return linear(x, partial(self.rounded, weight, bias), [self])
        return sparse.linear(x, weight, bias, self.index, self.entries(), self.in_weight())

    def rounded(self, weight, bias):
        """`fold` in fp32, in the weight's own dtype."""
        w, b = self.fold(weight.to(self.values.dtype), None if bias is None else bias.to(self.values.dtype))
        return w.to(weight.dtype), None if b is None else b.to(weight.dtype)


def deltas_of(schedule):
    """The sparse deltas of a schedule's adapter that have this course, by "path|site"."""
    found = {f"{path}|{site}": d for (path, site), d in schedule.adapter.deltas.items() if isinstance(d, Sparse)}
    return {key: d for key, d in found.items() if d.schedule is type(schedule)}


def top(scores, k):
    """By name, the positions in ascending order of the `k` largest of all scores."""
    flat = torch.cat([s.flatten().cpu() for s in scores.values()])
    best = flat.topk(min(k, flat.numel())).indices.sort().values
    ends = torch.tensor([s.numel() for s in scores.values()]).cumsum(0)
    parts = best.tensor_split(torch.searchsorted(best, ends)[:-1])
    starts = (ends - ends.diff(prepend=ends.new_zeros(1))).tolist()
    return {name: part - start for name, part, start in zip(scores, parts, starts, strict=True)}


@contextlib.contextmanager
def opened(deltas):
    """Each delta with a value of 0 for each of its layer's entries, {name: values}, and afterwards as it was."""
    before = {name: (d.index.clone(), d.values.detach().clone()) for name, d in deltas.items()}
    try:
        for d in deltas.values():
            d.take(d.index[:0], d.values.new_zeros(d.size))
        yield {name: d.values for name, d in deltas.items()}
    finally:
        for name, d in deltas.items():
            d.take(*before[name])


class Chooser(Schedule):
    """Looks at data before training and chooses the entries, which then stay."""

    @property
    def needs_data(self):
        """Once values have moved, as in a file that is trained on from, their mask stays."""
        return not any(bool(whole(d.values.detach()).any()) for d in deltas_of(self).values())

    def calibrate(self, batches, loss):
        deltas = deltas_of(self)
        if not self.needs_data:
            raise ValueError(f"adapter {self.adapter.name!r}: its values have moved already; a mask stays as it is")
        with opened(deltas) as values:
            scores = self.look(values, batches, loss)
        for name, index in self.choose(scores).items():
            deltas[name].take(index)
        self.adapter.calibrated = {name: d.index for name, d in deltas.items()}

    def look(self, values, batches, loss):
        """{name: a score of each of the layer's entries}, `values` being the 0 that is added to each."""
        raise NotImplementedError

    def choose(self, scores):
        """{name: the positions that train}, by default the largest scores of all layers."""
        return top(scores, max(1, round(sum(d.keep * d.size for d in deltas_of(self).values()))))

    def state_dict(self):
        return super().state_dict() | {"chosen": bool(self.adapter.calibrated)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.adapter.calibrated = {name: d.index for name, d in deltas_of(self).items()} if state["chosen"] else {}


class Fisher(Chooser):
    """F = the mean over examples of (d log p(y | x) / d theta)^2, each example's gradient by itself, without dropout."""

    @property
    def looks_at(self):
        return self.common(deltas_of(self).values(), "n_samples").n_samples, "rows"

    def look(self, values, batches, loss):
        labels, model = self.common(deltas_of(self).values(), "labels").labels, self.adapter.model
        with looking(model, False, self.adapter.seed):
            return collect(
                model, batches, loss if labels == "true" else partial(_own_labels, loss),
                {"fisher": Gradients(values)}, rows="example", most=self.looks_at[0],
            )["fisher"]  # fmt: skip


def _own_labels(loss, model, batch):
    """The loss under labels that are drawn from the model's own answer: of the rows, of their tokens, or the next tokens."""
    labels, name = batch.get("labels"), own_class(model).__name__
    logits = None
    if labels is not None and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if logits is None or labels.is_floating_point() or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
        raise ValueError(
            f'fish_mask: labels="drawn" needs labels that are classes, one for each answer; {name} has others'
        )
    new = torch.distributions.Categorical(logits=logits.float()).sample()
    if predicts_next(model):
        new = torch.cat([labels[:, :1], new[:, :-1]], 1)
    return loss(model, {**batch, "labels": new.where(labels >= 0, labels)})


class Burn(Chooser):
    """|sum of the gradients of a burn-in in which nothing moves|, each step's clipped over all that trains; by tensor."""

    @property
    def looks_at(self):
        return self.common(deltas_of(self).values(), "burn_in").burn_in, "batches"

    def look(self, values, batches, loss):
        clip = self.common(deltas_of(self).values(), "clip").clip
        heads = {f"head {i}": p for i, p in enumerate(self.adapter.head_parameters())}
        with looking(self.adapter.model, True, self.adapter.seed):
            found = collect(
                self.adapter.model, batches, loss, {"sum": Clipped(values | heads, clip)}, most=self.looks_at[0]
            )["sum"]
        return {name: found[name].abs() for name in values}

    def choose(self, scores):
        """Of each weight and of each bias the largest; of one that is too small for the share none, if others are not."""
        found = {}
        for name, d in deltas_of(self).items():
            parts = scores[name].tensor_split([d.n_weight])
            picked = [part.topk(int(d.keep * part.numel())).indices for part in parts]
            found[name] = torch.cat([picked[0], picked[1] + d.n_weight]).sort().values
        return found if any(map(len, found.values())) else super().choose(scores)


class Clipped(Gradients):
    """The mean over passes of the gradients, each pass's scaled down to a norm of `most` over all tensors together."""

    def __init__(self, tensors, most):
        super().__init__(tensors, lambda g, t: g)
        self.most = most

    def see(self, grads, of_made, real):
        there = {name: g.float() for name, g in grads.items() if g is not None}
        if self.most and there:
            norm = torch.stack([g.norm().cpu() for g in there.values()]).norm()
            scale = float((self.most / (norm + 1e-6)).clamp(max=1.0))
            there = {name: g * scale for name, g in there.items()}
        super().see({name: there.get(name) for name in grads}, of_made, real)


def in_matrix(shape, *, delta, **_):
    """A random set of the weight's positions, ascending, from a generator of its own where there is a seed"""
    own = None if delta.mask_seed is None else torch.Generator().manual_seed(delta.mask_seed)
    there = torch.empty(0).device if own is None else torch.device("cpu")
    picked = torch.randperm(delta.n_weight, generator=own, device=there)[: shape[0]]
    return picked.sort().values.to(torch.empty(0).device, torch.int32)


class SHiRA(Sparse, name="shira"):
    """W' = W + v at random entries of W, drawn once; v = 0 at the start: a sparse high-rank adapter."""

    paper = "2406.13175"
    where = "q,v"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    keep: float = 0.01  # share of the weight's entries that train
    r: int | None = None  # train as many as LoRA of this rank instead
    mask_seed: int | None = None  # each mask from this seed alone: layers of one size have one mask
    index: Tensor = fixed("k", in_matrix)
    values: Tensor = param("k")

    def n_kept(self):
        if self.r is None:
            return max(1, round(self.keep * self.n_weight))
        k = self.r * (self.site.d_in + self.site.d_out)
        if not 1 <= k <= self.n_weight:
            raise ValueError(f"r = {self.r} trains {k} entries, but it must be between 1 and all {self.n_weight}")
        return k


class FishMask(Sparse, name="fish_mask"):
    """W' = W + v at the entries of largest Fisher information over a few examples, chosen over all layers once."""

    paper = "2111.09839"
    schedule = Fisher
    n_samples: int = 1024  # examples that are looked at, at most
    labels: Literal["true", "drawn"] = "true"  # the examples' own, or drawn from the model's answer

    @classmethod
    def configure(cls, **hyper):
        return positive(cls, super().configure(**hyper), "n_samples")


class SAM(Sparse, name="sam"):
    """W' = W + v at the entries of each tensor whose gradients add up to most, |sum g|, over a burn-in.

    The second-order approximation method: under a diagonal Hessian the best entries are those of largest g^2 / h, and h is
    taken as constant.
    """

    paper = "2211.15583"
    lr = (1e-4, 1e-2)
    schedule = Burn
    burn_in: int = 600  # batches that are looked at, at most
    clip: float = 1.0  # largest norm of a batch's gradient, 0 for none

    @classmethod
    def configure(cls, **hyper):
        config = positive(cls, super().configure(**hyper), "burn_in")
        if config.clip < 0:
            raise ValueError(f"{cls.name}: clip = {config.clip}, but it must be at least 0")
        return config


def positive(cls, config, key):
    """The hyperparameters, of which `key` must be at least 1."""
    if getattr(config, key) < 1:
        raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 1")
    return config
