"""benchmarks/memory.py's estimate is what autograd keeps; a benchmark that was cut off goes on; pages show what was measured."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402
import memory  # noqa: E402


def options(out: Path) -> bench.Options:
    return bench.Options("cpu", "tiny", None, out)


@pytest.mark.parametrize("method", memory.METHODS)
def test_the_estimate_is_what_is_kept(method: str) -> None:
    model = memory.base("tiny", "cpu", memory.FORMAT if method == "qlora" else None)
    for rows, checkpoints in ((1, False), (4, True), (4, False)):
        found = memory.measured(model, method, checkpoints, bench.batch("tiny", "cpu")[:rows])
        said = memory.estimate(bench.SHAPES["tiny"].config, rows, 32, checkpoints, method)
        for part in ("weights", "gradients", "optimiser", "method state"):
            assert said[part] == pytest.approx(found[part], rel=1e-3), part
        assert said["saved"] == pytest.approx(found["activations"], rel=0.02)
    assert not any(p.requires_grad for p in model.parameters())


def test_moments_of_the_estimate() -> None:
    shape = bench.SHAPES["7b"].config
    for method in memory.METHODS:
        for checkpoints in (True, False):
            said = memory.estimate(shape, 4, 512, checkpoints, method)
            assert said["accumulating"] >= said["peak"]  # gradients that stand make no peak lower
            assert said["activations"] >= 0
    kept = [memory.estimate(shape, 4, 512, c, "lora")["activations"] for c in (True, False)]
    assert kept[0] < kept[1] / 5


def test_what_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench.BENCHMARKS["memory"](options(tmp_path))
    assert len(rows) == 12 and not list(tmp_path.glob("memory-cpu-tiny.json"))
    part = tmp_path / "memory-cpu-tiny.part.json"
    card = json.loads(part.read_text())
    card["rows"] = card["rows"][:11]  # the last one is of QLoRA
    part.write_text(json.dumps(card))
    built: list[Any] = []
    base = memory.base
    monkeypatch.setattr(memory, "base", lambda *a: built.append(a) or base(*a))
    again = bench.BENCHMARKS["memory"](options(tmp_path))
    assert built == [("tiny", "cpu", memory.FORMAT)]
    assert [{k: r[k] for k in ("rows", "checkpoints", "method")} for r in again] == [
        {k: r[k] for k in ("rows", "checkpoints", "method")} for r in rows
    ]
    assert bench.begun("memory", bench.Options("cpu", "tiny", 3, tmp_path)) == []  # another command
    bench.write("memory", options(tmp_path), again)
    assert not part.exists() and bench.begun("memory", options(tmp_path)) == []


def test_a_cell_that_does_not_fit_is_the_estimate_s(tmp_path: Path) -> None:
    row = memory.row(options(tmp_path), {"rows": 4, "checkpoints": False, "method": "full"}, None)
    assert row["by"] == "estimate" and row["peak"] == row["estimated peak"] and row["peak's error"] == 0


def test_qlora_runs_and_is_held_against_hf_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    qlora = importlib.import_module("qlora")
    rows = qlora.qlora(bench.Options("cpu", "tiny", 1, tmp_path, profile=True))
    assert [row["variant"] for row in rows] == ["floor", "ours", "HF PEFT"] * 2
    assert "MatMul4Bit" in (tmp_path / "qlora-cpu-tiny.profile.txt").read_text()
    attach = dt.attach
    monkeypatch.setattr(dt, "attach", lambda *a, alpha, **more: attach(*a, alpha=alpha + 1, **more))
    with pytest.raises(bench.Red, match="logits"):
        qlora.check(options(tmp_path), torch.float32, 1e-4, 1e-4)


@pytest.mark.parametrize("name", ["memory", "qlora"])
def test_page_is_current(name: str) -> None:
    run = importlib.import_module("run")
    page, made = run.PAGES[name]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    shown = text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]
    assert shown == made(run.RESULTS), "run `python benchmarks/run.py --write`"
