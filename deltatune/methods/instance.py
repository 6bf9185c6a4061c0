"""Prompts made from the input: every row has its own. They read the given tokens alone, no padding and no answer."""

import inspect
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.base import own_class
from ..core.inits import kaiming, normal, ones, zeros
from ..core.method import Delta, Method, fixed, param
from ..core.sharded import assign


def half(shape, **_):
    """U(-0.5, 0.5)"""
    return torch.rand(shape) - 0.5


def check_words(base):
    """Raise ValueError where the backbone's input is no row of words."""
    table = getattr(base.module, "get_input_embeddings", lambda: None)()
    if getattr(table, "num_embeddings", None) is None:
        raise ValueError(f"it reads embedded words, and this backbone's input is made by {type(table).__name__}")


class Instance(Method):
    """X' = [P(x); X]: the common part."""

    category = "additive"
    where = "input"
    reads_call = True
    exceptions = {"identity": "soft tokens take a share of the attention from the start"}

    @classmethod
    def fits(cls, config, site):
        return site.stack != "decoder"  # its input is the answer

    def build(self, base, dtype):
        check_words(base)
        super().build(base, dtype)

    def tokens(self, batch):
        if self.call.n_past:  # they lie in the cache; only their number is asked for
            return batch.new_zeros(1, self.n, batch.shape[-1])
        return self.exact.prompts(batch, self.call.given(batch.shape[1], self.site, batch.device))


class ATTEMPT(Instance, name="attempt"):
    """X' = [P + sum_j a_j P_j; X], a = softmax_j(max P_j . LN(U silu(D max x)) / (t d)) over frozen prompts and P itself.

    The maxima are over tokens. With several tasks each has its own P, and they share D, U and LN.
    """

    paper = "2205.11961"
    lr = (1e-3, 0.3)
    reads = ("task_ids",)
    sources = "prompt_tuning"
    n: int = 20  # how many soft tokens; the sources' number
    n_sources: int = 1  # how many frozen prompts
    n_tasks: int = 1  # how many tasks
    r: int = 100  # width between D and U
    temperature: float = math.e  # t, the softmax's temperature as a multiple of the width d
    frozen: Tensor = fixed("n_sources n d_in", zeros)
    prompt: Tensor = param("n_tasks n d_in", zeros)  # attach starts it, and `frozen`, from the sources
    down: Tensor = param("r d_in", kaiming)
    up: Tensor = param("d_in r", kaiming)
    gain: Tensor = param("d_in", ones)
    offset: Tensor = param("d_in")

    def prompts(self, batch, given):
        """(B, n, D)"""
        own = self.prompt[self.tasks(batch.shape[0], batch.device)]
        x = batch.to(own.dtype).masked_fill(~given[..., None], -math.inf).amax(1)
        h = F.linear(F.silu(F.linear(x, self.down)), self.up)
        h = F.layer_norm(h, h.shape[-1:], self.gain, self.offset) / (self.temperature * h.shape[-1])
        every = torch.cat([self.frozen.expand(own.shape[0], -1, -1, -1), own[:, None]], 1)  # (B, sources + 1, n, D)
        a = torch.einsum("bsd,bd->bs", every.amax(2), h).softmax(-1)
        return own + torch.einsum("bs,bsnd->bnd", a, every)

    @classmethod
    @torch.no_grad()
    def start(cls, adapter, path, sources):
        for (own, name), delta in adapter.deltas.items():
            if own == path:
                found = [prompt_of(source, name, delta) for source in sources]
                assign(delta.frozen, torch.stack(found))
                assign(delta.prompt, found[0].expand_as(delta.prompt))  # as the paper's code starts it


def prompt_of(source, name, delta):
    """(n, D), a source's prompt. Raises ValueError where it has none for this input, or one of another size."""
    prompt = source.tensors.get(f"0.{name}.prompt")
    at = name or "the model"
    if prompt is None:
        raise ValueError(f"{source.folder} has no prompt in front of {at}: it stands at {source.card['sites']['0']}")
    own = tuple(delta.frozen.shape[1:])
    if tuple(prompt.shape) != own:
        raise ValueError(
            f"{source.folder}: its prompt has {prompt.shape[0]} tokens of width {prompt.shape[1]}, and {delta.name} at {at} "
            f"has {own[0]} of width {own[1]}; all prompts must have one size"
        )
    return prompt


class IDPG(Instance, name="idpg"):
    """X' = [W gelu(V s + v) + w; X], s the row's sentence embedding, V and W sums of k Kronecker products.

    s is the mean of the words' embeddings, or of a pass of the frozen backbone: the first token's last state, or the mean.
    """

    paper = "2204.04497"
    lr = (1e-4, 1e-2)
    n: int = 5  # how many soft tokens
    r: int = 16  # width of the generator
    k: int = 16  # Kronecker products in a sum; it divides r and the model's width
    sentence: Literal["words", "first", "mean"] = "words"  # what s is
    rule_in: Tensor = param("k k k", normal(0.05))
    part_in: Tensor = param("k d_in/k r/k", normal(0.05))
    rule_out: Tensor = param("k k k", normal(0.05))
    part_out: Tensor = param("k r/k n*d_in/k", normal(0.05))
    inner: Tensor = param("r", normal(0.05))  # v
    outer: Tensor = param("n*d_in", half)  # w

    def build(self, base, dtype):
        if self.sentence == "first" and self.site.is_causal is not False:
            raise ValueError("sentence = 'first' reads a state that on a causal stack sees no other token; use 'mean'")
        if self.sentence != "words":
            self.__dict__["backbone"] = base.module  # not a child: this delta is its
        super().build(base, dtype)

    def prompts(self, batch, given):
        """(B, n, D)"""
        s = self.embedding(batch, given).to(self.inner.dtype)
        v, w = kron(self.rule_in, self.part_in), kron(self.rule_out, self.part_out)
        return (F.gelu(s @ v + self.inner) @ w + self.outer).unflatten(-1, (self.n, -1))

    def embedding(self, batch, given):
        """(B, D), the rows' sentence embeddings."""
        x = batch if self.sentence == "words" else frozen_states(self.backbone, batch, given, self.call)
        if self.sentence == "first":
            return x[torch.arange(len(x), device=x.device), given.expand(len(x), -1).int().argmax(1)]
        return x.masked_fill(~given[..., None], 0).sum(1) / given.sum(1, keepdim=True)


def kron(rules, parts):
    """(k, k, k), (k, P, Q) -> (k P, k Q), the sum of their Kronecker products."""
    return torch.einsum("kab,kpq->apbq", rules, parts).flatten(2).flatten(0, 1)


@torch.no_grad()
def frozen_states(backbone, batch, given, call):
    """(B, T, D), the last states of the backbone itself, its adapters switched off, for the embedded batch."""
    known = {"inputs_embeds": batch, "attention_mask": given.expand(batch.shape[:2]).long()}
    takes = inspect.signature(own_class(backbone).forward).parameters
    if call.position_ids is not None and "position_ids" in takes:
        known["position_ids"] = call.position_ids
    if "use_cache" in takes:
        known["use_cache"] = False
    switches = {id(m.switch): m.switch for m in backbone.modules() if isinstance(m, Delta)}
    on = [s for s in switches.values() if s.on]
    try:
        for switch in on:
            switch.on = False
        return backbone(**known)[0]
    finally:
        for switch in on:
            switch.on = True
