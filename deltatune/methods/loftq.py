"""LoRA on a base that its start quantises: the factors begin as the best that they can hold of what the codes lose (LoftQ)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.base import Base
from ..core.inits import seeded
from ..core.method import fixed
from ..core.rebase import check_alone, rebase
from ..core.sharded import assign
from ..core.site import HEADS, Site
from ..core.storage import format_of
from ..quant.base import check_finite, check_fits, check_plain
from ..quant.layers import KINDS, options_of
from .lora import LoRA

Quantise = Callable[[Tensor], nn.Module]  # (O, I) -> a layer that keeps it
Factors = Callable[[Tensor], tuple[Tensor, Tensor]]  # (O, I) -> B (O, r), A (r, I)
Split = tuple[nn.Module, Tensor, Tensor, float]  # Q, B, A and the error
N_MARKS, APART = 16, 3e-3  # bf16's rounding moves the marks by 1e-3 of |W|, another choice of codes by more


def read(layer: nn.Module) -> Tensor:
    """(O, I) of a quantised layer, in fp32."""
    kind = format_of(layer)
    assert kind is not None
    return kind.read(layer, "weight").float()


def marks(weight: Tensor) -> Tensor:
    """(16) sums u^T W v over random signs: of two matrices they differ by |W - W'| in the mean square's root."""
    with seeded("marks", 0):
        u, v = (torch.randint(0, 2, (N_MARKS, n)).float() * 2 - 1 for n in weight.shape)
    weight = weight.float()
    return ((u.to(weight.device) @ weight) * v.to(weight.device)).sum(1)


def marked(shape: tuple[int, ...], *, base: Base, **_: Any) -> Tensor:
    """The marks of the layer's weight."""
    return marks(base.weight)


def factors(weight: Tensor, r: int, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """U sqrt(S) (O, r) and sqrt(S) V^T (r, I), whose product is the nearest of rank r; in a random subspace with `niter`."""
    base = None
    if (
        niter is not None
    ):  # 0909.4061; ten vectors more than are kept, as LQ-LoRA's code takes, drawn alike on every device
        with seeded("factors", 0):
            drawn = torch.randn(weight.shape[1], min(r + 10, *weight.shape))
        base = torch.linalg.qr(weight @ drawn.to(weight)).Q
        for _ in range(niter):
            base = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ base).Q).Q
    u, s, v = torch.linalg.svd(weight if base is None else base.mT @ weight, full_matrices=False)
    root = s[:r].sqrt()
    return (u if base is None else base @ u)[:, :r] * root, root[:, None] * v[:r]


def alternated(weight: Tensor, quantise: Quantise, low: Factors, steps: int) -> Split:
    """Q_t = q(W - B A), (B, A) = SVD_r(W - Q_t), from B A = 0; of the `steps` the one with the least |W - Q - B A|."""
    best: Split | None = None
    target = weight
    for _ in range(steps):
        layer = quantise(target)
        rest = weight - read(layer)
        b, a = low(rest)
        error = float((rest - b @ a).norm())
        if best is None or error < best[-1]:
            best = layer, b, a, error
        target = weight - b @ a
    assert best is not None
    return best


def maker(to: str, options: Mapping[str, Any], module: Any) -> Quantise:
    """What keeps an (O, I) matrix in the format `to`, with the bias of `module` and in its dtype."""
    kind, every = options_of(to, options)

    def make(weight: Tensor) -> nn.Module:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain._parameters["weight"] = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        layer = kind.make(plain, **every)
        layer._parameters["bias"] = module.bias
        return layer

    return make


