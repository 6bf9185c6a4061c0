"""Sources: saved adapters that another one is made of. They are read and checked at attach; nothing of their folders is kept."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .ragged import ragged_in, refill
from .sharded import assign


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


def saved(folder: str | os.PathLike[str], frozen: bool = False) -> Any:
    """The tree of a saved adapter as a part of another, with its values: `dt.Route(dt.saved("a"), dt.saved("b"))`.

    With `frozen` its tensors are not trained. Its task head is left: a tree has one of its own. Raises ValueError where the
    file is damaged, or holds the base's own.
    """
    from .compose import tree_from_dict
    from .method import METHODS

    card, _ = files.read_adapter(folder)
    tree = tree_from_dict(card["tree"], METHODS)
    if card["in_place"]:
        raise ValueError(f"{folder} holds the base's own {card['in_place'][0]}; it cannot be a part of another tree")
    place = os.fspath(folder)
    return tree.replaced(
        {path: replace(leaf, frozen=frozen, start=partial(_filled, place, path)) for path, leaf in tree.leaves()}
    )


def _filled(folder: str, own: str, adapter: Any, path: str) -> None:
    """Give the leaf `path` the values that the leaf `own` has in the file."""
    from .identity import check_layers

    (found,) = read(adapter.model, [folder])
    drawn = [d for (p, _), d in adapter.deltas.items() if p == path and d.draws_from_seed]
    if drawn and adapter.bank.seed != found.card["seed"]:
        raise ValueError(
            f"{folder}: {drawn[0].name} has tensors that were drawn from the seed {found.card['seed']}, this adapter's is "
            f"{adapter.bank.seed}"
        )
    want = targets_of(adapter, path, own)
    theirs = {key: t for key, t in found.tensors.items() if key.startswith(f"{own}.") or key in want}
    deltas = {f"{own}.{site}": delta for (leaf, site), delta in adapter.deltas.items() if leaf == path}
    ragged = ragged_in(folder, theirs, deltas)
    files.check_keys(
        folder, {key: tuple((theirs[key] if key in ragged else t).shape) for key, t in want.items()}, theirs
    )
    check_layers(adapter.model, folder, deltas, theirs)
    with torch.no_grad():
        for key, target in want.items():
            if key in ragged:
                refill(*ragged[key], theirs[key])
            else:
                assign(target, theirs[key])


def targets_of(adapter: Any, path: str, own: str) -> dict[str, Tensor]:
    """The tensors of the leaf at `path`, by their keys in a file where that leaf is at `own`."""
    found: dict[str, Tensor] = {}
    held = {} if adapter.bank is None else adapter.bank.state_dict(keep_vars=True)
    for (leaf, site), delta in adapter.deltas.items():
        if leaf != path:
            continue
        found |= {f"{own}.{site}.{name}": t for name, t in delta.state_dict(keep_vars=True).items()}
        twin = copy.copy(delta)
        twin.path = own
        for key, slot in delta.slots_of(delta.config).items():
            if slot.shared and delta.__dict__["_bank"][1].get(key) in held:
                t = delta.bank_parameter(key)
                found[f"bank.{twin.bank_key(key, slot, tuple(t.shape))}"] = t
    return found


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
    """A leaf's `start` that reads `folders` first. Raises ValueError where its `n_sources` is not their number."""
    n = getattr(dict(adapter.tree.leaves())[path].config, "n_sources", len(folders))
    if n != len(folders):
        raise ValueError(f"{name}: n_sources = {n}, but {len(folders)} sources are given")
    start(adapter, path, read(adapter.model, folders, method))
