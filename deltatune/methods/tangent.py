"""Low-rank updates that are linear in what is trained: the tangent of the update at its start."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from ..core.inits import zeros
from ..core.method import fixed
from ..kernels.lora import low_rank
from .lora import LowRank


class LLoRA(LowRank, name="l_lora"):
    """W' = g(p0) + J_g(p0) (p - p0), g(A, B) = W + (alpha / r) B A, the tangent of LoRA at its start p0 = (A0, B0), B0 = 0.

    Linear in p: p0 + sum_i c_i (p_i - p0), several trainings from one p0 added up, is the sum of what each changes. At B0 = 0 the
    tangent is W + s (B - B0) A0, so A has no gradient and B alone learns, as in the paper's code.
    """

    paper = "2310.04742"
    lr = (1e-5, 2e-2)
    still = {"a": "the tangent at B = 0 does not depend on A, as in the paper's code"}
    r: int = 16  # rank
    alpha: float = 32.0  # scale of the update, divided by r^power
    a0: Tensor = fixed("r d_in", zeros)
    b0: Tensor = fixed("d_out r", zeros)

    def build(self, base, dtype):
        super().build(base, dtype)
        with torch.no_grad():
            self.a0.copy_(self.a)
            self.b0.copy_(self.b)

    def fold(self, weight, bias):
        moved = (self.a - self.a0, self.b - self.b0)
        start, change = jvp(lambda a, b: weight + self.scale * (b @ a), (self.a0, self.b0), moved)
        return start + change, bias

    def linear(self, x, base):
        """B0 A0 + B0 (A - A0) + (B - B0) A0 = B0 A + (B - B0) A0: one update of twice the rank."""
        own, dropped = self.exact, F.dropout(x, self.dropout, self.training)
        b = torch.cat([own.b0, own.b - own.b0], 1).to(x.dtype)
        return low_rank(base, x, dropped, torch.cat([own.a, own.a0]).to(x.dtype), b, self.scale)
