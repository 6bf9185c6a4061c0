"""Layers updated jointly: a group's updates are cut from one large matrix, and that is factored."""

import math

import torch
from torch import Tensor

from ..core.inits import kaiming
from ..core.method import Method, bank
from .intrinsic import drawn_for, fastfood, keys_of


def _first_zero(shape, **_):
    """0 in the first factor, U(-1/sqrt(r), 1/sqrt(r)) in the others: their Kronecker product starts at 0"""
    value = kaiming(shape)
    value[0] = 0.0
    return value


class SuperLoRA(Method, name="super_lora"):
    """[vec dW_1 ... vec dW_n] of a group of layers = alpha vec(B_1 A_1 (x) ... (x) B_K A_K), a square cut where it is too long.

    One group, one factor: LoRA on all layers as one matrix, 2 r sqrt(n) numbers for n weights. Several `splits` are the paper's
    LoNKr. With `share` below 1 that matrix has as many entries as that share of the weights, and each layer's part of it is
    thrown onto the layer's weights by a fixed random projection (Fastfood), drawn from the adapter's seed and never saved.
    Layers fill a square in their order, row after row; each computes the rows that it lies in alone. The paper's shuffling and
    its tensors of higher order are not here.
    """

    paper = "2403.11887"
    category = "reparameterized"
    where = "q,v"
    kinds = frozenset({"linear", "conv2d", "embedding"})
    limits = {"r": "min(d_in,d_out)"}
    lr = (3e-4, 2e-2)
    live = ("keep_random",)
    r: int = 8  # rank of each factor
    alpha: float = 1.0  # scale of the update
    groups: int = 1  # groups of neighbouring layers, each with its own matrix
    splits: int = 1  # Kronecker factors
    share: float = 1.0  # entries of the matrix for each weight; below 1 a random projection spreads them
    keep_random: bool = False  # draw the projection once: faster, for 8 to 24 bytes a weight
    a: Tensor = bank("splits r side", kaiming, train=True)
    b: Tensor = bank("splits side r", _first_zero, train=True)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.groups < 1:
            raise ValueError(f"{cls.name}: groups = {config.groups}, but it must be at least 1")
        if not 0 < config.share <= 1:
            raise ValueError(f"{cls.name}: share = {config.share}, but a share lies above 0 and not above 1")
        return config

    @classmethod
    def numbers(cls, config, sites):
        if config.groups > len(sites):
            raise ValueError(f"{cls.name}: groups = {config.groups}, but there are {len(sites)} layers")
        found, sizes = {}, [0] * config.groups
        for i, site in enumerate(sites):
            group, n = i * config.groups // len(sites), math.ceil(config.share * site.n_weights)
            found[site.name] = {"group": group, "first": sizes[group], "n_own": n}
            sizes[group] += n
        for one in found.values():
            one["side"] = _side(sizes[one["group"]], max(1, config.splits))  # 0 is refused where the shapes are
        return found

    def build(self, base, dtype):
        super().build(base, dtype)
        self.keys = keys_of(f"{self._bank[0].seed} {self.site.name}")

    def bank_key(self, key, slot, shape):
        return f"{super().bank_key(key, slot, shape)}_group{self.group}"

    def update(self):
        """The layer's own entries of its group's matrix (n_own)."""
        b, a, width = self.b, self.a, self.side**self.splits
        start, stop = self.first // width, (self.first + self.n_own - 1) // width + 1
        at, rows = torch.arange(start, stop, device=b.device), None
        for k in range(self.splits):
            mine = b[k][at // self.side ** (self.splits - 1 - k) % self.side] @ a[k]
            rows = mine if rows is None else (rows[:, :, None] * mine[:, None]).flatten(1)
        skip = self.first - start * width
        return rows.flatten()[skip : skip + self.n_own]

    def fold(self, weight, bias):
        with torch.autocast(weight.device.type, enabled=False):
            moved = self.update()
            if self.share < 1:
                parts = drawn_for(self, moved.numel(), weight.numel(), moved)
                moved = fastfood(moved, weight.numel(), *parts)
        return weight + self.alpha * moved.view(weight.shape), bias


def _side(n, splits):
    """The smallest side of K equal square factors whose Kronecker product has at least n entries."""
    side = max(1, math.floor(n ** (0.5 / splits)) - 1)
    while side ** (2 * splits) < n:
        side += 1
    return side
