"""The comparison while it runs: a table that fills, with progress, tokens per second and the time that is left."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from .matrix import Event
from .run import Candidate
from .summary import count, seconds, size


class Live:
    """A live table on a terminal; one line a finished cell where the output is no terminal."""

    def __init__(self, console: Console, title: str, entries: Sequence[Candidate], seeds: Sequence[int]) -> None:
        self.console, self.title = console, title
        self.rows = {(e.name, s): Event("wait", e.name, s) for s in seeds for e in entries}
        self.many = len(seeds) > 1
        self.begun = time.perf_counter()
        self.durations: list[float] = []
        self.started = 0.0
        self.live = RichLive(self, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> "Live":
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.__exit__(kind, error, trace)

    def tell(self, event: Event) -> None:
        """Take an event of the matrix."""
        key = (event.name, event.seed)
        if event.kind == "start":
            self.started = time.perf_counter()
        if event.kind == "end":
            self.durations.append(time.perf_counter() - self.started)
        self.rows[key] = event
        if self.live is None and event.kind in ("skip", "end") and event.cell is not None:
            done = sum(e.cell is not None for e in self.rows.values())
            self.console.print(
                f"[{done}/{len(self.rows)}] {self._name(key)}: {self._state(event)}{self._left()}", highlight=False
            )

    def _name(self, key: tuple[str, int]) -> str:
        return f"{key[0]} (seed {key[1]})" if self.many else key[0]

    def _left(self) -> str:
        waiting = sum(e.kind in ("wait", "start", "progress") for e in self.rows.values())
        if not waiting or not self.durations:
            return ""
        each = sum(self.durations) / len(self.durations)
        running = (
            time.perf_counter() - self.started
            if any(e.kind in ("start", "progress") for e in self.rows.values())
            else 0.0
        )
        return f"  (about {seconds(max(0.0, each * waiting - running))} left)"

    def _state(self, event: Event) -> str:
        cell = event.cell
        if cell is None:
            if event.kind == "progress" and event.phase == "train" and event.n_steps:
                loss = "" if event.loss is None else f", loss {event.loss:.3f}"
                return f"step {event.step}/{event.n_steps}{loss}, {event.tokens_per_s:,.0f} tokens/s"
            return {"wait": "", "start": "loading"}.get(event.kind, event.phase)
        if cell.status == "failed":
            return f"failed: {cell.error}"
        assert cell.metric and cell.time and cell.memory
        again = "" if event.kind == "end" else " (done before)"
        return f"{cell.metric.name} {cell.metric.test:.3f} in {seconds(cell.time.total_s)}{again}"

    def __rich__(self) -> Table:
        spent = seconds(time.perf_counter() - self.begun)
        table = Table(title=self.title, caption=f"{spent} so far{self._left()}", caption_justify="left")
        for name, side in (
            ("method", "left"),
            ("score", "right"),
            ("trainable", "right"),
            ("peak", "right"),
            ("state", "left"),
        ):
            table.add_column(name, justify=side, min_width=34 if name == "state" else None)  # type: ignore[arg-type]
        for key, event in self.rows.items():
            cell = event.cell
            done = cell is not None and cell.status == "done"
            style = (
                "red" if cell and not done else "" if done else "bold" if event.kind in ("start", "progress") else "dim"
            )
            numbers = ["", "", ""]
            if cell is not None and done and cell.metric and cell.memory and cell.n_trainable is not None:
                numbers = [f"{cell.metric.test:.3f}", count(cell.n_trainable), size(cell.memory.peak)]
            table.add_row(Text(self._name(key)), *numbers, Text(self._state(event)), style=style)
        return table
