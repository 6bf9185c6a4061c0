"""y + s B A x, the low-rank update of a linear layer's output."""

from .fused import low_rank as low_rank
from .grouped import add_grouped as add_grouped
from .naive import add_each as add_each
from .naive import add_low_rank as add_low_rank
