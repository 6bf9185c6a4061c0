"""What attach leaves on a model, and how it is put there and taken off again.

The record is plain data on the attached model, so that it survives deepcopy and pickle; the deltas themselves stand at
their layers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from torch import Tensor, nn

from . import tokens
from .compose import Tree, parts_of
from .method import Delta
from .runtime import OWN_FIELDS, ROOT_LAYERS, Deltas, Frame, Leave, Switch, Tap, swap, walk
from .site import Site, all_sites

EVERYTHING = "everything"  # the `where` of an in-place method that trains all parameters
HEAD = "head"  # the path of the head's leaf, beside the tree's own


@dataclass(slots=True)
class Entry:
    """One thing that stands at one module: what attach put there, and under which keys."""

    module: str
    key: str
    sites: dict[str, str]  # leaf path -> site name
    entry: str | None = None  # the module at a span's other end


@dataclass(slots=True)
class Info:
    """What the model remembers of one adapter; plain data, so that it survives deepcopy and pickle."""

    tree: Tree
    seed: int
    head: bool
    entries: list[Entry] = field(default_factory=list)
    owned: list[str] = field(default_factory=list)  # base parameters that an in-place method trains
    owned_heads: list[str] = field(default_factory=list)  # of `owned`, those of the task head
    originals: dict[str, Tensor] = field(default_factory=dict)  # of `owned`, on the CPU
    current: dict[str, Tensor] = field(default_factory=dict)  # of `owned`, while disabled
    switch: Switch = field(default_factory=Switch)
    merged: dict[str, SimpleNamespace] | None = None  # module -> its weight and bias before the merge
    calibrated: dict[str, Tensor] = field(default_factory=dict)  # what the schedule found in data, by parameter


@dataclass(slots=True)
class Record:
    """What attach leaves on the model: the frame, the adapters, and what the base's `requires_grad` were."""

    frame: Frame
    infos: dict[str, Info] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    fingerprint: Tensor | None = None


def standing(model: nn.Module, info: Info, name: str) -> Iterator[tuple[Entry, nn.Module, Delta]]:
    """(entry, module, delta) of everything of adapter `name`. Raises ValueError where another module took a place."""
    for entry in info.entries:
        module = model.get_submodule(entry.module)
        deltas = module._modules.get("deltas")
        if not isinstance(deltas, Deltas) or entry.key not in deltas:
            raise ValueError(
                f"{entry.module}: adapter {name!r} stood here, but {type(module).__module__}.{type(module).__qualname__} "
                f"took the layer's place; undo that first"
            )
        delta = deltas[entry.key]
        assert isinstance(delta, Delta)
        yield entry, module, delta


def mark(site: Site) -> str:
    """What tells this site from others whose deltas stand at the same module."""
    if site.name == site.module:
        return ""
    return site.param if site.kind == "experts" else re.split(r"[:\[]", site.name)[-1].rstrip("]")


def place(modules: Mapping[str, nn.Module], entry: Entry, part: Delta, frame: Frame, switch: Switch) -> None:
    """Put one delta, or several that meet, at its module."""
    for delta in part.modules():  # nodes inside of nodes too
        if isinstance(delta, Delta):
            delta.__dict__["frame"], delta.__dict__["switch"] = frame, switch
    if entry.entry is not None:
        if part.site.entry is not None:
            part.tap = f"{entry.module}|{entry.key}"
        add(modules[entry.entry], entry.entry, entry.key, (Tap if part.tap else Leave)(part), "site")
    if part.site.kind == "input":
        limit = tokens.n_positions(modules[entry.module])
        size = max((getattr(p, "n", 0) for p in parts_of(part)), default=0)
        if limit is not None and size >= limit:
            raise ValueError(f"{part.site.name or 'the model'}: {size} soft tokens leave no room in {limit} positions")
        modules[entry.module].__dict__["_deltatune_positions"] = limit
    add(modules[entry.module], entry.module, entry.key, part, "input" if part.site.kind == "input" else "site")


def add(module: nn.Module, name: str, key: str, delta: Delta, layer: str) -> None:
    """Make `delta` a child of `module`, and its class one that runs it."""
    if "deltas" not in module._modules:
        if hasattr(module, "deltas"):
            raise ValueError(f"{name}: {type(module).__name__} has an attribute 'deltas' of its own")
        module.add_module("deltas", Deltas())
    deltas = module._modules["deltas"]
    assert isinstance(deltas, Deltas)
    deltas[key] = delta
    if delta.site.kind != "span":  # a layer's own deltas are inside those of a span that begins or ends at it
        for other in [k for k, d in deltas.items() if isinstance(d, Delta) and d.site.kind == "span"]:
            deltas[other] = deltas.pop(other)
    delta.train(module.training)  # a model in eval mode stays so
    swap(module, name, add=(layer,))


