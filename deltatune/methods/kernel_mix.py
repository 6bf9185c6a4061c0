"""Each head of an attention as a kernel of its own."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import shapes
from ..core.inits import kaiming, zeros
from ..core.method import Method, param

RANKS = {"q": ("r_q", "r_shared_q"), "k": (), "v": ("r_v", "r_shared_v"), "o": ("r_v", "r_shared_v")}


def faint(otherwise):
    """0.01 (z mod 2), z from N(0, 1) and the remainder with its sign, or with start "he" another init."""

    def init(shape, *, delta, **known):
        return 0.01 * torch.randn(shape).fmod(2) if delta.start == "houlsby" else otherwise(shape, **known)

    return init


def attention_of(site):
    """What q, k, v and o of one attention have in common."""
    return f"{site.stack} {site.layer} {site.role.partition('.')[0]}"


class KernelMix(Method, name="kernel_mix"):
    """q^h += B_h A_h x + b_h; v^h += B_h A_h k^h + b_h; o += B [A_h a^h]_h + b; each + D C x, which all heads share.

    Head h's v reads that head's keys as their layer gives them (in front of a rotary embedding), o what the head mixed. So k is
    one of its places, though nothing is trained there. With grouped heads v has as many as k. q and o can be left out.
    """

    paper = "2205.03720"
    category = "reparameterized"
    where = "attn.q,attn.k,attn.v,attn.o"
    limits = dict.fromkeys(("r_q", "r_v", "r_shared_q", "r_shared_v"), "min(d_in,d_out)")
    lr = (1e-4, 5e-3)
    exceptions = {"identity": "the paper's code draws both factors and the biases, so that it starts near the identity"}
    r_q: int = 1  # rank of each head's own update of q
    r_v: int = 2  # of each head's own update of v, and of what o reads of each head
    r_shared_q: int = 2  # rank of the update of q that all heads share
    r_shared_v: int = 4  # of v and of o
    start: Literal["houlsby", "he"] = "houlsby"  # all tensors near 0; or A and C as a linear layer, B, D and b at 0
    dropout: float = 0.1  # share of the updates' inputs that is dropped while training
    a: Tensor = param("n_heads rank d_read", faint(kaiming))
    b: Tensor = param("d_out n_b", faint(zeros))
    bias: Tensor = param("is_adapted*d_out", faint(zeros))
    c: Tensor = param("shared d_in", faint(kaiming))
    d: Tensor = param("d_out shared", faint(zeros))

    @classmethod
    def fits(cls, config, site):
        group, _, part = (site.role or "").partition(".")
        # of q, k and v in one matrix q is let in, for `build` to say what is wrong with it
        return group in ("attn", "cross") and part in RANKS and not (site.rows and part != "q")

    @classmethod
    def numbers(cls, config, sites):
        have = {attention_of(site) + site.role[-1] for site in sites}
        for site in sites:
            part = site.role[-1]
            other = {"k": "v", "v": "k"}.get(part, part)
            if attention_of(site) + other not in have:
                raise ValueError(
                    f"{site.name}: {cls.name} updates each head's values by its keys: with {site.role}, where must name "
                    f"{site.role[:-1]}{other} too"
                )
        return {site.name: {"n_kv_heads": site.n_kv_heads, "d_head": site.d_head} for site in sites}

    @property
    def part(self):
        """q, k, v or o"""
        return self.site.role[-1]

    def build(self, base, dtype):
        """k has none of the tensors."""
        width = self.site.d_in if self.part == "o" else self.site.d_out
        if self.site.rows:
            raise ValueError("q, k and v lie in one matrix here, and it needs each in one of its own")
        if not self.d_head:
            raise ValueError("its attention does not say how wide a head is")
        if width % self.d_head or self.part == "v" and width != self.n_kv_heads * self.d_head:
            keys = f", of which there are {self.n_kv_heads}" if self.part == "v" else ""
            raise ValueError(f"{width} numbers are not heads of {self.d_head}{keys}")
        dims = self.dims(base)
        self.check_limits(dims)
        for key, slot in self.slots.items():
            shape = tuple(int(d.evaluate(dims)) for d in shapes.parse(slot.shape))
            value = None if 0 in shape else nn.Parameter(slot.init(shape, base=base, delta=self).to(dtype))
            self.register_parameter(key, value)

    def check_limits(self, dims):
        super().check_limits(dims)
        for key in RANKS[self.part][:1]:
            if dims[key] > self.d_head:
                raise ValueError(f"{key} = {dims[key]}, but it must lie between 1 and d_head = {self.d_head}")

    def dims(self, base):
        part, d_in, d_out = self.part, self.site.d_in, self.site.d_out
        rank, shared = [getattr(self, key) for key in RANKS[part]] or (0, 0)
        n_heads = (d_in if part == "o" else d_out) // self.d_head
        return super().dims(base) | {
            "n_heads": n_heads, "rank": rank, "shared": shared, "is_adapted": int(part != "k"),
            "d_read": d_in if part == "q" else self.d_head, "n_b": n_heads * rank if part == "o" else rank,
        }  # fmt: skip

    def post(self, y, x):
        if self.part == "k":
            self.frame.stash[self.place()] = y
            return y
        h = self.drop_some(self.keys() if self.part == "v" else x)
        if self.part == "q":
            h = torch.einsum("...d,hrd->...hr", h, self.a)
        else:
            h = torch.einsum("...hd,hrd->...hr", h.unflatten(-1, (-1, self.d_head)), self.a)
        if self.part == "o":
            own = F.linear(h.flatten(-2), self.b)
        else:
            own = torch.einsum("...hr,hdr->...hd", h, self.b.unflatten(0, (-1, self.d_head))).flatten(-2)
        return y + own + self.bias + F.linear(F.linear(self.drop_some(x), self.c), self.d)

    def drop_some(self, x):
        return F.dropout(x, self.dropout, self.training)

    def place(self):
        """Where the keys lie from k to v."""
        return f"kernel_mix {id(self.switch)} {self.path} {attention_of(self.site)}"

    def keys(self):
        try:
            return self.frame.stash.pop(self.place())
        except KeyError:
            raise ValueError(f"{self.site.name}: kernel_mix: its attention's k did not run before its v") from None
