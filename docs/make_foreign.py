"""docs/foreign_hands.md from the table that tests/foreign holds true: run this file to write it, a test compares."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS, PAGE = ROOT / "tests" / "foreign", ROOT / "docs" / "foreign_hands.md"
HEAD = """# Foreign hands

What other libraries do to a model with an adapter on it, for a handful of methods, one of each word of the contract.
Each cell is a test in `tests/foreign/`, on tiny random backbones. **exact**: nothing is lost, and the row's sentence
holds. *refused*: an error with the message below. *documented*: what the note says. Nothing is silent.

Made from the tests' own table by `python docs/make_foreign.py`; edit those.
"""


def page() -> str:
    """The page as a string."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    foreign = importlib.import_module("foreign")
    for file in sorted(TESTS.glob("test_foreign_*.py")):
        importlib.import_module(file.stem)
    notes: list[str] = []

    def noted(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#notes)"

    def cell(outcome: object) -> str:
        if isinstance(outcome, foreign.Refused):
            return f"*refused* {noted(f'`{outcome.error.__name__}`: … {outcome.message} …')}"
        assert isinstance(outcome, foreign.Documented)
        return f"*documented* {noted(outcome.what)}" if outcome.what else "exact"

    names, words = list(foreign.COLUMNS), [word for word, _ in foreign.COLUMNS.values()]
    parts = [HEAD]
    for group in sorted({r.group: None for r in foreign.ROWS.values()}):
        head = ["", *(f"`{name}`<br>{word}" for name, word in zip(names, words, strict=True))]
        lines = [head, ["---"] * len(head)]
        for r in foreign.ROWS.values():
            if r.group == group:
                lines.append([r.what, *(cell(r.outcome(name)) for name in names)])
        parts += [f"## {group}\n", "".join(f"| {' | '.join(line)} |\n" for line in lines)]
    listed = "".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1))
    return "\n".join([*parts, "## Notes\n", listed])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
