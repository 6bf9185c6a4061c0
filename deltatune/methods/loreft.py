"""Interventions on hidden states: what a block gives at a few positions is edited inside a small subspace."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, uniform
from ..core.method import Method, param


def reflectors(shape, **_):
    """Householder vectors, each below its own 1, whose product's first columns, (D, r), are uniform up to their signs."""
    z = torch.randn(shape).tril()
    first = z.diagonal()
    return (z / (first + z.norm(dim=0).copysign(first))).tril(-1)


class LoReFT(Method, name="loreft"):
    """h' = h + R^T (W h + b - R h) behind each block at a row's first and last positions; R (r, D) has orthonormal rows.

    R is a product of Householder reflections. Of a row of n tokens the `first` and the `last` are edited, of each n // 2 at
    most; on a causal stack those of its prompt, which are the tokens without a label, in `generate` those that it began with.
    Other weights for the last ones: a Sum of one leaf with last=0 and one with first=0.
    """

    paper = "2404.03592"
    category = "reparameterized"
    where = "block"
    kinds = frozenset({"block"})
    reads_call = True
    limits = {"r": "d_in"}
    lr = (1e-4, 1e-2)
    exceptions = {"identity": "the paper's code starts with R and W random, not at the identity"}
    r: int = 8  # size of the subspace
    first: int = 7  # how many positions at a row's start
    last: int = 7  # how many at its end
    dropout: float = 0.0  # share of the edited states' entries that is dropped while training
    reflectors: Tensor = param("d_in r", reflectors)
    w: Tensor = param("r d_in", kaiming)
    b: Tensor = param("r", uniform("d_in"))

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key in ("first", "last"):
            if getattr(config, key) < 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 0")
        if not config.first + config.last:
            raise ValueError(f"{cls.name}: first = 0 and last = 0 leave no position to edit")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.stack != "decoder"

    def basis(self):
        """R^T (D, r), in the tensors' own dtype."""
        below = self.exact.reflectors.tril(-1)
        with torch.autocast(below.device.type, enabled=False):
            return torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0)))

    def post(self, y, x):
        call = self.call
        if call.n_past and self.site.stack != "encoder":  # what is generated is no part of the prompt
            return y
        hit, basis = self.places(y)[..., None], self.basis()
        h = F.linear(y, (self.exact.w - basis.t()).to(y.dtype), self.b)
        out = y + F.linear(h.where(hit, 0.0), basis.to(y.dtype))
        return F.dropout(out, self.dropout, self.training).where(hit, y) if self.dropout and self.training else out

    def places(self, y):
        """(B or 1, T), the positions that are edited; soft tokens in front are none of the row's."""
        ids, mask = self.call.ids(self.site.stack), self.call.mask(self.site.stack)
        length = ids.shape[1] if ids is not None else mask.shape[1] if mask is not None else y.shape[1]
        given = self.call.given(length, self.site, y.device)
        count = given.long().cumsum(1)
        n = count[:, -1:]
        hit = given & ((count <= (n // 2).clamp(max=self.first)) | (count > n - (n // 2).clamp(max=self.last)))
        return F.pad(hit, (y.shape[1] - length, 0))
