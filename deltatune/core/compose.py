"""A tree of methods. Leaves that meet at one site obey their node; leaves at different sites stand side by side.

    Stack(a, b)     b around a: W' = fold_b(fold_a(W))
    Sum(a, b)       y' = y + (a(y) - y) + (b(y) - y):  W' = W + (fold_a(W) - W) + (fold_b(W) - W)
    Average(a, b)   y' = (a(y) + b(y)) / 2

    Gate, Mixture, Fuse, Route     y' = y + sum_i w_i (f_i(x) - y), w_i by a mixer, core/mixed.py

The same tree is an expression in Python (`dt.Sum(dt.LoRA(r=8), dt.IA3())`), a mapping in YAML and in `adapter.json`.
A leaf is known by its path: "0" for a lone leaf, "1.0" for the first child of the second child. A tree that has a name of
its own (`mam`) is a `Preset`: a function from hyperparameters to a tree.
"""

import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as with_default
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import unknown
from .site import share

if TYPE_CHECKING:
    from .method import Delta, Method


@dataclass(frozen=True, slots=True)
class Per:
    """Places with hyperparameters of their own: `where={"attn": {"r": 8}, "mlp": {"r": 32}}`."""

    each: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As it is written."""
        return {place: _plain(dict(own), list) for place, own in self.each}


Where = str | tuple[str, ...] | Per | None
Layers = int | tuple[int, ...] | str | None  # a string is a share of each stack's depth, "1/6-1/2"


def _plain(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values with each list or tuple as a `kind`: lists in files, tuples in frozen data."""
    return {k: kind(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}


def where_of(where: Any) -> Where:
    """A place as a user or a file writes it, as plain frozen data. Raises ValueError on anything else."""
    if isinstance(where, Mapping):
        for place, own in where.items():
            if not isinstance(place, str) or not (own is None or isinstance(own, Mapping)):
                raise ValueError(
                    f"where as a mapping gives each place its hyperparameters, {{'attn': {{'r': 8}}}}, not {place!r}: {own!r}"
                )
        if not where:
            raise ValueError("where is an empty mapping; it must name at least one place")
        return Per(tuple((place, tuple(_plain(own or {}, tuple).items())) for place, own in where.items()))
    if where is None or isinstance(where, (str, tuple, Per)):
        return where
    if isinstance(where, list):
        return tuple(where)
    raise ValueError(f"where must be a text, a list of names or a mapping of places, not {where!r}")


def layers_of(layers: Any) -> Layers:
    """Layers as a user or a file writes them, as plain frozen data. Raises ValueError on anything else."""
    if isinstance(layers, str):
        share(layers)
        return layers
    if layers is None or isinstance(layers, int) and not isinstance(layers, bool):
        return layers
    numbers = tuple(layers) if isinstance(layers, Iterable) else (None,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(
            f"layers must be a number, a range, a list of numbers or a share such as '1/6-1/2', not {layers!r}"
        )
    return numbers


@dataclass(frozen=True, slots=True)
class Leaf:
    """One method with its hyperparameters and its place."""

    method: "type[Method]"
    config: Any
    where: Where = None
    layers: Layers = None
    # (adapter, path) once it stands; gives what undoes it where it changed more than the adapter's own
    start: Callable[[Any, str], Callable[[], None] | None] | None = with_default(
        default=None, compare=False, repr=False
    )
    frozen: bool = False  # its tensors are saved and not trained

    def leaves(self, path: str = "0") -> Iterator[tuple[str, "Leaf"]]:
        """(path, leaf) of every leaf, in order."""
        yield path, self

    def replaced(self, leaves: "Mapping[str, Leaf]", path: str = "0") -> "Leaf":
        """The tree with the leaves of these paths in its own leaves' places."""
        return leaves.get(path, self)

    def __post_init__(self) -> None:
        for _, own in self.where.each if isinstance(self.where, Per) else ():
            self.method.configure(**{**asdict(self.config), **dict(own)})

    def changed(self, **hyper: Any) -> "Leaf":
        """The same leaf with other hyperparameters, everywhere."""
        where = self.where
        if isinstance(where, Per):
            where = Per(tuple((p, tuple((k, v) for k, v in own if k not in hyper)) for p, own in where.each))
        return replace(self, config=replace(self.config, **hyper), where=where)

    def to_dict(self) -> dict[str, Any]:
        """The leaf as plain data."""
        where: Any = list(self.where) if isinstance(self.where, tuple) else self.where
        where = where.to_dict() if isinstance(where, Per) else where
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return {
            "method": self.method.name,
            "config": _plain(asdict(self.config), list),
            "where": where,
            "layers": layers,
        } | ({"frozen": True} if self.frozen else {})


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
            yield from child.leaves(below(path, i))

    def replaced(self, leaves: Mapping[str, Leaf], path: str = "") -> "Node":
        """The tree with the leaves of these paths in its own leaves' places."""
        return self.again([c.replaced(leaves, below(path, i)) for i, c in enumerate(self.children)])

    def again(self, children: "Sequence[Leaf | Node]") -> "Node":
        """The same node over other children."""
        return type(self)(*children)

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


class Mixing(Node):
    """A node with tensors of its own: a leaf behind its children, the mixer, stands wherever one of them does.

    y' = y + sum_i w_i (f_i(x) - y), f_i the site under child i alone; a site without child i has nothing of it.
    """

    by: ClassVar[str] = ""  # the mixer's name

    def __init__(self, *children: "Leaf | Node", **hyper: Any) -> None:
        from .mixed import MIXERS

        super().__init__(*children)
        if "n" in hyper:
            raise unknown(f"hyperparameter of {type(self).__name__}", "n", ())
        method = MIXERS[self.by]
        self.mixer = Leaf(method, method.configure(n=len(children), **hyper))

    def leaves(self, path: str = "") -> Iterator[tuple[str, Leaf]]:
        """(path, leaf) of every leaf, the mixer's the last."""
        yield from super().leaves(path)
        yield below(path, len(self.children)), self.mixer

    def replaced(self, leaves: Mapping[str, Leaf], path: str = "") -> "Node":
        """The tree with the leaves of these paths in its own leaves' places."""
        node = super().replaced(leaves, path)
        assert isinstance(node, Mixing)
        node.mixer = leaves.get(below(path, len(self.children)), self.mixer)
        return node

    def again(self, children: "Sequence[Leaf | Node]") -> "Node":
        """The same node over other children, with the values that its mixer is to start from, frozen where it was."""
        node = type(self)(*children, **self.hyper())
        node.mixer = replace(self.mixer, config=node.mixer.config)
        return node

    def hyper(self) -> dict[str, Any]:
        """The mixer's hyperparameters."""
        return {k: v for k, v in asdict(self.mixer.config).items() if k != "n"}

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain data."""
        frozen = {"frozen": True} if self.mixer.frozen else {}
        return super().to_dict() | {"config": _plain(self.hyper(), list)} | frozen

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, Mixing) and self.mixer == other.mixer

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.mixer))

    def __repr__(self) -> str:
        own = [f"{k}={v!r}" for k, v in self.hyper().items()]
        return f"{type(self).__name__}({', '.join([*map(repr, self.children), *own])})"


class Gate(Mixing):
    """Each child by itself, between not at all and whole: w_i = sigmoid(g_i(x))."""

    op, by = "gate", "gate"


class Mixture(Mixing):
    """Shares of the children that add up to 1: w = softmax(G x), of a token, a sequence, a task, or for all alike."""

    op, by = "mixture", "softmax"


class Fuse(Mixing):
    """AdapterFusion (2005.00247): attention from the site's output to the children's changes."""

    op, by = "fuse", "attention"


class Route(Mixing):
    """Each row of a batch runs the child that `adapter_ids` names, counted from 0; -1 runs the base."""

    op, by = "route", "rows"


NODES: dict[str, type[Node]] = {n.op: n for n in (Stack, Sum, Average, Gate, Mixture, Fuse, Route)}
Tree = Leaf | Node


def below(path: str, i: int) -> str:
    """The path of the i-th child of the node at `path`."""
    return f"{path}.{i}" if path else str(i)


def tree_from_dict(
    data: Mapping[str, Any],
    methods: "Mapping[str, type[Method]]",
    other: Callable[[Mapping[str, Any]], Tree] | None = None,
) -> Tree:
    """The tree that `to_dict` wrote; `other` reads the parts that are written in another form, with neither op nor method.

    Raises ValueError on an unknown node, method, hyperparameter or key.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a tree is a mapping with a method or an op, not {data!r}")
    if "op" in data:
        if str(data["op"]) not in NODES:
            raise unknown("node", str(data["op"]), NODES)
        node = NODES[str(data["op"])]
        known = ("op", "children", "config", "frozen") if issubclass(node, Mixing) else ("op", "children")
        extra = data.keys() - set(known)
        if extra:
            raise unknown(f"key of a {data['op']} node", sorted(extra)[0], known)
        children = data.get("children", ())
        if not isinstance(children, Sequence):
            raise ValueError(f"children of {data['op']} must be a list, not {children!r}")
        own = data.get("config") or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"config of {data['op']} must be a mapping, not {own!r}")
        made = node(*(tree_from_dict(c, methods, other) for c in children), **own)
        if isinstance(made, Mixing):
            made.mixer = replace(made.mixer, frozen=_frozen(data, node.__name__))
        return made
    if other is not None and "method" not in data:
        return other(data)
    keys = ("method", "config", "where", "layers", "frozen")
    extra = data.keys() - set(keys)
    if extra or "method" not in data:
        raise unknown("key of a method", sorted(extra)[0] if extra else "(none)", keys)
    if str(data["method"]) not in methods:
        raise unknown("method", str(data["method"]), methods)
    cls = methods[data["method"]]
    layers, config = data.get("layers"), data.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"config of {cls.name} must be a mapping, not {config!r}")
    own_place = where_of(data.get("where")), layers_of(layers)
    return Leaf(cls, cls.configure(**config), *own_place, frozen=_frozen(data, cls.name))


