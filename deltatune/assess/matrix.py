"""The matrix: every method × seed of one comparison, one cell after the other; an existing cell is a done one.

So it resumes by itself after any kill, and two machines can share a folder. Cells that failed stay as they are unless
`retry` asks for them again.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..core.attach import shaped
from ..core.compose import PRESETS, Tree, storage_of
from ..core.errors import unknown
from ..core.method import METHODS, named
from ..quant.base import chosen_for
from ..tasks import Task
from .cells import Budget, Cell, path_of, write_atomic
from .run import Bench, Candidate

RUN = "run.yaml"


@dataclass(frozen=True)
class Size:
    """A named, versioned budget: what every method of a comparison gets alike."""

    n_steps: int
    batch: int
    lr_trials: int
    head_lr: float | None  # of the task head, equal for all methods; None: the method's own
    n_train: int | None  # None: all rows
    n_validation: int | None
    max_length: int


BUDGETS = {
    "quick-v1": Size(n_steps=24, batch=32, lr_trials=1, head_lr=0.05, n_train=768, n_validation=150, max_length=64),
    "demo-v1": Size(n_steps=100, batch=32, lr_trials=1, head_lr=0.05, n_train=1500, n_validation=200, max_length=64),
    "small-v1": Size(n_steps=300, batch=32, lr_trials=3, head_lr=None, n_train=2000, n_validation=500, max_length=128),
    "full-v1": Size(n_steps=2000, batch=32, lr_trials=3, head_lr=None, n_train=None, n_validation=1000, max_length=256),
}
QUICK = ("head", "lora", "bitfit", "ia3")
DEMO = ("full", "head", "sequential", "prefix_tuning", "prompt_tuning", "ia3", "bitfit", "lora", "mam")
ALL = "all"


Hyper = Mapping[str, Mapping[str, Any]]  # of some methods, by name


def all_methods(shapes: nn.Module, hyper: Hyper | None = None) -> tuple[list[str], list[str]]:
    """Every method and preset that this backbone (on the meta device) can take, baselines first; and why not the others."""
    fit, not_here = [], []
    hyper = hyper or {}
    for name in sorted((*METHODS, *PRESETS), key=lambda n: (named(n).category != "baseline", n)):
        if getattr(named(name), "helper", False):
            continue
        try:
            own = hyper.get(name, {})
            _check_sources(name, own)
            if named(name).category != "baseline" and not own.get("sources"):  # they were saved from a classifier
                tree: Tree = named(name)(**own)  # type: ignore[assignment]
                if storage := storage_of(tree):
                    chosen_for(shapes, storage)
                shaped(shapes, tree).detach()
            fit.append(name)
        except ValueError as error:
            not_here.append(f"{name} is left out: {error}")
    return fit, not_here


def candidates(names: Sequence[str], hyper: Hyper | None = None) -> list[Candidate]:
    """Registered methods and presets, with their defaults where `hyper` says nothing else.

    Raises ValueError with the nearest name, and where a method that is made of saved adapters has no `sources`.
    """
    found = []
    hyper = hyper or {}
    for name in hyper:
        if name not in names:
            raise unknown("method in --hyper; it is not compared", name, names)
    for name in dict.fromkeys(names):
        card = named(name)
        own = hyper.get(name, {})
        _check_sources(name, own)
        tree: Tree = card(**own)  # type: ignore[assignment]
        found.append(Candidate(name, tree, card.category, card.paper, card.lr))
    return found


def _check_sources(name: str, own: Mapping[str, Any]) -> None:
    card = named(name)
    if card.sources and card.needs_sources and not own.get("sources"):
        raise ValueError(
            f"{name} is made of saved adapters, such as {card.sources}'s; give it --hyper.{name} '{{sources: [folder, ...]}}'"
        )


def budget_of(name: str, size: Size, task: Task) -> Budget:
    """What a cell records of its budget."""
    rows = task.splits
    return Budget(
        name, size.n_steps, size.batch, size.lr_trials, len(rows["train"]), len(rows["validation"]), len(rows["test"])
    )


def claim(folder: str | os.PathLike[str], config: Mapping[str, Any], may_grow: Sequence[str] = ()) -> None:
    """Make the folder this run's, or go on with it. Raises ValueError where it belongs to another run.

    Options named in `may_grow` may differ (a comparison takes more methods and seeds), all others may not.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder for results")
    mine = folder / RUN
    if mine.exists():
        theirs = yaml.safe_load(mine.read_text(encoding="utf-8")) or {}
        for key in sorted((config.keys() | theirs.keys()) - set(may_grow)):
            if config.get(key) != theirs.get(key):
                raise ValueError(
                    f"{folder} holds another run: its {key} is {theirs.get(key)!r}, this one's is {config.get(key)!r}; "
                    f"give another --out"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a results folder (it has no {RUN}); give another --out")
    write_atomic(mine, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class Event:
    """What happened in the matrix; the live table is drawn from these."""

    kind: str  # "skip", "start", "progress", "end"
    name: str
    seed: int
    phase: str = ""
    step: int = 0
    n_steps: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0
    cell: Cell | None = None


def run_matrix(
    bench: Bench,
    entries: Sequence[Candidate],
    seeds: Sequence[int],
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tell: Callable[[Event], None],
    retry: bool = False,
) -> Iterator[Cell]:
    """Every cell in turn, measured or read."""
    for seed in seeds:
        for entry in entries:
            path = path_of(folder, bench.backbone, entry.name, bench.task.name, seed)
            if path.exists():
                cell = Cell.read(path)
                if cell.budget != bench.budget:
                    raise ValueError(
                        f"{path} was measured under {cell.budget}, this run is {bench.budget}; give another --out"
                    )
                was, now = ((c.get("hyper") or {}).get(entry.name) for c in (cell.config, config))
                if was != now:
                    raise ValueError(f"{path} was measured with {was}, this run gives {now}; give another --out")
                if cell.status == "done" or not retry:
                    tell(Event("skip", entry.name, seed, cell=cell))
                    yield cell
                    continue
            tell(Event("start", entry.name, seed))

            def report(
                phase: str, step: int, n_steps: int, loss: float | None, rate: float, n: str = entry.name, s: int = seed
            ) -> None:
                tell(Event("progress", n, s, phase, step, n_steps, loss, rate))

            cell = bench.run(entry, seed, folder, report, config)
            tell(Event("end", entry.name, seed, cell=cell))
            yield cell
