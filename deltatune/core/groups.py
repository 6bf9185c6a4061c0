"""A linear layer of our own that keeps a few bits a weight: for bases that a library's format cannot be, or cannot be written in.

    W[o, i] = s[o, j] (c[q[o, i]] - z[o, j])        j = i // g

`int`: c[q] = q, and z is a real number, which methods may move (QA-LoRA, 2309.14717). `nf`: c holds the 2^b quantiles of a
normal distribution in [-1, 1], 0 among them (QLoRA, 2305.14314), z = 0 and s = max |W| of the group.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .refold import plain_autograd

CODES = ("int", "nf")
BITS = (1, 2, 3, 4, 8)
AT_ONCE = 2**18  # weights that are quantised together: each takes 40 bytes while it is


@functools.cache
def normal_floats(bits: int) -> Tensor:
    """(2^bits) ascending in [-1, 1]: equally probable quantiles of N(0, 1) on both sides of an exact 0, over the largest."""
    half, end = 2 ** (bits - 1), 0.9677083  # the outermost probability of QLoRA's table
    above = torch.linspace(end, 0.5, half + 1, dtype=torch.float64)[:-1]
    below = torch.linspace(end, 0.5, half, dtype=torch.float64)[:-1]
    values: Tensor = torch.cat([_quantile(above), torch.zeros(1, dtype=torch.float64), -_quantile(below)]).sort().values
    out: Tensor = (values / values.abs().max()).float()
    return out


def _quantile(p: Tensor) -> Tensor:
    out: Tensor = math.sqrt(2) * torch.erfinv(2 * p - 1)
    return out


def packed(q: Tensor, bits: int) -> Tensor:
    """(..., n) codes below 2^bits as (..., n bits / 8) bytes, lowest bits first; n in eights."""
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, device=q.device)
        return (q.long().reshape(*q.shape[:-1], -1, 8 // bits) << places).sum(-1).to(torch.uint8)
    words = (q.long().reshape(*q.shape[:-1], -1, 8) << (bits * torch.arange(8, device=q.device))).sum(-1, keepdim=True)
    return ((words >> (8 * torch.arange(bits, device=q.device))) & 255).flatten(-2).to(torch.uint8)


def unpacked(kept: Tensor, bits: int) -> Tensor:
    """What `packed` kept."""
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, device=kept.device, dtype=torch.uint8)
        return torch.bitwise_and(kept[..., None] >> places, 2**bits - 1).flatten(-2)
    words = (kept.long().reshape(*kept.shape[:-1], -1, bits) << (8 * torch.arange(bits, device=kept.device))).sum(
        -1, keepdim=True
    )
    return torch.bitwise_and(words >> (bits * torch.arange(8, device=kept.device)), 2**bits - 1).flatten(-2)


class GroupLinear(nn.Module):
    """y = x W' + b with W as codes of `bits` bits in groups of `group` inputs; `scales` and `zeros` are (O, I / group) in fp32."""

    def __init__(
        self, d_in: int, d_out: int, bits: int = 4, group: int = 64, code: str = "int", bias: Tensor | None = None
    ) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; a layer of codes has one of {', '.join(map(str, BITS))}")
        if code not in CODES:
            raise ValueError(f"code is {code!r}; it must be one of {', '.join(CODES)}")
        if code == "nf" and bits in (1, 8):
            raise ValueError(f"code 'nf' has no table of {bits} bits; take 2, 3 or 4")
        if group < 8 or d_in % group or group % 8:
            raise ValueError(f"group is {group}; it must be in eights and divide the layer's {d_in} inputs")
        self.in_features, self.out_features, self.bits, self.group, self.code = d_in, d_out, bits, group, code
        own = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", own)  # an attribute of None would hide the bias that is put here later
        self.register_buffer("codes", torch.zeros(d_out, d_in * bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(d_out, d_in // group))
        self.register_buffer("zeros", torch.zeros(d_out, d_in // group) if code == "int" else None)
        self.codes: Tensor
        self.scales: Tensor
        self.zeros: Tensor | None

    @classmethod
    def of(cls, linear: Any, bits: int = 4, group: int = 64, code: str = "int") -> "GroupLinear":
        """The layer's weight, quantised to the nearest code."""
        layer = cls(linear.in_features, linear.out_features, bits, group, code, linear.bias).to(linear.weight.device)
        n = max(1, AT_ONCE // layer.in_features)
        for rows in (slice(at, at + n) for at in range(0, layer.out_features, n)):
            q, layer.scales[rows], z = layer.nearest(linear.weight[rows])
            layer.codes[rows] = packed(q, bits)
            if layer.zeros is not None and z is not None:
                layer.zeros[rows] = z
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> "GroupLinear":
        """`model.to(dtype)` moves scales and zeros, and leaves their digits."""
        kept = self.scales, self.zeros
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != kept[0].dtype:
            device = self.scales.device
            self.scales, self.zeros = (None if t is None else t.to(device) for t in kept)  # type: ignore[assignment]
        return self

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.in_features}, {self.out_features}, {self.code}{self.bits}, group={self.group}"

    def table(self) -> Tensor:
        """(2^bits) c, in fp32."""
        device = self.codes.device
        return normal_floats(self.bits).to(device) if self.code == "nf" else torch.arange(2.0**self.bits, device=device)

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q, s, z) of (O, I) or some of its rows: scales from each group's range, then the nearest codes."""
        w = weight.detach().float().view(len(weight), -1, self.group)
        if self.code == "nf":
            s = w.abs().amax(-1)
            table = self.table()
            share = w / s.clamp_min(1e-30)[..., None]
            q = torch.bucketize(share, (table[1:] + table[:-1]) / 2)
            return q.flatten(1), s, None
        low, high = w.amin(-1), w.amax(-1)
        top = 2**self.bits - 1
        s = ((high - low) / top).clamp_min(1e-30)
        z = -low / s
        q = (w / s[..., None] + z[..., None]).round().clamp(0, top)
        return q.flatten(1).long(), s, z

    def keep(self, q: Tensor, s: Tensor, z: Tensor | None) -> None:
        """Take (O, I) codes, (O, I / group) scales and zeros."""
        self.codes, self.scales = packed(q, self.bits), s
        self.zeros = z

    def dequantize(self) -> Tensor:
        """(O, I) in fp32."""
        q = unpacked(self.codes, self.bits)
        c = self.table()[q.long()] if self.code == "nf" else q.float()
        c = c.view(self.out_features, -1, self.group)
        if self.zeros is not None:
            c = c - self.zeros[..., None]
        return (c * self.scales[..., None]).flatten(1)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Keep (O, I) in this one's place. Codes stay in each group where a new scale and zero fit it as well as new codes do.

        So a change that is constant in each group moves the zeros alone, and one that is a factor the scales, exactly.
        """
        w = weight.detach().double().view(self.out_features, -1, self.group)
        q = unpacked(self.codes, self.bits)
        c = self.table()[q.long()].double().view(self.out_features, -1, self.group)
        middle, mean = (c.mean(-1, keepdim=True), w.mean(-1, keepdim=True)) if self.zeros is not None else (0.0, 0.0)
        spread = ((c - middle) ** 2).sum(-1)
        s = ((c - middle) * (w - mean)).sum(-1) / spread.clamp_min(1e-30)
        s = torch.where(spread > 0, s, self.scales.double())
        safe = torch.where(s == 0, 1.0, s)
        z = None if self.zeros is None else torch.where(s == 0, 0.0, (middle - mean / safe[..., None]).squeeze(-1))
        new_q, new_s, new_z = self.nearest(weight)
        ours = _error(w, c, s, z)
        theirs = _error(
            w, self.table()[new_q.long()].double().view(self.out_features, -1, self.group), new_s.double(), new_z
        )
        stays = ours <= theirs
        kept = torch.where(stays.repeat_interleave(self.group, 1), q.long(), new_q.long())
        zeros = None if z is None or new_z is None else torch.where(stays, z.float(), new_z)
        self.keep(kept, torch.where(stays, s.float(), new_s), zeros)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O); neither the matrix nor its gradient outlives the layer."""
        if not (plain_autograd(x) and x.requires_grad):
            return self.product(x)
        y: Tensor = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    def product(self, x: Tensor) -> Tensor:
        """x W' + b"""
        bias = self._parameters["bias"]
        return F.linear(x, self.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))


def _error(w: Tensor, c: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
    return ((w - s[..., None] * (c if z is None else c - z[..., None])) ** 2).sum(-1)


class _Product(torch.autograd.Function):
    """x W' + b with W read again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: GroupLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.layer.dequantize().to(grad.dtype), of_bias, None
