"""How deltas run: the layer keeps its class, its name and its keys, and gains one child, `deltas`.

`module.__class__` becomes a cached subclass of the module's own class with another `forward`. The original class is
recorded there and never inferred: others swap classes too (FSDP2, parametrize), and what is no longer ours is refused.

Stacked deltas are an onion: `x` goes through `pre` from the outermost inwards, each `post` receives the `x` that its own
`pre` returned, and a fold-only delta pulls everything inside it onto the weight path.

What one forward knows (masks, ids) is the frozen `Call`, kept on the `Frame` of the attached model while its forward
runs; a block hands it through gradient checkpointing as an argument, so that the recomputation sees the same one.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import base
from .beneath import Beneath
from .compose import names_of
from .method import Delta
from .site import Site
from .storage import guarded

# package -> what to do once it is loaded and a model is attached or unpickled; `deltatune/__init__.py` fills it
INTEGRATIONS: dict[str, Callable[[], None]] = {}
ATTENDS: list[Callable[[nn.Module], bool]] = []  # does this attention look for learned keys and values?
KEEPS: list[Callable[..., tuple[Tensor, Tensor]]] = []  # who appends a site's own keys and values to a cache
ATTACHED: list[Callable[[nn.Module], None]] = []  # what integrations do to a model once an adapter stands on it


def integrate() -> None:
    """Let the integrations of loaded packages install themselves; each does so once."""
    for package, install in INTEGRATIONS.items():
        if package in sys.modules:
            install()


@dataclass(frozen=True, slots=True)
class Call:
    """One forward of the attached model: what a method may read besides its tensors. None where it was not given."""

    input_ids: Tensor | None = None  # (B, T)
    attention_mask: Tensor | None = None  # (B, T), 1 for real tokens
    position_ids: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None
    adapter_ids: Tensor | None = None  # (B), which adapter a row asks for
    task_ids: Tensor | None = None  # (B)
    labels: Tensor | None = None
    n_past: Any = 0  # tokens that lie in the cache: the others of their rows are not in this call
    cache: Any = None
    n_given: int | None = None  # in `generate`, columns that were there at its start

    def mask(self, stack: str = "") -> Tensor | None:
        """The (B, T) attention mask on that side of an encoder-decoder, or of the only side."""
        return self.decoder_attention_mask if stack == "decoder" else self.attention_mask

    def ids(self, stack: str = "") -> Tensor | None:
        """The (B, T) input ids on that side of an encoder-decoder, or of the only side."""
        return self.decoder_input_ids if stack == "decoder" else self.input_ids

    def given(self, length: int, site: Site, device: torch.device) -> Tensor:
        """(B or 1, T), the real tokens of a row that are given and not asked for: what a feature of the whole row may read.

        On a causal stack those are the ones without a label, in `generate` the prompt; a feature that saw the others would
        learn the answers. Raises ValueError where a row has none, or where they are not all in this call.
        """
        mask = self.mask(site.stack)
        if self.n_past or mask is not None and mask.shape[1:] != (length,):
            raise ValueError(
                f"{site.name or 'the model'}: whole rows of {length} tokens under a (B, T) mask are needed here, and this "
                f"call has a part of them or another mask"
            )
        real = torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask != 0
        if site.is_causal is not False:
            labels = self.labels
            if self.n_given is not None:
                real = real & (torch.arange(length, device=device) < self.n_given)
            elif (
                labels is not None and labels.ndim == 2 and labels.shape[1] == length and not labels.is_floating_point()
            ):
                real = real & (labels == -100)
        if not torch.compiler.is_compiling() and bool((empty := ~real.any(1)).any()):
            raise ValueError(
                f"{site.name or 'the model'}: row {int(empty.nonzero()[0])} has no token that is given and not asked for; set "
                f"the labels of its prompt to -100"
            )
        return real

    def keep(self, site: Site, key: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`a` and `b` (B, H, T, D) behind those of earlier calls of one generation; themselves where there is no cache.

        They lie in the cache beside the backbone's own keys and values, so that beams reorder them too.
        """
        if self.cache is None or site.stack == "encoder":
            return a, b
        return KEEPS[0](self.cache, site, key, a, b)


