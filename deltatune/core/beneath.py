"""The frozen linear layer beneath a delta that runs it as a whole: what it is, and which layers beside it read the same input.

Projections of one input (q, k, v; gate, up) run in one operation (kernels/lora): the first that is called makes
the outputs of all, and the others find theirs. One that is then called on something else parts them for good.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import storage
from .base import transposed
from .refold import plain_autograd
from .site import Site

if TYPE_CHECKING:
    from .method import Delta


class Beneath:
    """The layer itself, for a delta that runs it as a whole: a call is its own forward."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], delta: "Delta") -> None:
        self.module, self.forward, self.delta = module, forward, delta

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.forward(self.module, x)
        return y

    def made(self, x: Tensor) -> Tensor | None:
        """The output for `x` that was made with that of a layer beside this one."""
        frame, name = self.delta.frame, self.delta.site.module
        kept = frame.ahead.pop(name, None)
        if kept is None:
            return None
        if kept[0] is x and kept[1] == x._version:
            return kept[2]
        self._part_from(name)
        return None

    def _part_from(self, name: str) -> None:
        """The layers of one input with this one turned out to have several: from now on each runs alone."""
        frame = self.delta.frame
        frame.ahead.clear()
        for module in frame.beside.get(name, ()):
            for delta in module._modules["deltas"].values():  # type: ignore[operator, union-attr]
                frame.beside.pop(delta.site.module, None)

    def parts(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[list[str], list[Any]]:
        """What `kernels.lora.Part` says of this layer under A, B and s, and behind it of the layers `beside` it, with their modules.

        Nothing where the layer is more than x W' + b, W is not at hand, some of it takes a gradient, or autograd is not plain.
        """
        frame, site = self.delta.frame, self.delta.site
        if not plain_autograd(x) or (own := frozen(self.module, site, x)) is None:
            return [], []
        names, parts = [], [(*own, a, b, _lowered(self.delta, a, b, x.dtype), scale)]
        if site.module in frame.beside:
            for missed in list(frame.ahead):  # it did not run
                self._part_from(missed)
            for module in frame.beside.get(site.module, ()):
                live = [d for d in module._modules["deltas"].values() if d.switch.on]  # type: ignore[operator, union-attr]
                delta = live[0] if len(live) == 1 else self.delta
                if delta is self.delta or not delta.has_pair or delta.noisy and delta.training:
                    continue
                a, b, scale = delta.pair()
                if hasattr(a, "full_tensor"):  # sharded by itself: it is gathered when that layer runs
                    continue
                if a.requires_grad and (other := frozen(module, delta.site, x)) is not None:
                    parts.append((*other, a, b, _lowered(delta, a, b, x.dtype), scale))
                    names.append(delta.site.module)
        return names, parts

    def leave(self, x: Tensor, names: Sequence[str], made: Sequence[Tensor]) -> None:
        """Keep the outputs for `x` of layers beside this one until they are asked for."""
        if names:
            self.delta.frame.ahead.update({name: (x, x._version, y) for name, y in zip(names, made, strict=True)})


Frozen = tuple[Tensor | None, Tensor | None, Callable[[], Tensor] | None]  # W (O, I), or what reads it, and b


def frozen(module: nn.Module, site: Site, x: Tensor) -> Frozen | None:
    """The linear layer as x W' + b, where it is no more on `x`, W is at hand, and nothing of it takes a gradient; else None."""
    own = module._parameters
    weight, bias = own.get(site.param), own.get("bias")
    if "_hf_hook" in module.__dict__ or bias is not None and (bias.requires_grad or bias.dtype != x.dtype):
        return None
    if type(weight) is nn.Parameter and weight.is_floating_point():
        if weight.requires_grad or weight.dtype != x.dtype or weight.is_meta:
            return None
        return (weight.mT if transposed(module, site.param) else weight), bias, None
    kind = storage.format_of(module, site.param)
    if kind is None or not kind.product(module, x):
        return None
    return None, bias, partial(_read, kind, module, site.param, x.dtype)  # which does not keep x


def _read(kind: storage.Format, module: nn.Module, param: str, dtype: torch.dtype) -> Tensor:
    return kind.read(module, param).to(dtype)


def _lowered(delta: "Delta", a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in `dtype`, without a gradient. While the model's forward runs those of all deltas are cast at once."""
    if a.dtype == b.dtype == dtype:
        return a.detach(), b.detach()
    low = delta.frame.low
    if low is not None:
        if not low:
            low.update(_cast_all(delta.frame.factored, dtype, a.device))
        if (one := low.get(id(a))) is not None and (other := low.get(id(b))) is not None and one.dtype == dtype:
            return one, other
    return a.detach().to(dtype), b.detach().to(dtype)


def _cast_all(deltas: Sequence["Delta"], dtype: torch.dtype, device: torch.device) -> dict[int, Tensor]:
    """By id, what the deltas that are on have on this device, in `dtype`: two operations for all."""
    own = [t for d in deltas if d.switch.on for t in (*d._parameters.values(), *d._buffers.values()) if t is not None]
    own = [t for t in own if type(t) in (Tensor, nn.Parameter) and t.is_floating_point() and t.device == device]
    flat = torch.cat([t.detach().reshape(-1) for t in own]).to(dtype)
    parts = flat.split_with_sizes([t.numel() for t in own])
    return {id(t): part.view(t.shape) for t, part in zip(own, parts, strict=True)}
