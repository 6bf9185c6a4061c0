"""SparseAdapter: of an adapter's matrices a share is kept, chosen before training; what a mask leaves out is 0 and is not there."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core import bits, shapes
from ..core.calibrate import Gradients, collect, looking
from ..core.compose import Leaf, Per, Tree, preset
from ..core.inits import normal
from ..core.method import METHODS, Method, Slot, fixed, param
from ..core.ragged import refill
from ..core.schedule import Schedule
from ..core.sharded import whole
from .bottleneck import Parallel, Sequential
from .lora import LoRA

Score = Literal["random", "magnitude", "snip", "grasp", "synflow"]
Scope = Literal["global", "local"]


class Masking(Schedule):
    """Keeps the entries of the highest scores before training; where a score reads data, of the calibration's mean loss.

    random N(0, 1) from the adapter's seed; magnitude |w|; snip |w g|; grasp w (H g), H the Hessian, with its sign;
    synflow |w dR/dw|, R each adapter's mean output of ones with |w| for w. Without dropout.
    """

    @property
    def parts(self):
        """{(path, site, slot): (delta, its entries one after the other)} of everything that has a mask."""
        deltas = self.adapter.deltas.items()
        every = [(at, d, key) for at, d in deltas if isinstance(d, Masked) for key in d.full]
        return {(*at, key): (d, getattr(d, f"{key}_values")) for at, d, key in every}

    @property
    def config(self):
        """The hyperparameters of the choice. Raises ValueError where two methods of the tree differ in them."""
        found = {tuple(getattr(d, k) for k in CHOICE): d.config for d, _ in self.parts.values()}
        if len(found) > 1:
            raise ValueError(
                f"adapter {self.adapter.name!r}: one mask is chosen over all of it, not with {', '.join(CHOICE)} = "
                f"{' and '.join(map(str, found))}"
            )
        return next(iter(found.values()))

    @property
    def needs_data(self):
        """Is the mask still to be chosen? One that was, as in a file that is trained on from, stays."""
        whole_ = all(values.numel() == math.prod(d.full[key]) for (*_, key), (d, values) in self.parts.items())
        return self.config.keep < 1 and whole_ and not self.adapter.calibrated

    @property
    def looks_at(self):
        return self.config.n_samples, "rows"

    def calibrate(self, batches, loss):
        if not self.needs_data:
            raise ValueError(f"adapter {self.adapter.name!r}: its mask is chosen already, and stays as it is")
        with looking(self.adapter.model, False, self.adapter.seed):
            scores = getattr(self, self.config.score)(batches, loss)
        self._take(chosen(scores, self.config.keep, self.config.scope))

    def begin(self, optimizer, n_steps, n_micro=1):
        if self.needs_data and self.config.score not in ("snip", "grasp"):
            there = torch.distributed.is_available() and torch.distributed.is_initialized()
            if there and torch.distributed.get_world_size() > 1:
                raise ValueError(
                    f"adapter {self.adapter.name!r}: choose the mask before the model is wrapped: adapter.calibrate(())"
                )
            self.calibrate((), None)
        super().begin(optimizer, n_steps, n_micro)

    @torch.no_grad()
    def _take(self, masks):
        for at, (d, values) in self.parts.items():
            mask = masks[at].to(values.device)
            refill(d, f"{at[-1]}_bits", bits.pack(mask))
            refill(d, f"{at[-1]}_values", whole(values)[mask])
        self.adapter.calibrated = {"|".join(at): getattr(d, f"{at[-1]}_bits") for at, (d, _) in self.parts.items()}

    def random(self, batches, loss):
        found = {}
        for at, (_, values) in self.parts.items():
            draw = torch.Generator().manual_seed(zlib.crc32("|".join(at).encode()) ^ self.adapter.seed)
            found[at] = torch.randn(len(values), generator=draw)
        return found

    def magnitude(self, batches, loss):
        return {at: whole(values).detach().flatten().abs() for at, (_, values) in self.parts.items()}

    def snip(self, batches, loss):
        return {at: s.abs() for at, s in self._times(self._gradient(self._few(batches), loss)).items()}

    def grasp(self, batches, loss):
        batches = list(self._few(batches))  # they are run twice
        first, tensors = self._gradient(batches, loss), {at: v for at, (_, v) in self.parts.items()}

        def along(model, batch):
            """g^T g0, whose gradient is H g0"""
            grads = torch.autograd.grad(loss(model, batch), list(tensors.values()), create_graph=True)
            return sum((g * first[at].to(g.dtype)).sum() for at, g in zip(tensors, grads, strict=True))

        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return self._times(self._gradient(batches, along))

    def synflow(self, batches, loss):
        found, groups = {}, {}
        for at, (d, values) in self.parts.items():
            groups.setdefault(d, {})[at] = values
        for d, own in groups.items():
            before = {p: p.detach().clone() for p in d.parameters()}
            with torch.no_grad():
                for p in before:
                    p.abs_()
            try:
                with torch.enable_grad():
                    grads = torch.autograd.grad(_flow(d), list(own.values()))
                found |= {at: (g * v.detach()).flatten() for (at, v), g in zip(own.items(), grads, strict=True)}
            finally:
                with torch.no_grad():
                    for p, value in before.items():
                        p.copy_(value)
        return found

    def _few(self, batches):
        n = 0
        for batch in batches:
            yield batch
            n += len(next(iter(batch.values())))
            if n >= self.config.n_samples:
                return

    def _gradient(self, batches, loss):
        values = {at: v for at, (_, v) in self.parts.items()}
        return collect(self.adapter.model, batches, loss, {"g": Gradients(values, lambda g, t: g)})["g"]

    def _times(self, found):
        return {at: (found[at] * whole(v).detach()).flatten() for at, (_, v) in self.parts.items()}

    def state_dict(self):
        return super().state_dict() | {"chosen": bool(self.adapter.calibrated)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        parts = self.parts.items() if state["chosen"] else ()
        self.adapter.calibrated = {"|".join(at): getattr(d, f"{at[-1]}_bits") for at, (d, _) in parts}


def _flow(d):
    """The mean output of a delta alone for an input of ones, and for a base that gives ones."""
    like = next(iter(d.parameters()))
    x, y = like.new_ones(1, d.site.d_in), like.new_ones(1, d.site.d_out)
    if d.has_post:
        return d.post(y, x).mean()
    return F.linear(x, *d.fold(like.new_zeros(d.site.d_out, d.site.d_in), None)).mean()


def chosen(scores: Mapping[tuple[str, ...], Tensor], keep: float, scope: Scope) -> dict[tuple[str, ...], Tensor]:
    """By name, which scores lie above the edge: above the ceil((1 - keep) n) lowest of all, or those int(...) of each tensor.

    What equals the edge goes. Raises ValueError where scores do not tell entries apart.
    """
    every = torch.cat([s.flatten().cpu() for s in scores.values()])
    if not bool(every.isfinite().all()) or every.max() == every.min():
        raise ValueError(
            f"the scores of all {len(every)} entries are {float(every[0]):.3g} or no numbers: nothing tells them apart. A matrix "
            f"that starts at 0 has no slope beside it; let it start elsewhere, or take score='random'"
        )
    found, edge = {}, None
    if scope == "global" and (n := math.ceil((1.0 - keep) * len(every))) >= 1:
        edge = every.kthvalue(n).values
    for name, score in scores.items():
        flat = score.flatten().cpu()
        if scope == "local":
            n = int((1.0 - keep) * len(flat))
            edge = flat.kthvalue(n).values if n >= 1 else None
        found[name] = torch.ones_like(flat, dtype=torch.bool) if edge is None else flat > edge
    if not any(bool(mask.any()) for mask in found.values()):
        raise ValueError(
            f"keep = {keep} leaves none of the {len(every)} entries: too many scores are {float(every.max()):.3g}"
        )
    return found


class Masked(Method):
    """W = m o w: written in front of a method it keeps a share of all its matrices' entries, which train, the others are 0.

    Only the kept ones are held, trained and saved, and one bit for each entry says which they are. Vectors have no mask.
    """

    paper = "2210.04284"
    category = "unified"
    schedule = Masking
    full: ClassVar[dict[str, tuple[int, ...]]] = {}  # the whole shape of what has a mask
    masked: ClassVar[dict[str, Slot]] = {}
    keep: float = 0.5  # share of the matrices' entries that is kept
    score: Score = "snip"  # what decides which they are
    scope: Scope = "global"  # the share is one of all matrices together, or of each
    n_samples: int = 320  # examples that the score looks at, at most

    def __init_subclass__(cls, name="", **kwargs):
        super().__init_subclass__(name=name, **kwargs)
        if not name:
            return
        cls.masked = {k: s for k, s in cls.slots.items() if len(s.shape.split()) > 1 and s.train and not s.shared}
        other = [b.__name__ for b in cls.__mro__ if b.__dict__.get("schedule") not in (None, Masking)]
        if not cls.masked or other:
            why = f"{other[0]} has a course of its own" if other else "it has no matrix of its own"
            raise TypeError(f"{cls.__name__} cannot be masked: {why}")
        cls.ragged = frozenset(f"{key}_{part}" for key in cls.masked for part in ("values", "bits"))
        for key in cls.masked:
            setattr(cls, key, property(partial(_dense, key)))

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        if config.n_samples < 1:
            raise ValueError(f"{cls.name}: n_samples = {config.n_samples}, but it must be at least 1")
        return config

    @classmethod
    def slots_of(cls, config):
        found = {}
        for key, slot in super().slots_of(config).items():
            if key not in cls.masked:
                found[key] = slot
                continue
            # a column, since weight decay falls on matrices' entries and not on vectors
            found[f"{key}_values"] = param(f"{key}_kept 1", partial(_entries, slot), lr=slot.lr)
            found[f"{key}_bits"] = fixed(f"({key}_size+7)//8", partial(_all, key))
        return found

    def build(self, base, dtype):
        sizes = super().dims(base)
        held = [key for key in super().slots_of(self.config) if key in self.masked]
        self.__dict__["full"] = {key: shapes.sizes(self.masked[key].shape, sizes) for key in held}
        super().build(base, dtype)

    def dims(self, base):
        found = super().dims(base)
        for key, shape in self.full.items():
            there = self._parameters.get(f"{key}_values")
            found[f"{key}_size"] = math.prod(shape)
            found[f"{key}_kept"] = math.prod(shape) if there is None else there.numel()
        return found

    def check_ragged(self, tensors):
        for key, shape in self.full.items():
            if {f"{key}_values", f"{key}_bits"} <= tensors.keys():  # who reads the file says what is missing
                values, held = tensors[f"{key}_values"], tensors[f"{key}_bits"]
                if held.dtype != torch.uint8 or held.shape != (-(-math.prod(shape) // 8),):
                    raise ValueError(f"{key}_bits {tuple(held.shape)} is no mask of {shape}")
                if values.shape != (n := int(bits.unpack(held, shape).sum()), 1):
                    raise ValueError(f"{key}_values are {tuple(values.shape)}, and the mask keeps {n} entries")


CHOICE = ("keep", "score", "scope", "n_samples")


def _dense(key: str, delta: Masked) -> Tensor:
    """The matrix, with zeros where its mask has them."""
    values, shape = getattr(delta, f"{key}_values"), delta.full[key]
    if values.numel() == math.prod(shape):
        return values.view(shape)
    return values.new_zeros(shape).masked_scatter(bits.unpack(getattr(delta, f"{key}_bits"), shape), values)


def _entries(slot, shape, *, base, delta, **_):
    """The method's own start"""
    (full,) = (s for k, s in delta.full.items() if delta.masked[k] is slot)
    return slot.init(full, base=base, delta=delta).reshape(-1, 1)


