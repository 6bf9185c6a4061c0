"""Learned keys and values in front of an attention's own."""

from torch import Tensor

from ..core.inits import normal
from ..core.method import Method, param


class PrefixTuning(Method, name="prefix_tuning"):
    """Attention over [P_k; K] and [P_v; V], in every layer; seen by every query, outside rotary embedding and cache."""

    paper = "2101.00190"
    category = "additive"
    where = "attn"
    lr = (1e-3, 1e-1)
    exceptions = {"identity": "a prefix takes a share of the attention from the start"}
    n: int = 20  # length of the prefix
    key: Tensor = param("n_kv_heads n d_head", normal(0.02))
    value: Tensor = param("n_kv_heads n d_head", normal(0.02))

    def kv(self, key, value):
        return self.key[None], self.value[None]
