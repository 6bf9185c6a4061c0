"""docs/silence.md says what results/silence.json says, and both libraries still do what stands there."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
silence = importlib.import_module("silence")

CARD = json.loads(silence.RESULTS.read_text(encoding="utf-8"))
AGAIN = "run `python benchmarks/silence.py --write`"


def test_page_is_made_from_the_results() -> None:
    assert silence.PAGE.read_text(encoding="utf-8") == silence.page(CARD), AGAIN


def test_results_hold_every_case() -> None:
    told = {row["case"]: (row["wish"], row["threads"]) for row in CARD["rows"]}
    assert told == {name: (case.wish, list(case.threads)) for name, case in silence.CASES.items()}, AGAIN


@pytest.mark.skipif(not peft.__version__.startswith("0.21."), reason=f"the page is about peft 0.21: {peft.__version__}")
@pytest.mark.parametrize("row", CARD["rows"], ids=lambda row: row["case"])
def test_both_libraries_still_do_it(row: dict[str, Any]) -> None:
    found = silence.outcome(row["case"])
    for side in ("HF PEFT", "deltatune"):
        if row[side]["kind"] != "not compared":
            assert (found[side]["kind"], found[side]["met"]) == (row[side]["kind"], row[side]["met"]), (
                f"{side}: {found[side]}; {AGAIN}"
            )