def _frozen(data: Mapping[str, Any], name: str) -> bool:
    """Is the part written as frozen, a node's own tensors or a leaf's? Raises ValueError where that is no yes or no."""
    frozen = data.get("frozen", False)
    if not isinstance(frozen, bool):
        raise ValueError(f"frozen of {name} must be true or false, not {frozen!r}")
    return frozen


def comments_in(source: Any) -> dict[str, str]:
    """The comment behind each field of a class, or argument of a function; none where the source is not there."""
    try:
        text = textwrap.dedent(inspect.getsource(source))
    except (OSError, TypeError):
        return {}
    found, field = {}, ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.start[1] == 4:
            field = token.string
        elif token.type == tokenize.COMMENT and field:
            found[field] = token.string.lstrip("# ")
        elif token.type == tokenize.NEWLINE:
            field = ""
    return found


def placed(tree: Tree, where: Where, layers: Layers) -> Tree:
    """The tree with `where` and `layers` given to every leaf that has none of its own."""
    if isinstance(tree, Leaf):
        own_where = where if tree.where is None else tree.where
        return replace(tree, where=own_where, layers=layers if tree.layers is None else tree.layers)
    return tree.again([placed(c, where, layers) for c in tree.children])


@dataclass(frozen=True)
class Preset:
    """A tree with a name: what a paper made of other methods."""

    name: str
    make: Callable[..., Tree]  # its keyword arguments are the preset's hyperparameters
    paper: str
    category: str
    lr: tuple[float, float]
    exceptions: Mapping[str, str] = with_default(default_factory=dict)  # contract check -> why it is exempt
    sources: str = ""  # the method whose saved adapters it is made of; then its function takes `sources`
    n_sources: int = 2  # how many of them the contract suite gives it
    in_place: ClassVar[bool] = False
    quantised: ClassVar[str] = ""
    rebases: ClassVar[bool] = False
    still: ClassVar[Mapping[str, str]] = {}
    needs_sources: ClassVar[bool] = True

    def __call__(self, **hyper: Any) -> Tree:
        """The tree. Raises ValueError with the nearest name of an unknown hyperparameter."""
        known = inspect.signature(self.make).parameters
        for key in hyper:
            if key not in known:
                raise unknown(f"hyperparameter of {self.name}", key, known)
        return self.make(**hyper)

    def __reduce__(self) -> Any:
        return _preset, (self.name,)  # its function stands behind the preset's own name, where pickle would not find it

    def about(self) -> str:
        """Its one fact: the first line of the function's docstring."""
        return (self.make.__doc__ or "").strip().partition("\n")[0]

    def hyper(self) -> list[tuple[str, Any, Any]]:
        """(name, type, default) of each hyperparameter, in order."""
        return [(p.name, p.annotation, p.default) for p in inspect.signature(self.make).parameters.values()]

    def hyperparameters(self) -> list[tuple[str, str, Any, str]]:
        """(name, type, default, comment) of each, in order."""
        comments = comments_in(self.make)
        return [
            (n, getattr(kind, "__name__", str(kind)), default, comments.get(n, "")) for n, kind, default in self.hyper()
        ]

    def mergeable(self) -> bool:
        """Do all of its methods fold?"""
        return all(leaf.method.mergeable() for _, leaf in self().leaves())

    def count(self) -> str:
        """The trained parameters at one site of each method, as formulas."""
        counts = (f"{leaf.method.name}: {leaf.method.count()}" for _, leaf in self().leaves())
        return "; ".join(dict.fromkeys(counts))

    @property
    def where(self) -> str:
        """The places of its methods."""
        places = [leaf.method.where if leaf.where is None else leaf.where for _, leaf in self().leaves()]
        return "; ".join(map(str, dict.fromkeys(places)))


