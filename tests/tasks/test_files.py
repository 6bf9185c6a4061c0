"""A user's own file: what is found by itself, and one clear error for each thing that does not fit."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from deltatune.tasks import Task, task
from deltatune.tasks.files import read, read_table


def records(n: int = 20, labels: Sequence[object] = ("bad", "good"), start: int = 0) -> list[dict[str, object]]:
    return [{"text": f"row number {i}", "label": labels[i % len(labels)]} for i in range(start, start + n)]


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def raw(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def same_in_every_format(folder: Path) -> list[Path]:
    rows = records()
    lines = [(str(row["text"]), str(row["label"])) for row in rows]
    return [
        jsonl(folder / "a.jsonl", rows),
        raw(folder / "a.json", json.dumps(rows)),
        raw(folder / "b.json", json.dumps({name: [row[name] for row in rows] for name in ("text", "label")})),
        raw(folder / "a.csv", "text,label\n" + "".join(f"{t},{y}\n" for t, y in lines)),
        raw(folder / "b.csv", "\ufefftext;label\r\n" + "".join(f'"{t}";{y}\r\n' for t, y in lines)),
        raw(folder / "a.tsv", "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in lines)),
    ]


def test_formats_agree(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = same_in_every_format(tmp_path)
    pq.write_table(pa.Table.from_pylist(records()), tmp_path / "a.parquet")
    made = [read(path) for path in [*paths, tmp_path / "a.parquet"]]
    assert len({rows.hash for one in made for rows in [one.train]}) == 1
    one = made[0]
    assert (one.labels, one.kind, one.metric, one.text) == (("bad", "good"), "classification", "accuracy", ("text",))
    assert [len(rows) for rows in one.splits.values()] == [16, 2, 2]
    assert one.train.targets.count(0) == 8
    assert one.notes == (
        "columns found: text = text; label = label",
        "label column 'label' read as classification",
        "validation and test made from the training rows, stratified: train 16 / validation 2 / test 2",
    )


def test_quotes_newlines_and_bom(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.csv", '\ufeff"text",label\r\n"two\r\nlines, ""quoted""",x\r\n\r\nplain,y\r\n')
    assert read_table(path).columns == {"text": ['two\r\nlines, "quoted"', "plain"], "label": ["x", "y"]}
    path = raw(tmp_path / "a.tsv", 'text\tlabel\n"Stop" he said\tx\nthe 5" disk\ty\n')
    assert read_table(path).columns["text"] == ['"Stop" he said', 'the 5" disk']
    path = raw(tmp_path / "b.csv", "text,label\n" + "long " * 50_000 + ",x\n")
    assert len(read_table(path).columns["text"][0]) == 250_000
    path = raw(tmp_path / "c.jsonl", '{"text": "a\u2028b", "label": 1}\r\n\r\n{"text": "c", "label": 2}')
    assert read_table(path).columns == {"text": ["a\u2028b", "c"], "label": [1, 2]}


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        (("id", "Review", "Stars"), ("Review",), "Stars"),
        (("premise", "hypothesis", "label"), ("premise", "hypothesis"), "label"),
        (("sentence1", "sentence2", "target"), ("sentence1", "sentence2"), "target"),
        (("what", "label"), ("what",), "label"),
        (("title", "text", "class", "score"), ("text",), "class"),
    ],
)
def test_columns_are_found(tmp_path: Path, columns: tuple[str, ...], text: tuple[str, ...], label: str) -> None:
    rows = [{c: i if c == "id" else i % 2 if c == label else f"{c} {i}" for c in columns} for i in range(20)]
    made = read(jsonl(tmp_path / "a.jsonl", rows))
    assert made.text == text
    assert made.notes[0] == f"columns found: text = {', '.join(text)}; label = {label}"


def test_columns_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"a": f"x {i}", "b": f"y {i}", "c, d": i % 3} for i in range(30)])
    assert read(path, text="a,b", label="c, d").train.texts[0][0].startswith("x")
    assert read(path, text=["b"], label="c, d").text == ("b",)
    assert task("mine", data=path, text="b", label="c, d", n_train=6).name == "mine"
    assert len(task(data=path, text="b", label="c, d", n_train=6).train) == 6


def test_numbers(tmp_path: Path) -> None:
    def of(labels: Sequence[object], **options: object) -> Task:
        return read(jsonl(tmp_path / "a.jsonl", records(60, labels)), **options)  # type: ignore[arg-type]

    assert of([10, 9, 1]).labels == ("1", "9", "10")
    assert of(["1.0", "5.0"]).labels == ("1", "5")
    assert of([True, False]).labels == ("false", "true")
    assert of([0.5, 1, 1.5]).labels == ("0.5", "1", "1.5")
    values = of([i / 4 for i in range(20)])
    assert (values.kind, values.labels, values.metric) == ("regression", (), "pearson")
    assert of([1, 2, 3], kind="regression").kind == "regression"
    assert of([str(i / 4) for i in range(20)], kind="classification").n_outputs == 20


def test_folder(tmp_path: Path) -> None:
    jsonl(tmp_path / "d" / "train-00000-of-00002.jsonl", records(10))
    jsonl(tmp_path / "d" / "train-00001-of-00002.jsonl", records(10, start=10))
    jsonl(tmp_path / "d" / "dev.jsonl", records(4, start=30))
    jsonl(tmp_path / "d" / "test.jsonl", records(6, start=18))
    raw(tmp_path / "d" / "README.md", "not data")
    made = read(tmp_path / "d")
    assert [len(rows) for rows in made.splits.values()] == [20, 4, 6]
    assert made.notes[-1] == "2 of 6 test texts are in train too"
    jsonl(tmp_path / "d" / "test.jsonl", [{"text": "no label"}] * 6)
    made = read(tmp_path / "d")
    assert [len(rows) for rows in made.splits.values()] == [18, 4, 2]
    assert "test.jsonl has no labels and is not used" in made.notes
    jsonl(tmp_path / "d" / "train.jsonl", records(10))
    with pytest.raises(ValueError, match="folder 'd' has 3 train files"):
        read(tmp_path / "d")


