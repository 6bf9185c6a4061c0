"""What is combined: folders of ours and of HF PEFT's, adapters, and what trains the base itself."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core import base, files
from ..core.adapter import Adapter
from ..core.attach import load, loaded
from ..core.compose import Tree, tree_from_dict
from ..core.method import METHODS
from ..core.record import HEAD
from ..core.site import Site, all_sites
from ..core.sources import Saved, read
from ..methods.lora import LoRA


@dataclass(frozen=True)
class Source(Saved):
    """A saved adapter of this base, under the name that the user knows it by."""

    label: str
    number: int

    @property
    def in_place(self) -> list[str]:
        """The base's parameters that it trains."""
        return list(self.card["in_place"])

    def plan(self) -> Tree:
        """Its tree."""
        return tree_from_dict(self.tree, METHODS)

    def attached(self, model: nn.Module, stack: contextlib.ExitStack) -> Adapter:
        """Itself on the model without its task head, which may be of another width, off and in fp64, until the stack closes."""
        own = {key: t for key, t in self.tensors.items() if not key.startswith(f"{HEAD}.")}
        name = _free(model, f"source-{self.number}")
        adapter = loaded(model, self.folder, {**self.card, "head": False}, own, name=name)
        stack.callback(adapter.detach)
        adapter.disable()
        for module in (*adapter.deltas.values(), adapter.bank):
            if module is not None:
                nn.Module.double(module).eval()  # a hyperparameter may have the name
        return adapter

    def head(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of its task head, by their keys in a file where the head stands beside a method."""
        found = {key: t for key, t in self.tensors.items() if key.startswith(f"{HEAD}.")}
        for site in all_sites(model) if self.in_place else ():
            own = model.get_submodule(site.module)._parameters if site.role == HEAD else {}
            names = {key: f"{site.module}.{key}" for key in own if f"{site.module}.{key}" in self.in_place}
            kept = {key: self.tensors.get(f"0.{n}", model.get_parameter(n)) for key, n in names.items()}
            found |= {f"{HEAD}.{site.name}.{key}": t for key, t in kept.items()}
        if not found:
            raise ValueError(f"{self.label} has no task head of its own")
        return found


def read_all(model: nn.Module, sources: Sequence[Any], stack: contextlib.ExitStack) -> list[Source]:
    """All as files of ours. Raises ValueError where one was made for another base."""
    found = []
    for i, one in enumerate(sources):
        folder = label = f"adapter {one.name!r}" if isinstance(one, Adapter) else os.fspath(one)
        if isinstance(one, Adapter) or not (Path(folder) / files.CARD).is_file():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            adapter = one if isinstance(one, Adapter) else load(model, label, name=_free(model, f"source-{i}"))
            try:
                adapter.save(folder)
            finally:
                if adapter is not one:
                    adapter.detach()
        try:
            (kept,) = read(model, [folder])
        except ValueError as error:
            raise ValueError(str(error).replace(folder, label)) from None
        found.append(Source(kept.folder, kept.card, kept.tensors, label, i))
    return found


def _free(model: nn.Module, name: str) -> str:
    record = model.__dict__.get("_deltatune")
    while record is not None and name in record.infos:
        name += "-"
    return name


def apart(one: Source, other: Source) -> ValueError:
    """The error for two that cannot be added tensor by tensor."""
    return ValueError(f"{one.label} and {other.label} are of other trees: {one.plan()!r} and {other.plan()!r}")


def check_untouched(model: nn.Module) -> None:
    """Raise ValueError where the base's values are not its own: every change is told from them."""
    record = model.__dict__.get("_deltatune")
    for name, info in record.infos.items() if record else ():
        if info.merged is not None:
            raise ValueError(f"adapter {name!r} is merged into the base; unmerge it first")
        if info.owned and not info.current:
            raise ValueError(f"adapter {name!r} trains the base itself; disable or detach it first")


def shift(model: nn.Module, source: Source, name: str) -> Tensor | None:
    """What a source that trains the base itself changed of a parameter, in fp64; None where it is as it was."""
    value = source.tensors.get(f"0.{name}") if name in source.in_place else None
    if value is None:
        return None
    p = model.get_parameter(name)
    if value.shape != p.shape:
        raise ValueError(f"{source.label}: {name} is {tuple(value.shape)}, here it is {tuple(p.shape)}")
    return value.to(p.device).double() - p.double()


def heads_of(model: nn.Module) -> set[str]:
    """The modules of the task head."""
    return {s.module for s in all_sites(model) if s.role == HEAD}


Pair = tuple[Tensor, Tensor, float]  # A (r, I), B (O, r), s


def pair_of(model: nn.Module, delta: Any) -> Pair | None:
    """A, B and s of a delta that does nothing to the weight but add s B A; None of any other."""
    a, b, scale = (getattr(delta, key, None) for key in ("a", "b", "scale"))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not isinstance(scale, float):
        return None
    site: Site = delta.site
    if min(a.ndim, b.ndim) < 2 or (a.shape[-1], b.shape[-2], a.shape[-2]) != (site.d_in, site.d_out, b.shape[-1]):
        return None
    if type(delta).fold is LoRA.fold:  # says so itself
        return a, b, scale
    change, _ = change_of(model.get_submodule(site.module), [delta])
    change, made = base.take_rows(change, site, -2) if site.rows else change, scale * (b @ a)
    return (a, b, scale) if float((change - made).abs().max()) <= 1e-9 * max(1.0, float(made.abs().max())) else None


def change_of(module: nn.Module, deltas: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """fold(W) - W and fold(b) - b of the module's whole weight under the deltas, the inner ones first; in fp64."""
    site = deltas[0].site
    weight, bias = base.matrix(module, site).double(), base.bias_of(module, site)
    if weight.is_meta:
        raise ValueError(f"{site.name}: its weight is on the meta device; there is nothing to tell a change from")
    bias = None if bias is None else bias.double()
    w, b = weight, bias
    for delta in deltas:
        w, b = base.fold_one(delta, w, b)
    return w - weight, b if bias is None or b is None else b - bias