CALL_FIELDS = tuple(name for name in Call.__dataclass_fields__ if name not in ("n_past", "cache", "n_given"))
LEFT = "deltatune_"  # how keys begin of what an encoder's deltas leave in the stash for the decoder
OWN_FIELDS = ("adapter_ids", "task_ids")  # the model's own forward knows nothing of these


@dataclass(slots=True)
class Frame:
    """What the deltas of one model share while a forward runs; empty between calls."""

    call: Call | None = None
    stash: dict[str, Tensor] = field(default_factory=dict)  # the inputs of spans, from entry to exit
    readers: int = 0  # deltas that read the call
    wanted: frozenset[str] = frozenset()  # of OWN_FIELDS, those that some delta reads
    n_given: int | None = None  # while `generate` runs, columns that were there at its start
    beside: dict[str, tuple[nn.Module, ...]] = field(
        default_factory=dict
    )  # the layers of one input, by each one's module
    ahead: dict[str, tuple[Tensor, int, Tensor]] = field(
        default_factory=dict
    )  # their inputs and outputs made with the first
    factored: tuple[Delta, ...] = ()  # whose change is two factors
    low: dict[int, Tensor] | None = None  # while the model's forward runs: these, by id, in the activations' dtype
    among: Callable[..., Any] | None = None  # `adapted` where blocks of rows run under adapters of their own


@dataclass(slots=True)
class Switch:
    """Does an adapter change the forward? One bool that all of its deltas share."""

    on: bool = True


class _Cast:
    """A delta seen with its small floating tensors in the activations' dtype; `x` itself is never cast up.

    Without slots: dynamo looks for them in `__getattr__`, and never comes back.
    """

    def __init__(self, delta: Delta, dtype: torch.dtype) -> None:
        self.delta, self.dtype = delta, dtype

    def __getattr__(self, name: str) -> Any:
        if name == "exact":
            return self.delta
        function = getattr(type(self.delta), name, None)
        if isinstance(function, types.FunctionType):
            return functools.partial(function, self)
        value = getattr(self.delta, name)
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.is_floating_point() else value
        return value


def cast(delta: Delta, dtype: torch.dtype) -> Any:
    """`delta` for activations of `dtype`: itself where its tensors have that dtype already, else a casting view."""
    if not dtype.is_floating_point:
        return delta
    own = torch.float32  # of a delta that has no parameter itself: what it reads from a bank is fp32
    for tensor in delta._parameters.values():  # its first; no generator, which would break a compiled graph
        if tensor is not None:
            own = tensor.dtype
            if tensor.is_meta:
                base.check_present(delta)
            break
    return delta if own == dtype else _Cast(delta, dtype)


def post(delta: Delta, y: Tensor, x: Tensor) -> Tensor:
    """One delta's `post`, on its own rows of a fused projection, with a span's own input."""
    if delta.tap:
        try:
            x = delta.frame.stash.pop(delta.tap)
        except KeyError:
            raise ValueError(f"{delta.site.name}: {delta.site.entry} did not run before {delta.site.module}") from None
    seen = cast(delta, y.dtype)
    if delta.site.rows:
        part = seen.post(base.take_rows(y, delta.site, -1), x)
        return base.put_rows(y, part, delta.site, -1)
    out = seen.post(y, x)
    assert isinstance(out, Tensor)
    return out


