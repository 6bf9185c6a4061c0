"""In: HF PEFT's configuration object, or a folder that it wrote, as an adapter. Files are data; none is executed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from ..core import files
from ..core.adapter import Adapter, fill
from ..core.attach import attach as attach_tree
from ..core.attach import or_off
from .names import AUTO_HEADS, Named
from .pieces import CONFIG, PICKLED, WEIGHTS, Key, Plan
from .plan import plain_fields, plan_of


def attach(
    model: nn.Module,
    config: Any,
    *,
    name: str = "default",
    head: str | None = "auto",
    seed: int = 0,
    probe: Mapping[str, Any] | None = None,
) -> Adapter:
    """`deltatune.attach` of HF PEFT's configuration object."""
    fields = dict(config.to_dict())
    runtime = getattr(config, "runtime_config", None)
    if runtime is not None:
        fields["runtime_config"] = dict(vars(runtime))
    if getattr(config, "_custom_modules", None):
        raise ValueError(f"{type(config).__name__}: layers that were registered with it are not known here")
    fields = plain_fields(fields)
    if head is not None:  # HF PEFT saves a task's head unasked, and then adapts nothing in it
        auto = [end for end in AUTO_HEADS.get(fields.get("task_type") or "", ()) if Named(model).ends([end])]
        fields["modules_to_save"] = [*(fields.get("modules_to_save") or ()), *auto]
    plan = plan_of(model, fields, is_file=False)
    return attach_tree(model, plan.tree, name=name, head="auto" if plan.head else head, seed=seed, probe=probe)


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", trainable: bool = False) -> Adapter:
    """`deltatune.load` of a folder that HF PEFT wrote."""
    fields, tensors = _read(Path(path))
    try:
        plan = plan_of(model, fields, is_file=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = _without_base(path, plan, tensors)
    files.check_keys(str(path), {p.key: p.shape for p in plan.pieces}, tensors)
    values: dict[Key, Tensor] = {}
    for piece in plan.pieces:
        value = tensors[piece.key]
        values |= piece.here(value if value.dtype == torch.float64 else value.float())
    adapter = attach_tree(model, plan.tree, name=name, head="auto" if plan.head else None)
    with or_off(adapter):
        state, deltas = adapter.state_dict(), adapter.deltas
        for (leaf, site, slot), value in values.items():
            delta = deltas[leaf, site]
            shared = delta.__dict__["_bank"][1].get(slot)
            state[f"bank.{shared}" if shared else f"{leaf}.{site}.{slot}"] = value.contiguous()
        fill(adapter, path, state)
        adapter.trainable(trainable)
    return adapter


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise ValueError(f"{folder / PICKLED} is a pickle, which could run code; save it with safetensors first")
        raise ValueError(f"{folder} is no adapter: it has no {WEIGHTS}")
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{folder / CONFIG} is not a configuration of HF PEFT's")
    data = (folder / WEIGHTS).read_bytes()
    try:
        return plain_fields(fields), load_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({len(data)} bytes): {error}") from None


def _without_base(path: object, plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors without copies of what the base has already. Raises ValueError where such a copy differs."""
    left = {}
    for key, value in tensors.items():
        if key.endswith(".bias") and key.startswith(plan.unused):
            continue
        if key not in plan.allowed:
            left[key] = value
            continue
        own = plan.allowed[key]
        if tuple(own.shape) != tuple(value.shape):
            raise ValueError(
                f"{path}: {key} is {tuple(value.shape)}, the base's is {tuple(own.shape)}; resize the base's embeddings first"
            )
        if not own.is_meta and not torch.allclose(own.detach().cpu().float(), value.float(), rtol=2**-7, atol=1e-6):
            raise ValueError(f"{path}: {key} brings other values than the base has; it was saved from another base")
    return left
