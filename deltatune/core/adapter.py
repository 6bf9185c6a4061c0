"""An adapter: a named set of deltas on one model, attached, saved, loaded, merged, enabled and removed as one.

    adapter = attach(model, "lora", where="q,v", r=16)      freezes the rest, changes no value
    adapter.save("out"); load(model, "out"); adapter.merge(); adapter.unmerge(); adapter.detach()

Everything is all or nothing: an error leaves the model bit for bit as it was. Activation (`enable`, `disabled`) and
trainability (`trainable`) are two switches, and neither touches the other.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..version import VERSION
from . import base, files, tokens
from .bank import Bank
from .compose import Leaf, Node, Stack, Tree, Where, assemble, parts_of, tree_from_dict
from .errors import unknown
from .method import METHODS, Delta, Method, layer_numbers
from .runtime import ATTACHED, OWN_FIELDS, ROOT_LAYERS, Banks, Deltas, Frame, Switch, Tap, check_reachable, integrate, original, swap, walk
from .schedule import Schedule
from .site import Site, all_sites, select, slices


_NAME = re.compile(r"[A-Za-z0-9_-]+")
EVERYTHING = "everything"  # the `where` of an in-place method that trains all parameters
HEAD = "head"  # the path of the head's leaf, beside the tree's own


@dataclass(slots=True)
class Entry:
    """One thing that stands at one module: what attach put there, and under which keys."""

    module: str
    key: str
    sites: dict[str, str]  # leaf path -> site name
    entry: str | None = None  # the module that carries a span's tap


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


@dataclass(slots=True)
class Record:
    """What attach leaves on the model: the frame, the adapters, and what the base's `requires_grad` were."""

    frame: Frame
    infos: dict[str, Info] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    fingerprint: Tensor | None = None


