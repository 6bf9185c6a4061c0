"""In the tensors: every one of any tree, LoRA's factors, and the base's own parameters."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import files
from ..core.compose import Average, Node, Stack, Sum, Tree
from ..core.identity import check_layers
from ..core.record import HEAD
from ..core.site import all_sites, expanded
from ..methods.lora import LoRA
from .result import Put, Result, assembled, beside_codes
from .rules import Rule
from .sources import Source, apart, heads_of, pair_of, shift


def averaged(
    model: nn.Module, sources: Sequence[Source], weights: Sequence[float], form: str, stack: contextlib.ExitStack
) -> Result:
    """theta = sum_i w_i theta_i of what is trained, of A sum_i |w_i| A_i by negate_b; what is not must be the same in all."""
    first = sources[0]
    if any(one.in_place for one in sources):
        raise ValueError(f"{form} adds tensors, and these train the base itself; linear adds what they changed of it")
    adapter = first.attached(model, stack)
    for one in sources[1:]:
        if _without_dropout(one.tree) != _without_dropout(first.tree) or one.card["sites"] != first.card["sites"]:
            raise apart(first, one)
        if one.card["seed"] != first.card["seed"] and any(d.draws_from_seed for d in adapter.deltas.values()):
            raise ValueError(
                f"the sites share tensors that are drawn from the seed: {first.card['seed']} in {first.label}, "
                f"{one.card['seed']} in {one.label}"
            )
    deltas = {f"{path}.{site}": delta for (path, site), delta in adapter.deltas.items()}
    for one in sources[1:]:
        check_layers(model, one.label, deltas, one.tensors)
    for (_, site), delta in adapter.deltas.items():
        if form == "negate_b" and pair_of(model, delta) is None:
            raise ValueError(f"{site}: {delta.name} is not W + s B A, whose B negate_b negates; take svd or values")
    trained = {key for key, _ in adapter.named_parameters()}
    each = [{key: t for key, t in one.tensors.items() if not key.startswith(f"{HEAD}.")} for one in sources]
    found: dict[str, Tensor] = {}
    for one, tensors in zip(sources, each, strict=True):
        files.check_keys(one.label, {key: tuple(t.shape) for key, t in each[0].items()}, tensors)
    for key, tensor in each[0].items():
        if key in trained:
            shares = [abs(w) for w in weights] if form == "negate_b" and key.endswith(".a") else weights
            parts = [w * tensors[key].double() for w, tensors in zip(shares, each, strict=True)]
            found[key] = torch.stack(parts).sum(0)
        elif all(torch.equal(tensors[key], tensor) for tensors in each):
            found[key] = tensor
        else:
            raise ValueError(
                f"{key} is not trained and differs from source to source, so that it has no mean; take svd or values"
            )
    return Result(first.plan(), found, {})


def _without_dropout(tree: Mapping[str, Any]) -> Any:
    if "op" in tree:
        return {**tree, "children": [_without_dropout(c) for c in tree["children"]]}
    return {**tree, "config": {k: v for k, v in tree["config"].items() if k != "dropout"}}


def moved(
    model: nn.Module, sources: Sequence[Source], weights: Sequence[float], rule: Rule, method: str, head: int | None
) -> Result:
    """theta = theta_0 + the rule over theta_i - theta_0, each parameter by itself: task arithmetic (2212.04089)."""
    if method == "cat":
        raise ValueError("cat puts LoRA's factors together, and these sources train the base itself; take linear")
    for one in sources[1:]:
        if one.tree != sources[0].tree or one.in_place != sources[0].in_place:
            raise apart(sources[0], one)
    tensors, heads = {}, heads_of(model)
    for name in sources[0].in_place:
        is_head = name.rpartition(".")[0] in heads
        of = sources if not is_head else [] if head is None else [sources[head]]
        changes = [(t, w) for one, w in zip(of, weights, strict=False) if (t := shift(model, one, name)) is not None]
        if changes:
            p = model.get_parameter(name).double()
            change = changes[0][0] if is_head else rule([t for t, _ in changes], [w for _, w in changes])
            tensors[f"0.{name}"] = p + change
    return Result(sources[0].plan(), tensors, {})


def factors(
    model: nn.Module,
    sources: Sequence[Source],
    weights: Sequence[float],
    rule: Rule,
    method: str,
    stack: contextlib.ExitStack,
) -> Result:
    """LoRA's factors, each by itself; `cat` puts them one behind the other."""
    for one in sources:
        if one.in_place:
            raise ValueError(f"{one.label} trains the base itself, others do not; take svd or values")
        if _structure(one.tree) != _structure(sources[0].tree):
            raise apart(sources[0], one)
        if mixing := [node for node in _nodes(one.plan()) if not isinstance(node, (Stack, Sum, Average))]:
            raise ValueError(
                f"{one.label}: what meets in {type(mixing[0]).__name__} is weighed by tensors of its own, which {method} cannot "
                f"combine; take average, which adds every tensor"
            )
    every = [one.attached(model, stack).deltas for one in sources]
    order = [s.name for s in expanded(all_sites(model))]
    made: dict[str, dict[str, Put]] = {}
    for path, _ in sources[0].plan().leaves():
        names = {site for deltas in every for p, site in deltas if p == path}
        for site in sorted(names, key=order.index):
            here = [(w, d[path, site]) for w, d in zip(weights, every, strict=True) if (path, site) in d]
            made.setdefault(path, {})[site] = _factor(model, here, rule, method)
    return Result(*assembled(model, [one.plan() for one in sources], made), {})


def _structure(tree: Mapping[str, Any]) -> Any:
    return [tree["op"], *map(_structure, tree["children"])] if "op" in tree else None


def _nodes(tree: Tree) -> Iterator[Node]:
    if isinstance(tree, Node):
        yield tree
        for child in tree.children:
            yield from _nodes(child)


def _factor(model: nn.Module, here: Sequence[tuple[float, Any]], rule: Rule, method: str) -> Put:
    """The LoRA of one site. The weight's sign goes to the factor that the input meets first: A, of an embedding B."""
    weights, site = [], here[0][1].site
    first: list[Tensor] = []
    second: list[Tensor] = []
    for weight, delta in here:
        pair = pair_of(model, delta)
        if pair is None:
            raise ValueError(
                f"{site.name}: {delta.name} is not W + s B A, whose factors {method} works on; take average, which adds every "
                f"tensor, or svd or values, which work on the weights"
            )
        a, b, scale = pair
        weights.append(weight * scale)
        first.append(b.mT if site.kind == "embedding" else a)
        second.append(a.mT if site.kind == "embedding" else b)
    if method == "cat":
        one = torch.cat([w * t for w, t in zip(weights, first, strict=True)], -2)
        other = torch.cat(second, -1)
    elif len(ranks := sorted({t.shape[-2] for t in first})) == 1:
        roots = [math.sqrt(abs(w)) for w in weights]
        one = rule(first, [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)])
        other = rule(second, roots)
    else:
        ranks_ = " and ".join(map(str, ranks))
        raise ValueError(f"{site.name}: ranks {ranks_}, and {method} adds factor to factor; take cat, or an svd form")
    a, b = (other.mT, one.mT) if site.kind == "embedding" else (one, other)
    tensors = {"a": a, "b": b}
    biases = [(w, d.d) for w, d in here if getattr(d, "bias", False)]
    if biases:
        tensors["d"] = rule([d for _, d in biases], [w for w, _ in biases])
    low = Put(LoRA, (("r", a.shape[-2]), ("alpha", float(a.shape[-2])), ("bias", bool(biases))), tensors)
    return beside_codes(low, [d for _, d in here])
