"""Soft tokens in front of a backbone's input or among it: embeddings, masks and positions in, and the extra states out again.

The backbone, not the head on top of it, is where tokens enter: its output has the user's own length again, so that
pooling, labels and losses above see nothing of it. An encoder of an encoder-decoder keeps them, since the decoder attends
to them; there the decoder's cross-attention mask is extended instead. A method with `pooled` leaves them in the output,
for a head that pools the first state. Deltas with `shift` move the real tokens' positions and add no token.

A method with `gaps(batch)`, (B or 1, P), says for each of its tokens in front of which of the row's own it stands, from 0 to T.
Then all are put in order, padding stays where it is, and the states of an encoder's soft tokens leave it too.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import own_class
from .compose import parts_of
from .method import Delta
from .runtime import LEFT, OWN_FIELDS, Frame, Switch, call_of, cast, layer
from .site import Site

_LENGTHENED = ("last_hidden_state", "hidden_states")


def soft_tokens(live: list[Delta], embedded: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, P, D): every live delta's tokens for the embedded batch (B, T, D), the innermost nearest to the input.

    Beside them (B, P), in front of which of the row's tokens each stands; None where all stand in front of the row.
    """
    n_rows, inserted = embedded.shape[0], False
    tokens: list[Tensor] = []
    gaps: list[tuple[Tensor | None, int]] = []
    for part in [part for d in reversed(live) for part in parts_of(d, mixed=False) if part.has_tokens]:
        seen = cast(part, embedded.dtype)
        tokens.append(seen.tokens(embedded).to(embedded.dtype).expand(n_rows, -1, -1))
        inserted = inserted or part.has_gaps
        gaps.append((seen.gaps(embedded) if part.has_gaps else None, tokens[-1].shape[1]))
    if not inserted:
        return torch.cat(tokens, 1) if tokens else embedded[:, :0], None
    front = torch.zeros(1, dtype=torch.long, device=embedded.device)
    each = [front.expand(n_rows, n) if found is None else found.expand(n_rows, -1) for found, n in gaps]
    return torch.cat(tokens, 1), torch.cat(each, 1)


def in_order(gaps: Tensor, length: int) -> Tensor:
    """(B, P + T), which of [P; X] stands at each place: soft tokens in their own order in front of the token of their gap."""
    own = 2 * torch.arange(length, device=gaps.device).expand(gaps.shape[0], -1) + 1
    return torch.cat([2 * gaps, own], 1).argsort(stable=True, dim=1)


def _inserted(kwargs: dict[str, Any], gaps: Tensor, order: Tensor, length: int, where: str) -> None:
    """Bring mask, token types and positions of a whole row into the order of its tokens.

    A soft token has the type of its right neighbour, and moves what stands behind it by one position.
    """

    def ordered(front: Tensor, own: Tensor) -> Tensor:
        return torch.cat([front, own.expand(gaps.shape[0], -1)], 1).gather(1, order)

    right, left = gaps.clamp_max(length - 1), (gaps - 1).clamp_min(0)
    mask, types, at = (kwargs.get(key) for key in ("attention_mask", "token_type_ids", "position_ids"))
    if mask is not None:
        extend(mask, 0, where)
        kwargs["attention_mask"] = ordered(mask.new_ones(gaps.shape), mask)
    if types is not None:
        kwargs["token_type_ids"] = ordered(types.expand(gaps.shape[0], -1).gather(1, right), types)
    if at is not None:
        shift(at, 0, True, where)
        places = at.expand(gaps.shape[0], -1)
        real = torch.ones_like(places, dtype=torch.bool) if mask is None else mask != 0
        behind = torch.where(real.gather(1, left) & (gaps > 0), places.gather(1, left) + 1, 0)  # in front of padding
        before = torch.where(real.gather(1, right) & (gaps < length), places.gather(1, right), behind)
        soft = (order < gaps.shape[1]).long()
        kwargs["position_ids"] = ordered(before, places) + soft.cumsum(1) - soft


def extend(mask: Tensor, n: int, where: str) -> Tensor:
    """(B, T) -> (B, n + T) with ones in front."""
    if mask.ndim != 2:
        raise ValueError(f"{where}: soft tokens need a (B, T) attention mask, got {tuple(mask.shape)}")
    return torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)


