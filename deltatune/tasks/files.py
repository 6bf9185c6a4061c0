"""A user's own data: one CSV, TSV, JSONL, JSON or parquet file, or a folder of train / validation / test files.

Whatever does not fit is one ValueError that names the file, the row and the column, before anything is trained. Rows
are counted from 1, a header not counted. What is found or decided without being told goes into the task's `notes`.
"""

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltatune.core.errors import nearest, unknown
from deltatune.tasks.task import Kind, Split, Task, Text, divide

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("query", "document"),
)
TEXTS = ("text", "sentence", "review", "content", "body", "comment", "tweet", "message", "document", "description")
LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "sentiment",
    "stars",
    "rating",
    "score",
    "intent",
    "topic",
    "y",
)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "validation_matched", "valid", "val", "dev"),
    "test": ("test",),
}
SHARD = re.compile(r"-\d+-of-\d+$")
N_VALUES = 10  # a label with fractions and more distinct values than this is a value, not a class
MIN_ROWS = 10  # fewer rows cannot be cut into tenths


@dataclass(frozen=True)
class Table:
    """Named columns of one length, and the name that errors call them by."""

    name: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, what: str) -> list[Any]:
        """The cells of a column. Raises: ValueError with the nearest names and all of them."""
        if name not in self.columns:
            raise ValueError(f"{self.name}: {unknown(f'{what} column', name, self.columns)}; {self.listed}")
        return self.columns[name]

    @property
    def listed(self) -> str:
        """The columns as an error shows them."""
        return f"its columns are {', '.join(map(repr, self.columns))}"


def read(
    path: str | os.PathLike[str],
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    kind: Kind | None = None,
    name: str | None = None,
    split_seed: int = 0,
) -> Task:
    """The task in a file or a folder. `text` is one or two columns (a sequence, or names with a comma between), `label`
    one; those not given are found where a name or the only possibility makes them obvious. A label column of numbers
    with fractions and more than 10 values means regression, any other classification, unless `kind` says so.
    Splits that are missing are made from the training rows, a tenth each, stratified.

    Raises: ValueError, naming file, row and column, for anything that does not fit.
    """
    path = Path(path)
    if not path.exists():
        close = nearest(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"no file or folder {str(path)!r}{hint}")
    tables = read_folder(path) if path.is_dir() else {"train": read_table(path)}
    return build(
        tables,
        name=name or path.stem,
        kind=kind,
        text=_names(text, tables["train"]),
        label=label,
        licence="the user's own",
        source=path.name,
        split_seed=split_seed,
    )


