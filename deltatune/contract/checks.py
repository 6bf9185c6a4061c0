"""The checks themselves: each a function of a `Trial` (one method on one bed in one dtype) that raises where it fails.

Tensors that have to be equal are equal bit for bit; what is computed in two ways agrees by |a - b| / |b|. A check that
has nothing to look at raises `Skip` with the reason.
"""

import atexit
import copy
import functools
import pickle
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import base, shapes
from ..core.adapter import Adapter
from ..core.attach import attach, load
from ..core.compose import Average, Leaf, Preset, Sum, Tree
from ..core.method import METHODS, Method, Slot, named
from ..core.schedule import Schedules
from ..core.site import Site
from ..quant import dequantise
from .beds import Bed, accepts, checkpointed, materialise, on_meta, outputs

Status = Literal["passed", "failed", "exempt", "skipped"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
EXACT = ("float32", "float64")
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-9, torch.bfloat16: 6e-2}


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found."""

    check: str
    kind: str  # the bed
    dtype: str  # of the base
    status: Status
    detail: str = ""


class Skip(Exception):
    """There is nothing to look at here; the reason."""


@dataclass(frozen=True)
class Check:
    """One rule of the contract."""

    name: str
    rule: str
    function: "Callable[[Trial], None]"
    in_place: bool | None  # None: for all methods; True: for in-place methods alone; False: for the others alone
    trees: bool  # also for a tree with a name, or for what one method declares alone
    dtypes: tuple[str, ...]  # of the base; maths that is compared to the last digits is not done in bfloat16


CHECKS: dict[str, Check] = {}


def check(
    in_place: bool | None = None, dtypes: tuple[str, ...] = tuple(DTYPES), trees: bool = True
) -> "Callable[[Callable[[Trial], None]], Callable[[Trial], None]]":
    """Register a check under its function's name; the docstring is the rule."""

    def register(function: "Callable[[Trial], None]") -> "Callable[[Trial], None]":
        CHECKS[function.__name__] = Check(
            function.__name__, (function.__doc__ or "").strip(), function, in_place, trees, dtypes
        )
        return function

    return register


def checks_of(method: type[Method] | Preset) -> list[Check]:
    """The checks that this method has to pass: in-place methods are restored, the others never touch the base."""
    one = not isinstance(method, Preset)
    return [c for c in CHECKS.values() if c.in_place in (None, method.in_place) and (one or c.trees)]


