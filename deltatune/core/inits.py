"""How a tensor starts: `init(shape, base=..., delta=...) -> Tensor`, drawn on the current default device.

`base` is the site's frozen layer as seen by `core.base` (`base.weight` (O, I) and `base.bias`, both fp32), `delta` the
delta being built, with its hyperparameters and the tensors declared before this one.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import shapes

Init = Callable[..., Tensor]


@contextlib.contextmanager
def seeded(key: str, seed: int) -> Iterator[None]:
    """What is drawn inside comes from `key` and `seed`, on the CPU; every generator, a GPU's too, goes on as if it were not."""
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(zlib.crc32(key.encode()) ^ seed)  # torch.manual_seed reseeds the GPUs' too
        yield


def zeros(shape: tuple[int, ...], **_: Any) -> Tensor:
    """0"""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], **_: Any) -> Tensor:
    """1"""
    return torch.ones(shape)


def kaiming(shape: tuple[int, ...], **_: Any) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the start of `nn.Linear`."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def normal(std: float = 0.02) -> Init:
    """N(0, std^2)"""

    def init(shape: tuple[int, ...], **_: Any) -> Tensor:
        return torch.empty(shape).normal_(0.0, std)

    return init


def around(mean: float, std: float) -> Init:
    """N(mean, std^2)"""

    def init(shape: tuple[int, ...], **_: Any) -> Tensor:
        return torch.empty(shape).normal_(mean, std)

    return init


def truncated(std: float = 0.01) -> Init:
    """N(0, std^2), redrawn outside two standard deviations."""

    def init(shape: tuple[int, ...], **_: Any) -> Tensor:
        return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std)

    return init


def uniform(fan: str) -> Init:
    """U(-1/sqrt(fan), 1/sqrt(fan)) for a fan in the language of shapes: what `nn.Linear` gives its bias."""

    def init(shape: tuple[int, ...], *, delta: Any, **_: Any) -> Tensor:
        (n,) = shapes.sizes(fan, delta.dims(None))
        return torch.empty(shape).uniform_(-(n**-0.5), n**-0.5)

    return init


def constant(value: float | str) -> Init:
    """A number, or the hyperparameter of that name."""

    def init(shape: tuple[int, ...], *, delta: Any, **_: Any) -> Tensor:
        return torch.full(shape, float(getattr(delta, value) if isinstance(value, str) else value))

    return init


def row_norm(shape: tuple[int, ...], *, base: Any, **_: Any) -> Tensor:
    """|W| of each row"""
    norm: Tensor = base.weight.norm(dim=1)
    return norm


def row_square(shape: tuple[int, ...], *, base: Any, **_: Any) -> Tensor:
    """|W|^2 of each row"""
    square: Tensor = base.weight.square().sum(1)
    return square


def glorot(shape: tuple[int, ...], **_: Any) -> Tensor:
    """U(-sqrt(6 / (P + D)), sqrt(6 / (P + D))) for (P, D)"""
    return nn.init.xavier_uniform_(torch.empty(shape))


def xavier(shape: tuple[int, ...], **_: Any) -> Tensor:
    """U(-sqrt(3 / D), sqrt(3 / D)) for (P, D)"""
    return nn.init.uniform_(torch.empty(shape), -math.sqrt(3 / shape[-1]), math.sqrt(3 / shape[-1]))
