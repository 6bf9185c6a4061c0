"""The frozen layer under a delta: how one (O, I) matrix is seen in it, put back, and used in its place.

`fold` never learns what it sits on. This file alone knows layers and storage:

    nn.Linear          as it is                transformers' Conv1D      transposed
    quantised linear   as numbers (storage.py)
    nn.Conv2d          (O, I h w)              nn.Embedding              (V, D)
    fused experts      (E, O, I), by vmap      norms                     a vector of d_out
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import storage
from .compose import names_of
from .refold import Folded, linear, plain_autograd
from .site import Site

if TYPE_CHECKING:
    from .method import Delta


def transposed(module: nn.Module, param: str = "weight") -> bool:
    """Is the weight stored (I, O)? transformers' Conv1D does so, and GPT-OSS's experts, which say it themselves."""
    if hasattr(module, "nf") and not hasattr(module, "in_features"):
        return True
    return param != "weight" and bool(getattr(module, "is_transposed", False))


def offloaded(module: nn.Module, key: str) -> Tensor | None:
    """What accelerate's hook keeps for a parameter that it left on the meta device; None where it is not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            value = kept[key]
            assert isinstance(value, Tensor)
            return value
    return None


def check_present(delta: "Delta") -> None:
    """Raise ValueError where accelerate's hooks took the delta's own tensors away, which no forward would bring back."""
    if hasattr(delta, "_hf_hook"):
        raise ValueError(
            f"{delta.site.name}: accelerate offloaded the adapter's own tensors; offload the base first, then attach"
        )


def stored(module: nn.Module, site: Site) -> Tensor:
    """The weight tensor as it is kept, whatever its format."""
    kind = storage.format_of(module, site.param)
    weight = getattr(module, site.param if kind is None or site.param != "weight" else kind.kept)
    assert isinstance(weight, Tensor)
    return weight


def quantised(module: nn.Module, site: Site) -> bool:
    """Is the weight kept in a format that is no plain floating tensor?"""
    return storage.format_of(module, site.param) is not None or not stored(module, site).is_floating_point()


def matrix(module: nn.Module, site: Site) -> Tensor:
    """The site's whole weight as (O, I), (E, O, I) for experts, (O) for norms, in a floating dtype; a view if it can."""
    weight, kind = stored(module, site), storage.format_of(module, site.param)
    if weight.is_meta and (kept := offloaded(module, site.param)) is not None:
        weight = kept
    if kind is not None:
        try:
            weight = kind.read(module, site.param)
            return weight.double() if place_of(module, site)[1] == torch.float64 else weight
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error
    if not weight.is_floating_point():
        raise ValueError(f"{site.name}: its weight is kept as {weight.dtype}, which cannot be read as numbers here")
    if transposed(module, site.param):
        return weight.mT
    return weight.flatten(1) if site.kind == "conv2d" else weight


def bias_of(module: nn.Module, site: Site) -> Tensor | None:
    """The site's whole bias, or None."""
    bias = getattr(module, "bias", None) if site.param == "weight" else None
    if isinstance(bias, Tensor) and bias.is_meta and (kept := offloaded(module, "bias")) is not None:
        return kept
    return bias if isinstance(bias, Tensor) else None


def place_of(module: nn.Module, site: Site) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of the site's computation: accelerate's hooks may keep the weight itself elsewhere."""
    first = next((t for tensors in (module.parameters(), module.buffers()) for t in tensors), None)
    if first is None:
        return torch.device("cpu"), torch.float32
    device = first.device
    if first.is_meta:
        runs = [getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in module.modules()]
        device = next((torch.device(r) for r in runs if r is not None), device)
    return device, first.dtype if first.is_floating_point() else torch.float32


def rows_of(site: Site) -> list[int]:
    """The output rows of a slice, in order."""
    return [i for start, stop in site.rows or () for i in range(start, stop)]


def take_rows(t: Tensor, site: Site, dim: int = 0) -> Tensor:
    """The site's rows of a fused projection's outputs along `dim`."""
    assert site.rows
    return torch.cat([t.narrow(dim, start, stop - start) for start, stop in site.rows], dim)


def put_rows(whole: Tensor, part: Tensor, site: Site, dim: int = 0) -> Tensor:
    """`whole` with the site's rows along `dim` replaced by `part`, out of place."""
    assert site.rows
    pieces, at, used = [], 0, 0
    for start, stop in site.rows:
        pieces += [whole.narrow(dim, at, start - at), part.narrow(dim, used, stop - start)]
        at, used = stop, used + stop - start
    pieces.append(whole.narrow(dim, at, whole.shape[dim] - at))
    return torch.cat(pieces, dim)