def far(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Raise where `a` is not finite or farther than `tolerance` from `b`."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} is not {tuple(b.shape)}"
    assert bool(torch.isfinite(a).all()), f"{what}: not finite"
    distance = far(a, b)
    assert distance <= tolerance, f"{what}: {distance:.1e} apart, allowed are {tolerance:.0e}"


def alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """`close` for gradients, where one that is zero but for rounding (a key's bias) is measured by all together."""
    floor = 0.2 if tolerance > 1e-2 else 1e-2  # in bfloat16 what flows through a softmax is mostly rounding
    whole = torch.stack([g.detach().double().norm() for g in b.values()]).norm()
    for name, want in b.items():
        got = a[name]
        assert bool(torch.isfinite(got).all()), f"the gradient of {name}, {what}: not finite"
        distance = float(
            (got.double() - want.double()).norm() / torch.maximum(want.double().norm(), floor * whole).clamp_min(1e-30)
        )
        assert distance <= tolerance, (
            f"the gradient of {name}, {what}: {distance:.1e} apart, allowed are {tolerance:.0e}"
        )


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Raise where `a` and `b` differ in a bit."""
    one, other = ((t.dtype, tuple(t.shape)) for t in (a, b))
    assert one == other, f"{what}: {one} is not {other}"
    assert torch.equal(a, b), f"{what}: bits differ, {far(a, b):.1e} apart"


class State:
    """All that a model is: classes, keys, values, `requires_grad`, attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {n: (t, t.detach().clone()) for n, t in _tensors(model)}
        self.keys = list(model.state_dict())
        self.required = {n: p.requires_grad for n, p in model.named_parameters()}
        self.modules = {n: (type(m), set(vars(m)), set(m._modules)) for n, m in model.named_modules()}

    def untouched(self, model: nn.Module) -> None:
        """Raise where a tensor of the base is another one, or has other bits."""
        now = dict(_tensors(model))
        for name, (tensor, value) in self.values.items():
            assert name in now, f"{name} is gone"
            assert now[name] is tensor, f"{name} is another tensor"
            same(tensor.detach(), value, name)

    def restored(self, model: nn.Module) -> None:
        """Raise where anything at all is not as it was."""
        self.untouched(model)
        assert list(model.state_dict()) == self.keys, "state_dict has other keys"
        assert {n: p.requires_grad for n, p in model.named_parameters()} == self.required, (
            "requires_grad was not restored"
        )
        for name, module in model.named_modules():
            assert name in self.modules, f"{name} was left behind"
            cls, attributes, children = self.modules[name]
            assert type(module) is cls, f"{name or 'the model'} has the class {type(module)}"
            odd = (set(vars(module)) ^ attributes) | (set(module._modules) ^ children)
            assert not odd, f"{name or 'the model'}: {', '.join(sorted(odd))} came or went"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@dataclass(frozen=True)
class Trial:
    """One method, or a tree with a name, on one bed in one dtype."""

    method: Any  # type[Method] | Preset
    bed: Bed
    dtype: torch.dtype
    seed: int = 0

    @property
    def tolerance(self) -> float:
        """How far two ways of computing one number may be apart."""
        return TOLERANCE[self.dtype]

    def model(self) -> nn.Module:
        """The bed's model, fresh."""
        return self.bed.model(self.dtype)

    def leaf(self, **hyper: Any) -> Leaf:
        """The method with its defaults, each cut to its limit on the bed's small layers."""
        if self.method.sources and self.method.needs_sources:
            hyper.setdefault("sources", sources_for(self.method.name, self.bed, self.dtype))
        if isinstance(self.method, Preset):
            return self.method(**hyper)  # type: ignore[return-value]
        config = self.method.configure()
        numbers = {f.name: getattr(config, f.name) for f in fields(config)}
        numbers = {k: v for k, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        small: dict[str, Any] = {}
        for key, limit in self.method.limits.items():
            most = min(shapes.sizes(limit, {**_sizes(site), **numbers})[0] for site in self.bed.sites())
            if numbers[key] > most:
                small[key] = most
        leaf: Leaf = self.method(**{**small, **hyper})
        return replace(leaf, start=_stands) if self.method.rebases else leaf

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The declared tensors under these hyperparameters."""
        return self.method.slots_of(self.leaf().config)

    def put(
        self, model: nn.Module, name: str = "one", *, one: bool = False, tree: Tree | None = None, **hyper: Any
    ) -> Adapter:
        """Attach to all of the bed's sites, or to `one`."""
        torch.manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        if isinstance(self.method, Preset):  # its methods have their own places
            return attach(model, self.leaf(**hyper), name=name, head=None, seed=self.seed)
        where: Any = None if self.method.in_place else list(self.bed.one) if one and self.bed.one else self.bed.place
        return attach(model, tree or self.leaf(**hyper), name=name, where=where, head=None, seed=self.seed)

    def attached(self, name: str = "one", **kwargs: Any) -> tuple[nn.Module, Adapter]:
        """A fresh model with the method on it, moved from its start."""
        model = self.model()
        return model, perturb(self.put(model, name, **kwargs))

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """Four rows."""
        return self.bed.batch(self.dtype, seed=self.seed + seed)

    def own(self, model: nn.Module, n_rows: int) -> dict[str, Tensor]:
        """What the method reads of the call beside the model's own arguments: a task and an adapter per row."""
        attached = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        live = "_deltatune" in attached.__dict__ and attached.__dict__["_deltatune"].frame.wanted
        return {n: torch.zeros(n_rows, dtype=torch.long) for n in sorted(live or ())}

    def out(self, model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, T, D) of one forward; whatever is random in it is drawn alike each time."""
        batch = dict(batch or self.batch())
        torch.manual_seed(self.seed)
        n_rows = next(iter(batch.values())).shape[0]
        return outputs(model, batch, **self.own(model, n_rows))

    @torch.no_grad()
    def read(self, model: nn.Module) -> Tensor:
        """`out` for one who trains nothing: where a factor needs a gradient some products go another way, down to their last bits."""
        return self.out(model)

    def loss(self, model: nn.Module, seed: int = 0, rows: slice = slice(None)) -> Tensor:
        """The mean squared distance to random targets."""
        batch = self.batch(seed)
        out = self.out(model, {k: v[rows] for k, v in batch.items()})
        n_rows = next(iter(batch.values())).shape[0]
        target = torch.randn((n_rows, *out.shape[1:]), generator=torch.Generator().manual_seed(self.seed))[rows]
        return (out.float() - target).square().mean() if out.dtype != torch.float64 else (out - target).square().mean()

    def gradients(self, model: nn.Module, tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
        """The loss's gradient of each tensor that is not empty."""
        tensors = {n: t for n, t in tensors.items() if t.numel()}
        found = torch.autograd.grad(self.loss(model, seed), list(tensors.values()), allow_unused=True)
        for name, grad in zip(tensors, found, strict=True):
            assert grad is not None, f"{name} has no gradient"
        return dict(zip(tensors, found, strict=True))


def _stands(adapter: Adapter, path: str) -> None:
    """Instead of a start that quantises the base: the bed has codes already."""


@functools.cache
def sources_for(name: str, bed: Bed, dtype: torch.dtype) -> tuple[str, ...]:
    """Saved adapters on the bed's model, for the method or the preset of that name, which is made of such."""
    method, folders = named(name), []
    for i in range(getattr(method, "n_sources", 2)):
        t = Trial(named(method.sources), bed, dtype, seed=i)
        with torch.random.fork_rng(devices=()):  # who asks first draws what it would have drawn
            if isinstance(method, Preset):  # at the places that they have by themselves, as it will be
                torch.manual_seed(i)
                adapter = perturb(attach(t.model(), t.leaf(), name=f"source{i}", head=None))
            else:
                adapter = perturb(t.put(t.model(), f"source{i}"))
        folders.append(tempfile.mkdtemp(prefix="deltatune-source-"))
        atexit.register(shutil.rmtree, folders[-1], ignore_errors=True)
        adapter.save(folders[-1])
    return tuple(folders)


def _sizes(site: Site) -> dict[str, int]:
    return {"d_in": site.d_in, "d_out": site.d_out, "n_kv_heads": site.n_kv_heads, "d_head": site.d_head}


@torch.no_grad()
def perturb(adapter: Adapter, scale: float = 0.2) -> Adapter:
    """Move what is trained away from its start, alike for equal names, so that zeros hide nothing."""
    for name, p in adapter.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{adapter.name} {name}".encode()))
        p.add_((scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype))
    return adapter


def _refused(function: Callable[[], Any], *words: object) -> None:
    """Raise unless `function` raises a ValueError that says all of `words`."""
    said = _said(function)
    assert said is not None, f"nothing was refused; an error was due that says {', '.join(map(str, words))}"
    missing = [str(w) for w in words if str(w) not in said]
    assert not missing, f"the error does not say {', '.join(missing)}: {said}"


def _said(function: Callable[[], Any]) -> str | None:
    """The text of the ValueError that `function` raised, None where it raised nothing."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


@check(in_place=False)
def identity(t: Trial) -> None:
    """Attached and not yet trained, the model gives its own outputs."""
    model = t.model()
    want = t.out(model)
    t.put(model)
    close(t.out(model), want, min(t.tolerance, 1e-5) if t.dtype != torch.bfloat16 else 1e-2, "the output at the start")


@check(in_place=False)
def base_untouched(t: Trial) -> None:
    """Attach, forward, backward, an optimiser's step and detach leave every bit of the base."""
    model = t.model()
    before = State(model)
    adapter = perturb(t.put(model))
    before.untouched(model)
    _step(t, model, adapter)
    before.untouched(model)
    assert all(p.grad is None for p in (b for b, _ in before.values.values())), "a tensor of the base has a gradient"
    with adapter.disabled():
        same(t.out(model), t.out(t.model()), "the output with the adapter disabled")
    adapter.detach()
    before.restored(model)


@check(in_place=True)
def restored(t: Trial) -> None:
    """Attach changes no value; after training and detach every bit is back; disabled it is the base."""
    model = t.model()
    before = State(model)
    want = t.out(model)
    adapter = t.put(model)
    before.untouched(model)
    same(t.out(model), want, "the output at the start")
    perturb(adapter)
    _step(t, model, adapter)
    assert far(t.out(model), want) > 1e-3, "a step of training moved nothing"
    moved = t.out(model)
    with adapter.disabled():
        same(t.out(model), want, "the output with the adapter disabled")
    same(t.out(model), moved, "the output with the adapter enabled again")
    adapter.detach()
    for p in model.parameters():
        p.grad = None
    before.restored(model)


def _step(t: Trial, model: nn.Module, adapter: Adapter) -> None:
    course = Schedules([adapter])
    course.calibrate(lambda: [t.batch()], lambda model, batch: t.loss(model))
    optimizer = torch.optim.SGD(adapter.groups(0.01))
    course.begin(optimizer, 1)
    t.loss(model).backward()
    course.before_step(0)
    optimizer.step()
    course.after_step(0)
    optimizer.zero_grad()
    course.end()


def _filled(adapter: Adapter) -> list[tuple[str, Tensor]]:
    """What is trained and not empty: a tensor that waits for its phase has no gradient."""
    return [(name, p) for name, p in adapter.named_parameters() if p.numel()]


@check()
def trains(t: Trial) -> None:
    """The declared tensors train, nothing else does, and each gets a finite gradient, not zero unless the method says why."""
    model = t.model()
    adapter = t.put(model)
    own = {id(p): name for name, p in adapter.named_parameters()}
    training = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert not training.keys() - own.keys(), f"{[training[i] for i in training.keys() - own.keys()]} train undeclared"
    assert not own.keys() - training.keys(), f"{[own[i] for i in own.keys() - training.keys()]} do not train"
    if getattr(t.method, "build", None) is Method.build:
        declared = {key for key, slot in t.slots.items() if slot.train and not slot.shared}
        for (_, site), delta in adapter.deltas.items():
            have = {name for name, _ in delta.named_parameters()}
            assert have == declared, f"{site}: {sorted(have)} train, declared are {sorted(declared)}"
    perturb(adapter)
    model.train()
    t.loss(model).backward()
    for name, p in _filled(adapter):
        assert p.grad is not None, f"{name} has no gradient"
        assert bool(torch.isfinite(p.grad).all()), f"the gradient of {name} is not finite"
        assert bool(p.grad.any()) or name.rpartition(".")[2] in t.method.still, f"the gradient of {name} is zero"
    odd = [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in own]
    assert not odd, f"{odd} have gradients"


@check(trees=False)
def fast_fold(t: Trial) -> None:
    """Activation path and weight path are one function: outputs and all gradients, the input's and the base's too."""
    model, adapter = t.attached()
    deltas = list(adapter.deltas.values())
    if not any(d.fast and d.has_fold or d.has_linear for d in deltas):
        raise Skip("one path alone: the method says its maths once here")

    def look() -> tuple[Tensor, dict[str, Tensor]]:
        return t.out(model), t.gradients(model, tensors)

    for p in model.parameters():
        p.requires_grad_(True)
    tensors = dict(model.named_parameters())
    fast = look()
    for d in deltas:
        d.has_linear = False
    general = look()
    if all(d.has_fold for d in deltas):
        for d in deltas:
            d.fast = False
    weight = look()
    for name, other in (("post", general), ("fold", weight)):
        close(fast[0], other[0], t.tolerance, f"the output, beside {name}")
        alike(fast[1], other[1], 4 * t.tolerance, f"beside {name}")


@check()
def merge(t: Trial) -> None:
    """Merged, the base alone gives the adapted outputs; a method without fold refuses and changes nothing."""
    model, adapter = t.attached()
    want = t.out(model)
    if not (adapter.mergeable or t.method.in_place):
        before = State(model)
        _refused(adapter.merge, *[t.method.name] * (not isinstance(t.method, Preset)), "fold")
        before.restored(model)
        same(t.out(model), want, "the output after a refused merge")
        return
    adapter.merge()
    close(t.out(model), want, t.tolerance, "the merged output")
    adapter.detach()
    close(t.out(model), want, t.tolerance, "the merged output after detach")


@check(trees=False)
def unmerge(t: Trial) -> None:
    """Unmerge restores the bits, however often."""
    if not (t.method.has_fold or t.method.in_place):
        raise Skip("it defines no fold, so nothing is merged")
    model, adapter = t.attached()
    before, want = State(model), t.out(model)
    for _ in range(3):
        adapter.merge()
        t.out(model)
        adapter.unmerge()
        before.restored(model)
        same(t.out(model), want, "the output after unmerge")


@check()
def save_load(t: Trial) -> None:
    """A saved adapter comes back bit for bit, on a base that was made anew, and is saved as the same file again.

    So does one that was saved to be trained on.
    """
    model, adapter = t.attached()
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "one")
        other = t.model()
        before = State(other)
        loaded = load(other, Path(folder) / "one")
        same(t.read(other), t.read(model), "the output after loading")
        state, (_, want) = loaded.state_dict(), adapter.finished()
        assert state.keys() == want.keys(), "the loaded adapter has other tensors"
        for name, tensor in want.items():
            same(state[name], tensor, name)
        loaded.save(Path(folder) / "two")
        for file in ("adapter.safetensors", "adapter.json"):
            one, two = ((Path(folder) / at / file).read_bytes() for at in ("one", "two"))
            assert one == two, f"{file} is another when the loaded adapter is saved"
        loaded.detach()
        before.restored(other)
        adapter.save(Path(folder) / "three", resumable=True)
        again = load(other, Path(folder) / "three", trainable=True)
        for name, tensor in adapter.state_dict().items():
            same(again.state_dict()[name], tensor, f"{name}, saved to be trained on")
        assert {n for n, _ in again.named_parameters()} == {n for n, _ in adapter.named_parameters()}
        again.detach()


@check()
def other_seed(t: Trial) -> None:
    """What is not in the file is drawn from the file's seed, never from the generator at the time of loading."""
    model = t.model()
    adapter = perturb(replace(t, seed=t.seed + 1000).put(model))
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        other = t.model()
        torch.manual_seed(t.seed + 4321)
        load(other, folder)
    same(t.read(other), t.read(model), "the output after loading under another seed")


@check()
def copies(t: Trial) -> None:
    """deepcopy and pickle give the same model with adapters of its own."""
    model, adapter = t.attached()
    want = t.out(model)
    for name, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        same(t.out(twin), want, f"the output after {name}")
        own = type(adapter)(twin, adapter.name)
        perturb(own)
        assert far(t.out(twin), want) > 1e-4, f"the {name}'s adapter does not reach its model"
        same(t.out(model), want, f"the original's output after its {name} was trained")
        own.detach()
        same(t.out(twin), t.out(t.model()), f"the {name}'s output after detach")


@check(trees=False)
def count(t: Trial) -> None:
    """`count()`, evaluated with a site's sizes, is the number of tensors' entries; so are `params` and the bank."""
    model = t.model()
    adapter = t.put(model)
    everything = sum(p.numel() for p in adapter.parameters())
    moving = t.method.n_moving(t.leaf().config, everything) if t.method.in_place else everything
    assert adapter.params() + adapter.n_head == moving, f"params() is {adapter.params()}, it trains {moving}"
    if t.method.in_place:
        assert t.method.count() == "the base's own", f"count() is {t.method.count()!r}"
        return
    (formula,) = shapes.parse(t.method.count().replace(" ", ""))
    shared: dict[str, int] = {}
    total = 0
    for (_, site), delta in adapter.deltas.items():
        dims = delta.dims(base.Base(model.get_submodule(delta.site.module), delta.site))
        missing = formula.names - dims.keys()
        assert not missing, f"{site}: count() names {sorted(missing)}, which is no dimension of it"
        says = formula.evaluate(dims) * (delta.site.n_experts or 1)
        have = sum(p.numel() for p in delta.parameters())
        assert says == have, f"{site}: count() = {t.method.count()} says {says}, it trains {have}"
        total += have
        for key, slot in t.slots.items():
            if slot.shared and slot.train:
                size = shapes.sizes(slot.shape, dims)
                shared[delta.bank_key(key, slot, size)] = torch.Size(size).numel()
    want = total + sum(shared.values())
    assert adapter.params() == want, f"params() is {adapter.params()}, the formulas say {want}"


@check(dtypes=("bfloat16",))
def half(t: Trial) -> None:
    """Over a bf16 base the deltas stay fp32, their gradients too, the output is bf16 and close to the fp32 one's."""
    model, adapter = t.attached()
    wide = copy.deepcopy(t.model()).float()
    full = perturb(t.put(wide))
    batch = t.batch()
    out = t.out(model, batch)
    assert out.dtype == torch.bfloat16, f"the output is {out.dtype}"
    close(
        out,
        t.out(wide, {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}),
        6e-2,
        "the bf16 output",
    )
    model.train()
    t.loss(model).backward()
    for name, p in _filled(adapter):
        assert t.method.in_place or p.dtype == torch.float32, f"{name} is {p.dtype}"
        assert p.grad is not None, f"{name} has no gradient"
        assert p.grad.dtype == p.dtype, f"the gradient of {name} is {p.grad.dtype}"
        assert bool(torch.isfinite(p.grad).all()), f"the gradient of {name} is not finite"
    assert len(full.parameters()) == len(adapter.parameters())


@check()
def meta(t: Trial) -> None:
    """It attaches to a model on meta with the same shapes; with values given, all is as if built with them."""
    model, adapter = t.attached()
    empty = on_meta(t.bed).to(t.dtype)
    there = t.put(empty)
    sizes, want = ({n: tuple(p.shape) for n, p in a.named_parameters()} for a in (there, adapter))
    assert sizes == want, f"on meta it trains {sizes}, with values {want}"
    assert all(p.is_meta for p in there.parameters()), "a tensor of it is not on meta"
    if adapter.bank is None or not dict(adapter.bank.named_buffers()):  # what is not in a state_dict must be loaded
        materialise(empty, model)
        same(t.read(empty), t.read(model), "the output of what was attached on meta")
    late = on_meta(t.bed).to(t.dtype)
    materialise(late, t.model())
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        load(late, folder)
    same(t.read(late), t.read(model), "the output of what was loaded after meta")


@check()
def graph(t: Trial) -> None:
    """torch.compile takes the whole forward as one graph, with the same outputs and gradients."""
    model, adapter = t.attached(one=True)
    want, grads = t.out(model), t.gradients(model, dict(adapter.named_parameters()))
    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        out, now = t.out(compiled), t.gradients(compiled, dict(adapter.named_parameters()))
    finally:
        torch.compiler.reset()
    close(out, want, t.tolerance, "the compiled output")
    alike(now, grads, 4 * t.tolerance, "compiled")


@check()
def checkpointing(t: Trial) -> None:
    """Both modes of gradient checkpointing give the same gradients, with two forwards before a backward; no residue."""
    model, adapter = t.attached()
    model.train()
    tensors = dict(adapter.named_parameters())

    def look() -> dict[str, Tensor]:
        total = t.loss(model, 0) + t.loss(model, 1)
        for p in model.parameters():
            p.grad = None
        total.backward()
        frame = model.__dict__["_deltatune"].frame
        assert frame.call is None, "the call was kept"
        assert not frame.stash, "something of the call was kept"
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in tensors.items()}

    want = look()
    for reentrant in (False, True):
        checkpointed(model, reentrant)
        alike(look(), want, t.tolerance, f"with use_reentrant={reentrant}")


