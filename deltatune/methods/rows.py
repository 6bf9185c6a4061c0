"""Rows of the token table."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.method import Method, bank, fixed


def own_rows(shape, *, base, delta, **_):
    """W[ids]"""
    table = base.weight
    wrong = [i for i in delta.ids if not 0 <= i < table.shape[0]]
    if wrong:
        raise ValueError(f"token {wrong[0]} is not one of the table's {table.shape[0]}")
    return table[list(delta.ids)]


def origin(shape, *, delta, **_):
    """W[ids]"""
    return torch.zeros(shape) if delta.old.is_meta else delta.old.cpu().clone()


class TokenRows(Method, name="token_rows"):
    """W'[ids] = R: the vectors of some tokens alone, R = W[ids] at the start.

    The sites of one leaf share R, so that an output layer that is tied to the table stays tied: name both in `where`.
    """

    paper = "none: HF PEFT's trainable tokens"
    category = "partial"
    where = "embed"
    helper = True
    kinds = frozenset({"embedding", "linear"})
    fast_kinds = kinds
    lr = (1e-4, 1e-2)
    ids: tuple[int, ...] = (0, 1, 2, 3)  # whose vectors
    old: Tensor = fixed("k d_in", own_rows)
    rows: Tensor = bank("k d_in", origin, train=True)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not config.ids or len(set(config.ids)) < len(config.ids):
            raise ValueError(f"{cls.name}: ids must name some tokens, each once, not {config.ids}")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.role in ("embed", "lm_head")

    def build(self, base, dtype):
        super().build(base, dtype)
        self.fast = self.fast and base.is_plain  # an embedding that scales what it looks up runs on its weight

    def dims(self, base):
        return super().dims(base) | {"k": len(self.ids)}

    def fold(self, weight, bias):
        return weight.index_copy(0, torch.tensor(self.ids, device=weight.device), self.rows), bias

    def post(self, y, x):
        ids = torch.tensor(self.ids, device=y.device)
        if self.site.kind == "embedding":  # x are the tokens
            hit = x[..., None] == ids
            return torch.where(hit.any(-1, keepdim=True), self.rows[hit.long().argmax(-1)], y)
        moved = (self.exact.rows - self.exact.old).to(x.dtype)
        return y.index_add(-1, ids, F.linear(x, moved))
