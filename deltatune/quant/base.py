"""A base whose linear layers are quantised: in place, or layer by layer while it loads; saved once, loaded as it was."""

import contextlib
import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.base import own_class
from ..core.files import write_atomic
from ..core.runtime import dtype_of
from ..core.site import Site, sites
from ..core.storage import format_of
from .layers import Kind, options_of, said

CARD, WEIGHTS, FORMAT = "base.json", "base.safetensors", 1
Progress = Callable[[int, int], None]  # layers that are done, of how many


def quantise(
    model: nn.Module,
    to: str = "bnb-nf4",
    *,
    where: str = "linear",
    layers: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """The model with the linear layers that `where` selects in the format `to`, one after the other, in place.

    Formats: bnb-nf4, bnb-fp4 (block=64, double=True), bnb-int8, ao-int8, ao-int4, int2 ... int8 and nf2 ... nf4 (group=64).
    Heads stay plain. Raises ValueError, and changes nothing, on an unknown format or option, a layer that it does not fit, is
    quantised already, tied, or trained, and on a model with an adapter: quantise first, then attach.
    """
    if "_deltatune" in model.__dict__:
        raise ValueError("an adapter stands on this model; quantise first, then attach")
    kind, options, chosen = chosen_for(model, to, where, layers, options)
    check_plain(model, chosen)
    for site in chosen:
        check_finite(site.module, model.get_submodule(site.module).weight)
    for n, site in enumerate(chosen, 1):
        _put(model, site.module, kind.make(model.get_submodule(site.module), **options))
        if progress is not None:
            progress(n, len(chosen))
    return model


def is_quantised(model: nn.Module) -> bool:
    """Is one of its layers?"""
    return any(format_of(module) is not None for module in model.modules())


def n_weights(model: nn.Module) -> int:
    """How many numbers the model's parameters stand for, in whatever format."""
    n = 0
    for module in model.modules():
        quantised: Any = module if format_of(module) is not None else None
        own = [p for key, p in module._parameters.items() if p is not None and (quantised is None or key == "bias")]
        n += sum(p.numel() for p in own) + (0 if quantised is None else quantised.in_features * quantised.out_features)
    return n


@torch.no_grad()
def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with its quantised linear layers as plain ones, in place, in `dtype` or that of its other parameters.

    Raises ValueError where an adapter stands on it: `adapter.merge` and `detach` give a plain model too.
    """
    if "_deltatune" in model.__dict__:
        raise ValueError("an adapter stands on this model; dequantise first, then attach")
    dtype = dtype or dtype_of(model)
    for name, module in list(model.named_modules()):
        kind = format_of(module)
        if kind is None:
            continue
        layer: Any = module
        bias = layer.bias
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain._parameters["weight"] = nn.Parameter(kind.read(layer, "weight").to(dtype), requires_grad=False)
        plain._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        _put(model, name, plain)
    return model


def load_base(
    folder: str | os.PathLike[str],
    to: str | None = None,
    *,
    where: str = "linear",
    layers: Any = None,
    cls: type | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """The model of a folder: what `save_base` left there, or a plain one whose layers become `to` as they are read.

    No more than the quantised model and one plain layer is there at a time. `cls` is the class of the model, by default what its
    configuration names. Raises ValueError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model: it has no config.json")
    if (folder / CARD).is_file():
        if to is not None or options:
            raise ValueError(f"{folder} is quantised already; load it without {to or next(iter(options))!r}")
        return _load_saved(folder, cls, torch.device(device), progress)
    if to is None:
        raise ValueError(f"{folder} is a plain model; say a format, such as load_base(folder, 'bnb-nf4')")
    options_of(to, options)
    model: Any = _empty(folder, cls, dtype)
    if (theirs := getattr(model.config, "quantization_config", None)) is not None:
        by = theirs.get("quant_method") if isinstance(theirs, dict) else type(theirs).__name__
        raise ValueError(f"{folder} is quantised already, by {by}; transformers' from_pretrained loads it")
    kind, options, found = chosen_for(model, to, where, layers, options)
    chosen = {name for site in found for name in _names_of(model, site.module)}
    own, prefix, n = _names(model), _prefix(model), 0
    done: set[str] = set()
    for path, key, tensor in _tensors(folder, torch.device(device)):
        name = _name_of(own, prefix, key, path)
        if name is None:
            continue
        at, _, last = name.rpartition(".")
        if at in done and last == "weight":  # of a module with two names, under the other one
            continue
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if own[name].shape != tensor.shape:
            raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, which {folder / 'config.json'} does not say")
        if at in chosen and last == "weight":
            check_finite(f"{path}: {key}", tensor)
            plain = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
            plain._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
            bias = model.get_submodule(at)._parameters.get("bias")
            made = kind.make(plain, **options)
            made._parameters["bias"] = bias
            done.update(_put(model, at, made))
            del plain, made, tensor
            _release()
            n += 1
            if progress is not None:
                progress(n, len(found))
        else:  # a copy, which no change of the file reaches
            _set(model, name, tensor.clone() if tensor.device.type == "cpu" else tensor)
    return _whole(model, folder, torch.device(device))


def save_base(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Keep a quantised base in a folder, as `load_base` reads it. Raises ValueError where a format has no file, or of an adapter."""
    folder = Path(folder)
    if "_deltatune" in model.__dict__:
        raise ValueError("an adapter stands on this model; save it by itself, and the base without it")
    kept = {name: said(module) for name, module in model.named_modules() if format_of(module) is not None}
    if not kept:
        raise ValueError("this model has no quantised layer: save_pretrained keeps it")
    own = dict(model.named_modules())
    again = tuple(f"{n}." for n, _ in model.named_modules(remove_duplicate=False) if n not in own)
    tensors, shared = dict[str, Tensor](), dict[int, str]()
    for key, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor) or key.endswith(".weight_format") or id(t) in shared or key.startswith(again):
            continue  # a tied tensor, and a module with two names, once
        shared[id(t)] = key
        tensors[key] = t.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, {"format": "pt"})
        digest = _hash(temporary)
        os.replace(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    config: Any = model.config
    config.save_pretrained(folder)
    dtype = str(dtype_of(model)).removeprefix("torch.")
    card = {"format": FORMAT, "class": type(model).__name__, "dtype": dtype, "layers": kept, "sha256": digest}
    write_atomic(folder / CARD, (json.dumps(card, indent=1) + "\n").encode())


# --- the parts ---------------------------------------------------------------------------------------------------------


def check_plain(model: nn.Module, chosen: Iterable[Site]) -> None:
    """Raise ValueError where a layer is no plain linear one with values and a weight of its own, adapted or not."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                names.setdefault(id(p), []).append(f"{name}.{key}")
    for site in chosen:
        layer: Any = model.get_submodule(site.module)
        kind = format_of(layer)
        if kind is not None:
            raise ValueError(f"{site.name}: it is quantised already ({kind.name})")
        if own_class(layer) is not nn.Linear:
            raise ValueError(f"{site.name}: a {own_class(layer).__name__} cannot be quantised; nn.Linear can")
        if len(tied := names[id(layer.weight)]) > 1:
            raise ValueError(f"{site.name}: its weight is tied: {', '.join(tied)}")
        if layer.weight.is_meta:
            raise ValueError(f"{site.name}: its weight is on the meta device; load_base quantises while it loads")


def chosen_for(
    model: nn.Module, to: str, where: str = "linear", layers: Any = None, options: Mapping[str, Any] | None = None
) -> tuple[Kind, dict[str, Any], list[Site]]:
    """The format `to`, all of its options, and the layers that it takes: shapes alone are asked. Raises ValueError where it cannot."""
    kind, every = options_of(to, options or {})
    chosen = _linears(model, where, layers, to)
    for site in chosen:
        check_fits(kind, site, every)
    return kind, every, chosen


def check_finite(name: str, weight: Any) -> None:
    """Raise ValueError where a weight holds what is no number: one would spoil all that share its scale."""
    if not all(bool(end.isfinite()) for end in weight.aminmax()):  # without a tensor of the weight's size
        raise ValueError(f"{name}: its weight is not finite")


def _linears(model: nn.Module, where: str, layers: Any, to: str) -> list[Site]:
    chosen = [site for site in sites(model, where, layers) if site.role not in ("head", "lm_head")]
    others = [site for site in chosen if site.kind != "linear" or site.rows]
    if others:
        raise ValueError(
            f"{others[0].name}: {to} keeps whole linear layers, and this is a {others[0].kind} or a part of one"
        )
    if not chosen:
        raise ValueError(f"where={where!r} selects no linear layer to quantise")
    return list({site.module: site for site in chosen}.values())


def check_fits(kind: Kind, site: Site, options: Mapping[str, Any]) -> None:
    """Raise ValueError where the layer's width does not go into groups."""
    size = options.get("group")
    if size is not None and (size < 8 or size % 8 or site.d_in % size):
        raise ValueError(
            f"{site.name}: group is {size}; it must be in eights and divide the layer's {site.d_in} inputs"
        )
    block = options.get("block")
    if block is not None and block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"{site.name}: block is {block}; bitsandbytes has powers of 2 from 32 to 4096")


def _put(model: nn.Module, name: str, layer: nn.Module) -> list[str]:
    """Let `layer` be in the place of the module `name`, under each name that this one has; those names."""
    layer.train(model.get_submodule(name).training)
    names = _names_of(model, name)
    for n in names:
        at, _, last = n.rpartition(".")
        model.get_submodule(at)._modules[last] = layer
    return names


def _names_of(model: nn.Module, name: str) -> list[str]:
    """All names of a module, which may have several parents."""
    module = model.get_submodule(name)
    return [n for n, other in model.named_modules(remove_duplicate=False) if other is module]


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is damaged: {error}") from None
        return [folder / name for name in dict.fromkeys(names)]
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        raise ValueError(f"{folder} has no model.safetensors; other formats are not read")
    return found


def _opened(path: Path, device: torch.device) -> Any:
    try:
        return safe_open(path, "pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _tensors(folder: Path, device: torch.device) -> Iterator[tuple[Path, str, Tensor]]:
    """One at a time."""
    for path in _shards(folder):
        with _opened(path, device) as file:
            keys = list(file.keys())
        for key in keys:
            with _opened(path, device) as file:  # one that is opened for all keeps what was read of it in memory
                yield path, key, file.get_tensor(key)


def _release() -> None:
    """Give what freed tensors leave back to the system: glibc keeps it, and may not find room in it for the next layer's."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def _empty(folder: Path, cls: type | None, dtype: torch.dtype) -> nn.Module:
    """The model without weights; buffers that no file has are computed."""
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {str(error).splitlines()[0]}") from None
    name = (config.architectures or [""])[0]
    found: Any = cls or getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"{folder / 'config.json'} names the class {name!r}, which transformers does not have; give cls"
        )
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model = found._from_config(config, dtype=dtype)
    assert isinstance(model, nn.Module)
    return model.eval()


def _names(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _prefix(model: nn.Module) -> str:
    return f"{getattr(model, 'base_model_prefix', '')}."


def _name_of(own: Mapping[str, Tensor], prefix: str, key: str, path: Path) -> str | None:
    """The model's own name of a tensor, which may have a head more or less than the file; None where it has no use for it."""
    for name in (key, key.removeprefix(prefix), prefix + key):
        if name in own:
            return name
    head_only = not any(name.startswith(prefix) for name in own)  # a bare backbone, of a file with a head
    if head_only or not key.startswith(prefix) or key.endswith(("rotary_emb.inv_freq", "position_ids")):
        return None
    raise ValueError(f"{path}: it holds {key}, which the model does not have")


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    at, _, last = name.rpartition(".")
    module = model.get_submodule(at)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[last] = tensor


def _whole(model: Any, folder: Path, device: torch.device) -> nn.Module:
    """Nothing is left on the meta device: tied tensors are tied, a head that no file has starts as the model starts it."""
    model.tie_weights()
    heads = {site.module for site in sites(model, "linear|head|lm_head") if site.role in ("head", "lm_head")}
    missing = []
    for name, module in model.named_modules():
        gone = [key for key, p in module._parameters.items() if p is not None and p.is_meta]
        if gone and name in heads:
            module.to_empty(device=device)
            model._init_weights(module)
        else:
            missing += [f"{name}.{key}" for key in gone]
        for key, t in module._buffers.items():
            module._buffers[key] = None if t is None else t.to(device)
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if missing[3:] else "")
        )
    whole: nn.Module = model
    return whole


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_saved(folder: Path, cls: type | None, device: torch.device, progress: Progress | None) -> nn.Module:
    import transformers

    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        n_format, name = card["format"], card["class"]
        layers = {at: {"to": of["to"], **of} for at, of in card["layers"].items()}
        dtype, digest = getattr(torch, card["dtype"]), card["sha256"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / CARD} is damaged: {error}") from None
    if n_format != FORMAT:
        raise ValueError(f"{folder / CARD} has format {n_format}; this version reads format {FORMAT}")
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}")
    with _opened(path, device) as file:
        if _hash(path) != digest:
            raise ValueError(f"{path} is not the file that {CARD} describes: its hash differs")
        model = _empty(folder, cls or getattr(transformers, name, None), dtype)
        rest = list(file.keys())
        for n, (at, said) in enumerate(layers.items(), 1):
            own = [key for key in rest if key.startswith(f"{at}.")]
            tensors = {key[len(at) + 1 :]: file.get_tensor(key) for key in own}
            try:
                kind, options = options_of(said["to"], {key: value for key, value in said.items() if key != "to"})
                if kind.read is None:
                    raise ValueError("this format has no file")
                plain: Any = model.get_submodule(at)
                layer = kind.read(plain.in_features, plain.out_features, tensors, device, **options)
            except (RuntimeError, KeyError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}: {at} is no {' '.join(map(str, said.values()))}: {error}") from None
            _put(model, at, layer)
            done = {*own}
            rest = [key for key in rest if key not in done]
            if progress is not None:
                progress(n, len(layers))
        names, prefix = _names(model), _prefix(model)
        for key in rest:
            found = _name_of(names, prefix, key, path)
            if found is not None:
                _set(model, found, file.get_tensor(key))
    return _whole(model, folder, device)
