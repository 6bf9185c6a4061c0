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
    It attends to real tokens alone, on decoders to no later ones. `average` makes one head of all at inference, the mean of
    their queries, keys and values and the sum of what they write, so that equal heads are averaged into themselves.
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
    average: bool = False  # at inference all heads are averaged into one
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
        qkv, bias, up = self.heads()
        h = F.linear(F.layer_norm(y, y.shape[-1:], self.gain, self.offset), qkv, bias)
        q, k, v = h.unflatten(-1, (3, -1, self.width)).permute(2, 0, 3, 1, 4)
        k, v = self.call.keep(self.site, str(id(self.exact)), k, v)
        seen = attended(self.call, self.site, q.shape[2], k.shape[2], y.device)
        a = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0)
        return y + F.linear(a.transpose(1, 2).flatten(2), up, self.up_bias)

    def heads(self):
        """Weights (3 h w, d), (3 h w) and (d, h w) of the heads that run."""
        if self.training or not self.average:
            return self.qkv, self.qkv_bias, self.up
        each = (3, self.n_heads, self.width)
        qkv, bias = (
            self.qkv.unflatten(0, each).mean(1).flatten(0, 1),
            self.qkv_bias.unflatten(0, each).mean(1).flatten(),
        )
        return qkv, bias, self.up.unflatten(1, each[1:]).sum(1)

    def finished(self, leaf):
        if not self.average:
            return super().finished(leaf)
        self.eval()
        qkv, bias, up = self.heads()
        return leaf.changed(n_heads=1, average=False), {**self.state_dict(), "qkv": qkv, "qkv_bias": bias, "up": up}


def attended(call, site, n_queries, n_keys, device):
    """(B or 1, 1, Q, K), who sees whom; a padded token sees itself too, soft tokens in front are real. None: all see all."""
    mask = call.mask(site.stack)
    if mask is not None and (mask.ndim != 2 or mask.shape[1] > n_keys):
        raise ValueError(
            f"{site.name}: what attends here sees whole rows of {n_keys} tokens under a (B, T) mask, and this call has another "
            f"mask or a part of them; generate with a dynamic cache, or with use_cache=False"
        )
    if mask is None and not site.is_causal:
        return None
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    own = torch.eye(n_keys, dtype=torch.bool, device=device)[n_keys - n_queries :]
    seen = (seen.tril(n_keys - n_queries) if site.is_causal else seen)[None, None]
    if mask is None:
        return seen
    real = F.pad(mask != 0, (n_keys - mask.shape[1], 0), value=True)[:, None, None]
    return seen & real | own
