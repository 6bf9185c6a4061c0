"""Random matrices that all layers share, and two trained vectors a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import constant, zeros
from ..core.method import Method, bank, param


def first(shape, *, delta, **_):
    """A (r, I), uniform of variance 2 / I, from a generator of the key's own: HF PEFT's draw."""
    return uniform(shape, torch.Generator("cpu").manual_seed(delta.key))


def second(shape, *, delta, **_):
    """B (O, r), uniform of variance 2 / r, drawn behind A."""
    generator = torch.Generator("cpu").manual_seed(delta.key)
    uniform((delta.r, delta.widest), generator)
    return uniform(shape, generator)


def uniform(shape, generator):
    bound = (6 / shape[1]) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class VeRA(Method, name="vera"):
    """W' = W + diag(b) B diag(d) A, A and B random, frozen and the same at every layer; b = 0 and d = 0.1 at the start.

    One A has the columns of the widest layer and one B the rows of the tallest; a layer reads its first ones of each. They
    come from `key` alone, so that a file need not hold them.
    """

    paper = "2310.11454"
    category = "reparameterized"
    lr = (1e-3, 1e-1)
    r: int = 256  # rank, above LoRA's: it costs one number a layer
    d_initial: float = 0.1  # start of d
    key: int = 0  # what A and B are drawn from
    saved: bool = False  # A and B lie in the file too, for readers that draw otherwise
    dropout: float = 0.0  # share of the update's inputs that is dropped while training
    a: Tensor = bank("r widest", first)
    b: Tensor = bank("tallest r", second)
    lambda_d: Tensor = param("r", constant("d_initial"))
    lambda_b: Tensor = param("d_out", zeros)

    @classmethod
    def numbers(cls, config, sites):
        of_all = {"widest": max(s.d_in for s in sites), "tallest": max(s.d_out for s in sites)}
        return {site.name: of_all for site in sites}

    def bank_key(self, key, slot, shape):
        return f"{super().bank_key(key, slot, shape)}_{'saved' if self.saved else 'key'}_{self.key}"

    def build(self, base, dtype):
        super().build(base, dtype)
        shared, keys = self.__dict__["_bank"]
        for key in (keys["a"], keys["b"]) if self.saved else ():
            value = shared.tensor(key)
            delattr(shared, key)
            shared.register_buffer(key, value)

    def finished(self, leaf):
        return leaf, super().finished(leaf)[1] | ({"a": self.a, "b": self.b} if self.saved else {})

    def factors(self, d_in, d_out, dtype):
        """The layer's own columns of A, and rows of B."""
        own = self.exact
        return own.a[:, :d_in].to(dtype), own.b[:d_out].to(dtype)

    def fold(self, weight, bias):
        a, b = self.factors(weight.shape[1], weight.shape[0], self.lambda_d.dtype)
        return weight + (self.lambda_b[:, None] * b) @ (self.lambda_d[:, None] * a), bias

    def post(self, y, x):
        a, b = self.factors(x.shape[-1], y.shape[-1], x.dtype)
        h = self.lambda_d * F.linear(F.dropout(x, self.dropout, self.training), a)
        return y + self.lambda_b * F.linear(h, b)
