"""A method, declared: hyperparameters are fields with a default and a comment, tensors are `param("r d_in")`.

    class LoRA(Method, name="lora"):
        \"\"\"W' = W + (alpha / r) B A, with B = 0 at the start.\"\"\"

        paper = "2106.09685"
        r: int = 8
        alpha: float = 16.0
        a: Tensor = param("r d_in", kaiming)
        b: Tensor = param("d_out r")

        def fold(self, weight, bias):
            return weight + self.alpha / self.r * (self.b @ self.a), bias

The contract is six words, all optional, all pure: `fold`, `pre`, `post`, `around`, `kv`, `tokens`; `linear` and `product` are
for speed. From
the declaration come allocation, the parameter count, the file layout, the command line and the docs. Calling the class
gives a leaf of a tree (`dt.LoRA(r=16)`); `attach` makes the deltas, one per site.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, make_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

import torch
from torch import Tensor, nn

from . import shapes
from .bank import Bank
from .base import Base, place_of
from .compose import PRESETS, Leaf, Preset, Where, comments_in, layers_of, meet_fold, meet_post, names_of, where_of
from .errors import unknown
from .inits import Init, kaiming, zeros
from .site import Site
from .sources import folders_of, from_sources

if TYPE_CHECKING:
    from .runtime import Call, Frame, Switch
    from .schedule import Schedule
    from .sources import Saved

METHODS: "dict[str, type[Method]]" = {}


@dataclass(frozen=True, slots=True)
class Slot:
    """One declared tensor: its shape in named dimensions, how it starts, whether it is trained and whether shared."""

    shape: str
    init: Init
    train: bool
    shared: bool = False
    by: str = "shape"  # what has one shared tensor: sites of one shape, also of one role, also of one stack
    lr: str = ""  # the hyperparameter that its learning rate is a multiple by


def param(shape: str, init: Init = zeros, *, lr: str = "") -> Any:
    """A trained tensor; `lr` names the hyperparameter whose value times the run's learning rate is its own."""
    return Slot(shape, init, train=True, lr=lr)


def fixed(shape: str, init: Init) -> Any:
    """A tensor that is saved and not trained."""
    return Slot(shape, init, train=False)


def bank(
    shape: str,
    init: Init = kaiming,
    *,
    train: bool = False,
    by: Literal["shape", "role", "stack"] = "shape",
    lr: str = "",
) -> Any:
    """A tensor shared by every site of one shape: random from the seed and never saved, or trained and saved once.

    With `by="role"` each role has its own (q and v apart), with `by="stack"` each role of encoder and of decoder.
    """
    return Slot(shape, init, train=train, shared=True, by=by, lr=lr)