def _all(key, shape, *, delta, **_):
    return bits.pack(torch.ones(delta.full[key], dtype=torch.bool))


class SparseSequential(Masked, Sequential, name="sparse_adapter"):
    """y' = y + U relu(D y + c) + e behind attention and MLP, of U and D the share of highest scores before training, else 0.

    `dt.SparseAdapter` makes the masked form of a tree.
    """

    lr = (1e-4, 5e-3)
    exceptions = {"identity": "the paper's code starts near the identity, U and D at N(0, 0.02^2), not at it"}
    down: Tensor = param("r d_out", normal(0.02))
    up: Tensor = param("d_out r", normal(0.02))


class SparseParallel(Masked, Parallel, name="sparse_parallel"):
    """y' = y + s A(x) beside the MLP, of A's matrices the share of highest scores before training, else 0."""

    exceptions = {"identity": "U starts at N(0, 0.02^2): scores tell nothing apart beside a U of zeros"}
    down: Tensor = param("r d_in", normal(0.02))
    up: Tensor = param("d_out r", normal(0.02))


class SparseLoRA(Masked, LoRA, name="sparse_lora"):
    """W' = W + (alpha / r) B A, of B and A the share of highest scores before training, else 0."""

    kinds = frozenset({"linear", "conv2d", "embedding"})
    exceptions = {"identity": "B starts at N(0, 0.02^2): scores tell nothing apart beside a B of zeros"}
    a: Tensor = param("r d_in", normal(0.02))
    b: Tensor = param("d_out r", normal(0.02))


