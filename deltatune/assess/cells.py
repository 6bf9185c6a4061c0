"""A cell is one (backbone, method, task, seed), measured once and kept as one JSON file: where the file is, it is done.

The file is the only truth: the runner resumes by it, the report reads nothing else. So reading is strict (a missing,
unknown or mistyped field is a `ValueError` that names file and field) and writing is atomic (a reader on another
machine never sees half a cell).
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, cast, get_args, get_origin, get_type_hints

from deltatune.core import files
from deltatune.core.errors import unknown

FORMAT = 1
SUFFIX = ".cell.json"


@dataclass(frozen=True)
class Key:
    """What a cell is the measurement of. Equal keys, equal place on disk."""

    backbone: str
    method: str
    task: str
    seed: int


@dataclass(frozen=True)
class Budget:
    """What every method of a comparison was given alike: optimiser steps, rows a step, learning rates tried, rows."""

    name: str
    n_steps: int
    batch: int
    lr_trials: int
    n_train: int
    n_validation: int
    n_test: int


@dataclass(frozen=True)
class Machine:
    """Where it ran: times and measured memory compare only between equal machines."""

    cpu: str
    device: str
    cores: int


@dataclass(frozen=True)
class Data:
    """SHA-256 of each split as the method saw it."""

    train: str
    validation: str
    test: str


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training and what they were: `measured` on the device, or `accounted` tensor by tensor."""

    peak: int
    measured: Literal["cuda", "accounted"]
    weights: int
    activations: int
    gradients: int
    optimizer: int
    method: int


@dataclass(frozen=True)
class Time:
    """Seconds, except `step_ms`, the median milliseconds of one optimiser step."""

    train_s: float
    step_ms: float
    tokens_per_s: float
    eval_s: float
    total_s: float


@dataclass(frozen=True)
class Metric:
    """The ranking score, on the test rows and on the validation rows that chose the learning rate."""

    name: str
    test: float
    validation: float


@dataclass(frozen=True)
class Trial:
    """One learning rate tried; `validation` is None where the run diverged."""

    lr: float
    validation: float | None


@dataclass(frozen=True)
class Cell:
    """One measurement. A done cell has every number; a failed one has its error and the numbers it got to.

    `n_trainable` is the method's own count, without the head (`n_head`); `n_stored` is what the adapter's file holds.
    `curve` is (step, training loss), the loss None where it was not finite; `reliability` is (mean confidence,
    accuracy, rows) per bin; `predictions` is the name of a file beside the cell (see `read_predictions`).
    """

    status: Literal["done", "failed"]
    error: str | None
    key: Key
    label: str
    category: str
    paper: str
    budget: Budget
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Machine
    data: Data | None
    n_trainable: int | None
    n_head: int | None
    n_stored: int | None
    n_backbone: int | None
    memory: Memory | None
    time: Time | None
    file_bytes: int | None
    metric: Metric | None
    nll: float | None
    ece: float | None
    lr: float | None
    trials: tuple[Trial, ...]
    curve: tuple[tuple[int, float | None], ...]
    reliability: tuple[tuple[float, float, int], ...]
    predictions: str | None
    started: str
    format: int = FORMAT

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The cell in `path`. Raises: ValueError naming the file and the field that is not of format 1."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from None
        if isinstance(raw, dict) and raw.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{path}: format: {raw['format']!r} is not {FORMAT}, the one that this version reads")
        cell = _decode(cls, raw, str(path), "")
        _check(cell, str(path))
        return cell  # type: ignore[no-any-return]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the cell, one field a line, whole or not at all. Raises: ValueError as `read` would of the result."""
        path = Path(path)
        plain = asdict(self)
        _check(_decode(type(self), json.loads(json.dumps(plain)), str(path), ""), str(path))
        plain = {"format": plain.pop("format"), **plain}
        lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in plain.items()]
        return write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def path_of(folder: str | os.PathLike[str], backbone: str, method: str, task: str, seed: int) -> Path:
    """Where the cell of this key lies in a results folder; distinct keys have distinct paths on every file system."""
    return Path(folder) / _slug(backbone) / _slug(task) / f"{_slug(method)}-seed{seed}{SUFFIX}"