class Delta(nn.Module):
    """What stands at a site: a method's state there, or several that meet."""

    site: Site
    has_pre: bool = False
    has_post: bool = False
    has_fold: bool = False
    has_linear: bool = False
    has_product: bool = False
    has_pair: bool = False
    has_around: bool = False
    changes_input: bool = False  # it stands around a norm, and says by `change` what the norm itself gets
    has_kv: bool = False
    has_tokens: bool = False
    has_embed: bool = False
    has_gaps: bool = False
    reads_call: bool = False
    fast: bool = False  # run in activation space here
    random_fold: bool = False  # `fold` draws: it cannot be computed again in the backward
    noisy: bool = False  # its training forward is random: the weight path, which knows no rows, cannot run it
    seals: bool = False  # its output is its own alone: no gradient goes from it into the backbone
    replaces: bool = False  # its weight is its own alone: nothing is left of what is inside it at the layer
    frame: "Frame"
    switch: "Switch"
    tap: str = ""  # a span's: under which key the entry leaves its input
    path: str = "0"  # its leaf's, in the tree

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted (O, I) weight and (O) bias, out of place. Defining it is what makes a method mergeable."""
        raise NotImplementedError

    def pre(self, x: Tensor) -> Tensor:
        """The site's input (..., I), adapted."""
        return x

    def post(self, y: Tensor, x: Tensor) -> Tensor:
        """The site's output (..., O), adapted; `x` is the input that it came from."""
        return y

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The whole layer at once, for a delta alone at a linear site; equal to `post(base(x), x)`."""
        raise NotImplementedError

    def pair(self) -> tuple[Tensor, Tensor, float]:
        """A (R, I), B (O, R) and s, tensors of its own in their own dtype, of the change s B A that `linear` runs by a kernel."""
        raise NotImplementedError

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The whole layer at once, of a delta alone on a plain (O, I) weight; equal to `F.linear(x, *fold(weight, bias))`."""
        raise NotImplementedError

    def around(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer with `base`, the layer itself and all inside, called as often as it takes; at `around_kinds` alone."""
        raise NotImplementedError

    def kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B or 1, H_kv, P, D) to put in front of the attention's own (B, H_kv, T, D)."""
        raise NotImplementedError

    def tokens(self, batch: Tensor) -> Tensor:
        """(B, P, D) to put in front of the model's embedded input `batch` (B, T, D)."""
        raise NotImplementedError

    def gaps(self, batch: Tensor) -> Tensor:
        """(B or 1, P), in front of which of its row's tokens each of `tokens` stands, 0 to T; without it all stand in front."""
        raise NotImplementedError

    def embed(self, batch: Tensor, places: Tensor) -> Tensor:
        """The embedded input (B, T, D), adapted; `places` (1 or B, T) says which of its row's real tokens each is, from 0."""
        raise NotImplementedError

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`fold`, under the name that `torch.func.functional_call` calls: fused experts run it by vmap."""
        return self.fold(weight, bias)


_WORDS = ("pre", "post", "fold", "linear", "pair", "product", "around", "kv", "tokens", "embed", "gaps")
_WEIGHTS = frozenset({"linear", "conv2d", "embedding", "experts"})


@dataclass_transform(kw_only_default=True, field_specifiers=(param, fixed, bank))
class Method(Delta):
    """One idea. A subclass with a name is final, enters the registry, and has no `__init__`."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # arXiv id, or where else it is published
    category: ClassVar[str] = ""  # of the survey: baseline, additive, partial, reparameterized, hybrid, unified, ...
    where: ClassVar[str] = "q,v"  # default place
    kinds: ClassVar[frozenset[str]] = frozenset()  # the kinds of site it can sit on; by default what its words allow
    fast_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})  # weight kinds on which pre and post mean the same
    around_kinds: ClassVar[frozenset[str]] = frozenset()  # the kinds on which it says its maths by `around`
    ragged: ClassVar[frozenset[str]] = frozenset()  # slots whose shape the course decides; a file brings its own
    limits: ClassVar[Mapping[str, str]] = {}  # hyperparameter -> its largest value, in the language of shapes
    lr: ClassVar[tuple[float, float]] = (
        1e-4,
        1e-2,
    )  # range of learning rates (AdamW) that the paper and its users take
    in_place: ClassVar[bool] = False  # trains the base's own parameters
    rebases: ClassVar[bool] = False  # its start quantises the base for good, and a file of it belongs to that base
    quantised: ClassVar[str] = (
        ""  # the format of `deltatune.quant` that its base has by default; a plain one is refused
    )
    paged: ClassVar[bool] = (
        False  # the trainers' AdamW keeps its state in pages, which CUDA moves where memory runs short
    )
    starts_on: ClassVar[int] = (
        0  # training rows that its start looks at, at most, where `train` and `compare` have them
    )
    helper: ClassVar[bool] = False  # a part of trees, no candidate of a comparison by itself
    schedule: ClassVar["type[Schedule] | None"] = None
    live: ClassVar[tuple[str, ...]] = ()  # hyperparameters that no tensor depends on: `adapter.set` changes them
    sources: ClassVar[str] = ""  # the method whose saved adapters it is made of
    needs_sources: ClassVar[bool] = True  # or can start without them
    exceptions: ClassVar[Mapping[str, str]] = {}  # contract check -> why this method is exempt
    still: ClassVar[Mapping[str, str]] = {}  # trained slot -> why its gradient may be zero
    slots: ClassVar[dict[str, Slot]] = {}
    Config: ClassVar[type]
    config: Any

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        notes = inspect.get_annotations(cls)
        own = {
            k: cls.__dict__.get(k, MISSING) for k in (*notes, *(k for k, v in vars(cls).items() if isinstance(v, Slot)))
        }
        own = {k: v for k, v in own.items() if "ClassVar" not in str(notes.get(k, ""))}
        bases: list[Any] = [b for b in reversed(cls.__bases__) if hasattr(b, "Config")]
        slots = {k: v for b in bases for k, v in b.slots.items()}
        cls.slots = {**slots, **{k: v for k, v in own.items() if isinstance(v, Slot)}}
        hyper: list[Any] = [(f.name, f.type, f.default) for b in bases for f in fields(b.Config)]
        for k, v in own.items():
            if isinstance(v, Slot):
                delattr(cls, k)
            elif k not in Delta.__annotations__ and k not in Method.__annotations__:
                if v is MISSING:
                    raise TypeError(f"{cls.__name__}.{k}: a hyperparameter needs a default")
                hyper.append((k, notes[k], v))
        hyper = list({name: (name, *rest) for name, *rest in hyper}.values())  # the class's own after its bases'
        cls.Config = make_dataclass(f"{cls.__name__}Config", hyper, frozen=True, kw_only=True)
        cls.Config.__module__, cls.Config.__qualname__ = (
            cls.__module__,
            f"{cls.__qualname__}.Config",
        )  # where pickle looks
        for word in _WORDS:
            setattr(cls, f"has_{word}", getattr(cls, word) is not getattr(Delta, word))
        first = {word: next(c for c in cls.__mro__ if word in c.__dict__) for word in ("pair", "linear")}
        cls.has_pair &= issubclass(
            first["pair"], first["linear"]
        )  # of a `linear` that another class wrote it says nothing
        for key, slot in cls.slots.items():
            shapes.parse(slot.shape)
            if slot.shared:
                setattr(cls, key, property(partial(shared_tensor, key)))
        if name and not cls.kinds:
            cls.kinds = (
                _WEIGHTS if cls.has_fold
                else frozenset({"attention"}) if cls.has_kv
                else frozenset({"input"}) if cls.has_tokens or cls.has_embed
                else frozenset({"linear"})
            )  # fmt: skip
        if name:
            if name in METHODS and _defined(METHODS[name]) != _defined(cls):
                raise ValueError(f"two methods are named {name!r}: {_defined(METHODS[name])} and {_defined(cls)}")
            cls.name = name
            METHODS[name] = cls

    def __new__(  # type: ignore[misc]
        cls,
        *,
        where: "Where | list[str]" = None,
        layers: Any = None,
        sources: "Sequence[Any] | None" = None,
        **hyper: Any,
    ) -> Leaf:
        """A leaf: this method with its hyperparameters, its place, and the folders of the adapters that it is made of."""
        if not cls.name:
            raise TypeError(f"{cls.__name__} has no name: it is the common part of other methods")
        start = None
        if sources is not None:
            if not cls.sources:
                raise ValueError(f"{cls.name} is not made of saved adapters: it takes no sources")
            start = partial(from_sources, cls.start, cls.name, cls.sources, folders_of(cls.name, sources))
            if "n_sources" in {f.name for f in fields(cls.Config)}:
                hyper.setdefault("n_sources", len(sources))
        return Leaf(cls, cls.configure(**hyper), where_of(where), layers_of(layers), start)

    @classmethod
    def start(cls, adapter: Any, path: str, sources: "list[Saved]") -> None:
        """Fill the deltas of the leaf `path` from saved adapters that fit this backbone. Raises ValueError where they do not."""
        raise NotImplementedError(f"{cls.name} declares sources")

    @classmethod
    def looks(cls, leaf: Leaf, batches: "Iterable[Any]") -> Leaf:
        """The leaf, whose start looks at `batches`, of at most `starts_on` training rows."""
        raise NotImplementedError(f"{cls.name} declares starts_on")

    @classmethod
    def configure(cls, **hyper: Any) -> Any:
        """The hyperparameters, checked. Raises ValueError with the nearest name, where a value has another type, and where
        a tensor's learning rate would not be above 0.
        """
        known = {f.name: f for f in fields(cls.Config)}
        for key, value in hyper.items():
            if key not in known:
                raise unknown(f"hyperparameter of {cls.name}", key, known)
            hyper[key] = _typed(cls.name, key, value, known[key].type)
        config = cls.Config(**hyper)
        for key in dict.fromkeys(slot.lr for slot in cls.slots.values() if slot.lr):
            if getattr(config, key) <= 0:  # torch checks an optimiser's default alone, not its groups'
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must lie above 0")
        return config

    @classmethod
    def slots_of(cls, config: Any) -> Mapping[str, Slot]:
        """The tensors that it has under these hyperparameters; by default all that are declared."""
        return cls.slots

    @classmethod
    def fits(cls, config: Any, site: Site) -> bool:
        """Is this one of the selected sites that the method means? By default all are."""
        return True

    @classmethod
    def numbers(cls, config: Any, sites: "Sequence[Site]") -> "Mapping[str, Mapping[str, int | float]]":
        """By site name, what a site's delta has to know of all the leaf's sites: attributes, and names in its shapes.

        An attention's matrices come with its `n_kv_heads` and `d_head`, 0 where they are not known.
        """
        return {}

    @classmethod
    def make(
        cls,
        config: Any,
        site: Site,
        module: nn.Module,
        shared: Bank,
        path: str = "0",
        numbers: "Mapping[str, int | float] | None" = None,
    ) -> "Method":
        """Build the delta of one site. Raises ValueError naming the site and the number that does not fit."""
        self = cls.blank()
        nn.Module.__init__(self)
        for f in fields(config):
            object.__setattr__(self, f.name, getattr(config, f.name))
        self.__dict__["_numbers"] = dict(numbers or {})
        self.__dict__.update(numbers or {})
        self.config, self.site = config, site
        self.__dict__["_bank"] = (shared, {})
        self.path = path
        weighted = site.kind in _WEIGHTS or site.kind == "norm"
        self.has_around = site.kind in cls.around_kinds
        self.fast = (self.has_pre or self.has_post) and (not weighted or site.kind in cls.fast_kinds)
        self.changes_input = self.has_around and site.kind == "norm"
        self.fast = self.fast or self.has_around
        if site.rows and self.has_pre and self.fast:
            self.fast = False  # a slice of a fused projection has no input of its own
        dropout = getattr(config, "dropout", 0.0)
        if not 0 <= dropout < 1:
            raise ValueError(f"{site.name}: {cls.name}: dropout = {dropout}, but it must lie between 0 and 1")
        self.noisy = dropout > 0
        if self.noisy and not (self.fast or self.has_linear and site.kind == "linear" and not site.rows):
            raise ValueError(
                f"{site.name}: {cls.name}: dropout = {dropout} cannot be honoured on a {site.kind}, where it works on the weight"
            )
        if weighted and not self.fast and not self.has_fold:
            what = "a slice of a fused projection" if site.rows else f"a {site.kind}"
            raise ValueError(f"{site.name}: {cls.name} cannot sit on {what}")
        device, dtype = place_of(module, site)
        keep = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.device(device):
            try:
                self.build(Base(module, site), keep)
            except ValueError as error:
                raise ValueError(f"{site.name}: {cls.name}: {error}") from None
        return self

    @classmethod
    def blank(cls) -> "Method":
        """An instance without state, for `make` and for unpickling."""
        return object.__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self),), self.__dict__

    def build(self, base: Base, dtype: torch.dtype) -> None:
        """Allocate the declared tensors on the current device. Odd methods override it and make ordinary modules."""
        dims = self.dims(base)
        self.check_limits(dims)
        lead = (self.site.n_experts,) if self.site.kind == "experts" else ()
        for key, slot in self.slots_of(self.config).items():
            shape = shapes.sizes(slot.shape, dims)
            if slot.shared:
                device = torch.empty(0).device
                shared, keys = self.__dict__["_bank"]
                keys[key] = self.bank_key(key, slot, shape)
                shared.claim(keys[key], shape, slot.init, slot.train, device, dtype, self)
                continue
            if lead:
                each = [Base(base.module, base.site, i) for i in range(lead[0])]
                value = torch.stack([slot.init(shape, base=one, delta=self) for one in each])
            else:
                value = slot.init(shape, base=base, delta=self)
            if tuple(value.shape) != (*lead, *shape):
                raise ValueError(f"the init of {key} gave {tuple(value.shape)}, declared as {slot.shape!r} = {shape}")
            value = value.detach().contiguous()  # as sharding asks; the base's own may be a transposed view
            value = value.to(dtype) if value.is_floating_point() else value
            if slot.train:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)

    def bank_key(self, key: str, slot: Slot, shape: tuple[int, ...]) -> str:
        """Under which key of the bank a shared tensor is kept."""
        role = f"_{self.site.role}".replace(".", "_") if slot.by != "shape" else ""
        stack = f"_{self.site.stack}" if slot.by == "stack" and self.site.stack else ""
        leaf = f"{self.path}_".replace(".", "_") if slot.train and self.path != "0" else ""  # each leaf trains its own
        return f"{leaf}{key}{role}{stack}_{'x'.join(map(str, shape))}"

    def bank_parameter(self, key: str) -> Tensor:
        """The shared tensor of a slot, itself and not as the method reads it."""
        shared, keys = self.__dict__["_bank"]
        value: Tensor = shared.tensor(keys[key])
        return value

    def dims(self, base: Base) -> dict[str, Any]:
        """The names that shape strings may use: the site's sizes and every numeric hyperparameter."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self.config)}
        sizes = {
            "d_in": self.site.d_in,
            "d_out": self.site.d_out,
            "n_kv_heads": self.site.n_kv_heads,
            "d_head": self.site.d_head,
        }
        numbers = {k: v for k, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        of_all: dict[str, Any] = self.__dict__["_numbers"]
        return sizes | numbers | of_all

    def check_limits(self, dims: Mapping[str, Any]) -> None:
        """Raise ValueError where a hyperparameter that is a size is below 1 or above its declared limit."""
        for key, limit in self.limits.items():
            (most,) = shapes.sizes(limit, dims)
            if not 1 <= dims[key] <= most:
                raise ValueError(f"{key} = {dims[key]}, but it must lie between 1 and {limit} = {most}")

    @property
    def draws_from_seed(self) -> bool:
        """Does it read tensors that are drawn from the adapter's seed and never saved?"""
        return any(slot.shared and not slot.train for slot in self.slots_of(self.config).values())

    def freeze(self) -> None:
        """Make its tensors buffers, saved and not trained. Raises ValueError where some are trained for all sites at once."""
        shared = [key for key, slot in self.slots_of(self.config).items() if slot.shared and slot.train]
        if shared:
            raise ValueError(
                f"{self.site.name or 'the model'}: {self.name} trains {', '.join(shared)} for all of its sites at once; it "
                f"cannot be frozen"
            )
        for key, p in list(self._parameters.items()):
            if p is not None:
                del self._parameters[key]
                self.register_buffer(key, p.detach())

    def finished(self, leaf: Leaf) -> tuple[Leaf, dict[str, Tensor]]:
        """The leaf and its tensors by slot as they are saved once training is over: without what only training needs."""
        return leaf, self.state_dict()

    @classmethod
    def check_set(cls, config: Any, deltas: "Sequence[Method]") -> None:
        """Raise ValueError where the standing deltas of a leaf cannot take these hyperparameters; by default they can."""

    def check_base(self, base: Base, tensors: "Mapping[str, Tensor]") -> None:
        """Raise ValueError where a file's tensors belong to another layer than `base`; by default they never do."""

    def check_ragged(self, tensors: "Mapping[str, Tensor]") -> None:
        """Raise ValueError where a file's ragged tensors do not fit each other, or the site; by default they do."""

    @classmethod
    def n_moving(cls, config: Any, n: int) -> int:
        """How many of the `n` entries that an in-place method trains can move."""
        return n

    @property
    def exact(self) -> "Method":
        """Itself, its tensors in their own dtype, also where the words run on a view that is cast to the activations'."""
        return self

    @property
    def call(self) -> "Call":
        """The record of the forward that is running. Raises ValueError outside the model's own forward."""
        if self.frame.call is None:
            raise ValueError(
                f"{self.site.name}: {self.name} reads the call's masks and ids, but the model's own forward is not "
                f"running; call the model that the adapter was attached to"
            )
        return self.frame.call

    def tasks(self, n_rows: int, device: torch.device) -> Tensor:
        """(B), the number of each row's task: the call's `task_ids`, which a method with one task can do without.

        Raises ValueError where they are missing or not one of `n_tasks`.
        """
        ids, at, n = self.call.task_ids, self.site.name or "the model", self.config.n_tasks
        if ids is None and n == 1:
            return torch.zeros(n_rows, dtype=torch.long, device=device)
        if ids is None or ids.shape != (n_rows,):
            got = "none" if ids is None else tuple(ids.shape)
            raise ValueError(f"{at}: {self.name} with {n} tasks needs task_ids of shape ({n_rows},), got {got}")
        if not torch.compiler.is_compiling() and (wrong := ids[(ids < 0) | (ids >= n)]).numel():
            raise ValueError(f"{at}: task id {int(wrong[0])}, but {self.name} has the tasks 0 to {n - 1}")
        return ids

    @classmethod
    def about(cls) -> str:
        """Its equation, or its one fact: the first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def mergeable(cls) -> bool:
        """Can it be folded into the weight?"""
        return bool(cls.has_fold)

    @classmethod
    def count(cls) -> str:
        """The trained parameters at one site, as a formula in the site's sizes and the hyperparameters."""
        terms = [
            "*".join(d.text for d in shapes.parse(s.shape)) or "1"
            for s in cls.slots_of(cls.configure()).values()
            if s.train and not s.shared
        ]
        return " + ".join(terms) or ("the base's own" if cls.in_place else "0")

    @classmethod
    def hyper(cls) -> list[tuple[str, Any, Any]]:
        """(name, type, default) of each hyperparameter, in order."""
        return [(f.name, f.type, f.default) for f in fields(cls.Config)]

    @classmethod
    def hyperparameters(cls) -> list[tuple[str, str, Any, str]]:
        """(name, type, default, comment) of each, in order."""
        comments = _comments(cls)
        return [(f.name, _kind(f.type), f.default, comments.get(f.name, "")) for f in fields(cls.Config)]


