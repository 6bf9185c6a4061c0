"""LoRA at every rank at once: the first rows of A and columns of B are an adapter of that rank by themselves."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.schedule import Schedule
from ..kernels.lora import low_rank
from .lora import LowRank


class Nested(Schedule):
    """Draws the rank b of every optimiser step, evenly from r_min to r, by the adapter's seed and the step's number.

    All sites of one rank have one b, in all backward passes of a step and on every process.
    """

    done = 0

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.sites = [d for d in self.adapter.deltas.values() if isinstance(d, DyLoRA)]
        for d in self.sites:
            d.drawn = torch.zeros(d.r, device=d.a.device), torch.zeros(d.r, dtype=torch.bool, device=d.a.device)
        self._draw()

    def after_step(self, step):
        self.done = step + 1
        self._draw()

    def _draw(self):
        generator = torch.Generator().manual_seed((self.adapter.seed * 1_000_003 + self.done) % 2**63)
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        for d in self.sites:
            rank = d.r_min + int(share * (d.r - d.r_min + 1))
            scale, last = d.drawn
            scale.zero_()[:rank] = d.alpha / rank**d.power
            last.zero_()[rank - 1] = True

    def end(self):
        for d in self.sites:
            d.drawn = None

    def state_dict(self):
        return super().state_dict() | {"done": self.done}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.done = state["done"]


class DyLoRA(LowRank, name="dylora"):
    """W' = W + (alpha / b) B[:, :b] A[:b], B = 0 at the start; b is drawn for each step of training, then any up to r.

    `adapter.set(rank=4)` runs the first 4. With `frozen`, as in the paper's code, only the b-th row and column get a
    gradient; the optimiser's moments go on moving the others, there as here.
    """

    paper = "2210.07558"
    live = ("rank",)
    schedule = Nested
    r_min: int = 1  # smallest rank that is drawn
    frozen: bool = True  # of the drawn rank train the last row and column alone
    rank: int | None = None  # rank that runs outside of training; None: r

    drawn: ClassVar[tuple[Tensor, Tensor] | None] = None  # while its schedule runs: (r) the scales, (r) is it the last

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.rank is not None and not 1 <= config.rank <= config.r:
            raise ValueError(f"{cls.name}: rank = {config.rank}, but it must lie between 1 and r = {config.r}")
        return config

    def build(self, base, dtype):
        if not 1 <= self.r_min <= max(self.r, 1):
            raise ValueError(f"r_min = {self.r_min}, but it must lie between 1 and r = {self.r}")
        super().build(base, dtype)

    def factors(self):
        """s A (b, I) and B (O, b) of the rank that runs; while training of rank r, with zeros behind the drawn one."""
        if self.drawn is None or not self.training:
            b = self.rank or self.r
            return self.a[..., :b, :] * (self.alpha / b**self.power), self.b[..., :b]
        scale, last = self.drawn
        a, b = self.a, self.b
        if self.frozen:
            a, b = torch.where(last[:, None], a, a.detach()), torch.where(last, b, b.detach())
        return a * scale[:, None].to(a.dtype), b

    def fold(self, weight, bias):
        a, b = self.factors()
        return weight + b @ a, bias

    def post(self, y, x):
        a, b = self.factors()
        return y + F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b)

    def linear(self, x, base):
        a, b = self.factors()
        return low_rank(base, x, F.dropout(x, self.dropout, self.training), a, b, 1.0)
