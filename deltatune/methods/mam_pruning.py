"""MAM's modules, pruned while training: single entries, or rows of a prefix and ranks of an adapter."""

import torch.nn.functional as F

from .bottleneck import Parallel
from .first_order import Entries, Groups
from .prefix import PrefixTuning


class PrunedPrefix(PrefixTuning):
    """The common part: the keys and values themselves are trained and pruned, without a network that makes them."""

    category = "hybrid"
    helper = True

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.mid:
            raise ValueError(f"{cls.name}: mid = {config.mid}, but what is pruned is the prefix itself: mid must be 0")
        return config


class UPrefix(Entries, PrunedPrefix, name="u_prefix"):
    """Attention over [P_k; K] and [P_v; V], P 0 but at the entries of largest |p dL/dp| over all layers; n rows throughout."""


class SPrefix(Groups, PrunedPrefix, name="s_prefix"):
    """Attention over [P_k; K] and [P_v; V], of P the rows of largest mean |p dL/dp|: each layer has its own number of rows.

    The score is that of a row whose key and value become 0; the row that is pruned leaves the attention.
    """

    groups = {"row": {"key": 1, "value": 1}}

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.shift:
            raise ValueError(f"{cls.name}: shift = True, but tokens cannot start behind prefixes of several lengths")
        return config


class UParallel(Entries, Parallel, name="u_parallel"):
    """y' = y + s A(x) beside each MLP, the matrices and vectors of A 0 but at the entries of largest |w dL/dw| over all layers."""

    category = "hybrid"
    helper = True


class SParallel(Groups, Parallel, name="s_parallel"):
    """y' = y + s A(x) beside each MLP, of A the ranks of largest mean |w dL/dw|: each layer has its own width.

    A rank is a row of D, its bias and a column of U. The bias behind U is one group more.
    """

    category = "hybrid"
    helper = True
    groups = {"rank": {"down": 0, "down_bias": 0, "up": 1}, "offset": {"up_bias": None}}

    def mlp(self, h, dropout=0.0):
        u = getattr(F, self.f)(F.linear(h, self.down, self.down_bias))
        y = F.linear(F.dropout(u, dropout, self.training), self.up)
        return y + self.up_bias if self.up_bias.numel() else y
