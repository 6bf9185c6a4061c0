"""LN tuning, both ways: HF PEFT's file holds whole norms, an adapter here what moved in them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core import base
from ..core.site import Site
from ..methods.vectors import LNTuning
from .beside import finished_plan, saved_sites
from .names import Named, targets
from .pieces import Piece, Plan, made

SLOTS = {"g": "weight", "d": "bias"}  # the slot -> the norm's own tensor


def plan_norms(model: nn.Module, fields: dict[str, Any], is_file: bool) -> Plan:
    named = Named(model)
    chosen = []
    for name in targets(named, fields, "LNTUNING", is_file):  # so the table of its defaults is named
        site = named.sites.get(name)
        if site is None or site.kind != "norm":
            cls = base.own_class(named.modules[name]).__name__
            raise ValueError(f"target_modules matches {name}, a {cls}; ln_tuning trains norms alone")
        chosen.append(site)
    short = fields.get("target_modules") if isinstance(fields.get("target_modules"), list) else None
    leaf = made(LNTuning, where=named.where([s.name for s in chosen], LNTuning.kinds, short))

    def pieces(path: str) -> list[Piece]:
        return [piece for site in chosen for piece in _pieces(named, site, path)]

    made_here: list[tuple[int, Callable[[str], list[Piece]]]] = [(0, pieces)]
    return finished_plan(named, [leaf], made_here, saved_sites(named, fields, is_file), {}, "base_model.model.")


def _own(named: Named, site: Site) -> dict[str, Tensor]:
    """The norm's own tensors by slot."""
    seen = base.Base(named.modules[site.module], site)
    return {"g": seen.weight} | ({} if seen.bias is None else {"d": seen.bias})


def _key(site: Site, slot: str) -> str:
    return f"base_model.model.{site.module}.ln_tuning_layers.{SLOTS[slot]}"


def _pieces(named: Named, site: Site, path: str) -> list[Piece]:
    def moved(slot: str, own: Tensor) -> Callable[[Tensor], dict[tuple[str, str, str], Tensor]]:
        return lambda t: {(path, site.name, slot): t.to(own.device) - own}

    return [Piece(_key(site, slot), (site.d_out,), moved(slot, own)) for slot, own in _own(named, site).items()]


def norm_tensors(named: Named, moved: Sequence[tuple[Site, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """What HF PEFT's file holds of these sites' tensors."""
    return {
        _key(site, slot): own.to(tensors[slot].device) + tensors[slot]
        for site, tensors in moved
        for slot, own in _own(named, site).items()
    }
