"""A tensor made again from what autograd keeps of its making anyway, so that nobody keeps it a second time.

    a * b            where both are kept: the input of a gated MLP's last layer
    gelu, silu       from their input

One operation, whose result has the same bits. Longer ways back (the four operations of an RMSNorm) cost more time than they are worth.
"""

from collections.abc import Callable, Sequence
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Make = Callable[..., Tensor]


def recipe(x: Tensor) -> tuple[Sequence[Tensor], Make | None]:
    """(parts, make), `make(*parts)` equal to `x` of parts that the graph of `x` keeps; where it keeps none, (x,) and None."""
    node: Any = x.grad_fn
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(
        True
    )  # checkpoints, offloading: nothing is kept as it is
    if node is not None and hooks is None:
        name = node.name()
        if name == "MulBackward0":
            parts = node._saved_self, node._saved_other
            if all(t is not None and t.ndim == x.ndim for t in parts):  # no number, whose dtype counts for less
                return parts, mul
        if name == "SiluBackward0":
            return (node._saved_self,), F.silu
        if name == "GeluBackward0":
            return (node._saved_self,), lambda t, how=node._saved_approximate: F.gelu(t, approximate=how)
    return (x,), None
