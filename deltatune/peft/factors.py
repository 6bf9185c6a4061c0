"""LoHa, LoKr and VeRA of HF PEFT's: their factors at each layer, in and out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base
from ..core.site import Site
from ..methods.products import LoHa, LoKr, halves
from ..methods.vera import VeRA
from .pieces import Piece

FACTORS: dict[str, Any] = {"LOHA": LoHa, "LOKR": LoKr, "VERA": VeRA}
Row = tuple[str, str, tuple[int, ...], Callable[[Tensor], Tensor]]  # name there, slot here, shape there, as it is here


def hyper_factors(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The hyperparameters that a configuration gives every layer."""
    if kind == "VERA":
        return {
            "r": fields.get("r", 256), "d_initial": fields.get("d_initial", 0.1), "key": fields.get("projection_prng_key", 0),
            "saved": bool(fields.get("save_projection", True)), "dropout": fields.get("vera_dropout", 0.0),
        }  # fmt: skip
    found = {
        "r": fields.get("r", 8),
        "alpha": fields.get("alpha", 8),
        "effective": bool(fields.get("use_effective_conv2d")),
    }
    if kind == "LOKR":
        factor = fields.get("decompose_factor", -1)
        # what is neither -1 nor a size leaves W1 a single number, as 1 does
        found |= {"both": bool(fields.get("decompose_both")), "factor": factor if factor == -1 else max(factor, 1)}
    return found


def check_factors(module: nn.Module, site: Site, method: Any) -> None:
    """Raise ValueError on a layer where HF PEFT has no such method, or is no change of its weight."""
    there = ("linear",) if method is VeRA else ("linear", "conv2d")
    if site.rows or site.kind not in there or method is not VeRA and base.transposed(module):
        what = "a slice of a fused projection" if site.rows else f"a {base.own_class(module).__name__}"
        raise ValueError(f"{site.name}: HF PEFT has no {method.__name__} on {what}")
    if site.kind == "conv2d" and module.padding_mode != "zeros":
        raise ValueError(f"{site.name}: HF PEFT pads with zeros where this convolution pads by {module.padding_mode!r}")


def rows_of(module: nn.Module, site: Site, method: Any, hyper: Mapping[str, Any]) -> Iterator[Row]:
    """The tensors of one layer."""
    check_factors(module, site, method)
    config, o, i = method.configure(**hyper), site.d_out, site.d_in
    r, kernel = config.r, tuple(base.stored(module, site).shape[2:])
    places = kernel[0] * kernel[1] if kernel else 1
    core = method is not VeRA and config.effective and places > 1
    if method is VeRA:
        yield "vera_lambda_d", "lambda_d", (r,), _as_is
        yield "vera_lambda_b", "lambda_b", (o,), _as_is
    elif method is LoHa:
        for n in "12":
            yield from _pair(f"hada_w{n}", n, o, i // places if core else i, r, core)
            if core:
                yield f"hada_t{n}", f"core{n}", (r, r, *kernel), _flat
    else:
        (o1, o2), (i1, c2), whole1, whole2 = halves(config, o, i // places)
        if whole1:
            yield "lokr_w1", "w1", (o1, i1), _as_is
        else:
            yield from _pair("lokr_w1", "1", o1, i1, r, False)
        if whole2:
            yield "lokr_w2", "w2", (o2, c2, *kernel), lambda t: t.flatten(1)
            return
        yield from _pair("lokr_w2", "2", o2, c2 if core else c2 * places, r, core)
        if core:
            yield "lokr_t2", "core", (r, r, *kernel), _flat


def _pair(name: str, n: str, d_out: int, d_in: int, r: int, turned: bool) -> Iterator[Row]:
    """B and A of one product; beside a core HF PEFT keeps B as (r, O)."""
    yield f"{name}_a", f"b{n}", (r, d_out) if turned else (d_out, r), torch.t if turned else _as_is
    yield f"{name}_b", f"a{n}", (r, d_in), _as_is


def _as_is(t: Tensor) -> Tensor:
    return t


def _flat(t: Tensor) -> Tensor:
    return t.flatten(2)


def shared_pieces(sites: Sequence[Site], fields: Mapping[str, Any], kind: str, path: str) -> list[Piece]:
    """VeRA's A and B, where the file has them: as wide and as tall as the largest of the layers."""
    hyper = hyper_factors(fields, kind) if kind == "VERA" else {}
    if not hyper.get("saved"):
        return []
    r, at = hyper["r"], sites[0].name
    return [
        Piece("base_model.vera_A", (r, max(s.d_in for s in sites)), lambda t: {(path, at, "a"): t}),
        Piece("base_model.vera_B", (max(s.d_out for s in sites), r), lambda t: {(path, at, "b"): t}),
    ]


def factor_fields(
    parts: Sequence[Any], modules: Mapping[str, nn.Module], patterns: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One configuration for these layers, and their tensors. Raises ValueError where HF PEFT's format has none.

    `patterns` are r and alpha, with those that differ by place.
    """
    method = parts[0].method
    by_place = {"r", "alpha"} if method is not VeRA else set()
    common = {tuple((k, v) for k, v in part.hyper.items() if k not in by_place) for part in parts}
    if len(common) > 1 or method is VeRA and len({part.path for part in parts}) > 1:
        keys = ", ".join(key for key in parts[0].hyper if key not in by_place)
        raise ValueError(f"{method.name}: {keys} by place cannot be written as HF PEFT's, which has one of each")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, slot, shape, here in rows_of(modules[part.site.module], part.site, method, part.hyper):
            own = part.tensors[slot]
            own = own.t() if here is torch.t else own.reshape(shape)
            tensors[f"base_model.model.{part.site.module}.{name}"] = own
    hyper = parts[0].hyper
    if method is VeRA:
        if hyper["saved"]:
            tensors |= {"base_model.vera_A": parts[0].tensors["a"], "base_model.vera_B": parts[0].tensors["b"]}
        return {
            "peft_type": "VERA", "r": hyper["r"], "d_initial": hyper["d_initial"], "projection_prng_key": hyper["key"],
            "save_projection": hyper["saved"], "vera_dropout": hyper["dropout"], "bias": "none",
        }, tensors  # fmt: skip
    fields = {"peft_type": method.name.upper(), "use_effective_conv2d": hyper["effective"], **patterns}
    if method is LoKr:
        fields |= {"decompose_both": hyper["both"], "decompose_factor": hyper["factor"]}
    return fields, tensors