class Adapter:
    """The handle of one adapter. It holds no state of its own: `adapters(model)` makes it anew from the model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.tree!r}, {self.params():,} parameters)"

    @property
    def _record(self) -> Record:
        record = self.model.__dict__.get("_deltatune")
        if record is None or self.name not in record.infos:
            raise ValueError(f"adapter {self.name!r} is no longer on this model")
        assert isinstance(record, Record)
        return record

    @property
    def _info(self) -> Info:
        return self._record.infos[self.name]

    @property
    def tree(self) -> Tree:
        """What was attached."""
        return self._info.tree

    def _standing(self) -> Iterator[tuple[Entry, nn.Module, Delta]]:
        for entry in self._info.entries:
            module = self.model.get_submodule(entry.module)
            standing = module._modules.get("deltas")
            if not isinstance(standing, Deltas) or entry.key not in standing:
                raise ValueError(
                    f"{entry.module}: adapter {self.name!r} stood here, but {type(module).__module__}."
                    f"{type(module).__qualname__} took the layer's place; undo that first"
                )
            yield entry, module, standing[entry.key]  # type: ignore[misc]

    @property
    def deltas(self) -> dict[tuple[str, str], Method]:
        """Every delta by (leaf path, site name)."""
        found: dict[tuple[str, str], Method] = {}
        for entry, _, delta in self._standing():
            for (path, site), part in zip(entry.sites.items(), parts_of(delta), strict=True):
                assert isinstance(part, Method)
                found[path, site] = part
        return found

    @property
    def bank(self) -> Bank | None:
        """The tensors that the sites share, where there are any."""
        banks = self.model._modules.get("banks")
        return banks[self.name] if isinstance(banks, Banks) and self.name in banks else None  # type: ignore[return-value]

    def _owned(self) -> dict[str, nn.Parameter]:
        try:
            return {n: self.model.get_parameter(n) for n in self._info.owned}
        except AttributeError as error:
            raise ValueError(
                f"adapter {self.name!r} trains a parameter that is gone ({error}); undo what took its place"
            ) from None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key in the file, parameter) of everything that this adapter trains."""
        for (path, site), delta in self.deltas.items():
            for name, p in delta.named_parameters():
                yield f"{path}.{site}.{name}", p
        if self.bank is not None:
            for name, p in self.bank.named_parameters():
                yield f"bank.{name}", p
        for name, p in self._owned().items():
            yield f"0.{name}", p

    def parameters(self) -> list[nn.Parameter]:
        """Everything that this adapter trains."""
        return [p for _, p in self.named_parameters()]

    def params(self) -> int:
        """How many numbers are trained, without a task head."""
        return sum(p.numel() for p in self.parameters()) - self.n_head

    @property
    def n_head(self) -> int:
        """How many numbers are trained in the task head."""
        return sum(p.numel() for p in self.head_parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """What is trained in the task head."""
        copies = [p for d in self.deltas.values() if d.site.role == HEAD for p in d.parameters()]
        return copies + [self.model.get_parameter(n) for n in self._info.owned_heads]

    @property
    def mergeable(self) -> bool:
        """Can all of it be folded into the base?"""
        return all(d.has_fold for _, _, d in self._standing())

    @property
    def enabled(self) -> bool:
        """Does it change the forward?"""
        return self._info.switch.on

    def enable(self) -> None:
        """Let it change the forward again."""
        if self._info.merged is not None:
            raise ValueError(f"adapter {self.name!r} is merged into the base; unmerge it first")
        self._activate(True)

    def disable(self) -> None:
        """Leave the forward as if it were not there. `requires_grad` stays as it is."""
        self._activate(False)

    def _activate(self, on: bool) -> None:
        info = self._info
        info.switch.on = on
        if not info.owned or on is not bool(info.current):
            return
        _reshard(self.model)
        with torch.no_grad():
            if not on:
                info.current = {n: p.detach().clone() for n, p in self._owned().items()}
            for name, p in self._owned().items():
                _copy(p, info.current[name] if on else info.originals[name])
            if on:
                info.current = {}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter, inside a `with`."""
        before = self.enabled
        if before:
            self.disable()
        try:
            yield
        finally:
            if before:
                self.enable()

    def trainable(self, on: bool = True) -> None:
        """Whether its parameters take gradients. It goes on changing the forward either way."""
        for p in self.parameters():
            p.requires_grad_(on)

    @property
    def schedule(self) -> Schedule:
        """The course of the training, from the methods' own."""
        own = {leaf.method.schedule for _, leaf in self.tree.leaves() if leaf.method.schedule is not None}
        if len(own) > 1:
            names = ", ".join(sorted(s.__name__ for s in own))
            raise ValueError(f"adapter {self.name!r} has several schedules ({names}); one adapter has one course")
        return (own.pop() if own else Schedule)(self)

    def groups(self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
        """The optimiser's parameter groups; the task head's rate is `lr` unless it is given one."""
        return self.schedule.groups(lr, weight_decay, head_lr)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as they are saved: leaf path, site name, tensor name. Sharded ones are gathered."""
        state: dict[str, Tensor] = {}
        for (path, site), delta in self.deltas.items():
            for name, t in delta.state_dict().items():
                state[f"{path}.{site}.{name}"] = t
        if self.bank is not None:
            state |= {f"bank.{n}": t for n, t in self.bank.state_dict().items()}
        info = self._info
        for name, p in self._owned().items():
            value = info.current.get(name, p.detach())
            if value.is_meta and not info.originals[name].is_meta:
                raise ValueError(
                    f"{name}, which adapter {self.name!r} trains in place, was offloaded since; bring it back first"
                )
            value = _whole(value)
            if not torch.equal(value.cpu(), info.originals[name]):  # what moved
                state[f"0.{name}"] = value
        return {k: _whole(t) for k, t in state.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `adapter.json` into the folder `path`, atomically.

        On sharded models every rank must call it; rank 0 writes.
        """
        info, record = self._info, self._record
        state = self.state_dict()
        table = all_sites(self.model)
        mark = base_fingerprint(self.model, table)
        if mark is None:
            raise ValueError("the base's weights are on the meta device or empty; there is nothing to say which base it is")
        sites_of: dict[str, list[str]] = {}
        for path_, site in self.deltas:
            sites_of.setdefault(path_, []).append(site)
        card = {
            "format": files.FORMAT,
            "deltatune": VERSION,
            "tree": info.tree.to_dict(),
            "head": info.head,
            "sites": sites_of,
            "in_place": info.owned,
            "backbone": backbone_id(self.model),
            "site_table": files.table_hash(table),
            "n_params": self.params(),
            "n_head": self.n_head,
            "seed": info.seed,
        }
        record.fingerprint = mark
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        files.write_adapter(path, card, {**state, files.FINGERPRINT: mark})

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take the values of a file that was saved from an adapter like this one, as a resumed run does.

        Raises ValueError, and changes nothing, where the file is damaged or holds another tree or other tensors.
        """
        card, tensors = files.read_adapter(path)
        if card["tree"] != self.tree.to_dict():
            raise ValueError(f"{path} holds {card['tree']}, the adapter {self.name!r} is {self.tree.to_dict()}")
        tensors.pop(files.FINGERPRINT, None)
        _fill(self, path, tensors)

    def _check_merge(self) -> None:
        if self._info.merged is not None:
            raise ValueError(f"adapter {self.name!r} is merged already")
        if not self.enabled:
            raise ValueError(f"adapter {self.name!r} is disabled; enable it before merging")
        self._check_place()
        shared: dict[int, list[str]] = {}
        for name, module in walk(self.model):
            for key, p in module._parameters.items():
                if p is not None:
                    shared.setdefault(id(p), []).append(f"{name}.{key}")
        for entry, module, delta in self._standing():
            site = delta.site
            if not delta.has_fold:
                names = sorted({getattr(d, "name", "?") for d in parts_of(delta)})
                raise ValueError(f"{site.name}: {', '.join(names)} cannot be merged: it defines no fold")
            kept = base.stored(module, site)
            if not any(kept is t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values())):
                raise ValueError(
                    f"{site.name}: its weight is computed (parametrized?); what is merged into it would be lost"
                )
            if kept.is_meta:
                raise ValueError(
                    f"{site.name}: its weight is offloaded or on the meta device; there is nothing to merge into"
                )
            tied = shared.get(id(kept), [])
            if len(tied) > 1:
                raise ValueError(f"{site.name}: cannot merge, its weight is tied: {', '.join(tied)}")
            for key, other in module.deltas.items():  # type: ignore[operator, union-attr]
                if key == entry.key:
                    break
                if other.switch.on and key.partition("|")[0] != self.name:
                    raise ValueError(
                        f"{site.name}: adapter {key.partition('|')[0]!r} stands inside {self.name!r} there; merge it first"
                    )

    def merge(self) -> None:
        """Write `fold` into the base. The saved originals stay for `unmerge`; `detach` makes it final.

        Raises ValueError, and changes nothing, where a method has no fold, a weight is tied or quantised, or another
        adapter stands inside this one.
        """
        self._check_merge()
        info = self._info
        kept: dict[str, SimpleNamespace] = {}
        done: list[tuple[nn.Module, Site, SimpleNamespace]] = []
        try:
            for entry, module, delta in self._standing():
                mark = f"{entry.module}|{delta.site.param}"
                if mark not in kept:
                    kept[mark] = base.snapshot(module, delta.site)
                    done.append((module, delta.site, kept[mark]))
                with torch.no_grad():
                    base.write(module, delta.site, *base.folded(module, [delta]))
        except Exception:
            for module, site, snapshot in done:
                base.write_back(module, site, snapshot)
            raise
        if not info.owned:  # what was trained in place is in the base already
            self._activate(False)
        info.merged = kept

    def unmerge(self) -> None:
        """Restore the saved originals, bit for bit, and run as a delta again."""
        info = self._info
        if info.merged is None:
            raise ValueError(f"adapter {self.name!r} is not merged")
        self._check_place()
        for entry, module, delta in self._standing():
            base.write_back(module, delta.site, info.merged[f"{entry.module}|{delta.site.param}"])
        info.merged = None
        self._activate(True)

    def _check_place(self) -> None:
        """Raise ValueError where others took a layer's place or swapped its class since: before anything is changed."""
        if any(hasattr(p, "full_tensor") for p in self.parameters()):
            raise ValueError(f"adapter {self.name!r} is sharded; attach, detach and merge before sharding")
        for name, module in walk(self.model):
            original(module, name)

    def detach(self) -> None:
        """Take it off the model: classes, keys, values and `requires_grad` are those from before, bit for bit.

        A merged adapter stays merged.
        """
        self._check_place()
        self._take_off()

    def _take_off(self) -> None:
        """`detach` of what stands, be it half of the adapter: what an attach that failed falls back on."""
        record, info = self._record, self._info
        owned = self._owned()
        if info.owned and info.merged is None:
            with torch.no_grad():
                for name, kept in info.originals.items():
                    _copy(owned[name], kept)
        for p in owned.values():
            p.requires_grad_(False)
        for entry in info.entries:
            for name in (entry.module, entry.entry):
                if name is not None:
                    _remove(self.model.get_submodule(name), name, entry.key)
        banks = self.model._modules.get("banks")
        if isinstance(banks, Banks) and self.name in banks:
            del banks[self.name]
            if not banks:
                del self.model.banks
        del record.infos[self.name]
        _refresh(self.model, record)
        if not record.infos:
            _release(self.model, record)


def attach(
    model: nn.Module,
    method: "str | Tree",
    *,
    name: str = "default",
    where: "Where | list[str]" = None,
    layers: Any = None,
    head: str | None = "auto",
    seed: int = 0,
    **hyper: Any,
) -> Adapter:
    """Freeze the backbone and put one method, or a tree of them, on the sites that `where` selects, in place.

    `method` is a name of the registry, with its hyperparameters as keywords, or a tree such as `dt.LoRA(r=16)`.
    `head="auto"` trains the task head beside it, where the backbone has one; `head=None` does not. `seed` draws what
    sites share; the tensors' own starts come from torch's generator.

    Raises ValueError, and changes nothing, on an unknown method, hyperparameter or place, on a number that does not fit
    a site, on a second adapter of one name, or where a delta would have no effect.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        tree: Tree = METHODS[method](**hyper)  # type: ignore[assignment]
    elif isinstance(method, (Leaf, Node)):
        if hyper:
            raise unknown("argument of attach", sorted(hyper)[0], ("name", "where", "layers", "head", "seed"))
        tree = method
    else:
        raise ValueError(f"method must be a name such as 'lora' or a tree such as dt.LoRA(r=8), not {method!r}")
    if head not in ("auto", None):
        raise ValueError(f"head must be 'auto' or None, not {head!r}")
    tree = _placed(tree, tuple(where) if isinstance(where, list) else where, layer_numbers(layers))
    return _attach(model, tree, name, seed, head == "auto", None)


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", trainable: bool = False) -> Adapter:
    """Put a saved adapter on the model.

    Raises ValueError, and changes nothing, where the file is damaged, was made for another backbone (another site
    table, or other values at the fingerprint's positions), or does not hold exactly the tensors that it declares.
    """
    card, tensors = files.read_adapter(path)
    try:
        tree = tree_from_dict(card["tree"], METHODS)
    except ValueError as error:
        raise ValueError(f"{path}: its tree cannot be read: {error}") from None
    mark = tensors.pop(files.FINGERPRINT, None)
    if mark is None:
        raise ValueError(f"{path}: it has no fingerprint of its base")
    table = all_sites(model)
    if card["site_table"] != files.table_hash(table):
        known = {s.name for s in table}
        gone = [s for ss in card["sites"].values() for s in ss if s not in known]
        detail = f"; the sites {', '.join(gone[:3])} are not here" if gone else ""
        raise ValueError(f"{path} was made for {card['backbone']}, whose layers are not those of this model{detail}")
    own = base_fingerprint(model, table)
    if own is not None and not files.same_base(mark, own):
        raise ValueError(f"{path} was made for {card['backbone']} with other weights: this base has the same shape, not the same values")
    adapter = _attach(model, tree, name, card["seed"], card["head"], card["sites"], card["in_place"])
    try:
        _fill(adapter, path, tensors)
        adapter.trainable(trainable)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def _fill(adapter: Adapter, path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into the adapter. Raises ValueError, and changes nothing, where they are not its own."""
    _reshard(adapter.model)
    targets: dict[str, Tensor] = {}
    for (leaf, site), delta in adapter.deltas.items():
        targets |= {f"{leaf}.{site}.{n}": t for n, t in delta.state_dict(keep_vars=True).items()}
    if adapter.bank is not None:
        targets |= {f"bank.{n}": t for n, t in adapter.bank.state_dict(keep_vars=True).items()}
    owned = {f"0.{n}": p for n, p in adapter._owned().items()}
    want = targets | {k: p for k, p in owned.items() if k in tensors}  # of what is trained in place, the file has what moved
    files.check_keys(str(path), {k: tuple(t.shape) for k, t in want.items()}, tensors)
    with torch.no_grad():
        for name, kept in adapter._info.originals.items():
            if f"0.{name}" not in tensors:
                _copy(owned[f"0.{name}"], kept)
        for key, target in want.items():  # in one order on every rank: a file's own order is not
            _copy(target, tensors[key])


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 drop what a forward left gathered: what is written there would be lost."""
    for _, module in walk(model):
        if hasattr(type(module), "reshard") and hasattr(type(module), "unshard"):
            module.reshard()  # type: ignore[operator]


def _whole(t: Tensor) -> Tensor:
    """The tensor, gathered where it is sharded; then every rank has to ask."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _copy(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor's values into `target`, each rank its shard."""
    if hasattr(target, "full_tensor") and not hasattr(value, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # late: torch without distributed has none

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on the model by name, also after deepcopy, pickle, spawn and sharding."""
    record = model.__dict__.get("_deltatune")
    return {n: Adapter(model, n) for n in record.infos} if record is not None else {}


def _placed(tree: Tree, where: Where, layers: Any) -> Tree:
    """The tree with `where` and `layers` given to every leaf that has none of its own."""
    if isinstance(tree, Leaf):
        return Leaf(
            tree.method, tree.config, where if tree.where is None else tree.where, layers if tree.layers is None else tree.layers
        )
    return type(tree)(*(_placed(c, where, layers) for c in tree.children))


def _attach(
    model: nn.Module,
    tree: Tree,
    name: str,
    seed: int,
    head: bool,
    places: Mapping[str, list[str]] | None,
    owned: Iterable[str] | None = None,
) -> Adapter:
    """`places`: leaf path -> site names, from a file; None resolves the leaves' own `where`."""
    integrate()
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
            raise ValueError(f"{at or 'the model'} comes from torch.compile; attach to the model itself, then compile it")
        if at and "_deltatune" in module.__dict__:
            raise ValueError(f"{at} has adapters of its own; attach to one model, not to it and to a part of it")
    if record is None and any(hasattr(type(m), "_deltatune_class") for m in modules.values()):
        raise ValueError("this module is part of a model with adapters; attach to that model")
    every = all_sites(model)
    table = {part.name: part for s in every for part in (s, *slices(s))}
    leaves = dict(tree.leaves())
    in_place = [leaf.method for leaf in leaves.values() if leaf.method.in_place]
    if in_place and len(leaves) > 1:
        raise ValueError(f"{in_place[0].name} trains the base itself; it cannot be part of a tree")

    info = Info(tree, seed, head)
    if in_place:
        info.owned = list(owned) if owned is not None else _claims(model, every, leaves["0"])
        for n in info.owned:
            try:
                model.get_parameter(n)
            except AttributeError:
                raise ValueError(f"the base has no parameter {n}, which the adapter trained") from None
            if base.offloaded(modules[n.rpartition(".")[0]], n.rpartition(".")[2]) is not None:
                raise ValueError(
                    f"{n} is offloaded by accelerate; {in_place[0].name} trains it in place, where no gradient reaches it"
                )
        for other, their in (record.infos if record else {}).items():
            both = set(info.owned) & set(their.owned)
            if both:
                raise ValueError(f"{min(both)} is trained in place by adapter {other!r} already")
        heads = {s.module for s in table.values() if s.role == HEAD}
        info.owned_heads = [n for n in info.owned if n.rpartition(".")[0] in heads]
        info.head = head = False

    chosen: dict[str, tuple[Site, ...]] = {}
    for path, leaf in leaves.items():
        if not leaf.method.in_place:
            chosen[path] = _choose(every, table, path, leaf, places)
    if head and not any(s.role == HEAD for ss in chosen.values() for s in ss):
        found = tuple(s for s in table.values() if s.role == HEAD)
        if found:
            method = METHODS["copy"]
            leaves[HEAD] = Leaf(method, method.configure())
            chosen[HEAD] = found
        info.head = bool(found)

    # build everything before the model is touched
    shared = Bank(seed)
    at: dict[tuple[str, str, Any], dict[str, Delta]] = {}
    for path, found in chosen.items():
        leaf = leaves[path]
        for site in found:
            check_reachable(modules, site.module)
            if site.entry is not None:
                check_reachable(modules, site.entry)
            original(modules[site.module], site.module)
            at.setdefault((site.module, site.name, HEAD if path == HEAD else ""), {})[path] = leaf.method.make(
                leaf.config, site, modules[site.module], shared
            )
    frame = record.frame if record is not None else Frame()
    plan: list[tuple[Entry, Delta]] = []
    for (module, site_name, kind), deltas in at.items():
        if kind == HEAD:
            groups = [(deltas[HEAD], {HEAD: site_name})]
        elif isinstance(tree, Stack):  # the onion itself: children stand one around the other
            groups = []
            for i, child in enumerate(tree.children):
                part = assemble(child, deltas, str(i))
                if part is not None:
                    own = {p: site_name for p in deltas if p == str(i) or p.startswith(f"{i}.")}
                    groups.append((part, own))
        else:
            part = assemble(tree, deltas)
            assert part is not None
            groups = [(part, {p: site_name for p in deltas})]
        for n, (part, own) in enumerate(groups):
            mark = _mark(part.site)
            key = f"{name}|{mark}|{n}" if mark or n else name
            plan.append((Entry(module, key, own, part.site.entry), part))
    if not plan and not info.owned:
        raise ValueError(f"{tree!r} trains nothing on this model" + ("" if head else ": it has no task head"))

    first = record is None
    record = record or Record(frame)
    try:
        if first:
            model.__dict__["_deltatune"] = record
            record.required = [n for n, p in model.named_parameters() if p.requires_grad]
            record.fingerprint = base_fingerprint(model, every)
            for p in model.parameters():
                p.requires_grad_(False)
            swap(model, "", add=_root_layers(model))
        for entry, part in plan:
            info.entries.append(entry)
            _place(modules, entry, part, frame, info.switch)
        if len(shared._parameters) + len(shared._buffers):
            if "banks" not in model._modules:
                model.banks = Banks()
            model.banks[name] = shared  # type: ignore[index, operator]
        for n in info.owned:
            p = model.get_parameter(n)
            info.originals[n] = p.detach().clone() if p.device.type == "meta" else p.detach().to("cpu", copy=True)
            p.requires_grad_(True)
        record.infos[name] = info
        _refresh(model, record)
        for ready in ATTACHED:
            ready(model)
    except BaseException:
        record.infos.setdefault(name, info)
        Adapter(model, name)._take_off()
        raise
    return Adapter(model, name)


def _mark(site: Site) -> str:
    """What tells this site from others whose deltas stand at the same module."""
    if site.name == site.module:
        return ""
    return site.param if site.kind == "experts" else re.split(r"[:\[]", site.name)[-1].rstrip("]")


def _claims(model: nn.Module, every: Sequence[Site], leaf: Leaf) -> list[str]:
    """The base's parameters that an in-place method trains: all of them, or those of the selected sites."""
    where = leaf.method.where if leaf.where is None else leaf.where
    chosen = None if where == EVERYTHING else {s.module for s in select(every, where, leaf.layers)}
    if chosen is None and leaf.layers is not None:
        raise ValueError(f"{leaf.method.name} trains every parameter; layers={leaf.layers} needs a `where` beside it")
    seen: set[int] = set()
    found = []
    for at, module in walk(model):
        for key, p in module._parameters.items():
            if p is not None and id(p) not in seen and (chosen is None or at in chosen):
                seen.add(id(p))
                found.append(f"{at}.{key}" if at else key)
    return found


def _choose(
    every: Sequence[Site], table: Mapping[str, Site], path: str, leaf: Leaf, places: Mapping[str, list[str]] | None
) -> tuple[Site, ...]:
    method = leaf.method
    if places is not None:
        gone = [n for n in places.get(path, ()) if n not in table]
        if gone:
            raise unknown("site", gone[0], table)
        return tuple(table[n] for n in places.get(path, ()))
    where = method.where if leaf.where is None else leaf.where
    selected = select(every, where, leaf.layers, method.kinds)
    found = tuple(s for s in selected if method.fits(leaf.config, s))
    if not found:
        raise ValueError(f"{method.name} fits none of the {len(selected)} sites that {where!r} selects, {selected[0].name} first")
    return found


def _place(modules: Mapping[str, nn.Module], entry: Entry, part: Delta, frame: Frame, switch: Switch) -> None:
    for delta in (part, *parts_of(part)):
        delta.__dict__["frame"], delta.__dict__["switch"] = frame, switch
    if entry.entry is not None:
        part.tap = f"{entry.module}|{entry.key}"
        _add(modules[entry.entry], entry.entry, entry.key, Tap(part), "site")
    if part.site.kind == "input":
        limit = tokens.n_positions(modules[entry.module])
        size = max((getattr(p, "n", 0) for p in parts_of(part)), default=0)
        if limit is not None and size >= limit:
            raise ValueError(f"{part.site.name or 'the model'}: {size} soft tokens leave no room in {limit} positions")
        modules[entry.module].__dict__["_deltatune_positions"] = limit
        if part.site.stack == "encoder":  # the decoder's cross-attention has to see them
            for s in all_sites(modules[""]):
                if s.kind == "input" and s.stack == "decoder":
                    swap(modules[s.module], s.module, add=("input",))
    _add(modules[entry.module], entry.module, entry.key, part, "input" if part.site.kind == "input" else "site")


def _add(module: nn.Module, name: str, key: str, delta: Delta, layer: str) -> None:
    if "deltas" not in module._modules:
        if hasattr(module, "deltas"):
            raise ValueError(f"{name}: {type(module).__name__} has an attribute 'deltas' of its own")
        module.deltas = Deltas()
    module.deltas[key] = delta  # type: ignore[index, operator]
    swap(module, name, add=(layer,))


def _remove(module: nn.Module, name: str, key: str) -> None:
    deltas = module._modules.get("deltas")
    if isinstance(deltas, Deltas) and key in deltas:
        del deltas[key]
    if isinstance(deltas, Deltas) and not deltas:
        del module.deltas
        swap(module, name, drop=("site", "input"))
    if "deltas" not in module._modules:
        module.__dict__.pop("_deltatune_positions", None)


def _refresh(model: nn.Module, record: Record) -> None:
    """Set what depends on all adapters together: who reads the call, and the blocks that have to carry it."""
    frame = record.frame
    readers: list[Delta] = []
    for name in record.infos:
        for _, _, delta in Adapter(model, name)._standing():
            readers += [d for d in parts_of(delta) if d.reads_call]
    frame.readers = len(readers)
    frame.wanted = frozenset(n for n in OWN_FIELDS for d in readers if n in getattr(d, "reads", ()))
    carriers = {""} if readers else set()
    if readers:
        blocks = [s.module for s in all_sites(model) if s.kind == "block"]
        carriers = {b for b in blocks for d in readers if d.site.module == b or d.site.module.startswith(b + ".")}
    for name, module in walk(model):
        if name in carriers:
            module.__dict__["_deltatune_frame"] = frame
            swap(module, name, add=("block",))
        elif "_deltatune_frame" in module.__dict__:
            del module.__dict__["_deltatune_frame"]
            swap(module, name, drop=("block",))


def _release(model: nn.Module, record: Record) -> None:
    for name, module in walk(model):
        if hasattr(type(module), "_deltatune_class"):
            swap(module, name, drop=("root", "site", "input", "block", *_root_layers(model)))
    required = set(record.required)
    for n, p in model.named_parameters():
        p.requires_grad_(n in required)
    del model.__dict__["_deltatune"]


def _root_layers(model: nn.Module) -> tuple[str, ...]:
    return ("root", *(name for name, applies in ROOT_LAYERS.items() if applies(model)))


def base_fingerprint(model: nn.Module, table: Iterable[Site]) -> Tensor | None:
    """The base's fingerprint, of the values before any adapter moved them in place or was merged."""
    record: Record | None = model.__dict__.get("_deltatune")
    moved: dict[str, Tensor] = {}
    for info in record.infos.values() if record else ():
        moved |= info.originals
        for mark, kept in (info.merged or {}).items():
            at = mark.partition("|")[0]
            moved[f"{at}.weight"] = kept.weight
            if kept.bias is not None:
                moved[f"{at}.bias"] = kept.bias
    chosen: dict[str, Tensor] = {}
    for site in table:
        if site.role in ("head", "lm_head", "pooler") or site.kind not in ("embedding", "norm", "linear"):
            continue
        module = model.get_submodule(site.module)
        for key in ("weight", "bias"):
            p = module._parameters.get(key)
            if p is None or (key == "weight" and site.kind == "linear"):
                continue
            if hasattr(p, "full_tensor"):  # sharded: what was read before sharding stands
                return record.fingerprint if record else None
            if p.is_meta and (kept_away := base.offloaded(module, key)) is not None:
                p = kept_away
            chosen[f"{site.module}.{key}"] = moved.get(f"{site.module}.{key}", p)
    return files.fingerprint(chosen)


def backbone_id(model: nn.Module) -> str:
    """The backbone's name on the hub or of its configuration; never a path."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name):
        return str(name)
    own, *_ = getattr(type(model), "_deltatune_class", (type(model),))  # sharding gives the class another name
    return str(getattr(config, "model_type", "") or own.__name__)
