"""Errors are the product: one `ValueError` that says what is wrong, where, and the nearest names that would be right."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` names of `known` that look most like `name`, best first."""
    return get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.5)


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a `name` that is no `kind`: it offers the nearest names, or all of them where few."""
    known = list(dict.fromkeys(known))
    close = nearest(name, known)
    if close:
        hint = f"did you mean {' or '.join(map(repr, close))}?"
    elif known and len(known) <= 30:
        hint = f"known: {', '.join(sorted(known))}"
    else:
        hint = f"{len(known)} are known" if known else "none is known here"
    return ValueError(f"unknown {kind} {name!r}; {hint}")
