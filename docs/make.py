"""The table of methods in README.md, and docs/methods.md, from the registry: `make docs` writes, a test compares."""

from pathlib import Path

import deltatune  # noqa: F401  (its import registers the methods)
from deltatune.core.compose import PRESETS, Preset
from deltatune.core.method import METHODS, Method

Card = type[Method] | Preset

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
OPEN, CLOSE = "<!-- methods -->", "<!-- /methods -->"


def cards() -> list[Card]:
    """The registered methods and presets of the package itself, by category and name."""
    ours: list[Card] = [card for card in METHODS.values() if card.__module__.startswith("deltatune.")]
    ours += [card for card in PRESETS.values() if card.make.__module__.startswith("deltatune.")]
    return sorted(ours, key=lambda card: (card.category, card.name))


def code(text: object, bar: str = "\\|") -> str:
    """`text` as code that may stand in a cell of a table, or with `bar="|"` elsewhere."""
    return "`" + str(text).replace("|", bar) + "`" if str(text) else ""


def paper(card: Card) -> str:
    """A link to arXiv where the paper has an arXiv id, else its name as it is."""
    is_arxiv = card.paper[:4].isdigit()
    return f"[{card.paper}](https://arxiv.org/abs/{card.paper})" if is_arxiv else card.paper


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def count(card: Card) -> str:
    """The formula of what one site trains, and whether something is shared beside it."""
    shared = isinstance(card, type) and any(s.shared and s.train for s in card.slots_of(card.configure()).values())
    return code(card.count()) + " and what sites share" * shared


def row(card: Card) -> list[str]:
    """A method's cells in README.md's table."""
    merges = "yes" if card.mergeable() else ""
    return [code(card.name), card.category, code(card.where), count(card), merges, paper(card)]


def methods_table() -> str:
    """One row per method: what README.md shows."""
    head = ["method", "category", "where by default", "parameters a site", "merges", "paper"]
    return table(head, [row(card) for card in cards()])


def readme() -> str:
    """README.md with the table between its markers made new. Raises ValueError where a marker is missing."""
    text = README.read_text(encoding="utf-8")
    before, opened, rest = text.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not (opened and closed):
        raise ValueError(f"README.md needs the markers {OPEN} and {CLOSE}, in this order")
    return f"{before}{OPEN}\n{methods_table()}{CLOSE}{after}"


def section(card: Card) -> str:
    """A method's part of docs/methods.md: equation, facts, hyperparameters, the rest of its docstring."""
    text = (card.make if isinstance(card, Preset) else card).__doc__ or ""
    rest = [line.strip() for line in text.strip().split("\n")[1:]]
    notes = "\n".join(rest).strip()
    facts = [
        f"category {card.category}",
        f"where {code(card.where, '|')}",
        f"parameters a site {count(card)}",
        "merges" if card.mergeable() else "does not merge",
    ] + [f"paper {paper(card)}"] * bool(card.paper)
    options = [[code(name), code(kind), code(default), what] for name, kind, default, what in card.hyperparameters()]
    parts = [f"## {card.name}\n", f"```\n{card.about()}\n```\n", " · ".join(facts) + "\n"]
    if notes:
        parts.append(notes + "\n")
    if options:
        parts.append(table(["hyperparameter", "type", "default", "what"], options))
    return "\n".join(parts)


def page() -> str:
    """docs/methods.md as a string."""
    head = "# Methods\n\nMade by `make docs` from the declarations in `deltatune/methods/`; edit those.\n"
    return "\n".join([head, *map(section, cards())])


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