def SparseAdapter(
    tree: Tree,
    *,
    keep: float | None = None,
    k: int = 1,
    score: Score = "snip",
    scope: Scope = "global",
    n_samples: int = 320,
) -> Tree:
    """The tree with each method that has a masked form in that form; those that have none stay as they are.

    `k` makes bottlenecks k times as wide and keeps 1 / k of their entries, large and sparse. A method's masked form is a class
    with `Masked` in front of it. Raises ValueError where none of the tree has one.
    """
    if k < 1:
        raise ValueError(f"SparseAdapter: k = {k}, but it must be at least 1")
    keep = (1 / k if k > 1 else Masked.Config().keep) if keep is None else keep
    choice = {"keep": keep, "score": score, "scope": scope, "n_samples": n_samples}
    forms = {}
    for method in METHODS.values():
        if issubclass(method, Masked):
            forms.setdefault(
                next(c for c in method.__mro__ if c.__dict__.get("name") and not issubclass(c, Masked)), method
            )
    found = {path: _form(leaf, forms[leaf.method], choice, k) for path, leaf in tree.leaves() if leaf.method in forms}
    if not found:
        names = ", ".join(sorted({leaf.method.name for _, leaf in tree.leaves()}))
        raise ValueError(
            f"{names} has no masked form; there is one of {', '.join(m.name for m in forms)}. Write one as `class Name(Masked, "
            f"Method, name=...)`"
        )
    return tree.replaced(found)


