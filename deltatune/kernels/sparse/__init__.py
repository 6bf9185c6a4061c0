"""y = (W + S) x + b + s, S and s given as values at indices of [W | b]: a sparse change of a linear layer."""

from .naive import scattered as scattered
from .tiled import linear as linear