def are_apart(a: Site, b: Site) -> bool:
    """Are these slices of fused projections without a common row?"""
    return bool(a.rows and b.rows) and all(
        stop <= other or end <= start for start, stop in a.rows or () for other, end in b.rows or ()
    )


class Base:
    """What an init may look at: the site's own (O, I) weight and bias in fp32 (fp64 of an fp64 base), read when asked for."""

    def __init__(self, module: nn.Module, site: Site, expert: int | None = None) -> None:
        self.module, self.site, self.expert = module, site, expert

    @property
    def weight(self) -> Tensor:
        """(O, I), or the vector of a norm; of a slice its own rows, of an expert its own matrix."""
        weight = matrix(self.module, self.site)
        weight = self._seen(weight if self.expert is None else weight[self.expert])
        return take_rows(weight, self.site) if self.site.rows else weight

    @property
    def bias(self) -> Tensor | None:
        """(O) or None."""
        bias = bias_of(self.module, self.site)
        if bias is None:
            return None
        bias = self._seen(bias)
        return take_rows(bias, self.site) if self.site.rows else bias

    @property
    def is_plain(self) -> bool:
        """Does its forward do no more than its kind says? Some embeddings scale what they look up."""
        own = own_class(self.module).forward  # type: ignore[attr-defined]
        return self.site.kind != "embedding" or (own is nn.Embedding.forward and self.module.max_norm is None)

    @property
    def vocabulary(self) -> Tensor:
        """(V, D), the token embeddings of the model or stack that the site is the input of."""
        find = getattr(self.module, "get_input_embeddings", None)
        table = nn.Module() if find is None else find()
        weight: Tensor | None = table._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{own_class(self.module).__name__} has no table of token embeddings to start from")
        kept = offloaded(table, "weight") if weight.is_meta else None
        return self._seen(weight if kept is None else kept)

    def _seen(self, t: Tensor) -> Tensor:
        t = t.detach().to(place_of(self.module, self.site)[0])  # from where accelerate keeps it
        return t if t.dtype == torch.float64 else t.float()


def fold_one(delta: "Delta", weight: Tensor, bias: Tensor | None) -> Folded:
    """`delta.fold` on the whole (O, I) matrix of its module: a slice folds its rows, experts fold each their own."""
    site = delta.site
    if site.rows:
        part, part_bias = delta.fold(take_rows(weight, site), None if bias is None else take_rows(bias, site))
        whole_bias = None
        if part_bias is not None:
            whole_bias = put_rows(weight.new_zeros(weight.shape[0]) if bias is None else bias, part_bias, site)
        return put_rows(weight, part, site), whole_bias if part_bias is not None else bias
    if site.kind == "experts":
        state = {**dict(delta.named_parameters()), **dict(delta.named_buffers())}

        def each(tensors: dict[str, Tensor], w: Tensor) -> Tensor:
            folded: Folded = torch.func.functional_call(delta, tensors, (w, None))
            return folded[0]

        out = torch.func.vmap(each, randomness="different")(state, weight)
        assert isinstance(out, Tensor)
        return out, bias
    return delta.fold(weight, bias)


def folded(module: nn.Module, deltas: Sequence["Delta"]) -> Folded:
    """The module's weight and bias after the chain of folds, innermost first; fp32 where any delta is."""
    site = deltas[0].site
    weight, bias = matrix(module, site), bias_of(module, site)
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    if bias is not None and bias.dtype in (torch.float16, torch.bfloat16):
        bias = bias.float()
    for delta in deltas:
        for tensor in delta._parameters.values():
            if tensor is not None and tensor.is_meta:
                check_present(delta)
        if delta.noisy and delta.training and torch.is_grad_enabled():
            raise ValueError(
                f"{delta.site.name}: its dropout needs the activations, but what stands around it here works on the weight; "
                f"set dropout to 0 in {names_of([delta])}, or attach the other at other sites"
            )
        weight, bias = fold_one(delta, weight, bias)
    return weight, bias


