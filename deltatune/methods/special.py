"""Vectors for special tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import normal
from ..core.method import Method, param


class PASTA(Method, name="pasta"):
    """h_p' = h_p + e_i at the position p of a row's i-th special token, in front of every block; e near 0 at the start.

    Without `ids` a row's special tokens are its first and its last real one; on a causal stack the last of its prompt, which are
    the tokens without a label, in `generate` those that it began with. One behind the n-th stays as it is.
    """

    paper = "2210.04382"
    category = "additive"
    where = "block"
    kinds = frozenset({"block"})
    reads_call = True
    lr = (2.5e-4, 2e-2)
    exceptions = {"identity": "the paper's code starts near the identity, e at N(0, 0.02^2), not at it"}
    n: int = 2  # how many vectors, one for each special token of a row
    ids: tuple[int, ...] = ()  # which tokens are special: BERT's [CLS] and [SEP] are 101 and 102
    dropout: float = 0.1  # share of the vectors' entries that is dropped while training
    vectors: Tensor = param("n d_in", normal(0.02))

    @classmethod
    def fits(cls, config, site):
        return site.stack != "decoder" and not site.patches

    def pre(self, x):
        order = self.order(x.shape[1])
        table = torch.cat([self.vectors.new_zeros(1, x.shape[-1]), self.vectors])
        return x + F.dropout(table[order], self.dropout, self.training)

    def order(self, length):
        """(B, T), i for the i-th special token of its row, 0 for what is none; soft tokens in front are none."""
        call, ids = self.call, self.call.ids(self.site.stack)
        if ids is None:
            raise ValueError(f"{self.site.name}: pasta looks for special tokens, and the call has no input_ids")
        if not self.ids:
            if call.n_past and self.site.stack != "encoder":  # what is generated is no part of the prompt
                return ids.new_zeros(ids.shape[0], length)
            count = call.given(ids.shape[1], self.site, ids.device).long().cumsum(1)
            first_or_last = (count == 1) | (count == count[:, -1:])
            hit = (first_or_last & (count.diff(dim=1, prepend=torch.zeros_like(count[:, :1])) > 0)).expand(ids.shape)
            order = hit.cumsum(1) * hit
        else:
            mask = call.mask(self.site.stack)
            hit = torch.isin(ids, torch.tensor(self.ids, device=ids.device))
            if mask is not None and mask.ndim == 2:
                hit = hit & (mask[:, -ids.shape[1] :] != 0)
            marks = hit[:, None, :, None].float()
            order = (
                call.keep(self.site, str(id(self)), marks, marks)[0][:, 0, :, 0].cumsum(1).long()[:, -ids.shape[1] :]
                * hit
            )
        return F.pad(order.where(order <= self.n, 0), (length - ids.shape[1], 0))
