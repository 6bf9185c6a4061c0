"""A binary mask on the base's weights, trained through its scores."""

from typing import Literal

import torch
from torch import Tensor

from ..core import bits
from ..core.method import Method, Slot, fixed, param


def scores(shape, *, delta, **_):
    """U(-scale, s), with s such that the share `masked` starts at or below tau."""
    top = (delta.scale + delta.tau) / delta.masked - delta.scale
    return torch.empty(shape).uniform_(-delta.scale, top)


def drawn(shape, *, base, delta, **_):
    """The mask of such scores, in bits"""
    return bits.pack(scores(tuple(base.weight.shape), delta=delta) > delta.tau)


class ThresholdMask(Method, name="threshold_mask"):
    """W' = 1[M > tau] o W: which weights are there, not what they are; M is trained as if the mask's gradient were its own.

    The blocks at the bottom keep their weights (0 and 1 of BERT's 12), biases have no mask. The file holds one bit a weight,
    and loads with `masks="fixed"`.
    """

    paper = "2004.12406"
    category = "partial"
    where = "attn,mlp,pooler|mlp"  # not every backbone has a pooler
    kinds = frozenset({"linear", "conv2d", "embedding"})
    lr = (3e-4, 1e-2)
    exceptions = {"identity": "the paper starts with a share of the weights masked"}
    tau: float = 0.01  # a weight is there where its score lies above
    scale: float = 0.02  # how far below 0 scores start
    masked: float = 0.05  # share of the weights that is masked at the start
    skip: float = 1 / 6  # share of the blocks, from the bottom, that keep their weights
    masks: Literal["trained", "fixed"] = "trained"  # fixed, as in a finished file: nothing trains
    score: Tensor = param("d_out d_in", scores)
    bits: Tensor = fixed("(d_out*d_in+7)//8", drawn)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.masked <= 1:
            raise ValueError(f"{cls.name}: masked = {config.masked}, but a share lies above 0 and not above 1")
        if not 0 <= config.skip < 1:
            raise ValueError(f"{cls.name}: skip = {config.skip}, but it must lie between 0 and 1")
        if config.scale + config.tau <= 0:
            raise ValueError(
                f"{cls.name}: scale = {config.scale}, but scores that start at -scale must reach below tau = {config.tau}"
            )
        return config

    @classmethod
    def slots_of(cls, config) -> dict[str, Slot]:
        key = "bits" if config.masks == "fixed" else "score"
        return {key: cls.slots[key]}

    @classmethod
    def fits(cls, config, site):
        return site.layer is None or site.layer >= int(config.skip * site.n_layers)

    def mask(self, weight):
        """The 0 and 1 of each weight."""
        if self.masks == "fixed":
            return bits.unpack(self.bits, tuple(weight.shape)).to(weight.dtype)
        return (self.score > self.tau).to(self.score.dtype) + (self.score - self.score.detach())

    def fold(self, weight, bias):
        return weight * self.mask(weight), bias

    def finished(self, leaf):
        if self.masks == "fixed":
            return super().finished(leaf)
        return leaf.changed(masks="fixed"), {"bits": bits.pack(self.score > self.tau)}
