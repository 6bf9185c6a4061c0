"""An adapter: a named set of deltas on one model, saved, merged, enabled and removed as one.

Activation (`enable`, `disabled`) and trainability (`trainable`) are two switches, and neither touches the other. An
error leaves the model bit for bit as it was.
"""

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..version import VERSION
from . import base, files, shapes, storage
from .bank import Bank
from .compose import Leaf, Tree, parts_of
from .errors import unknown
from .identity import backbone_id, base_fingerprint, check_base, check_layers, table_hash
from .method import Delta, Method
from .probe import probe
from .ragged import ragged_in, refill
from .record import HEAD, Entry, Info, Record, refresh, release, remove, standing
from .runtime import Banks, dtype_of, original, swap, walk
from .schedule import Schedule
from .sharded import assign, whole
from .site import Site, all_sites

WRITERS: dict[
    str, Callable[..., None]
] = {}  # another library's format -> who writes it; `deltatune/__init__.py` fills it


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
        return standing(self.model, self._info, self.name)

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

    def owned(self) -> dict[str, nn.Parameter]:
        """The base's own parameters that an in-place method trains, by name."""
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
        for name, p in self.owned().items():
            yield f"0.{name}", p

    def parameters(self) -> list[nn.Parameter]:
        """Everything that this adapter trains."""
        return [p for _, p in self.named_parameters()]

    def params(self) -> int:
        """How many numbers are trained, without a task head."""
        n = sum(p.numel() for p in self.parameters()) - self.n_head
        (leaf, *_) = (leaf for _, leaf in self.tree.leaves())
        return leaf.method.n_moving(leaf.config, n) if self._info.owned else n

    @property
    def n_head(self) -> int:
        """How many numbers are trained in the task head."""
        return sum(p.numel() for p in self.head_parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """What is trained in the task head."""
        copies = [p for d in self.deltas.values() if d.site.role == HEAD for p in d.parameters()]
        return copies + [self.model.get_parameter(n) for n in self._info.owned_heads]

    def lr_factors(self) -> dict[int, float]:
        """id of a parameter -> what its learning rate is a multiple by, where that is not 1."""
        found: dict[int, float] = {}
        for delta in self.deltas.values():
            own = dict(delta.named_parameters(recurse=False))
            for key, slot in delta.slots_of(delta.config).items():
                factor = float(getattr(delta, slot.lr)) if slot.lr else 1.0
                if factor != 1.0 and slot.train:
                    found[id(delta.bank_parameter(key) if slot.shared else own[key])] = factor
        return found

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
                info.current = {n: p.detach().clone() for n, p in self.owned().items()}
            for name, p in self.owned().items():
                assign(p, info.current[name] if on else info.originals[name])
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

    @property
    def seed(self) -> int:
        """What its shared tensors, and whatever is random in its course, are drawn from."""
        return self._info.seed

    @property
    def calibrated(self) -> dict[str, Tensor]:
        """What `calibrate` found, by name of the parameter."""
        return self._info.calibrated

    @calibrated.setter
    def calibrated(self, found: dict[str, Tensor]) -> None:
        self._info.calibrated = found

    def calibrate(
        self, batches: Iterable[Mapping[str, Tensor]], loss: Callable[[nn.Module, Any], Tensor] | None = None
    ) -> None:
        """Let the schedule look at data before training: masks and starts that depend on gradients need it.

        `loss(model, batch)` is by default `model(**batch).loss`. The model is left as it was.
        """
        self.schedule.calibrate(batches, loss or (lambda model, batch: model(**batch).loss))

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
        for name, p in self.owned().items():
            value = info.current.get(name, p.detach())
            if value.is_meta and not info.originals[name].is_meta:
                raise ValueError(
                    f"{name}, which adapter {self.name!r} trains in place, was offloaded since; bring it back first"
                )
            value = whole(value)
            if not torch.equal(value.cpu(), info.originals[name]):  # what moved
                state[f"0.{name}"] = value
        return {k: whole(t) for k, t in state.items()}

    def finished(self) -> tuple[Tree, dict[str, Tensor]]:
        """The tree and the tensors without what only training needs: what `save` writes."""
        leaves: dict[str, Leaf] = dict(self.tree.leaves())
        state, owned = self.state_dict(), {f"0.{n}" for n in self._info.owned}
        kept = {key: t for key, t in state.items() if key in owned}
        bank = None if self.bank is None else _gathered(self.bank)
        done: dict[str, Leaf] = {}
        for (path, site), delta in self.deltas.items():
            twin = _gathered(delta)
            if bank is not None:
                twin.__dict__["_bank"] = (bank, delta.__dict__["_bank"][1])
            with torch.no_grad():
                leaf, tensors = twin.finished(leaves.get(path) or Leaf(type(delta), delta.config))
            assert done.setdefault(path, leaf) == leaf, f"{path}: its sites are finished in different ways"
            for key, slot in leaf.method.slots_of(leaf.config).items():
                if slot.shared and key in tensors:
                    made = tensors.pop(key)
                    kept[f"bank.{delta.bank_key(key, slot, tuple(made.shape))}"] = made
                elif slot.shared and slot.train:
                    name = f"bank.{delta.__dict__['_bank'][1][key]}"
                    kept[name] = state[name]
            kept |= {f"{path}.{site}.{name}": t for name, t in tensors.items()}
        return self.tree.replaced(done), kept

    def is_finished(self) -> bool:
        """Does `save` keep all that training goes on from?"""
        (tree, kept), state = self.finished(), self.state_dict()
        return tree == self.tree and {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in state.items()}

    def save(self, path: str | os.PathLike[str], *, format: str = "deltatune", resumable: bool = False) -> None:
        """Write `adapter.safetensors` and `adapter.json` into the folder `path`, atomically.

        What only training needs (the network that makes a prefix, the scores behind a mask) is left out, unless the file is
        to be trained on from: `resumable=True`. `format="peft"` writes what HF PEFT reads instead. On sharded models every
        rank must call it; rank 0 writes.
        """
        if format != "deltatune":
            if format not in WRITERS:
                raise unknown("format", format, ["deltatune", *WRITERS])
            if resumable:
                raise ValueError(
                    f"format={format!r} holds a finished adapter; a resumable one is saved in our own format"
                )
            WRITERS[format](self, path)
            return
        info, record = self._info, self._record
        tree, state = (info.tree, self.state_dict()) if resumable else self.finished()
        ragged = any(leaf.method.ragged for _, leaf in tree.leaves())
        table = all_sites(self.model)
        mark = base_fingerprint(self.model, table)
        if mark is None:
            raise ValueError(
                "the base's weights are on the meta device or empty; there is nothing to say which base it is"
            )
        sites_of: dict[str, list[str]] = {}
        for path_, site in self.deltas:
            sites_of.setdefault(path_, []).append(site)
        card = {
            "format": files.FORMAT,
            "deltatune": VERSION,
            "tree": tree.to_dict(),
            "head": info.head,
            "sites": sites_of,
            "in_place": info.owned,
            "backbone": backbone_id(self.model),
            "site_table": table_hash(table),
            "n_params": self.params() if tree == info.tree and not ragged else _n_trained(self, tree, state),
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
        check_base(self.model, path, card, tensors)
        fill(self, path, tensors)

    def set(self, **hyper: Any) -> None:
        """Change hyperparameters that no tensor depends on, here and now: how many layers `adapter_drop` leaves out.

        Raises ValueError, and changes nothing, where no method of the tree lets that one be changed.
        """
        leaves: dict[str, Leaf] = dict(self.tree.leaves())
        changed = dict(leaves)
        for key, value in hyper.items():
            mine = {path: leaf for path, leaf in changed.items() if key in leaf.method.live}
            if not mine:
                raise unknown(
                    "hyperparameter that can change on a standing adapter",
                    key,
                    [name for leaf in leaves.values() for name in leaf.method.live],
                )
            for path, leaf in mine.items():
                leaf.method.configure(**{**asdict(leaf.config), key: value})
                changed[path] = leaf.changed(**{key: value})
        for path, leaf in changed.items():
            if leaf is not leaves[path]:
                leaf.method.check_set(leaf.config, [d for (p, _), d in self.deltas.items() if p == path])
        for (path, _), delta in self.deltas.items():
            for key, value in hyper.items():
                if path in changed and key in changed[path].method.live:
                    delta.config = replace(delta.config, **{key: value})
                    setattr(delta, key, value)
        self._info.tree = self.tree.replaced(changed)

    def probe(self, *args: Any, **kwargs: Any) -> None:
        """Run the model on one batch and raise ValueError naming every delta that has no effect on its outputs."""
        probe(self, *args, **kwargs)

    def _check_merge(self, requantise: bool) -> None:
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
            kept, kind = base.stored(module, site), storage.format_of(module, site.param)
            if kind is not None and site.kind != "linear":
                raise ValueError(f"{site.name}: cannot merge into a quantised {site.kind} ({kind.name})")
            if kind is not None and requantise and kind.write is None:
                raise ValueError(f"{site.name}: {kind.name} cannot be written here; merge without requantise")
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

    def merge(self, requantise: bool = False) -> None:
        """Write `fold` into the base. The saved originals stay for `unmerge`; `detach` makes it final.

        A quantised layer is a plain one afterwards, in the model's dtype. With `requantise` it is quantised again, which
        loses what lies between its steps: a warning says how much.

        Raises ValueError, and changes nothing, where a method has no fold, a weight is tied, its format cannot be written, or
        another adapter stands inside this one.
        """
        self._check_merge(requantise)
        info = self._info
        kept: dict[str, SimpleNamespace] = {}
        done: list[tuple[str, nn.Module, Site, SimpleNamespace]] = []
        try:
            for entry, module, delta in self._standing():
                mark = f"{entry.module}|{delta.site.param}"
                if mark not in kept:
                    kept[mark] = base.snapshot(module, delta.site)
                    done.append((entry.module, module, delta.site, kept[mark]))
                with torch.no_grad():
                    weight, bias = base.folded(module, [delta])
                    if base.quantised(module, delta.site):
                        base.unquantise(module, delta.site, dtype_of(self.model))
                        swap(module, entry.module, own=nn.Linear)
                    base.write(module, delta.site, weight, bias)
            if requantise:
                self._requantise(done)
        except Exception:
            for step in done:
                _write_back(*step)
            raise
        if not info.owned:
            self._activate(False)
        elif info.entries:  # what was trained in place is in the base already; the head beside it is now
            info.switch.on = False
        info.merged = kept

    def _requantise(self, done: Sequence[tuple[str, nn.Module, Site, SimpleNamespace]]) -> None:
        lost = {}
        for name, module, site, snapshot in done:
            if snapshot.cls is not None:
                weight, bias = base.matrix(module, site), base.bias_of(module, site)
                _write_back(name, module, site, snapshot)
                lost[name] = base.requantise(module, site, weight)
                if isinstance(bias, nn.Parameter):
                    module._parameters["bias"] = bias
        if lost:
            worst = max(lost, key=lambda name: lost[name])
            warnings.warn(
                f"adapter {self.name!r} was merged into {len(lost)} quantised layers, which keep its weights with a relative "
                f"error of {sum(lost.values()) / len(lost):.3g} on average, {lost[worst]:.3g} at {worst}",
                stacklevel=3,
            )

    def unmerge(self) -> None:
        """Restore the saved originals, bit for bit, and run as a delta again."""
        info = self._info
        if info.merged is None:
            raise ValueError(f"adapter {self.name!r} is not merged")
        self._check_place()
        for entry, module, delta in self._standing():
            _write_back(entry.module, module, delta.site, info.merged[f"{entry.module}|{delta.site.param}"])
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
        owned = self.owned()
        if info.owned and info.merged is None:
            with torch.no_grad():
                for name, kept in info.originals.items():
                    assign(owned[name], kept)
        for p in owned.values():
            p.requires_grad_(False)
        for entry in info.entries:
            for at in (entry.module, entry.entry):
                if at is not None:
                    remove(self.model.get_submodule(at), at, entry.key)
        banks = self.model._modules.get("banks")
        if isinstance(banks, Banks) and self.name in banks:
            del banks[self.name]
            if not banks:
                del self.model.banks
        del record.infos[self.name]
        refresh(self.model, record)
        if not record.infos:
            release(self.model, record)


def _write_back(name: str, module: nn.Module, site: Site, kept: SimpleNamespace) -> None:
    base.write_back(module, site, kept)
    if kept.cls is not None:
        swap(module, name, own=kept.cls)


def _n_trained(adapter: Adapter, tree: Tree, state: Mapping[str, Tensor]) -> int:
    """How many numbers the adapter's sites would train under the leaves of `tree` and its `state`, without the head."""
    n, shared, leaves = 0, dict[str, int](), dict(tree.leaves())
    for (path, site), delta in adapter.deltas.items():
        leaf = leaves.get(path)
        if leaf is None or leaf.frozen:
            continue
        for key, slot in leaf.method.slots_of(leaf.config).items():
            held = state.get(f"{path}.{site}.{key}")
            if not slot.shared:  # a site may not have it at all
                n += held.numel() if slot.train and held is not None else 0
            elif slot.train:
                if key in delta.__dict__["_bank"][1]:
                    shape = tuple(delta.bank_parameter(key).shape)
                else:
                    shape = shapes.sizes(slot.shape, delta.dims(base.Base(adapter.model, delta.site)))
                shared[delta.bank_key(key, slot, shape)] = math.prod(shape)
    return n + sum(shared.values())


def _gathered(module: nn.Module) -> Any:
    """A shallow copy whose own tensors are whole, also where the module's are sharded."""
    twin = copy.copy(module)
    for name, child in module.named_modules():
        own = twin if not name else copy.copy(child)
        own.__dict__["_parameters"] = {
            k: None if p is None else whole(p.detach()) for k, p in child._parameters.items()
        }
        own.__dict__["_modules"] = dict(child._modules)
        if name:
            twin.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = own
    return twin


def fill(adapter: Adapter, path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into the adapter. Raises ValueError, and changes nothing, where they are not its own."""
    _reshard(adapter.model)
    deltas = {f"{leaf}.{site}": delta for (leaf, site), delta in adapter.deltas.items()}
    targets = {f"{at}.{n}": t for at, delta in deltas.items() for n, t in delta.state_dict(keep_vars=True).items()}
    ragged = ragged_in(path, tensors, deltas)
    if adapter.bank is not None:
        targets |= {f"bank.{n}": t for n, t in adapter.bank.state_dict(keep_vars=True).items()}
    owned = {f"0.{n}": p for n, p in adapter.owned().items()}
    want = targets | {
        k: p for k, p in owned.items() if k in tensors
    }  # of what is trained in place, the file has what moved
    shapes_here = {k: tuple((tensors[k] if k in ragged else t).shape) for k, t in want.items()}
    files.check_keys(str(path), shapes_here, tensors)
    check_layers(adapter.model, path, deltas, tensors)
    with torch.no_grad():
        for name, kept in adapter._info.originals.items():
            if f"0.{name}" not in tensors:
                assign(owned[f"0.{name}"], kept)
        for key, target in want.items():  # in one order on every rank: a file's own order is not
            if key in ragged:
                refill(*ragged[key], tensors[key])
            else:
                assign(target, tensors[key])


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 drop what a forward left gathered: what is written there would be lost."""
    for _, module in walk(model):
        if hasattr(type(module), "reshard") and hasattr(type(module), "unshard"):
            module.reshard()  # type: ignore[operator]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on the model by name, also after deepcopy, pickle, spawn and sharding."""
    record = model.__dict__.get("_deltatune")
    return {n: Adapter(model, n) for n in record.infos} if record is not None else {}


@contextlib.contextmanager
def only(there: Mapping[str, Adapter], names: Collection[str]) -> Iterator[None]:
    """Exactly these adapters change the forward, inside a `with`."""
    before = {name: adapter.enabled for name, adapter in there.items()}
    try:
        for name, adapter in there.items():
            if adapter.enabled is not (name in names):
                (adapter.disable if adapter.enabled else adapter.enable)()
        yield
    finally:
        for name, adapter in there.items():
            if adapter.enabled is not before[name]:
                (adapter.disable if adapter.enabled else adapter.enable)()
