"""Rescaled activations."""

from typing import Literal

from torch import Tensor

from ..core.inits import ones
from ..core.method import Method, param


class IA3(Method, name="ia3"):
    """y' = l * y on keys and values, x' = l * x into the MLP's last matrix; l = 1 at the start."""

    paper = "2205.05638"
    category = "additive"
    where = "k,v,mlp.down"
    lr = (3e-3, 5e-2)
    side: Literal["auto", "input", "output"] = (
        "auto"  # what is scaled; auto: inputs of an MLP's last matrix, else outputs
    )
    scale: Tensor = param("n", ones)

    def dims(self, base):
        self.on_input = self.side == "input" or self.side == "auto" and self.site.role == "mlp.down"
        return {"n": self.site.d_in if self.on_input else self.site.d_out}

    def fold(self, weight, bias):
        if self.on_input:
            return weight * self.scale, bias
        return weight * self.scale[:, None], None if bias is None else bias * self.scale

    def pre(self, x):
        return x * self.scale if self.on_input else x

    def post(self, y, x):
        return y if self.on_input else y * self.scale
