"""What is to stand at each site, as a tree of methods and the tensors of a file."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.compose import Leaf, Per, Stack, Tree
from ..core.method import Method
from ..core.site import Site, all_sites, select
from ..methods.lora import LoRA


class Put(NamedTuple):
    """What is to stand at a site."""

    method: type[Method]
    hyper: tuple[tuple[str, Any], ...]
    tensors: dict[str, Tensor]


def beside_codes(low: Put, deltas: Iterable[Any]) -> Put:
    """A LoRA as the method of `deltas` that chose the codes of the layer that it stands at, with what its file knows of them."""
    of = next((d for d in deltas if d.rebases), None)
    if of is None:
        return low
    own = {k: v for k, v in asdict(of.config).items() if k not in {f.name for f in fields(LoRA.Config)}}
    kept = {key: getattr(of, key) for key, slot in of.slots_of(of.config).items() if not slot.train}
    return Put(type(of), (*low.hyper, *own.items()), low.tensors | kept)


class Result(NamedTuple):
    """A tree, its tensors by their keys in a file, and by site the norms of what it leaves out and of what was wanted."""

    tree: Tree
    tensors: dict[str, Tensor]
    left_out: dict[str, tuple[float, float]]


def assembled(
    model: nn.Module, trees: Sequence[Tree], made: Mapping[str, Mapping[str, Put]]
) -> tuple[Tree, dict[str, Tensor]]:
    """The first tree, each leaf replaced by what is to stand at its sites: {path: {site: Put}}."""
    table, places = all_sites(model), [dict(tree.leaves()) for tree in trees]
    tensors: dict[str, Tensor] = {}

    def put(path: str, is_root: bool) -> Tree:
        groups: dict[tuple[type[Method], tuple[tuple[str, Any], ...]], dict[str, dict[str, Tensor]]] = {}
        for site, one in made[path].items():
            groups.setdefault((one.method, one.hyper), {})[site] = one.tensors
        leaves: list[Leaf] = []
        for k, ((method, hyper), sites) in enumerate(groups.items()):
            at = path if len(groups) == 1 else str(k) if is_root else f"{path}.{k}"
            tensors.update({f"{at}.{site}.{key}": t for site, own in sites.items() for key, t in own.items()})
            where, layers = _place(table, [p[path] for p in places], method, list(sites))
            leaves.append(method(**dict(hyper), where=where, layers=layers))  # type: ignore[arg-type]
        return leaves[0] if len(leaves) == 1 else Stack(*leaves)

    def walked(tree: Tree, path: str) -> Tree:
        if isinstance(tree, Leaf):
            return put(path or "0", not path)
        return type(tree)(*(walked(c, f"{path}.{i}" if path else str(i)) for i, c in enumerate(tree.children)))

    return walked(trees[0], ""), tensors


def _place(table: Sequence[Site], leaves: Sequence[Leaf], method: type[Method], names: list[str]) -> tuple[Any, Any]:
    """The sources' own place in words, where they have one and it means these sites; else the sites by name."""
    places = {leaf.where or leaf.method.where for leaf in leaves}, {leaf.layers for leaf in leaves}
    if all(len(p) == 1 for p in places):
        where, layers = places[0].pop(), places[1].pop()
        with contextlib.suppress(ValueError):
            if not isinstance(where, Per) and [s.name for s in select(table, where, layers, method.kinds)] == names:
                return where, layers
    return names, None