def restored(module: nn.Module, site: Site, weight: Tensor) -> Tensor:
    """A folded (O, I) matrix in the layout of the module's own weight."""
    if transposed(module, site.param):
        return weight.mT
    if site.kind == "conv2d":
        return weight.view(getattr(module, site.param).shape)
    return weight


def trained_base(module: nn.Module, site: Site) -> bool:
    """Does the layer's own weight or bias take a gradient?"""
    return any(t is not None and t.requires_grad for t in (stored(module, site), bias_of(module, site)))


def _is_at_hand(module: nn.Module, site: Site, x: Tensor) -> bool:
    """Is the weight a plain tensor in the activations' dtype, here and whole?"""
    weight = stored(module, site)
    return not (weight.dtype != x.dtype or quantised(module, site) or weight.is_meta or hasattr(weight, "full_tensor"))


def _cast_fold(module: nn.Module, deltas: Sequence["Delta"], dtype: torch.dtype) -> Folded:
    weight, bias = folded(module, deltas)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _Seen:
    """A module seen with other weights: what dynamo follows where a bare instance's `__dict__` is closed to it (torch 2.11)."""

    def __init__(self, module: nn.Module, replaced: dict[str, Tensor | None]) -> None:
        self.module, self.replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        if name in self.replaced:
            return self.replaced[name]
        function = getattr(type(self.module), name, None)
        return partial(function, self) if isinstance(function, FunctionType) else getattr(self.module, name)


def own_class(module: nn.Module) -> type:
    """The module's class before any attach, also where others made a subclass of ours since."""
    cls, *_ = getattr(type(module), "_deltatune_class", (type(module),))
    assert isinstance(cls, type)
    return cls


