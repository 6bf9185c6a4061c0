"""The same training as HF PEFT's: from one start, data and optimiser the loss curves agree."""

import json
import runpy
from pathlib import Path

import pytest

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_lora_curve.py"))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ours() -> list[float]:
    model = MAKE["llama"]()
    adapter = dt.attach(model, "lora", where="q,v", r=MAKE["R"], alpha=MAKE["ALPHA"])
    losses: list[float] = MAKE["curve"](model, MAKE["start"](adapter.parameters()))
    return losses


def furthest(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves of one length."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_it_learns(ours: list[float]) -> None:
    assert len(ours) == 50
    assert sum(ours[-4:]) < 0.9 * sum(ours[:4]), "a curve that stays flat would compare nothing"


def test_as_written_down(ours: list[float]) -> None:
    golden = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
    assert furthest(ours, golden["loss"]) <= TOLERANCE, golden["versions"]


def test_beside_the_installed_peft(ours: list[float]) -> None:
    pytest.importorskip("peft", reason="peft is not installed; the golden curve stands in for it")
    assert furthest(ours, MAKE["peft_curve"]()) <= TOLERANCE
