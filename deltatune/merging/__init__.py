"""Arithmetic on trained adapters: a new one on the model, of several saved ones of the same base.

    new = dt.combine(model, ["runs/law", "runs/chat"], [0.7, 0.3], "ties_svd", density=0.4, rank=16)

A way is a rule and a form. The rule says how n tensors P_i with weights w_i become one:

    linear              sum_i w_i P_i
    magnitude_prune     sum_i w_i top(P_i): the share `density` of largest entries, the others 0
    ties                of each entry of the top(P_i) the sign that outweighs the other, and the sum of the w_i P_i that have it,
                        divided by how many have; + where neither outweighs (2306.01708)
    dare_linear         sum_i w_i drop(P_i): a random share `density` of the entries, divided by it, the others 0 (2311.03099)
    dare_ties           drop(P_i), then as ties

The form says what the tensors are and what comes of them:

    linear, ties, ...   LoRA's factors, with sqrt|w s| for B and that and the sign for A, s its scale: a LoRA of the same rank. Of
                        adapters that train the base itself, what they changed of it: such an adapter (2212.04089)
    cat                 A = [w_i s_i A_i], B = [B_i]: a LoRA that is the weighted sum exactly
    svd, ties_svd, ...  what each changes of each matrix, fold(W) - W, of any methods that fold: the nearest LoRA of `rank`
    values, ties_values, ...  the same, as values at indices
    average             theta = sum_i w_i theta_i, every trained tensor of any tree
    negate_b            the same of LoRA, with |w_i| for A (2306.14870)

Those on factors and `svd` are HF PEFT's `add_weighted_adapter`; `average`, `negate_b` and `svd` are AdapterHub's `average_adapter`.
What a method made beside codes that it chose itself stays one of its kind, whose file knows those codes; values cannot be.
A weight of -1 forgets a task; [1, 1, -1] of c, b and a is the analogy "c as b is to a". Both are exact by cat, svd of a rank that is
large enough, and values; linear adds the factors apart, so that each A also meets the other B's.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..core.adapter import Adapter, adapters, fill
from ..core.attach import or_off, shaped
from .rules import WAYS as WAYS
from .rules import Sign, check_way, check_weights, rule_of
from .sources import check_untouched, read_all
from .tensors import averaged, factors, moved
from .weights import changes


class Combined(Adapter):
    """The handle of a new adapter, which also knows how much of the wanted change its form has no room for."""

    def __init__(self, model: nn.Module, name: str, left_out: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(model, name)
        self._left_out = dict(left_out)

    @property
    def residuals(self) -> dict[str, float]:
        """By site |what is left out| / |what was wanted|, Frobenius norms of the weights; empty where no form is cut."""
        return {site: lost / whole if whole else 0.0 for site, (lost, whole) in self._left_out.items()}

    @property
    def residual(self) -> float:
        """The same over all sites together."""
        lost, whole = (math.hypot(*(pair[i] for pair in self._left_out.values())) for i in (0, 1))
        return lost / whole if whole else 0.0


def combine(
    model: nn.Module,
    sources: Sequence[str | os.PathLike[str] | Adapter],
    weights: Sequence[float] | None = None,
    method: str = "linear",
    *,
    density: float | None = None,
    sign: Sign = "total",
    rank: int | None = None,
    keep: float | None = None,
    head: int | None = None,
    seed: int = 0,
    name: str = "combined",
    trainable: bool = False,
) -> Combined:
    """Put a new adapter on the model, made of several trained ones by a way of `deltatune.merging`.

    `sources` are folders, HF PEFT's too, or adapters, all of this base. `weights` are 1 / n each where none are given, and 1 for ties,
    which divides by those that agree behind them. `density`, above 0 and up to 1, is the share that pruning keeps; `sign` lets
    entries elect by what they add up to or by their number. `rank` is an svd form's, by default the largest of LoRA sources, and
    `keep` the largest share of entries in a values form. `seed` decides what DARE drops. A task head stays the model's own, or
    is that of source number `head`.

    The result runs at once, beside what is enabled: disable sources that stand on the model. Its `residual` is the share that a low
    rank, or few values, left out.

    Raises ValueError, and changes nothing, where a number does not fit, the sources are of other bases or other trees, or their
    methods do not have what the way works on.
    """
    rule, form = check_way(method, density, rank, keep, sign)
    if isinstance(sources, (str, os.PathLike, Adapter)) or not sources:
        raise ValueError(f"combine takes a list of folders or adapters, not {sources!r}")
    weights = check_weights(weights, len(sources), rule)
    if head is not None and not 0 <= head < len(sources):
        raise ValueError(f"head = {head}, but it is the number of a source, 0 to {len(sources) - 1}")
    if name in (there := adapters(model)):
        raise ValueError(f"the model has an adapter named {name!r} already; adapters here: {', '.join(there)}")
    check_untouched(model)
    one_of = rule_of(rule, density, sign, seed)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        with contextlib.ExitStack() as stack:
            saved, in_place = read_all(model, sources, stack), False
            if form in ("average", "negate_b"):
                found, seed = averaged(model, saved, weights, form, stack), saved[0].card["seed"]
            elif form in ("svd", "values"):
                found = changes(model, saved, weights, one_of, method, rank, keep, stack)
            elif in_place := all(one.in_place for one in saved):
                found = moved(model, saved, weights, one_of, method, head)
            else:
                found = factors(model, saved, weights, one_of, method, stack)
            own_head = {} if head is None or in_place else saved[head].head(model)
        adapter = shaped(model, found.tree, name, seed, head is not None)
        with or_off(adapter):
            fill(adapter, f"what {method} makes of the sources", {**found.tensors, **own_head})
            adapter.trainable(trainable)
    return Combined(model, name, found.left_out)