@check()
def two_adapters(t: Trial) -> None:
    """Two of one method: each alone, both, neither, removed in any order, are what they would be without the other."""
    model = t.model()
    before, plain = State(model), t.out(model)
    one = perturb(t.put(model, "one"))
    first = t.out(model)
    if t.method.in_place:
        _refused(lambda: t.put(model, "two"), "one", "trained in place")
        same(t.out(model), first, "the output after a refused second adapter")
        one.detach()
        before.restored(model)
        return
    two = perturb(t.put(model, "two"))
    alone = t.model()
    perturb(t.put(alone, "two"))
    second, both = t.out(alone), t.out(model)
    assert far(both, first) > 1e-4, "the second adapter has no effect around the first"
    assert all(p.requires_grad for p in (*one.parameters(), *two.parameters())), "the second attach froze something"
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    with two.disabled():
        same(t.out(model), first, "the output of one alone")
        with one.disabled():
            same(t.out(model), plain, "the output of neither")
    with one.disabled():
        same(t.out(model), second, "the output of two alone")
    same(t.out(model), both, "the output of both again")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required, "a switch touched requires_grad"
    for gone, left in (("one", second), ("two", first)):
        twin = copy.deepcopy(model)
        Adapter(twin, gone).detach()
        same(t.out(twin), left, f"the output after {gone} was removed")
        Adapter(twin, "two" if gone == "one" else "one").detach()
        same(t.out(twin), plain, "the output after both were removed")
    one.detach()
    two.detach()
    before.restored(model)


