"""How several tensors of one shape become one."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.errors import unknown

RULES = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
# what a user calls it -> (rule, what the tensors are and what comes of them)
WAYS: dict[str, tuple[str, str]] = {rule: (rule, "factors") for rule in RULES}
WAYS |= {f"{rule}_{form}": (rule, form) for form in ("svd", "values") for rule in RULES[1:]}
WAYS |= {form: ("linear", form) for form in ("cat", "svd", "values", "average", "negate_b")}

Sign = Literal["total", "frequency"]
Rule = Callable[[list[Tensor], Sequence[float]], Tensor]


def merged(
    parts: Sequence[Tensor],
    weights: Sequence[float],
    rule: str = "linear",
    density: float = 1.0,
    sign: Sign = "total",
    draw: torch.Generator | None = None,
) -> Tensor:
    """One tensor of n of one shape, by a rule of RULES; `draw` decides what DARE drops."""
    if density < 1:
        parts = [dropped(p, density, draw) if rule.startswith("dare") else trimmed(p, density) for p in parts]
    stacked = torch.stack(list(parts))
    weighted = stacked * stacked.new_tensor(weights).view(-1, *(1,) * (stacked.ndim - 1))
    if not rule.endswith("ties"):
        return weighted.sum(0)
    votes = (stacked if sign == "total" else stacked.sign()).sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def trimmed(t: Tensor, density: float) -> Tensor:
    """The share `density` of largest entries, one at least, the others 0."""
    best = t.abs().flatten().topk(max(1, int(density * t.numel()))).indices
    return torch.zeros_like(t).flatten().index_fill(0, best, 1).view_as(t) * t


def dropped(t: Tensor, density: float, draw: torch.Generator | None) -> Tensor:
    """A random share `density` of the entries, divided by it, the others 0; drawn in fp32 on the CPU, the same everywhere."""
    kept = torch.bernoulli(torch.full(t.shape, density, dtype=torch.float32, device="cpu"), generator=draw)
    return t * kept.to(t) / density


def rule_of(rule: str, density: float | None, sign: Sign, seed: int) -> Rule:
    """The rule with its numbers, over matrices; of fused experts (E, O, I) over each one's own."""
    draw = torch.Generator().manual_seed(seed)

    def of(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
        if parts[0].ndim == 3:
            return torch.stack([of(list(each), weights) for each in zip(*parts, strict=True)])
        return merged(parts, weights, rule, 1.0 if density is None else density, sign, draw)

    return of


def check_way(method: str, density: float | None, rank: int | None, keep: float | None, sign: Sign) -> tuple[str, str]:
    """The rule and the form of a way. Raises ValueError where a number is missing, out of place or out of range."""
    if method not in WAYS:
        raise unknown("way to combine", method, WAYS)
    if sign not in get_args(Sign):
        raise unknown("way to elect a sign", sign, get_args(Sign))
    fits = {
        "density": [way for way, (rule, _) in WAYS.items() if rule != "linear"],
        "rank": [way for way, (_, form) in WAYS.items() if form == "svd"],
        "keep": [way for way, (_, form) in WAYS.items() if form == "values"],
        "sign": [way for way, (rule, _) in WAYS.items() if rule.endswith("ties")],
    }
    given = {"density": density, "rank": rank, "keep": keep, "sign": None if sign == "total" else sign}
    if density is None and method in fits["density"]:
        raise ValueError(f"{method} needs a density, the share of the entries that it keeps")
    for key, ways in fits.items():
        if given[key] is not None and method not in ways:
            raise ValueError(f"{method} takes no {key}; it belongs to {', '.join(ways)}")
    for key, share in (("density", density), ("keep", keep)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{key} = {share}, but a share lies above 0 and not above 1")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank = {rank}, but it must be a whole number, and at least 1")
    return WAYS[method]


def check_weights(weights: Sequence[float] | None, n: int, rule: str) -> list[float]:
    """A weight for each of n; where none are given 1 / n, for ties, which divides by those that agree, 1."""
    if weights is None:
        return [1.0 if rule.endswith("ties") else 1 / n] * n
    try:
        found = [float(w) for w in weights]
    except TypeError:
        raise ValueError(f"weights are numbers, one for each of the {n} adapters, not {weights!r}") from None
    if len(found) != n:
        raise ValueError(f"{len(found)} weights for {n} adapters")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"the weights {found} are not all finite")
    return found