def shift(positions: Tensor, n: int, prefill: bool, where: str) -> Tensor:
    """Real tokens start at position `n`; in the first call of a sequence the soft tokens' own positions go in front."""
    if positions.ndim != 2:
        raise ValueError(f"{where}: soft tokens need (B, T) positions, got {tuple(positions.shape)}")
    if not prefill:
        return positions + n
    front = torch.arange(n, device=positions.device, dtype=positions.dtype).expand(positions.shape[0], -1)
    return torch.cat([front, positions + n], 1)


def refuse_packed(kwargs: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a row holds several texts: what stands in front of it would be seen by the first alone."""
    positions = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if not packed and isinstance(positions, Tensor) and kwargs.get("attention_mask") is None:
        packed = not torch.compiler.is_compiling() and bool((positions[..., 1:] <= positions[..., :-1]).any())
    if packed:
        raise ValueError(
            f"{where}: soft tokens have no place in packed rows, whose positions start again; turn packing and "
            f"padding_free off"
        )


def n_positions(module: nn.Module) -> int | None:
    """The length of the backbone's learned position table, where it has one."""
    sizes = [
        m.num_embeddings - int(m.padding_idx + 1 if m.padding_idx is not None else getattr(m, "offset", 0))
        for m in _position_tables(module)
    ]
    return min(sizes) if sizes else None


def _position_tables(module: nn.Module) -> list[nn.Embedding]:
    return [
        m
        for n, m in module.named_modules()
        if isinstance(m, nn.Embedding)
        and any(w in n.rpartition(".")[2] for w in ("position", "wpe"))
        and "relative" not in n
    ]


Shifts = tuple[
    list[tuple[Switch, int]], bool
]  # by how much, under which switch; whether the attention adds them itself


def shifts_of(
    modules: Mapping[str, nn.Module], table: Iterable[Site], leaves: Mapping[str, list[Delta]]
) -> dict[str, Shifts]:
    """Backbone -> by how much the deltas with `shift`, by adapter, move its real tokens.

    Where positions are a bias between tokens (T5), the deltas themselves learn which layer holds its table.
    """
    sites = tuple(table)
    moved: dict[str, dict[tuple[str, str], tuple[Switch, int]]] = {}
    tables: dict[str, nn.Module] = {}
    for site in sites:
        if (
            site.kind == "attention"
            and site.role == "attn"
            and "relative_attention_bias" in modules[site.module]._modules
        ):
            tables.setdefault(site.stack, modules[site.module])
    for adapter, deltas in leaves.items():
        for d in deltas:
            if getattr(d, "shift", False) and d.site.role == "attn":
                moved.setdefault(d.site.stack, {})[adapter, d.path] = d.switch, int(d.n)  # type: ignore[arg-type]
                d.__dict__["table"] = tables.get(d.site.stack)
    found: dict[str, Shifts] = {}
    for site in sites:
        if site.kind != "input" or site.stack not in moved:
            continue
        name, module = site.module, modules[site.module]
        if site.stack not in tables and "position_ids" not in inspect.signature(own_class(module).forward).parameters:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name or 'the model'}: shift moves the tokens' positions, and {own_class(module).__name__} takes none; "
                f"use shift=False"
            )
        found[name] = list(moved[site.stack].values()), site.stack in tables
    return found


