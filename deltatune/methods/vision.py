"""Methods for images."""

import torch
from torch import Tensor

from ..core.inits import xavier
from ..core.method import Method, param


class VPT(Method, name="vpt"):
    """X' = [P_l; X] into every block, and out of it without P_l's states again: deep visual prompts.

    On `blocks`, the span of all of them, one P goes in at the first and its states come out behind the last: shallow prompts.
    Image patches have no mask and their positions are added before, so that in front of the tokens and behind [CLS] are one.
    """

    paper = "2203.12119"
    category = "additive"
    where = "block"
    kinds = frozenset({"block", "span"})
    lr = (3e-3, 0.3)
    exceptions = {"identity": "prompts take a share of the attention from the start"}
    n: int = 10  # how many prompts
    prompt: Tensor = param("n d_in", xavier)

    @classmethod
    def fits(cls, config, site):
        return site.patches and site.role in ("block", "blocks")

    def pre(self, x):
        return torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1)

    def post(self, y, x):
        return y[:, self.n :]