@check(in_place=False, dtypes=EXACT, trees=False)
def stacked(t: Trial) -> None:
    """Around and inside every other method that merges, it equals the chain of folds."""
    if not t.method.has_fold:
        raise Skip("it defines no fold")
    tried = 0
    for other in METHODS.values():
        partner = replace(t, method=other)
        own = other.__module__.startswith(f"{__package__.partition('.')[0]}.")
        if not own or not other.has_fold or other is t.method or not t.bed.suits(other):
            continue
        for inner, outer in ((t, partner), (partner, t)):
            if "stacked" in outer.method.exceptions:
                continue
            model = t.model()
            a, b = perturb(inner.put(model, "one")), perturb(outer.put(model, "two"))
            got = t.out(model)
            a.merge()
            b.merge()
            close(got, t.out(model), t.tolerance, f"{outer.method.name} around {inner.method.name}")
            tried += 1
    if not tried:
        raise Skip("no other method that merges sits here")


@check(in_place=False, dtypes=EXACT, trees=False)
def composed(t: Trial) -> None:
    """Two of it in a Sum change what each changes, added up; in an Average, the mean."""
    one, two = t.leaf(), t.leaf()
    for node in (Sum, Average):
        model = t.model()
        before = State(model)
        said = _said(functools.partial(t.put, model, one=True, tree=node(one, two)))
        if said is not None:
            assert "cannot meet in" in said, said
            assert t.method.name in said, said
            before.restored(model)
            continue
        adapter = perturb(Adapter(model, "one"))
        apart = [t.model() for _ in range(2)]
        for i, single in enumerate(apart):
            alone = t.put(single, one=True)
            source = {key: d.state_dict() for (path, key), d in adapter.deltas.items() if path == str(i)}
            for (_, key), delta in alone.deltas.items():
                delta.load_state_dict(source[key])
            if adapter.bank is not None and alone.bank is not None:
                kept = adapter.bank.state_dict()  # what is trained is each leaf's own
                alone.bank.load_state_dict({n: kept.get(f"{i}_{n}", kept.get(n)) for n in alone.bank.state_dict()})
        want = _met(t, node, apart)
        close(t.out(model), want, t.tolerance, f"the output of {node.__name__}")


