"""In the weights: what each source changes of each matrix, combined, as a low rank or as values at indices."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base
from ..core.compose import Leaf, parts_of, tree_from_dict
from ..core.method import METHODS, Delta
from ..core.record import HEAD, standing
from ..core.site import Site, all_sites
from ..methods.lora import LoRA, LowRank
from ..methods.values import Values
from .result import Put, Result, assembled, beside_codes
from .rules import Rule, trimmed
from .sources import Source, change_of, heads_of, pair_of, shift

Stands = dict[tuple[str, str], list[Delta]]  # (module, its parameter) -> what stands there, the inner ones first
Change = tuple[Tensor | None, Tensor | None]  # of a weight (O, I) and of its bias (O); None where nothing changes it


def changes(
    model: nn.Module,
    sources: Sequence[Source],
    weights: Sequence[float],
    rule: Rule,
    method: str,
    rank: int | None,
    keep: float | None,
    stack: contextlib.ExitStack,
) -> Result:
    """The rule over the sources' changes of each weight, in the form that `method` ends with."""
    there = [_stands(model, one, stack) for one in sources]
    if low := method.endswith("svd"):
        rank = _largest_rank(there) if rank is None else rank
    from_factors = method == "svd" and not any(one.in_place for one in sources)
    table = {(s.module, s.param): s for s in all_sites(model) if s.kind in Values.kinds | LoRA.kinds}
    _check_reached(model, sources, [key for key, site in table.items() if site.role != HEAD])
    made: dict[str, Put] = {}
    left_out: dict[str, tuple[float, float]] = {}
    for key, whole in table.items():
        module, here = model.get_submodule(key[0]), [stands.get(key, []) for stands in there]
        each = [
            change_of(module, own) if own else _shifted(model, one, whole)
            for one, own in zip(sources, here, strict=True)
        ]
        stood: list[Any] = [part for own in here for d in own for part in parts_of(d)]
        for site in _sites(whole, here, each):
            parts = [tuple(_rows(t, site) for t in change) for change in each]
            weight, bias = (_met([part[i] for part in parts], weights, rule) for i in (0, 1))
            if weight is None and bias is None:
                continue
            if low and site.kind != "norm":
                assert rank is not None
                pairs = _pairs(model, site, here, weights) if from_factors else None
                put, left_out[site.name] = _low_rank(site, pairs or weight, bias, rank)
                made[site.name] = beside_codes(put, stood)
            elif on_codes := next((d for d in stood if d.rebases), None):
                raise ValueError(
                    f"{site.name}: {on_codes.name} belongs to the codes that it chose, which values would not know; take an svd form"
                )
            else:
                made[site.name], left_out[site.name] = _values(site, module, weight, bias, keep)
    if not made:
        raise ValueError("nothing is left of the sources: what they change adds up to 0")
    plans = [one.plan() for one in sources]
    own_words = all(isinstance(plan, Leaf) and not one.in_place for plan, one in zip(plans, sources, strict=True))
    return Result(
        *assembled(model, plans if own_words else [tree_from_dict({"method": "lora"}, METHODS)], {"0": made}), left_out
    )


def _stands(model: nn.Module, source: Source, stack: contextlib.ExitStack) -> Stands:
    """A source's deltas by the weight that each changes. Raises ValueError where one changes none."""
    found: Stands = {}
    if source.in_place:
        return found
    adapter = source.attached(model, stack)
    for entry, _, delta in standing(model, model.__dict__["_deltatune"].infos[adapter.name], adapter.name):
        if not delta.has_fold:
            here = [d for (path, site), d in adapter.deltas.items() if entry.sites.get(path) == site]
            methods = sorted({d.name for d in here if not d.has_fold} or {d.name for d in here})
            raise ValueError(
                f"{delta.site.name}: {', '.join(methods)} defines no fold, so that it changes no weight that could be combined; "
                f"take average, which adds tensors"
            )
        found.setdefault((entry.module, delta.site.param), []).append(delta)
    return found