def _default_positions(self: nn.Module, kwargs: Mapping[str, Any], length: int, past: int) -> Tensor:
    """(1 or B, T): where the backbone's own forward would put the tokens; some count the real tokens of a row alone."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    embeddings = getattr(self, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa
        pad = int(embeddings.padding_idx)  # type: ignore[union-attr]
        if isinstance(ids, Tensor):
            real = ids.ne(pad).long()
            return (torch.cumsum(real, 1) + past) * real + pad
        past += pad + 1
    elif isinstance(mask, Tensor) and any(hasattr(m, "offset") for m in _position_tables(self)):  # OPT
        return ((torch.cumsum(mask, 1) * mask).long() - 1)[:, -length:]
    device = ids.device if ids is not None else kwargs["inputs_embeds"].device
    return (torch.arange(length, device=device) + past)[None]


@layer("input")
def input_layer(cls: type, forward: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    """A backbone whose input deltas may lengthen, or a decoder whose encoder was lengthened."""
    names = [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]  # type: ignore[attr-defined]

    @functools.wraps(forward)
    def input_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        deltas = self.deltas.values() if "deltas" in self._modules else ()  # type: ignore[operator]
        live = [d for d in deltas if d.switch.on and (d.has_tokens or d.has_embed)]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        states, cross = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is not None and cross is not None and cross.ndim == 2 and states.shape[1] > cross.shape[1]:
            kwargs["encoder_attention_mask"] = extend(cross, states.shape[1] - cross.shape[1], cls.__name__)
        shifts, is_relative = self.__dict__.get("_deltatune_shift", ((), False))
        moved = sum(n for switch, n in shifts if switch.on)
        if moved and is_relative:
            if getattr(kwargs.get("past_key_values"), "is_compileable", False):
                raise ValueError(f"{cls.__name__}: shift with relative positions does not run with a static cache")
            moved = 0  # the attention itself adds them
        frame: Frame | None = live[0].frame if live else self.__dict__.get("_deltatune_encoder")
        if frame is None or not frame.readers or frame.call is not None or live and live[0].site.stack == "decoder":
            return _run(self, forward, live, moved, kwargs, cls.__name__)
        # no model's own forward around it: `generate` runs an encoder by itself, and a bare backbone is its own root
        own = {n: kwargs.pop(n) for n in OWN_FIELDS if n in kwargs}
        frame.call = call_of({**kwargs, **own}, frame)
        try:
            out = _run(self, forward, live, moved, kwargs, cls.__name__)
            if isinstance(out, dict):  # what deltas leave for the decoder goes with the states, beams and all
                for key, state in frame.stash.items():
                    if key.startswith(LEFT):
                        out[key] = state
            return out
        finally:
            frame.call = None
            frame.stash.clear()

    return input_forward


def _run(
    self: nn.Module, forward: Callable[..., Any], live: list[Delta], moved: int, kwargs: dict[str, Any], where: str
) -> Any:
    return _lengthened(self, forward, live, moved, kwargs, where) if live or moved else forward(self, **kwargs)


def _counts_ids(self: nn.Module) -> bool:
    """Does it number the real tokens where it sees their ids (RoBERTa), and padding too where it does not?"""
    embeddings = self._modules.get("embeddings")
    return embeddings is not None and hasattr(type(embeddings), "create_position_ids_from_input_ids")


def _places(kwargs: Mapping[str, Any], length: int, n_past: int, n: int, device: torch.device, where: str) -> Tensor:
    """(1 or B, T), which of its row's real tokens each is, from 0; of `n_past` tokens in the cache the first `n` are soft."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return (torch.arange(length, device=device) + max(n_past - n, 0))[None]
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(f"{where}: the places of tokens are read from a (B, T) attention mask, not from this one")
    return ((mask != 0).long().cumsum(1) - 1).clamp_min(0)[:, -length:]


