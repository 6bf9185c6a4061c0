"""The one place outside `train/` that knows transformers: its attention registry, and its models' own verbs.

Installed by `core.runtime.integrate` once transformers is loaded; `import deltatune` does not import it.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .core.adapter import adapters
from .core.method import Delta
from .core.runtime import LAYERS, ROOT_LAYERS, cast

_MASKED = ("sdpa", "eager")  # implementations whose mask is a (B, 1 or H, Q, K) tensor
_SHORT = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # a (B, K) mask, bottom-right causality


def install() -> None:
    """Let every attention implementation look for learned keys and values; once."""
    if "deltatune" in ROOT_LAYERS:
        return
    registry = AttentionInterface._global_mapping
    for name in (*registry, "eager"):
        AttentionInterface.register(name, _with_prefix(name, registry.get(name)))
    LAYERS["deltatune"] = _model_layer
    ROOT_LAYERS["deltatune"] = lambda model: isinstance(model, PreTrainedModel)


def _with_prefix(name: str, attend: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any) -> Any:
        run = attend or _eager(module)
        deltas = module._modules.get("deltas")
        live = [d for d in deltas.values() if d.on and d.has_kv] if deltas is not None else ()  # type: ignore[operator]
        if not live:
            return run(module, query, key, value, attention_mask, *args, **kw)
        key, value, mask, bias = extend(name, module, live, query, key, value, attention_mask, kw)
        if bias is not None:
            kw["position_bias"] = bias
        return run(module, query, key, value, mask, *args, **kw)

    if attend is not None:
        functools.update_wrapper(attention, attend)
    return attention


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the model's own file: what transformers runs where nothing is registered."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise ValueError(f"{type(module).__name__} has no eager attention that could take a prefix")


def extend(
    name: str,
    module: nn.Module,
    live: list[Delta],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kw: dict[str, Any],
) -> tuple[Tensor, Tensor, Any, Tensor | None]:
    """(key, value, mask, position_bias) with every live delta's prefix in front: seen by all, without a position.

    query (B, H, Q, D); key and value (B, H_kv, T, D) as they come out of the cache, after rotary embedding.
    """
    if name not in (*_MASKED, *_SHORT):
        raise ValueError(f"{live[0].site.name}: learned keys and values do not run with {name!r} attention; use 'sdpa' or 'eager'")
    b, q_len, own = key.shape[0], query.shape[2], key.shape[2]
    for delta in live:
        k, v = cast(delta, key.dtype).kv(key, value)
        key = torch.cat([k.to(key.dtype).expand(b, -1, -1, -1), key], 2)
        value = torch.cat([v.to(value.dtype).expand(b, -1, -1, -1), value], 2)
    n = key.shape[2] - own
    bias = kw.get("position_bias")
    if bias is not None:
        bias = torch.cat([bias.new_zeros(*bias.shape[:-1], n), bias[..., :own]], -1)
    causal = kw.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if isinstance(mask, Tensor) and name in _SHORT:
        mask = torch.cat([mask.new_ones(b, n), mask], 1)
    elif isinstance(mask, Tensor):
        mask = mask[..., :own]
        front = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([front((*mask.shape[:-1], n)), mask], -1)
    elif mask is None and causal and q_len > 1 and name in _MASKED:
        # the implementation's own causality is aligned to the top left, where the prefix would push the keys out
        mask = torch.ones(q_len, n + own, dtype=torch.bool, device=query.device).tril(n + own - q_len)[None, None]
        if name == "eager":
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)
    return key, value, mask, bias


def _model_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """A transformers model with adapters on it saves those, never the base with keys that nobody could read."""

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        names = adapters(self)
        for name, adapter in names.items():
            adapter.save(save_directory if len(names) == 1 else os.path.join(save_directory, name))

    def gradient_checkpointing_enable(self: Any, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        out = cls.gradient_checkpointing_enable(self, gradient_checkpointing_kwargs, **kwargs)  # type: ignore[attr-defined]
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            self.enable_input_require_grads()  # reentrant checkpoints give no gradient where no input asks for one
        return out

    namespace["save_pretrained"] = save_pretrained
    namespace["gradient_checkpointing_enable"] = gradient_checkpointing_enable
    return forward
