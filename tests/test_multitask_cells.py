"""benchmarks/multitask.py: what is made of what, what its tables say of its cells, metrics that a bootstrap can ask often."""

import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cells  # noqa: E402
import multitask as mt  # noqa: E402

from deltatune.tasks.metrics import METRICS  # noqa: E402

N = 40
CLASSES = ("cola", "mrpc", "rte", "sst2")
METRIC = {"cola": "matthews", "mrpc": "f1", "rte": "accuracy", "sst2": "accuracy", "stsb": "pearson"}


def job(regime: str, method: str, task: str, seed: int, out: Path) -> mt.Job:
    return mt.Job(regime, method, task, seed, mt.TRY, "", str(out), str(out / "adapters"), "cpu", 1, "a command")


def targets_of(name: str) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng(len(name))
    return draw.integers(0, 2, N) if name in CLASSES else draw.uniform(0, 5, N).round(2)


def cell(out: Path, regime: str, method: str, task: str, seed: int, right: float, **more: Any) -> None:
    """A cell as a run writes it, whose first answers are right, as many as `right` says."""
    one = job(regime, method, task, seed, out)
    scores, answers, kept = {}, {}, {}
    for name in one.tasks:
        t, metric, n = targets_of(name), METRIC[name], round(right * N) - seed
        a = np.concatenate([t[:n], 1 - t[n:]])
        scores[f"glue/{name}"] = {metric: METRICS[metric](t, a)}
        answers[f"glue/{name}"] = mt.short(a.tolist())
        kept[f"glue/{name}"] = {"hash": name, "metric": metric, "targets": mt.short(t.tolist())}
    mt.remember(one, kept)
    found = {"n_trainable": 1000, "lr": 1e-3, "step_ms": 9.6, "scores": scores, "answers": answers}
    mt.record(one, found | more)


def test_metrics_are_the_librarys() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        t, a = draw.integers(0, 2, 30), draw.integers(0, 2, 30)
        for name in ("accuracy", "f1", "matthews"):
            assert mt.FAST[name](t, a) == pytest.approx(METRICS[name](t, a), abs=1e-12)
        x, y = draw.normal(size=30), draw.normal(size=30)
        assert mt.FAST["pearson"](x, y) == pytest.approx(METRICS["pearson"](x, y), abs=1e-12)
    same = np.zeros(5, int)
    assert [mt.FAST[name](same, same) for name in ("f1", "matthews", "pearson")] == [0, 0, 0]


def test_answers_are_short() -> None:
    assert mt.short([1, 0, 1]) == "101" and mt.long("101").tolist() == [1, 0, 1]
    assert mt.short([1.23456, 0.5]) == [1.235, 0.5] and mt.long([1.235, 0.5]).tolist() == [1.235, 0.5]


def test_the_tables(tmp_path: Path) -> None:
    for seed in (0, 1):
        for task in mt.TASKS:
            cell(tmp_path, "single", "lora", task, seed, 0.7)
        cell(tmp_path, "joint", "lora", "all", seed, 0.95)
        cell(tmp_path, "held_out", "head", "rte", seed, 0.6)
    mt.record(job("joint", "moelora", "all", 0, tmp_path), {"status": "failed", "error": f"in {tmp_path}/adapters: no"})
    text = mt.tables(tmp_path)
    scores, apart, held = (part.split("\n\n")[1] for part in text.split("### ")[1:])
    single, joint = (line.split(" | ") for line in scores.splitlines()[2:])
    assert single[:2] == ["| `lora`", "single"] and joint[:2] == ["| `lora`", "joint"]
    rte = [METRICS["accuracy"](targets_of("rte"), targets_of("rte")) * (0.7 - seed / N) for seed in (0, 1)]
    assert single[4] == f"{100 * np.mean(rte):.1f}"
    assert (single[8], joint[8]) == ("5,000", "1,000"), "an adapter a task, and one for all"
    line = apart.splitlines()[2].split(" | ")
    assert len(apart.splitlines()) == 3 and line[0] == "| `lora`"
    low, high = (float(x) for x in line[4].partition("(")[2].rstrip(")").split(" to "))
    assert line[4].startswith("+25.0 (") and 0 < low < 25 < high  # the same rows are right in both, and a quarter more
    assert line[7].startswith("+") and " to " in line[8]
    assert held.splitlines()[2].split(" | ")[4] in ("58.7", "58.8")
    assert "- `moelora` (joint, all, seed 0) failed: in SOURCES: no" in text
    with pytest.raises(ValueError, match="has no cells"):
        mt.tables(tmp_path / "empty")


