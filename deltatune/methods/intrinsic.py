"""All layers moved by one short vector: its random projection, by Fastfood, is every layer's update."""

import math
import weakref
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import ones, zeros
from ..core.method import Method, bank, param

_LOW, _RADIX = 0xFFFFFFFF, 64
_BLOCK = 2**16  # places that are drawn at a time on a CPU: what is made on the way stays in its cache
# delta -> (for what, its random parts): in no file, copy or state of it, and gone with it
_KEPT = weakref.WeakKeyDictionary()


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

    B = diag(sign), P takes the entries in `order`, G = diag(gauss). A unit x has an image of length 1 on average. Where x
    needs no more than 2^m places, the first H x is H of 2^m times x, over and over, and is read so.
    """
    short = min(sign.numel(), places(x.numel()))
    x = walsh_hadamard(F.pad(x, (0, short - x.numel())) * sign[:short])
    x = walsh_hadamard(x.index_select(0, order & (short - 1)) * gauss)[:n]
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


def drawn(n_in, n, keys, device, dtype):
    """(sign, order, gauss) of 2^m, 2^k and 2^k entries, 2^m >= n_in and 2^k >= n: random, and nothing but functions of
    their place and the keys.

    So they can be drawn again at each use instead of kept, and are the same on every device but for rounding in `gauss`.
    The order is made of steps that can be taken back, each a permutation of 2^k numbers: times an odd number, plus one,
    shifted onto itself.
    """
    k = max(1, (n - 1).bit_length())
    sign = (mixed(torch.arange(min(2**k, places(n_in)), device=device), keys[0]) & 1).to(dtype) * 2 - 1
    in_blocks = torch.device(device).type == "cpu" and not torch.compiler.is_compiling()
    starts = range(0, 2**k, min(_BLOCK, 2**k) if in_blocks else 2**k)
    blocks = [_drawn_at(torch.arange(i, i + starts.step, device=device), k, keys, dtype) for i in starts]
    return sign, *(torch.cat(part) for part in zip(*blocks, strict=True))


def _drawn_at(at, k, keys, dtype):
    """The order and gauss at the places `at`, of 2^k."""
    one, two = (((mixed(at, key) >> 8).to(dtype) + 0.5) / 2**24 for key in keys[:2])
    gauss = (-2 * one.log()).sqrt() * (2 * math.pi * two).cos()
    order = at
    for odd, plus in zip(keys[2::2], keys[3::2], strict=True):
        order = (order * ((odd | 1) & 0x7FFFFFFF) + plus) & (2**k - 1)
        order = order ^ (order >> max(1, k // 2))
    return order.to(torch.int32), gauss


def drawn_for(delta, n_in, n, like):
    """What is `drawn` by the keys of a delta, on the device and in the dtype of `like`; with `keep_random` once."""

    @torch.no_grad()
    def draw():
        return drawn(n_in, n, delta.keys, like.device, like.dtype)

    if torch.compiler.is_compiling():
        return draw()
    if not delta.keep_random:
        _KEPT.pop(delta, None)
        return draw()
    what = n_in, n, like.device, like.dtype
    if _KEPT.get(delta, ("", ()))[0] != what:
        with torch.inference_mode(False):  # else what is drawn in an evaluation could not be trained with
            _KEPT[delta] = what, draw()
    return _KEPT[delta][1]


def places(n):
    """The power of two, above 1, that holds n entries."""
    return 2 ** max(1, (n - 1).bit_length())


class IntrinsicSAID(Method, name="intrinsic_said"):
    """theta' = theta + s P(t): t one trained vector of all layers, P a layer's own random projection, s its trained scale.

    P is Fastfood's, on weight and bias together; t = 0 and s = 1 at the start. `said=False` leaves the scales out (DID). P is
    drawn from the adapter's seed, anew at each use or once, and never saved. The gradient is the true one; the reference
    divides it by a layer's padded size, which changes how much of it the layers have. The reference has a scale and a
    projection for each tensor, weight and bias apart, the paper a scale for each layer.
    """

    paper = "2012.13255"
    category = "reparameterized"
    where = "all-linear"
    kinds = frozenset({"linear", "conv2d", "embedding", "norm"})
    limits = {"d": "d_in*d_out"}
    lr = (3e-3, 1e-1)
    live = ("keep_random",)
    d: int = 20000  # numbers that are trained, the layers' scales among them
    said: bool = True  # a scale for each layer
    keep_random: bool = False  # draw P once: faster, for 8 to 16 bytes a weight
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
        parts = drawn_for(self, t.numel(), n, t)
        with torch.autocast(t.device.type, enabled=False):
            moved = fastfood(t, n, *parts)
            return self.s * moved if self.said else moved

    def fold(self, weight, bias):
        n = weight.numel()
        moved = self.update(n + self.n_bias)
        weight = weight + moved[:n].view(weight.shape)
        return weight, bias + moved[n:] if self.n_bias else bias