class OnCodes(LoRA):
    """The common part: W -> Q, W' = Q + s B A, where the start chooses Q, A and B so that Q + s B A is near W."""

    category = "quantisation"
    where = "linear"
    kinds = frozenset({"linear"})
    rebases = True
    lr = (5e-5, 2e-3)
    r: int = 16  # rank
    niter: int | None = None  # subspace iterations of the fast, random SVD; None: the exact one
    mark: Tensor = fixed(str(N_MARKS), marked)

    def __new__(cls, **hyper):
        """A leaf, whose start is `begin`, unless it is made of a file."""
        leaf = super().__new__(cls, **hyper)
        return replace(leaf, start=partial(begin, cls.split))

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.alpha <= 0:
            raise ValueError(f"{cls.name}: alpha = {config.alpha}, but the start divides by it: it must lie above 0")
        if config.niter is not None and config.niter < 0:
            raise ValueError(f"{cls.name}: niter = {config.niter}, but it must be at least 0")
        if config.steps < 1:
            raise ValueError(f"{cls.name}: steps = {config.steps}, but it must be at least 1")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.role not in HEADS

    @staticmethod
    def split(adapter: Any, deltas: Sequence["OnCodes"]) -> dict[str, Split]:
        """By site's name, how its weight is split; the base is as it was."""
        raise NotImplementedError

    def check_base(self, base, tensors):
        module, theirs = base.module, tensors.get("mark")
        which = f"the base that {self.name} quantised; load that one: dt.save_base(model, folder) keeps it, behind \
adapter.detach(), and dt.load_base(folder) reads it"
        if format_of(module) is None:
            raise ValueError(f"its layer here is a plain one, and B A was trained beside {which}")
        weight = base.weight
        if theirs is None or weight.is_meta or hasattr(weight, "full_tensor"):
            return
        here = marks(weight).to(theirs.device)
        apart = float((here - theirs).square().mean().sqrt() / weight.norm().clamp_min(1e-30))
        if not apart <= APART:
            raise ValueError(f"its layer here keeps other codes ({apart:.2g} of its norm apart) than {which}")


def begin(split: Callable[..., dict[str, Split]], adapter: Any, path: str) -> Callable[[], None]:
    """Split the weights of the leaf `path`, then put the quantised layers in the base's place. Gives what undoes the second."""
    deltas = {site: d for (leaf, site), d in adapter.deltas.items() if leaf == path}
    for d in deltas.values():
        if d.site.rows:
            raise ValueError(f"{d.site.name}: {d.name} quantises whole layers, and this is a part of one")
    check_alone(adapter)
    check_plain(adapter.model, [d.site for d in deltas.values()])
    with torch.no_grad():
        made = split(adapter, list(deltas.values()))
        for site, (layer, b, a, _) in made.items():
            root = deltas[site].scale ** 0.5
            for target, value in (
                (deltas[site].a, a / root),
                (deltas[site].b, b / root),
                (deltas[site].mark, marks(read(layer))),
            ):
                assign(target, value.to(target.dtype))
        return rebase(adapter, {deltas[site].site.module: layer for site, (layer, *_) in made.items()})


def plain(adapter: Any, site: Site) -> tuple[Any, Tensor]:
    """The layer at a site, and its (O, I) weight in fp32. Raises ValueError where that is not finite."""
    module = adapter.model.get_submodule(site.module)
    weight = Base(module, site).weight.float()
    check_finite(site.name, weight)
    return module, weight


class LoftQ(OnCodes, name="loftq"):
    """W' = Q + (alpha / r) B A; at the start Q = q(W - s B A) and s B A = SVD_r(W - Q), in turns, s = alpha / r.

    Attached to a plain base, whose layers there become quantised ones for good: `detach` leaves them, for
    `dt.save_base`, and a file is read onto that base alone. `to` is a format of `dt.quantise`.
    """

    paper = "2310.08659"
    to: str = "bnb-nf4"  # the format of the codes
    steps: int = 5  # turns; the one with the least error is taken
    group: int | None = None  # weights under one scale; None: the format's own number
    double: bool = False  # bitsandbytes, 4 bits: the scales are quantised too

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        cls.options(config)
        return config

    @classmethod
    def options(cls, config):
        """The format's options. Raises ValueError on those that it does not have."""
        kind, own = options_of(config.to, {})
        if kind.read is None:
            there = ", ".join(name for name, kind in KINDS.items() if kind.read is not None)
            raise ValueError(
                f"{cls.name}: to = {config.to!r} has no file, so that no adapter could be loaded; take {there}"
            )
        size = next((key for key in ("block", "group") if key in own), None)
        if config.group is not None and size is None:
            raise ValueError(f"{cls.name}: group = {config.group}, but {config.to} has no groups")
        if config.double and "double" not in own:
            raise ValueError(f"{cls.name}: double is an option of bitsandbytes' 4 bits, not of {config.to}")
        found = {} if config.group is None else {size: config.group}
        return found | ({"double": config.double} if "double" in own else {})

    @staticmethod
    def split(adapter, deltas):
        for d in deltas:
            kind, every = options_of(d.to, d.options(d.config))
            check_fits(kind, d.site, every)
        found = {}
        for d in deltas:
            module, weight = plain(adapter, d.site)
            low = partial(factors, r=d.r, niter=d.niter)
            found[d.site.name] = alternated(weight, maker(d.to, d.options(d.config), module), low, d.steps)
        return found
