"""y + s B A x, the low-rank update of a linear layer's output."""

from .naive import add_low_rank as add_low_rank
