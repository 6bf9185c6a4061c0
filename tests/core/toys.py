"""Small methods, each for one word or one promise of the core; `conftest.toys` registers them for a test's time."""

import torch.nn.functional as F
from torch import Tensor

from deltatune.core.inits import normal
from deltatune.core.method import Method, bank, param


class MaskReader(Method, name="mask_reader"):
    """y' = y + d * (share of real tokens in the row); it needs the call's mask."""

    kinds = frozenset({"linear"})
    reads_call = True
    d: Tensor = param("d_out", normal(0.5))

    def post(self, y, x):
        mask = self.call.mask(self.site.stack)
        return y + self.d * mask.to(y.dtype).mean(1)[:, None, None]


class TaskReader(Method, name="task_reader"):
    """y' = y + d_task, one row of d per task."""

    kinds = frozenset({"linear"})
    reads_call = True
    reads = ("task_ids",)
    n: int = 3  # tasks
    d: Tensor = param("n d_out", normal(0.5))

    def post(self, y, x):
        return y + self.d[self.call.task_ids][:, None]


class Parallel(Method, name="toy_parallel"):
    """y' = y + U relu(D x), beside a whole sub-layer."""

    kinds = frozenset({"span"})
    where = "mlp"
    r: int = 4
    down: Tensor = param("r d_in", normal(0.3))
    up: Tensor = param("d_out r", normal(0.3))

    def post(self, y, x):
        return y + F.linear(F.relu(F.linear(x, self.down)), self.up)


class Shared(Method, name="toy_shared"):
    """W' = W + diag(d) A with A random, shared by all sites of one shape and never saved."""

    d: Tensor = param("d_out", normal(0.5))
    a: Tensor = bank("d_out d_in")

    def fold(self, weight, bias):
        return weight + self.d[:, None] * self.a, bias


class Common(Method, name="toy_common"):
    """W' = W + diag(d) A with A trained, one for all sites of one shape."""

    d: Tensor = param("d_out", normal(0.5))
    a: Tensor = bank("d_out d_in", train=True)

    def fold(self, weight, bias):
        return weight + self.d[:, None] * self.a, bias


class In(Method, name="toy_in"):
    """x' = s x and nothing else: fast on a linear."""

    s: Tensor = param("d_in", normal(0.5))

    def fold(self, weight, bias):
        return weight * (1 + self.s), bias

    def pre(self, x):
        return x * (1 + self.s)


class Out(Method, name="toy_out"):
    """y' = y + g y + A x: it reads both y and x."""

    g: Tensor = param("d_out", normal(0.5))
    a: Tensor = param("d_out d_in", normal(0.3))

    def fold(self, weight, bias):
        grown = 1 + self.g
        return weight * grown[:, None] + self.a, None if bias is None else bias * grown

    def post(self, y, x):
        return y * (1 + self.g) + F.linear(x, self.a)


class Slow(Method, name="toy_slow"):
    """W' = W + d W^2 elementwise: on the weight path alone."""

    d: Tensor = param("d_out", normal(0.5))

    def fold(self, weight, bias):
        return weight + self.d[:, None] * weight.square(), bias
