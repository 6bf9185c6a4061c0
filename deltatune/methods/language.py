"""Adapters that learn a language, on which one that has learned a task in another language is put."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.compose import Stack, Tree, preset
from ..core.inits import normal, zeros
from ..core.method import Method, bank
from .bottleneck import Sequential

WIDE = "(d_in-d_in//2)"  # the second half of the width, the longer one where the width is odd


class Invertible(Method, name="invertible"):
    """a' = a + F(b), b' = b + G(a') for the embedded tokens' halves a, b, and the inverse at the output embedding.

    F and G are V relu(U h + u) + v, one pair for all stacks. In front of the output embedding, where the backbone has
    one, stand b - G(a) and then a - F(b): a language model has to give a word again, not what this language made of it.
    """

    paper = "2005.00052"
    category = "additive"
    where = "blocks,lm_head|blocks"
    kinds = frozenset({"span", "linear"})
    helper = True
    lr = (5e-5, 5e-4)
    exceptions = {"identity": "the paper's code starts near the identity, all matrices at N(0, 0.02^2), not at it"}
    reduction: int = 2  # how much narrower than its input F's and G's middle is
    f_down: Tensor = bank(f"{WIDE}//reduction {WIDE}", normal(0.02), train=True)
    f_down_bias: Tensor = bank(f"{WIDE}//reduction", zeros, train=True)
    f_up: Tensor = bank(f"d_in//2 {WIDE}//reduction", normal(0.02), train=True)
    f_up_bias: Tensor = bank("d_in//2", zeros, train=True)
    g_down: Tensor = bank("d_in//2//reduction d_in//2", normal(0.02), train=True)
    g_down_bias: Tensor = bank("d_in//2//reduction", zeros, train=True)
    g_up: Tensor = bank(f"{WIDE} d_in//2//reduction", normal(0.02), train=True)
    g_up_bias: Tensor = bank(WIDE, zeros, train=True)

    @classmethod
    def fits(cls, config, site):
        # of a language model's head the last matrix alone, whose rows are words; what stands before it keeps the width
        return site.role == "blocks" or site.role == "lm_head" and site.d_out != site.d_in

    def build(self, base, dtype):
        super().build(base, dtype)
        shared, keys = self.__dict__["_bank"]
        own, lead = keys["g_up"], keys["g_up"].rpartition("_")[0]
        if any(n != own and n.rpartition("_")[0] == lead for n, _ in shared.named_parameters()):
            raise ValueError(
                f"it is {self.site.d_in} wide, and other places are not; what is inverted must have one width"
            )

    def f(self, b):
        return F.linear(F.relu(F.linear(b, self.f_down, self.f_down_bias)), self.f_up, self.f_up_bias)

    def g(self, a):
        return F.linear(F.relu(F.linear(a, self.g_down, self.g_down_bias)), self.g_up, self.g_up_bias)

    def pre(self, x):
        a, b = x.tensor_split([x.shape[-1] // 2], -1)
        if self.site.role == "blocks":
            a = a + self.f(b)
            return torch.cat([a, b + self.g(a)], -1)
        b = b - self.g(a)
        return torch.cat([a - self.f(b), b], -1)


def language(r: int, reduction: int) -> Tree:
    """What learns languages: the invertible adapter on the embeddings, and Pfeiffer's behind every block."""
    return Stack(Invertible(reduction=reduction), Sequential(r=r, where="post_norm|block"))


@preset(
    "mad_x",
    paper="2005.00052",
    category="additive",
    lr=(5e-5, 5e-4),
    exceptions={"identity": "the paper's code starts near the identity, not at it"},
)
def mad_x(
    r: int = 384,  # bottleneck width behind every block
    reduction: int = 2,  # how much narrower than its input the middle of the invertible adapter's networks is
) -> Tree:
    """One language: an invertible adapter on the embeddings, and N(z + A(N(z))) at the end of every block.

    Three stages make a zero-shot transfer from one language to another, on one backbone throughout:

        attach(masked_lm, "mad_x")                          trained on text of one language and saved: "en", "sw", ...
        language = load(classifier, "en", name="language")  frozen, and around it, trained on the task in English,
        attach(classifier, "pfeiffer", name="task")         N(v + A'(N(v))), v = z + A(N(z))
        language.restore("sw")                              the task in Swahili

    A language's file fits any head: the inverse stands in front of the output embedding where there is one.
    """
    return language(r, reduction)


@preset(
    "bad_x",
    paper="BAD-X, Parovic et al., NAACL 2022",
    category="additive",
    lr=(5e-5, 5e-4),
    exceptions={"identity": "the paper's code starts near the identity, not at it"},
)
def bad_x(
    r: int = 384,  # bottleneck width behind every block
    reduction: int = 2,  # how much narrower than its input the middle of the invertible adapter's networks is
) -> Tree:
    """Two languages: mad_x's adapters, trained on text of source and target, a batch of each in turn.

    The task's adapter is trained around it on the source and used with it, as it is, on the target: nothing is swapped,
    and every pair of languages has adapters of its own.
    """
    return language(r, reduction)
