"""How several tensors of one shape become one."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
    """The share `density` of largest entries, the others 0."""
    best = t.abs().flatten().topk(int(density * t.numel())).indices
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


def check_way(method: str, **numbers: Any) -> tuple[str, str]:
    """The rule and the form of a way. Raises ValueError where a number is missing, out of place or out of range."""
    if method not in WAYS:
        raise unknown("way to combine", method, WAYS)
    fits = {
        "density": [way for way, (rule, _) in WAYS.items() if rule != "linear"],
        "rank": [way for way, (_, form) in WAYS.items() if form == "svd"],
        "keep": [way for way, (_, form) in WAYS.items() if form == "values"],
    }
    if numbers["density"] is None and method in fits["density"]:
        raise ValueError(f"{method} needs a density, the share of the entries that it keeps")
    for key, ways in fits.items():
        value = numbers[key]
        if value is not None and method not in ways:
            raise ValueError(f"{method} takes no {key}; it belongs to {', '.join(ways)}")
        if value is not None and key != "rank" and not 0 < value <= 1:
            raise ValueError(f"{key} = {value}, but a share lies above 0 and not above 1")
    if numbers["rank"] is not None and numbers["rank"] < 1:
        raise ValueError(f"rank = {numbers['rank']}, but it must be at least 1")
    if numbers["sign"] not in Sign.__args__:  # type: ignore[attr-defined]
        raise unknown("way to elect a sign", numbers["sign"], Sign.__args__)  # type: ignore[attr-defined]
    return WAYS[method]


def check_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """A weight for each of n, 1 / n where none are given."""
    weights = [1 / n] * n if weights is None else [float(w) for w in weights]
    if len(weights) != n:
        raise ValueError(f"{len(weights)} weights for {n} adapters")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"the weights {weights} are not all finite")
    return weights
