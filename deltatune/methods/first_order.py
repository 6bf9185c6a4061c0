"""Pruning to a budget by what the loss would lose, to first order: the scores, the rounds and the new start of any method."""

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..core import shapes
from ..core.inits import seeded
from ..core.method import Method, fixed, param
from ..core.ragged import refill
from ..core.schedule import Schedule


class Pruning(Schedule):
    """Trains all, prunes in rounds to a budget that falls geometrically, starts what is left anew, and trains it.

    What is pruned as one, an entry or a group of them, is a unit. Its score is the mean over its entries of the sum of
    |d dL/dd|, the first-order change of the loss where d is taken out, over the steps of the round. One budget is for all
    leaves that are pruned. A task head trains on throughout. An adapter that is pruned already, as a file is, trains on as it is.
    """

    resizes = True

    def __init__(self, adapter):
        super().__init__(adapter)
        self.done, self.scores = 0, {}

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer = optimizer
        deltas = list(self.deltas().values())
        config = self.course(deltas)
        self.search = int(config.search * n_steps) if config.search < 1 else int(config.search)
        if not self.scores and any(d.n_left() < d.n_whole for d in deltas):
            self.search = 0
        if self.search >= n_steps:
            raise ValueError(f"{self.name}: search = {self.search} steps leave none of {n_steps} to train what is kept")
        total = sum(d.n_whole for d in deltas)
        self.budgets = {
            self.search * i // config.rounds: max(1, round(total * config.keep ** (i / config.rounds)))
            for i in range(1, config.rounds + 1)
        }
        if not self.scores and self.done < self.search:
            self._look_anew()

    def deltas(self):
        """The pruned ones by "path|site"."""
        return {f"{path}|{site}": d for (path, site), d in self.adapter.deltas.items() if isinstance(d, Pruned)}

    def course(self, deltas):
        """The hyperparameters that all pruned leaves have in common. Raises ValueError where they differ."""
        keys = ("keep", "search", "rounds")
        names = dict.fromkeys(d.name for d in deltas)
        configs = {name: self.common((d for d in deltas if d.name == name), *keys) for name in names}
        first = next(iter(names))
        for name, key in ((n, k) for n in names for k in keys):
            one, other = getattr(configs[first], key), getattr(configs[name], key)
            if one != other:
                raise ValueError(
                    f"adapter {self.adapter.name!r}: what is pruned has one {key}, not {one!r} of {first} and {other!r} of {name}"
                )
        return configs[first]

    @property
    def name(self):
        """The pruned methods'."""
        return " and ".join(dict.fromkeys(d.name for d in self.deltas().values()))

    def tensors(self):
        """What is scored, by "path|site|tensor"."""
        return {f"{key}|{name}": p for key, d in self.deltas().items() for name, p in d.named_parameters()}

    def _look_anew(self):
        self.scores = {key: torch.zeros_like(p) for key, p in self.tensors().items()}

    @torch.no_grad()
    def before_step(self, step):
        for key, p in self.tensors().items() if self.scores else ():
            if p.grad is not None:  # in a step whose loss was scaled too far they are not finite, and nothing moves
                self.scores[key] += (p * p.grad).abs().nan_to_num(0.0, 0.0)

    @torch.no_grad()
    def after_step(self, step):
        self.done = step + 1
        due = self.done in self.budgets and self.done <= self.search
        if due and any(bool(s.any()) for s in self.scores.values()):  # while all is 0 yet, all scores are
            self._prune(self.budgets[self.done])
            self._look_anew()
        if self.done == self.search:
            self.scores = {}
            self._start_anew()

    def _prune(self, budget):
        deltas, units = self.deltas(), {}
        for key, d in deltas.items():
            scores = {name: self.scores[f"{key}|{name}"] for name, _ in d.named_parameters()}
            units |= {(key, kind): unit for kind, unit in d.units(scores).items()}
        kept = best(units, budget)
        for key, d in deltas.items():
            for name, part in d.parts({kind: mask for (at, kind), mask in kept.items() if at == key}).items():
                t = getattr(d, name)
                state = self.optimizer.state.get(t, {})
                for word, value in state.items():
                    if isinstance(value, Tensor) and value.shape == t.shape:
                        state[word] = value[part]
                refill(d, name, t[part])

    def _start_anew(self):
        for key, d in self.deltas().items():
            with seeded(key, self.adapter.seed):  # the same on every device, resumed or not
                starts = d.anew()
            for name, p in d.named_parameters():
                p.copy_(starts[name])
                self.optimizer.state.pop(p, None)

    def state_dict(self):
        return super().state_dict() | {"done": self.done, "scores": dict(self.scores)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = self.tensors()
        if state["scores"] and state["scores"].keys() != here.keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved scores are of other sites")
        self.done = state["done"]
        self.scores = {key: value.to(here[key].device) for key, value in state["scores"].items()}


def best(units, budget):
    """{kind: (scores, entries of one unit)} -> {kind: mask of those that stay}.

    Units are taken in the order of their scores, each that still fits the budget of entries, one at least.
    """
    if not units:
        return {}
    flat = torch.cat([s.cpu() for s, _ in units.values()])
    sizes = torch.cat([torch.full((len(s),), size) for s, size in units.values()])
    order, mask = flat.argsort(descending=True, stable=True), torch.zeros(len(flat), dtype=torch.bool)
    if len(sizes.unique()) == 1:
        mask[order[: max(1, budget // int(sizes[0]))]] = True
    else:
        left = budget
        for i, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if size <= left or left == budget:
                mask[i] = True
                left -= size
    parts = mask.split([len(s) for s, _ in units.values()])
    return {kind: part.to(s.device) for (kind, (s, _)), part in zip(units.items(), parts, strict=True)}


class Pruned(Method):
    """The common part: a course that prunes. A share of the steps that comes to none leaves the pruning out."""

    paper = "2305.16597"
    schedule = Pruning
    keep: float = 0.1  # share of the entries that is left, of all leaves together
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

    def build(self, base, dtype):
        super().build(base, dtype)
        self.__dict__["whole"] = {name: tuple(p.shape) for name, p in self.named_parameters()}

    @property
    def n_whole(self):
        """How many entries it has unpruned."""
        return sum(math.prod(shape) for shape in self.whole.values())

    def n_left(self):
        """How many it has now."""
        return sum(p.numel() for p in self.parameters())

    def units(self, scores):
        """{kind: (score of each unit, entries of one)}, of the scores of the entries of each trained tensor."""
        raise NotImplementedError

    def parts(self, kept):
        """{tensor: the index of what stays}, of {kind: mask of the units that stay}."""
        raise NotImplementedError

    def anew(self):
        """{trained tensor: what it starts from again}"""
        raise NotImplementedError


def every(shape, **_):
    """0, 1, 2, ..."""
    return torch.arange(shape[0], dtype=torch.int32)


def check_entries(tensors, index, values, n):
    """Raise ValueError where a file's `values` at `index` are no entries of a tensor of n."""
    if not {index, values} <= tensors.keys():
        return
    at, v = tensors[index], tensors[values]
    if at.ndim != 1 or at.shape != v.shape or at.dtype != torch.int32:
        raise ValueError(f"{index} {tuple(at.shape)} and {values} {tuple(v.shape)} are no list of entries")
    if at.numel() and (at[0] < 0 or at[-1] >= n or bool((at.diff() <= 0).any())):
        raise ValueError(f"{index} must ascend within the {n} entries")


class Entries(Pruned):
    """The common part of methods that lose single entries: values at indices, 0 elsewhere.

    Written in front of a method it keeps each of that one's own trained tensors so.
    """

    wholes: ClassVar[dict] = {}

    def __init_subclass__(cls, name="", **kwargs):
        super().__init_subclass__(name=name, **kwargs)
        cls.wholes = {key: slot for key, slot in cls.slots.items() if slot.train and not slot.shared}
        cls.ragged = frozenset(f"{key}_{word}" for key in cls.wholes for word in ("index", "values"))
        for key in cls.wholes:
            setattr(cls, key, property(partial(_dense, key)))

    @classmethod
    def slots_of(cls, config):
        found = {}
        for key, slot in super().slots_of(config).items():
            if key not in cls.wholes:
                found[key] = slot
                continue
            size = slot.shape.replace(" ", "*")
            found[f"{key}_index"] = fixed(size, every)
            found[f"{key}_values"] = param(size, partial(_flat, key), lr=slot.lr)
        return found

    def build(self, base, dtype):
        dims, there = self.dims(base), super().slots_of(self.config).keys() & self.wholes.keys()
        self.__dict__["full"] = {key: shapes.sizes(self.wholes[key].shape, dims) for key in there}
        super().build(base, dtype)

    def units(self, scores):
        return {name: (s, 1) for name, s in scores.items()}

    def parts(self, kept):
        return kept | {name.removesuffix("values") + "index": mask for name, mask in kept.items()}

    def anew(self):
        found = {}
        for name in self._parameters:
            key = name.removesuffix("_values")
            start = _flat(key, None, delta=self)
            found[name] = start[getattr(self, f"{key}_index").cpu().long()]
        return found

    def check_ragged(self, tensors):
        for key, shape in self.full.items():
            check_entries(tensors, f"{key}_index", f"{key}_values", math.prod(shape))


def _dense(key: str, delta: Entries) -> Tensor:
    shape, values = delta.full[key], getattr(delta, f"{key}_values")
    return values.new_zeros(math.prod(shape)).index_add(0, getattr(delta, f"{key}_index"), values).view(shape)


def _flat(key, _, *, delta, **rest):
    """The start of a whole tensor, flat."""
    return delta.wholes[key].init(delta.full[key], delta=delta, **rest).flatten()


class Groups(Pruned):
    """The common part of methods that lose whole groups: what goes is gone, and the tensors are smaller.

    `groups` names each kind of group: its tensors, and along which dimension of each one is cut; None: a vector as a whole.
    """

    groups: ClassVar[dict] = {}

    def __init_subclass__(cls, name="", **kwargs):
        super().__init_subclass__(name=name, **kwargs)
        cls.ragged = frozenset(key for dims in cls.groups.values() for key in dims)

    def units(self, scores):
        found = {}
        for kind, dims in self.groups.items():
            rows = [_rows(scores[name], dim) for name, dim in dims.items()]
            if rows[0] is not None:
                entries = torch.cat(rows, 1)
                found[kind] = entries.mean(1), entries.shape[1]
        return found

    def parts(self, kept):
        found = {}
        for kind, mask in kept.items():
            for name, dim in self.groups[kind].items():
                whole = dim is None
                found[name] = mask.expand(self.whole[name]) if whole else (slice(None),) * dim + (mask,)
        return found

    def anew(self):
        return {
            name: self.slots[name].init(tuple(p.shape), delta=self) if p.numel() else torch.empty(p.shape)
            for name, p in self._parameters.items()
        }

    def check_ragged(self, tensors):
        for kind, dims in self.groups.items():
            counts = set()
            for name, dim in dims.items():
                if name not in tensors:
                    continue
                got, whole = tuple(tensors[name].shape), self.whole[name]
                if dim is None:
                    if got not in ((0,), whole):
                        raise ValueError(f"{name} is {got}, but {whole} is there as a whole or not at all")
                    continue
                left = got[dim] if len(got) > dim else -1
                if got != (*whole[:dim], left, *whole[dim + 1 :]) or left > whole[dim]:
                    raise ValueError(f"{name} is {got}, but it must be {whole} with some of its {whole[dim]} left")
                counts.add(left)
            if len(counts) > 1:
                raise ValueError(f"{', '.join(dims)} have {sorted(counts)} of one {kind} left")


def _rows(scores, dim):
    """(units, entries), None where nothing is left."""
    if dim is None:
        return scores[None] if scores.numel() else None
    return scores.movedim(dim, 0).flatten(1) if scores.ndim > 1 else scores[:, None]
