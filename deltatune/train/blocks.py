"""Blocks of rows in one forward, each under adapters of its own: y_k = f_k(x_k), f_k the layer under what is on for block k.

A frozen linear layer, or any whose adapters work behind it or in front of it, runs once on all rows; LoRA's products of blocks of
equally many rows are one (kernels.lora.add_grouped). What works on the weight, or around the layer, runs block by block.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Delta
from ..core.runtime import Switch, adapted, cast, post
from ..kernels.lora import add_grouped

Own = list[Delta]  # what is on for one block at one layer, innermost first


class Blocks:
    """A frame's `among`: block k, `sizes[k]` rows, runs under the deltas of `switches[k]` and those of no block."""

    def __init__(self, switches: Sequence[Switch], sizes: Sequence[int]) -> None:
        self.at = {id(s): k for k, s in enumerate(switches)}
        self.sizes, self.n_rows = list(sizes), sum(sizes)

    def __call__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        first: str,
        live: Sequence[Delta],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """One site's forward. Raises ValueError where its rows are not those of the blocks."""
        at, kwargs = live[0].site.name, dict(kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop(first), ())
        if any(isinstance(v, Tensor) for v in (*rest, *kwargs.values())):
            raise ValueError(
                f"{at}: it gets more than one tensor, and the candidates' rows of the others are not known"
            )
        each: list[Own] = [[] for _ in self.sizes]
        for delta in live:
            k = self.at.get(id(delta.switch))
            for own in each if k is None else [each[k]]:
                own.append(delta)
        if len(x) == 1 < self.n_rows:  # an embedding of what all rows share, as positions are
            shared = [_alone(module, forward, first, own, x, rest, kwargs) for own in each]
            return torch.cat([y.expand(n, *y.shape[1:]) for y, n in zip(shared, self.sizes, strict=True)])
        if len(x) % self.n_rows:
            raise ValueError(f"{at}: {len(x)} rows arrive where the candidates have {self.n_rows} together")
        ends = [0, *accumulate(len(x) // self.n_rows * n for n in self.sizes)]
        made = []
        for simple, run in groupby(range(len(each)), lambda k: all(map(_is_simple, each[k]))):
            mine = list(run)
            if simple:
                rows = x if len(mine) == len(each) else x[ends[mine[0]] : ends[mine[-1] + 1]]
                lengths = [ends[k + 1] - ends[k] for k in mine]
                made.append(_joint(module, forward, [each[k] for k in mine], rows, lengths, rest, kwargs))
            else:
                made += [_alone(module, forward, first, each[k], x[ends[k] : ends[k + 1]], rest, kwargs) for k in mine]
        return made[0] if len(made) == 1 else torch.cat(made)


def _is_simple(delta: Delta) -> bool:
    """Does it work in front of the layer and behind it alone?"""
    return delta.fast and not delta.has_around


def _alone(
    module: nn.Module, forward: Callable[..., Any], first: str, own: Own, x: Tensor, rest: Any, kwargs: dict[str, Any]
) -> Tensor:
    y = adapted(module, forward, first, own, (x, *rest), kwargs) if own else forward(module, x, *rest, **kwargs)
    return _one(y, module)


def _one(y: Any, module: nn.Module) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(f"a {type(module).__name__} gives a {type(y).__name__}, whose rows are not known")
    return y


def _joint(
    module: nn.Module,
    forward: Callable[..., Any],
    each: list[Own],
    x: Tensor,
    lengths: list[int],
    rest: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """The layer once on all rows, between each block's own `pre` and `post`."""
    before = list(x.split(lengths))
    seen: list[list[Tensor]] = []
    after = []
    for own, mine in zip(each, before, strict=True):
        seen.append([])
        for delta in reversed(own):
            if delta.has_pre and delta.site.entry is None:
                mine = cast(delta, mine.dtype).pre(mine)
            seen[-1].append(mine)
        after.append(mine)
    if not all(one is other for one, other in zip(before, after, strict=True)):
        x = torch.cat(after)
    y = _one(forward(module, x, *rest, **kwargs), module)
    pairs = [_pair(own) for own in each]
    made: list[Tensor] = []
    for (paired, n), group in groupby(range(len(each)), lambda k: (pairs[k] is not None, lengths[k])):
        mine = list(group)
        whole, start = len(mine) == len(each), sum(lengths[: mine[0]])
        of = slice(start, start + n * len(mine))
        if paired:
            own_y, own_x = (y, x) if whole else (y[of], x[of])
            made += _grouped([each[k][0] for k in mine], [pairs[k] for k in mine], own_y, own_x)  # type: ignore[misc]
        else:
            for k, part in zip(mine, y[of].split(n), strict=True):
                for delta, own_x in zip(each[k], reversed(seen[k]), strict=True):
                    if delta.has_post and delta.site.leave is None:
                        part = post(delta, part, own_x)
                made.append(part)
    return made[0] if len(made) == 1 else torch.cat(made)


Pair = tuple[Tensor, Tensor, float]


def _pair(own: Own) -> Pair | None:
    """A and B, of which one is trained at least, and s, where they are all that changes the block's whole layer; else None."""
    if len(own) != 1 or not own[0].has_pair or not torch.is_grad_enabled():
        return None
    delta = own[0]
    if delta.site.kind != "linear" or delta.site.rows or delta.noisy and delta.training:
        return None
    a, b, scale = delta.pair()
    return (a, b, scale) if a.requires_grad or b.requires_grad else None


def _grouped(deltas: Sequence[Delta], pairs: Sequence[Pair], y: Tensor, x: Tensor) -> list[Tensor]:
    """[y] with the deltas' products, or its blocks where a delta adds more of its own."""
    y = add_grouped(y, x, pairs)
    each = list(zip(deltas, x.chunk(len(pairs)), y.chunk(len(pairs)), strict=True))
    out = [cast(delta, x.dtype).linear(seen, _Made(part)) for delta, seen, part in each]
    return [y] if all(one is part for one, (_, _, part) in zip(out, each, strict=True)) else out


class _Made:
    """In the layer's place for `kernels.lora.low_rank`: the output with the change is there already."""

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def made(self, x: Tensor) -> Tensor:
        return self.y

    def parts(self, *args: Any) -> Any:
        raise AssertionError("the output was made")

    __call__ = parts
