"""Which checks run where: each once, drawn by the seed, or all of the product."""

import random
from collections.abc import Iterable

import torch

from ..core.attach import attach
from ..core.compose import Preset
from ..core.errors import unknown
from ..core.method import Method
from .beds import BEDS, Bed
from .checks import CHECKS, DTYPES, Check, Result, checks_of, run_one, sources_for
from .pair import PAIR, two_processes


def run(
    method: type[Method] | Preset,
    *,
    seed: int = 0,
    kinds: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    full: bool = False,
) -> list[Result]:
    """Every check on `method`, the two processes' included.

    `kinds` are beds or kinds of site, `dtypes` those of the base; by default all that the method names. Each check runs
    once, on a bed and a dtype drawn by `seed`, or with `full` on each. Raises ValueError where none fits.
    """
    if not __debug__:
        raise ValueError("the checks are assertions; run them without python -O")
    beds, names = _choose(method, kinds, dtypes)
    results: list[Result] = []
    for check in checks_of(method):
        results += run_check(method, check.name, seed=seed, kinds=[b.name for b in beds], dtypes=names, full=full)
    rng = random.Random(f"{seed} {method.name} pair")
    there = [b for b in beds if not b.later]
    if not there:
        return results
    exempt = [name for name in PAIR if name in method.exceptions]
    results += [Result(name, "", "", "exempt", method.exceptions[name]) for name in exempt]
    wide = [d for d in names if d != "bfloat16"] or names
    jobs = [
        (name, method, bed.name, dtype)
        for name in PAIR
        if name not in exempt
        for bed in (there if full else [rng.choice(there)])
        for dtype in (wide if full else [rng.choice(wide)])
    ]
    for (name, _, bed_name, dtype), text in zip(jobs, two_processes(jobs, seed), strict=True):
        if text.startswith("skipped: "):
            results.append(Result(name, bed_name, dtype, "skipped", text.removeprefix("skipped: ")))
        else:
            results.append(Result(name, bed_name, dtype, "failed" if text else "passed", text))
    return results


def run_check(
    method: type[Method] | Preset,
    name: str,
    *,
    seed: int = 0,
    kinds: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    full: bool = False,
) -> list[Result]:
    """One check: on every bed and dtype, or on the first in an order drawn by `seed` that is not skipped."""
    if name not in CHECKS:
        raise unknown("check", name, CHECKS)
    beds, names = _choose(method, kinds, dtypes)
    check = CHECKS[name]
    if full:
        return [run_one(method, check, bed, dtype, seed) for bed in beds for dtype in names]
    results = []
    for bed, dtype in _order(method, check, beds, names, seed):
        result = run_one(method, check, bed, dtype, seed)
        if result.status != "skipped":
            return [result]
        results.append(result)
    return results[:1]


def _order(
    method: type[Method] | Preset, check: Check, beds: list[Bed], names: list[str], seed: int
) -> list[tuple[Bed, str]]:
    """One dtype for each bed, in a drawn order."""
    rng = random.Random(f"{seed} {method.name} {check.name}")
    rng.shuffle(beds)
    allowed = [d for d in names if d in check.dtypes] or names
    return [(bed, rng.choice(allowed)) for bed in sorted(beds, key=lambda bed: bool(bed.later))]


def _choose(
    method: type[Method] | Preset, kinds: Iterable[str] | None, dtypes: Iterable[str] | None
) -> tuple[list[Bed], list[str]]:
    if not (isinstance(method, Preset) or isinstance(method, type) and issubclass(method, Method) and method.name):
        raise ValueError(f"the contract suite checks a named subclass of deltatune.Method, not {method!r}")
    wanted = None if kinds is None else list(kinds)
    for kind in wanted or ():
        if kind not in BEDS and kind not in {bed.kind for bed in BEDS.values()}:
            raise unknown("kind of site", kind, [*BEDS, *(bed.kind for bed in BEDS.values())])
    names = list(DTYPES) if dtypes is None else list(dtypes)
    for name in names:
        if name not in DTYPES:
            raise unknown("dtype", name, DTYPES)
    for check in method.exceptions:
        if check not in (*CHECKS, *PAIR):
            raise unknown(f"check in the exceptions of {method.name}", check, [*CHECKS, *PAIR])
    beds = [b for b in beds_of(method) if wanted is None or b.name in wanted or b.kind in wanted]
    if not beds:
        there = ", ".join(sorted({bed.kind for bed in BEDS.values()}))
        asked = ", ".join(sorted(wanted if wanted is not None else getattr(method, "kinds", ())))
        raise ValueError(f"{method.name} fits no bed of kind {asked}; there are {there}")
    return beds, names


TREE_BEDS = ("attention", "attention-bert", "patches")  # whole models: a tree has places of its own
DEEP_BEDS = ("deep", "deep-bert")  # for a tree that those are too shallow for


def beds_of(method: type[Method] | Preset) -> list[Bed]:
    """The small models that the method, or the tree with a name, can stand on."""
    if isinstance(method, Preset):
        here = [BEDS[name] for name in TREE_BEDS if _takes(BEDS[name], method)]
        return here or [BEDS[name] for name in DEEP_BEDS if _takes(BEDS[name], method)]
    return [bed for bed in BEDS.values() if bed.suits(method)]


def _takes(bed: Bed, tree: Preset) -> bool:
    """Can the tree stand on the bed's model?"""
    try:
        made = {"sources": sources_for(tree.name, bed, torch.float32)} if tree.sources else {}
        attach(bed.model(), tree(**made), head=None)
    except ValueError:
        return False
    return True
