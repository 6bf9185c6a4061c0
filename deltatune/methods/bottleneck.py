"""Bottleneck adapters: a two-layer MLP behind a sub-layer."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..core.inits import truncated
from ..core.method import Method, param

Activation = Literal["relu", "gelu", "silu", "tanh"]


class Sequential(Method, name="sequential"):
    """y' = y + U f(D y + c) + e, behind attention and MLP, each before the residual add; near 0 at the start."""

    paper = "1902.00751"
    category = "additive"
    where = "o,mlp.down"
    kinds = frozenset({"linear"})
    lr = (3e-4, 5e-3)
    exceptions = {"identity": "the paper starts near the identity, U and D at N(0, 0.01^2), not at it"}
    r: int = 64  # bottleneck width
    f: Activation = "relu"  # activation between the two matrices
    down: Tensor = param("r d_out", truncated(0.01))
    down_bias: Tensor = param("r")
    up: Tensor = param("d_out r", truncated(0.01))
    up_bias: Tensor = param("d_out")

    def post(self, y, x):
        h = getattr(F, self.f)(F.linear(y, self.down, self.down_bias))
        return y + F.linear(h, self.up, self.up_bias)
