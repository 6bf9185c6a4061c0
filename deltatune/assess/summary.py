"""What the cells say, and no more: per comparison, one row a method, who is told apart from the best, and a verdict.

A *group* is what may be compared: cells of one backbone, one task, one metric and one budget. A method is told apart
from the best only where all the evidence there is says so: the paired interval over common seeds and the paired
bootstrap over common test rows both leave zero out. Where there is no such evidence the verdict says that there is
none.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal, TypeVar

from deltatune.assess import stats
from deltatune.assess.cells import Budget, Cell, Memory, Predictions, read_predictions
from deltatune.assess.stats import Interval
from deltatune.tasks.metrics import LOWER_IS_BETTER

Standing = Literal["best", "tied", "worse", "unknown"]
NEARLY = 0.95
T = TypeVar("T")


class Strong(str):
    """A part of the verdict to be set in bold."""


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval and where that comes from: `seeds` (Student's t) or `test rows` (bootstrap)."""

    value: float
    interval: Interval | None
    source: Literal["seeds", "test rows"] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3f}"
        if self.source == "seeds":
            return f"{self.value:.3f} ± {self.interval.high - self.value:.3f}"
        return f"{self.value:.3f} ({self.interval.low:.3f} to {self.interval.high:.3f})"


@dataclass(frozen=True)
class Row:
    """One method over its seeds. Costs are means over seeds; counts and memory are those of the first done seed."""

    name: str
    done: tuple[Cell, ...]
    failed: tuple[Cell, ...]
    score: Estimate
    standing: Standing
    gap: str
    """The evidence for the standing, in words."""

    @cached_property
    def first(self) -> Cell:
        return self.done[0]

    @property
    def label(self) -> str:
        return self.first.label

    @property
    def category(self) -> str:
        return self.first.category

    @cached_property
    def n_trainable(self) -> int:
        return _given(self.first.n_trainable)

    @cached_property
    def n_head(self) -> int:
        return _given(self.first.n_head)

    @cached_property
    def n_stored(self) -> int:
        return _given(self.first.n_stored)

    @cached_property
    def share(self) -> float:
        """Trainable parameters without the head, as a share of the backbone's."""
        return self.n_trainable / max(_given(self.first.n_backbone), 1)

    @cached_property
    def file_bytes(self) -> int:
        return _given(self.first.file_bytes)

    @cached_property
    def memory(self) -> Memory:
        """Of the seed with the highest peak."""
        return max((_given(cell.memory) for cell in self.done), key=lambda memory: memory.peak)

    def times(self, of: str) -> list[float]:
        """`Time`'s field `of`, one value a seed."""
        return [float(getattr(_given(cell.time), of)) for cell in self.done]

    def time(self, of: str) -> float:
        return fmean(self.times(of))

    def mean(self, of: Literal["nll", "ece"]) -> float | None:
        values = [value for cell in self.done if (value := getattr(cell, of)) is not None]
        return fmean(values) if values else None

    @cached_property
    def lrs(self) -> list[float]:
        return sorted({_given(cell.lr) for cell in self.done})


@dataclass(frozen=True)
class Group:
    """Cells that may be compared. `rows` come best first; `failures` are all failed cells, of any method."""

    backbone: str
    task: str
    budget: Budget
    metric: str
    lower_is_better: bool
    rows: tuple[Row, ...]
    failures: tuple[Cell, ...]
    warnings: tuple[str, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row.done] + list(self.failures)

    @property
    def seeds(self) -> str:
        """How many seeds finished, in words; a range where methods differ."""
        low, high = (of((len(row.done) for row in self.rows), default=0) for of in (min, max))
        return _count(high, "seed") if low == high else f"{low} to {high} seeds"

    @property
    def title(self) -> str:
        return f"{self.task} · {self.backbone}"

    @property
    def contenders(self) -> list[Row]:
        """The best and all that are not told apart from it."""
        return [row for row in self.rows if row.standing != "worse"]

    @cached_property
    def verdict(self) -> tuple[str, ...]:
        """One sentence, in parts; those of class `Strong` name what it is about."""
        return tuple(_verdict(self))

    @property
    def sentence(self) -> str:
        return "".join(self.verdict)


def groups(cells: Iterable[Cell], folder: str | os.PathLike[str] | None = None) -> list[Group]:
    """The comparisons that the cells allow, by task and backbone; predictions are read from `folder` where given."""
    found: dict[tuple[str, str, Budget], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.key.task, cell.key.backbone, cell.budget), []).append(cell)
    keys = sorted(found, key=lambda key: (key[0], key[1], repr(key[2])))
    return [group for key in keys for group in _by_metric(found[key], folder)]


def _by_metric(cells: list[Cell], folder: str | os.PathLike[str] | None) -> list[Group]:
    """Usually one group; a metric that changed its name under one budget makes another, never a mixed mean."""
    names = sorted({cell.metric.name for cell in cells if cell.metric})
    if len(names) <= 1:
        return [_group(cells, names[0] if names else "score", folder)]
    parts = [[cell for cell in cells if cell.metric and cell.metric.name == name] for name in names]
    parts[0] += [cell for cell in cells if not cell.metric]
    return [_group(part, name, folder) for part, name in zip(parts, names, strict=True)]