def _check_reached(model: nn.Module, sources: Sequence[Source], keys: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError where a source moved a parameter of the base that no site holds, or that stands there twice."""
    reached = {f"{m}.{p}" for m, p in keys} | {f"{m}.bias" for m, p in keys if p == "weight"}
    heads, names = heads_of(model), dict[int, list[str]]()
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for one in sources:
        for name in one.in_place:
            if f"0.{name}" not in one.tensors or name.rpartition(".")[0] in heads:
                continue
            if len(tied := names[id(model.get_parameter(name))]) > 1:
                raise ValueError(f"{one.label} moved {name}, which is tied: {', '.join(tied)}; take linear")
            if name not in reached:
                raise ValueError(f"{one.label} moved {name}, which no site holds as its weight or bias; take linear")


def _largest_rank(there: Sequence[Stands]) -> int:
    deltas: list[Any] = [d for stands in there for here in stands.values() for one in here for d in parts_of(one)]
    if not all(there) or not all(isinstance(d, LowRank) for d in deltas):
        raise ValueError("an svd form needs a rank where not all sources are LoRA's: give it rank=16")
    return max(d.r for d in deltas)


def _shifted(model: nn.Module, source: Source, site: Site) -> Change:
    """What a source that trains the base itself changed of a site, its weight as (O, I)."""
    if site.role == HEAD:
        return None, None
    weight = shift(model, source, f"{site.module}.{site.param}")
    if weight is not None and base.transposed(model.get_submodule(site.module), site.param):
        weight = weight.mT
    if weight is not None and site.kind == "conv2d":
        weight = weight.flatten(1)
    return weight, shift(model, source, f"{site.module}.bias") if site.param == "weight" else None


def _sites(whole: Site, here: Sequence[Sequence[Delta]], each: Sequence[Change]) -> list[Site]:
    """The slices of a fused weight that the sources stand at, or all of it where one of them changes all of it."""
    changed = [own for own, change in zip(here, each, strict=True) if own or change != (None, None)]
    if all(own and all(d.site.rows for d in own) for own in changed):
        return list({d.site.name: d.site for own in changed for d in own}.values())
    return [whole]


def _rows(t: Tensor | None, site: Site) -> Tensor | None:
    return t if t is None or not site.rows else base.take_rows(t, site)


def _met(parts: Sequence[Tensor | None], weights: Sequence[float], rule: Rule) -> Tensor | None:
    """The rule over the sources that change something here; None where nothing is left."""
    there = [(t, w) for t, w in zip(parts, weights, strict=True) if t is not None]
    found = rule([t for t, _ in there], [w for _, w in there]) if there else None
    return found if found is not None and found.any() else None


def _pairs(
    model: nn.Module, site: Site, here: Sequence[Sequence[Delta]], weights: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """A and B whose product is the weighted sum, where all sources are LoRA here: no large matrix is decomposed then."""
    found = []
    for weight, deltas in zip(weights, here, strict=True):
        own = [d for d in deltas if d.site.name == site.name]
        pair = pair_of(model, own[0]) if len(own) == 1 else None
        if pair is None and (own or deltas and not site.rows):
            return None
        if pair is not None:
            found.append((weight * pair[2] * pair[0], pair[1]))
    return (torch.cat([a for a, _ in found], -2), torch.cat([b for _, b in found], -1)) if found else None


def _low_rank(
    site: Site, change: Tensor | tuple[Tensor, Tensor] | None, bias: Tensor | None, rank: int
) -> tuple[Put, tuple[float, float]]:
    """The B A of that rank nearest to a change, or to the product of an (A, B); what it leaves out and what was wanted."""
    if isinstance(change, tuple):
        (qa, ra), (qb, rb) = torch.linalg.qr(change[0].mT), torch.linalg.qr(change[1])
        u, s, v = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
        u, v = qb @ u, v @ qa.mT
    elif change is not None:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        assert bias is not None
        u, s, v = bias.new_zeros(site.d_out, 1), bias.new_zeros(1), bias.new_zeros(1, site.d_in)
    rank = min(rank, s.shape[-1])
    tensors = {"a": v[..., :rank, :], "b": u[..., :rank] * s[..., None, :rank]}
    if bias is not None:
        tensors["d"] = bias
    hyper = (("r", rank), ("alpha", float(rank)), ("bias", bias is not None))
    return Put(LoRA, hyper, tensors), (float(s[..., rank:].norm()), float(s.norm()))


def _values(
    site: Site, module: nn.Module, weight: Tensor | None, bias: Tensor | None, keep: float | None
) -> tuple[Put, tuple[float, float]]:
    """The entries that are not 0, at most the share `keep` of all; what that leaves out and what was wanted."""
    own = base.bias_of(module, site)
    if site.kind not in Values.kinds:
        raise ValueError(f"{site.name}: values cannot sit on {site.kind}; take an svd form")
    if bias is not None and own is None:
        raise ValueError(f"{site.name}: the layer has no bias, and values change only what is there; take an svd form")
    zeros = torch.zeros(site.n_weights, dtype=torch.double, device=(weight if bias is None else bias).device)  # type: ignore[union-attr]
    parts = [zeros if weight is None else weight.flatten()]
    if own is not None:
        parts.append(zeros.new_zeros(site.d_out) if bias is None else bias)
    flat = torch.cat(parts)
    kept = flat if keep is None else trimmed(flat, keep)
    index = kept.nonzero().flatten().to(torch.int32)
    if 2 * index.numel() > kept.numel():  # then indices would take more room than zeros
        index, values = index[:0], kept
    else:
        values = kept[index.long()]
    return Put(Values, (), {"index": index, "values": values}), (float((flat - kept).norm()), float(flat.norm()))