def _met(t: Trial, node: type, apart: list[nn.Module]) -> Tensor:
    """The output of a model whose one site does what those of `apart` do, added up or averaged."""
    share = 1.0 if node is Sum else 1 / len(apart)
    model = dequantise(t.model())
    if t.method.has_fold:  # in weight space: base + sum of the changes
        plain = {n: p.detach().clone() for n, p in model.named_parameters()}
        for single in apart:
            alone = Adapter(single, "one")
            alone.merge()
            alone.detach()
            with torch.no_grad():
                for name, p in single.named_parameters():
                    at, _, key = name.rpartition(".")
                    if name not in plain:  # a bias that the base does not have
                        model.get_submodule(at).register_parameter(key, nn.Parameter(torch.zeros_like(p)))
                        plain[name] = torch.zeros_like(p)
                    model.get_parameter(name).add_(share * (p - plain[name]))
        return t.out(model)
    if t.method.has_kv or t.method.has_tokens:  # one behind the other
        if node is Average:
            raise AssertionError("learned keys, values and tokens have no average, and an error was due")
        for name, single in (("two", apart[1]), ("one", apart[0])):
            adapter, source = t.put(model, name, one=True), Adapter(single, "one")
            for place, delta in adapter.deltas.items():
                delta.load_state_dict(source.deltas[place].state_dict())
            if adapter.bank is not None and source.bank is not None:
                adapter.bank.load_state_dict(source.bank.state_dict())
        return t.out(model)
    at = next(iter(Adapter(apart[0], "one").deltas.values())).site.module
    whole, _ = _seen(t, model, at)
    total = whole.clone()
    for single in apart:
        total += share * (_seen(t, single, at)[0] - whole)
    return _seen(t, model, at, total)[1]


