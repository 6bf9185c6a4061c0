"""Adapters that see the other tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, ones, uniform
from ..core.method import Method, param


def faint(shape, **_):
    """A hundredth of `nn.Linear`'s start."""
    return 0.01 * kaiming(shape)


def faint_bias(shape, **known):
    """A hundredth of `nn.Linear`'s start."""
    return 0.01 * uniform("n_heads*width")(shape, **known)


class TinyAttention(Method, name="tiny_attention"):
    """y' = y + U MHA(W LN(y) + c) + e, W the queries, keys and values of tiny heads, in front of the MLP; near 0 at the start.

    y is what the norm behind the attention gives, where one stands there, else what the attention adds to the residual stream.
    It attends to real tokens alone, on decoders to no later ones.
    """

    paper = "2211.01979"
    category = "additive"
    where = "attn_norm|attn"
    kinds = frozenset({"norm", "span"})
    fast_kinds = frozenset({"norm"})
    reads_call = True
    lr = (3e-4, 1e-2)
    exceptions = {
        "identity": "it starts near the identity, U and e at a hundredth of a linear layer's start, not at it"
    }
    n_heads: int = 1  # how many heads
    width: int = 1  # of a head
    dropout: float = 0.1  # share of the attention's weights that is dropped while training
    gain: Tensor = param("d_out", ones)
    offset: Tensor = param("d_out")
    qkv: Tensor = param("3*n_heads*width d_out", kaiming)
    qkv_bias: Tensor = param("3*n_heads*width", uniform("d_out"))
    up: Tensor = param("d_out n_heads*width", faint)
    up_bias: Tensor = param("d_out", faint_bias)

    @classmethod
    def fits(cls, config, site):
        return site.role in ("attn_norm", "attn")

    def build(self, base, dtype):
        if self.site.is_causal is None:
            raise ValueError("its attention does not say whether a token sees later ones (is_causal)")
        super().build(base, dtype)

    def post(self, y, x):
        h = F.linear(F.layer_norm(y, y.shape[-1:], self.gain, self.offset), self.qkv, self.qkv_bias)
        q, k, v = h.unflatten(-1, (3, self.n_heads, self.width)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, self.seen(y), self.dropout if self.training else 0.0)
        return y + F.linear(a.transpose(1, 2).flatten(2), self.up, self.up_bias)

    def seen(self, y):
        """(B or 1, 1, T, T), who sees whom; a padded token sees itself too, soft tokens in front are real. None: all see all."""
        mask, length = self.call.mask(self.site.stack), y.shape[1]
        if self.call.n_past or mask is not None and (mask.ndim != 2 or mask.shape[1] > length):
            raise ValueError(
                f"{self.site.name}: tiny_attention attends to whole rows under a (B, T) mask, and this call has a part of them "
                f"or another mask; generate with use_cache=False"
            )
        if mask is None and not self.site.is_causal:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=y.device)
        seen = (seen.tril() if self.site.is_causal else seen)[None, None]
        if mask is None:
            return seen
        real = F.pad(mask != 0, (length - mask.shape[1], 0), value=True)[:, None, None]
        return seen & real | torch.eye(length, dtype=torch.bool, device=y.device)
