"""A method from outside: nothing of deltatune is edited for it."""

from torch import Tensor

import deltatune as dt


class Toy(dt.Method, name="toy"):
    """W' = (1 + g) W, one gain per output."""

    g: Tensor = dt.param("d_out")

    def fold(self, weight, bias):
        return weight + self.g[:, None] * weight, None if bias is None else bias + self.g * bias

    def post(self, y, x):
        return y + self.g * y