def _form(leaf: Leaf, method: type[Masked], choice, k: int) -> Leaf:
    config, where = asdict(leaf.config), leaf.method.where if leaf.where is None else leaf.where
    if leaf.start is not None:
        raise ValueError(
            f"SparseAdapter: {leaf.method.name} comes with its values from files; a mask is chosen of fresh ones"
        )
    if k > 1 and "r" not in config:
        raise ValueError(f"{leaf.method.name} has no width r that could be {k} times as large")

    def wide(own):
        return {key: k * v if key == "r" else v for key, v in own.items()}

    if isinstance(where, Per):
        where = Per(tuple((place, tuple(wide(dict(own)).items())) for place, own in where.each))
    return replace(leaf, method=method, config=method.configure(**wide(config), **choice), where=where)


@preset(
    "large_sparse",
    paper="2210.04284",
    category="unified",
    lr=(1e-4, 5e-3),
    exceptions={"identity": "the paper's code starts near the identity, not at it"},
)
def large_sparse(
    r: int = 64,  # bottleneck width of the dense adapter with as many entries
    k: int = 4,  # how many times as wide this one is; it keeps 1 / k of its entries
    score: Score = "snip",  # what decides which they are
) -> Tree:
    """y' = y + A(y) behind attention and MLP, A of width k r with 1 / k of its matrices' entries, the others 0."""
    return SparseAdapter(Sequential(r=r), k=k, score=score)
