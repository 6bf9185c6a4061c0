"""Adapters in the upper layers alone: nothing is trained, run backwards or kept for several tasks below them."""

import contextlib
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, adapters, only
from ..core.errors import unknown
from ..core.schedule import Schedule
from ..core.site import all_sites
from .bottleneck import Sequential


class LayerDrop(Schedule):
    """m ~ U{0, ..., L - 1} for each step, drawn from the adapter's seed and the step; the first has m = 0."""

    def __init__(self, adapter):
        super().__init__(adapter)
        self.step = 0

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.draw()

    def after_step(self, step):
        self.step = step + 1
        self.draw()

    def end(self):
        self.step = 0
        for delta in self.deltas():
            delta.drawn = None

    def draw(self):
        """Every delta learns how many layers go without an adapter in the step that comes."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"layers {self.step}".encode()) ^ self.adapter.seed)
        u = float(torch.rand((), generator=generator, dtype=torch.float64)) if self.step else 0.0
        for delta in self.deltas():
            delta.drawn = int(u * delta.site.n_layers)

    def deltas(self):
        """Those that a draw leaves out."""
        return [d for d in self.adapter.deltas.values() if isinstance(d, AdapterDrop) and d.robust]

    def state_dict(self):
        return super().state_dict() | {"step": self.step}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.step = state["step"]
        self.draw()


class AdapterDrop(Sequential, name="adapter_drop"):
    """y' = y + A(y) behind each block but the bottom m; on the norm that ends a block N(z + A(N(z))), as in `pfeiffer`.

    The blocks below the first adapter are not run backwards. `robust` draws m anew for each step of training, so that one
    adapter runs with any m: `adapter.set(m=...)`; DDP then needs find_unused_parameters=True, which is the Trainer's default. For
    several tasks `answers` runs the bottom blocks once.
    """

    paper = "2010.11918"
    where = "post_norm|block"
    schedule = LayerDrop
    live = ("m",)
    r: int = 48  # bottleneck width
    m: int | None = None  # bottom layers without adapter; None: five of twelve, and none where robust
    robust: bool = False  # every layer has an adapter, and each step of training leaves out a drawn number of them
    drawn = None  # m in this step of training

    @classmethod
    def n_dropped(cls, config, site):
        """How many of the stack's bottom layers have no adapter. Raises ValueError where none is left."""
        if config.m is None:
            return 0 if config.robust else round(5 * site.n_layers / 12)
        if not 0 <= config.m < site.n_layers:
            raise ValueError(
                f"{site.name}: {cls.name}: m = {config.m}, but of {site.n_layers} layers between 0 and "
                f"{site.n_layers - 1} can go without an adapter"
            )
        return config.m

    @classmethod
    def fits(cls, config, site):
        if site.layer is None:
            return False
        n = cls.n_dropped(config, site)
        return config.robust or site.layer >= n

    @classmethod
    def check_set(cls, config, deltas):
        """Raise ValueError where layers that were attached without an adapter would have to have one."""
        for stack in {d.site.stack for d in deltas}:
            sites = [d.site for d in deltas if d.site.stack == stack]
            first = min(sites, key=lambda site: site.layer)
            if cls.n_dropped(config, first) < first.layer:
                raise ValueError(
                    f"{first.name}: {cls.name}: m = {config.m}, but the lowest of its adapters is in layer {first.layer}; attach "
                    f"it with a smaller m, or with robust=True"
                )

    @property
    def asleep(self):
        """Is this layer's adapter left out now?"""
        drawn = self.drawn if self.training and self.drawn is not None else self.n_dropped(self.config, self.site)
        return self.site.layer < drawn

    def post(self, y, x):
        return y if self.asleep else Sequential.post(self, y, x)

    def around(self, x, base):
        return base(x) if self.asleep else Sequential.around(self, x, base)


def answers(model: nn.Module, names: Sequence[str], **batch: Any) -> dict[str, Any]:
    """What the model gives under each of these adapters alone, bit for bit; the blocks below the first of them run once.

    Raises ValueError where the model is in training, an adapter is unknown, merged or trains the base in place, or where one
    of them changes the first block, so that no block is the same for all.
    """
    found = adapters(model)
    for name in names:
        if name not in found:
            raise unknown("adapter", name, found)
        if found[name]._info.owned or found[name]._info.merged is not None:
            raise ValueError(f"adapter {name!r} is in the base's own weights; no block is the same for all")
    if model.training:
        raise ValueError("dropout differs from run to run, and no block is the same for all; call model.eval() first")
    blocks = shared(model, [found[name] for name in names])
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch.setdefault("use_cache", False)
    given: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_once(block))
        for name in names:
            with only(found, [name]):
                given[name] = model(**batch)
    return given


def shared(model: nn.Module, each: Sequence[Adapter]) -> list[nn.Module]:
    """The bottom blocks of every stack in which none of the adapters has a delta that is awake."""
    touched: dict[str, list[tuple[int, str]]] = {}
    for adapter in each:
        for delta in adapter.deltas.values():
            site = delta.site
            if site.layer is None and site.role not in ("input", "embed", "blocks") or getattr(delta, "asleep", False):
                continue  # what stands behind the blocks changes none of them
            touched.setdefault(site.stack, []).append((site.layer or 0, f"{adapter.name!r} at {site.name}"))
    blocks = [site for site in all_sites(model) if site.kind == "block"]
    below = [s for s in blocks if all(s.layer < layer for layer, _ in touched.get(s.stack, []))]  # type: ignore[operator]
    if not below:
        first = sorted(found for at in touched.values() for found in at)
        raise ValueError(
            f"no block is the same for {len(each)} adapters, since these begin in the first: "
            f"{', '.join(where for layer, where in first if layer == first[0][0])}"
        )
    return [model.get_submodule(site.module) for site in below]


@contextlib.contextmanager
def _once(block: nn.Module) -> Iterator[None]:
    """The block runs once for the same arguments: a second time it gives what it gave."""
    run: Callable[..., Any] = block.forward
    before = block.__dict__.get("forward")
    kept: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        for had, named, out in kept:
            if _same(args, had) and _same(kwargs, named):
                return out
        kept[:] = [(args, kwargs, run(*args, **kwargs))]
        return kept[0][2]

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _same(a: Any, b: Any) -> bool:
    """Is it the same, tensors by their bits?"""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and bool(a == b)
