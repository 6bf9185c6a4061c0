"""BitDelta: what a fine-tuning changed of each matrix, as one bit a weight and one scale."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import base, bits, files
from ..core.adapter import Adapter
from ..core.attach import loaded
from ..core.compose import Stack, Tree, names_of, preset
from ..core.inits import zeros
from ..core.method import Method, fixed, param
from ..core.ragged import refill
from ..core.record import HEAD, standing
from ..core.refold import linear, plain_autograd
from ..core.sharded import assign
from ..core.site import Site, all_sites
from ..core.sources import Saved, folders_of, read, targets_of
from .values import Values

Source = str | nn.Module  # the folder of a saved adapter, or a fine-tuned model
Change = tuple[Tensor | None, Tensor | None]  # in fp64, of (O, I) and of (O); None where nothing changed


def plus(shape, **_):
    """1 everywhere"""
    return torch.full(shape, 255, dtype=torch.uint8)


def logits_apart(model: nn.Module, teacher: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The mean of (model's logits - teacher's)^2: the paper's loss for the scales, of which it takes 200 steps of 4 rows."""
    with torch.no_grad():
        wanted = teacher(**batch).logits
    return F.mse_loss(model(**batch).logits, wanted)


class BitDelta(Method, name="bitdelta"):
    """W' = W + alpha S, S = 1 where the fine-tuned weight is not below W, else -1; alpha = mean |dW| at the start, and it trains.

    Made of one fine-tuning of this base: `sources=[folder]` of a saved adapter, full or any that folds, or `tuned=model`. What
    changed of the layers' biases is kept as it is, and a layer that did not change holds nothing. What changed elsewhere is
    refused by name, unless `where` or `layers` says what is wanted; `bitdelta_full` keeps it. A task head that was trained
    beside it becomes this one's.
    """

    paper = "2402.10193"
    category = "quantisation"
    where = "linear"
    sources = "lora"
    n_sources = 1
    ragged = frozenset({"signs", "alpha", "d"})  # empty where nothing changed
    lr = (1e-5, 1e-2)
    exceptions = {
        "identity": "it starts from a model that was fine-tuned",
        "meta": "what a fine-tuning changed is told from the base's values, which are not there",
    }
    signs: Tensor = fixed("(d_out*d_in+7)//8", plus)  # S, the first entry in the lowest bit
    alpha: Tensor = param("1", zeros)
    d: Tensor = fixed("d_out", zeros)  # the bias' change

    def __new__(cls, *, where=None, layers=None, sources=None, tuned=None, **hyper):
        leaf = super().__new__(cls, where=where, layers=layers, **hyper)
        if sources is None and tuned is None:
            return leaf
        return replace(leaf, start=partial(_start, _source(cls.name, sources, tuned)))

    def build(self, base, dtype):
        super().build(base, dtype)
        refill(self, "d", self.d[..., :0])

    def check_ragged(self, tensors):
        there = tuple(tensors[key].shape[-1] for key in ("signs", "alpha") if key in tensors)
        full = -(-self.site.d_in * self.site.d_out // 8), 1
        if there not in (full, (0, 0)) and len(there) == 2:
            raise ValueError(f"signs and alpha have {there} entries, here they have {full}, or none")
        n, own = tensors["d"].shape[-1] if "d" in tensors else 0, self.site.d_out if self.site.bias else 0
        if n not in (0, own):
            raise ValueError(f"d has {n} entries, and the layer's bias {own}")

    @torch.no_grad()
    def take(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Keep the change of (O, I), or of experts' (E, O, I), and of the bias."""
        if weight is None:
            refill(self, "signs", self.signs[..., :0])
            refill(self, "alpha", self.alpha[..., :0].detach())
        else:
            many = weight if weight.ndim > 2 else weight[None]
            signs, alpha = torch.stack([bits.pack(one >= 0) for one in many]), many.abs().mean((1, 2))[:, None]
            refill(self, "signs", signs.view_as(self.signs))
            refill(self, "alpha", alpha.view_as(self.alpha))
        if bias is not None:
            refill(self, "d", bias)

    @property
    def is_moved(self) -> bool:
        """Did the fine-tuning change the matrix?"""
        return bool(self.signs.numel())

    def step(self, dtype: torch.dtype) -> Tensor:
        """alpha S"""
        mask = bits.unpack(self.signs, (self.site.d_out, self.site.d_in))
        return self.alpha.to(dtype) * (2 * mask.to(dtype) - 1)

    def fold(self, weight, bias):
        if bias is not None and self.d.numel():
            bias = bias + self.d
        return weight + self.step(weight.dtype) if self.is_moved else weight, bias

    def post(self, y, x):
        own = self.exact
        if self.is_moved and plain_autograd(x):  # the signs of one layer at a time, in the backward too
            y = y + linear(x, lambda: (own.step(x.dtype), None), [own])
        elif self.is_moved:
            y = y + F.linear(x, own.step(x.dtype))
        return y + self.d if self.d.numel() else y


@preset(
    "bitdelta_full",
    paper="2402.10193",
    category="quantisation",
    lr=BitDelta.lr,
    exceptions=BitDelta.exceptions,
    sources="full",
    n_sources=1,
)
def bitdelta_full(
    sources: tuple[str, ...] = (),  # the folder of an adapter that trained the base itself
    tuned: object = None,  # or the fine-tuned model
    rest: str = "norm,embedding|embed,lm_head|embed",  # what is kept in full precision where it changed
) -> Tree:
    """W' = W + alpha S at every linear layer, or at `where`; norms, embeddings and an output layer stay as they were fine-tuned."""
    kept = replace(Values(where=rest), frozen=True)
    if not sources and tuned is None:
        return Stack(BitDelta(), kept)
    source = _source("bitdelta_full", sources or None, tuned)
    start = partial(_start, source, whole=True)
    return Stack(replace(BitDelta(), start=start), replace(kept, start=start))


# the fine-tuning that it is made of


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning, by what it changed of the base."""

    label: str
    moved: frozenset[str]  # names of the base's parameters
    at: Callable[[Site], Change]


def _source(name: str, sources: Sequence[Any] | None, tuned: Any) -> Source:
    if tuned is not None and sources is not None:
        raise ValueError(f"{name} is made of one fine-tuning: give it sources=[folder] or tuned=model, not both")
    if tuned is not None:
        if not isinstance(tuned, nn.Module):
            raise ValueError(f"{name}: tuned must be a fine-tuned model, not {tuned!r:.80}")
        return tuned
    folders = folders_of(name, sources)
    if len(folders) > 1:
        raise ValueError(f"{name} is made of one fine-tuning, not of {len(folders)}; dt.combine makes one of several")
    return folders[0]


def _start(source: Source, adapter: Adapter, path: str, whole: bool = False) -> None:
    """Give the leaf at `path` what the source changed at its sites; all of it must be held where no place was named."""
    with _read(adapter, source) as tuned:
        own = dict(adapter.tree.leaves())[path]
        if whole or own.where is None and own.layers is None:
            _check_held(adapter, tuned)
        for delta in (d for (leaf, _), d in adapter.deltas.items() if leaf == path):
            weight, bias = _rows(tuned.at(delta.site), delta.site)
            if isinstance(delta, BitDelta):
                delta.take(weight, bias)
            else:
                _keep(delta, weight, bias)


def _keep(delta: Any, weight: Tensor | None, bias: Tensor | None) -> None:
    """Keep a change in full precision: as its entries, or, where indices would take more room, as a value for each."""
    size, n = delta.size, delta.n_weight
    parts = (weight, n), (bias, size - n)
    where = delta.values.device
    flat = torch.cat([torch.zeros(k, dtype=torch.double, device=where) if t is None else t.flatten() for t, k in parts])
    index = flat.nonzero().flatten()
    dense = 2 * index.numel() > size
    delta.take(index[:0] if dense else index, flat if dense else flat[index])


def _rows(change: Change, site: Site) -> Change:
    weight, bias = (t if t is None or not site.rows else base.take_rows(t, site) for t in change)
    return weight, bias


@contextlib.contextmanager
def _read(adapter: Adapter, source: Source) -> Iterator[Tuned]:
    """The source as it changes the adapter's model, and its task head in the adapter's; a folder's adapter is attached so long."""
    model = adapter.model
    if isinstance(source, nn.Module):
        moved = _differing(model, source)
        _fill_head(adapter, moved)
        yield Tuned("the tuned model", frozenset(moved), partial(_shift, model, moved))
        return
    (one,) = read(model, [source])
    if one.card["in_place"]:
        moved = {key: one.tensors[f"0.{key}"] for key in one.card["in_place"] if f"0.{key}" in one.tensors}
        _fill_head(adapter, moved)
        yield Tuned(source, frozenset(moved), partial(_shift, model, moved))
        return
    _take_head(adapter, one)
    own = {key: t for key, t in one.tensors.items() if not key.startswith(f"{HEAD}.")}
    name = "bitdelta-source"
    while name in model.__dict__["_deltatune"].infos:
        name += "-"
    other = loaded(model, source, {**one.card, "head": False}, own, name=name)
    try:
        for module in (*other.deltas.values(), other.bank):
            if module is not None:
                nn.Module.double(module).eval()  # LoftQ has a hyperparameter of that name
        stands: dict[tuple[str, str], list[Any]] = {}
        for entry, _, delta in standing(model, other._info, name):
            if not delta.has_fold:
                raise ValueError(
                    f"{delta.site.name}: {names_of([delta])} in {source} defines no fold, so that it changes no weight"
                )
            stands.setdefault((entry.module, delta.site.param), []).append(delta)
        yield Tuned(source, frozenset(map(".".join, stands)), partial(_folded, model, stands))
    finally:
        other.detach()


def _differing(model: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """The parameters of a fine-tuned model that are not the model's. Raises ValueError where it has others."""
    theirs = dict(tuned.named_parameters(remove_duplicate=False))
    sites = all_sites(model)
    for name in (f"{s.module}.{s.param}" for s in sites if s.n_weights):
        if name not in theirs:
            raise ValueError(f"the tuned model has no {name}; it must be of the same architecture, and plain")
    found = {}
    for name, value in theirs.items():
        try:
            own = _own(model, name)
        except AttributeError:
            raise ValueError(f"the tuned model has {name}, and this model has not") from None
        if own.shape != value.shape:
            raise ValueError(f"{name} of the tuned model is {tuple(value.shape)}, here it is {tuple(own.shape)}")
        if not torch.equal(own, value.to(own)):
            found[name] = value.detach()
    return found


def _own(model: nn.Module, name: str) -> Tensor:
    """A parameter of the base, from where it is kept. Raises ValueError where it has no values."""
    at, _, key = name.rpartition(".")
    own: Tensor | None = model.get_parameter(name)
    if own is not None and own.is_meta:
        own = base.offloaded(model.get_submodule(at), key)
    if own is None:
        raise ValueError(f"{name} is on the meta device; there is nothing to tell a change from")
    return own.detach()


def _shift(model: nn.Module, moved: Mapping[str, Tensor], site: Site) -> Change:
    """What values in the place of the base's own change at a site."""

    def less(name: str) -> Tensor | None:
        if name not in moved:
            return None
        own = _own(model, name)
        return moved[name].to(own.device).double() - own.double()

    weight = less(f"{site.module}.{site.param}")
    if weight is not None and base.transposed(model.get_submodule(site.module), site.param):
        weight = weight.mT
    if weight is not None and site.kind == "conv2d":
        weight = weight.flatten(1)
    return weight, less(f"{site.module}.bias") if site.param == "weight" else None


@torch.no_grad()
def _folded(model: nn.Module, stands: Mapping[tuple[str, str], Sequence[Any]], site: Site) -> Change:
    """What deltas change at a site."""
    deltas = stands.get((site.module, site.param))
    if deltas is None:
        return None, None
    module = model.get_submodule(site.module)
    device, weight, bias = base.place_of(module, site)[0], base.matrix(module, site), base.bias_of(module, site)
    if weight.is_meta:
        raise ValueError(f"{site.name}: its weight is on the meta device; there is nothing to tell a change from")
    weight, bias = (t if t is None else t.to(device).double() for t in (weight, bias))
    w, b = weight, bias
    for delta in deltas:
        w, b = base.fold_one(delta, w, b)
    if bias is None and b is not None:
        raise ValueError(
            f"{site.name}: {names_of(deltas)} gives it a bias, which the layer has not; keep it by dt.combine"
        )
    changes = w - weight, None if bias is None or b is None else b - bias
    weight, bias = (t if t is not None and t.any() else None for t in changes)
    return weight, bias


def _check_held(adapter: Adapter, tuned: Tuned) -> None:
    """Raise ValueError where the source changed what stands at none of the adapter's sites; a task head may be left."""
    model, held = adapter.model, dict[str, list[Site]]()
    for delta in adapter.deltas.values():
        if isinstance(delta, (BitDelta, Values)):
            held.setdefault(f"{delta.site.module}.{delta.site.param}", []).append(delta.site)
    biases = {f"{own[0].module}.bias" for own in held.values() if own[0].param == "weight"}
    heads = {s.module for s in all_sites(model) if s.role == HEAD}
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for name in sorted(tuned.moved):
        own = model.get_submodule(name.rpartition(".")[0])._parameters.get(name.rpartition(".")[2])
        for alias in names.get(id(own), [name]):
            if alias not in held and alias not in biases and alias.rpartition(".")[0] not in heads:
                tied = "" if alias == name else f", to which {alias} is tied"
                raise ValueError(
                    f"{tuned.label} changed {name}{tied}, and no bit stands there; `bitdelta_full` with its place in `rest` keeps "
                    f"it in full precision, and `where` or `layers` says what is wanted alone"
                )
    for name, sites in held.items():
        change = tuned.at(sites[0])[0] if sites[0].rows and name in tuned.moved else None
        if change is None:
            continue
        left = change.clone()
        left[sorted({i for site in sites for i in base.rows_of(site)})] = 0
        if left.any():
            raise ValueError(
                f"{tuned.label} changed more of {name} than {', '.join(s.name for s in sites)}; name all of it"
            )


def _take_head(adapter: Adapter, one: Saved) -> None:
    if not one.card["head"]:
        return
    targets = targets_of(adapter, HEAD, HEAD)
    theirs = {key: t for key, t in one.tensors.items() if key in targets}
    if targets:
        files.check_keys(one.folder, {key: tuple(t.shape) for key, t in targets.items()}, theirs)
    with torch.no_grad():
        for key, target in targets.items():
            assign(target, theirs[key])


@torch.no_grad()
def _fill_head(adapter: Adapter, moved: Mapping[str, Tensor]) -> None:
    for delta in (d for (leaf, _), d in adapter.deltas.items() if leaf == HEAD):
        for key, target in delta.named_parameters():
            value = moved.get(f"{delta.site.module}.{key}")
            if value is not None and value.shape != target.shape:
                raise ValueError(
                    f"{delta.site.name}: the task head's {key} was fine-tuned as {tuple(value.shape)}, here it is "
                    f"{tuple(target.shape)}; take head=None"
                )
            if value is not None:
                assign(target, value)
