"""Unified methods: one idea over the tensors of other methods."""

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import bits, shapes
from ..core.inits import normal, seeded, uniform
from ..core.method import Method, Slot, bank, fixed, param, shared_tensor
from . import bottleneck, lora
from .task_gates import TaskGates


class ProPELT(Method):
    """theta_l = theta o top_k(|M_l|): one prototype for all layers, and for each a binary mask, trained straight through.

    Written in front of a method it makes prototypes under masks of its matrices, and shares its vectors as they are. The
    file holds the prototypes and one bit for each masked entry, and loads with `masks="fixed"`.

    With `n_tasks` above 1 a row's mask is m_l or m_t, m_t of its task and the same in all layers: L + T masks for L layers
    and T tasks. The rows' tasks are the call's `task_ids`; `adapter.set(task=t)` says it for rows that come without, and then
    it merges.
    """

    paper = "2305.17682"
    category = "unified"
    reads = ("task_ids",)
    live = ("task",)
    fan: ClassVar[int] = -1  # the dimension of a matrix whose size sets the spread of its scores
    score_lr: ClassVar[float] = 1.0  # learning rate of the scores, as a multiple
    keep: float = 0.5  # share of the entries that a mask keeps
    masks: Literal["trained", "fixed"] = "trained"  # fixed, as in a finished file: the prototypes alone train
    n_tasks: int = 1  # how many tasks
    combine: Literal["or", "and", "add", "each"] = (
        "or"  # of layer and task: either, both, their sum, or a mask for each pair
    )
    task: int | None = None  # the task of rows without task_ids, and of what is merged
    draws_from_seed = False  # masks that are fixed for all sites are in the file
    one_task = TaskGates.one_task

    def __init_subclass__(cls, name="", **kwargs):
        super().__init_subclass__(name=name, **kwargs)
        for key, slot in cls.slots.items():
            if not slot.shared:
                setattr(cls, key, property(partial(_masked if _is_matrix(slot) else shared_tensor, key)))
        if cls.has_fold:  # a weight for each task is none for all rows
            cls.has_fold = property(lambda self: self.n_tasks == 1 or self.task is not None)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        if config.task is not None and not 0 <= config.task < config.n_tasks:
            raise ValueError(f"{cls.name}: task = {config.task}, but it has the tasks 0 to {config.n_tasks - 1}")
        return config

    @classmethod
    def slots_of(cls, config):
        found = {}
        for key, slot in super().slots_of(config).items():
            found[key] = bank(slot.shape, slot.init, train=True, by="role")
            if _is_matrix(slot):
                found |= cls.mask_slots(f"{key}_", slot.shape, config)
        return found

    @classmethod
    def mask_slots(cls, key, shape, config):
        """The scores of one masked tensor, of its layer and of the tasks, or the masks themselves where they are fixed."""
        many, size = config.n_tasks > 1, shape.replace(" ", "*")
        both = many and config.combine != "each"  # a mask of the layer and one of the task
        lead = "n_tasks " if many and not both else ""
        if config.masks == "fixed":
            packed, drawn = f"({size}+7)//8", partial(_random_bits, size)
            found = {f"{key}bits": fixed(f"{lead}{packed}", drawn)}
            return found | ({f"{key}task_bits": bank(f"n_tasks {packed}", drawn, by="role")} if both else {})
        found = {f"{key}score": param(f"{lead}{shape}", partial(_scores, cls.fan, bool(lead)), lr="score_lr")}
        of_tasks = bank(f"n_tasks {shape}", partial(_scores, cls.fan, True), train=True, by="role", lr="score_lr")
        return found | ({f"{key}task_score": of_tasks} if both else {})

    def bank_key(self, key, slot, shape):
        return super().bank_key(key, replace(slot, train=True), shape)  # the tasks' bits too are each leaf's own

    def build(self, base, dtype):
        if self.n_tasks < 1:
            raise ValueError(f"n_tasks = {self.n_tasks}, but it must be at least 1")
        self.reads_call = self.random_fold = self.n_tasks > 1  # the running call is over in the backward
        shared, _ = self.__dict__["_bank"]
        # a bank draws what is fixed from its seed and no file holds it; masks are held
        held = {key: slot for key, slot in self.slots_of(self.config).items() if slot.shared and not slot.train}
        for key, slot in held.items():
            at = self.bank_key(key, slot, shape := shapes.sizes(slot.shape, self.dims(base)))
            if at not in shared._buffers:
                device = torch.empty(0).device
                with seeded(at, shared.seed):
                    drawn = slot.init(shape, base=base, delta=self)
                shared.register_buffer(at, drawn.to(device))
        super().build(base, dtype)

    def rows(self, x):
        """(B), the tasks of the rows of x where each has its own; None where all have one."""
        if self.n_tasks == 1 or self.task is not None and self.call.task_ids is None:
            return None
        return self.tasks(len(x), x.device)

    def of(self, key, x):
        """The prototype under its mask, in x's dtype; under each row's, (B, ...), where rows have tasks."""
        own = self.exact
        prototype = shared_tensor(key, own)
        return (prototype * own.mask(f"{key}_", prototype.shape, self.rows(x))).to(x.dtype)

    def mask(self, key, shape, rows=None):
        """The 0 and 1 of one masked tensor, or (B, ...) of the tasks of the rows; where they are added, also 2."""
        if self.n_tasks == 1:
            return self.read(key, shape)
        if rows is None:
            return self.mask(key, shape, self.one_task())[0]
        if self.combine == "each":
            return self.read(key, shape, self.n_tasks)[rows]
        of_layer, of_task = self.read(key, shape), self.read(f"{key}task_", shape, self.n_tasks)[rows]
        if self.combine == "or":
            return 1 - (1 - of_layer) * (1 - of_task)
        return of_layer * of_task if self.combine == "and" else of_layer + of_task

    def read(self, key, shape, n=0):
        """One mask, or n of them."""
        name = f"{key}{'bits' if self.masks == 'fixed' else 'score'}"
        held = self.bank_parameter(name) if key.endswith("task_") else getattr(self, name)
        if self.masks == "fixed":
            found = [bits.unpack(one, shape).float() for one in (held if n else held[None])]
        else:
            found = [bits.straight_through(one, self.keep) for one in (held if n else held[None])]
        return torch.stack(found) if n else found[0]

    def finished(self, leaf):
        slots = self.slots_of(self.config)
        if self.masks == "fixed":
            shared = {key: self.bank_parameter(key) for key, slot in slots.items() if slot.shared and not slot.train}
            return leaf, self.state_dict() | shared
        packed = {}
        for key in (key for key in slots if key.endswith("score")):
            held = self.bank_parameter(key) if slots[key].shared else getattr(self, key)
            many = slots[key].shape.startswith("n_tasks ")
            made = [bits.pack(bits.top(one, self.keep)) for one in (held if many else held[None])]
            packed[f"{key.removesuffix('score')}bits"] = torch.stack(made) if many else made[0]
        return leaf.changed(masks="fixed"), packed