def remove(module: nn.Module, name: str, key: str) -> None:
    """Take the delta of that key off; without any left the module has its own class again."""
    deltas = module._modules.get("deltas")
    if isinstance(deltas, Deltas) and key in deltas:
        del deltas[key]
    if isinstance(deltas, Deltas) and not deltas:
        del module.deltas
        swap(module, name, drop=("site", "input"))
    if "deltas" not in module._modules:
        module.__dict__.pop("_deltatune_positions", None)


def refresh(model: nn.Module, record: Record) -> None:
    """Set what depends on all adapters together: who reads the call, the blocks that carry it through checkpoints, the
    decoders whose cross-attention has to see an encoder's soft tokens, the backbones whose positions are moved."""
    frame = record.frame
    by_name = {
        n: [d for _, _, part in standing(model, info, n) for d in parts_of(part)] for n, info in record.infos.items()
    }
    leaves = [d for deltas in by_name.values() for d in deltas]
    readers = [d for d in leaves if d.reads_call]
    frame.readers = len(readers)
    frame.wanted = frozenset(n for n in OWN_FIELDS for d in readers if n in getattr(d, "reads", ()))
    frame.factored = tuple(d for d in leaves if d.has_pair)
    frame.beside = _of_one_input(model, frame.factored)
    lengthened = any(d.site.kind == "input" and d.site.stack == "encoder" for d in leaves)
    shifted = any(getattr(d, "shift", False) for d in leaves)
    carriers: set[str] = set()
    decoders: set[str] = set()
    encoders: set[str] = set()
    table = all_sites(model) if readers or lengthened or shifted else ()
    shifts = tokens.shifts_of(dict(walk(model)), table, by_name) if shifted else {}
    for site in table:
        if site.kind == "block" and any(f"{d.site.module}.".startswith(f"{site.module}.") for d in readers):
            carriers.add(site.module)
        if lengthened and site.kind == "input" and site.stack == "decoder":
            decoders.add(site.module)
        if readers and site.kind == "input" and site.stack == "encoder":  # `generate` runs it by itself
            encoders.add(site.module)
    for name, module in walk(model):
        if name in carriers:
            module.__dict__["_deltatune_frame"] = frame
            swap(module, name, add=("block",))
        elif module.__dict__.pop("_deltatune_frame", None) is not None:
            swap(module, name, drop=("block",))
        if name in shifts:
            module.__dict__["_deltatune_shift"] = shifts[name]
            module.__dict__["_deltatune_positions"] = tokens.n_positions(module)
        elif module.__dict__.pop("_deltatune_shift", None) is not None and "deltas" not in module._modules:
            module.__dict__.pop("_deltatune_positions", None)
        layers = type(module).__dict__.get("_deltatune_class", (None, ()))[1]
        if name in encoders:
            module.__dict__["_deltatune_encoder"] = frame
        else:
            module.__dict__.pop("_deltatune_encoder", None)
        if name in decoders or name in shifts or name in encoders:
            swap(module, name, add=("input",))
        elif "input" in layers and "deltas" not in module._modules:
            swap(module, name, drop=("input",))


def release(model: nn.Module, record: Record) -> None:
    """Leave no trace on a model whose last adapter went."""
    for name, module in walk(model):
        if hasattr(type(module), "_deltatune_class"):
            swap(module, name, drop=("root", "site", "input", "block", *root_layers(model)))
    required = set(record.required)
    for n, p in model.named_parameters():
        p.requires_grad_(n in required)
    del model.__dict__["_deltatune"]


def root_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers of behaviour that the attached model itself takes."""
    return ("root", *(name for name, applies in ROOT_LAYERS.items() if applies(model)))


# the roles of linear layers in one module that read one input
ONE_INPUT = {"attn.q": "attn", "attn.k": "attn", "attn.v": "attn", "cross.k": "cross", "cross.v": "cross"}
ONE_INPUT |= {"mlp.gate": "mlp", "mlp.up": "mlp"}


def _of_one_input(model: nn.Module, deltas: Sequence[Delta]) -> dict[str, tuple[nn.Module, ...]]:
    """By module, all that read its input, where there are several whose change is two factors."""
    found: dict[tuple[str, str], set[str]] = {}
    for delta in deltas:
        site = delta.site
        if site.kind == "linear" and not site.rows and site.role in ONE_INPUT:
            found.setdefault((site.module.rpartition(".")[0], ONE_INPUT[site.role]), set()).add(site.module)
    groups = [sorted(names) for names in found.values() if len(names) > 1]
    return {name: tuple(map(model.get_submodule, names)) for names in groups for name in names}