def apply(
    module: nn.Module,
    forward: Callable[..., Any],
    deltas: Sequence["Delta"],
    x: Tensor,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's own `forward` with its weight replaced by the folded one: the weight path, for every kind of site."""
    site = deltas[0].site
    if site.kind == "linear" and plain_autograd(x) and not trained_base(module, site):
        first = deltas[0]
        if len(deltas) == 1 and first.has_product and not site.rows and _is_at_hand(module, site, x):
            return first.product(x, matrix(module, site), bias_of(module, site))
        if not any(d.random_fold for d in deltas):
            return linear(x, partial(_cast_fold, module, tuple(deltas), x.dtype), deltas)
    if len({d.site.param for d in deltas}) == 1:
        weight, bias = folded(module, deltas)
        replaced: dict[str, Tensor | None] = {site.param: restored(module, site, weight)}
        if bias is not None or bias_of(module, site) is not None:
            replaced["bias"] = bias
    else:  # several fused weights of one experts module
        replaced = {}
        for param in dict.fromkeys(d.site.param for d in deltas):
            own = [d for d in deltas if d.site.param == param]
            replaced[param] = restored(module, own[0].site, folded(module, own)[0])
    dtype = x.dtype if x.is_floating_point() else place_of(module, site)[1]
    replaced = {k: None if v is None else v.to(dtype) for k, v in replaced.items()}
    if site.kind == "linear":  # nothing but a matrix product, also on quantised storage
        weight = replaced[site.param]  # type: ignore[assignment]
        weight = weight.mT if transposed(module, site.param) else weight
        return F.linear(x, weight, replaced.get("bias", bias_of(module, site)))
    if "bias" in replaced and bias_of(module, site) is None and "bias" not in module._parameters:
        raise ValueError(f"{site.name}: {type(module).__name__} has no bias, and its forward could not use one")
    own = own_class(module).forward  # type: ignore[attr-defined]
    if site.kind == "conv2d" and own is nn.Conv2d.forward:
        return module._conv_forward(x, replaced["weight"], replaced.get("bias"))  # type: ignore[operator]
    if site.kind == "embedding" and own is nn.Embedding.forward and module.max_norm is None:
        return F.embedding(x, replaced["weight"], module.padding_idx)
    if site.kind == "norm" and own is nn.LayerNorm.forward:
        return F.layer_norm(x, module.normalized_shape, replaced["weight"], replaced.get("bias"), module.eps)  # type: ignore[arg-type]
    if site.kind == "norm" and own is nn.RMSNorm.forward:
        return F.rms_norm(x, module.normalized_shape, replaced["weight"], module.eps)  # type: ignore[arg-type]
    # the module itself is never touched, so that threads and recomputation are safe
    if torch.compiler.is_compiling():
        return forward(_Seen(module, replaced), x, *rest, **kwargs)
    stand_in = module.__class__.__new__(module.__class__)
    stand_in.__dict__.update(module.__dict__, _parameters={**module._parameters, **replaced})
    return forward(stand_in, x, *rest, **kwargs)


@torch.no_grad()
def write(module: nn.Module, site: Site, weight: Tensor, bias: Tensor | None) -> None:
    """Put a folded weight and bias into the module for good. Raises ValueError where the module has no place for it."""
    kept = stored(module, site)
    own = bias_of(module, site)
    if bias is not None and own is None and site.kind not in ("linear", "conv2d", "norm"):
        raise ValueError(f"{site.name}: a {site.kind} has no bias to merge into")
    if bias is not None and own is None and "bias" not in module._parameters:
        raise ValueError(f"{site.name}: {type(module).__name__} has no bias to merge into")
    kept.copy_(restored(module, site, weight))
    if bias is not None and own is None:
        mine = bias.to(kept.dtype, copy=True)  # a method may give its tensor itself, and the next is written here
        module.bias = nn.Parameter(mine, requires_grad=False)
    elif own is not None:
        own.zero_() if bias is None else own.copy_(bias)


def snapshot(module: nn.Module, site: Site) -> SimpleNamespace:
    """The module's weight and bias, bit for bit: what `write_back` restores. A plain one's are copied to the CPU."""
    kind = storage.format_of(module, site.param)
    if kind is not None:  # nothing of it is written in place
        own = {key: module.__dict__[key] for key in ("_parameters", "_buffers", *kind.beside) if key in module.__dict__}
        return SimpleNamespace(cls=own_class(module), own={k: dict(v) if k[0] == "_" else v for k, v in own.items()})
    bias = bias_of(module, site)
    return SimpleNamespace(
        cls=None,
        weight=stored(module, site).detach().to("cpu", copy=True),
        bias=None if bias is None else bias.detach().to("cpu", copy=True),
    )


@torch.no_grad()
def unquantise(module: nn.Module, site: Site, dtype: torch.dtype) -> None:
    """Keep a quantised linear layer's weight as plain numbers. The class is the caller's to change."""
    kind = storage.format_of(module, site.param)
    assert kind is not None
    weight, bias = matrix(module, site), bias_of(module, site)
    for key in kind.beside:
        module.__dict__.pop(key, None)
    plain = {
        "weight": weight.to(dtype, copy=True),
        "bias": None if bias is None else bias.detach().to(dtype, copy=True),
    }
    module.__dict__["_parameters"] = {
        key: None if t is None else nn.Parameter(t.contiguous(), requires_grad=False) for key, t in plain.items()
    }
    module.__dict__["_buffers"] = {}


@torch.no_grad()
def write_back(module: nn.Module, site: Site, kept: SimpleNamespace) -> None:
    """Restore a snapshot exactly, a bias that merging added included. The class is the caller's to change."""
    if kept.cls is not None:
        module.__dict__.update({k: dict(v) if k[0] == "_" else v for k, v in kept.own.items()})
        return
    stored(module, site).copy_(kept.weight)
    bias = bias_of(module, site)
    if kept.bias is not None:
        assert bias is not None
        bias.copy_(kept.bias)
    elif bias is not None:
        module._parameters["bias"] = None


@torch.no_grad()
def requantise(module: nn.Module, site: Site, weight: Tensor) -> float:
    """Quantise (O, I) in the place of the layer's own; ||what it keeps - W|| / ||W||."""
    kind = storage.format_of(module, site.param)
    assert kind is not None and kind.write is not None
    kind.write(module, site.param, weight)
    return float((matrix(module, site).float() - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))
