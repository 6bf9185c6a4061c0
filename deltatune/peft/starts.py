"""What HF PEFT knows as LoRA of another start: PiSSA's configurations in, and out what is LoRA once it is trained."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.site import Site
from ..methods.bayes import LaplaceLoRA
from ..methods.lora import LoRA
from ..methods.lora_starts import LoRAFA, LoRAPlus, PiSSA


def is_pissa(value: Any) -> bool:
    """Does this init_lora_weights say PiSSA?"""
    return isinstance(value, str) and re.fullmatch(r"pissa(_niter_\d+)?", value) is not None


def niter(fields: Mapping[str, Any]) -> int | None:
    """How many subspace iterations its SVD takes; None: the exact one."""
    end = str(fields["init_lora_weights"]).rpartition("_niter_")[2]
    return int(end) if end.isdigit() else None


def check_pissa(fields: Mapping[str, Any], site: Site, module: nn.Module, table: nn.Module | None) -> None:
    """Raise ValueError where HF PEFT has no PiSSA, or changes more than the layer."""
    for key in ("use_dora", "lora_bias"):
        if fields.get(key):
            raise ValueError(f"LORA: {key} = True beside init_lora_weights = 'pissa' is no method here")
    if site.kind != "linear":
        raise ValueError(f"{site.name}: HF PEFT has no PiSSA on a {site.kind}")
    if table is not None and module is not table and module._parameters["weight"] is table._parameters["weight"]:
        raise ValueError(
            f"{site.name}: its weight is the input embeddings' too, and HF PEFT's PiSSA takes its principal part from both"
        )


def as_lora(part: Any) -> Any:
    """The part of an adapter as LoRA's, where it is one: PiSSA's update is one of twice the rank, as HF PEFT converts it."""
    if part.method in (LoRAPlus, LoRAFA, LaplaceLoRA):
        return replace(part, method=LoRA)
    if part.method is not PiSSA:
        return part
    hyper, t = part.hyper, part.tensors
    r = 2 * hyper["r"]
    alpha = hyper["alpha"] / hyper["r"] ** hyper["power"] * r ** hyper["power"]
    tensors = {"a": torch.cat([t["a"], t["a0"]], -2), "b": torch.cat([t["b"], -t["b0"]], -1)}
    return replace(part, method=LoRA, hyper=hyper | {"r": r, "alpha": alpha, "bias": False}, tensors=tensors)