def build(
    tables: dict[str, Table],
    *,
    name: str,
    licence: str,
    source: str,
    kind: Kind | None = None,
    text: tuple[str, ...] | None = None,
    label: str | None = None,
    labels: tuple[str, ...] | None = None,
    metric: str | None = None,
    validation_as_test: bool = False,
    split_seed: int = 0,
) -> Task:
    """A task from one table per split. `labels` fixes the classes in their order (cells may hold a name or its number);
    `validation_as_test` is GLUE's rule for a missing test split, with at most 1,000 rows of train for validation.

    Raises: ValueError as `read`.
    """
    if "train" not in tables:
        raise ValueError(f"task {name!r} has no train split, only {', '.join(tables) or 'nothing'}")
    notes = []
    train = tables["train"]
    if text is None or label is None:
        text, label = _find(train, text, label)
        notes.append(f"columns found: text = {', '.join(text)}; label = {label}")
    if label in text:
        raise ValueError(f"{train.name}: column {label!r} cannot be text and label at once")
    tables = dict(tables)
    if "test" in tables and _unlabelled(tables["test"], label, minus_one=validation_as_test):
        notes.append(f"{tables.pop('test').name} has no labels and is not used")
    if "test" not in tables and "validation" in tables and validation_as_test:
        tables["test"] = tables.pop("validation")
        notes.append("no labelled test split: the published validation split is the test split")

    cells = {split: _label_cells(table, label) for split, table in tables.items()}
    if kind is None:
        kind = _kind(cells["train"])
        notes.append(f"label column {label!r} read as {kind}")
    if kind == "regression":
        labels = ()
        index: Callable[[Any], float] = _value
    else:
        numbers = all(_number(cell) is not None for cell in cells["train"])
        fixed = labels is not None and len(labels) > 0
        labels = labels if labels else _classes(cells["train"], numbers, train, label)
        index = _class_index(labels, numbers, fixed)
    splits = {}
    for split, table in tables.items():
        targets: list[Any] = []
        for i, cell in enumerate(cells[split], 1):
            try:
                targets.append(index(cell))
            except ValueError as error:
                raise ValueError(f"{table.name}, row {i}, column {label!r}: {error}") from None
        splits[split] = Split(_texts(table, text), targets)
    if kind == "regression" and len(set(splits["train"].targets)) == 1:
        raise ValueError(f"{train.name}: column {label!r} has the same value {cells['train'][0]!r} in every row")

    missing = [split for split in ("validation", "test") if split not in splits]
    if missing:
        rows = splits["train"]
        if len(rows) < MIN_ROWS:
            raise ValueError(f"{train.name} has {len(rows)} rows, too few to make {' and '.join(missing)} from")
        tenth = min(len(rows) // 10, 1000) if validation_as_test else len(rows) // 10
        splits["train"], *made = divide(rows, kind, [tenth] * len(missing), split_seed)
        splits |= dict(zip(missing, made, strict=True))
        sizes = " / ".join(f"{split} {len(splits[split])}" for split in ("train", *missing))
        notes.append(f"{' and '.join(missing)} made from the training rows, stratified: {sizes}")
    known = set(splits["train"].texts)
    for split in ("validation", "test"):
        if shared := sum(row in known for row in splits[split].texts):
            notes.append(f"{shared} of {len(splits[split])} {split} texts are in train too")
    return Task(
        name=name,
        version=1,
        kind=kind,
        text=text,
        labels=labels,
        metric=metric or ("accuracy" if labels else "pearson"),
        licence=licence,
        source=source,
        notes=tuple(notes),
        **splits,
    )


def split_name(stem: str) -> str | None:
    """train, validation or test for a file's name without ending (shards `-00000-of-00002` too), else None."""
    stem = SHARD.sub("", stem.lower())
    return next((split for split, stems in SPLITS.items() if stem in stems), None)


def read_folder(folder: Path) -> dict[str, Table]:
    """One table per split that the folder has a file for; shards of one split are joined.

    Raises: ValueError where there is no train file, or two files of different names or kinds for one split.
    """
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = split_name(path.stem)
        if split is not None and path.suffix.lower() in READERS:
            parts.setdefault(split, []).append(path)
    if "train" not in parts:
        has = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise ValueError(f"folder {folder.name!r} has no train file (train{', train'.join(READERS)}); it has {has}")
    tables = {}
    for split, paths in parts.items():
        whole = [SHARD.sub("", path.stem) + path.suffix for path in paths]
        if len(paths) > 1 and (len(set(whole)) > 1 or whole[0] in {path.name for path in paths}):
            listed = ", ".join(path.name for path in paths)
            raise ValueError(f"folder {folder.name!r} has {len(paths)} {split} files: {listed}")
        shards = [read_table(path) for path in paths]
        columns = {c: [cell for shard in shards for cell in shard.column(c, "shard")] for c in shards[0].columns}
        tables[split] = Table(shards[0].name, columns)
    return tables


def read_table(path: Path) -> Table:
    """The columns of one file, by its ending.

    Raises: ValueError for an unknown ending, an empty file, or a row that cannot be read (with its number).
    """
    ending = path.suffix.lower()
    if ending not in READERS:
        raise ValueError(f"{path.name}: {unknown('file ending', ending, READERS)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        raise ValueError(f"{path.name} is empty")
    table = Table(path.name, READERS[ending](path.name, data))
    if not len(table):
        raise ValueError(f"{path.name} has no rows" + (f"; {table.listed}" if table.columns else ""))
    return table


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8") from None


def _csv(name: str, data: bytes) -> dict[str, list[Any]]:
    text = _decode(name, data)
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "," if "," in header else next((d for d in ";\t" if d in header), ",")
    return _delimited(name, text, delimiter, quoted=True)


def _tsv(name: str, data: bytes) -> dict[str, list[Any]]:
    """With quotes as spreadsheets write them, or where that fails as text in which a quote is a plain character."""
    text = _decode(name, data)
    try:
        return _delimited(name, text, "\t", quoted=True)
    except ValueError as error:
        try:
            return _delimited(name, text, "\t", quoted=False)
        except ValueError:
            raise error from None


def _delimited(name: str, text: str, delimiter: str, quoted: bool) -> dict[str, list[Any]]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    longest = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    start = 1
    try:
        for record in records:
            if record and header is None:
                header = [field.strip() for field in record]
                if twice := sorted({field for field in header if header.count(field) > 1}):
                    raise ValueError(f"{name} has the column {twice[0]!r} twice")
            elif header is not None and (record or len(header) == 1):
                if len(record or [""]) != len(header):
                    where = f"{name}, row {len(rows) + 1} (line {start})"
                    raise ValueError(f"{where} has {len(record)} fields where the header has {len(header)}")
                rows.append(record or [""])
            start = records.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}, row {len(rows) + 1} (line {start}) cannot be read: {error}") from None
    finally:
        csv.field_size_limit(longest)
    return {column: [row[i] for row in rows] for i, column in enumerate(header or [])}


def _jsonl(name: str, data: bytes) -> dict[str, list[Any]]:
    records: list[Any] = []
    for number, line in enumerate(_decode(name, data).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name}, row {len(records) + 1} (line {number}) is not JSON: {error}") from None
            records.append(record)
    return _records(name, records)


def _json(name: str, data: bytes) -> dict[str, list[Any]]:
    """A list of objects, or one object of equally long columns."""
    try:
        content = json.loads(_decode(name, data))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}, is not JSON: {error.msg}") from None
    if isinstance(content, list):
        return _records(name, content)
    if not isinstance(content, dict) or not all(isinstance(column, list) for column in content.values()):
        raise ValueError(f"{name} is neither a list of objects nor an object of columns")
    if len({len(column) for column in content.values()}) > 1:
        lengths = ", ".join(f"{column} {len(cells)}" for column, cells in content.items())
        raise ValueError(f"{name} has columns of different lengths: {lengths}")
    return content


