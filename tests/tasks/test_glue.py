"""GLUE from a folder, from a hub that is a small module here, and from the real files where they are at hand."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune.tasks import task
from deltatune.tasks.glue import TABLE

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
SHARED = Path(__file__).parents[3] / "shared" / "data"
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.setenv("DELTATUNE_DATA", str(tmp_path))

    def to(file: str, **columns: list[object]) -> None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)

    return to


def sentences(n: int, start: int = 0) -> list[str]:
    return [f"sentence {i}" for i in range(start, start + n)]


def test_published_validation_becomes_test(write: Write) -> None:
    write("glue_sst2/train.parquet", sentence=sentences(100), label=["0", "1"] * 50)
    write("glue_sst2/validation.parquet", sentence=sentences(7, 200), label=["1", "0", "1", "1", "0", "0", "1"])
    sst2 = task("glue/sst2")
    assert (len(sst2.train), len(sst2.validation)) == (90, 10)
    assert sst2.test.texts[0] == ("sentence 200",)
    assert sst2.test.targets == [1, 0, 1, 1, 0, 0, 1]
    assert sst2.labels == ("negative", "positive")
    assert sst2.metric == "accuracy"
    assert sorted(sst2.validation.targets) == [0] * 5 + [1] * 5
    assert any("published validation split is the test split" in note for note in sst2.notes)


def test_validation_is_at_most_1000_rows(write: Write) -> None:
    write("glue_cola/train.parquet", sentence=sentences(12_000), label=[0, 1, 1] * 4000)
    write("glue_cola/validation.parquet", sentence=sentences(3, 20_000), label=[1, 1, 0])
    cola = task("glue/cola", n_train=30)
    assert len(cola.validation) == 1000
    assert cola.train.targets.count(1) == 20
    assert cola.metric == "matthews"


def test_labelled_test_is_kept_and_unlabelled_is_not(write: Write) -> None:
    for split, n in (("train", 20), ("validation", 4), ("test", 6)):
        one, two = sentences(n), sentences(n, 100)
        write(f"glue_mrpc/{split}.parquet", sentence1=one, sentence2=two, label=[0, 1] * (n // 2))
        unlabelled = [-1] * n if split == "test" else [0, 1] * (n // 2)
        write(f"glue_rte/{split}.parquet", sentence1=one, sentence2=two, label=unlabelled)
    mrpc, rte = task("glue/mrpc"), task("glue/rte")
    assert [len(rows) for rows in mrpc.splits.values()] == [20, 4, 6]
    assert mrpc.train.texts[0] == ("sentence 0", "sentence 100")
    assert mrpc.metric == "f1"
    assert [len(rows) for rows in rte.splits.values()] == [18, 2, 4]
    assert "test.parquet has no labels and is not used" in rte.notes


def test_names_of_labels_and_values(write: Write) -> None:
    write(
        "glue_qnli/train.parquet",
        question=["a", "b"] * 5,
        sentence=sentences(10),
        label=["entailment", "not_entailment"] * 5,
    )
    write("glue_qnli/validation.parquet", question=["a"], sentence=["c"], label=["not_entailment"])
    assert task("glue/qnli").test.targets == [1]
    write(
        "glue_stsb/train.parquet",
        sentence1=sentences(20),
        sentence2=sentences(20),
        label=[str(i / 4) for i in range(20)],
    )
    write("glue_stsb/validation.parquet", sentence1=["a"], sentence2=["b"], label=["5.0"])
    stsb = task("glue/stsb")
    assert (stsb.kind, stsb.labels, stsb.metric, stsb.n_outputs) == ("regression", (), "pearson", 1)
    assert stsb.test.targets == [5.0]


def test_errors(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DELTATUNE_DATA names .*, which has no folder glue_wnli"):
        task("glue/wnli")
    write("glue_sst2/train.parquet", text=sentences(20), label=[0, 1] * 10)
    with pytest.raises(ValueError, match=r"unknown text column 'sentence'.*its columns are 'text', 'label'"):
        task("glue/sst2")
    write("glue_sst2/train.parquet", sentence=sentences(20), label=[0, 1] * 9 + [0, 2])
    with pytest.raises(ValueError, match=r"train.parquet, row 20, column 'label': label '2' is not one of the task"):
        task("glue/sst2")
    (tmp_path / "glue_rte").mkdir()
    with pytest.raises(ValueError, match="folder 'glue_rte' has no train file"):
        task("glue/rte")


class Hub(dict[str, list[object]]):
    """As much of a hub dataset as is read."""

    column_names = property(list)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str) -> dict[str, Hub]:
        asked.append(names)
        n = {"train": 40, "validation_matched": 4, "validation_mismatched": 4, "test_matched": 4}
        return {
            s: Hub(premise=sentences(k), hypothesis=sentences(k, 9), label=[0, 1, 2, 1] * (k // 4))
            for s, k in n.items()
        }

    monkeypatch.delenv("DELTATUNE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    mnli = task("glue/mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert [len(rows) for rows in mnli.splits.values()] == [36, 4, 4]
    assert mnli.source == "hub nyu-mll/glue mnli"


def test_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.delenv("DELTATUNE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"could not be read from the hub \(no route\); set DELTATUNE_DATA"):
        task("glue/mnli")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="through the package 'datasets'; set DELTATUNE_DATA"):
        task("glue/mnli")


def test_table() -> None:
    assert TABLE["wnli"].labels == ("not_entailment", "entailment")
    assert TABLE["rte"].labels == ("entailment", "not_entailment")
    assert {name for name, row in TABLE.items() if len(row.text) == 1} == {"cola", "sst2"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, the real files")
@pytest.mark.parametrize(
    ("name", "n_rows"),
    [
        ("cola", [7696, 855, 1043]),
        ("sst2", [66349, 1000, 872]),
        ("mrpc", [3668, 408, 1725]),
        ("rte", [2241, 249, 277]),
        ("stsb", [5749, 1500, 1379]),
    ],
)
def test_real_files(name: str, n_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_DATA", str(SHARED))
    assert [len(rows) for rows in task(f"glue/{name}").splits.values()] == n_rows