PRESETS: dict[str, Preset] = {}


def _preset(name: str) -> Preset:
    return PRESETS[name]


def preset(
    name: str,
    *,
    paper: str,
    category: str,
    lr: tuple[float, float],
    exceptions: Mapping[str, str] | None = None,
    sources: str = "",
    n_sources: int = 2,
) -> Callable[[Callable[..., Tree]], Preset]:
    """Register a function from hyperparameters to a tree under `name`."""

    def register(make: Callable[..., Tree]) -> Preset:
        PRESETS[name] = Preset(name, make, paper, category, lr, exceptions or {}, sources, n_sources)
        return PRESETS[name]

    return register


def assemble(tree: Tree, deltas: "Mapping[str, Delta]", path: str = "") -> "Delta | None":
    """What stands at one site for `tree`, where `deltas` holds the leaves that are there, by path; None if none is."""
    if isinstance(tree, Leaf):
        return deltas.get(path or "0")
    found = [(i, assemble(child, deltas, below(path, i))) for i, child in enumerate(tree.children)]
    parts = [(i, part) for i, part in found if part is not None]
    if isinstance(tree, Mixing) and parts:
        from .mixed import Mixed

        return Mixed(parts, deltas[below(path, len(tree.children))])  # type: ignore[arg-type]
    if len(parts) < 2:
        return parts[0][1] if parts else None
    from .method import Meet

    return Meet(tree.op, [part for _, part in parts])


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


