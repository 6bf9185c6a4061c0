"""Which backbone is this? Its name, a hash of its site table, and 4,096 of its values."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import base
from .files import FINGERPRINT
from .record import Record
from .site import Site, all_sites

if TYPE_CHECKING:
    from .method import Method

N_FINGERPRINT = 4096


def table_hash(table: Sequence[Site], pooler: bool = False) -> str:
    """A hash of the backbone's site table: names, kinds and sizes; heads and a pooler are left out, they differ by task."""
    out = ("head", "lm_head") if pooler else ("head", "lm_head", "pooler")
    rows = [f"{s.name} {s.kind} {s.d_in} {s.d_out}" for s in table if s.role not in out]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """4,096 values at fixed positions of `tensors` (a backbone's embeddings, norms and biases), in bf16; None on meta.

    Every tensor gives an equal share, at positions drawn from its size alone, so that fp32, bf16 and quantised loads of
    one backbone agree and another backbone of the same shape does not.
    """
    if not tensors or any(t.device.type == "meta" for t in tensors.values()):
        return None
    share = -(-N_FINGERPRINT // len(tensors))
    picked = []
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        generator = torch.Generator().manual_seed(flat.numel())
        at = torch.randint(flat.numel(), (share,), generator=generator)
        picked.append(flat[at.to(flat.device)].to("cpu", torch.bfloat16))
    return torch.cat(picked)[:N_FINGERPRINT]


def same_base(one: Tensor, other: Tensor) -> bool:
    """Do two fingerprints agree within bf16's rounding?"""
    if one.shape != other.shape:
        return False
    a, b = one.float(), other.float()
    return bool(((a - b).abs() <= 2**-7 * torch.maximum(a.abs(), b.abs()) + 1e-30).all())


def base_fingerprint(model: nn.Module, table: Iterable[Site]) -> Tensor | None:
    """The base's fingerprint, of the values before any adapter moved them in place or was merged."""
    record: Record | None = model.__dict__.get("_deltatune")
    moved: dict[str, Tensor] = {}
    before: dict[int, Tensor] = {}  # of what is trained in place, also under the other names of a tied tensor
    for info in record.infos.values() if record else ():
        before |= {id(model.get_parameter(name)): kept for name, kept in info.originals.items()}
        for mark, kept in (info.merged or {}).items():
            at = mark.partition("|")[0]
            if kept.cls is not None:  # a quantised linear layer, of which the bias alone counts
                own = {**kept.own["_buffers"], **kept.own["_parameters"]}
                moved |= {f"{at}.bias": own["bias"]} if own.get("bias") is not None else {}
                continue
            moved[f"{at}.weight"] = kept.weight
            if kept.bias is not None:
                moved[f"{at}.bias"] = kept.bias
    chosen: dict[str, Tensor] = {}
    for site in table:
        if site.role in ("head", "lm_head", "pooler") or site.kind not in ("embedding", "norm", "linear"):
            continue
        module = model.get_submodule(site.module)
        for key in ("weight", "bias"):
            p: Tensor | None = module._parameters.get(key)
            if p is None or (key == "weight" and site.kind == "linear"):
                continue
            if hasattr(p, "full_tensor"):  # sharded: what was read before sharding stands
                return record.fingerprint if record else None
            if p.is_meta and (kept_away := base.offloaded(module, key)) is not None:
                p = kept_away
            chosen[f"{site.module}.{key}"] = moved.get(
                f"{site.module}.{key}", before.get(id(module._parameters[key]), p)
            )
    return fingerprint(chosen)


def check_base(model: nn.Module, path: object, card: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Take the fingerprint out of a file's `tensors`. Raises ValueError where the file was made for another backbone."""
    kept = tensors.pop(FINGERPRINT, None)
    if kept is None:
        raise ValueError(f"{path}: it has no fingerprint of its base")
    table = all_sites(model)
    # older files have the pooler in the hash
    if card["site_table"] not in (table_hash(table), table_hash(table, pooler=True)):
        known = {s.name for s in table}
        gone = [s for ss in card["sites"].values() for s in ss if s not in known]
        detail = f"; the sites {', '.join(gone[:3])} are not here" if gone else ""
        raise ValueError(f"{path} was made for {card['backbone']}, whose layers are not those of this model{detail}")
    own = base_fingerprint(model, table)
    if own is not None and not same_base(kept, own):
        raise ValueError(
            f"{path} was made for {card['backbone']} with other weights: this base has the same shape, not the same values"
        )


def check_layers(model: nn.Module, path: object, deltas: "Mapping[str, Method]", tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the part of a file that a delta is given belongs to another layer than the one it stands at.

    `deltas` are by how their keys begin in the file.
    """
    for at, delta in deltas.items():
        own = {n: t for n in delta.state_dict() if (t := tensors.get(f"{at}.{n}")) is not None}
        try:
            delta.check_base(base.Base(model.get_submodule(delta.site.module), delta.site), own)
        except ValueError as error:
            raise ValueError(f"{path}: {delta.site.name}: {delta.name}: {error}") from None


def backbone_id(model: nn.Module) -> str:
    """The backbone's name on the hub or of its configuration; never a path."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name):
        return str(name)
    return str(
        getattr(config, "model_type", "") or base.own_class(model).__name__
    )  # sharding gives the class another name
