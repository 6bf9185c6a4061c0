"""Several deltas at one site under a node with tensors of its own: how much of each runs, said by a mixer.

    y' = y + sum_i w_i(x) (f_i(x) - y)         f_i the site under child i alone, y the site without any

A mixer is a method like any other, a leaf of the tree behind the node's children, that stands wherever a child does.
Keys and values, and soft tokens, are put one behind the other, each scaled by its child's weight of the row.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .method import METHODS, Delta, Meet, Method
from .site import KINDS

MIXERS: "dict[str, type[Mixer]]" = {}


class Mixer(Method):
    """The common part of what decides: the weights, and how changes are put together under them.

    It is declared like a method, and is none: a node brings it, and no tree names it as a leaf.
    """

    kinds = frozenset(KINDS)
    fast_kinds = kinds
    where = "block"  # never looked at: it stands where the node's children do
    helper = True
    n: int = 1  # children

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(name, **kwargs)
        if name:
            MIXERS[name] = METHODS.pop(name)  # type: ignore[assignment]

    @property
    def reads_input(self) -> bool:
        """Do the weights depend on the site's input?"""
        return True

    @property
    def is_constant(self) -> bool:
        """Are the weights the same for every row? Then the node folds where its children do."""
        return False

    @property
    def is_per_row(self) -> bool:
        """Does a row have one weight for all of its tokens?"""
        return True

    def weights(self, x: Tensor | None) -> Tensor:
        """(B or 1, T or 1, n), how much of each child runs; x (B, T, I) is the site's input."""
        raise NotImplementedError

    def post(self, y: Tensor, x: Tensor) -> Tensor:
        """Nothing: what runs at the site is the node, which asks for `mix`."""
        return y

    def mix(self, x: Tensor, y: Tensor, changes: Mapping[int, Tensor], seen: Tensor) -> Tensor:
        """y plus the children's changes (..., O), each times its weight; `seen` is y, or the norm of it that children read."""
        w = self.weights(x)
        for i, change in changes.items():
            y = y + per_token(w, i, change) * change
        return y

    def rows(self) -> Tensor | None:
        """(B), the child that each row runs, -1 for none; None where rows may run several."""
        return None

    def in_front(self, w: Tensor, parts: Mapping[int, Tensor], dim: int) -> Tensor:
        """What the children put in front of the keys or of the input, (B or 1, ..., P, ...) with P at `dim`."""
        shape = [-1] + [1] * (next(iter(parts.values())).ndim - 1)
        scaled = [w[:, 0, i].to(part.dtype).view(shape) * part for i, part in parts.items()]
        n_rows = max(part.shape[0] for part in scaled)
        return torch.cat([part.expand(n_rows, *part.shape[1:]) for part in scaled], dim)


def per_token(w: Tensor, i: int, like: Tensor) -> Tensor:
    """The i-th weights (B or 1, T or 1, n) for values (B, T, O); where these are rows alone, (B, O), as (B, 1)."""
    own = w[..., i].to(like.dtype)
    return own[..., None] if like.ndim > 2 else own[:, :1]


