"""Sources: saved adapters that another one is made of. They are read and checked at attach; nothing of their folders is kept."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import files


@dataclass(frozen=True)
class Saved:
    """One saved adapter of this backbone."""

    folder: str
    card: Mapping[str, Any]  # `adapter.json`
    tensors: Mapping[str, Tensor]

    @property
    def tree(self) -> Mapping[str, Any]:
        """Its tree, as plain data."""
        tree: Mapping[str, Any] = self.card["tree"]
        return tree


def folders_of(name: str, sources: Any) -> tuple[str, ...]:
    """Folders as a user gives them. Raises ValueError where there is none, or where it is no list of folders."""
    if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, Sequence):
        raise ValueError(f"sources of {name} must be a list of folders of saved adapters, not {sources!r}")
    if not sources:
        raise ValueError(f"{name} is made of saved adapters, and sources is empty")
    return tuple(os.fspath(s) for s in sources)


def read(model: nn.Module, folders: Sequence[str], method: str = "") -> list[Saved]:
    """The adapters in `folders`. Raises ValueError where one was made for another backbone, or by another method than `method`."""
    from .identity import check_base

    found = []
    for folder in folders:
        card, tensors = files.read_adapter(folder)
        check_base(model, folder, card, tensors)
        got = card["tree"].get("method", card["tree"].get("op"))
        if method and got != method:
            raise ValueError(f"{folder} holds {got!r}, and what is asked for is made of {method!r}")
        found.append(Saved(folder, card, tensors))
    return found


def from_sources(
    start: Callable[[Any, str, list[Saved]], None],
    name: str,
    method: str,
    folders: Sequence[str],
    adapter: Any,
    path: str,
) -> None:
    """A leaf's `start` that reads `folders` first."""
    start(adapter, path, read(adapter.model, folders, method))
