"""Updates that are products of small matrices and have a high rank all the same: Hadamard's and Kronecker's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.base import stored
from ..core.inits import kaiming, zeros
from ..core.method import Method, param
from ..kernels.lora import low_rank


def kernel_of(base):
    """How many places a convolution's kernel has; 1 of other layers."""
    return math.prod(stored(base.module, base.site).shape[2:]) if base.site.kind == "conv2d" else 1


def with_core(core, b, a):
    """(O, C k) from a core (r, r, k) of the kernel's places, B (O, r) and A (r, C): FedPara's third proposition."""
    return torch.einsum("ijk,oi,jc->ock", core, b, a).flatten(1)


def outward(shape, *, base, delta, **_):
    """As HF PEFT and LyCORIS start B: beside a core its fan is the layer's outputs, else the rank."""
    return kaiming(shape[::-1]).t() if delta.has_core(base) else kaiming(shape)


class LoHa(Method, name="loha"):
    """W' = W + (alpha / r) (B1 A1) * (B2 A2), entry by entry, of a rank up to r^2; A2 = 0 at the start.

    As a product of two factors it is (B1 . B2) (A1 . A2), where . takes all r^2 products of columns, or rows: on wide linear
    layers that is cheaper than the weight's own gradient, and no weight is formed.
    """

    paper = "2108.06098"
    category = "reparameterized"
    limits = {"r": "min(d_in,d_out)"}
    lr = (3e-4, 2e-2)
    r: int = 8  # rank of each of the two products
    alpha: float = 8.0  # scale of the update, divided by r
    effective: bool = False  # convolutions: (r, r) cores for the kernel's places, and A over the channels alone
    a1: Tensor = param("r width", kaiming)
    b1: Tensor = param("d_out r", outward)
    a2: Tensor = param("r width", zeros)
    b2: Tensor = param("d_out r", outward)
    core1: Tensor = param("r r kernel", kaiming)
    core2: Tensor = param("r r kernel", kaiming)

    @classmethod
    def slots_of(cls, config):
        return {key: slot for key, slot in cls.slots.items() if config.effective or not key.startswith("core")}

    @classmethod
    def count(cls):
        return "2*r*(d_in+d_out)"

    def has_core(self, base):
        return self.effective and kernel_of(base) > 1

    def dims(self, base):
        dims, kernel = super().dims(base), kernel_of(base)
        return dims | {"kernel": kernel, "width": self.site.d_in // (kernel if self.has_core(base) else 1)}

    def build(self, base, dtype):
        super().build(base, dtype)
        if self.effective and not self.has_core(base):
            del self.core1, self.core2
        if 3 * self.r**2 * (self.site.d_in + self.site.d_out) > self.site.d_in * self.site.d_out:
            self.fast = self.has_linear = False  # a layer this narrow has its folded weight sooner

    @property
    def scale(self):
        return self.alpha / self.r

    def fold(self, weight, bias):
        if hasattr(self, "core1"):
            one, two = with_core(self.core1, self.b1, self.a1), with_core(self.core2, self.b2, self.a2)
        else:
            one, two = self.b1 @ self.a1, self.b2 @ self.a2
        return weight + self.scale * one * two, bias

    def flat(self, dtype):
        """A (r^2, I) and B (O, r^2)"""
        own = self.exact
        a = (own.a1[:, None] * own.a2).flatten(0, 1)
        b = (own.b1[:, :, None] * own.b2[:, None]).flatten(1)
        return a.to(dtype), b.to(dtype)

    def post(self, y, x):
        a, b = self.flat(x.dtype)
        return y + self.scale * F.linear(F.linear(x, a), b)

    def linear(self, x, base):
        return low_rank(base, x, x, *self.flat(x.dtype), self.scale)


class Kronecker(Method):
    """The common part: W' = W + scale `left` (x) `right`, which a linear layer runs by reshaping its input, forming no weight."""

    category = "reparameterized"

    def fold(self, weight, bias):
        left, right = self.left(), self.right()
        product = left[:, None, :, None] * right[None, :, None, :]
        return weight + self.scale * product.flatten(2, 3).flatten(0, 1), bias

    def post(self, y, x):
        left, right = (t.to(x.dtype) for t in (self.exact.left(), self.exact.right()))
        h = x.unflatten(-1, (left.shape[1], right.shape[1])) @ right.mT
        # contiguous: else the product goes another way where nothing takes a gradient, and its last bits too
        return y + self.scale * (h.mT.contiguous() @ left.mT).mT.flatten(-2)


class LoKr(Kronecker, name="lokr"):
    """W' = W + (alpha / r) W1 (x) W2 with W2 = B2 A2, and with `both` W1 = B1 A1; W1 = 0 at the start.

    A layer's sizes are each cut into two factors, the smaller one W1's. Where r is no less than half of the larger size of
    W1 or W2, that one is trained as it is.
    """

    paper = "2309.14859"
    lr = (3e-4, 2e-2)
    r: int = 8  # rank of W2
    alpha: float = 8.0  # scale of the update, divided by r
    factor: int = (
        -1
    )  # the size of W1 where it divides the layer's; -1, or as an upper bound: the divisor next below the root
    both: bool = False  # W1 of rank r too
    effective: bool = False  # convolutions: an (r, r) core for the kernel's places, and A2 over channels alone
    w1: Tensor = param("o1 i1", zeros)
    a1: Tensor = param("r i1", kaiming)
    b1: Tensor = param("o1 r", zeros)
    w2: Tensor = param("o2 c2*kernel", kaiming)
    a2: Tensor = param("r width", kaiming)
    b2: Tensor = param("o2 r", outward)
    core: Tensor = param("r r kernel", kaiming)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.factor != -1 and config.factor < 1:
            raise ValueError(f"{cls.name}: factor = {config.factor}, but it must be -1 or at least 1")
        return config

    @classmethod
    def slots_of(cls, config):
        absent = {k for k, there in (("a1", config.both), ("b1", config.both), ("core", config.effective)) if not there}
        return {key: slot for key, slot in cls.slots.items() if key not in absent}

    @classmethod
    def count(cls):
        return "n1+n2"

    @property
    def scale(self):
        return self.alpha / self.r

    def halves(self, base):
        return halves(self.config, self.site.d_out, self.site.d_in // kernel_of(base))

    def has_core(self, base):
        return self.effective and kernel_of(base) > 1 and not self.halves(base)[-1]

    def dims(self, base):
        kernel, ((o1, o2), (i1, c2), whole1, whole2) = kernel_of(base), self.halves(base)
        core = self.has_core(base)
        width = c2 if core else c2 * kernel
        n1 = o1 * i1 if whole1 else self.r * (o1 + i1)
        n2 = o2 * c2 * kernel if whole2 else self.r * (o2 + width) + core * self.r**2 * kernel
        return super().dims(base) | {
            "o1": o1, "o2": o2, "i1": i1, "c2": c2, "kernel": kernel, "width": width, "n1": n1, "n2": n2,
        }  # fmt: skip

    def build(self, base, dtype):
        super().build(base, dtype)
        *_, whole1, whole2 = self.halves(base)
        absent = {"a1", "b1"} if whole1 else {"w1"}
        absent |= {"a2", "b2", "core"} if whole2 else {"w2"} if self.has_core(base) else {"w2", "core"}
        for key in absent & self._parameters.keys():
            delattr(self, key)

    def left(self):
        return self.w1 if hasattr(self, "w1") else self.b1 @ self.a1

    def right(self):
        if hasattr(self, "w2"):
            return self.w2
        return with_core(self.core, self.b2, self.a2) if hasattr(self, "core") else self.b2 @ self.a2


def halves(config, d_out, channels):
    """LoKr's (o1, o2) and (i1, c2) at a layer, and whether W1 and W2 are trained as they are."""
    (o1, o2), (i1, c2) = cut(d_out, config.factor), cut(channels, config.factor)
    whole1 = not config.both or 2 * config.r >= max(o1, i1)
    return (o1, o2), (i1, c2), whole1, 2 * config.r >= max(o2, c2)


def cut(n, factor):
    """n as (m, n / m): m is `factor` where that divides n, else the largest divisor up to it and to the root of n."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    m = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0 and (factor < 0 or d <= factor))
    return m, n // m


class KronA(Kronecker, name="krona"):
    """W' = W + s A (x) B, A (a1, a2) and B (d_out / a1, d_in / a2); B = 0 at the start."""

    paper = "2212.10650"
    lr = (3e-4, 2e-2)
    scale: float = 1.0  # s
    rows: int = 0  # rows of A: the divisor of d_out nearest to it; 0: nearest to the root of d_out
    cols: int = 0  # columns of A, likewise of d_in
    a: Tensor = param("a1 a2", kaiming)
    b: Tensor = param("d_out//a1 d_in//a2", zeros)

    def dims(self, base):
        found = {}
        for key, name, n in (("rows", "a1", self.site.d_out), ("cols", "a2", self.site.d_in)):
            if not 0 <= (wish := getattr(self, key)) <= n:
                raise ValueError(f"{key} = {wish}, but it must lie between 0 and {n}")
            found[name] = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - (wish or n**0.5)), d))
        return super().dims(base) | found

    def left(self):
        return self.a

    def right(self):
        return self.b