def test_a_cell_is_of_its_size(tmp_path: Path) -> None:
    one = job("joint", "lora", "all", 0, tmp_path)
    assert mt.kept(one) is None
    cell(tmp_path, "joint", "lora", "all", 0, 0.9)
    assert mt.kept(one)["key"] == {"backbone": "minilm", "regime": "joint", "method": "lora", "task": "all", "seed": 0}  # type: ignore[index]
    with pytest.raises(ValueError, match="give another --out"):
        mt.kept(replace(one, size=mt.Size()))
    with pytest.raises(ValueError, match="other test rows of glue/rte"):
        mt.remember(one, {"glue/rte": {"hash": "other"}})


def test_what_is_made_of_what(tmp_path: Path) -> None:
    given = argparse.Namespace(
        tried=True, steps=None, batch=None, trials=None, temperature=None, seeds=1, regimes="held_out", methods="lora_hub",
        tasks="rte", device="cpu", workers=1, threads=1, shared="", out=tmp_path, adapters=tmp_path / "a", retry=False,
    )  # fmt: skip
    quiet = Console(file=io.StringIO())
    *parts, last = mt.jobs_of(given, quiet)
    assert [part.key for part in parts] == [("single", "lora", name, 0) for name in mt.TASKS if name != "rte"]
    assert last.key == ("held_out", "lora_hub", "rte", 0) and last.made_of() == parts
    parts[0].folder.mkdir(parents=True)
    (parts[0].folder / "adapter.json").write_text("{}")
    assert parts[0] not in mt.jobs_of(given, quiet) and len(mt.jobs_of(given, quiet)) == 4
    cell(tmp_path, "held_out", "lora_hub", "rte", 0, 0.5)
    assert mt.jobs_of(given, quiet) == []
    fusion = replace(last, regime="fusion", method="mera")
    assert [part.key[1:3] for part in fusion.made_of()] == [("sequential", name) for name in mt.TASKS]
    assert replace(last, regime="joint", method="lora", task="all").made_of() == []
    given.regimes = "jiont"
    with pytest.raises(ValueError, match="did you mean 'joint'"):
        mt.jobs_of(given, quiet)


@pytest.mark.skipif(not mt.RESULTS.is_dir(), reason="nothing was measured yet")
def test_page_is_current() -> None:
    shown = mt.PAGE.read_text(encoding="utf-8").partition(cells.OPEN)[2].partition(cells.CLOSE)[0]
    assert shown == f"\n{mt.tables(mt.RESULTS)}", "run `python benchmarks/multitask.py --write`"


def test_a_page_without_markers(tmp_path: Path) -> None:
    cell(tmp_path, "joint", "lora", "all", 0, 0.9)
    page = tmp_path / "page.md"
    page.write_text(f"a\n{cells.OPEN}\nold\n{cells.CLOSE}\nb\n", encoding="utf-8")
    mt.write_page(page, tmp_path)
    assert page.read_text(encoding="utf-8") == f"a\n{cells.OPEN}\n{mt.tables(tmp_path)}{cells.CLOSE}\nb\n"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="needs the markers"):
        mt.write_page(page, tmp_path)
    assert json.loads((tmp_path / "targets" / "rte.json").read_text(encoding="utf-8"))["metric"] == "accuracy"