def _seen(t: Trial, model: nn.Module, at: str, instead: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(output of the module `at`, output of the model), the first replaced by `instead` where it is given."""
    kept: list[Tensor] = []

    def look(module: nn.Module, args: Any, out: Any) -> Any:
        head = out[0] if isinstance(out, tuple) else out
        kept.append(head.detach())
        if instead is None:
            return None
        return (instead, *out[1:]) if isinstance(out, tuple) else instead

    handle = model.get_submodule(at).register_forward_hook(look)
    try:
        out = t.out(model)
    finally:
        handle.remove()
    return kept[0], out


@check(dtypes=EXACT)
def rows(t: Trial) -> None:
    """Row i of a batch does not see row j."""
    model, _ = t.attached()
    batch, other = t.batch(), t.batch(1)
    want = t.out(model, batch)
    mixed = {k: torch.cat([v[:1], other[k][1:]]) for k, v in batch.items()}
    close(t.out(model, mixed)[0], want[0], t.tolerance, "row 0 beside other rows")
    close(t.out(model, {k: v[:1] for k, v in batch.items()})[0], want[0], t.tolerance, "row 0 alone")


@check(dtypes=EXACT)
def padding(t: Trial) -> None:
    """Left and right padding give the outputs of no padding on the real tokens."""
    model, _ = t.attached()
    batch = t.batch()
    if "input_ids" not in batch:
        raise Skip("images are not padded")
    length, n = batch["input_ids"].shape[1], 3
    positions = torch.arange(length).expand(batch["input_ids"].shape)
    positional = accepts(t.model(), "position_ids")
    want = t.out(model, {**batch, "position_ids": positions} if positional else batch)
    for side, pad in (("right", (0, n)), ("left", (n, 0))):
        padded = {key: nn.functional.pad(value, pad) for key, value in batch.items()}
        if positional:
            padded["position_ids"] = nn.functional.pad(positions, pad)
        real = slice(0, length) if side == "right" else slice(n, n + length)
        close(t.out(model, padded)[:, real], want, t.tolerance, f"the real tokens' outputs, padded on the {side}")


@check(dtypes=EXACT)
def learns(t: Trial) -> None:
    """A few steps at the top of its range of learning rates lower the loss on one batch."""
    model = t.model()
    adapter = t.put(model)
    model.train()
    course = Schedules([adapter])
    n_steps = 20
    course.calibrate(lambda: [t.batch()], lambda model, batch: t.loss(model))
    optimizer = torch.optim.AdamW(course.groups(t.method.lr[1]))
    course.begin(optimizer, n_steps)
    losses = []
    for step in range(n_steps):
        loss = t.loss(model)
        losses.append(float(loss.detach()))
        loss.backward()
        course.before_step(step)
        optimizer.step()
        course.after_step(step)
        optimizer.zero_grad()
    course.end()
    losses.append(float(t.loss(model).detach()))
    # what a course takes away (pruned tokens, ranks) may cost more than so few steps give: then its lowest loss counts
    last = losses[-1] if getattr(t.method, "schedule", None) is None else min(losses[1:])
    assert last < 0.999 * losses[0], f"the loss went from {losses[0]:.4f} to {last:.4f} in {n_steps} steps"


@check(trees=False)
def limits(t: Trial) -> None:
    """An impossible hyperparameter raises an error that names the site and the number, and changes nothing."""
    config = t.method.configure()
    numbers = {f.name: getattr(config, f.name) for f in fields(config)}
    used = set().union(*(d.names for slot in t.slots.values() for d in shapes.parse(slot.shape)))
    sizes = {k for k, v in numbers.items() if type(v) is int and (k in used or k in t.method.limits)}
    if not sizes:
        raise Skip("no hyperparameter is a size")
    table = t.bed.sites()
    for key in sorted(sizes):
        wrong = [0]
        if key in t.method.limits:
            plain = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
            wrong.append(1 + max(shapes.sizes(t.method.limits[key], {**_sizes(s), **plain})[0] for s in table))
        for value in wrong:
            model = t.model()
            before = State(model)
            said = _said(functools.partial(t.put, model, tree=t.leaf(**{key: value})))
            assert said is not None, f"{key} = {value} was accepted"
            assert any(s.name in said for s in table), f"{key} = {value}: the error names no site: {said}"
            assert str(value) in said, f"{key} = {value}: the error does not name the number: {said}"
            before.restored(model)


@check(trees=False)
def peft_round_trip(t: Trial) -> None:
    """Through HF PEFT's format and back, where that knows the method."""
    model, adapter = t.attached()
    with tempfile.TemporaryDirectory() as folder:
        try:
            adapter.save(folder, format="peft")
        except ValueError as error:
            raise Skip(f"HF PEFT's format does not hold it: {error}") from None
        other = t.model()
        load(other, folder)
    close(t.out(other), t.out(model), t.tolerance, "the output after HF PEFT's format")


def run_one(method: type[Method] | Preset, one: Check, bed: Bed, dtype: str, seed: int) -> Result:
    """One check on one bed in one dtype; the random state is left as it was."""

    def result(status: Status, detail: str = "") -> Result:
        return Result(one.name, bed.name, dtype, status, detail)

    if one.name in method.exceptions:
        return result("exempt", method.exceptions[one.name])
    if bed.later:
        return result("skipped", bed.later)
    if dtype not in one.dtypes:
        return result("skipped", f"it is looked at in {' and '.join(one.dtypes)}")
    try:
        with torch.random.fork_rng(devices=()):
            one.function(Trial(method, bed, DTYPES[dtype], seed))
    except Skip as reason:
        return result("skipped", str(reason))
    except Exception as error:
        kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
        return result("failed", f"{kind}{error}")
    return result("passed")