def adapted(
    module: nn.Module,
    forward: Callable[..., Any],
    first: str,
    live: Sequence[Delta],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """One site's forward under its live deltas, innermost first."""
    if args:
        x, rest = args[0], args[1:]
    elif first in kwargs:
        kwargs = dict(kwargs)
        x, rest = kwargs.pop(first), ()
    else:
        return forward(module, *args, **kwargs)  # its own error for a call without input
    if (
        len(live) == 1
        and live[0].has_linear
        and live[0].site.kind == "linear"
        and not rest
        and not kwargs
        and not live[0].site.rows
    ):
        delta = live[0]
        weight = module._parameters.get(delta.site.param)
        if weight is None or not hasattr(weight, "full_tensor"):  # sharded weights take the general path
            return cast(delta, x.dtype).linear(x, Beneath(module, forward, delta))
    cut = 0
    for i, delta in enumerate(live, 1):
        if delta.has_fold and not delta.fast:
            cut = i
    inner, outer = live[:cut], live[cut:]
    if cut:
        check_folds(inner[:-1], inner[-1])
    if any(delta.has_around for delta in outer):
        return _onion(module, forward, inner, outer, rest, kwargs, x)
    seen = []
    for delta in reversed(outer):
        if delta.has_pre and delta.site.entry is None:  # a span's runs at its entry
            x = cast(delta, x.dtype).pre(x)
        seen.append(x)
    y = base.apply(module, forward, inner, x, rest, kwargs) if inner else forward(module, x, *rest, **kwargs)
    if not any(delta.has_post for delta in outer):
        return y
    head = y[0] if isinstance(y, tuple) else y
    for delta, own in zip(outer, reversed(seen), strict=True):
        if delta.has_post and delta.fast and delta.site.leave is None:
            head = post(delta, head, own)
    return (head, *y[1:]) if isinstance(y, tuple) else head


def check_folds(inner: Sequence[Delta], outer: Delta) -> None:
    """Raise ValueError where `outer` works on the weight, and one inside it on activations alone."""
    for delta in inner:
        if not delta.has_fold:
            raise ValueError(
                f"{outer.site.name}: {names_of([outer])} works on the weight, and cannot stand around {names_of([delta])}, which "
                f"works on activations alone; put it in front of {names_of([delta])} in the Stack, or at other sites"
            )


Change = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]  # of a layer's own input, given the layer itself


