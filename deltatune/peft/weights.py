"""LoRA, DoRA, AdaLoRA and (IA)³ of a configuration: hyperparameters by place, and the tensors of each adapted layer."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base
from ..core.compose import Leaf
from ..core.errors import unknown
from ..core.site import Site
from ..methods.lora import DoRA, LoRA
from ..methods.lora_starts import PiSSA
from ..methods.orthogonal import BOFT, OFT
from ..methods.ranks import AdaLoRA
from ..methods.rescale import IA3
from ..methods.rows import TokenRows
from ..methods.sparse import SHiRA
from ..methods.vectors import BitFit
from .beside import bias_piece, biased_sites, finished_plan, rows_pieces, saved_sites, token_rows
from .factors import FACTORS, hyper_factors, rows_of, shared_pieces
from .masks import hyper_shira, mask_pieces
from .names import Named, default_of, exactly, matches, target_parameters, targets
from .pieces import Piece, Plan, made
from .rotations import ROTATIONS, boft_at, boft_tensors, hyper_oft, oft_at, oft_tensors, upper
from .starts import check_pissa, is_pissa, niter

WEIGHT_METHODS = {"LORA": LoRA, "ADALORA": AdaLoRA, "IA3": IA3, "SHIRA": SHiRA, **ROTATIONS, **FACTORS}
_PATTERNED = ("LORA", "LOHA", "LOKR")


def plan_weights(model: nn.Module, fields: dict[str, Any], kind: str, is_file: bool) -> Plan:
    named = Named(model)
    method: Any = DoRA if fields.get("use_dora") else WEIGHT_METHODS[kind]
    if kind == "LORA" and is_pissa(fields.get("init_lora_weights")):
        method = PiSSA
    if fields.get("bias") == f"{kind.lower()}_only":  # the one mode under the names that HF PEFT gives it
        fields = fields | {"bias": "lora_only"}
    chosen = []
    for name in targets(named, fields, kind, is_file):
        site = named.sites.get(name)
        if site is None or site.kind not in ("linear", "conv2d", "embedding") or name != site.module:
            cls = base.own_class(named.modules[name]).__name__
            raise ValueError(f"target_modules matches {name}, a {cls}, where {method.name} has no place")
        chosen.append(site)
    experts = target_parameters(named, fields, is_file)
    chosen += experts
    hyper = {
        "LORA": lambda: _hyper_lora(fields), "ADALORA": lambda: _hyper_adalora(fields, is_file), "IA3": dict,
        "OFT": lambda: hyper_oft(fields, is_file), "BOFT": dict, "SHIRA": lambda: hyper_shira(fields),
    }.get(kind, lambda: hyper_factors(fields, kind))()  # fmt: skip
    own = {site.name: _hyper_of(named, site, fields, kind, hyper) for site in chosen}
    _patterns_used(fields, kind, own)
    short = fields.get("target_modules") if not experts and isinstance(fields.get("target_modules"), list) else None
    leaves: list[Leaf] = [_leaf(named, method, own, short)]
    pieces: list[tuple[int, Callable[[str], list[Piece]]]] = []

    def weights(path: str) -> list[Piece]:
        return [
            piece for site in chosen for piece in _pieces(named, method, site, own[site.name], path, fields, experts)
        ]

    pieces.append((0, weights))
    pieces.append((0, functools.partial(shared_pieces, chosen, fields, kind)))
    saved = saved_sites(named, fields, is_file)
    allowed: dict[str, Tensor] = {}
    biased = biased_sites(named, fields, [s for s in chosen if s.kind != "experts"], saved, is_file)
    if biased:
        leaves.append(made(BitFit, where=named.where([s.name for s in biased], BitFit.kinds)))
        pieces.append((len(leaves) - 1, lambda path: [bias_piece(named, s, s in chosen, path) for s in biased]))
    for key, ids, sites in token_rows(named, fields):
        leaves.append(made(TokenRows, ids=tuple(ids), where=tuple(s.name for s in sites)))
        pieces.append((len(leaves) - 1, functools.partial(rows_pieces, key, len(ids), sites)))
    for site in chosen:  # what HF PEFT saves beside an adapted or resized embedding
        if site.kind == "embedding" or site.module.endswith("lm_head"):
            allowed[f"base_model.model.{site.module}.base_layer.weight"] = base.stored(named.modules[site.module], site)
    for site in named.table:
        if site.role in ("embed", "lm_head") and site.name == site.module and site not in chosen:
            allowed[f"base_model.model.{site.module}.weight"] = base.stored(named.modules[site.module], site)
    return finished_plan(named, leaves, pieces, saved, allowed, "base_model.model.")


def _hyper_lora(fields: Mapping[str, Any]) -> dict[str, Any]:
    pissa = is_pissa(fields.get("init_lora_weights"))
    return {
        "r": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "power": 0.5 if fields.get("use_rslora") else 1.0,
        "dropout": fields.get("lora_dropout", 0.0),
    } | (
        {"niter": niter(fields)} if pissa else {} if fields.get("use_dora") else {"bias": bool(fields.get("lora_bias"))}
    )


def _hyper_adalora(fields: Mapping[str, Any], is_file: bool) -> dict[str, Any]:
    if fields.get("rank_pattern") and not is_file:
        raise ValueError(
            "ADALORA: rank_pattern is found while training; a configuration to start from must not have it"
        )
    alpha = fields.get("lora_alpha", 8)
    if alpha <= 0:
        raise ValueError(f"ADALORA: lora_alpha = {alpha} cannot be kept: there it stands for the rank")
    return {
        "r": fields.get("init_r", 12), "target": fields.get("target_r", 8), "alpha": alpha,
        "warmup": fields.get("tinit", 0), "final": fields.get("tfinal", 0), "interval": fields.get("deltaT", 1),
        "beta1": fields.get("beta1", 0.85), "beta2": fields.get("beta2", 0.85),
        "orth": fields.get("orth_reg_weight", 0.5), "dropout": fields.get("lora_dropout", 0.0),
    }  # fmt: skip


def _hyper_of(
    named: Named, site: Site, fields: Mapping[str, Any], kind: str, hyper: Mapping[str, Any]
) -> dict[str, Any]:
    """The hyperparameters at one site."""
    if kind == "IA3":
        rule = fields.get("feedforward_modules")
        if rule is None:
            rule = default_of(named.model, kind, "FEEDFORWARD")
        inner = matches(rule, site.name) if isinstance(rule, str) else any(site.name.endswith(end) for end in rule)
        return {"side": "input" if inner else "output"}
    if kind == "OFT":
        return oft_at(named.modules[site.module], site, fields, hyper)
    if kind == "BOFT":
        return boft_at(named.modules[site.module], site, fields)
    own = dict(hyper)
    if kind in _PATTERNED:
        for field, key in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
            patterns = fields.get(field) or {}
            hit = next((p for p in patterns if _fits(p, site.name)), None)
            own[key] = own[key] if hit is None else patterns[hit]
    if kind == "LORA" and site.kind in ("embedding", "experts"):
        own["dropout"] = 0.0
    return own


def _fits(pattern: str, name: str) -> bool:
    """HF PEFT's rule for a key of rank_pattern or alpha_pattern: it matches the name, or its end at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _patterns_used(fields: Mapping[str, Any], kind: str, own: Mapping[str, Any]) -> None:
    """A pattern that matches no adapted layer is an error; HF PEFT warns."""
    for key in fields.get("rank_pattern") or () if kind == "ADALORA" else ():
        if key.removesuffix(".lora_E") not in own:
            raise unknown("key of rank_pattern, which matches no adapted layer,", key, own)
    for field in ("rank_pattern", "alpha_pattern") if kind in _PATTERNED else ():
        for pattern in fields.get(field) or {}:
            if not any(_fits(pattern, name) for name in own):
                raise unknown(f"key of {field}, which matches no adapted layer,", pattern, own)


