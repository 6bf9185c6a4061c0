"""The suite's results for a terminal, as a rich table, and as plain lines for everything else."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .checks import Result

if TYPE_CHECKING:
    from rich.table import Table

_STYLE = {"passed": "green", "failed": "bold red", "exempt": "yellow", "skipped": "dim"}


def counts(results: Sequence[Result]) -> str:
    """`27 passed, 2 skipped`"""
    n: Counter[str] = Counter(r.status for r in results)
    return ", ".join(f"{n[status]} {status}" for status in _STYLE if n[status]) or "no check"


def text(results: Sequence[Result]) -> str:
    """One line a result, then the counts."""
    rows = [(r.check, r.kind, r.dtype, r.status) for r in results]
    wide = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, wide, strict=True)), r.detail]).rstrip()
        for row, r in zip(rows, results, strict=True)
    ]
    return "\n".join([*lines, counts(results)])


def table(results: Sequence[Result], title: str | None = None) -> "Table":
    """One row a result, the counts below; for a rich console."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, caption=counts(results))
    for name in ("check", "kind", "dtype", "status", "detail"):
        shown.add_column(name, overflow="fold")
    for r in results:
        shown.add_row(
            *(Text(cell) for cell in (r.check, r.kind, r.dtype)), Text(r.status, style=_STYLE[r.status]), Text(r.detail)
        )
    return shown
