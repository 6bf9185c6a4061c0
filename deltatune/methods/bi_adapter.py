"""Bi-Adapter: adapters of a few bits a weight, trained through them in full precision and kept as codes."""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import shapes
from ..core.groups import packed, unpacked
from ..core.inits import constant, kaiming, truncated, zeros
from ..core.method import Method, fixed, param

ROUNDS = 500  # of the fit, as in the paper's code: with many bits it has not settled by then


@functools.cache
def levels(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The 2^b values that stand for N(0, 1), and the 2^b - 1 edges between them, both ascending.

    By turns an edge is moved to the middle of its two values, and a value to the middle of the mass between its two edges.
    """
    with torch.device("cpu"):
        values, end = torch.zeros(2**bits, dtype=torch.double), torch.ones(1, dtype=torch.double)
        for _ in range(ROUNDS):
            edges = (values[1:] + values[:-1]) / 2
            below = torch.cat([0 * end, torch.special.ndtr(edges), end])
            values = torch.special.ndtri((below[1:] + below[:-1]) / 2)
    return tuple(values.float().tolist()), tuple(edges.float().tolist())


class Few(Method):
    """The common part: a matrix w runs as c[q] s + m, q the nearest of 2^b levels c of N(0, 1) to z = (w - m) / (s + 1e-5).

    m and s are the mean and the standard deviation of its entries. The gradient takes c[q] for z and goes on through m and s:
    dL/dw = g + (sum g o (c[q] - z)) z / (n - 1), g = dL/dw', but for the 1e-5. The file holds q in b bits, m and s, and loads
    with `weights="coded"`, of which nothing trains; `save(resumable=True)` holds w.
    """

    paper = "2307.16867"
    category = "quantisation"
    lr = (3e-4, 1e-2)
    exceptions = {"identity": "2^b levels have no 0: the paper starts near the identity, with U or B of N(0, 0.001^2)"}
    bits: int = 1  # b
    weights: Literal["trained", "coded"] = "trained"  # coded, as in a finished file: nothing trains

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 1 <= config.bits <= 8:
            raise ValueError(f"{cls.name}: bits = {config.bits}, but it must lie between 1 and 8")
        return config

    @classmethod
    def slots_of(cls, config):
        if config.weights == "trained":
            return cls.slots
        found = {}
        for key, slot in cls.slots.items():
            found[f"{key}_codes"] = fixed(f"({slot.shape.replace(' ', '*')}+7)//8*bits", _any_codes)
            found |= {f"{key}_mean": fixed("1", zeros), f"{key}_std": fixed("1", constant(0.02))}
        return found

    def build(self, base, dtype):
        sizes = self.dims(base)
        self.__dict__["full"] = {key: shapes.sizes(slot.shape, sizes) for key, slot in self.slots.items()}
        device = torch.empty(0).device
        device = torch.device("cpu") if device.type == "meta" else device
        self.__dict__["_table"] = tuple(torch.tensor(one, dtype=dtype, device=device) for one in levels(self.bits))
        if one := [key for key, shape in self.full.items() if shape == (1, 1)]:
            raise ValueError(f"its matrix {one[0]!r} has one entry, and one number has no standard deviation")
        super().build(base, dtype)

    def table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The levels and the edges between them, where the matrices are."""
        if self._table[0].device != like.device or self._table[0].dtype != like.dtype:
            self.__dict__["_table"] = tuple(t.to(like) for t in self._table)
        return self._table

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, z, m and s of a matrix."""
        mean, std = weight.mean(), weight.std()
        z = (weight - mean) / (std + 1e-5)
        return torch.bucketize(z.detach(), self.table(z)[1]), z, mean, std

    def w(self, key: str) -> Tensor:
        """The matrix as it runs; what is loaded gives the bits of what was saved."""
        own = self.exact
        if self.weights == "trained":
            q, z, mean, std = own.parts(getattr(own, key))
            return (own.table(z)[0][q] + (z - z.detach())) * std + mean
        codes, mean, std = (getattr(own, f"{key}_{part}") for part in ("codes", "mean", "std"))
        shape = self.full[key]
        q = unpacked(codes, self.bits)[: torch.Size(shape).numel()].view(shape)
        return own.table(std)[0][q.long()] * std + mean

    def finished(self, leaf):
        if self.weights == "coded":
            return super().finished(leaf)
        kept = {}
        for key in self.slots:
            held = getattr(self, key)  # of experts all at once, as their folds run: other sums have other last bits
            q, _, mean, std = torch.vmap(self.parts)(held) if held.ndim > 2 else self.parts(held)
            q = q.flatten(-2)
            kept[f"{key}_codes"] = packed(F.pad(q, (0, -q.shape[-1] % 8)), self.bits)
            kept |= {f"{key}_mean": mean[..., None], f"{key}_std": std[..., None]}
        return leaf.changed(weights="coded"), kept


def _any_codes(shape, **_):
    """Any codes"""
    return torch.randint(256, shape, dtype=torch.uint8)


class BiAdapter(Few, name="bi_adapter"):
    """y' = y + s U relu(D x), x the residual stream beside the MLP and its norm, U and D of b bits a weight, without biases."""

    where = "mlp+norm|mlp"
    kinds = frozenset({"span"})
    r: int = 32  # bottleneck width
    scale: float = 1.0  # s; the paper takes the best of 0.01 to 100
    dropout: float = 0.0  # share of the bottleneck's units that is dropped while training; in the paper's code 0.1
    down: Tensor = param("r d_in", kaiming)
    up: Tensor = param("d_out r", truncated(0.001))

    @classmethod
    def fits(cls, config, site):
        return site.layer is not None  # a span over several blocks has no input to be beside

    def post(self, y, x):
        u = F.dropout(F.relu(F.linear(x, self.w("down").to(x.dtype))), self.dropout, self.training)
        return y + self.scale * F.linear(u, self.w("up").to(x.dtype))


class BiLoRA(Few, name="bi_lora"):
    """W' = W + s B A, B and A of b bits a weight."""

    where = "q,v"
    limits = {"r": "min(d_in,d_out)"}
    r: int = 32  # rank
    scale: float = 1.0  # s; the paper takes the best of 0.01 to 100
    dropout: float = 0.0  # share of the ranks that is dropped while training; in the paper's code 0.1
    a: Tensor = param("r d_in", kaiming)
    b: Tensor = param("d_out r", truncated(0.001))

    def fold(self, weight, bias):
        return weight + self.scale * (self.w("b") @ self.w("a")), bias

    def post(self, y, x):
        h = F.dropout(F.linear(x, self.w("a").to(x.dtype)), self.dropout, self.training)
        return y + self.scale * F.linear(h, self.w("b").to(x.dtype))
