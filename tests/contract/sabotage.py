"""One broken method for each check of the contract suite, named after it: a check that cannot fail is a defect.

Where a check can break in several ways a second one is called `<check>_too`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.inits import constant, normal
from deltatune.core.method import Method, fixed, param
from deltatune.core.schedule import Schedule


class Shift(Method):
    """b' = b + d and y' = y + d: a sound method, in both spaces. Each class below breaks one thing of it."""

    kinds = frozenset({"linear"})
    d: Tensor = param("d_out")

    def fold(self, weight, bias):
        return weight, self.d if bias is None else bias + self.d

    def post(self, y, x):
        return y + self.d


class Sound(Shift, name="sound"):
    """The one that every check has to let through."""


class Identity(Method, name="identity"):
    """It starts beside the identity and does not say so."""

    d: Tensor = param("d_out", constant(0.1))

    def fold(self, weight, bias):
        return weight, self.d if bias is None else bias + self.d


class BaseUntouched(Shift, name="base_untouched"):
    """Building it scales the base."""

    def build(self, base, dtype):
        super().build(base, dtype)
        base.module.weight.data.mul_(1.5)


class BaseUntouchedToo(Method, name="base_untouched_too"):
    """Its fold writes into the base's own weight."""

    kinds = frozenset({"linear"})
    d: Tensor = param("d_out")

    def fold(self, weight, bias):
        weight.data += self.d.detach()[:, None].to(weight.dtype)
        return weight * (1 + self.d[:, None]), bias


class Trains(Shift, name="trains"):
    """One of its tensors has no part in the output."""

    idle: Tensor = param("d_in")


class TrainsToo(Shift, name="trains_too"):
    """It trains what it does not declare."""

    def dims(self, base):
        self.more = nn.Parameter(torch.zeros(1))
        return super().dims(base)

    def post(self, y, x):
        return y + self.d * (1 + self.more)


class FastFold(Shift, name="fast_fold"):
    """Its activation path is another function than its weight path."""

    def post(self, y, x):
        return y + 1.1 * self.d


class FastFoldToo(Shift, name="fast_fold_too"):
    """The outputs agree, the gradients do not."""

    def post(self, y, x):
        return y + 2 * self.d - self.d.detach()


class Merge(Method, name="merge"):
    """Its fold is another where no gradient is asked for, as in a merge."""

    kinds = frozenset({"linear"})
    d: Tensor = param("d_out", normal(0.1))

    def fold(self, weight, bias):
        grow = self.d if torch.is_grad_enabled() else 2 * self.d
        return weight * (1 + grow[:, None]), bias


class Unmerge(Shift, name="unmerge"):
    """Folding it changes it."""

    def fold(self, weight, bias):
        self.d.data.add_(0.1)
        return super().fold(weight, bias)


class SaveLoad(Shift, name="save_load"):
    """Its file holds fewer digits than it does."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}d"] = destination[f"{prefix}d"].bfloat16().to(self.d.dtype)


class OtherSeed(Shift, name="other_seed"):
    """A random tensor of it is neither saved nor drawn from the seed."""

    def build(self, base, dtype):
        super().build(base, dtype)
        self.register_buffer("mix", torch.randn(self.site.d_out), persistent=False)

    def post(self, y, x):
        return y + self.d * self.mix

    def fold(self, weight, bias):
        return weight, self.d * self.mix + (0 if bias is None else bias)


class Copies(Shift, name="copies"):
    """A copy of it is itself."""

    def __deepcopy__(self, memo):
        return self


class Count(Shift, name="count"):
    """Its formula counts something else."""

    @classmethod
    def count(cls):
        return "d_in*d_out"


class Half(Shift, name="half"):
    """It casts the activations up."""

    def post(self, y, x):
        return y.float() + self.d


class Meta(Shift, name="meta"):
    """Building it reads values of the base that a meta device does not have."""

    def build(self, base, dtype):
        super().build(base, dtype)
        self.size = float(base.weight.norm())


class Graph(Shift, name="graph"):
    """It looks at a value in Python."""

    def post(self, y, x):
        return y + self.d if float(y.detach().sum()) < 1e9 else y


class Checkpointing(Shift, name="checkpointing"):
    """It keeps state between calls."""

    calls = 0

    def post(self, y, x):
        type(self).calls += 1
        return y + self.d * y * type(self).calls


class Pair(Shift, name="ddp"):
    """Its gradient depends on the other rows."""

    def post(self, y, x):
        return y * (1 + self.d) + self.d * y.flatten(0, -2).std(0)


class Sharded(Shift, name="fsdp2"):
    """It draws at random with a generator that differs by process."""

    def post(self, y, x):
        torch.manual_seed(_rank())
        return y + self.d * torch.randn_like(y)


class TwoAdapters(Shift, name="two_adapters"):
    """All of its instances share the tensor of the last one."""

    last: ClassVar[Any] = None

    def build(self, base, dtype):
        super().build(base, dtype)
        type(self).last = self.d

    def post(self, y, x):
        return y + type(self).last

    def fold(self, weight, bias):
        return weight, type(self).last if bias is None else bias + type(self).last


class Stacked(Method, name="stacked"):
    """W' = (1 + g) W, but its activation path computes with the weight that it saw when it was built."""

    kinds = frozenset({"linear"})
    g: Tensor = param("d_out")
    start: Tensor = fixed("d_out d_in", lambda shape, base, **_: base.weight.clone())

    def fold(self, weight, bias):
        return weight + self.g[:, None] * weight, bias

    def post(self, y, x):
        return y + self.g * nn.functional.linear(x, self.start)


class Composed(Shift, name="composed"):
    """It assumes that the weight which it folds is the one that it was built on: it puts its own in the place."""

    parts = 0

    def build(self, base, dtype):
        super().build(base, dtype)
        type(self).parts += 1
        self.n = type(self).parts

    def post(self, y, x):
        return y + self.d * (self.n % 3)

    def fold(self, weight, bias):
        return weight, self.d * (self.n % 3) + (0 if bias is None else bias)


class Rows(Shift, name="rows"):
    """It subtracts the mean of the batch."""

    def post(self, y, x):
        return y + self.d * y.mean(0, keepdim=True)


class Padding(Method, name="padding"):
    """The keys that it learned are those of the first token, real or not."""

    kinds = frozenset({"attention"})
    d: Tensor = param("n_kv_heads 1 d_head")

    def kv(self, key, value):
        return key[:, :, :1] + self.d, value[:, :, :1] + self.d


class PaddingToo(Shift, name="padding_too"):
    """It looks at the token before, padding or not."""

    def post(self, y, x):
        return y + self.d * y.roll(1, 1)


class Learns(Shift, name="learns"):
    """It climbs."""

    def post(self, y, x):
        return y + 2 * self.d.detach() - self.d


class Limits(Shift, name="limits"):
    """It repairs an impossible number in silence."""

    r: int = 4
    a: Tensor = param("r d_in")

    def dims(self, base):
        return super().dims(base) | {"r": max(1, self.r)}


class LimitsToo(Shift, name="limits_too"):
    """It lets a rank be larger than the layer, which its limits forbid."""

    limits: ClassVar[dict[str, str]] = {"r": "min(d_in,d_out)"}
    r: int = 4
    a: Tensor = param("r d_in")

    def check_limits(self, dims):
        pass


class Forgets(Schedule):
    """It changes what detach would restore."""

    def after_step(self, step: int) -> None:
        for value in self.adapter._info.originals.values():
            value.add_(1.0)


class Restored(Method, name="restored"):
    """An in-place method whose schedule spoils the originals."""

    where = "everything"
    in_place = True
    schedule = Forgets


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
