"""Rescaled activations."""

from typing import Literal

from torch import Tensor

from ..core.inits import around, normal, ones
from ..core.method import Method, param
from ..core.schedule import Schedule


class IA3(Method, name="ia3"):
    """y' = l * y on keys and values, x' = l * x into the MLP's last matrix; l = 1 at the start."""

    paper = "2205.05638"
    category = "additive"
    where = "k,v,mlp.down"
    lr = (3e-3, 5e-2)
    side: Literal["auto", "input", "output"] = (
        "auto"  # what is scaled; auto: inputs of an MLP's last matrix, else outputs
    )
    scale: Tensor = param("n", ones)

    def dims(self, base):
        self.on_input = self.side == "input" or self.side == "auto" and self.site.role == "mlp.down"
        return {"n": self.site.d_in if self.on_input else self.site.d_out}

    def fold(self, weight, bias):
        if self.on_input:
            return weight * self.scale, bias
        return weight * self.scale[:, None], None if bias is None else bias * self.scale

    def pre(self, x):
        return x * self.scale if self.on_input else x

    def post(self, y, x):
        return y if self.on_input else y * self.scale


class Affine(Method):
    """The common part: w * x + b over the last dimension."""

    category = "additive"

    def affine(self, x):
        # (w - 1) keeps its digits where the activations are bf16; w itself, near 1, would not
        return x + x * (self.exact.gain - 1).to(x.dtype) + self.offset


class SSF(Affine, name="ssf"):
    """y' = w * y + b behind linear layers, norms and the patch convolution, a channel at a time; near 1 and 0 at the start.

    An RMSNorm has no place for b and is left out.
    """

    paper = "2210.08823"
    where = "linear,norm,conv2d|norm"  # text has no convolution
    kinds = frozenset({"linear", "norm", "conv2d"})
    fast_kinds = frozenset({"linear", "norm"})
    lr = (1e-3, 2e-2)
    exceptions = {
        "identity": "the paper's code starts near the identity, w at N(1, 0.02^2) and b at N(0, 0.02^2), not at it"
    }
    gain: Tensor = param("d_out", around(1.0, 0.02))
    offset: Tensor = param("d_out", normal(0.02))

    @classmethod
    def fits(cls, config, site):
        return site.kind != "norm" or site.bias

    def fold(self, weight, bias):
        gain = self.gain if weight.ndim == 1 else self.gain[:, None]  # a norm's weight is a vector
        return weight * gain, self.offset if bias is None else bias * self.gain + self.offset

    def post(self, y, x):
        return self.affine(y)


class HeadFirst(Schedule):
    """The task head alone for a share of the steps, then everything but the head; without a head everything throughout."""

    def before_step(self, step):
        heads = {id(p) for p in self.adapter.head_parameters()}
        share = next(leaf.config.head_first for _, leaf in self.adapter.tree.leaves() if leaf.method is Hadamard)
        head_now = step < round(share * self.n_steps)
        for p in self.adapter.parameters() if heads else ():
            if (id(p) in heads) != head_now:
                p.grad = None  # an optimiser passes over it, its moments and weight decay too


class Hadamard(Affine, name="hadamard_adapter"):
    """A' = w * A + b on the concatenated heads A, the input of the attention's last matrix; w = 1 and b = 0 at the start.

    The head trains first, alone; then it rests and the others train.
    """

    paper = "2407.11033"
    where = "attn.o"
    helper = True
    kinds = frozenset({"linear"})
    lr = (1e-3, 2e-2)
    schedule = HeadFirst
    head_first: float = 0.5  # share of the steps that train the task head alone, at the start
    gain: Tensor = param("d_in", ones)
    offset: Tensor = param("d_in")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 <= config.head_first < 1:
            raise ValueError(f"{cls.name}: head_first = {config.head_first}, but it must lie between 0 and 1")
        return config

    def fold(self, weight, bias):
        moved = weight @ self.offset
        return weight * self.gain, moved if bias is None else bias + moved

    def pre(self, x):
        return self.affine(x)