def _leaf(named: Named, method: Any, own: Mapping[str, dict[str, Any]], short: Any) -> Leaf:
    """One leaf; places with hyperparameters of their own where they differ."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, hyper in own.items():
        groups.setdefault(tuple(hyper.items()), []).append(name)
    most = dict(max(groups.items(), key=lambda group: len(group[1]))[0])
    if len(groups) == 1:
        return made(method, **most, where=named.where(list(own), method.kinds, short))
    where = {exactly(names): {k: v for k, v in group if most[k] != v} for group, names in groups.items()}
    return made(method, **most, where=where)


def _pieces(
    named: Named,
    method: Any,
    site: Site,
    hyper: Mapping[str, Any],
    path: str,
    fields: Mapping[str, Any],
    experts: Sequence[Site],
) -> Iterator[Piece]:
    """The tensors of one adapted layer."""
    module, at = named.modules[site.module], f"base_model.model.{site.module}"

    def piece(suffix: str, slot: str, shape: tuple[int, ...], here: Callable[[Tensor], Tensor] = lambda t: t) -> Piece:
        return Piece(f"{at}.{suffix}", shape, lambda t: {(path, site.name, slot): here(t)})

    o, i = site.d_out, site.d_in
    if method is IA3:
        no_groups(module, site, square=hyper["side"] == "input")
        ones = (1, 1) if site.kind == "conv2d" else ()
        if hyper["side"] == "input":
            yield piece("ia3_l", "scale", (1, i, *ones), torch.flatten)
        else:
            yield piece("ia3_l", "scale", (1, o, *ones) if ones else (o, 1), torch.flatten)
        return
    if method is SHiRA:
        yield from mask_pieces(module, site, hyper, path)
        return
    if method is OFT:
        key, shape, sign = oft_tensors(site, hyper)
        yield piece(key, "q", shape, lambda t: sign * t)
        return
    if method is BOFT:
        for key, slot, shape in boft_tensors(site, hyper):
            yield piece(key, slot, shape, upper if slot == "q" else torch.flatten)
        return
    if method in FACTORS.values():
        for key, slot, shape, here in rows_of(module, site, method, hyper):
            yield piece(key, slot, shape, here)
        return
    r = hyper["r"]
    if method is PiSSA:
        check_pissa(fields, site, module, named.inputs)
    if method is AdaLoRA:
        if site.kind != "linear":
            raise ValueError(f"{site.name}: AdaLoRA of HF PEFT's on a {site.kind} is not read")
        kept = (fields.get("rank_pattern") or {}).get(f"{site.module}.lora_E")
        if kept is not None and len(kept) != r:
            raise ValueError(f"rank_pattern of {site.module} has {len(kept)} entries, the rank is {r}")
        rows = torch.tensor([True] * r if kept is None else kept, dtype=torch.bool)
        k = int(rows.sum())

        def spread(t: Tensor) -> Tensor:
            return t.new_zeros(r, *t.shape[1:]).index_copy(0, rows.nonzero()[:, 0], t)

        yield piece("lora_A", "a", (k, i), spread)
        yield piece("lora_B", "b", (o, k), lambda t: spread(t.t()).t())
        yield piece("lora_E", "e", (k, 1), lambda t: spread(t.flatten()))
        return
    scale = hyper["alpha"] / r ** hyper["power"]
    if site.kind == "experts":
        if method is DoRA:
            raise ValueError(f"{site.name}: HF PEFT has no DoRA on fused experts")
        beside = [s for s in experts if s.module == site.module]
        at += ".base_layer" * (len(beside) - 1 - beside.index(site))
        n = site.n_experts
        yield piece("lora_A.weight", "a", (n * r, i), lambda t: t.view(n, r, i))
        yield piece("lora_B.weight", "b", (o, r * n), lambda t: t.view(o, r, n).permute(2, 0, 1))
    elif site.kind == "embedding":
        if method is DoRA:
            raise ValueError(
                f"{site.name}: DoRA of HF PEFT's normalises an embedding's columns, here it would be its rows"
            )
        yield piece("lora_embedding_A", "b", (r, o), torch.t)
        yield piece("lora_embedding_B", "a", (i, r), torch.t)
    elif site.kind == "conv2d":
        no_groups(module, site)
        kernel = tuple(base.stored(module, site).shape[1:])
        yield piece("lora_A.weight", "a", (r, *kernel), lambda t: t.flatten(1))
        yield piece("lora_B.weight", "b", (o, r, 1, 1), lambda t: t.flatten(1))
    else:
        yield piece("lora_A.weight", "a", (r, i))
        yield piece("lora_B.weight", "b", (o, r))
    if method is DoRA:
        yield piece("lora_magnitude_vector", "m", (1, o, 1, 1) if site.kind == "conv2d" else (o,), torch.flatten)
    elif hyper.get("bias"):
        if site.kind not in ("linear", "conv2d"):
            raise ValueError(f"{site.name}: lora_bias has no place on {site.kind}")
        yield piece("lora_B.bias", "d", (o,), lambda t: t * scale)


def no_groups(module: Any, site: Site, square: bool = False) -> None:
    """Raise ValueError on a convolution whose factors HF PEFT makes with another stride, dilation or number of groups."""
    if site.kind != "conv2d":
        return
    if module.groups != 1 or tuple(module.dilation) != (1, 1) or module.padding_mode != "zeros" or square:
        raise ValueError(f"{site.name}: this convolution's adapter in HF PEFT is no update of its weight")