def _group(cells: list[Cell], metric: str, folder: str | os.PathLike[str] | None) -> Group:
    lower = metric in LOWER_IS_BETTER
    done: dict[str, list[Cell]] = {}
    failed: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.key.method, cell.key.seed)):
        (done if cell.status == "done" else failed).setdefault(cell.key.method, []).append(cell)
    answers = {
        (name, cell.key.seed): found
        for name, ours in done.items()
        for cell in ours
        if folder is not None and (found := read_predictions(folder, cell)) is not None
    }
    score = stats.SCORES.get(metric)
    estimates = {name: _estimate(name, ours, answers, score) for name, ours in done.items()}
    order = sorted(done, key=lambda name: estimates[name].value * (1 if lower else -1))
    rows = []
    for name in order:
        standing: Standing = "best"
        gap = ""
        if name != order[0]:
            standing, gap = _standing(done[order[0]], done[name], answers, score, lower)
        rows.append(Row(name, tuple(done[name]), tuple(failed.get(name, ())), estimates[name], standing, gap))
    failures = tuple(cell for ours in failed.values() for cell in ours)
    key, budget = cells[0].key, cells[0].budget
    said = (*_warnings(cells, done), *_below_head(rows, answers, score, lower))
    return Group(key.backbone, key.task, budget, metric, lower, tuple(rows), failures, said)


Answers = dict[tuple[str, int], Predictions]


def _below_head(rows: Sequence[Row], answers: Answers, score: stats.Score | None, lower: bool) -> Iterable[str]:
    """Which methods do not beat features that nobody adapted, by how much, and how sure that is."""
    at = next((i for i, row in enumerate(rows) if row.name == "head"), len(rows))
    for row in rows[at + 1 :]:
        head = rows[at]
        by = abs(head.score.value - row.score.value)
        standing, gap = _standing(list(head.done), list(row.done), answers, score, lower)
        sure = {"worse": "beyond noise", "tied": "within noise"}.get(standing, "nobody can say how surely")
        far = (
            f"{by:.3f} below, {sure} ({gap.replace('behind the best', 'behind')})"
            if by >= 0.0005
            else "level with them"
        )
        yield f"{row.label} does not beat the frozen features of {head.label}: it is {far}."


def _estimate(name: str, cells: list[Cell], answers: Answers, score: stats.Score | None) -> Estimate:
    value, interval = stats.mean_interval([_score(cell) for cell in cells])
    if interval is not None:
        return Estimate(value, interval, "seeds")
    found = answers.get((name, cells[0].key.seed))
    if found is None or score is None:
        return Estimate(value, None, None)
    return Estimate(value, stats.score_bootstrap(score, found.targets, found.answers), "test rows")


def _standing(
    best: list[Cell], other: list[Cell], answers: Answers, score: stats.Score | None, lower: bool
) -> tuple[Standing, str]:
    """Whether the best differs from another beyond noise, and the paired intervals that say so."""
    sign = -1.0 if lower else 1.0
    ours, theirs = ({cell.key.seed: cell for cell in cells} for cells in (best, other))
    common = sorted(ours.keys() & theirs.keys())
    found: list[tuple[str, Interval]] = []
    if len(common) > 1:
        interval = stats.mean_interval([sign * (_score(ours[s]) - _score(theirs[s])) for s in common])[1]
        assert interval is not None
        found.append((f"over {len(common)} common seeds", interval))
    pairs = [(answers.get((best[0].key.method, s)), answers.get((other[0].key.method, s))) for s in common]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if score is not None and both and all(p.targets == both[0][0].targets for pair in both for p in pair):
        left, right = [a.answers for a, _ in both], [b.answers for _, b in both]
        low, high = stats.paired_bootstrap(score, both[0][0].targets, left, right)
        interval = Interval(low, high) if sign > 0 else Interval(-high, -low)
        found.append((f"over the {len(both[0][0].targets):,} test rows", interval))
    if not found:
        return "unknown", "no two common seeds and no predictions on common test rows: nothing to tell them apart by"
    words = "; ".join(f"{interval.low:+.3f} to {interval.high:+.3f} {what}" for what, interval in found)
    apart = all(interval.low > 0 for _, interval in found)
    return ("worse" if apart else "tied"), f"behind the best by {words} (95 %)"


def _warnings(cells: list[Cell], done: dict[str, list[Cell]]) -> Iterable[str]:
    """What would make the comparison unfair, said before anybody draws a conclusion."""
    n_tests = len({cell.data.test for cell in cells if cell.data})
    if n_tests > 1:
        yield f"The cells were scored on {n_tests} different test sets: their scores do not compare."
    machines = {cell.machine for cell in cells}
    if len(machines) > 1:
        yield f"The cells ran on {len(machines)} different machines: times and measured memory compare only within one."
    for name in sorted({name for cell in cells for name in cell.versions}):
        values = sorted({cell.versions.get(name, "none") for cell in cells})
        if len(values) > 1:
            yield f"The cells ran on several versions of {name}: {', '.join(values)}."
    if len({cell.memory.measured for cell in cells if cell.memory}) > 1:
        yield "Peak memory was measured for some methods and accounted for others: compare it with care."
    tried = {len(cell.trials) for ours in done.values() for cell in ours if cell.trials}
    if len(tried) > 1:
        yield f"Methods had between {min(tried)} and {max(tried)} learning-rate trials: those with more were favoured."


