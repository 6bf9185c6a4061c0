"""A soft prompt taken apart: a short one in front, and a low-rank table of places added to the tokens themselves."""

import torch
from torch import Tensor

from ..core.inits import kaiming, zeros
from ..core.method import param
from .instance import check_words
from .prompt import PromptTuning


class DePT(PromptTuning, name="dept"):
    """X' = [P; X + alpha / sqrt(r) (A B)[places]], row i of A B for a row's i-th real token; B = 0 at the start.

    It trains as much as a prompt of n + r (length + d) / d tokens, and makes rows longer by n alone.
    """

    paper = "2309.05173"
    lr = (1e-3, 0.5)
    n: int = 60  # m, how many soft tokens
    r: int = 30  # rank of the table
    length: int = 256  # s, how many tokens a row may have
    alpha: float = 8.0  # scale, divided by the root of r
    factor: float = 1 / 60  # the learning rate of A and B, as a multiple of the prompt's
    a: Tensor = param("length r", kaiming, lr="factor")
    b: Tensor = param("r d_in", zeros, lr="factor")

    def build(self, base, dtype):
        check_words(base)
        super().build(base, dtype)

    def embed(self, batch, places):
        if not torch.compiler.is_compiling() and (most := int(places.max()) + 1) > self.length:
            raise ValueError(
                f"{self.site.name or 'the model'}: a row of {most} tokens, but dept has places for {self.length}; truncate the "
                f"input, or attach with a larger length"
            )
        return batch + self.alpha / self.r**0.5 * (self.a @ self.b)[places]