def read_folder(folder: str | os.PathLike[str]) -> list[Cell]:
    """Every cell of a results folder, in the order of their paths.

    Raises: ValueError for a folder that does not exist, a file that is no cell, or a cell that does not lie where
    `path_of` says: the runner would measure it again, and its predictions would not be found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such results folder")
    cells = []
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        cell = Cell.read(path)
        place = path_of(folder, **asdict(cell.key))
        if path != place:
            raise ValueError(f"{path}: key: it is {cell.key}, whose place is {place}")
        cells.append(cell)
    return cells


@dataclass(frozen=True)
class Predictions:
    """What a method answered on each test row, in the test split's order."""

    targets: Sequence[Any]
    answers: Sequence[Any]


def read_predictions(folder: str | os.PathLike[str], cell: Cell) -> Predictions | None:
    """The cell's predictions, JSON lines or one JSON list of `{"target", "prediction"}`; None where it kept none.

    Raises: ValueError naming the file where the cell names one that is missing or has another shape.
    """
    if cell.predictions is None:
        return None
    path = path_of(folder, **asdict(cell.key)).parent / cell.predictions
    if Path(cell.predictions).name != cell.predictions:
        raise ValueError(f"{path}: predictions: {cell.predictions!r} is not the name of a file beside the cell")
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        return Predictions([row["target"] for row in rows], [row["prediction"] for row in rows])
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, and the cell of {cell.key} names it as its predictions") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: rows must be objects with 'target' and 'prediction' ({error!r})") from None


def write_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text that is seen whole or not at all, in a folder that is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, text.encode())
    return path


def _slug(name: str) -> str:
    """A name as a file name: itself where it is one already, else its letters and six digits of its hash."""
    clean = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-")[:60]
    return clean if clean == name else f"{clean or 'x'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


NEEDED = ("n_trainable", "n_head", "n_stored", "n_backbone", "memory", "time", "file_bytes", "metric", "lr", "data")


def _check(cell: Cell, file: str) -> None:
    """What a type cannot say: a done cell has its numbers and no error, a failed one has an error."""
    if cell.status == "failed" and not (cell.error or "").strip():
        raise ValueError(f"{file}: error: a failed cell says why")
    if cell.status == "done":
        if cell.error is not None:
            raise ValueError(f"{file}: error: a done cell has none, this has {cell.error!r}")
        for name in NEEDED:
            if getattr(cell, name) is None:
                raise ValueError(f"{file}: {name}: null in a done cell")


def _decode(kind: Any, value: Any, file: str, where: str) -> Any:
    """`value`, as JSON has it, as the type `kind`; `where` is the dotted field for the error."""

    def wrong(expected: str) -> ValueError:
        return ValueError(f"{file}: {where or 'the file'}: {expected} expected, found {value!r:.80}")

    def at(name: object) -> str:
        return f"{where}.{name}" if where else str(name)

    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:
        if value is None and NoneType in args:
            return None
        (kind,) = (arg for arg in args if arg is not NoneType)
        return _decode(kind, value, file, where)
    if origin is Literal:
        if value not in args:
            raise wrong(" or ".join(map(repr, args)))
        return value
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong("an object")
        types = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        for name in value:
            if name not in names:
                raise ValueError(f"{file}: {at(name)}: {unknown('field', name, names)}")
        for name in names:
            if name not in value:
                raise ValueError(f"{file}: {at(name)}: missing")
        return cast(Any, kind)(**{name: _decode(types[name], value[name], file, at(name)) for name in names})
    if origin is Mapping:
        if not isinstance(value, dict):
            raise wrong("an object")
        return {name: _decode(args[1], item, file, at(name)) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong("a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise wrong(f"a list of {len(args)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_decode(kind, item, file, f"{where}[{i}]") for i, (kind, item) in pairs)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong("a finite number")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise wrong({int: "a whole number", str: "a string"}[kind])
    return value
