"""Attach and load: resolve, check and build everything, then touch the model; an error leaves it bit for bit as it was.

adapter = attach(model, "lora", where="q,v", r=16)      freezes the rest, changes no value
adapter = load(model, "out/law")                        or an error that says what does not fit
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import base, files, storage
from .adapter import Adapter, fill
from .bank import Bank
from .compose import (
    Leaf,
    Node,
    Per,
    Stack,
    Tree,
    Where,
    assemble,
    layers_of,
    names_of,
    parts_of,
    placed,
    tree_from_dict,
    where_of,
)
from .errors import unknown
from .identity import base_fingerprint, check_base
from .method import METHODS, Delta, Meet, named
from .mixed import Mixed, Mixer
from .record import EVERYTHING, HEAD, Entry, Info, Record, mark, place, refresh, root_layers
from .runtime import ATTACHED, ATTENDS, Banks, Frame, check_folds, check_reachable, integrate, original, swap, walk
from .site import HEADS, Site, all_sites, expanded, select

COPY = "copy"  # the registered method that trains a task head as a copy of it
# What another library's configuration object means here, and who reads a folder of its files: by the package of the object
# and by the file that marks the folder. `deltatune/__init__.py` fills both.
CONFIGS: dict[str, Callable[..., Adapter]] = {}
READERS: dict[str, Callable[..., Adapter]] = {}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def attach(
    model: nn.Module,
    method: "str | Tree | Any",
    *,
    name: str = "default",
    where: "Where | list[str] | Mapping[str, Any]" = None,
    layers: Any = None,
    head: str | None = "auto",
    seed: int = 0,
    probe: "Mapping[str, Any] | None" = None,
    **hyper: Any,
) -> Adapter:
    """Freeze the backbone and put one method, or a tree of them, on the sites that `where` selects, in place.

    `method` is a name of the registry, with its hyperparameters as keywords, a tree such as `dt.LoRA(r=16)`, or HF PEFT's
    configuration object. `where` is a place of `dt.sites`, or places with hyperparameters of their own: `{"mlp": {"r": 32}}`.
    `layers` are numbers of layers in each stack, or a share of its depth, "1/6-1/2"; all by default.
    `head="auto"` trains the task head beside it, where the backbone has one; `head=None` does not. `seed` draws what
    sites share; the tensors' own starts come from torch's generator. A method that is made of saved adapters takes their
    folders as `sources`. `probe` is one batch, as keywords of the model: it
    is run once, and a delta that does not move the outputs is refused.

    Raises ValueError, and changes nothing, on an unknown method, hyperparameter or place, on a number that does not fit
    a site, on a second adapter of one name, or where a delta would have no effect or no gradient.
    """
    reader = CONFIGS.get(type(method).__module__.partition(".")[0])
    if reader is not None:
        given = {k: v for k, v in {**hyper, "where": where, "layers": layers}.items() if v is not None}
        if given:
            raise ValueError(f"{sorted(given)[0]} belongs to the {type(method).__name__}; set it there")
        return reader(model, method, name=name, head=head, seed=seed, probe=probe)
    if isinstance(method, str):
        tree: Tree = named(method)(**hyper)
    elif isinstance(method, (Leaf, Node)):
        if hyper:
            raise unknown("argument of attach", sorted(hyper)[0], ("name", "where", "layers", "head", "seed", "probe"))
        tree = method
    else:
        raise ValueError(f"method must be a name such as 'lora' or a tree such as dt.LoRA(r=8), not {method!r}")
    if head not in ("auto", None):
        raise ValueError(f"head must be 'auto' or None, not {head!r}")
    tree = placed(tree, where_of(where), layers_of(layers))
    for _, leaf in tree.leaves():
        if leaf.method.sources and leaf.method.needs_sources and leaf.start is None:
            raise ValueError(
                f"{leaf.method.name} is made of saved adapters, of {leaf.method.sources}; give it sources=[folder, ...]"
            )
        if leaf.method.rebases and leaf.start is None:  # as a standing adapter's tree is, or one from a file
            raise ValueError(
                f"{leaf.method.name} starts from a plain base's weights, and this tree was attached once already; make the "
                f"method anew, dt.attach(model, {leaf.method.name!r}, ...), or take the file, dt.load or dt.saved"
            )
    adapter = shaped(model, tree, name, seed, head == "auto")
    with or_off(adapter) as undo:
        for path, leaf in tree.leaves():
            if leaf.start is not None:
                undo.append(leaf.start(adapter, path))
        _check_storage(adapter)
        if probe is not None:
            adapter.probe(**probe)
    return adapter


def shaped(model: nn.Module, tree: Tree, name: str = "default", seed: int = 0, head: bool = False) -> Adapter:
    """`attach` as far as shapes go: no start looks at values, and whether a layer is quantised is not asked."""
    kept = tree.replaced({path: replace(leaf, start=None) for path, leaf in tree.leaves()})
    return _attach(model, kept, name, seed, head, None)


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", trainable: bool = False) -> Adapter:
    """Put a saved adapter on the model: one of ours, or a folder that HF PEFT wrote.

    Raises ValueError, and changes nothing, where the file is damaged, was made for another backbone (another site
    table, or other values at the fingerprint's positions), or does not hold exactly the tensors that it declares.
    """
    for file, reader in READERS.items():
        if (Path(path) / file).is_file() and not (Path(path) / files.CARD).is_file():
            return reader(model, path, name=name, trainable=trainable)
    card, tensors = files.read_adapter(path)
    check_base(model, path, card, tensors)
    return loaded(model, path, card, tensors, name=name, trainable=trainable)


def loaded(
    model: nn.Module,
    path: str | os.PathLike[str],
    card: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    trainable: bool = False,
) -> Adapter:
    """`load` of what was read from `path` and checked against the base."""
    try:
        tree = tree_from_dict(card["tree"], METHODS)
    except ValueError as error:
        raise ValueError(f"{path}: its tree cannot be read: {error}") from None
    adapter = _attach(model, tree, name, card["seed"], card["head"], card["sites"], card["in_place"])
    with or_off(adapter):
        _check_storage(adapter)
        fill(adapter, path, tensors)
        adapter.trainable(trainable)
    return adapter


def _check_storage(adapter: Adapter) -> None:
    """Raise ValueError where a method that is meant for a quantised base stands on a plain layer."""
    for delta in adapter.deltas.values():
        wanted, site = getattr(type(delta), "quantised", ""), delta.site
        if wanted and not base.quantised(adapter.model.get_submodule(site.module), site):
            raise ValueError(
                f"{site.name}: {delta.name} is meant for a quantised base, and this layer is a plain one; "
                f"dt.quantise(model, {wanted!r}) makes one, and dt.load_base(folder, {wanted!r}) while it loads"
            )


@contextlib.contextmanager
def or_off(adapter: Adapter) -> Iterator[list[Callable[[], None] | None]]:
    """Take the adapter off again where what is done to it right after attaching fails, behind what the list undoes."""
    undo: list[Callable[[], None] | None] = []
    try:
        yield undo
    except BaseException:
        for back in reversed(undo):
            if back is not None:
                back()
        adapter.detach()
        raise


def _attach(
    model: nn.Module,
    tree: Tree,
    name: str,
    seed: int,
    head: bool,
    places: Mapping[str, list[str]] | None,
    owned: list[str] | None = None,
) -> Adapter:
    """`places` (leaf path -> site names) and `owned` come from a file; None resolves the leaves' own `where`."""
    integrate()
    modules = _checked(model, name)
    record: Record | None = model.__dict__.get("_deltatune")
    every = all_sites(model)
    leaves = dict(tree.leaves())
    info = Info(tree, seed, head)
    chosen: dict[str, list[tuple[Site, Any]]] = {}
    if any(leaf.method.in_place for leaf in leaves.values()):
        _own(model, modules, every, leaves, record, info, owned)
    else:
        chosen = _chosen(every, leaves, places)
    _add_head(every, leaves, chosen, info)

    # everything is built before the model is touched
    shared = Bank(seed)
    plan = _in_order(_plan(tree, name, _built(modules, every, leaves, chosen, shared)))
    _check_gradients(plan, every, leaves)
    if not plan and not info.owned:
        raise ValueError(f"{tree!r} trains nothing on this model" + ("" if head else ": it has no task head"))
    _commit(model, modules, every, record or Record(Frame()), name, info, plan, shared)
    return Adapter(model, name)


def _checked(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The model's modules by name. Raises ValueError where this model cannot take an adapter of that name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"an adapter's name is made of letters, digits, '_' and '-', not {name!r}")
    record: Record | None = model.__dict__.get("_deltatune")
    if record is not None and name in record.infos:
        raise ValueError(f"the model has an adapter named {name!r} already; adapters here: {', '.join(record.infos)}")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError("the model is sharded already; attach first, then shard")
    modules = dict(walk(model))
    for at, module in modules.items():
        if "_orig_mod" in module._modules:
            raise ValueError(
                f"{at or 'the model'} comes from torch.compile; attach to the model itself, then compile it"
            )
        if at and "_deltatune" in module.__dict__:
            raise ValueError(f"{at} has adapters of its own; attach to one model, not to it and to a part of it")
    if record is None and any(hasattr(type(m), "_deltatune_class") for m in modules.values()):
        raise ValueError("this module is part of a model with adapters; attach to that model")
    return modules


def _own(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    every: Sequence[Site],
    leaves: Mapping[str, Leaf],
    record: Record | None,
    info: Info,
    owned: list[str] | None,
) -> None:
    """Note in `info` which of the base's parameters an in-place method trains."""
    if len(leaves) > 1:
        first = next(leaf.method for leaf in leaves.values() if leaf.method.in_place)
        raise ValueError(f"{first.name} trains the base itself; it cannot be part of a tree")
    (leaf,) = leaves.values()
    info.owned = _claims(model, every, leaf) if owned is None else owned
    for n in info.owned:
        try:
            model.get_parameter(n)
        except AttributeError:
            raise ValueError(f"the base has no parameter {n}, which the adapter trained") from None
        if base.offloaded(modules[n.rpartition(".")[0]], n.rpartition(".")[2]) is not None:
            raise ValueError(
                f"{n} is offloaded by accelerate; {leaf.method.name} trains it in place, where no gradient reaches it"
            )
    for other, their in (record.infos if record else {}).items():
        both = set(info.owned) & set(their.owned)
        if both:
            raise ValueError(f"{min(both)} is trained in place by adapter {other!r} already")
    heads = {s.module for s in every if s.role == HEAD}
    info.owned_heads = [n for n in info.owned if n.rpartition(".")[0] in heads]
    info.head = info.head and not info.owned_heads


def _claims(model: nn.Module, every: Sequence[Site], leaf: Leaf) -> list[str]:
    """The base's parameters that an in-place method trains: all of them, or those at and below the selected sites."""
    where = leaf.method.where if leaf.where is None else leaf.where
    if isinstance(where, Per):
        raise ValueError(f"{leaf.method.name} trains the base itself; its hyperparameters are the same at every place")
    chosen = None if where == EVERYTHING else {f"{s.module}." for s in select(every, where, leaf.layers)}
    if chosen is None and leaf.layers is not None:
        raise ValueError(f"{leaf.method.name} trains every parameter; layers={leaf.layers} needs a `where` beside it")
    seen: set[int] = set()
    found = []
    for at, module in walk(model):
        if chosen is not None and not any(f"{at}.".startswith(place) for place in chosen):
            continue
        if (kind := storage.format_of(module)) is not None:
            raise ValueError(
                f"{at}: {leaf.method.name} trains it in place, and its weight is quantised ({kind.name}); train a delta on it"
            )
        for key, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                found.append(f"{at}.{key}" if at else key)
    return found


def _chosen(
    every: Sequence[Site], leaves: Mapping[str, Leaf], places: Mapping[str, list[str]] | None
) -> dict[str, list[tuple[Site, Any]]]:
    """The sites of every leaf, each with the hyperparameters that hold there."""
    table = {s.name: s for s in expanded(every)}
    chosen: dict[str, list[tuple[Site, Any]]] = {}
    for path, leaf in leaves.items():
        method = leaf.method
        if issubclass(method, Mixer):  # behind the node's children in the tree: theirs are known
            node = path.rpartition(".")[0]
            under = {s.name for p, own in chosen.items() if not node or p.startswith(f"{node}.") for s, _ in own}
            chosen[path] = [(s, leaf.config) for name, s in table.items() if name in under]
            continue
        own = _per_site(every, leaf)
        there = frozenset(() if places is None else places.get(path, ()))  # a tree's file has another order of its own
        if places is not None and _has_choice(leaf):  # its places on the backbone are the file's, on a head this head's
            kept = [site for n, site in table.items() if n in there and site.role not in HEADS]
            on_head = [s for s in _selected(every, leaf) if s.role in HEADS]
            chosen[path] = [(s, leaf.config) for s in (*kept, *on_head) if s in kept or method.fits(leaf.config, s)]
            continue
        if places is not None:
            gone = [n for n in places.get(path, ()) if n not in table]
            if gone:
                raise unknown("site", gone[0], table)
            chosen[path] = [(site, own.get(n, leaf.config)) for n, site in table.items() if n in there]
            continue
        if isinstance(leaf.where, Per):
            selected = [table[n] for n in own]
        else:
            selected = _selected(every, leaf)
        chosen[path] = [(s, c) for s in selected if method.fits(c := own.get(s.name, leaf.config), s)]
        if not chosen[path]:
            raise ValueError(
                f"{method.name} fits none of the {len(selected)} sites that {leaf.where or method.where!r} selects, "
                f"{selected[0].name} first"
            )
    return chosen


def _selected(every: Sequence[Site], leaf: Leaf) -> list[Site]:
    where: Any = leaf.method.where if leaf.where is None else leaf.where
    return list(select(every, where, leaf.layers, leaf.method.kinds))


def _has_choice(leaf: Leaf) -> bool:
    """Does its place name alternatives, of which each backbone, and each head on it, has its own?"""
    where = leaf.method.where if leaf.where is None else leaf.where
    return isinstance(where, str) and "|" in where


def _per_site(every: Sequence[Site], leaf: Leaf) -> dict[str, Any]:
    """Site name -> hyperparameters, where the leaf gives its places their own. Each site belongs to one place."""
    own: dict[str, tuple[str, Any]] = {}
    for words, hyper in leaf.where.each if isinstance(leaf.where, Per) else ():
        config = leaf.method.configure(**{**asdict(leaf.config), **dict(hyper)})
        for site in select(every, words, leaf.layers, leaf.method.kinds):
            if site.name in own:
                raise ValueError(f"{site.name} lies in two places of where, {own[site.name][0]!r} and {words!r}")
            own[site.name] = words, config
    order = {s.name: i for i, s in enumerate(expanded(every))} if own else {}
    return {name: own[name][1] for name in sorted(own, key=order.__getitem__)}


def _add_head(
    every: Sequence[Site], leaves: dict[str, Leaf], chosen: dict[str, list[tuple[Site, Any]]], info: Info
) -> None:
    """The task head's leaf joins, where one is wanted, there and not adapted by the tree itself."""
    if not info.head or any(s.role == HEAD for found in chosen.values() for s, _ in found):
        return
    heads = [s for s in every if s.role == HEAD]
    if heads:
        leaves[HEAD] = Leaf(METHODS[COPY], METHODS[COPY].configure())
        chosen[HEAD] = [(s, leaves[HEAD].config) for s in heads]
    info.head = bool(heads)


At = tuple[str, bool]  # site name, and whether a head's leaf stands there


def _built(
    modules: Mapping[str, nn.Module],
    every: Sequence[Site],
    leaves: Mapping[str, Leaf],
    chosen: Mapping[str, list[tuple[Site, Any]]],
    shared: Bank,
) -> dict[At, dict[str, Delta]]:
    """Every delta, by where it goes and by its leaf's path."""
    built: dict[At, dict[str, Delta]] = {}
    heads = _heads(every)
    for path, found in chosen.items():
        leaf = leaves[path]
        numbers = leaf.method.numbers(leaf.config, [_with_heads(site, heads) for site, _ in found])
        for site, config in found:
            check_reachable(modules, site.module)
            for end in (site.entry, site.leave):
                if end is not None:
                    check_reachable(modules, end)
            original(modules[site.module], site.module)
            if leaf.method.has_kv and not any(attends(modules[site.module]) for attends in ATTENDS):
                raise ValueError(
                    f"{site.name}: {leaf.method.name} runs inside transformers' attention registry, which "
                    f"{base.own_class(modules[site.module]).__name__} does not call"
                )
            here = built.setdefault((site.name, path == HEAD), {})
            made = leaf.method.make(config, site, modules[site.module], shared, path, numbers.get(site.name))
            here[path] = made
            if leaf.frozen:
                made.freeze()
    return built


Of = tuple[str, int | None, str]  # stack, layer, and "attn" or "cross" of an attention and of its matrices


def _attention_of(site: Site) -> Of:
    return site.stack, site.layer, (site.role or "").partition(".")[0]


def _heads(every: Sequence[Site]) -> dict[Of, tuple[int, int]]:
    """(n_kv_heads, d_head) of every attention; (0, 0) of two in one block that differ."""
    found: dict[Of, tuple[int, int]] = {}
    for site in every:
        if site.kind == "attention":
            at, own = _attention_of(site), (site.n_kv_heads, site.d_head)
            found[at] = own if found.get(at, own) == own else (0, 0)
    return found


def _with_heads(site: Site, heads: Mapping[Of, tuple[int, int]]) -> Site:
    """A matrix of an attention with the numbers of that attention's heads."""
    if site.kind != "linear" or _attention_of(site) not in heads:
        return site
    n_kv_heads, d_head = heads[_attention_of(site)]
    return replace(site, n_kv_heads=n_kv_heads, d_head=d_head)


def _plan(tree: Tree, name: str, built: Mapping[At, dict[str, Delta]]) -> list[tuple[Entry, Delta]]:
    """What goes to which module under which key: leaves that meet at a site are assembled as the tree says."""
    plan: list[tuple[Entry, Delta]] = []
    for (site_name, is_head), deltas in built.items():
        if is_head:
            groups: list[tuple[Delta | None, list[str]]] = [(deltas[HEAD], [HEAD])]
        elif isinstance(tree, Stack):  # the onion itself: children stand one around the other
            groups = [
                (assemble(child, deltas, str(i)), [p for p in deltas if p == str(i) or p.startswith(f"{i}.")])
                for i, child in enumerate(tree.children)
            ]
        else:
            groups = [(assemble(tree, deltas), list(deltas))]
        parts = [(part, paths) for part, paths in groups if part is not None]
        for n, (part, paths) in enumerate(parts):
            key = f"{name}|{mark(part.site)}|{n}" if mark(part.site) or n else name
            plan.append(
                (
                    Entry(part.site.module, key, dict.fromkeys(paths, site_name), part.site.entry or part.site.leave),
                    part,
                )
            )
    return plan


def _in_order(plan: Sequence[tuple[Entry, Delta]]) -> list[tuple[Entry, Delta]]:
    """The plan, where what works on the weight goes in front of what stands at other sites, of one layer too: these have no order.

    Raises ValueError where something still works on the weight around what has none.
    """
    weighed = {part.site.name for _, part in plan if part.site.role not in HEADS and _on_weight(part)}
    ordered = sorted(plan, key=lambda made: made[1].site.name not in weighed)
    at: dict[str, list[Delta]] = {}
    for entry, part in ordered:
        if part.site.kind != "span":  # which lies around all of these
            inside = at.setdefault(entry.module, [])
            if _on_weight(part):
                apart = isinstance(part, Mixed)
                check_folds([p for p in inside if not (apart and base.are_apart(p.site, part.site))], part)
            _check_left(inside, part)
            inside.append(part)
    return ordered


def _check_left(inside: Sequence[Delta], part: Delta) -> None:
    """Raise ValueError where `part`, or one under its node, replaces the weight that something inside it changes."""
    if isinstance(part, Meet):
        for n, one in enumerate(part._parts):
            _check_left(part._parts[:n] if part.op == "stack" else [], one)
    at = part.site
    lost = [p for p in inside if p.site.param == at.param and at.rows in (None, p.site.rows)]
    if lost and _all_own(part, "replaces"):
        raise ValueError(
            f"{at.name}: {names_of(lost)} would have no effect, since {names_of([part])} around it has a weight of its own in the "
            f"place of the layer's; put {names_of(lost)} around it, at other sites, or leave it out"
        )


def _on_weight(part: Delta) -> bool:
    """Does it run, or does a node run one of its children, as a folded weight?"""
    if not isinstance(part, Mixed):
        return part.has_fold and not part.fast
    return part.has_around and any(map(_on_weight, part._parts))


def _check_gradients(plan: Sequence[tuple[Entry, Delta]], every: Sequence[Site], leaves: Mapping[str, Leaf]) -> None:
    """Raise ValueError where a leaf would train inside a method through which no gradient comes back."""
    order = {site.module: i for i, site in enumerate(every)}
    for n, (end, part) in enumerate(plan):
        if not _all_own(part, "seals"):
            continue
        own = {delta.path for delta in parts_of(part)}
        for m, (entry, other) in enumerate(plan):
            if entry.module == end.module and m >= n:  # itself, and what stands around it
                continue
            for delta in parts_of(other):
                site, frozen = delta.site, leaves[delta.path].frozen
                if delta.path in own or frozen or site.layer is None and order.get(site.module, -1) > order[end.module]:
                    continue
                raise ValueError(
                    f"{site.name or 'the model'}: {names_of([delta])} would not be trained, since beside {names_of([part])} at "
                    f"{part.site.name} no gradient enters the backbone; attach them as two adapters, and train one at a time"
                )


def _all_own(part: Delta, word: str) -> bool:
    """Does it say that (`seals`, `replaces`)? A node that adds to what is inside it, or mixes with it, lets that through."""
    if isinstance(part, Mixed) or isinstance(part, Meet) and part.op == "sum":
        return False
    if isinstance(part, Meet):
        return (any if part.op == "stack" else all)(_all_own(one, word) for one in part._parts)
    own: bool = getattr(part, word)
    return own


def _commit(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    every: Sequence[Site],
    record: Record,
    name: str,
    info: Info,
    plan: Sequence[tuple[Entry, Delta]],
    shared: Bank,
) -> None:
    """Put it on the model; on any error take off again what stands."""
    try:
        if not record.infos:
            model.__dict__["_deltatune"] = record
            record.required = [n for n, p in model.named_parameters() if p.requires_grad]
            record.fingerprint = base_fingerprint(model, every)
            for p in model.parameters():
                p.requires_grad_(False)
            swap(model, "", add=root_layers(model))
        for entry, part in plan:
            info.entries.append(entry)
            place(modules, entry, part, record.frame, info.switch)
        if shared._parameters or shared._buffers:
            if "banks" not in model._modules:
                model.add_module("banks", Banks())
            banks = model._modules["banks"]
            assert isinstance(banks, Banks)
            banks[name] = shared
        for n in info.owned:
            p = model.get_parameter(n)
            info.originals[n] = p.detach().clone() if p.is_meta else p.detach().to("cpu", copy=True)
            p.requires_grad_(True)
        record.infos[name] = info
        refresh(model, record)
        for ready in ATTACHED:
            ready(model)
    except BaseException:
        record.infos.setdefault(name, info)
        Adapter(model, name)._take_off()
        raise