def _verdict(group: Group) -> Iterable[str]:
    budget, rows = group.budget, group.rows
    if not rows:
        yield f"On {group.task} no method finished: "
        yield Strong(_count(len(group.failures), "cell") + " failed")
        yield "."
        return
    yield f"On {group.task} with {budget.n_train:,} training rows and {group.seeds}, "
    best, others = rows[0], rows[1:]
    yield Strong(best.label)
    if not others:
        yield f" reaches {group.metric} {best.score}; no other method finished, so there is nothing to compare it with"
    else:
        yield f" scores {'lowest, which is best' if group.lower_is_better else 'highest'} ({group.metric} "
        yield Strong(str(best.score))
        yield ")"
        yield from _noise(others)
        yield from _thrift(group, best, others)
    if group.failures:
        yield f"; {_count(len(group.failures), 'cell')} of {len(group.cells)} failed"
    yield "."


def _noise(others: Sequence[Row]) -> Iterable[str]:
    """Which differences the evidence carries."""
    tied = [row.label for row in others if row.standing == "tied"]
    unknown = [row.label for row in others if row.standing == "unknown"]
    if tied:
        few = f"{len(tied)} of the {len(others)} others ({_and(tied[:3])} the nearest)"
        yield from _differences(few if len(tied) > 4 else _and(tied), tied, others, "within noise")
    elif not unknown:
        yield from _differences("", [row.label for row in others], others, "beyond noise")
    if unknown:
        which = "the others" if len(unknown) == len(others) > 1 else _and(unknown)
        yield f"; whether it differs from {which} cannot be said from one seed without predictions"


def _differences(which: str, labels: Sequence[str], others: Sequence[Row], verdict: str) -> Iterable[str]:
    if len(labels) == 1:
        yield f"; its difference to {labels[0]} is {verdict}"
    else:
        yield f"; its differences to {'all other methods' if len(labels) == len(others) else which} are {verdict}"


def _thrift(group: Group, best: Row, others: Sequence[Row]) -> Iterable[str]:
    """The method with the fewest parameters that comes near the best, and how near."""
    smaller = [row for row in others if row.n_trainable < best.n_trainable]
    if not smaller:
        yield "; no other method trains fewer parameters"
        return
    values = [row.score.value for row in (best, *smaller)]
    if min(values) <= 0:
        return

    def kept(row: Row) -> float:
        ratio = row.score.value / best.score.value
        return 1 / ratio if group.lower_is_better else ratio

    near = [row for row in smaller if kept(row) >= NEARLY]
    if not near:
        yield f"; no method with fewer trainable parameters comes within {1 - NEARLY:.0%} of it".replace("%", " %")
        return
    row = min(near, key=lambda row: (row.n_trainable, -kept(row)))
    yield "; "
    yield Strong(row.label)
    reach = f"comes to {row.score}, within {1 / kept(row) - 1:.1%} of it," if group.lower_is_better else ""
    digits = 0 if kept(row) < 0.985 else 1
    yield f" {reach or f'gives {kept(row):.{digits}%} of that score'} ".replace("%", " %")
    if row.n_trainable == 0:
        yield "without training a parameter beside the head"
    else:
        yield f"with {percent(row.n_trainable / best.n_trainable)} of its trainable parameters"


def reason(cell: Cell) -> str:
    """A failed cell's error in one line: the last, which in a traceback is the one that says it."""
    return (cell.error or "").strip().splitlines()[-1]


def percent(share: float) -> str:
    """A share to two significant digits: 0.31 %, 4.2 %, 100 %."""
    value = 100 * share
    if value == 0 or value >= 9.95:
        return f"{value:.0f} %"
    digits = 1 if value >= 0.95 else 2 if value >= 0.095 else 3
    return f"{value:.{digits}f} %" if value >= 0.0005 else "< 0.001 %"


def count(n: float) -> str:
    """A count in three digits: 812, 14.8k, 22.7M, 8.03B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size * 0.9995:
            value = n / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f}{unit}"
    return f"{n:.0f}"


def size(n: float) -> str:
    """Bytes in binary units: 640 B, 58 KiB, 1.2 MiB, 14.9 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1000 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.0f} {unit}" if n >= 99.5 or unit == "B" else f"{n:.1f} {unit}"


def seconds(s: float) -> str:
    """A duration: 420 ms, 8.4 s, 2 min 05 s, 3 h 12 min."""
    if s < 1:
        return f"{1000 * s:.0f} ms"
    if s < 99.5:
        return f"{s:.1f} s"
    minutes, rest = divmod(round(s), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _score(cell: Cell) -> float:
    assert cell.metric is not None
    return cell.metric.test


def _given(value: T | None) -> T:
    assert value is not None, "a done cell has its numbers: Cell.read and Cell.write see to it"
    return value
