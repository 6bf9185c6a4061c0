"""Bottleneck adapters: a two-layer MLP, A(h) = U f(D h + c) + e, behind a sub-layer, behind a block or beside one."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal, ones, truncated
from ..core.method import Method, param

Activation = Literal["relu", "gelu", "silu", "tanh"]


class Bottleneck(Method):
    """The common part: A itself."""

    category = "additive"
    lr = (3e-4, 5e-3)
    f: Activation = "relu"  # activation between the two matrices

    def mlp(self, h, dropout=0.0):
        u = getattr(F, self.f)(F.linear(h, self.down, self.down_bias))
        return F.linear(F.dropout(u, dropout, self.training), self.up, self.up_bias)


class Sequential(Bottleneck, name="sequential"):
    """y' = y + A(y), behind attention and MLP, each before the residual add; near 0 at the start.

    On the norm that ends a block N(z), z = x + y, it is Pfeiffer's form (2005.00052): N(z + A(N(z))). A second one around it
    reads and adds behind it: N(v + A2(N(v))), v = z + A(N(z)).
    """

    paper = "1902.00751"
    where = "o,mlp.down"
    kinds = frozenset({"linear", "block", "norm"})
    around_kinds = frozenset({"norm"})
    exceptions = {"identity": "the paper starts near the identity, U and D at N(0, 0.01^2), not at it"}
    r: int = 64  # bottleneck width
    down: Tensor = param("r d_out", truncated(0.01))
    down_bias: Tensor = param("r")
    up: Tensor = param("d_out r", truncated(0.01))
    up_bias: Tensor = param("d_out")

    def post(self, y, x):
        return y + self.mlp(y)

    def around(self, x, base):
        return base(x, change=lambda z, layer: z + self.mlp(layer(z)))


class Residual(Bottleneck, name="residual"):
    """y' = y + A(LN(y)) behind each block, LN the adapter's own; near 0 at the start."""

    paper = "2004.03829"
    where = "block"
    kinds = frozenset({"block"})
    exceptions = {"identity": "the paper starts near the identity, U and D at N(0, 0.02^2), not at it"}
    r: int = 64  # bottleneck width
    gain: Tensor = param("d_out", ones)
    offset: Tensor = param("d_out")
    down: Tensor = param("r d_out", normal(0.02))
    down_bias: Tensor = param("r")
    up: Tensor = param("d_out r", normal(0.02))
    up_bias: Tensor = param("d_out")

    def post(self, y, x):
        return y + self.mlp(F.layer_norm(y, y.shape[-1:], self.gain, self.offset))


class Parallel(Bottleneck, name="parallel"):
    """y' = y + s A(x), x the input of the sub-layer; U = 0 at the start.

    `mlp` gives it what the MLP's first matrix reads, `mlp+norm` the residual stream in front of the norm.
    """

    paper = "2110.04366"
    where = "mlp"
    kinds = frozenset({"span"})
    lr = (1e-4, 5e-3)
    r: int = 64  # bottleneck width
    scale: float = 4.0  # s
    dropout: float = 0.0  # share of the bottleneck's units that is dropped while training
    down: Tensor = param("r d_in", kaiming)
    down_bias: Tensor = param("r")
    up: Tensor = param("d_out r")
    up_bias: Tensor = param("d_out")

    @classmethod
    def fits(cls, config, site):
        return site.layer is not None  # a span over several blocks has no input to be beside

    def post(self, y, x):
        return y + self.scale * self.mlp(x, self.dropout)
