"""Unified methods: one idea over the tensors of other methods."""

import math
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import bits, shapes
from ..core.inits import normal, uniform
from ..core.method import Method, Slot, bank, fixed, param, shared_tensor
from . import bottleneck, lora


class ProPELT(Method):
    """theta_l = theta o top_k(|M_l|): one prototype for all layers, and for each a binary mask, trained straight through.

    Written in front of a method it makes prototypes under masks of its matrices, and shares its vectors as they are. The
    file holds the prototypes and one bit for each masked entry, and loads with `masks="fixed"`.
    """

    paper = "2305.17682"
    category = "unified"
    fan: ClassVar[int] = -1  # the dimension of a matrix whose size sets the spread of its scores
    score_lr: ClassVar[float] = 1.0  # learning rate of the scores, as a multiple
    keep: float = 0.5  # share of the entries that a mask keeps
    masks: Literal["trained", "fixed"] = "trained"  # fixed, as in a finished file: the prototypes alone train

    def __init_subclass__(cls, name="", **kwargs):
        super().__init_subclass__(name=name, **kwargs)
        for key, slot in cls.slots.items():
            if not slot.shared:
                setattr(cls, key, property(partial(_masked if _is_matrix(slot) else shared_tensor, key)))

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
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
        """The scores of one masked tensor, or the mask itself where it is fixed."""
        size = shape.replace(" ", "*")
        if config.masks == "fixed":
            return {f"{key}bits": fixed(f"({size}+7)//8", partial(_random_bits, size))}
        return {f"{key}score": param(shape, partial(_scores, cls.fan), lr="score_lr")}

    def mask(self, key, shape):
        """The 0 and 1 of one masked tensor."""
        if self.masks == "fixed":
            return bits.unpack(getattr(self, f"{key}bits"), shape)
        return bits.straight_through(getattr(self, f"{key}score"), self.keep)

    def finished(self, leaf):
        scores = dict(self.named_parameters())
        packed = {k.removesuffix("score") + "bits": bits.pack(bits.top(s, self.keep)) for k, s in scores.items()}
        return (leaf.changed(masks="fixed"), packed) if self.masks == "trained" else super().finished(leaf)


def _is_matrix(slot: Slot) -> bool:
    return len(slot.shape.split()) > 1


def _masked(key: str, delta: ProPELT) -> Tensor:
    prototype = shared_tensor(key, delta)
    return prototype * delta.mask(f"{key}_", prototype.shape)


def _scores(fan, shape, **_):
    bound = 1 / math.sqrt(shape[fan] if fan is not None else torch.Size(shape).numel())
    return torch.empty(shape).uniform_(-bound, bound)


def _random_bits(size, shape, *, base, delta, **_):
    (n,) = shapes.sizes(size, delta.dims(base))
    return bits.pack(bits.top(torch.rand(n), delta.keep))


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


class ProPELTLoRA(ProPELT, lora.LoRA, name="propelt_lora"):
    """W' = W + (alpha / r) B_l A_l, one A and one B for all layers, for q and v apart, under the masks of layer l."""

    kinds = frozenset({"linear", "conv2d", "embedding"})
    lr = (1e-4, 1e-2)
    score_lr = 300.0
    r: int = 32  # rank
    alpha: float = 48.0  # scale of the update, divided by r^power
    keep: float = 0.1  # share of the entries that a mask keeps


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
        made = made * self.exact.mask("", made.shape)
        k, v = made.view(self.n, 2, self.site.n_kv_heads, self.site.d_head).permute(1, 2, 0, 3)
        return k[None], v[None]
