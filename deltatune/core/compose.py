"""A tree of methods. Leaves that meet at one site obey their node; leaves at different sites stand side by side.

    Stack(a, b)     b around a: W' = fold_b(fold_a(W))
    Sum(a, b)       y' = y + (a(y) - y) + (b(y) - y):  W' = W + (fold_a(W) - W) + (fold_b(W) - W)
    Average(a, b)   y' = (a(y) + b(y)) / 2

The same tree is an expression in Python (`dt.Sum(dt.LoRA(r=8), dt.IA3())`), a mapping in YAML and in `adapter.json`.
A leaf is known by its path: "0" for a lone leaf, "1.0" for the first child of the second child.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import unknown

if TYPE_CHECKING:
    from .method import Delta, Method

Where = str | tuple[str, ...] | None
Layers = int | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Leaf:
    """One method with its hyperparameters and its place."""

    method: "type[Method]"
    config: Any
    where: Where = None
    layers: Layers = None

    def leaves(self, path: str = "0") -> Iterator[tuple[str, "Leaf"]]:
        """(path, leaf) of every leaf, in order."""
        yield path, self

    def to_dict(self) -> dict[str, Any]:
        """The leaf as plain data."""
        where = list(self.where) if isinstance(self.where, tuple) else self.where
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return {"method": self.method.name, "config": asdict(self.config), "where": where, "layers": layers}


class Node:
    """A node with children; its class is the rule that children meeting at one site obey."""

    op: ClassVar[str] = ""

    def __init__(self, *children: "Leaf | Node") -> None:
        if not self.op:
            raise ValueError(f"a tree is made of {', '.join(n.__name__ for n in NODES.values())}, not of a bare Node")
        if not children:
            raise ValueError(f"{type(self).__name__} needs at least one method")
        for child in children:
            if not isinstance(child, (Leaf, Node)):
                raise ValueError(f"{type(self).__name__} takes methods such as dt.LoRA(r=8), not {child!r}")
        self.children = children

    def leaves(self, path: str = "") -> Iterator[tuple[str, Leaf]]:
        """(path, leaf) of every leaf, in order."""
        for i, child in enumerate(self.children):
            yield from child.leaves(f"{path}.{i}" if path else str(i))

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain data."""
        return {"op": self.op, "children": [c.to_dict() for c in self.children]}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Node) and self.children == other.children

    def __hash__(self) -> int:
        return hash((self.op, self.children))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.children))})"


class Stack(Node):
    """Later children go around earlier ones: W' = fold_b(fold_a(W))."""

    op = "stack"


class Sum(Node):
    """Every child sees the same input and the base's output; their changes add up."""

    op = "sum"


class Average(Node):
    """Every child sees the same input and the base's output; their outputs are averaged."""

    op = "average"


NODES: dict[str, type[Node]] = {n.op: n for n in (Stack, Sum, Average)}
Tree = Leaf | Node


def tree_from_dict(data: Mapping[str, Any], methods: "Mapping[str, type[Method]]") -> Tree:
    """The tree that `to_dict` wrote. Raises ValueError on an unknown node, method, hyperparameter or key."""
    if not isinstance(data, Mapping):
        raise ValueError(f"a tree is a mapping with a method or an op, not {data!r}")
    if "op" in data:
        if str(data["op"]) not in NODES:
            raise unknown("node", str(data["op"]), NODES)
        extra = data.keys() - {"op", "children"}
        if extra:
            raise unknown(f"key of a {data['op']} node", sorted(extra)[0], ("op", "children"))
        children = data.get("children", ())
        if not isinstance(children, Sequence):
            raise ValueError(f"children of {data['op']} must be a list, not {children!r}")
        return NODES[data["op"]](*(tree_from_dict(c, methods) for c in children))
    extra = data.keys() - {"method", "config", "where", "layers"}
    if extra or "method" not in data:
        raise unknown(
            "key of a method", sorted(extra)[0] if extra else "(none)", ("method", "config", "where", "layers")
        )
    if str(data["method"]) not in methods:
        raise unknown("method", str(data["method"]), methods)
    cls = methods[data["method"]]
    where, layers, config = data.get("where"), data.get("layers"), data.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"config of {cls.name} must be a mapping, not {config!r}")
    return Leaf(
        cls,
        cls.configure(**config),
        tuple(where) if isinstance(where, list) else where,
        tuple(layers) if isinstance(layers, list) else layers,
    )


def assemble(tree: Tree, deltas: "Mapping[str, Delta]", path: str = "") -> "Delta | None":
    """What stands at one site for `tree`, where `deltas` holds the leaves that are there, by path; None if none is."""
    if isinstance(tree, Leaf):
        return deltas.get(path or "0")
    parts: list[Delta] = []
    for i, child in enumerate(tree.children):
        part = assemble(child, deltas, f"{path}.{i}" if path else str(i))
        if part is not None:
            parts.append(part)
    if len(parts) < 2:
        return parts[0] if parts else None
    from .method import Meet

    return Meet(tree.op, parts)


Run = Callable[[Any, Tensor], Tensor]


def meet_fold(op: str, parts: "list[Delta]", weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The node in weight space."""
    if op == "stack":
        for part in parts:
            weight, bias = part.fold(weight, bias)
        return weight, bias
    share = 1.0 / len(parts) if op == "average" else 1.0
    out, out_bias = weight, bias
    for part in parts:
        w, b = part.fold(weight, bias)
        out = out + share * (w - weight)
        if b is not None:
            out_bias = share * b if out_bias is None else out_bias + share * (b if bias is None else b - bias)
    return out, out_bias


def meet_post(op: str, parts: "list[Delta]", y: Tensor, x: Tensor, post: Callable[..., Tensor]) -> Tensor:
    """The node in activation space, where no part changes the input: `post(part, y, x)` runs one part."""
    if op == "stack":
        for part in parts:
            y = post(part, y, x)
        return y
    outs = [post(part, y, x) for part in parts]
    if op == "average":
        return torch.stack(outs).mean(0)
    total = y
    for out in outs:
        total = total + (out - y)
    return total


def parts_of(delta: nn.Module) -> "list[Delta]":
    """The leaves under what stands at a site."""
    from .method import Meet

    return [leaf for part in delta.parts for leaf in parts_of(part)] if isinstance(delta, Meet) else [delta]  # type: ignore[list-item]
