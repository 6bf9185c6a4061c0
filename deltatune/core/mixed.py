"""Several deltas at one site under a node with tensors of its own: how much of each runs, said by a mixer.

    y' = y + sum_i w_i(x) (f_i(x) - y)         f_i the site under child i alone, y the site without any

A mixer is a method like any other, a leaf of the tree behind the node's children, that stands wherever a child does.
Keys and values, and soft tokens, are put one behind the other, each scaled by its child's weight of the row.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Base, put_rows, take_rows
from .compose import names_of
from .method import METHODS, Asked, Delta, Meet, Method
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

    def dims(self, base: Base) -> dict[str, Any]:
        """An embedding gives rows of its table, and ids are nothing to weigh by: its width stands for both."""
        sizes = super().dims(base)
        return sizes | {"d_out": self.site.d_in} if self.site.kind == "embedding" else sizes

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
        """(B or 1, T or 1, n), how much of each child runs.

        x (B, T, I) is the site's input, at a block or an embedding what it gives.
        """
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

    def rows(self, like: Tensor) -> Tensor | None:
        """(B), the child that each row of `like` runs, -1 for none; None where rows may run several."""
        return None

    def running(self) -> Collection[int]:
        """The children that some row of this call may run, and -1 where some may run none."""
        return range(self.n)

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
        self.random_fold, self.noisy = any(p.random_fold for p in own), any(p.noisy for p in own)
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
        self.changes_input = all(p.changes_input for p in own)
        self.fast = on_output or self.has_pre
        if self.has_around and (self.site.entry is not None or self.site.leave is not None):
            names = names_of(own)
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

    def _running(self) -> dict[int, Delta]:
        """The children that are here and run in this call, by number."""
        running = self.mixer.running()
        return {i: part for i, part in zip(self.numbers, self._parts, strict=True) if i in running}

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

        ids = self.mixer.rows(y)
        if ids is not None:
            return self._rows("post", ids, y, x)
        return self._mixed(x, y, lambda part: cast(part, y.dtype).post(y, x))

    def _mixed(self, x: Tensor, y: Tensor, run: Callable[[Delta], Tensor], seen: Tensor | None = None) -> Tensor:
        """`y` under the mixer, where `run` gives what it is under one child alone."""
        from .runtime import cast

        ids = self.mixer.rows(y)
        if ids is not None:
            out = y
            for i, part in self._running().items():
                out = torch.where(_of_rows(ids == i, y), run(part), out)
            return out
        changes = {i: run(part) - y for i, part in self._running().items()}
        if self.site.kind in (
            "block",
            "embedding",
        ):  # what children read: behind a block as behind its norm, and no ids
            x = y
        mixed: Tensor = cast(self.mixer, y.dtype).mix(x, y, changes, y if seen is None else seen)
        return mixed

    def _rows(self, word: str, ids: Tensor, head: Tensor, *more: Tensor) -> Tensor:
        """`head` where each row, of (B) ids, runs its own child's word; equal children run at once, others one by one.

        A child without the word leaves its rows as they are: of a node's `pre` there are keys and values alone.
        """
        from .runtime import cast

        parts = {i: part for i, part in self._running().items() if getattr(part, f"has_{word}")}
        if not parts:
            return head
        if _are_alike(list(parts.values())):
            place = {i: k for k, i in enumerate(parts)}
            at = torch.tensor([place.get(i, -1) for i in (*range(self.mixer.n), -1)], device=ids.device)[ids]
            first, *others = (_tensors(part) for part in parts.values())
            own = [torch.stack([t, *(o[name] for o in others)])[at.clamp_min(0)] for name, t in first.items()]
            delta = next(iter(parts.values()))

            def one(values: list[Tensor], *given: Tensor) -> Tensor:
                seen = _Of(delta, dict(zip(first, values, strict=True)), head.dtype)
                out: Tensor = getattr(seen, word)(*(t[None] for t in given))
                return out[0]

            made = torch.vmap(one)(own, head, *more)
            return made if parts.keys() >= {*self.mixer.running()} else torch.where(_of_rows(at >= 0, head), made, head)
        out = head
        for i, part in parts.items():
            run = getattr(cast(part, head.dtype), word)
            if torch.compiler.is_compiling() or part.reads_call:  # what reads the call knows all of its rows
                out = torch.where(_of_rows(ids == i, head), run(head, *more), out)
            elif len(rows := (ids == i).nonzero().flatten()):
                out = out.index_copy(0, rows, run(head[rows], *(t[rows] for t in more)).to(head.dtype))
        return out

    def around(self, x: Tensor, base: Any) -> Tensor:
        """The same where a child reads the layer itself. What changes a norm's own input is mixed there."""
        if self.changes_input:
            return Meet.around(self, x, base)  # not super(), which a casting view of the node is no instance for
        site, ids = self.site, self.mixer.rows(x)
        if ids is not None and all(part.fast and not part.has_around for part in self._parts):
            x = self._rows("pre", ids, x)
            return self._rows("post", ids, base(x), x)
        y: Tensor = base(x)
        if not site.rows:
            return self._mixed(x, y, lambda part: base.under(part, x, y))
        own = take_rows(y, site, -1)
        return put_rows(y, self._mixed(x, own, lambda part: take_rows(base.under(part, x, y), site, -1)), site, -1)

    def _change(self, z: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        from .runtime import cast

        asked = Asked(z, layer)
        return self._mixed(asked.y, z, lambda part: cast(part, z.dtype).around(z, asked), asked.y)

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
        w = self.frame.stash.pop(self._place) if self.mixer.reads_input else mixer.weights(key)
        pairs = {i: cast(part, key.dtype).kv(key, value) for i, part in self._running().items()}
        if not pairs:
            return key[:, :, :0], value[:, :, :0]
        return tuple(mixer.in_front(w, {i: pair[k] for i, pair in pairs.items()}, 2) for k in (0, 1))

    def tokens(self, batch: Tensor) -> Tensor:
        """The children's soft tokens, weighed, one behind the other."""
        from .runtime import cast

        mixer: Any = cast(self.mixer, batch.dtype)
        w = mixer.weights(batch)
        found = {i: cast(part, batch.dtype).tokens(batch) for i, part in self._running().items()}
        out: Tensor = mixer.in_front(w, found, 1) if found else batch[:, :0]
        return out

    def embed(self, batch: Tensor, places: Tensor) -> Tensor:
        """What the children change of the embedded input, weighed."""
        from .runtime import cast

        return self._mixed(batch, batch, lambda part: cast(part, batch.dtype).embed(batch, places))


def _of_rows(mine: Tensor, like: Tensor) -> Tensor:
    """(B) as (B, 1, ...), for values like `like`."""
    return mine.view(-1, *[1] * (like.ndim - 1))


def _tensors(delta: Delta) -> dict[str, Tensor]:
    own = {**delta._parameters, **delta._buffers}
    return {name: t for name, t in own.items() if t is not None}


def _state(delta: Delta) -> dict[str, Any]:
    """What a delta's words read besides its tensors."""
    plain = {k: v for k, v in vars(delta).items() if isinstance(v, (bool, int, float, str)) and k != "path"}
    return plain | {name: (t.shape, t.dtype) for name, t in _tensors(delta).items()}


def _are_alike(parts: Sequence[Delta]) -> bool:
    """Are they one method with one configuration, pure functions of tensors of their own and one row?"""
    first, *others = parts
    if (
        not isinstance(first, Method)
        or first.reads_call
        or first.noisy
        and first.training
        or first._modules
        or not others
    ):
        return False
    if any(slot.shared for slot in first.slots_of(first.config).values()):
        return False
    return all(isinstance(p, type(first)) and p.config == first.config and _state(p) == _state(first) for p in others)


class _Of:
    """A delta seen with other tensors of its own, in the activations' dtype; `exact` has them in their own."""

    def __init__(self, delta: Delta, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self.delta, self.tensors, self.dtype = delta, tensors, dtype

    def __getattr__(self, name: str) -> Any:
        if name == "exact":
            return _Of(self.delta, self.tensors, None)
        if name in self.tensors:
            t = self.tensors[name]
            return t.to(self.dtype) if self.dtype is not None and t.is_floating_point() else t
        declared = getattr(type(self.delta), name, None)
        if isinstance(declared, property):
            return declared.__get__(self, type(self.delta))  # not fget, whose call dynamo does not trace
        return partial(declared, self) if isinstance(declared, FunctionType) else getattr(self.delta, name)
