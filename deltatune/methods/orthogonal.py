"""Rotations of a layer's input: W' = W R^T with R orthogonal, made of small blocks by the Cayley transform."""

import torch
from torch import Tensor

from ..core.inits import ones, zeros
from ..core.method import Method, param
from ..core.schedule import Schedule
from ..core.sharded import assign, whole


class Rotation(Method):
    """The common part: blocks R_i = (I + Q_i)(I - Q_i)^-1, Q_i skew, its upper triangle trained and 0 at the start.

    `block` is the size of a block; where it does not divide a layer's width, the nearest size that does.
    """

    category = "reparameterized"
    where = "q,v"
    limits = {"block": "d_in"}

    def dims(self, base):
        dims = super().dims(base)
        self.check_limits(dims)
        size = nearest_divisor(self.site.d_in, self.block)
        return dims | {"size": size, "n_blocks": self.site.d_in // size}

    def skew(self, q):
        """(..., size, size) with the entries of `q` (..., size (size - 1) / 2) above the diagonal."""
        size = self.size(q)
        rows, cols = torch.triu_indices(size, size, 1, device=q.device)
        upper = q.new_zeros(*q.shape[:-1], size * size).index_copy(-1, rows * size + cols, q)
        upper = upper.unflatten(-1, (size, size))
        return upper - upper.mT

    def size(self, q):
        """The size of the blocks whose upper triangles `q` holds."""
        return round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)


def nearest_divisor(width, size):
    """The divisor of `width` that is nearest to `size`, of two as near the smaller one; as HF PEFT's OFT takes it."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - size), d))


def exact_turn(skew):
    """(I + Q)(I - Q)^-1 - I = 2 (I - Q)^-1 Q"""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, 2 * skew)


def turned(x, turn):
    """x R for blocks R - I = `turn` (n or 1, size, size) along the last dimension of `x` (..., n size)."""
    parts = x.unflatten(-1, (-1, turn.shape[-1]))
    moved = parts @ turn[0] if len(turn) == 1 else torch.einsum("...nk,nkc->...nc", parts, turn)
    return x + moved.flatten(-2)  # R - I keeps its digits where the activations are bf16; R itself, near I, would not


class InBall(Schedule):
    """Where COFT bounds the blocks, Q goes back onto the ball before the first step and after each."""

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.after_step(-1)

    @torch.no_grad()
    def after_step(self, step):
        for delta in self.adapter.deltas.values():
            if isinstance(delta, OFT) and delta.eps is not None:
                assign(delta.q, bounded(whole(delta.q), delta.eps))


def bounded(q, eps):
    """`q` (n, ...) with each block's |Q| <= eps / sqrt(n), the norm that of the whole skew matrix."""
    most, norm = eps / q.shape[-2] ** 0.5, 2**0.5 * q.norm(dim=-1, keepdim=True)
    # what lies on the ball stays bit for bit, so that a run that is taken up again goes on as it was
    return torch.where(norm > most * (1 + 1e-6), q * (most / norm.clamp_min(1e-30)), q)


class OFT(Rotation, name="oft"):
    """W' = W R^T, R block-diagonal of R_i = (I + Q_i)(I - Q_i)^-1 with Q_i skew and 0 at the start: each row is rotated.

    On linear layers the input is rotated and no weight is formed. With `terms` the inverse is its series and R only nearly
    orthogonal; `eps` bounds |Q_i| (COFT), by a projection that the gradient goes straight through.
    """

    paper = "2306.07280"
    lr = (1e-4, 1e-2)
    schedule = InBall
    block: int = 32  # size of a block; where it does not divide the width, the nearest size that does
    share: bool = False  # one block for all of a layer's
    terms: int = 5  # of the series (I + Q)(I + Q + Q^2 + ...), counting powers from 0; 0 is the exact inverse
    eps: float | None = None  # largest norm of all blocks together; None: not bounded
    q: Tensor = param("n_stored size*(size-1)//2")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.terms != 0 and config.terms < 3:
            raise ValueError(f"{cls.name}: terms = {config.terms}, but it must be 0, which is exact, or at least 3")
        if config.eps is not None and config.eps <= 0:
            raise ValueError(f"{cls.name}: eps = {config.eps}, but a bound must lie above 0")
        return config

    def dims(self, base):
        dims = super().dims(base)
        if dims["size"] < 2:
            raise ValueError(
                f"block = {self.block} comes to blocks of 1 in a width of {self.site.d_in}, which cannot turn"
            )
        return dims | {"n_stored": 1 if self.share else dims["n_blocks"]}

    def turn(self):
        """R - I, (n or 1, size, size), in the tensors' own dtype."""
        q = self.exact.q
        if self.eps is not None:
            q = q + (bounded(q, self.eps) - q).detach()
        skew = self.skew(q)
        if not self.terms:
            return exact_turn(skew)
        inner = skew
        for _ in range(self.terms - 3):
            inner = skew + skew @ inner
        return skew + inner + skew @ inner

    def fold(self, weight, bias):
        return turned(weight, self.turn().mT), bias

    def pre(self, x):
        return turned(x, self.turn().to(x.dtype))


class BOFT(Rotation, name="boft"):
    """W' = diag(s) W R^T, R a product of butterfly factors, each block-diagonal between two permutations; s = 1, R = I at first.

    Factor i turns pairs of half blocks that stand 2^i half blocks apart, so that m factors mix 2^(m - 1) blocks. A layer has
    as many of the `factors` as its blocks can be halved.
    """

    paper = "2311.06243"
    lr = (1e-4, 1e-2)
    block: int = 8  # size of a block; where it does not divide the width, the nearest size that does
    factors: int = 2  # butterfly factors; 1 is block-diagonal
    q: Tensor = param("m n_blocks size*(size-1)//2", zeros)
    s: Tensor = param("d_out", ones)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.factors < 1:
            raise ValueError(f"{cls.name}: factors = {config.factors}, but it must be at least 1")
        return config

    def dims(self, base):
        dims = super().dims(base)
        if dims["size"] < 2:
            raise ValueError(
                f"block = {self.block} comes to blocks of 1 in a width of {self.site.d_in}, which cannot turn"
            )
        return dims | {"m": n_factors(self.factors, dims["size"], dims["n_blocks"])}

    def fold(self, weight, bias):
        for i, turn in enumerate(exact_turn(self.skew(self.q))):
            weight = butterfly(weight, turn.mT, i)
        return weight * self.s[:, None], bias

    def linear(self, x, base):
        own = self.exact
        turns = exact_turn(self.skew(own.q)).to(x.dtype)
        bias = base(x.new_zeros(1, x.shape[-1]))
        for i in reversed(range(len(turns))):
            x = butterfly(x, turns[i], i)
        y = base(x)
        return y + (y - bias) * (own.s - 1).to(y.dtype)


def n_factors(factors, size, n_blocks):
    """How many factors `n_blocks` blocks of `size` can take, at most `factors`."""
    if size % 2:
        return 1
    return min(factors, 1 + (n_blocks & -n_blocks).bit_length() - 1)


def butterfly(x, turn, i):
    """One factor of the product: `turned` where each block is a pair of half blocks that stand 2^i half blocks apart."""
    if i == 0:
        return turned(x, turn)
    half = turn.shape[-1] // 2
    paired = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2)
    return turned(paired.flatten(-4), turn).unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4)
