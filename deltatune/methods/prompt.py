"""Learned tokens in front of the input."""

from typing import Literal

import torch
from torch import Tensor

from ..core.method import Method, param


def vocabulary(shape, *, base, **_):
    """Rows of the backbone's own token embeddings, drawn at random: the paper's better start."""
    table = base.vocabulary
    return table[torch.randint(table.shape[0], (shape[0],), device=table.device)]


class PromptTuning(Method, name="prompt_tuning"):
    """X' = [P; X] at the input layer alone."""

    paper = "2104.08691"
    category = "additive"
    where = "input"
    lr = (1e-3, 0.3)
    exceptions = {"identity": "soft tokens take a share of the attention from the start"}
    n: int = 20  # how many soft tokens
    pooled: bool = (
        False  # their states stay in the backbone's output, where a head that pools the first state reads one
    )
    side: Literal["encoder", "decoder"] = "encoder"  # of an encoder-decoder, which input gets them
    prompt: Tensor = param("n d_in", vocabulary)

    @classmethod
    def fits(cls, config, site):
        return site.stack in ("", config.side)

    def tokens(self, batch):
        return self.prompt[None]