class Inside:
    """What is inside a delta that stands around it: a function of `x`, and at a block of the block's other arguments too.

    A call gives the first output, the hidden states; what else a block gives is kept in `tail`.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        inner: Sequence[Delta],
        within: Sequence[Delta],
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
        changes: tuple[Change, ...] = (),
    ) -> None:
        self.module, self.forward, self.inner, self.within = module, forward, inner, within
        self.rest, self.kwargs, self.changes = rest, kwargs, changes
        self.tail: tuple[Any, ...] | None = None
        self.taps = [(d, d.frame.stash[d.tap]) for d in within if d.tap and d.tap in d.frame.stash]

    def __call__(self, x: Tensor, given: dict[str, Any] | None = None, change: Change | None = None) -> Tensor:
        """The layer and all inside on `x`; `given` are its other arguments by name, instead of those of the call.

        `change(x, layer)` gives what the layer itself gets, behind the changes of all inside; `layer` is the layer alone.
        """
        rest, kwargs = (self.rest, self.kwargs) if given is None else ((), given)
        for delta, left in self.taps:  # what a span's entry left, for each run that ends at its exit
            delta.frame.stash[delta.tap] = left
        changes = self.changes if change is None else (change, *self.changes)
        y = _onion(self.module, self.forward, self.inner, self.within, rest, kwargs, x, changes)
        if isinstance(y, tuple):
            y, self.tail = y[0], y[1:]
        assert isinstance(y, Tensor)
        return y

    def under(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        """What the layer and all inside give on `x` under `delta` too; `y` is what they give without it.

        Of a slice of a fused projection the slice's own rows are meant; the others may be without what is inside.
        """
        seen = cast(delta, x.dtype)
        if delta.has_around:
            return seen.around(x, self)  # type: ignore[no-any-return]
        if delta.fast:
            if delta.has_pre:
                x = seen.pre(x)
                y = self(x)
            return post(delta, y, x) if delta.has_post else y
        alone = not (self.inner or self.within or delta.site.rows)  # DoRA's norm is that of the layer itself
        if delta.has_linear and delta.site.kind == "linear" and alone:
            return seen.linear(x, self)  # type: ignore[no-any-return]
        within = [d for d in self.within if not base.are_apart(d.site, delta.site)]
        check_folds(within, delta)
        layer = (*self.inner, *within, delta)
        for change in self.changes:
            x = change(x, Inside(self.module, self.forward, layer, (), self.rest, self.kwargs))
        made = base.apply(self.module, self.forward, layer, x, self.rest, self.kwargs)
        return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]


def _onion(
    module: nn.Module,
    forward: Callable[..., Any],
    inner: Sequence[Delta],
    outer: Sequence[Delta],
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    changes: tuple[Change, ...] = (),
) -> Any:
    """`adapted` where a delta runs what is inside it itself."""
    if not outer:
        for change in changes:
            x = change(x, Inside(module, forward, inner, (), rest, kwargs))
        return base.apply(module, forward, inner, x, rest, kwargs) if inner else forward(module, x, *rest, **kwargs)
    *within, delta = outer
    run = Inside(module, forward, inner, within, rest, kwargs, changes)
    seen = cast(delta, x.dtype)
    if delta.has_around:
        y = seen.around(x, run)
    else:
        if delta.has_pre and delta.site.entry is None:
            x = seen.pre(x)
        y = run(x)
        if delta.has_post and delta.fast and delta.site.leave is None:
            y = post(delta, y, x)
    return y if run.tail is None else (y, *run.tail)


class Tap(Delta):
    """Stands at a span's entry: runs the owner's `pre` there, and leaves its input for the `post` at the exit."""

    owner: Delta
    has_pre = True
    fast = True

    def __init__(self, owner: Delta) -> None:
        super().__init__()
        self.site = replace(owner.site, entry=None)
        self.switch, self.frame = owner.switch, owner.frame
        self.__dict__["owner"] = owner  # not a child: the owner lives at the exit

    def pre(self, x: Tensor) -> Tensor:
        """The owner's `pre`; the exit takes away what is left for it."""
        owner = self.owner
        if owner.has_pre:
            x = cast(owner, x.dtype).pre(x)
        owner.frame.stash[owner.tap] = x
        return x


class Leave(Delta):
    """Stands at the last block of a span of all blocks, whose delta is at the first, and runs the owner's `post`.

    The owner's tensors are with its `pre`, where sharding gathers them; its `post` sees the last block's own input.
    """

    owner: Delta
    has_post = True
    fast = True

    def __init__(self, owner: Delta) -> None:
        super().__init__()
        self.site = replace(owner.site, leave=None)
        self.switch, self.frame = owner.switch, owner.frame
        self.__dict__["owner"] = owner

    def post(self, y: Tensor, x: Tensor) -> Tensor:
        """The owner's `post`."""
        return cast(self.owner, y.dtype).post(y, x)  # type: ignore[no-any-return]


# A layer of behaviour: given the original class and the forward so far, the next forward; it may add to the namespace.
Layer = Callable[[type, Callable[..., Any], dict[str, Any]], Callable[..., Any]]
LAYERS: dict[str, Layer] = {}
ROOT_LAYERS: dict[
    str, Callable[[nn.Module], bool]
] = {}  # layers of the attached model itself, and which models take them


def layer(name: str) -> Callable[[Layer], Layer]:
    """Register a layer; they apply in the order of registration."""

    def register(function: Layer) -> Layer:
        LAYERS[name] = function
        return function

    return register


@layer("site")
def site_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """The deltas at this module."""
    first, forward = input_name(cls), guarded(cls, forward)

    @functools.wraps(forward)
    def site_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        live = [d for d in self.deltas.values() if d.switch.on]  # type: ignore[operator]
        if not live:
            return forward(self, *args, **kwargs)
        return (live[0].frame.among or adapted)(self, forward, first, live, args, kwargs)

    return site_forward