def _lengthened(
    self: nn.Module, forward: Callable[..., Any], live: list[Delta], moved: int, kwargs: dict[str, Any], where: str
) -> Any:
    past = kwargs.get("past_key_values")
    n_past = 0 if past is None else int(past.get_seq_length())
    prefill = n_past == 0
    embedded, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
    if embedded is None and ids is None:
        raise ValueError(f"{where}: soft tokens need input_ids or inputs_embeds")
    own: Tensor = ids if embedded is None else embedded  # type: ignore[assignment]
    length, n = own.shape[1], 0
    gaps: Tensor | None = None
    if live:
        if prefill:
            refuse_packed(kwargs, where)
        if embedded is None:
            own = self.get_input_embeddings()(ids)  # type: ignore[operator]
        front, gaps = soft_tokens([d for d in live if d.has_tokens], own)
        n = front.shape[1]
        by_ids = _counts_ids(self)
        changing = [d for d in live if d.has_embed]
        if changing:
            places = _places(kwargs, length, n_past, n, own.device, where)
            for delta in reversed(changing):  # the outermost first, as of any site's input
                own = cast(delta, own.dtype).embed(own, places)
            if by_ids and not n and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = _default_positions(self, kwargs, length, n_past)
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, own
    limit = self.__dict__.get("_deltatune_positions")
    if prefill and limit is not None and moved + n + length > limit:
        what = f"{n} soft tokens" if not moved else f"{moved + n} learned positions"
        raise ValueError(
            f"{where}: {what} and {length} tokens exceed the {limit} positions of the backbone; "
            f"truncate the input to {limit - moved - n}"
        )
    if gaps is not None:  # a whole row: what has gaps takes no other
        order = in_order(gaps, length)
        if by_ids and ids is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _default_positions(self, {**kwargs, "input_ids": ids}, length, 0)
        _inserted(kwargs, gaps, order, length, where)
        own = torch.cat([front, own], 1).gather(1, order[..., None].expand(-1, -1, front.shape[-1]))
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, own
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"].new_tensor(range(n + length))
    elif live:
        placed = prefill and n > 0 and by_ids and ids is not None and kwargs.get("position_ids") is None
        if placed:
            real = _default_positions(self, {**kwargs, "input_ids": ids}, length, 0)
            first = int(self.embeddings.padding_idx) + 1  # type: ignore[union-attr, arg-type]
            late = torch.arange(first, first + n, device=real.device).expand(real.shape[0], -1)
            kwargs["position_ids"] = torch.cat([late, torch.where(real < first, real, real + n)], 1)
        if prefill:
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, torch.cat([front, own], 1)
            if kwargs.get("token_type_ids") is not None:
                types = kwargs["token_type_ids"]
                kwargs["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], n), types], 1)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = extend(kwargs["attention_mask"], n, where)
        if kwargs.get("position_ids") is not None and not placed:
            kwargs["position_ids"] = shift(kwargs["position_ids"], n, prefill, where)
        if kwargs.get("cache_position") is not None:
            at = kwargs["cache_position"]
            kwargs["cache_position"] = torch.cat([at.new_tensor(range(n)), at + n]) if prefill else at + n
    if moved:
        at = kwargs.get("position_ids")
        if at is None:
            at = _default_positions(self, kwargs, length + (n if prefill else 0), n_past)
        kwargs["position_ids"] = at + moved
    out = forward(self, **kwargs)
    encodes = len(live) > 0 and live[0].site.stack == "encoder"
    if not (n and prefill) or encodes and gaps is None:
        return out
    parts = [part for d in live for part in parts_of(d, mixed=False) if part.has_tokens]
    if encodes and not all(part.has_gaps for part in parts):
        raise ValueError(
            f"{where}: of prompts in front and soft tokens among an encoder's input the decoder sees one kind"
        )
    pooled = {bool(getattr(part, "pooled", False)) for part in parts}
    if len(pooled) > 1:
        raise ValueError(f"{where}: prompts that are pooled and prompts that are not cannot run together")
    if pooled == {True}:
        return out
    return _shortened(self, out, n, n + length, None if gaps is None else order.argsort(1)[:, n:])


def _shortened(self: nn.Module, out: Any, n: int, length: int, places: Tensor | None) -> Any:
    """The output without the soft tokens' states, the first `n`, or with those at `places` (B, T) alone.

    A pooler inside the backbone reads the first state that is left.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == length:
            if places is not None:
                return value.gather(1, places[..., None].expand(-1, -1, value.shape[-1]))
            # torch's matmul folds a strided input or not by what requires a gradient, and rounds differently
            return value[:, n:].contiguous()
        return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

    def pooled(states: Tensor) -> Tensor:
        if isinstance(pooler, nn.Linear):  # ALBERT's reads one state
            return self.pooler_activation(pooler(states[:, 0]))  # type: ignore[operator, no-any-return]
        return pooler(states)  # type: ignore[misc, no-any-return]

    pooler = self._modules.get("pooler")
    if isinstance(out, tuple):
        states, *rest = cut(out[0]), *out[1:]
        if pooler is not None and rest and isinstance(rest[0], Tensor) and rest[0].ndim == 2:
            rest[0] = pooled(states)
        return (states, *rest)
    for key in _LENGTHENED:
        if out.get(key) is not None:
            out[key] = cut(out[key])
    if pooler is not None and out.get("pooler_output") is not None:
        out["pooler_output"] = pooled(out["last_hidden_state"])
    return out
