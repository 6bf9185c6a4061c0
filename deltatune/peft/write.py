"""Out: a whole adapter as a folder that HF PEFT reads, or an error that names what its format cannot hold."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from ..core import base, files
from ..core.adapter import Adapter
from ..core.compose import Average, Leaf, Tree
from ..core.identity import backbone_id
from ..methods.baseline import Copy
from ..methods.lora import DoRA, LoRA
from ..methods.orthogonal import BOFT, OFT
from ..methods.prefix import PrefixTuning
from ..methods.prompt import PromptTuning
from ..methods.ranks import AdaLoRA
from ..methods.rows import TokenRows
from ..methods.vectors import BitFit
from ..methods.vera import VeRA
from .beside import own_bias, rows_key, tied_sites
from .deltas import WRITE, Part, task_of
from .names import AUTO_HEADS, Named
from .pieces import CONFIG, WEIGHTS
from .plan import plain_fields, plan_of
from .starts import as_lora

_WEIGHT_ALONE = {LoRA, DoRA, AdaLoRA, OFT, BOFT, VeRA}  # a bias that is trained beside one of these is added to it


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """`Adapter.save` in HF PEFT's format. Raises ValueError, and writes nothing, where it cannot hold the adapter."""
    fields, tensors = _written(adapter)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an adapter is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    data = save_bytes({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
    files.write_atomic(folder / WEIGHTS, data)
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    files.write_atomic(folder / CONFIG, f"{text}\n".encode())


def _written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors. Raises ValueError naming the method that HF PEFT's format cannot hold."""
    named = Named(adapter.model)
    parts = _parts(adapter)
    _check_tree(adapter.tree, parts)
    mains = [part for part in parts if part.method not in (Copy, BitFit, TokenRows)]
    kinds = {part.method for part in mains}
    if not mains:
        raise ValueError(f"format='peft' needs one of {', '.join(sorted(m.name for m in WRITE))} beside what it holds")
    for method in kinds:
        if method not in WRITE:
            raise ValueError(f"{method.name} cannot be written as HF PEFT's: its format has no such method")
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(sorted(m.name for m in kinds))} cannot be written as one adapter of HF PEFT's")
    (method,) = kinds
    prompts = method in (PromptTuning, PrefixTuning)
    name = backbone_id(adapter.model)
    fields: dict[str, Any] = {
        "base_model_name_or_path": name if "/" in name else None, "inference_mode": True,
        "task_type": task_of(adapter.model),
    }  # fmt: skip
    own, tensors = WRITE[method](named, mains)
    fields |= own
    others = [part for part in parts if part.method in (BitFit, TokenRows)]
    if others and prompts:
        raise ValueError(f"{others[0].method.name} beside {method.name} cannot be written as HF PEFT's")
    _write_biases(named, fields, tensors, [p for p in parts if p.method is BitFit], mains, parts)
    _write_rows(named, fields, tensors, [p for p in parts if p.method is TokenRows])
    _write_copies(named, fields, tensors, [p for p in parts if p.method is Copy], prompts)
    # by HF PEFT's own rules this configuration must mean these tensors, and no others
    plan = plan_of(adapter.model, plain_fields(fields), is_file=True)
    files.check_keys("what HF PEFT would read", {p.key: p.shape for p in plan.pieces}, tensors)
    return fields, tensors


def _parts(adapter: Adapter) -> list[Part]:
    tree, state = adapter.finished()
    leaves = dict(tree.leaves())
    for leaf in leaves.values():
        if leaf.method.in_place:
            raise ValueError(f"{leaf.method.name} trains the base itself, which HF PEFT's format cannot hold")
    bank = {k: t for k, t in state.items() if k.startswith("bank.")}
    found = []
    for (path, name), delta in adapter.deltas.items():
        start = f"{path}.{name}."
        tensors = {k.removeprefix(start): t.detach() for k, t in state.items() if k.startswith(start)}
        for slot, key in delta.__dict__["_bank"][1].items():
            if f"bank.{key}" in bank:
                tensors[slot] = bank[f"bank.{key}"].detach()
        hyper = {k: getattr(delta.config, k) for k in delta.config.__dataclass_fields__}
        found.append(as_lora(Part(path, type(delta), delta.site, hyper, tensors)))
    return found


def _check_tree(tree: Tree, parts: Sequence[Part]) -> None:
    """Deltas that meet at a layer: there an update of the weight and one of the bias add up, nothing else does."""
    at: dict[str, list[Part]] = {}
    for part in parts:
        at.setdefault(part.site.name if part.site.kind == "experts" else part.site.module, []).append(part)
    for module, here in at.items():
        names = [part.method.name for part in here]
        slices = all(part.site.rows for part in here) and len({part.site.name for part in here}) == len(here)
        methods = {part.method for part in here}
        added = len(here) == 2 and BitFit in methods and bool(methods & _WEIGHT_ALONE)
        fine = len(here) == 1 or slices or added
        if not fine or len(here) > 1 and _has_average(tree):
            raise ValueError(f"{module}: {', '.join(names)} meet there, which HF PEFT's format cannot hold")


def _has_average(tree: Tree) -> bool:
    return not isinstance(tree, Leaf) and (isinstance(tree, Average) or any(map(_has_average, tree.children)))


def _write_biases(
    named: Named,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    biases: Sequence[Part],
    mains: Sequence[Part],
    parts: Sequence[Part],
) -> None:
    if not biases:
        return
    if "bias" not in fields:
        raise ValueError(f"bitfit beside {mains[0].method.name} cannot be written as HF PEFT's")
    adapted = {part.site.module for part in mains}
    copied = {part.site.module for part in parts if part.method is Copy}
    there = {name for name, m in named.modules.items() if m._parameters.get("bias") is not None and name not in copied}
    ours = {part.site.name for part in biases}
    if ours == there & adapted:
        fields["bias"] = {"OFT": "oft_only", "BOFT": "boft_only", "VERA": "vera_only"}.get(
            fields["peft_type"], "lora_only"
        )
    elif ours == there:
        fields["bias"] = "all"
    else:
        odd = sorted(ours ^ there)
        raise ValueError(
            f"bitfit: HF PEFT trains the biases of all layers that have one, or of the adapted ones; {odd[0]} does not fit that"
        )
    for part in biases:
        key, own = own_bias(named, part.site, part.site.module in adapted)
        tensors[key] = own + part.tensors["d"]


def _write_rows(named: Named, fields: dict[str, Any], tensors: dict[str, Tensor], rows: Sequence[Part]) -> None:
    by_path: dict[str, list[Part]] = {}
    for part in rows:
        by_path.setdefault(part.path, []).append(part)
    table = named.inputs
    for group in by_path.values():
        ours = {part.site.module for part in group}
        weight = named.modules[group[0].site.module]._parameters.get("weight")
        tied = table is not None and table._parameters.get("weight") is weight
        at = next(n for n, m in named.modules.items() if m is table) if tied else group[0].site.module
        want = {site.module for site in tied_sites(named, at)}
        if ours != want:
            raise ValueError(
                f"token_rows: HF PEFT changes {', '.join(sorted(want))} together; here it is {', '.join(sorted(ours))}"
            )
        fields.setdefault("trainable_token_indices", {})[at] = list(group[0].hyper["ids"])
        tensors[rows_key(at)] = group[0].tensors["rows"]


def _write_copies(
    named: Named, fields: dict[str, Any], tensors: dict[str, Tensor], copies: Sequence[Part], prompts: bool
) -> None:
    """modules_to_save; HF PEFT adds the head of a task itself, so a task is named where the head is here, all of it."""
    prefix = "base_model." if prompts else "base_model.model."
    held = {part.site.module: part for part in copies}
    tops = []
    for name in held:
        top = name
        while (outer := top.rpartition(".")[0]) and all(
            f"{outer}.{k}".rpartition(".")[0] in held
            for k, _ in named.modules[outer].named_parameters()
            if "deltas." not in k
        ):
            top = outer
        tops.append(top)
    auto = named.ends(AUTO_HEADS.get(fields["task_type"] or "", ()))
    missing = [name for name in auto if not any(f"{name}.".startswith(f"{top}.") for top in tops)]
    if missing and not prompts:
        fields["task_type"] = None
    elif missing:  # its forward needs the task: the file brings the base's own head
        for at in missing:
            for key, p in named.modules[at].named_parameters():
                if "deltas." not in key:
                    tensors[f"{prefix}{at}.{key}"] = p.detach()
        tops += missing
    for part in copies:
        module, site = named.modules[part.site.module], part.site
        if site.rows:
            raise ValueError(f"{site.name}: copy on a slice cannot be written as HF PEFT's")
        weight = base.restored(module, site, part.tensors["weight"])
        tensors[f"{prefix}{site.module}.weight"] = weight
        if "bias" in part.tensors:
            tensors[f"{prefix}{site.module}.bias"] = part.tensors["bias"]
    if tops:
        fields["modules_to_save"] = list(dict.fromkeys(tops))
