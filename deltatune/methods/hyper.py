"""Adapters that a hypernetwork makes, from the embedding of a row's task alone or of task, layer and place together."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import normal, ones, zeros
from ..core.method import Method, bank, param

MADE = "(2*r*d_out+r+3*d_out)"  # numbers of one adapter: D, c, U, e, and the gain and the offset of its norm


class HyperFormer(Method, name="hyperformer"):
    """y' = y + LN(U gelu(D y + c) + e); D, c, U, e and LN's gain and offset are H I + h, I = h_I(z) of the row's task.

    Behind self-attention and MLP, each before the residual add. Every place has its own H and h; the tasks' embeddings
    z and the two-layer h_I are one for all. The rows' tasks are the call's `task_ids`; one task can do without.
    """

    paper = "2106.04489"
    category = "additive"
    where = "attn.o,mlp.down"
    reads_call = True
    reads = ("task_ids",)
    lr = (1e-4, 3e-3)
    limits = {"r": "d_out"}
    exceptions = {"identity": "the paper's code starts near the identity, H at N(0, 0.01^2), not at it"}
    n_tasks: int = 1  # how many tasks
    r: int = 24  # bottleneck width
    d_task: int = 64  # size of a task's embedding z
    d_hidden: int = 128  # width of h_I between its two layers
    d_code: int = 64  # size of I
    task: Tensor = bank("n_tasks d_task", normal(1.0), train=True)
    inner: Tensor = bank("d_hidden d_task", normal(0.01), train=True)
    inner_bias: Tensor = bank("d_hidden", zeros, train=True)
    outer: Tensor = bank("d_code d_hidden", normal(0.01), train=True)
    outer_bias: Tensor = bank("d_code", zeros, train=True)
    maker: Tensor = param(f"{MADE} d_code", normal(0.01))
    maker_bias: Tensor = param(MADE)

    def code(self, z):
        """I of each embedding."""
        return F.linear(F.relu(F.linear(z, self.inner, self.inner_bias)), self.outer, self.outer_bias)

    def post(self, y, x):
        own, n, d, r = self.exact, y.shape[0], y.shape[-1], self.r
        task = self.tasks(n, y.device)
        z = own.task if self.n_tasks == 1 else own.task[task]  # of one task the adapter is made once for all rows
        code = own.code(z)
        made = F.linear(code, own.maker, own.maker_bias).to(y.dtype)[:, None]
        down, c, up, e, gain, offset = made.split([r * d, r, d * r, d, d, d], -1)
        u = torch.baddbmm(c, y.reshape(n, -1, d), down.view(-1, r, d).mT.expand(n, d, r))
        v = torch.baddbmm(e, F.gelu(u, approximate="tanh"), up.view(-1, d, r).mT.expand(n, r, d))
        return y + (F.layer_norm(v, (d,)) * gain + offset).view_as(y)


class HyperFormerPlus(HyperFormer, name="hyperformer++"):
    """HyperFormer with one H and h for all places of a stack: I = LN(h_I([z, l, p])), l of the layer, p of the place.

    Encoder and decoder have a hypernetwork each, as the paper's counts say (5.1 million numbers on T5-base); z is one
    for both.
    """

    lr = (1e-4, 3e-3)
    layer: Tensor = bank("d_task", normal(1.0), train=True)
    place: Tensor = bank("d_task", normal(1.0), train=True, by="role")
    inner: Tensor = bank("d_hidden 3*d_task", normal(0.01), train=True)
    gain: Tensor = bank("d_code", ones, train=True)
    offset: Tensor = bank("d_code", zeros, train=True)
    maker: Tensor = bank(f"{MADE} d_code", normal(0.01), train=True)
    maker_bias: Tensor = bank(MADE, zeros, train=True)

    def bank_key(self, key, slot, shape):
        own = super().bank_key(key, slot, shape)
        if key == "task":
            return own
        stack = f"_{self.site.stack}".replace(".", "_") if self.site.stack else ""
        return f"{own}{stack}_{self.site.layer}" if key == "layer" else f"{own}{stack}"

    def code(self, z):
        whole = torch.cat([z, self.layer.expand(len(z), -1), self.place.expand(len(z), -1)], -1)
        return F.layer_norm(super().code(whole), (self.d_code,), self.gain, self.offset, 1e-6)