@layer("block")
def block_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """A block that carries the call through gradient checkpointing: in as an argument, out of it again inside."""

    @functools.wraps(forward)
    def block_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "_deltatune_call" not in kwargs:
            return forward(self, *args, **kwargs)
        frame: Frame = self.__dict__["_deltatune_frame"]
        before, frame.call = frame.call, kwargs.pop("_deltatune_call")
        try:
            return forward(self, *args, **kwargs)
        finally:
            frame.call = before

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.__dict__["_deltatune_frame"].call
        if call is not None:
            kwargs["_deltatune_call"] = call
        return cls.__call__(self, *args, **kwargs)

    namespace["__call__"] = __call__
    return block_forward


def call_of(known: Mapping[str, Any], frame: Frame) -> Call:
    """The record of a forward that was given these arguments."""
    cache = known.get("past_key_values")
    past = getattr(cache, "get_seq_length", None)
    given = {n: v for n in CALL_FIELDS if isinstance(v := known.get(n), Tensor)}
    return Call(**given, n_past=0 if past is None else past(), cache=cache, n_given=frame.n_given)


@layer("root")
def root_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """The attached model itself: it keeps the call while its forward runs."""
    names = [p.name for p in inspect.signature(cls.forward).parameters.values()][1:]  # type: ignore[attr-defined]

    @functools.wraps(forward)
    def root_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attached = self.__dict__.get("_deltatune")
        if attached is None:  # detached; TRL and accelerate's autocast still hold the bound method that they found
            return forward(self, *args, **kwargs)
        frame: Frame = attached.frame
        if kwargs.get("adapter_names") is not None and "adapter_names" not in names:
            raise ValueError(
                "adapter_names is HF PEFT's argument; a model with adapters of deltatune takes adapter_ids"
            )
        given = [n for n in OWN_FIELDS if kwargs.get(n) is not None and n not in names]
        for name in given:
            if name not in frame.wanted:
                raise ValueError(f"{name} was given, but no attached method reads it")
        if not frame.readers:
            return lowered(frame, forward, self, args, kwargs)
        own = {n: kwargs.pop(n) for n in given}
        known = {**dict(zip(names, args, strict=False)), **kwargs, **own}
        before = frame.call
        if before is None:  # else a bare backbone, whose own soft tokens stand around this and know what was given
            frame.call = call_of(known, frame)
        if isinstance(encoded := known.get("encoder_outputs"), dict):  # `generate` ran the encoder by itself
            frame.stash.update({key: state for key, state in encoded.items() if key.startswith(LEFT)})
        try:
            return lowered(frame, forward, self, args, kwargs)
        finally:
            frame.call = before
            frame.stash.clear()

    return root_forward


def lowered(
    frame: Frame, forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's forward, in which factors are cast once for all layers."""
    if not frame.factored or torch.compiler.is_compiling():
        return forward(model, *args, **kwargs)
    frame.low = {}
    try:
        return forward(model, *args, **kwargs)
    finally:
        frame.low = None
        frame.ahead.clear()  # of a layer that did not run, or of a forward that was cut off


@functools.cache
def input_name(cls: type) -> str:
    """The name of the first argument of the class's own forward."""
    names = list(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]
    return names[1] if len(names) > 1 else ""


_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def adapted_class(cls: type, layers: tuple[str, ...]) -> type:
    """The cached subclass of `cls` with these layers of behaviour; name, module and signature are those of `cls`."""
    key = (cls, layers)
    if key not in _classes:
        namespace: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_deltatune_class": (cls, layers),
            "__reduce_ex__": _reduce_ex,
        }
        forward = cls.forward  # type: ignore[attr-defined]
        for name in LAYERS:
            if name in layers:
                forward = LAYERS[name](cls, forward, namespace)
        namespace["forward"] = forward
        _classes[key] = type(cls.__name__, (cls,), namespace)
    return _classes[key]


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    cls, layers = type(self)._deltatune_class  # type: ignore[attr-defined]
    return _rebuild, (cls, layers), self.__dict__


