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
from transformers.cache_utils import DynamicLayer

from .core.adapter import adapters
from .core.compose import parts_of
from .core.method import Delta
from .core.runtime import ATTACHED, ATTENDS, KEEPS, LAYERS, ROOT_LAYERS, cast, integrate
from .core.site import Site

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
    LAYERS["peft"] = _peft_layer
    ROOT_LAYERS["peft"] = lambda model: "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)
    ATTENDS.append(_attends)
    KEEPS.append(_keep)
    ATTACHED.append(ask_for_input_grads)


def _attends(module: nn.Module) -> bool:
    """Is the module's code of a file that calls the attention registry?"""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)


def _keep(cache: Any, site: Site, key: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A layer of the cache's own for each key, behind the backbone's: reordering and cropping go over all layers."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers, own = cache.layers, cache.__dict__.setdefault("_deltatune", {})
    if key not in own:
        while len(layers) < site.n_layers:  # a cache that grows with the blocks would give ours to one of them
            layers.append(cache.layer_class_to_replicate())
        own[key] = len(layers)
        layers.append(DynamicLayer())
    keys, values = layers[own[key]].update(a, b)
    return keys, values


def _with_prefix(name: str, attend: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any
    ) -> Any:
        run = attend or _eager(module)
        deltas = module._modules.get("deltas")
        live = [d for d in deltas.values() if d.switch.on and d.has_kv] if deltas is not None else ()  # type: ignore[operator]
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
    """(key, value, mask, position_bias) with every live delta's prefix in front, seen by all.

    It has no position, but for deltas with `shift`, whose prefix stands where tokens in front would.
    query (B, H, Q, D); key and value (B, H_kv, T, D) as they come out of the cache, after rotary embedding.
    """
    if name not in (*_MASKED, *_SHORT):
        raise ValueError(
            f"{live[0].site.name}: learned keys and values do not run with {name!r} attention; use 'sdpa' or 'eager'"
        )
    b, q_len, own = key.shape[0], query.shape[2], key.shape[2]
    bias = kw.get("position_bias")
    bias = None if bias is None else bias[..., :own]
    seen = own  # keys that have a position
    for delta in live:
        k, v = cast(delta, key.dtype).kv(key, value)
        key = torch.cat([k.to(key.dtype).expand(b, -1, -1, -1), key], 2)
        value = torch.cat([v.to(value.dtype).expand(b, -1, -1, -1), value], 2)
        if bias is None:
            continue
        front = bias.new_zeros(*bias.shape[:-1], k.shape[2])
        table = next((t for part in parts_of(delta) if (t := part.__dict__.get("table")) is not None), None)
        if table is not None:
            seen += k.shape[2]
            front = table.compute_bias(q_len, seen, device=bias.device, past_seen_tokens=seen - q_len)
            front = front[..., : k.shape[2]].to(bias.dtype).expand(*bias.shape[:-1], -1)
        bias = torch.cat([front, bias], -1)
    n = key.shape[2] - own
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
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
                ~mask, torch.finfo(query.dtype).min
            )
    return key, value, mask, bias


def _model_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """A transformers model with adapters on it saves those, never the base with keys that nobody could read."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        names = adapters(self)
        if push_to_hub:
            raise ValueError(
                "save_pretrained of a model with adapters writes a folder alone; push_to_hub=True is refused"
            )
        sharded = any(hasattr(p, "full_tensor") for adapter in names.values() for p in adapter.parameters())
        if sharded and state_dict is not None:  # the stock Trainer: one rank alone calls, no shard could be gathered
            raise ValueError("all ranks save a sharded adapter together: call adapter.save(folder) on each of them")
        if not (is_main_process or sharded):
            return
        integrate()
        for name, adapter in names.items():
            adapter.save(save_directory if len(names) == 1 else os.path.join(save_directory, name))

    def checkpointing_enable(self: Any, *args: Any, **kwargs: Any) -> Any:
        had = _input_grads(self)
        out = getattr(cls, enable)(self, *args, **kwargs)
        if not _input_grads(self):
            ask_for_input_grads(self)
        elif not had and not _reentrant(
            self
        ):  # transformers asks always: a backward below the first delta, for nothing
            self.disable_input_require_grads()
        return out

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        integrate()  # the first that a Trainer does to a model, before it resumes from a checkpoint
        return cls.to(self, *args, **kwargs)  # type: ignore[attr-defined]

    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if new_num_tokens is not None or args or kwargs:
            _refuse_resize(self)
        return cls.resize_token_embeddings(self, new_num_tokens, *args, **kwargs)  # type: ignore[attr-defined]

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        # `generate` refuses what no forward's signature names; what a method reads, the root's forward takes
        wanted = self.__dict__["_deltatune"].frame.wanted if "_deltatune" in self.__dict__ else ()
        cls._validate_model_kwargs(self, {k: v for k, v in model_kwargs.items() if k not in wanted})  # type: ignore[attr-defined]

    enable = "activation_checkpointing_enable"
    if not hasattr(cls, enable):  # in older transformers
        enable = "gradient_checkpointing_enable"
    namespace[enable] = checkpointing_enable
    namespace |= {"save_pretrained": save_pretrained, "resize_token_embeddings": resize_token_embeddings, "to": to}

    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        frame = self.__dict__["_deltatune"].frame
        given = next((t for t in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if t is not None), None)
        before, frame.n_given = frame.n_given, None if given is None else given.shape[1]
        try:
            return cls.generate(self, inputs, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            frame.n_given = before

    if hasattr(cls, "_validate_model_kwargs"):  # it generates
        namespace["_validate_model_kwargs"] = _validate_model_kwargs
        namespace["generate"] = functools.wraps(cls.generate)(generate)  # type: ignore[attr-defined]
    return forward


def _peft_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """A PeftModel under adapters would save its own tensors and lose theirs."""

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        names = ", ".join(adapters(self))
        raise ValueError(
            f"this PeftModel carries adapters of deltatune too ({names}), which its files could not hold; save those "
            f"with adapter.save(folder), and PEFT's own after detaching them"
        )

    namespace["save_pretrained"] = save_pretrained
    return forward


def _input_grads(model: Any) -> bool:
    """Do the model's embeddings ask for a gradient?"""
    return bool(getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None))


