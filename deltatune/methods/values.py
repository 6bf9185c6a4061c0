"""Values at entries that somebody else chose: how a change of any shape is written down."""

import torch
from torch import Tensor

from ..core.method import fixed
from .sparse import Sparse


def first(shape, **_):
    """The first positions"""
    return torch.arange(*shape, dtype=torch.int32)


class Values(Sparse, name="values"):
    """[W | b]' = [W | b] + v at given entries; without an index, at all of them. What `dt.combine` writes."""

    paper = "none: a form of files"
    helper = True
    index: Tensor = fixed("k", first)