def named(name: str) -> "type[Method] | Preset":
    """The method or the preset of that name. Raises ValueError with the nearest one."""
    found = METHODS.get(name) or PRESETS.get(name)
    if found is None:
        raise unknown("method", name, [*METHODS, *PRESETS])
    return found


class Meet(Delta):
    """Several deltas that meet at one site under a node of the tree."""

    def __init__(self, op: str, parts: list[Delta]) -> None:
        super().__init__()
        self.op, self.site = op, parts[0].site
        self.parts = nn.ModuleList(parts)
        self.has_fold = all(p.has_fold for p in parts)
        self.has_post = all(p.fast and not p.has_pre and not p.has_around for p in parts)
        self.has_around = self.changes_input = all(p.changes_input for p in parts)
        self.has_kv = any(p.has_kv for p in parts)
        self.has_pre = any(p.has_pre and p.has_kv for p in parts)
        self.has_tokens = any(p.has_tokens for p in parts)
        self.has_embed = any(p.has_embed for p in parts)
        self.reads_call = any(p.reads_call for p in parts)
        self.fast = self.has_post or self.has_around
        self.random_fold = any(p.random_fold for p in parts)
        self.noisy = any(p.noisy for p in parts)
        if op == "average" and (self.has_kv or self.has_tokens or self.has_embed):
            raise ValueError(
                f"{self.site.name}: {names_of(parts)} cannot meet in {op}: keys, values and tokens that were learned have no mean; "
                f"Sum and Stack put them one behind the other"
            )
        if not any((self.has_fold, self.has_post, self.has_around, self.has_kv, self.has_tokens, self.has_embed)):
            without = names_of([p for p in parts if not p.has_fold])
            raise ValueError(
                f"{self.site.name}: {names_of(parts)} cannot meet in {op}: {without} has no fold, and not all work on the output "
                f"alone; put them side by side with Stack at the top of the tree, or at different sites"
            )

    @property
    def _parts(self) -> list[Delta]:
        return [p for p in self.parts if isinstance(p, Delta)]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The node over its parts in weight space."""
        return meet_fold(self.op, self._parts, weight, bias)

    def post(self, y: Tensor, x: Tensor) -> Tensor:
        """The node over its parts in activation space."""
        from .runtime import cast

        return meet_post(self.op, self._parts, y, x, lambda part, y, x: cast(part, y.dtype).post(y, x))

    def around(self, x: Tensor, base: Any) -> Tensor:
        """The layer, whose own input is changed as the node says of its parts' changes."""
        return base(x, change=self._change)  # type: ignore[no-any-return]

    def _change(self, z: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        from .runtime import cast

        asked = Asked(z, layer)
        return meet_post(self.op, self._parts, z, z, lambda part, z, _: cast(part, z.dtype).around(z, asked))

    def pre(self, x: Tensor) -> Tensor:
        """What parts with keys and values look at in the attention's input."""
        from .runtime import cast

        for part in self._parts:
            if part.has_pre and part.has_kv:
                x = cast(part, x.dtype).pre(x)
        return x

    def kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The parts' keys and values, one behind the other."""
        from .runtime import cast

        pairs = [cast(p, key.dtype).kv(key, value) for p in self._parts if p.has_kv]
        b = max(k.shape[0] for k, _ in pairs)
        keys, values = ([t.expand(b, -1, -1, -1) for t in ts] for ts in zip(*pairs, strict=True))
        return torch.cat(keys, 2), torch.cat(values, 2)

    def tokens(self, batch: Tensor) -> Tensor:
        """The parts' tokens, one behind the other."""
        from .runtime import cast

        found = [cast(p, batch.dtype).tokens(batch) for p in self._parts if p.has_tokens]
        return torch.cat([t.expand(batch.shape[0], -1, -1) for t in found], 1)  # (1, P, D) beside (B, P, D)

    def embed(self, batch: Tensor, places: Tensor) -> Tensor:
        """What the parts change of the embedded input, added up."""
        from .runtime import cast

        moved = [cast(p, batch.dtype).embed(batch, places) - batch for p in self._parts if p.has_embed]
        return torch.stack([batch, *moved]).sum(0)


class Asked:
    """In a layer's place: what a delta around it would change of the layer's own input, and nothing runs behind it.

    Several may be asked of one input `x`, on which the layer runs once.
    """

    def __init__(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> None:
        self.x, self.layer, self.y = x, layer, layer(x)

    def __call__(self, x: Tensor, change: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        return change(x, self._read)

    def _read(self, x: Tensor) -> Tensor:
        return self.y if x is self.x else self.layer(x)


def shared_tensor(key: str, delta: Method) -> Tensor:
    """The tensor that `delta` shares with others under the slot `key`."""
    return delta.bank_parameter(key)


def _blank(cls: type[Method]) -> Method:
    return cls.blank()


def _defined(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _typed(method: str, key: str, value: Any, kind: Any) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option in (None, type(None)) and value is None:
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(method, key, v, typing.get_args(option)[0]) for v in value)
        if (
            isinstance(option, type)
            and option is not float
            and isinstance(value, option)
            and (option is bool or not isinstance(value, bool))
        ):
            return value
    raise ValueError(f"{method}: {key} must be {_kind(kind)}, not {value!r}")


def _kind(kind: Any) -> str:
    """A hyperparameter's type in words; a choice as its options."""
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"list of {_kind(typing.get_args(kind)[0])}"
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field of the class's source; none where the source is not there."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base not in (object, nn.Module, Delta, Method):
            found |= comments_in(base)
    return found