def parts_of(delta: nn.Module, mixed: bool = True) -> "list[Delta]":
    """The leaves under what stands at a site, mixers among them; with `mixed=False` a node that mixes is one."""
    from .method import Meet
    from .mixed import Mixed

    if not isinstance(delta, Meet) or not mixed and isinstance(delta, Mixed):
        return [delta]  # type: ignore[list-item]
    return [leaf for part in delta.parts for leaf in parts_of(part, mixed)]


def storage_of(tree: Tree) -> str:
    """The format of `deltatune.quant` that the tree's base has by default: "" for plain, and for what quantises it itself."""
    return next(
        (leaf.method.quantised for _, leaf in tree.leaves() if leaf.start is None and leaf.method.quantised), ""
    )


def looking(tree: Tree, rows: Callable[[int], Iterable[Any]]) -> Tree:
    """The tree whose starts look at `rows(n)`, batches of at most n training rows, where a method's start looks at data."""
    new = {p: leaf.method.looks(leaf, rows(n)) for p, leaf in tree.leaves() if (n := leaf.method.starts_on)}
    return tree.replaced(new)


def names_of(deltas: "Sequence[nn.Module]") -> str:
    """The methods under these, for an error's text: those of one node joined by +."""
    return ", ".join("+".join(dict.fromkeys(getattr(p, "name", "?") for p in parts_of(d))) for d in deltas)
