"""Soft tokens in front of a backbone's input: embeddings, masks and positions in, and the extra states out again.

The backbone, not the head on top of it, is where tokens enter: its output has the user's own length again, so that
pooling, labels and losses above see nothing of it. An encoder of an encoder-decoder keeps them, since the decoder attends
to them; there the decoder's cross-attention mask is extended instead.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .method import Delta
from .runtime import cast, layer

_LENGTHENED = ("last_hidden_state", "hidden_states")


def soft_tokens(live: list[Delta], embedded: Tensor) -> Tensor:
    """(B, P, D): every live delta's tokens for the embedded batch (B, T, D), the innermost nearest to the input."""
    parts = [cast(d, embedded.dtype).tokens(embedded).to(embedded.dtype) for d in reversed(live)]
    return torch.cat([p.expand(embedded.shape[0], -1, -1) for p in parts], 1)


def extend(mask: Tensor, n: int, where: str) -> Tensor:
    """(B, T) -> (B, n + T) with ones in front."""
    if mask.ndim != 2:
        raise ValueError(f"{where}: soft tokens need a (B, T) attention mask, got {tuple(mask.shape)}")
    return torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)


def shift(positions: Tensor, n: int, prefill: bool, where: str) -> Tensor:
    """Real tokens start at position `n`; in the first call of a sequence the soft tokens' own positions go in front."""
    if positions.ndim != 2:
        raise ValueError(f"{where}: soft tokens need (B, T) positions, got {tuple(positions.shape)}")
    if not prefill:
        return positions + n
    front = torch.arange(n, device=positions.device, dtype=positions.dtype).expand(positions.shape[0], -1)
    return torch.cat([front, positions + n], 1)


def n_positions(module: nn.Module) -> int | None:
    """The length of the backbone's learned position table, where it has one."""
    sizes = [
        m.num_embeddings - int(m.padding_idx + 1 if m.padding_idx is not None else getattr(m, "offset", 0))
        for n, m in module.named_modules()
        if isinstance(m, nn.Embedding)
        and any(w in n.rpartition(".")[2] for w in ("position", "wpe"))
        and "relative" not in n
    ]
    return min(sizes) if sizes else None


@layer("input")
def input_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """A backbone whose input deltas may lengthen, or a decoder whose encoder was lengthened."""
    names = [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]  # type: ignore[attr-defined]

    @functools.wraps(forward)
    def input_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        deltas = self.deltas.values() if "deltas" in self._modules else ()  # type: ignore[operator]
        live = [d for d in deltas if d.switch.on and d.has_tokens]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        states, cross = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is not None and cross is not None and cross.ndim == 2 and states.shape[1] > cross.shape[1]:
            kwargs["encoder_attention_mask"] = extend(cross, states.shape[1] - cross.shape[1], cls.__name__)
        if not live:
            return forward(self, **kwargs)
        return _lengthened(self, forward, live, kwargs, cls.__name__)

    return input_forward


def _lengthened(
    self: nn.Module, forward: Callable[..., Any], live: list[Delta], kwargs: dict[str, Any], where: str
) -> Any:
    past = kwargs.get("past_key_values")
    prefill = past is None or int(past.get_seq_length()) == 0
    embedded = kwargs.get("inputs_embeds")
    if embedded is None:
        if kwargs.get("input_ids") is None:
            raise ValueError(f"{where}: soft tokens need input_ids or inputs_embeds")
        embedded = self.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
    front = soft_tokens(live, embedded)
    n = front.shape[1]
    if prefill:
        limit = self.__dict__.get("_deltatune_positions")
        if limit is not None and n + embedded.shape[1] > limit:
            raise ValueError(
                f"{where}: {n} soft tokens and {embedded.shape[1]} tokens exceed the {limit} positions of the backbone; "
                f"truncate the input to {limit - n}"
            )
        embedded = torch.cat([front, embedded], 1)
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, embedded
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], n), types], 1)
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = extend(kwargs["attention_mask"], n, where)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = shift(kwargs["position_ids"], n, prefill, where)
    if kwargs.get("cache_position") is not None:
        at = kwargs["cache_position"]
        kwargs["cache_position"] = torch.cat([at.new_tensor(range(n)), at + n]) if prefill else at + n
    out = forward(self, **kwargs)
    return _shortened(out, n, embedded.shape[1]) if prefill and live[0].site.stack != "encoder" else out


def _shortened(out: Any, n: int, length: int) -> Any:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == length:
            # torch's matmul folds a strided input or not by what requires a gradient, and rounds differently
            return value[:, n:].contiguous()
        return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

    if isinstance(out, tuple):
        return (cut(out[0]), *out[1:])
    for key in _LENGTHENED:
        if out.get(key) is not None:
            out[key] = cut(out[key])
    return out
