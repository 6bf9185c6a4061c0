"""All layers moved by one short vector: its random projection, by Fastfood, is every layer's update."""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import ones, zeros
from ..core.method import Method, bank, param

_LOW, _RADIX = 0xFFFFFFFF, 64


def walsh_hadamard(x):
    """H x of a vector of n = 2^k numbers, H the n x n matrix of 1 and -1 with H H = n: in k / 6 products, O(n log n).

    H is the Kronecker product of smaller ones, of 64 x 64 and what is left.
    """
    n, done = x.numel(), 1
    while done < n:
        c = min(_RADIX, n // done)
        h = x.new_ones(1, 1)
        while len(h) < c:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        x = x.view(-1, c) @ h if done == 1 else h @ x.view(-1, c, done)
        done *= c
    return x.reshape(n)


def fastfood(x, n, sign, order, gauss):
    """The first n of H G P H B x / sqrt(n |g|^2): x is filled up with zeros, or cut, to a power of two of at least n.

    B = diag(sign), P takes the entries in `order`, G = diag(gauss). A unit x has an image of length 1 on average.
    """
    size = sign.numel()
    x = F.pad(x, (0, size - x.numel())) * sign
    x = walsh_hadamard(walsh_hadamard(x).index_select(0, order) * gauss)[:n]
    return x / (n * gauss.square().sum()).sqrt()


def mixed(x, key):
    """A 32-bit hash of whole numbers below 2^32: the same on every device, no product above 2^63."""
    x = ((x ^ key) * 0x2C1B3C6D) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x297A2D39) & _LOW
    return x ^ (x >> 16)


def keys_of(seed):
    """What one layer's random parts are drawn from: numbers below 2^32."""
    return [zlib.crc32(f"{seed} {i}".encode()) for i in range(10)]


def drawn(n, keys, device, dtype):
    """(sign, order, gauss) of 2^k >= n entries: random, and nothing but functions of their place and the keys.

    So they are drawn again at each use instead of kept, and are the same on every device but for rounding in `gauss`. The
    order is made of steps that can be taken back, each a permutation of 2^k numbers: times an odd number, plus one, shifted
    onto itself.
    """
    k = max(1, (n - 1).bit_length())
    at = torch.arange(2**k, device=device)
    one, two = mixed(at, keys[0]), mixed(at, keys[1])
    sign = (one & 1).to(dtype) * 2 - 1
    one, two = (((x >> 8).to(dtype) + 0.5) / 2**24 for x in (one, two))
    gauss = (-2 * one.log()).sqrt() * (2 * math.pi * two).cos()
    order = at
    for odd, plus in zip(keys[2::2], keys[3::2], strict=True):
        order = (order * ((odd | 1) & 0x7FFFFFFF) + plus) & (2**k - 1)
        order = order ^ (order >> max(1, k // 2))
    return sign, order, gauss


class IntrinsicSAID(Method, name="intrinsic_said"):
    """theta' = theta + s P(t): t one trained vector of all layers, P a layer's own random projection, s its trained scale.

    P is Fastfood's, on weight and bias together; t = 0 and s = 1 at the start. `said=False` leaves the scales out (DID). P is
    drawn anew at each use from the adapter's seed, and nothing of it is kept or saved. The gradient is the true one; the
    reference divides it by a layer's padded size, which changes how much of it the layers have. The reference has a scale and
    a projection for each tensor, weight and bias apart, the paper a scale for each layer.
    """

    paper = "2012.13255"
    category = "reparameterized"
    where = "all-linear"
    kinds = frozenset({"linear", "conv2d", "embedding", "norm"})
    limits = {"d": "d_in*d_out"}
    lr = (3e-3, 1e-1)
    d: int = 20000  # numbers that are trained, the layers' scales among them
    said: bool = True  # a scale for each layer
    t: Tensor = bank("d-n_scales", zeros, train=True)
    s: Tensor = param("1", ones)

    @classmethod
    def slots_of(cls, config):
        return {key: slot for key, slot in cls.slots.items() if key != "s" or config.said}

    @classmethod
    def numbers(cls, config, sites):
        return {site.name: {"n_scales": len(sites) if config.said else 0} for site in sites}

    def build(self, base, dtype):
        super().build(base, dtype)
        self.n_bias = 0 if base.bias is None else base.bias.numel()
        self.keys = keys_of(f"{self._bank[0].seed} {self.site.name}")

    def update(self, n):
        """s P(t), (n)"""
        t = self.t
        with torch.no_grad():
            parts = drawn(n, self.keys, t.device, t.dtype)
        with torch.autocast(t.device.type, enabled=False):
            moved = fastfood(t, n, *parts)
            return self.s * moved if self.said else moved

    def fold(self, weight, bias):
        n = weight.numel()
        moved = self.update(n + self.n_bias)
        weight = weight + moved[:n].view(weight.shape)
        return weight, bias + moved[n:] if self.n_bias else bias
