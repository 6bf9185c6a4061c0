"""Learned keys and values in front of an attention's own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal, uniform
from ..core.method import Method, bank, param


class PrefixTuning(Method, name="prefix_tuning"):
    """Attention over [P_k; K] and [P_v; V], in every layer; seen by every query, outside rotary embedding and cache.

    With `mid` a network makes the prefix while training, P = V tanh(U E + u) + v, its E and U shared by all layers as the
    paper has it; what is saved is the prefix alone.
    """

    paper = "2101.00190"
    category = "additive"
    where = "attn"
    lr = (1e-3, 1e-1)
    exceptions = {"identity": "a prefix takes a share of the attention from the start"}
    n: int = 20  # length of the prefix
    shift: bool = False  # the real tokens start at position n, as behind a prefix that lies in the cache (HF PEFT's)
    mid: int = 0  # width of the network that makes the prefix while training; 0: keys and values are trained themselves
    key: Tensor = param("n_kv_heads n d_head", normal(0.02))
    value: Tensor = param("n_kv_heads n d_head", normal(0.02))
    embedding: Tensor = bank("n d_in", normal(1.0), train=True, by="stack")
    inner: Tensor = bank("mid d_in", train=True, by="stack")
    inner_bias: Tensor = bank("mid", uniform("d_in"), train=True, by="stack")
    outer: Tensor = param("2*n_kv_heads*d_head mid", kaiming)
    outer_bias: Tensor = param("2*n_kv_heads*d_head", uniform("mid"))

    @classmethod
    def slots_of(cls, config):
        flat = ("key", "value")
        return {key: slot for key, slot in cls.slots.items() if (key in flat) == (config.mid == 0)}

    def kv(self, key, value):
        k, v = self.exact.prefix()  # the network in fp32: what is saved is what was trained
        return k[None], v[None]

    def prefix(self):
        """(H_kv, n, D) keys and values."""
        if not self.mid:
            return self.key, self.value
        h = torch.tanh(F.linear(self.embedding, self.inner, self.inner_bias))
        made = F.linear(h, self.outer, self.outer_bias)  # (n, 2 H_kv D)
        return made.view(self.n, 2, self.site.n_kv_heads, self.site.d_head).permute(1, 2, 0, 3)

    def finished(self, leaf):
        if not self.mid:
            return super().finished(leaf)
        key, value = self.prefix()
        return leaf.changed(mid=0), {"key": key, "value": value}