def test_splits_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    forth = read(jsonl(tmp_path / "a.jsonl", records(50)))
    back = read(jsonl(tmp_path / "b.jsonl", records(50)[::-1]))
    assert forth.test == back.test
    assert read(tmp_path / "a.jsonl", split_seed=1).test != forth.test
    assert task(data=tmp_path / "a.jsonl", n_train=10, seed=3).test == forth.test


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "\ufeff\n", "a.csv is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows; its columns are 'text', 'label'"),
        ("a.jsonl", "\n", "a.jsonl is empty"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.txt", "text", "a.txt: unknown file ending '.txt'"),
        ("a.csv", "text,label\na,1\nb\n", r"a.csv, row 2 \(line 3\) has 1 fields where the header has 2"),
        ("a.csv", 'text,label\na,1\n"b,2\nc,3\n', r"a.csv, row 2 \(line 3\) cannot be read: unexpected end"),
        ("a.csv", "text,label,text\na,1,b\n", "a.csv has the column 'text' twice"),
        ("a.csv", b"text,label\na,1\nb\xff,2\n", "a.csv, line 3: byte 0xff is not UTF-8"),
        ("a.tsv", "text\tlabel\na\n", "has 1 fields where the header has 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', r"a.jsonl, row 2 \(line 3\) is not JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', "a.jsonl, row 2 is no JSON object"),
        ("a.json", '{"text": ["a"], "label": []}', "columns of different lengths: text 1, label 0"),
        ("a.json", '"text"', "neither a list of objects nor an object of columns"),
        ("a.json", "[\n{]", "a.json, line 2, is not JSON"),
        ("a.parquet", "PAR?", "a.parquet is no readable parquet file"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=says):
        read(raw(tmp_path / name, content))


def edited(row: int, **cells: object) -> list[dict[str, object]]:
    rows = records()
    rows[row] |= cells
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (
            records(),
            {"label": "lable"},
            "unknown label column 'lable'; did you mean 'label'.*columns are 'text', 'label'",
        ),
        (records(), {"text": "txet"}, "unknown text column 'txet'; did you mean 'text'"),
        (records(), {"text": "text", "label": "label2"}, "unknown label column 'label2'; did you mean 'label'"),
        (records(), {"text": "label", "label": "label"}, "cannot be text and label at once"),
        (records(), {"text": "a,b,c"}, "text is one column or two different ones, not a, b, c"),
        ([{"text": "a", "u": 1, "v": 2}] * 20, {}, "no label column that is known by its name.*'text', 'u', 'v'"),
        ([{"u": "a", "v": "b", "label": 2}] * 20, {}, "no text column that is known by its name.*'u', 'v', 'label'"),
        (edited(6, label=None), {}, "a.jsonl, row 7: no label in column 'label'"),
        (edited(6, label=" "), {}, "a.jsonl, row 7: no label"),
        (edited(6, label=float("nan")), {}, "a.jsonl, row 7: no label"),
        (edited(6, text=""), {}, "a.jsonl, row 7: no text in 'text'"),
        ([row | {"text": " "} for row in records()], {}, "text column 'text' is empty in all 20 rows"),
        ([row | {"text": 7} for row in records()], {"text": "text", "label": "label"}, "holds no text but 7"),
        (records(labels=["one"]), {}, "column 'label' has one class only, 'one', in every row"),
        (records(labels=list(range(20))), {}, "20 classes in 20 rows; for a regression say kind='regression'"),
        (records(labels=[f"c{i}" for i in range(20)]), {}, "20 classes in 20 rows; is it the label?"),
        (records(), {"kind": "regression"}, "row 1, column 'label': 'bad' is no number"),
        (edited(3, label=float("inf")), {"kind": "regression"}, "row 1, column 'label': 'bad' is no number"),
        (records(labels=[1.5]), {"kind": "regression"}, "same value 1.5 in every row"),
        (records(9), {}, "a.jsonl has 9 rows, too few to make validation and test from"),
    ],
)
def test_does_not_fit(tmp_path: Path, rows: list[object], options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read(jsonl(tmp_path / "a.jsonl", rows), **options)  # type: ignore[arg-type]


def test_label_never_seen_in_train(tmp_path: Path) -> None:
    jsonl(tmp_path / "d" / "train.jsonl", records(20))
    jsonl(tmp_path / "d" / "validation.jsonl", [*records(3), {"text": "x", "label": "goood"}])
    says = "validation.jsonl, row 4, column 'label': label 'goood' is never seen in train; did you mean 'good'"
    with pytest.raises(ValueError, match=says):
        read(tmp_path / "d")
    jsonl(tmp_path / "d" / "validation.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"validation.jsonl: unknown label column 'label'"):
        read(tmp_path / "d")


def test_no_such_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", records())
    with pytest.raises(ValueError, match=r"no file or folder '.*review.jsonl'; did you mean 'reviews.jsonl'"):
        read(tmp_path / "review.jsonl")
    with pytest.raises(ValueError, match="no file or folder 'nowhere"):
        read("nowhere/at/all.csv")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match=r"folder 'd' has no train file .*it has nothing"):
        read(tmp_path / "d")
