"""README.md and docs/methods.md say what the registry says."""

import runpy
from pathlib import Path

MAKE = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "make.py"))


def test_readme_is_current() -> None:
    assert MAKE["README"].read_text(encoding="utf-8") == MAKE["readme"](), "run `make docs`"


def test_page_is_current() -> None:
    assert MAKE["PAGE"].read_text(encoding="utf-8") == MAKE["page"](), "run `make docs`"


def test_every_method_has_its_row() -> None:
    rows = MAKE["methods_table"]().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [card.name for card in MAKE["cards"]()]
    assert rows, "the registry is empty"