class Mixed(Meet):
    """The children that stand at one site, and their mixer."""

    op: ClassVar[str] = "mixed"  # type: ignore[misc]

    def __init__(self, parts: Sequence[tuple[int, Delta]], mixer: Method) -> None:
        Delta.__init__(self)
        assert isinstance(mixer, Mixer)
        self.site = mixer.site
        self.parts = torch.nn.ModuleList([*(p for _, p in parts), mixer])
        self.numbers = [i for i, _ in parts]
        own = [p for _, p in parts]
        where = self.site.name or "the model"
        self.reads_call = mixer.reads_call or any(p.reads_call for p in own)
        self.random_fold = any(p.random_fold for p in own)
        self.has_kv = any(p.has_kv for p in own)
        self.has_tokens, self.has_embed = (any(getattr(p, f"has_{w}") for p in own) for w in ("tokens", "embed"))
        in_front = self.has_kv or self.has_tokens
        if in_front and not mixer.is_per_row:
            raise ValueError(
                f"{where}: {mixer.name} weighs each token, and what stands in front of a row has one weight; "
                f'use by="sequence"'
            )
        if any(p.has_gaps for p in own):
            raise ValueError(f"{where}: soft tokens among the input cannot be mixed by {mixer.name}")
        self.has_pre = self.has_kv and (mixer.reads_input or any(p.has_pre for p in own))
        self.has_fold = mixer.is_constant and all(p.has_fold for p in own)
        on_output = not (in_front or self.has_embed)
        simple = all(p.fast and p.has_post and not (p.has_pre or p.has_around) for p in own)
        self.has_post = on_output and simple
        self.has_around = on_output and not simple
        self.fast = on_output or self.has_pre
        if self.has_around and (self.site.entry is not None or self.site.leave is not None):
            names = ", ".join(sorted({getattr(p, "name", type(p).__name__) for p in own}))
            raise ValueError(f"{self.site.name}: {names} cannot be mixed here: one changes the input of a sub-layer")

    @property
    def mixer(self) -> Mixer:
        """The mixer."""
        mixer = self.parts[-1]
        assert isinstance(mixer, Mixer)
        return mixer

    @property
    def _parts(self) -> list[Delta]:
        return [p for p in list(self.parts)[:-1] if isinstance(p, Delta)]

    def _each(self, run: Callable[[Delta], Tensor]) -> dict[int, Tensor]:
        return {i: run(part) for i, part in zip(self.numbers, self._parts, strict=True)}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + sum_i w_i (W_i - W)"""
        w = self.mixer.weights(None)[0, 0].to(weight.dtype)
        out, out_bias = weight, bias
        for i, part in zip(self.numbers, self._parts, strict=True):
            own, b = part.fold(weight, bias)
            out = out + w[i] * (own - weight)
            if b is not None:
                out_bias = w[i] * b if out_bias is None else out_bias + w[i] * (b if bias is None else b - bias)
        return out, out_bias

    def post(self, y: Tensor, x: Tensor) -> Tensor:
        """The children's outputs under the mixer."""
        from .runtime import cast

        by_row = self.mixer.rows()
        if by_row is not None:
            return self._rows(y, x, by_row)

        def change(part: Delta) -> Tensor:
            out: Tensor = cast(part, y.dtype).post(y, x)
            return out - y

        return self._mix(x, y, self._each(change))

    def _rows(self, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """Each row under its own child, (B) ids; equal children run at once, others one after the other on their rows."""
        from .runtime import cast

        parts = dict(zip(self.numbers, self._parts, strict=True))
        place = torch.full((self.mixer.n + 1,), -1, device=ids.device)  # of child i among the parts; the last is none's
        place[list(parts)] = torch.arange(len(parts), device=ids.device)
        at = place[ids]
        if self._is_uniform():
            stacked = [torch.stack(ts) for ts in zip(*(_tensors(p).values() for p in parts.values()), strict=True)]
            own = [t[at.clamp_min(0)].to(y.dtype) for t in stacked]
            first, names = next(iter(parts.values())), list(_tensors(next(iter(parts.values()))))

            def one(y: Tensor, x: Tensor, *values: Tensor) -> Tensor:
                out: Tensor = _Of(first, dict(zip(names, values, strict=True))).post(y[None], x[None])
                return out[0]

            made = torch.vmap(one)(y, x, *own)
            return torch.where((at >= 0).view(-1, *[1] * (y.ndim - 1)), made, y)
        for k, part in enumerate(parts.values()):
            mine = at == k
            if torch.compiler.is_compiling() or part.reads_call:  # what reads the call knows all of its rows
                y = torch.where(mine.view(-1, *[1] * (y.ndim - 1)), cast(part, y.dtype).post(y, x), y)
            elif len(rows := mine.nonzero().flatten()):
                y = y.index_copy(0, rows, cast(part, y.dtype).post(y[rows], x[rows]).to(y.dtype))
        return y

    def _is_uniform(self) -> bool:
        """Are the children one method with one configuration, pure functions of tensors of their own and one row?"""
        first, *others = self._parts
        if not isinstance(first, Method) or first.reads_call or first.noisy and self.training:
            return False
        if len(others) == 0 or any(slot.shared for slot in first.slots_of(first.config).values()):
            return False
        shapes = [t.shape for t in _tensors(first).values()]
        return all(
            type(p) is type(first)
            and isinstance(p, Method)
            and p.config == first.config
            and not p._modules
            and [t.shape for t in _tensors(p).values()] == shapes
            for p in others
        )

    def around(self, x: Tensor, base: Any) -> Tensor:
        """The same where a child reads the layer itself. What changes a norm's own input is mixed there."""
        if self._is_inside():
            return base(x, change=self._inside)  # type: ignore[no-any-return]
        y: Tensor = base(x)
        return self._mix(x, y, self._each(lambda part: base.under(part, x, y) - y))

    def _is_inside(self) -> bool:
        """Do all children change a norm's own input?"""
        return self.site.kind == "norm" and all(
            p._is_inside() if isinstance(p, Mixed) else p.has_around for p in self._parts
        )

    def _inside(self, z: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        from .runtime import cast

        n = layer(z)
        return self._mix(n, z, self._each(lambda part: cast(part, z.dtype).around(z, _Asked(n)) - z), n)

    def _mix(self, x: Tensor, y: Tensor, changes: dict[int, Tensor], seen: Tensor | None = None) -> Tensor:
        from .runtime import cast

        mixed: Tensor = cast(self.mixer, y.dtype).mix(x, y, changes, y if seen is None else seen)
        return mixed

    def pre(self, x: Tensor) -> Tensor:
        """What learned keys and values, and their weights, read of the attention's input."""
        from .runtime import cast

        for part in self._parts:
            if part.has_pre and part.has_kv:
                x = cast(part, x.dtype).pre(x)
        if self.mixer.reads_input:
            self.frame.stash[self._place] = cast(self.mixer, x.dtype).weights(x)
        return x

    @property
    def _place(self) -> str:
        return f"mixed {id(self.switch)} {self.mixer.path} {self.site.name}"

    def kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The children's keys and values, weighed, one behind the other."""
        from .runtime import cast

        mixer: Any = cast(self.mixer, key.dtype)
        w = self.frame.stash.pop(self._place) if self.mixer.reads_input else mixer.weights(None)
        pairs = self._each(lambda part: cast(part, key.dtype).kv(key, value))
        return tuple(mixer.in_front(w, {i: pair[k] for i, pair in pairs.items()}, 2) for k in (0, 1))  # type: ignore[return-value]

    def tokens(self, batch: Tensor) -> Tensor:
        """The children's soft tokens, weighed, one behind the other."""
        from .runtime import cast

        mixer: Any = cast(self.mixer, batch.dtype)
        found = self._each(lambda part: cast(part, batch.dtype).tokens(batch))
        out: Tensor = mixer.in_front(mixer.weights(batch), found, 1)
        return out

    def embed(self, batch: Tensor, places: Tensor) -> Tensor:
        """What the children change of the embedded input, weighed."""
        from .runtime import cast

        return self._mix(batch, batch, self._each(lambda part: cast(part, batch.dtype).embed(batch, places) - batch))


def _tensors(delta: Delta) -> dict[str, Tensor]:
    own = {**delta._parameters, **delta._buffers}
    return {name: t for name, t in own.items() if t is not None}


class _Of:
    """A delta seen with other tensors of its own."""

    def __init__(self, delta: Delta, tensors: Mapping[str, Tensor]) -> None:
        self.delta, self.tensors = delta, tensors

    def __getattr__(self, name: str) -> Any:
        if name == "exact":
            return self
        if name in self.tensors:
            return self.tensors[name]
        declared = getattr(type(self.delta), name, None)
        if isinstance(declared, property) and declared.fget is not None:
            return declared.fget(self)
        return partial(declared, self) if isinstance(declared, FunctionType) else getattr(self.delta, name)


class _Asked:
    """In a layer's place: what a delta around it would change of the layer's own input, `n` being the layer's output there."""

    def __init__(self, n: Tensor) -> None:
        self.n = n

    def __call__(self, x: Tensor, change: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        return change(x, lambda _: self.n)
