"""How a layer keeps its weight: plainly, or in the quantised format of some library. A format is known here and nowhere else.

    bitsandbytes      4 bits (NF4, FP4) and 8 bits     read, written again with the layer's own settings
    torchao           tensor subclasses                read
    HQQ, GPTQ, AWQ    layers with packed integers      read
    ours              codes in groups (groups.py)      read, written again

What is read is the (O, I) matrix in numbers. The product and its gradient are the layer's own; a delta that works on the weight
has it read for the one layer that runs. Formats are told by what a layer has: no library is imported for it.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .groups import GroupLinear


@dataclass(frozen=True)
class Format:
    """One way to keep a matrix: `read` gives it, `write`, where there is one, keeps another in its place, quantised alike."""

    name: str
    fits: Callable[[Any, str], bool]
    read: Callable[[Any, str], Tensor]  # (O, I)
    write: Callable[[Any, str, Tensor], None] | None = None
    kept: str = "weight"  # the tensor that holds it
    beside: tuple[str, ...] = ()  # attributes of the layer that belong to it, and go with it
    product: Callable[[Any, Tensor], bool] = lambda module, x: (
        False
    )  # is its forward on x the product with what is read?


def format_of(module: nn.Module, param: str = "weight") -> Format | None:
    """The quantised format of the layer's weight; None where it is a plain tensor."""
    weight = getattr(module, param, None)
    if weight is not None and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point():
        return None
    return next((f for f in FORMATS if f.fits(module, param)), None)


def unregistered(module: nn.Module) -> Iterator[Tensor]:
    """What the layer's format keeps that is no parameter or buffer: bitsandbytes' scales hang at attributes."""
    kind = format_of(module)
    names = (*kind.beside, kind.kept) if kind is not None and kind.beside else ()
    held = [getattr(module, name, None) for name in names]
    while held:
        for value in getattr(held.pop(), "__dict__", {}).values():
            if isinstance(value, Tensor):
                yield value
            elif type(value).__name__ == "QuantState":
                held.append(value)


def guarded(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer class's forward, which raises ValueError where sharding has taken what the format keeps at its parameter."""
    if cls.__name__ != "Linear8bitLt":
        return forward

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self.weight) is nn.Parameter:
            raise ValueError(
                "LLM.int8 keeps its scales at the parameter, and FSDP2 puts a plain one in its place; shard a base in bnb-nf4, or "
                "train this one under DDP"
            )
        return forward(self, *args, **kwargs)

    return checked


def _bnb() -> Any:
    import bitsandbytes

    return bitsandbytes


def _is(name: str) -> Callable[[Any, str], bool]:
    return lambda module, param: type(getattr(module, param, None)).__name__ == name and "bitsandbytes" in sys.modules


# --- bitsandbytes ------------------------------------------------------------------------------------------------------


def _read_4bit(module: Any, param: str) -> Tensor:
    weight: Any = getattr(module, param)
    data, state = weight.data, weight.quant_state
    if state is None:
        raise ValueError(
            f"its 4-bit weight was never quantised (it is on {weight.device}); move the model to its device first"
        )
    if getattr(state, "packing_format_for_cpu", False):  # an inference on some CPUs packs it in another order, in place
        packed, state = state, copy.copy(state)  # the inverse writes into the state that it is given
        data, state = _bnb().functional._convert_weight_packed_for_cpu_inverse(data, state)
        if not state.nested:  # it leaves these transposed
            state.absmax = packed.absmax.T.reshape(-1).float()
    out: Tensor = _bnb().functional.dequantize_4bit(data, state)
    return out


def _write_4bit(module: Any, param: str, weight: Tensor) -> None:
    old: Any = getattr(module, param)
    state = old.quant_state
    module._parameters[param] = (
        _bnb()
        .nn.Params4bit(
            weight.to(state.dtype), requires_grad=False, blocksize=state.blocksize, compress_statistics=state.nested,
            quant_type=state.quant_type, quant_storage=old.quant_storage, module=module,
        )
        .to(old.device)
    )  # fmt: skip
    module.quant_state = module._parameters[param].quant_state


