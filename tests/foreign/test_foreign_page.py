"""docs/foreign_hands.md says what the table says."""

import runpy
from pathlib import Path

from foreign import COLUMNS

from deltatune.core.method import METHODS, Delta

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_foreign.py"))


def test_page_is_current() -> None:
    assert MAKE["PAGE"].read_text(encoding="utf-8") == MAKE["page"](), "run `python docs/make_foreign.py`"


def test_columns_use_every_word() -> None:
    words = {
        w
        for w in ("fold", "pre", "post", "kv", "tokens", "linear")
        for c in COLUMNS
        if getattr(METHODS[c], w) is not getattr(Delta, w)
    }
    assert words == {"fold", "pre", "post", "kv", "tokens", "linear"}
    assert any(METHODS[c].in_place for c in COLUMNS)
