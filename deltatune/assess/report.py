"""The report is a pure function of a results folder: the same cells give the same bytes of HTML, Markdown and CSV.

`report` writes three files beside the cells: `report.html` for people, `report.md` for a repository, `report.csv` with
one line per cell for whatever comes next. `table` is the same comparison for the terminal.
"""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from deltatune.assess.cells import Cell, read_folder, write_atomic
from deltatune.assess.page import page
from deltatune.assess.summary import Group, Row, Strong, count, groups, percent, reason, seconds, size


def report(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes `report.html`, `report.md` and `report.csv` to `out`, by default the folder itself; the page's path.

    Raises: ValueError for a folder without cells, and whatever `read_folder` and `read_predictions` refuse.
    """
    cells = read_folder(folder)
    if not cells:
        raise ValueError(f"{folder}: no cells (*.cell.json) to report on")
    found, out = groups(cells, folder), Path(folder if out is None else out)
    write_atomic(out / "report.csv", to_csv(cells))
    write_atomic(out / "report.md", to_markdown(found))
    return write_atomic(out / "report.html", page(found))


def table(cells: Iterable[Cell], folder: str | os.PathLike[str] | None = None) -> Table:
    """The comparison for the terminal: one line a method, failures in red. `folder` adds what predictions can tell.

    Several comparisons become one table with a section each.
    """
    found = groups(cells, folder)
    caption = Text("\n").join(Text().join(_styled(part) for part in group.verdict) for group in found)
    out = Table(caption=caption, caption_justify="left", title=found[0].title if len(found) == 1 else None)
    out.add_column("method", min_width=13)
    for name in ("score", "trainable", "peak", "train", "lr"):  # what 80 columns hold; the page has the rest
        out.add_column(name, justify="right", no_wrap=name != "score", min_width=9 if name == "score" else None)
    for group in found:
        out.add_section()
        if len(found) > 1:
            out.add_row(Text(group.title, style="bold"), Text(group.metric, style="dim"))
        for row in group.rows:
            style = {"best": "bold green", "tied": "green"}.get(row.standing, "")
            cost = [seconds(row.time("train_s"))]
            counts = [count(row.n_trainable), size(row.memory.peak)]
            out.add_row(Text(row.label), Text(str(row.score), style=style), *counts, *cost, _lrs(row))
        for cell in group.failures:
            out.add_row(Text(f"{cell.label}, seed {cell.key.seed}", style="red"), Text(reason(cell), style="red"))
    return out


def _styled(part: str) -> Text:
    return Text(part, style="bold" if isinstance(part, Strong) else "")


def to_markdown(found: Sequence[Group]) -> str:
    """Verdict, table and failures of each comparison."""
    out = ["# deltatune report"]
    for group in found:
        verdict = "".join(f"**{_md(part)}**" if isinstance(part, Strong) else _md(part) for part in group.verdict)
        budget = group.budget
        out += [f"## {_md(group.title)}", verdict]
        steps = f"{budget.n_steps:,} steps of {budget.batch}, {budget.lr_trials} learning rates"
        out.append(f"Budget {_md(budget.name)}: {steps}.")
        out += [_md(note) for note in group.warnings]
        lines = [
            f"| method | category | {_md(group.metric)} | | trainable | share | peak memory | step | training | file "
            "| NLL | ECE | lr |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in group.rows:
            cells = [row.label, row.category, str(row.score), {"worse": ""}.get(row.standing, row.standing)]
            cells += [f"{row.n_trainable:,}", percent(row.share), size(row.memory.peak)]
            cells += [f"{row.time('step_ms'):.1f} ms", seconds(row.time("train_s")), size(row.file_bytes)]
            cells += ["–" if v is None else f"{v:.3f}" for v in (row.mean("nll"), row.mean("ece"))] + [_lrs(row)]
            lines.append(f"| {' | '.join(_md(cell) for cell in cells)} |")
        out.append("\n".join(lines))
        if group.failures:
            failed = (f"- {_md(cell.label)}, seed {cell.key.seed}: {_md(reason(cell))}" for cell in group.failures)
            out += ["### Failures", "\n".join(failed)]
    return "\n\n".join(out) + "\n"


def _md(text: str) -> str:
    """Text that Markdown and the HTML inside it leave alone."""
    for mark in "\\`*_[]|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split(" ")).replace("\n", " ")


def to_csv(cells: Sequence[Cell]) -> str:
    """One line per cell, failed ones too; a number that a cell does not have is empty."""
    groups_of = ("key", "budget", "metric", "memory", "time", "data", "machine")
    plain = ("status", "error", "label", "category", "paper", "n_trainable", "n_head", "n_stored", "n_backbone")
    more = ("file_bytes", "nll", "ece", "lr", "started")
    heads = {
        "key": ("backbone", "method", "task", "seed"),
        "budget": ("name", "n_steps", "batch", "lr_trials", "n_train", "n_validation", "n_test"),
        "metric": ("name", "test", "validation"),
        "memory": ("peak", "measured", "weights", "activations", "gradients", "optimizer", "method"),
        "time": ("train_s", "step_ms", "tokens_per_s", "eval_s", "total_s"),
        "data": ("train", "validation", "test"),
        "machine": ("cpu", "device", "cores"),
    }
    columns = [(group, name) for group in groups_of for name in heads[group]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([f"{group}.{name}" if group != "key" else name for group, name in columns] + [*plain, *more])
    for cell in cells:
        nested = [getattr(getattr(cell, group), name, None) for group, name in columns]
        writer.writerow(nested + [getattr(cell, name) for name in (*plain, *more)])
    return out.getvalue()


def _lrs(row: Row) -> str:
    return ", ".join(f"{lr:g}" for lr in row.lrs)
