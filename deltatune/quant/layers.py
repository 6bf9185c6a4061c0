"""The layers that a linear layer can become, by name.

bnb-nf4, bnb-fp4    bitsandbytes, 4 bits (2305.14314): blocks of 64, their scales quantised too
bnb-int8            bitsandbytes, LLM.int8 (2208.07339)
ao-int8, ao-int4    torchao, weight only
int2 ... int8, nf2 ... nf4    our own codes in groups (core/groups.py)
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import unknown
from ..core.groups import GroupLinear


@dataclass(frozen=True)
class Kind:
    """How a plain linear layer becomes a quantised one, and how one comes out of a file."""

    make: Callable[..., nn.Module]  # (plain layer, **options)
    options: Mapping[str, Any]  # with their defaults
    read: Callable[..., nn.Module] | None = None  # (d_in, d_out, tensors, device, **options); None: it has no file


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this format needs the package {name}: pip install 'deltatune[quant]'") from None


def _bias(layer: nn.Module, bias: Tensor | None) -> nn.Module:
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _linear4bit(bnb: Any, d_in: int, d_out: int, dtype: torch.dtype) -> Any:
    layer = bnb.Linear4bit(d_in, d_out, bias=False, compute_dtype=dtype, device="meta")
    layer.support_avx512bf16_for_cpu = False  # an inference would round the scales to bf16, in place and for good
    return layer


def _make_4bit(plain: nn.Linear, quant_type: str, block: int, double: bool) -> nn.Module:
    bnb, weight = _library("bitsandbytes").nn, plain.weight
    layer = _linear4bit(bnb, plain.in_features, plain.out_features, weight.dtype)
    made = bnb.Params4bit(
        weight.detach(), requires_grad=False, blocksize=block, compress_statistics=double, quant_type=quant_type, module=layer
    )  # fmt: skip
    layer._parameters["weight"] = made.to(weight.device)
    layer.quant_state = layer._parameters["weight"].quant_state
    return _bias(layer, plain.bias)


def _read_4bit(
    d_in: int, d_out: int, tensors: dict[str, Tensor], device: torch.device, quant_type: str, **_: Any
) -> nn.Module:
    bnb = _library("bitsandbytes").nn
    stats = {key.removeprefix("weight."): t for key, t in tensors.items() if key.startswith("weight.")}
    if not any(key.endswith(quant_type) for key in stats):
        raise ValueError(f"its file holds no {quant_type} weight")
    weight = bnb.Params4bit.from_prequantized(tensors["weight"], stats, requires_grad=False, device=device)
    layer = _linear4bit(bnb, d_in, d_out, weight.quant_state.dtype)
    weight.module = layer
    layer._parameters["weight"], layer.quant_state = weight, weight.quant_state
    return _bias(layer, tensors.get("bias"))


def _make_8bit(plain: nn.Linear) -> nn.Module:
    bnb = _library("bitsandbytes").nn
    layer = bnb.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False, device="meta")
    made = bnb.Int8Params(plain.weight.detach(), requires_grad=False, has_fp16_weights=False)
    layer._parameters["weight"] = made.to(plain.weight.device)
    return _bias(layer, plain.bias)


def _read_8bit(d_in: int, d_out: int, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    bnb = _library("bitsandbytes").nn
    layer = bnb.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, device="meta")
    codes = tensors["weight"].to(device)
    weight = bnb.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    weight.CB, weight.SCB = codes, tensors["SCB"].to(device)
    layer._parameters["weight"] = weight
    return _bias(layer, tensors.get("bias"))


def _make_ao(plain: nn.Linear, config: str) -> nn.Module:
    ao = _library("torchao.quantization")
    layer = nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta")
    layer._parameters["weight"] = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    ao.quantize_(layer, getattr(ao, config)())
    layer.requires_grad_(False)
    return _bias(layer, plain.bias)


def _make_groups(plain: nn.Linear, code: str, bits: int, group: int) -> nn.Module:
    return GroupLinear.of(plain, bits, group, code)


def _read_groups(
    d_in: int, d_out: int, tensors: dict[str, Tensor], device: torch.device, code: str, bits: int, group: int
) -> nn.Module:
    layer = GroupLinear(d_in, d_out, bits, group, code, tensors.get("bias"))
    layer.load_state_dict(tensors)
    return layer.to(device)


_FOUR = {"block": 64, "double": True}
KINDS: dict[str, Kind] = {
    "bnb-nf4": Kind(_make_4bit, {"quant_type": "nf4"} | _FOUR, _read_4bit),
    "bnb-fp4": Kind(_make_4bit, {"quant_type": "fp4"} | _FOUR, _read_4bit),
    "bnb-int8": Kind(_make_8bit, {}, _read_8bit),
    "ao-int8": Kind(_make_ao, {"config": "Int8WeightOnlyConfig"}),
    "ao-int4": Kind(_make_ao, {"config": "Int4WeightOnlyConfig"}),
    **{f"{c}{b}": Kind(_make_groups, {"code": c, "bits": b, "group": 64}, _read_groups)
       for c, bits in (("int", (2, 3, 4, 8)), ("nf", (2, 3, 4))) for b in bits},
}  # fmt: skip
_FIXED = ("quant_type", "config", "code", "bits")  # the name says them


def options_of(to: str, given: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """The kind `to` and all of its options. Raises ValueError with the nearest name of what is unknown."""
    if to not in KINDS:
        raise unknown("format", to, KINDS)
    kind = KINDS[to]
    free = [key for key in kind.options if key not in _FIXED]
    for key in given:
        if key not in free:
            raise unknown(f"option of {to}", key, free)
    return kind, {**kind.options, **given}


def said(module: Any) -> dict[str, Any]:
    """The name and options of a quantised layer's format. Raises ValueError where it has no file here."""
    if isinstance(module, GroupLinear):
        return {"to": f"{module.code}{module.bits}", "group": module.group}
    name, weight = type(module).__name__, module._parameters.get("weight")
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        return {"to": f"bnb-{state.quant_type}", "block": state.blocksize, "double": state.nested}
    if type(weight).__name__ == "Int8Params":
        return {"to": "bnb-int8"}
    raise ValueError(f"a {name} has no file here; save the plain base, and quantise it again when it is loaded")
