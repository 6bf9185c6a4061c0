"""A model made really smaller: heads and MLP channels that an adapter masked are taken out of the weights.

A part is what one mask runs through: the heads of an attention (with grouped keys whole groups), read by its `o`, or the
channels of an MLP, read by its `down`. What its reader ignores goes: rows of q, k, v or of gate and up, columns of the reader.

The smaller model is of the model's own class, built from its configuration with smaller numbers. So it is saved by
`save_pretrained` and comes back by `from_pretrained`, and a number that the class cannot be built with is found out by
building it, on the meta device, before anything is computed.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import base
from .adapter import Adapter
from .method import Delta
from .sharded import whole
from .site import Site, all_sites, slices

N_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads",
           "num_decoder_heads")  # fmt: skip
N_GROUPS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
N_CHANNELS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim",
              "ffn_hidden_size")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one mask runs through: `n` heads or channels, written by `writers` and read by `reader`."""

    reader: Site
    writers: tuple[Site, ...]
    n: int  # heads of keys and values, or channels
    n_heads: int = 0  # heads of queries; 0 for an MLP
    d_head: int = 0


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parts of a model by their reader's site name; experts and attentions whose layout is not known have none."""
    found: dict[tuple[str, int, str], dict[str, list[Site]]] = {}
    for site in all_sites(model):
        group = (site.role or "").partition(".")[0]
        if site.layer is not None and group in ("attn", "cross", "mlp") and site.kind in ("linear", "attention"):
            one = found.setdefault((site.stack, site.layer, group), {})
            for part in slices(site) or (site,):
                one.setdefault((part.role or "").partition(".")[2], []).append(part)
    parts: dict[str, Part] = {}
    for (_, _, group), one in found.items():
        if any(len(sites) > 1 for sites in one.values()):
            continue
        by = {role: sites[0] for role, sites in one.items()}
        if group == "mlp" and "down" in by and "up" in by:
            reader, writers = by["down"], [by[r] for r in ("gate", "up") if r in by]
            parts[reader.name] = Part(reader, tuple(writers), reader.d_in)
        elif group != "mlp" and by.keys() >= {"", "q", "k", "v", "o"} and (d := by[""].d_head):
            reader, n = by["o"], by[""].n_kv_heads
            parts[reader.name] = Part(reader, (by["q"], by["k"], by["v"]), n, by["q"].d_out // d, d)
    return {
        name: part
        for name, part in parts.items()
        if part.n and all(s.d_out % part.n == 0 for s in part.writers) and part.reader.d_in % part.n == 0
    }


def fits(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the model's class cannot be built without what `kept`, (n) by part, leaves out."""
    _twin(model, parts_of(model), kept)


def shrink(adapter: Adapter) -> nn.Module:
    """The model with the adapter folded in and without the heads and channels that its masks leave out: a new one.

    The adapter and its model stay as they are. What the configuration must hold is one number a model, so every layer has to
    keep as many heads, and as many channels, as the others.

    Raises ValueError where no mask leaves anything out, where the layers differ, where the class cannot be built with fewer
    (BERT's head width is its width over its heads), or where something else stands on the model.
    """
    model = adapter.model
    if len(others := list(model.__dict__["_deltatune"].infos)) > 1:
        raise ValueError(
            f"shrink: {', '.join(others)} stand on the model; detach all but one, they were made for its sizes"
        )
    if adapter._info.merged is not None or not adapter.mergeable:
        state = "merged; unmerge it" if adapter._info.merged is not None else "not mergeable; it cannot be folded in"
        raise ValueError(f"shrink: adapter {adapter.name!r} is {state}")
    parts, kept = parts_of(model), {}
    for (_, name), delta in adapter.deltas.items():
        mask = getattr(delta, "kept", None)
        if mask is None or bool(mask.all()):
            continue
        if name not in parts:
            raise ValueError(f"shrink: {name} is masked, but what writes its inputs is not known")
        units = mask.unflatten(0, (parts[name].n, -1))
        if bool((units.any(1) != units.all(1)).any()):
            raise ValueError(f"shrink: the mask of {name} cuts through one of its {parts[name].n} heads")
        kept[name] = units.all(1)
    if not kept:
        can = any(getattr(delta, "kept", None) is not None for delta in adapter.deltas.values())
        why = "train it through its schedule first" if can else "masks stand at attn.o and at mlp.down, and it does not"
        raise ValueError(f"shrink: adapter {adapter.name!r} masks nothing; {why}")
    twin = _twin(model, parts, kept)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values |= _folded(adapter)
    rows, columns = _cuts(parts, kept)
    sites = {site.module: site for part in parts.values() for site in (part.reader, *part.writers)}
    for name in rows.keys() | columns.keys():
        keys = [key for key in (f"{name}.{sites[name].param}", f"{name}.bias") if values.get(key) is not None]
        for key in keys:
            values[key] = _cut(values[key], model.get_submodule(name), key, rows.get(name), columns.get(name))
    return _filled(twin, model, values)


def _cuts(parts: Mapping[str, Part], kept: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which outputs, and which inputs, stay, by module."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, mask in kept.items():
        mask, part = mask.cpu(), parts[name]
        columns[part.reader.module] = mask.repeat_interleave(part.reader.d_in // part.n)
        for site in part.writers:
            mine = base.rows_of(site) or list(range(site.d_out))
            size = site.d_out if not site.rows else _whole_size(part, site)
            stay = rows.setdefault(site.module, torch.ones(size, dtype=torch.bool))
            stay[mine] = mask.repeat_interleave(site.d_out // part.n)
    return rows, columns


def _whole_size(part: Part, site: Site) -> int:
    """Outputs of the fused projection that a slice is of."""
    return sum(s.d_out for s in part.writers if s.module == site.module)


def _cut(t: Tensor, module: nn.Module, key: str, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    out, into = (1, 0) if t.ndim == 2 and base.transposed(module, key.rpartition(".")[2]) else (0, 1)
    if rows is not None:
        t = t.index_select(out, rows.nonzero().flatten().to(t.device))
    if columns is not None and t.ndim == 2:
        t = t.index_select(into, columns.nonzero().flatten().to(t.device))
    return t


def _twin(model: nn.Module, parts: Mapping[str, Part], kept: Mapping[str, Tensor]) -> nn.Module:
    """The smaller model, without values. Raises ValueError where its class cannot be built so."""
    config, cls = getattr(model, "config", None), base.own_class(model)
    if config is None:
        raise ValueError(f"shrink: {cls.__name__} has no configuration that could hold its smaller sizes")
    config = copy.deepcopy(config)
    said = []
    for of_mlp, what in ((True, "channels"), (False, "heads")):
        mine = {name: part for name, part in parts.items() if (part.n_heads == 0) is of_mlp}
        numbers = {name: int(kept[name].sum()) if name in kept else part.n for name, part in mine.items()}
        if not kept.keys() & mine.keys():
            continue
        if len(set(numbers.values())) > 1:
            few, many = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
            raise ValueError(
                f"shrink: {few} keeps {numbers[few]} and {many} {numbers[many]} {what}; the configuration has one number for "
                f"all layers, so all of them have to be masked"
            )
        part, n = next((part, numbers[name]) for name, part in mine.items())
        if of_mlp:
            _say(config, N_CHANNELS, part.n, n)
        else:
            _say(config, N_GROUPS, part.n, n)
            _say(config, N_HEADS, part.n_heads, n * part.n_heads // part.n)
            config.head_dim = part.d_head
        said.append(f"{n} of {part.n} {what}")
    names = {n for n, _ in model.named_modules()}
    try:
        with torch.device("meta"):
            twin: nn.Module = cls(config)
    except Exception as error:
        raise ValueError(
            f"shrink: {cls.__name__} cannot be built from a configuration with {', '.join(said)}: {error}"
        ) from error
    for name, _ in list(twin.named_modules()):  # what the model was built without: a pooler
        if name not in names and (parent := name.rpartition(".")[0]) in names:
            setattr(twin.get_submodule(parent), name.rpartition(".")[2], None)
    rows, columns = _cuts(parts, kept)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, t in (*twin.named_parameters(), *twin.named_buffers()):
        if key not in own:
            raise ValueError(f"shrink: {cls.__name__} built from its configuration has {key}, the model has not")
        module = key.rpartition(".")[0]
        want = own[key].to("meta")
        if module in rows or module in columns:
            cut = (None if c.get(module) is None else c[module] for c in (rows, columns))
            want = _cut(torch.empty(want.shape), model.get_submodule(module), key, *cut).to("meta")
        if want.shape != t.shape:
            raise ValueError(
                f"shrink: {type(config).__name__} cannot say {', '.join(said)}: {key} would be {tuple(want.shape)}, but a "
                f"{cls.__name__} built so has {tuple(t.shape)}"
            )
    return twin


def _say(config: Any, names: Iterable[str], before: int, now: int) -> None:
    """Set what the configuration calls `before` by one of the names; GPT-2's `n_inner` may be None."""
    for name in names:
        if getattr(config, name, ...) in (before, None):
            setattr(config, name, now)


@torch.no_grad()
def _folded(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that the adapter's folds change, in their own layout and dtype."""
    standing: dict[tuple[str, str], list[Delta]] = {}
    for entry, _, delta in adapter._standing():
        standing.setdefault((entry.module, delta.site.param), []).append(delta)
    found: dict[str, Tensor] = {}
    names: dict[int, list[str]] = {}
    for key, p in adapter.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(key)
    for (name, param), deltas in standing.items():
        module, site = adapter.model.get_submodule(name), deltas[0].site
        if len(tied := names.get(id(base.stored(module, site)), [])) > 1:
            raise ValueError(f"shrink: {site.name} is adapted, and its weight is tied: {', '.join(tied)}")
        if base.quantised(module, site):
            raise ValueError(f"shrink: {site.name} is quantised; dequantise the base first")
        weight, bias = base.folded(module, deltas)
        dtype = base.stored(module, site).dtype
        found[f"{name}.{param}"] = base.restored(module, site, whole(weight)).to(dtype)
        if bias is not None:
            found[f"{name}.bias"] = whole(bias).to(dtype)
    return found


@torch.no_grad()
def _filled(twin: nn.Module, model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """`twin` with these values, tied where the model is; no tensor is shared with the model."""
    made: dict[int, Tensor] = {}
    for key in (
        *dict(twin.named_parameters(remove_duplicate=False)),
        *dict(twin.named_buffers(remove_duplicate=False)),
    ):
        path, _, name = key.rpartition(".")
        owner = twin.get_submodule(path)
        own = model.get_submodule(path)
        tied = own._parameters.get(name)
        source = values.get(key)
        if source is None:  # the second name of a tied tensor
            source = tied if tied is not None else own._buffers[name]
        assert isinstance(source, Tensor)
        mark = id(tied) if tied is not None else id(source)
        if mark not in made:
            value = whole(source.detach()).clone(memory_format=torch.contiguous_format)
            made[mark] = nn.Parameter(value, value.is_floating_point()) if name in owner._parameters else value
        (owner._parameters if name in owner._parameters else owner._buffers)[name] = made[mark]  # type: ignore[assignment]
    if hasattr(model, "generation_config"):
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.train(model.training)
