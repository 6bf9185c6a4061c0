"""Mixtures of experts of one kind, weighed anew at each token: soft routers, no expert is left out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal, ones
from ..core.method import Method, param
from .task_gates import add_product


class TokenRouter(Method):
    """The common part: w = softmax(R x), a token's share of each expert."""

    category = "multi-task"
    kinds = frozenset({"linear"})

    def shares(self, x):
        """(..., E), the softmax in fp32."""
        logits = F.linear(x, self.router)
        return logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)


class HydraLoRA(TokenRouter, name="hydra_lora"):
    """y' = y + (alpha / r) sum_e w_e B_e A x, w = softmax(R x) of each token, one A for all B_e; B = 0 at the start."""

    paper = "2404.19245"
    where = "mlp"
    limits = {"r": "min(d_in,d_out)"}
    lr = (1e-4, 1e-2)
    n_experts: int = 4  # E
    r: int = 4  # rank
    alpha: float = 32.0  # scale of the update, divided by r
    dropout: float = 0.05  # share of A's inputs that is dropped while training
    a: Tensor = param("r d_in", kaiming)
    b: Tensor = param("d_out n_experts r")
    router: Tensor = param("n_experts d_in", kaiming)

    def post(self, y, x):
        h = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        h = self.shares(x)[..., None] * h[..., None, :]  # (..., E, R): B meets all experts in one product
        return add_product(y, h.flatten(-2), self.b.flatten(1), self.alpha / self.r)


class MoLoRA(TokenRouter, name="molora"):
    """y' = y + (alpha / r) sum_e w_e B_e A_e x, w = softmax(R x) at each token; B = 0 at the start."""

    paper = "2309.05444"
    where = "q,k,v,o,mlp"
    limits = {"r": "min(d_in,d_out)"}
    lr = (1e-4, 1e-2)
    n_experts: int = 10  # E
    r: int = 4  # rank of each expert
    alpha: float = 16.0  # scale of the update, divided by r
    a: Tensor = param("n_experts r d_in", normal(0.02))
    b: Tensor = param("d_out n_experts r")
    router: Tensor = param("n_experts d_in", normal(0.02))

    def post(self, y, x):
        h = F.linear(x, self.a.flatten(0, 1)).unflatten(-1, (self.n_experts, self.r))
        h = self.shares(x)[..., None] * h
        return add_product(y, h.flatten(-2), self.b.flatten(1), self.alpha / self.r)


class MoV(TokenRouter, name="mov"):
    """y' = (sum_e w_e l_e) * y on keys and values, w = softmax(R y) of each head; so too what the MLP's last matrix reads.

    All l are 1 at the start. Heads share R, and each has a part of l. In a gated MLP the paper's code routes by the first
    factor of what that matrix reads, here the product itself does.
    """

    paper = "2309.05444"
    where = "k,v,mlp.down"
    lr = (1e-3, 5e-2)
    n_experts: int = 30  # E
    vectors: Tensor = param("n_experts n", ones)  # l
    router: Tensor = param("n_experts n/n_heads", normal(0.02))

    @classmethod
    def numbers(cls, config, sites):
        return {site.name: dict(zip(("has_pre", "n", "n_heads"), scaled(site), strict=True)) for site in sites}

    def scale(self, x):
        """x (..., n), a head at a time."""
        h = x.unflatten(-1, (self.n_heads, -1))
        # the shares' sum is 1; (l - 1) keeps its digits where the activations are bf16, l itself, near 1, would not
        apart = (self.exact.vectors - 1).to(x.dtype).unflatten(-1, (self.n_heads, -1))
        return x + x * torch.einsum("...he,ehd->...hd", self.shares(h), apart).flatten(-2)

    def pre(self, x):
        return self.scale(x) if self.has_pre else x

    def post(self, y, x):
        return y if self.has_pre else self.scale(y)


def scaled(site):
    """Is a layer's input scaled, and not its output? How wide it is, and in how many heads."""
    if site.role == "mlp.down":
        return True, site.d_in, 1
    group, _, part = (site.role or "").partition(".")
    by_head = group in ("attn", "cross") and part in ("q", "k", "v") and site.d_head and site.d_out % site.d_head == 0
    return False, site.d_out, site.d_out // site.d_head if by_head else 1
