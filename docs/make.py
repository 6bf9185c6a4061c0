"""The table of methods in README.md, and docs/methods.md, from the registry: `make docs` writes, a test compares."""

from pathlib import Path

import deltatune  # noqa: F401  (its import registers the methods)
from deltatune.core.method import METHODS, Method

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
OPEN, CLOSE = "<!-- methods -->", "<!-- /methods -->"


def cards() -> list[type[Method]]:
    """The registered methods of the package itself, by category and name."""
    ours = [card for card in METHODS.values() if card.__module__.startswith("deltatune.")]
    return sorted(ours, key=lambda card: (card.category, card.name))


def equation(card: type[Method]) -> str:
    """The first line of a method's docstring."""
    return (card.__doc__ or "").strip().partition("\n")[0]


def code(text: object) -> str:
    """`text` as code that may stand in a cell of a table."""
    return "`" + str(text).replace("|", "\\|") + "`" if str(text) else ""


def paper(card: type[Method]) -> str:
    """A link to arXiv where the paper has an arXiv id, else its name as it is."""
    is_arxiv = card.paper[:4].isdigit()
    return f"[{card.paper}](https://arxiv.org/abs/{card.paper})" if is_arxiv else card.paper


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row(card: type[Method]) -> list[str]:
    """A method's cells in README.md's table."""
    merges = "yes" if card.mergeable() else ""
    return [code(card.name), card.category, code(card.where), code(card.count()), merges, paper(card)]


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


def section(card: type[Method]) -> str:
    """A method's part of docs/methods.md: equation, facts, hyperparameters, the rest of its docstring."""
    rest = [line.strip() for line in (card.__doc__ or "").strip().split("\n")[1:]]
    notes = "\n".join(rest).strip()
    facts = [
        f"category {card.category}",
        f"where {code(card.where)}",
        f"parameters a site {code(card.count())}",
        "merges" if card.mergeable() else "does not merge",
    ] + [f"paper {paper(card)}"] * bool(card.paper)
    options = [[code(name), code(kind), code(default), what] for name, kind, default, what in card.hyperparameters()]
    parts = [f"## {card.name}\n", f"```\n{equation(card)}\n```\n", " · ".join(facts) + "\n"]
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
