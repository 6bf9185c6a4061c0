"""LoRA beside codes whose widths an integer program chooses, matrix by matrix, for a size in all (LQ-LoRA)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.calibrate import Gradients, collect, looking
from ..quant.layers import KINDS, options_of
from .hub import own_loss
from .loftq import Factors, OnCodes, Quantise, Split, begin, factors, maker, plain, read

Format = tuple[str, int]  # name, group


def means_of(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of the means of F (O, I) over each row (O, 1), and over each column (1, I); where a mean is 0, the least other."""
    found = []
    for dim in (1, 0):
        mean = fisher.mean(dim, keepdim=True).sqrt()
        if not bool(mean.any()):
            raise ValueError("its Fisher information is zero: the loss does not depend on it")
        found.append(torch.where(mean > 0, mean, mean[mean > 0].min()))
    return found[0], found[1]


def weighted(weight: Tensor, rows: Tensor, columns: Tensor, r: int, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """B (O, r) and A (r, I) with the least |D_o (W - B A) D_i|, D_o and D_i the diagonals of `rows` and `columns`."""
    b, a = factors(rows * weight * columns, r, niter)
    return b / rows, a / columns


def descended(weight: Tensor, quantise: Quantise, low: Factors, steps: int, norm: Callable[[Tensor], Tensor]) -> Split:
    """(B, A) = SVD_r(W - Q_{t-1}), Q_t = q(W - B A), from Q = 0, until the `norm` of W - Q - B A grows; the best."""
    best: Split | None = None
    kept = torch.zeros_like(weight)
    for _ in range(steps):
        b, a = low(weight - kept)
        layer = quantise(weight - b @ a)
        kept = read(layer)
        error = float(norm(weight - kept - b @ a))
        if best is not None and not error < best[-1]:
            break
        best = layer, b, a, error
    assert best is not None
    return best


def stored_bits(to: str, group: int) -> float:
    """Bits of a weight in one of our own formats, with its share of the group's scale and zero in fp32."""
    _, every = options_of(to, {"group": group})
    return every["bits"] + (32 if every["code"] == "nf" else 64) / group


def allocated(costs: Tensor, sizes: Tensor, budget: float, seconds: float = 60.0) -> list[int]:
    """For each row of `costs` (n, c) the column with the least sum, such that the sum of `sizes` is at most `budget`.

    A cost that is not finite is no choice. Raises ValueError where no choice is small enough.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, c = costs.shape
    there = torch.isfinite(costs)
    least = float(torch.where(there, sizes, torch.inf).min(1).values.sum())
    if not least <= budget * (1 + 1e-9):
        raise ValueError(f"the smallest choices take {least:.6g} in all, allowed are {budget:.6g}")
    cost = torch.where(there, costs, 0.0).double()
    cost = cost / cost.norm().clamp_min(torch.finfo(torch.float64).tiny)
    one_each = torch.eye(n, dtype=torch.float64).repeat_interleave(c, 1)
    found = milp(
        c=1000 * cost.flatten().numpy(),
        constraints=[
            LinearConstraint(sizes.double().view(1, -1).numpy() / budget, 0, 1 + 1e-9),
            LinearConstraint(one_each.numpy(), 1, 1),
        ],
        integrality=torch.ones(n * c).numpy(),
        bounds=Bounds(0, there.flatten().double().numpy()),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no choice was found in {seconds} s: {found.message}")
    return torch.from_numpy(found.x).view(n, c).argmax(1).tolist()


class LQLoRA(OnCodes, name="lq_lora"):
    """W' = Q + (alpha / r) B A; at the start s B A = SVD_r(W - Q) and Q = q(W - s B A), in turns, s = alpha / r.

    Each matrix has one of `formats` in one of `groups`: those with the least sum of |W - Q - s B A|^2 in `bits` a weight. With
    `batches` (and a `loss(model, batch)`, by default the model's own) the error is that of sqrt(F) (W - Q - s B A), F the mean
    of squared gradients of single rows, and the SVD is weighted with the roots of F's means over rows and over columns.

    Attached to a plain base, whose layers there become quantised ones for good: `detach` leaves them, for
    `dt.save_base`, and a file is read onto that base alone.
    """

    paper = "2311.12023"
    starts_on = 256
    r: int = 64  # rank
    alpha: float = 16.0  # scale of the update, divided by r^power
    bits: float = 2.75  # of a weight, on average over all matrices, with scales and zeros
    formats: tuple[str, ...] = ("nf2", "nf3", "nf4", "int8")  # of our own
    groups: tuple[int, ...] = (32, 64, 128)  # weights under one scale; those that divide a matrix's inputs
    steps: int = 20  # turns, at most; the paper's code takes up to 100

    def __new__(
        cls, *, batches: Iterable[Any] | None = None, loss: Callable[[Any, Any], Tensor] | None = None, **hyper
    ):
        """A leaf, whose start looks at `batches` where they are given."""
        leaf = super().__new__(cls, **hyper)
        if isinstance(batches, Mapping):
            raise ValueError(f"{cls.name}: batches are a list of the model's keywords, not one such mapping")
        if loss is not None and batches is None:
            raise ValueError(f"{cls.name}: a loss without batches has nothing to look at")
        return cls.looks(leaf, batches, loss)

    @classmethod
    def looks(cls, leaf, batches, loss=None):
        """The leaf, whose start looks at `batches` where there are any."""
        return replace(leaf, start=partial(begin, partial(cls.split, batches=batches, loss=loss)))

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        own = [name for name, kind in KINDS.items() if "group" in kind.options]
        for name in config.formats:
            options_of(name, {})
            if name not in own:
                raise ValueError(
                    f"{cls.name}: formats holds {name!r}, of which no size is known; take {', '.join(own)}"
                )
        for key in ("formats", "groups"):
            if not getattr(config, key):
                raise ValueError(f"{cls.name}: {key} is empty")
        for size in config.groups:
            if size < 8 or size % 8:
                raise ValueError(f"{cls.name}: groups holds {size}; a group must be in eights")
        if not config.bits > 0:
            raise ValueError(f"{cls.name}: bits = {config.bits}, but it must lie above 0")
        return config

    @staticmethod
    def split(adapter, deltas, batches=None, loss=None):
        first = deltas[0]
        for d in deltas:
            for key in ("bits", "formats", "groups"):
                if getattr(d, key) != getattr(first, key):
                    raise ValueError(
                        f"{d.site.name}: lq_lora has one {key} for all its sites, not {getattr(first, key)!r} at "
                        f"{first.site.name} and {getattr(d, key)!r} here"
                    )
            if not any(d.site.d_in % size == 0 for size in d.groups):
                raise ValueError(f"{d.site.name}: none of groups = {d.groups} divides the layer's {d.site.d_in} inputs")
        choices = [(to, size) for to in first.formats for size in first.groups]
        fisher = information(adapter, deltas, batches, loss) if batches is not None else {}
        costs = torch.tensor(
            [[d.decomposed(adapter, fisher, c)[-1] ** 2 if d.site.d_in % c[1] == 0 else torch.inf for c in choices] for d in deltas],
            dtype=torch.float64,
        )  # fmt: skip
        counts = torch.tensor([d.site.d_in * d.site.d_out for d in deltas], dtype=torch.float64)
        sizes = counts[:, None] / counts.sum() * torch.tensor([stored_bits(*c) for c in choices], dtype=torch.float64)
        try:
            taken = allocated(costs, sizes, first.bits)
        except ValueError as error:
            raise ValueError(f"lq_lora: bits = {first.bits}: {error}") from None
        return {d.site.name: d.decomposed(adapter, fisher, choices[i]) for d, i in zip(deltas, taken, strict=True)}

    def decomposed(self, adapter, fisher, choice):
        """Q, B, A and the error of the layer's weight in one format and group."""
        module, weight = plain(adapter, self.site)
        low, norm = partial(factors, r=self.r, niter=self.niter), torch.linalg.norm
        if self.site.name in fisher:
            f = fisher[self.site.name]
            try:
                rows, columns = means_of(f)
            except ValueError as error:
                raise ValueError(f"{self.site.name}: lq_lora: {error}") from None
            low = partial(weighted, rows=rows, columns=columns, r=self.r, niter=self.niter)
            norm = lambda rest: torch.linalg.norm(f.sqrt() * rest)  # noqa: E731
        to, size = choice
        return descended(weight, maker(to, {"group": size}, module), low, self.steps, norm)


def information(
    adapter: Any, deltas: Sequence[OnCodes], batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None
) -> dict[str, Tensor]:
    """By site's name F (O, I), the mean over the rows of `batches` of the loss's squared gradient by the weight."""
    weights = {d.site.name: adapter.model.get_submodule(d.site.module).weight for d in deltas}
    with adapter.disabled(), looking(adapter.model, False, adapter.seed):
        return collect(adapter.model, batches, loss or own_loss, {"f": Gradients(weights)}, rows="example")["f"]
