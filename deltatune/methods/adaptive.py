"""Learned keys and values that each layer and each row weighs anew."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal, ones
from ..core.method import Method, param


class APT(Method, name="apt"):
    """Attention over [P_k'; K] and [P_v'; V], P' = lambda sigma(W h) o P, a gate for each token and one for each layer.

    h is the state of a row's first real token, as the layer's attention reads it. On a causal stack that one sees no other.
    """

    paper = "2305.15212"
    category = "additive"
    where = "attn"
    reads_call = True
    lr = (1e-3, 1e-1)
    exceptions = {"identity": "a prefix takes a share of the attention from the start"}
    n: int = 20  # length of the prefix
    key: Tensor = param("n_kv_heads n d_head", normal(0.02))
    value: Tensor = param("n_kv_heads n d_head", normal(0.02))
    gate: Tensor = param("n d_in", kaiming)  # W
    scale: Tensor = param("1", ones)  # lambda

    @classmethod
    def fits(cls, config, site):
        return site.role == "attn" and site.is_causal is False

    def pre(self, x):
        self.frame.stash[self.place()] = x[torch.arange(len(x), device=x.device), self.first(x)]
        return x

    def kv(self, key, value):
        h = self.frame.stash.pop(self.place())
        gate = (self.scale * torch.sigmoid(F.linear(h, self.gate)))[:, None, :, None]  # (B, 1, n, 1)
        return gate * self.key, gate * self.value

    def place(self):
        """Where h lies from the attention's input to its keys."""
        return f"apt {id(self.switch)} {self.path} {self.site.name}"

    def first(self, x):
        """(B), where the rows' first real tokens are; soft tokens may stand in front of them."""
        ids, mask = self.call.ids(self.site.stack), self.call.mask(self.site.stack)
        if mask is None:
            n_soft = 0 if ids is None else x.shape[1] - ids.shape[1]
            return torch.full((len(x),), n_soft, device=x.device)
        if mask.ndim != 2 or mask.shape[1] > x.shape[1]:
            raise ValueError(
                f"{self.site.name}: apt looks for the first real token under a (B, T) mask, and this call has another one"
            )
        return (mask != 0).int().argmax(1) + x.shape[1] - mask.shape[1]