def _is_matrix(slot: Slot) -> bool:
    return len(slot.shape.split()) > 1


def _masked(key: str, delta: ProPELT) -> Tensor:
    prototype = shared_tensor(key, delta)
    return prototype * delta.mask(f"{key}_", prototype.shape)


def _scores(fan, many, shape, **_):
    own = shape[1:] if many else shape
    bound = 1 / math.sqrt(own[fan] if fan is not None else torch.Size(own).numel())
    return torch.empty(shape).uniform_(-bound, bound)


def _random_bits(size, shape, *, base, delta, **_):
    (n,) = shapes.sizes(size, delta.dims(base))
    many = [bits.pack(bits.top(torch.rand(n), delta.keep)) for _ in range(shape[0] if len(shape) > 1 else 1)]
    return torch.stack(many) if len(shape) > 1 else many[0]


def each(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of rows x (B, ..., I), each with its own weight where that is (B, O, I)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    y = (x.reshape(len(x), -1, x.shape[-1]) @ weight.mT).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class ProPELTAdapter(ProPELT, bottleneck.Sequential, name="propelt"):
    """y' = y + A_l(y), A_l one adapter behind the blocks under the mask of layer l; biases shared without a mask."""

    where = "post_norm|block"
    kinds = frozenset({"block", "norm"})
    lr = (3e-5, 3e-3)
    fan = 0  # the paper's code keeps its scores transposed
    score_lr = 30.0
    exceptions = {"identity": "the paper starts near the identity, U and D at N(0, 0.02^2), not at it"}
    down: Tensor = param("r d_out", normal(0.02))
    up: Tensor = param("d_out r", normal(0.02))

    def mlp(self, h, dropout=0.0):
        u = getattr(F, self.f)(each(h, self.of("down", h), self.down_bias))
        return each(F.dropout(u, dropout, self.training), self.of("up", h), self.up_bias)


class ProPELTLoRA(ProPELT, lora.LoRA, name="propelt_lora"):
    """W' = W + (alpha / r) B_l A_l, one A and one B for all layers, for q and v apart, under the masks of layer l."""

    kinds = frozenset({"linear", "conv2d", "embedding"})
    lr = (1e-4, 1e-2)
    score_lr = 300.0
    r: int = 32  # rank
    alpha: float = 48.0  # scale of the update, divided by r^power
    keep: float = 0.1  # share of the entries that a mask keeps

    def post(self, y, x):
        h = each(F.dropout(x, self.dropout, self.training), self.of("a", x))
        y = y + self.scale * each(h, self.of("b", x))
        return y + self.d if self.bias else y

    def linear(self, x, base):
        return lora.LoRA.linear(self, x, base) if self.rows(x) is None else self.post(base(x), x)


class ProPELTPrefix(ProPELT, name="propelt_prefix"):
    """Attention over [m_l o P; K, V]: one prefix, made by one network while training, under the mask of layer l.

    A masked entry is 0 in key or value; the prefix keeps its length.
    """

    where = "attn"
    kinds = frozenset({"attention"})
    lr = (1e-4, 1e-2)
    fan = None
    exceptions = {"identity": "a prefix takes a share of the attention from the start"}
    n: int = 64  # length of the prefix
    mid: int = 512  # width of the network that makes the prefix
    keep: float = 0.1  # share of the entries that a mask keeps
    embedding: Tensor = bank("n d_in", normal(1.0), train=True, by="role")
    inner: Tensor = bank("mid d_in", train=True, by="role")
    inner_bias: Tensor = bank("mid", uniform("d_in"), train=True, by="role")
    outer: Tensor = bank("2*n_kv_heads*d_head mid", train=True, by="role")
    outer_bias: Tensor = bank("2*n_kv_heads*d_head", uniform("mid"), train=True, by="role")
    prefix: Tensor = bank("n 2*n_kv_heads*d_head", normal(0.02), train=True, by="role")

    @classmethod
    def slots_of(cls, config):
        fixed = config.masks == "fixed"
        found = {key: slot for key, slot in cls.slots.items() if (key == "prefix") == fixed}
        return found | cls.mask_slots("", "n 2*n_kv_heads*d_head", config)

    def finished(self, leaf):
        leaf, tensors = super().finished(leaf)
        return leaf, tensors | ({"prefix": self.made()} if self.masks == "trained" else {})

    def made(self):
        """(n, 2 H_kv D), one for all layers."""
        if self.masks == "fixed":
            return self.prefix
        return F.linear(torch.tanh(F.linear(self.embedding, self.inner, self.inner_bias)), self.outer, self.outer_bias)

    def kv(self, key, value):
        made = self.exact.made()  # the network in fp32: what is saved is what was trained
        made = made * self.exact.mask("", made.shape, self.rows(key))
        k, v = made.view(-1, self.n, 2, self.site.n_kv_heads, self.site.d_head).permute(2, 0, 3, 1, 4)
        return k, v