def _read_8bit(module: Any, param: str) -> Tensor:
    weight, state = getattr(module, param), module.state
    scales = weight.SCB if weight.SCB is not None else state.SCB  # the first forward moves them
    codes = weight.CB if weight.CB is not None else weight.data
    if scales is None:
        raise ValueError(
            f"its 8-bit weight was never quantised (it is on {weight.device}); move the model to its device first"
        )
    out: Tensor = codes.float() * (scales.float()[:, None] / 127)
    return out


def _write_8bit(module: Any, param: str, weight: Tensor) -> None:
    old: Any = getattr(module, param)
    module.state = copy.copy(module.state)
    module.state.CB = module.state.SCB = None
    made = _bnb().nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    module._parameters[param] = made.to(old.device)


# --- packed integers ---------------------------------------------------------------------------------------------------


def unpacked(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(A, B) 32-bit words as (A, B, 32 / bits) integers, lowest bits first, or in the `order` of their places."""
    places = torch.tensor(order or range(32 // bits), device=words.device, dtype=torch.int32) * bits
    return torch.bitwise_and(words[..., None] >> places, 2**bits - 1)


def _read_gptq(m: Any, param: str) -> Tensor:
    """(q - z) s, with a group of its own for each input feature; checkpoints of the first format keep z - 1."""
    if m.bits not in (2, 4, 8):
        raise ValueError(f"its GPTQ weight has {m.bits} bits; those with 2, 4 and 8 can be read")
    q = unpacked(m.qweight, m.bits).transpose(1, 2).flatten(0, 1)  # (I, O)
    z = unpacked(m.qzeros, m.bits).flatten(1)  # (groups, O)
    if not (hasattr(m, "qzero_format") and m.qzero_format() == 2):
        z = z + 1
    group = m.g_idx.long()
    out: Tensor = (q - z[group]) * m.scales[group]
    return out.T


AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of the i-th column among the eight of a word


def _read_awq(m: Any, param: str) -> Tensor:
    if m.w_bit != 4:
        raise ValueError(f"its AWQ weight has {m.w_bit} bits; those with 4 can be read")
    q, z = (unpacked(words, 4, AWQ_ORDER).flatten(1) for words in (m.qweight, m.qzeros))  # (I, O), (groups, O)
    size = q.shape[0] // z.shape[0]
    out: Tensor = (q - z.repeat_interleave(size, 0)) * m.scales.repeat_interleave(size, 0)
    return out.T


def _has(*names: str) -> Callable[[Any, str], bool]:
    return lambda module, param: param == "weight" and all(hasattr(module, name) for name in names)


FORMATS = (
    Format(
        "bitsandbytes, 4 bits",
        _is("Params4bit"),
        _read_4bit,
        _write_4bit,
        beside=("quant_state",),
        product=lambda m, x: m.compute_dtype in (None, x.dtype),
    ),
    Format("bitsandbytes, 8 bits", _is("Int8Params"), _read_8bit, _write_8bit, beside=("state",)),
    Format(
        "groups of codes",
        lambda m, p: isinstance(m, GroupLinear),
        lambda m, p: m.dequantize(),
        lambda m, p, weight: m.write(weight),
        kept="codes",
        product=lambda m, x: True,
    ),
    Format("HQQ", _has("W_q", "meta", "dequantize"), lambda m, p: m.dequantize(), kept="W_q", beside=("meta",)),
    Format("GPTQ", _has("qweight", "qzeros", "scales", "g_idx", "bits"), _read_gptq, kept="qweight"),
    Format("AWQ", _has("qweight", "qzeros", "scales", "w_bit"), _read_awq, kept="qweight"),
    Format(
        "torchao",
        lambda m, p: hasattr(getattr(m, p, None), "dequantize") and type(getattr(m, p)) is not nn.Parameter,
        lambda m, p: getattr(m, p).dequantize(),
    ),
)
