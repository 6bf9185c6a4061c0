"""A prompt that is pruned while training: tokens first, then pieces of tokens."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..core.inits import ones
from ..core.method import fixed
from ..core.schedule import Schedule
from ..core.sharded import assign, whole
from .prompt import PromptTuning


class Ticket(Schedule):
    """Trains, prunes tokens, prunes pieces of those that are left, takes what is left back to where pruning began, and trains.

    The importance of a token or piece is the mean over rows of |dL/dg|, g = 1 its factor, over the `score` steps in front of
    its pruning; training goes on meanwhile. Moments go with what is pruned, and all of them with the way back.
    """

    def __init__(self, adapter):
        super().__init__(adapter)
        self.done, self.values = 0, {}

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer = optimizer
        config = next(iter(self.deltas().values())).config
        self.tune, self.score = (int(n * n_steps) if n < 1 else int(n) for n in (config.tune, config.score))
        if self.score and self.tune + 2 * self.score >= n_steps:
            raise ValueError(
                f"xprompt: tune = {self.tune} steps and score = {self.score} for tokens and again for pieces leave none of "
                f"{n_steps} to train what is kept"
            )
        for d in self.deltas().values():
            d.rows = d.there()
        if not self.done:
            self._turn()

    def deltas(self):
        """The prompts by "path|site"."""
        return {f"{path}|{site}": d for (path, site), d in self.adapter.deltas.items() if isinstance(d, XPrompt)}

    @torch.no_grad()
    def after_step(self, step):
        self.done = step + 1
        self._turn()

    def _turn(self):
        """What happens between two steps."""
        if not self.score:
            return
        for key, d in self.deltas().items():
            if self.done == self.tune:
                self.values[key] = whole(d.prompt.detach()).clone()
                d.scores = torch.zeros(d.n, 1, device=d.mask.device)
            elif self.done == self.tune + self.score:
                self._prune(d, d.config.keep_tokens)
                d.scores = torch.zeros(d.n, d.pieces, device=d.mask.device)
            elif self.done == self.tune + 2 * self.score:
                self._prune(d, d.config.keep_pieces)
                d.scores = None
                assign(d.prompt, self.values.pop(key))
                self.optimizer.state.pop(d.prompt, None)

    def _prune(self, d, keep):
        """Of the tokens or pieces that are there keep the most important ones, one at least; moments go with the others."""
        scores = _of_all_ranks(d.scores)
        there = d.mask.view(d.n, scores.shape[1], -1).any(-1)
        left = max(1, round(keep * int(there.sum())))
        order = scores.masked_fill(~there, -1.0).flatten().argsort(descending=True, stable=True)
        kept = torch.zeros_like(there).flatten().index_fill_(0, order[:left], True).view_as(there)
        d.mask.mul_(kept)
        d.rows = d.there()
        entries = d.mask.repeat_interleave(d.prompt.shape[1] // d.pieces, 1)
        for value in self.optimizer.state.get(d.prompt, {}).values():
            if isinstance(value, Tensor) and value.shape == d.prompt.shape:
                assign(value, whole(value) * entries)

    def state_dict(self):
        scores = {key: _of_all_ranks(d.scores) for key, d in self.deltas().items() if d.scores is not None}
        return super().state_dict() | {"done": self.done, "values": dict(self.values), "scores": scores}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        here = self.deltas()
        if not state["values"].keys() | state["scores"].keys() <= here.keys():
            raise ValueError(f"adapter {self.adapter.name!r}: the saved phases are of other sites")
        self.done = state["done"]
        self.values = {key: value.to(here[key].mask.device) for key, value in state["values"].items()}
        for key, d in here.items():
            found = state["scores"].get(key)
            d.scores = (
                None if found is None else found.to(d.mask.device) / _n_ranks()
            )  # together they are the sum again


def _n_ranks():
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _of_all_ranks(scores):
    """Their sum, of which each rank has what its own rows gave."""
    total = scores.clone()
    if _n_ranks() > 1:
        torch.distributed.all_reduce(total)
    return total


class XPrompt(PromptTuning, name="xprompt"):
    """X' = [M o P; X], M the 0 and 1 of the prompt's tokens and their pieces: the least important go while training.

    A token without any piece leaves the sequence. What is saved is a prompt of the kept tokens, 0 at the pieces that went. A
    share of the steps that comes to none leaves the pruning out. With a learning rate that changes, what is kept is trained
    under the rest of its course: the paper's is constant.
    """

    paper = "2210.04457"
    lr = (1e-3, 0.3)
    schedule = Ticket
    pieces: int = 16  # into how many equal parts a token is cut
    keep_tokens: float = 0.5  # share of the tokens that are kept
    keep_pieces: float = 0.5  # share of their pieces that are kept
    tune: float = 0.4  # steps before anything is pruned; below 1 a share of all
    score: float = 0.1  # steps of looking at importance, of tokens and again of pieces; below 1 a share of all
    mask: Tensor = fixed("n pieces", ones)

    rows: ClassVar[tuple[int, ...] | None] = None  # the tokens that are there, None: all; what a compiled graph knows
    scores: ClassVar[Tensor | None] = None  # while importance is looked at, its sum over what was seen

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        for key in ("keep_tokens", "keep_pieces"):
            if not 0 < getattr(config, key) <= 1:
                raise ValueError(
                    f"{cls.name}: {key} = {getattr(config, key)}, but a share lies above 0 and not above 1"
                )
        for key in ("tune", "score"):
            if getattr(config, key) < 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 0")
        return config

    def build(self, base, dtype):
        if self.pieces < 1 or self.site.d_in % self.pieces:
            raise ValueError(f"pieces = {self.pieces} does not divide the width {self.site.d_in} of a token")
        super().build(base, dtype)

    def tokens(self, batch):
        own = self.exact
        if not torch.compiler.is_compiling():
            own.rows = own.there()
        x = self.pruned()[None] if own.rows is None else self.pruned()[None, list(own.rows)]
        if own.scores is not None and x.requires_grad:
            x = x.expand(batch.shape[0], -1, -1)  # each row has a gradient of its own
            x.register_hook(partial(own.look, x.detach()))
        return x

    def pruned(self):
        """M o P, (n, d)"""
        return self.prompt * self.mask.repeat_interleave(self.prompt.shape[1] // self.pieces, 1)

    def there(self):
        """The numbers of the tokens that have a piece left, None where all have."""
        kept = self.mask.any(1)
        return None if self.mask.is_meta or bool(kept.all()) else tuple(kept.nonzero().flatten().tolist())

    def look(self, x, grad):
        """Add up |dL/dg| = |sum of P dL/dP over what g multiplies|, of each row by itself under a loss that is their mean."""
        found = (x.float() * grad.float()).unflatten(-1, (self.scores.shape[1], -1)).sum(-1).abs().sum(0) * len(x)
        rows = range(self.n) if self.rows is None else self.rows
        self.scores.index_add_(0, torch.tensor(tuple(rows), device=grad.device), found.to(self.scores.dtype))

    def finished(self, leaf):
        rows = self.there() or tuple(range(self.n))
        given = {"n": len(rows), "pooled": self.pooled, "side": self.side}
        flat = replace(leaf, method=PromptTuning, config=PromptTuning.configure(**given))
        return flat, {"prompt": self.pruned()[list(rows)]}
