"""Conditional adapters: a few tokens of each row go through the frozen block, all of them through a bottleneck beside it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import routed
from ..core.inits import kaiming, ones, uniform
from ..core.method import param
from .bottleneck import Bottleneck

N_ITERATIONS, FIRST, DECAY = 20, 4.0, 0.7  # of the coordinate descent: how many, the first temperature, its factor


def soft_top_k(s: Tensor, k: Tensor, real: Tensor, eps: float) -> Tensor:
    """argmax of l.s + eps H(l) over 0 <= l <= 1 with the sum k: (B, T) scores, (B, 1) counts, (B, T) real tokens.

    Coordinate descent on the dual, the temperature falling to `eps` (2303.09752, 2304.04947). Other tokens get 0; where k
    is their number, all real ones get 1.
    """
    low = torch.finfo(s.dtype).min
    log_k, b, now = k.to(s.dtype).log(), -s, max(FIRST, eps)
    a = torch.zeros_like(log_k)
    for _ in range(N_ITERATIONS):
        a = now * (log_k - ((s + b) / now).masked_fill(~real, low).logsumexp(1, keepdim=True))
        b = -F.relu(s + a)
        now = max(DECAY * now, eps)
    soft = ((s + a + b) / now).exp()
    return torch.where(k < real.sum(1, keepdim=True), soft, 1.0).masked_fill(~real, 0.0)


def top_k(s: Tensor, k: Tensor, real: Tensor, n: int) -> Tensor:
    """(B, n) places, in order: a row's k real tokens of highest score, and padding in what is left over."""
    order = s.masked_fill(~real, -math.inf).sort(dim=1, descending=True, stable=True).indices
    chosen = (order.argsort(1) < k) & real
    rank = torch.where(chosen, 2, torch.where(real, 0, 1))
    return rank.sort(dim=1, descending=True, stable=True).indices[:, :n].sort(1).values


class Coda(Bottleneck, name="coda"):
    """Y = X + A(LN(X)) + l (block(X_k) - X_k), X_k the k = T / reduction tokens of highest score s = LN(X) w, l their soft top-k.

    The frozen block runs on those tokens alone, which attend to each other; LN is the adapter's own, U = 0 at the start. For
    stacks where all tokens see all others: elsewhere which tokens are chosen would tell of later ones. The paper trains the
    model so on its pretraining data before the task's.
    """

    paper = "2304.04947"
    where = "block"
    kinds = frozenset({"block"})
    around_kinds = frozenset({"block"})
    reads_call = True
    exceptions = {"identity": "most tokens go past the frozen block from the start"}
    r: int = 64  # bottleneck width
    reduction: int = 3  # one token of so many goes through the frozen block; 1: all
    eps: float = 0.1  # temperature of the soft top-k; the paper takes 0.02 to 1
    gain: Tensor = param("d_out", ones)
    offset: Tensor = param("d_out")
    down: Tensor = param("r d_out", kaiming)
    down_bias: Tensor = param("r")
    up: Tensor = param("d_out r")
    up_bias: Tensor = param("d_out")
    router: Tensor = param("d_out", uniform("d_out"))

    @classmethod
    def fits(cls, config, site):
        return site.is_causal is False

    @classmethod
    def slots_of(cls, config):
        return {key: slot for key, slot in cls.slots.items() if key != "router" or config.reduction > 1}

    def build(self, base, dtype):
        if self.reduction < 1:
            raise ValueError(f"reduction = {self.reduction}, but one token of at least 1 goes through the block")
        if self.eps <= 0:
            raise ValueError(f"eps = {self.eps}, but a temperature lies above 0")
        self.names = routed.arguments(base.module)
        self.biased = routed.relative(base.module, self.names)
        super().build(base, dtype)

    def around(self, x, base):
        h = F.layer_norm(x, x.shape[-1:], self.gain, self.offset)
        z = self.mlp(h)
        if self.reduction == 1:
            return base(x) + z
        real = self.real(x)
        s = F.linear(h, self.router[None]).squeeze(-1)
        s = s if s.dtype == torch.float64 else s.float()
        k = -(real.sum(1, keepdim=True) // -self.reduction)
        share = soft_top_k(s, k, real, self.eps)
        index = top_k(s, k, real, -(x.shape[1] // -self.reduction))
        moved = self.inside(x, base, real, index) - routed.take(x, index)
        moved = routed.take(share, index)[..., None] * moved
        y = x + z
        return y.scatter_add(1, index[..., None].expand_as(moved), moved.to(y.dtype))

    def inside(self, x, base, real, index):
        """(B, K, D), the block on the tokens `index`; the deltas in it read a call of these tokens."""
        before = self.frame.call
        self.frame.call = routed.call_for(self, real, index)
        try:
            return routed.run(self, base, self.names, self.biased, x, index)
        finally:
            self.frame.call = before

    def real(self, x):
        """(B, T), the real tokens; soft ones in front are real. A row without any counts as whole."""
        mask = None if self.site.patches or self.site.stack == "vision" else self.call.mask(self.site.stack)
        if mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask.ndim != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] > x.shape[1]:
            raise ValueError(
                f"{self.site.name}: coda chooses among the real tokens of rows {tuple(x.shape[:2])} under a (B, T) mask, not "
                f"under one of shape {tuple(mask.shape)}"
            )
        real = F.pad(mask != 0, (x.shape[1] - mask.shape[1], 0), value=True)
        return real | ~real.any(1, keepdim=True)
