"""A block run on some tokens of a row: whatever else it reads is gathered to match, what it hands on stays whole."""

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .method import Method

if TYPE_CHECKING:
    from .runtime import Inside

_BY_TOKEN = ("position_ids",)  # (B or 1, T)
_PAIRS = ("attention_mask", "position_bias")  # (B or 1, H or 1, T or 1, T)
_TABLES = ("position_embeddings",)  # tensors (B or 1, T, d), or a tuple of such


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of a block's arguments behind the hidden states."""
    return tuple(inspect.signature(module.forward).parameters)[1:]


def relative(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The attention inside the block that makes its position bias from the length; None where no bias is made.

    Raises ValueError where positions are computed inside the block and cannot be handed to it.
    """
    for name, part in module.named_modules():
        path, _, last = name.rpartition(".")
        if last == "relative_attention_bias" and "position_bias" in names:
            return str(path)
        for key in (last, *part._parameters, *part._buffers):
            if any(word in key for word in ("relative", "rel_pos", "rel_embed", "rotary")):
                raise ValueError(f"the block computes positions itself ({key}), where a part of the tokens has others")
    return None


def take(t: Tensor, index: Tensor) -> Tensor:
    """(B or 1, T, ...) at the places `index` (B, K) of each row: (B, K, ...)"""
    index = index.view(*index.shape, *(1,) * (t.ndim - 2))
    return t.expand(index.shape[0], *t.shape[1:]).gather(1, index.expand(-1, -1, *t.shape[2:]))


def pairs(t: Tensor, index: Tensor) -> Tensor:
    """(B or 1, H, T or 1, T) at those places of queries and keys: (B, H, K or 1, K)"""
    rows = torch.arange(t.shape[0], device=t.device)[:, None, None, None]
    heads = torch.arange(t.shape[1], device=t.device)[None, :, None, None]
    queries = index[:, None, :, None] if t.shape[2] > 1 else torch.zeros_like(index[:, None, :1, None])
    return t[rows, heads, queries, index[:, None, None, :]]


def run(delta: Method, base: "Inside", names: tuple[str, ...], biased: str | None, x: Tensor, index: Tensor) -> Tensor:
    """The block on the tokens `index` (B, K) of x (B, T, D) alone: (B, K, D).

    Raises ValueError naming an argument that it does not know how to gather.
    """
    given = {**dict(zip(names, base.rest, strict=False)), **base.kwargs}
    whole = given.get("position_bias")
    if biased is not None and whole is None:
        whole = base.module.get_submodule(biased).compute_bias(x.shape[1], x.shape[1], device=x.device)  # type: ignore[operator]
        given["position_bias"] = whole
    part = {name: _part(delta, name, value, x, index) for name, value in given.items()}
    out = base(take(x, index), part)
    if base.tail is not None and whole is not None:
        bias = part["position_bias"]
        base.tail = tuple(whole if value is bias else value for value in base.tail)
    return out


def _part(delta: Method, name: str, value: Any, x: Tensor, index: Tensor) -> Any:
    """One argument of the block, for the tokens `index`."""
    length = x.shape[1]
    if isinstance(value, tuple) and name in _TABLES:
        return tuple(_part(delta, name, one, x, index) for one in value)
    if name == "is_causal" and value:  # CLIP's text tower, whose attention itself says that it is not
        raise ValueError(
            f"{delta.site.name}: {delta.name} needs a block in which all tokens see all others; this one is causal"
        )
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if name in _PAIRS and value.ndim == 4 and value.shape[3] == length and value.shape[2] in (1, length):
        return pairs(value, index)
    by_token = name in _BY_TOKEN and value.ndim == 2 or name in _TABLES and value.ndim == 3
    if (by_token or name == "attention_mask" and value.ndim == 2) and value.shape[1] == length:
        return take(value, index)
    raise ValueError(
        f"{delta.site.name}: {delta.name} runs the block on {index.shape[1]} of {length} tokens, and does not know how its "
        f"argument {name!r} of shape {tuple(value.shape)} goes with them"
    )


def call_for(delta: Method, real: Tensor, index: Tensor) -> Any:
    """The record of the call as deltas inside the block may read it: its masks and ids at the tokens `index`."""
    call, length = delta.call, real.shape[1]

    def taken(value: Tensor | None) -> Tensor | None:
        return take(value, index) if value is not None and value.ndim == 2 and value.shape[1] == length else None

    ids, places = taken(call.input_ids), taken(call.position_ids)
    return replace(call, input_ids=ids, position_ids=places, attention_mask=take(real, index).long(), labels=None)