def _records(name: str, records: list[Any]) -> dict[str, list[Any]]:
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{name}, row {i} is no JSON object but {json.dumps(record)[:40]}")
    columns = dict.fromkeys(column for record in records for column in record)
    return {column: [record.get(column) for record in records] for column in columns}


def _parquet(name: str, data: bytes) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        return {column: table.column(i).to_pylist() for i, column in enumerate(table.column_names)}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} is no readable parquet file: {error}") from None


READERS: dict[str, Callable[[str, bytes], dict[str, list[Any]]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _names(text: str | Sequence[str] | None, table: Table) -> tuple[str, ...] | None:
    if text is None:
        return None
    if isinstance(text, str):
        text = [text] if text in table.columns else [part.strip() for part in text.split(",")]
    if not 1 <= len(text) <= 2 or len(set(text)) != len(text):
        raise ValueError(f"text is one column or two different ones, not {', '.join(text) or 'none'}")
    return tuple(text)


def _find(table: Table, text: tuple[str, ...] | None, label: str | None) -> tuple[tuple[str, ...], str]:
    """The columns not given: by their usual names first, else the only one that is left."""
    for column in text or ():
        table.column(column, "text")
    if label is not None:
        table.column(label, "label")
    folded = {column.casefold().strip(): column for column in reversed(table.columns)}
    if label is None:
        free = [column for column in table.columns if column not in (text or ())]
        usual = [folded[n] for n in LABELS if folded.get(n) in free]
        if not usual and (len(free) > 1 or text is None) or not free:
            raise ValueError(f"{table.name} has no label column that is known by its name; name it; {table.listed}")
        label = (usual or free)[0]
    if text is None:
        words = [c for c, cells in table.columns.items() if c != label and any(isinstance(x, str) for x in cells)]
        pairs = [(folded[a], folded[b]) for a, b in PAIRS if {folded.get(a), folded.get(b)} <= set(words)]
        singles = [(folded[n],) for n in TEXTS if folded.get(n) in words]
        if not (pairs or singles) and len(words) != 1:
            raise ValueError(f"{table.name} has no text column that is known by its name; name it; {table.listed}")
        text = (*pairs, *singles, tuple(words))[0]
    return text, label


def _texts(table: Table, names: tuple[str, ...]) -> list[Text]:
    """The rows' texts. Raises: ValueError for a column without text and for rows with nothing in any column."""
    columns = []
    for name in names:
        cells = table.column(name, "text")
        strings = ["" if cell is None or cell != cell else str(cell) for cell in cells]
        if not any(string.strip() for string in strings):
            raise ValueError(f"{table.name}: text column {name!r} is empty in all {len(cells)} rows")
        if not any(isinstance(cell, str) for cell in cells):
            raise ValueError(f"{table.name}: text column {name!r} holds no text but {next(filter(None, cells))!r}")
        columns.append(strings)
    rows = list(zip(*columns, strict=True))
    empty = [i for i, row in enumerate(rows, 1) if not any(cell.strip() for cell in row)]
    if empty:
        more = f" (and {len(empty) - 1} more rows)" if len(empty) > 1 else ""
        raise ValueError(f"{table.name}, row {empty[0]}{more}: no text in {' and '.join(map(repr, names))}")
    return rows


def _label_cells(table: Table, label: str) -> list[Any]:
    cells = table.column(label, "label")
    empty = [i for i, cell in enumerate(cells, 1) if _missing(cell)]
    if empty:
        more = f" (and {len(empty) - 1} more rows)" if len(empty) > 1 else ""
        raise ValueError(f"{table.name}, row {empty[0]}{more}: no label in column {label!r}")
    return cells


def _missing(cell: Any) -> bool:
    return cell is None or (cell != cell) is True or (isinstance(cell, str) and cell.strip().lower() in ("", "nan"))


def _unlabelled(table: Table, label: str, minus_one: bool) -> bool:
    cells = table.columns.get(label, [])
    return all(_missing(cell) or (minus_one and _number(cell) == -1) for cell in cells)


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _kind(cells: Iterable[Any]) -> Kind:
    values = {_number(cell) for cell in cells}
    fractions = any(value is not None and value % 1 for value in values)
    return "regression" if None not in values and fractions and len(values) > N_VALUES else "classification"


def _value(cell: Any) -> float:
    value = _number(cell)
    if value is None or not math.isfinite(value):
        raise ValueError(f"{cell!r} is no number, and this is a regression")
    return value


def _class(cell: Any, numbers: bool) -> str:
    """The class a cell names; where all cells of train are numbers 1, 1.0 and "1" name the same."""
    value = _number(cell) if numbers else None
    if value is not None:
        return str(int(value)) if math.isfinite(value) and value % 1 == 0 else str(value)
    return json.dumps(cell) if isinstance(cell, bool) else str(cell).strip()


def _classes(cells: list[Any], numbers: bool, table: Table, label: str) -> tuple[str, ...]:
    names = {_class(cell, numbers) for cell in cells}
    if len(names) == 1:
        raise ValueError(f"{table.name}: column {label!r} has one class only, {names.pop()!r}, in every row")
    if len(names) > max(2, len(cells) // 2):
        hint = "for a regression say kind='regression'" if numbers else "is it the label?"
        raise ValueError(f"{table.name}: column {label!r} has {len(names)} classes in {len(cells)} rows; {hint}")
    return tuple(sorted(names, key=float if numbers else None))


def _class_index(labels: tuple[str, ...], numbers: bool, fixed: bool) -> Callable[[Any], int]:
    places = {name: i for i, name in enumerate(labels)}
    if fixed:
        places |= {str(i): i for i in range(len(labels))}

    def index(cell: Any) -> int:
        name = _class(cell, numbers)
        if name not in places:
            close = nearest(name, labels)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(labels[:20])}"
            raise ValueError(f"label {name!r} is {'not one of the task' if fixed else 'never seen in train'}; {hint}")
        return places[name]

    return index