def _reentrant(model: nn.Module) -> bool:
    """Does a block run under reentrant checkpointing?"""
    for module in model.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(run, "keywords", {}).get("use_reentrant"))
    return False


def ask_for_input_grads(model: nn.Module) -> None:
    """Reentrant checkpoints give no gradient, without a word, where no input of theirs asks for one."""
    if isinstance(model, PreTrainedModel) and _reentrant(model) and not _input_grads(model):
        model.enable_input_require_grads()


def _refuse_resize(model: Any) -> None:
    """Raise ValueError where an adapter stands on, or trains in place, a table that would be replaced."""
    tables = [t for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None]
    weights = {id(t.weight) for t in tables}
    for name, adapter in adapters(model).items():
        sits = any(model.get_submodule(delta.site.module) in tables for delta in adapter.deltas.values())
        if sits or any(id(p) in weights for p in adapter.parameters()):
            raise ValueError(f"adapter {name!r} is on the token embeddings; resize them first, then attach")


def install_trainer() -> None:
    """Let the stock Trainer resume, and load its best model, from checkpoints that hold adapters alone, and take a quantised base
    that adapters of ours stand on; once."""
    from transformers import Trainer, trainer

    if hasattr(Trainer._load_best_model, "__wrapped__"):
        return
    load_checkpoint, load_best = Trainer._load_from_checkpoint, Trainer._load_best_model

    @functools.wraps(load_checkpoint)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not _restore(self, resume_from_checkpoint):
            load_checkpoint(self, resume_from_checkpoint, model)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "schedules"):  # train.ScheduleCallback, which is above this file
                callback.restore(resume_from_checkpoint)

    @functools.wraps(load_best)
    def _load_best_model(self: Any) -> None:
        if not _restore(self, self.state.best_model_checkpoint):
            load_best(self)

    save_model = Trainer.save_model

    @functools.wraps(save_model)
    def save_and_keep(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_model(self, output_dir, _internal_call)
        if (
            _internal_call and output_dir is not None
        ):  # a checkpoint is trained on from: with what a finished file lacks
            names = adapters(self.accelerator.unwrap_model(self.model))
            for name, adapter in names.items():
                if not adapter.is_finished():
                    at = output_dir if len(names) == 1 else os.path.join(output_dir, name)
                    adapter.save(at, resumable=True)

    for own in (_load_from_checkpoint, _load_best_model, save_and_keep):
        setattr(Trainer, own.__name__, own)
    trainer.validate_quantization_for_training = _with_adapters(trainer.validate_quantization_for_training)


def _with_adapters(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """The Trainer's guard against models that are nothing but quantised, which knows of HF PEFT's adapters alone.

    On a base that transformers quantised TRL's trainers cast all that trains to bf16 before; deltas are fp32 again behind it.
    """

    @functools.wraps(validate)
    def validated(model: Any) -> None:
        quantizer = getattr(model, "hf_quantizer", None)
        if not adapters(model) or quantizer is not None and not quantizer.is_trainable:
            validate(model)
        for adapter in adapters(model).values() if quantizer is not None else ():
            of_base = {id(p) for p in adapter.owned().values()}
            for p in adapter.parameters():
                if id(p) not in of_base and p.dtype == torch.bfloat16:
                    p.data = p.data.float()

    return validated


def _restore(trainer: Any, folder: str) -> bool:
    """Take the adapters' values from a checkpoint that `save_pretrained` wrote; False where the model has none."""
    names = adapters(trainer.accelerator.unwrap_model(trainer.model))
    for name, adapter in names.items():
        adapter.restore(folder if len(names) == 1 else os.path.join(folder, name))
    return bool(names)