def _rebuild(cls: type, layers: tuple[str, ...]) -> nn.Module:
    integrate()
    module: object = object.__new__(adapted_class(cls, layers))
    assert isinstance(module, nn.Module)
    return module


def original(module: nn.Module, name: str) -> tuple[type, tuple[str, ...]]:
    """The module's class before any attach, and the layers it has. Raises ValueError where others swapped it since."""
    found: tuple[type, tuple[str, ...]] | None = type(module).__dict__.get("_deltatune_class")
    if found is not None:
        return found
    if hasattr(type(module), "_deltatune_class"):
        raise ValueError(
            f"{name or 'the model'}: its class was replaced by {type(module).__module__}.{type(module).__qualname__} after "
            f"an adapter was attached; attach, detach and merge before sharding or parametrizing"
        )
    return type(module), ()


def swap(
    module: nn.Module, name: str, add: Sequence[str] = (), drop: Sequence[str] = (), own: type | None = None
) -> None:
    """Add or drop layers of behaviour. Without any left the module has its own class again, or from now on `own`."""
    cls, layers = original(module, name)
    cls = own or cls
    if _is_own_forward(module):
        del module.__dict__["forward"]  # else it would outlive the class
    wanted = tuple(n for n in LAYERS if (n in layers or n in add) and n not in drop)
    module.__class__ = adapted_class(cls, wanted) if wanted else cls
    if "_old_forward" in module.__dict__:  # accelerate's hooks keep the bound method of the class that they found
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _is_own_forward(module: nn.Module) -> bool:
    """Is the instance's `forward` the class's own? accelerate leaves it there when its hooks are removed."""
    left = module.__dict__.get("forward")
    return getattr(left, "__self__", None) is module and getattr(left, "__func__", None) is type(module).forward


_READ_DIRECTLY = {
    nn.MultiheadAttention: "torch.nn.MultiheadAttention reads this layer's weight without calling it",
    nn.TransformerEncoderLayer: "torch.nn.TransformerEncoderLayer's fast path reads this layer's weight without calling it",
}


def check_reachable(modules: Mapping[str, nn.Module], name: str) -> None:
    """Raise ValueError with the reason where a delta at module `name` could have no effect."""
    module = modules[name]
    patched = module.__dict__.get("forward")
    if patched is not None and "_old_forward" not in module.__dict__ and not _is_own_forward(module):
        raise ValueError(
            f"{name or 'the model'}: its forward was replaced on the instance (by {getattr(patched, '__module__', '?')}), "
            f"which would bypass the adapter; attach before such patches"
        )
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        for kind, reason in _READ_DIRECTLY.items():
            if isinstance(modules.get(parent), kind):
                raise ValueError(f"{name}: {reason}, so a delta there would have no effect")


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the model's own modules, each once, without deltas and banks."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [
            (f"{name}.{key}" if name else key, child)
            for key, child in module._modules.items()
            if child is not None and not (key in ("deltas", "banks") and isinstance(child, (Deltas, Banks)))
        ]
        stack.extend(reversed(children))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the states: what the first plain floating parameter of the base has."""
    own = (p for _, module in walk(model) for p in module._parameters.values() if type(p) is nn.Parameter)
    return next((p.dtype for p in own if p.is_floating_point()), torch.float32)


class _Beside(nn.ModuleDict):
    """A child beside a module's own ones: `nn.Sequential`, and a loop over children, run it too; it gives back what it gets."""

    def forward(self, x: Any) -> Any:
        return x


class Deltas(_Beside):
    """The deltas at one module, by adapter, innermost first."""


class Banks(_Beside):
    """The shared tensors of the attached model, by adapter."""
