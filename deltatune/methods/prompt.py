"""Learned tokens in front of the input."""

from dataclasses import asdict, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal, uniform
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


class Encoded(PromptTuning):
    """X' = [net(E); X]: a network makes the prompt while training, and what is saved is the prompt alone."""

    paper = "2103.10385"
    lr = (1e-4, 1e-2)
    embedding: Tensor = param("n d_in", normal(1.0))

    @classmethod
    def slots_of(cls, config):
        return {key: slot for key, slot in cls.slots.items() if key != "prompt"}

    def tokens(self, batch):
        return self.exact.made()[None]  # the network in fp32: what is saved is what was trained

    def finished(self, leaf):
        flat = replace(leaf, method=PromptTuning, config=PromptTuning.configure(**asdict(leaf.config)))
        return flat, {"prompt": self.made()}


class PTuning(Encoded, name="p_tuning"):
    """X' = [P; X], P = V relu(U h + u) + v, h the states of a two-layer bidirectional LSTM of width d / 2 over E."""

    cells: Tensor = param("2 2 2*d_in d_in", uniform("d_in/2"))  # layer, direction, gates (i, f, g, o) from the input
    back: Tensor = param("2 2 2*d_in d_in/2", uniform("d_in/2"))  # the same from the state before
    bias: Tensor = param("16*d_in", uniform("d_in/2"))  # two for each gate, as LSTMs have them
    inner: Tensor = param("d_in d_in", kaiming)
    inner_bias: Tensor = param("d_in", uniform("d_in"))
    outer: Tensor = param("d_in d_in", kaiming)
    outer_bias: Tensor = param("d_in", uniform("d_in"))

    def made(self):
        """(n, d)"""
        x = self.embedding
        for cells, back, bias in zip(self.cells, self.back, self.bias.view(2, 2, 2, -1).sum(2), strict=True):
            x = bidirectional(x, cells, back, bias)
        return F.linear(F.relu(F.linear(x, self.inner, self.inner_bias)), self.outer, self.outer_bias)


def bidirectional(x, cells, back, bias):
    """(n, d) -> (n, 2 h): an LSTM forwards and one backwards, c = s(f) c + s(i) tanh(g) and h = s(o) tanh(c)."""
    given = torch.stack([x, x.flip(0)]) @ cells.mT + bias[:, None]
    h = c = given.new_zeros(2, 1, back.shape[-1])
    states = []
    for step in given.split(1, 1):
        i, f, g, o = torch.baddbmm(step, h, back.mT).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    forwards, backwards = torch.cat(states, 1)
    return torch.cat([forwards, backwards.flip(0)], -1)


class PTuningMLP(Encoded, name="p_tuning_mlp"):
    """X' = [P; X], P = W relu(V relu(U E + u) + v) + w."""

    inner: Tensor = param("d_in d_in", kaiming)
    inner_bias: Tensor = param("d_in", uniform("d_in"))
    middle: Tensor = param("d_in d_in", kaiming)
    middle_bias: Tensor = param("d_in", uniform("d_in"))
    outer: Tensor = param("d_in d_in", kaiming)
    outer_bias: Tensor = param("d_in", uniform("d_in"))

    def made(self):
        """(n, d)"""
        h = F.relu(F.linear(self.embedding, self.inner, self.inner_bias))
        h = F.relu(F.linear(h, self.middle, self.middle_bias))
        return F.linear(h, self.outer, self.outer_bias)


class MPT(PromptTuning, name="mpt"):
    """X' = [P o (U_k V_k); X]: one prompt for all tasks, and of each task k a low-rank factor.

    The rows' tasks are the call's `task_ids`; with one task they may be left out. The paper trains the source tasks first, under
    their own prompts as teachers (`train.distil`), and a target task from a saved `mpt` of them: `sources=[folder]`.
    """

    paper = "2303.02861"
    sources = "mpt"
    needs_sources = False
    reads_call = True
    reads = ("task_ids",)
    n_tasks: int = 1  # how many tasks
    r: int = 1  # rank of a task's factor
    task_lr: float = 1.0  # learning rate of the tasks' factors, as a multiple; the paper's target tasks: 4/3
    begin: Literal["average", "task", "shared"] = "average"  # from a source: its tasks' mean, one of them, or P alone
    task: int = 0  # which of the source's tasks, for begin="task"
    prompt: Tensor = param("n d_in", normal(1.0))
    u: Tensor = param("n_tasks n r", normal(0.02), lr="task_lr")
    v: Tensor = param("n_tasks r d_in", normal(0.02), lr="task_lr")

    def tokens(self, batch):
        own, task = self.exact, self.tasks(batch.shape[0], batch.device)
        return own.prompt * (own.u[task] @ own.v[task])

    @classmethod
    def start(cls, adapter, path, sources):
        if len(sources) != 1:
            raise ValueError(f"mpt starts from one saved mpt, which holds all source tasks; {len(sources)} were given")
        (source,) = sources
        for (leaf, site), delta in adapter.deltas.items():
            if leaf != path:
                continue
            kept = {key: source.tensors.get(f"0.{site}.{key}") for key in ("prompt", "u", "v")}
            for key, value in kept.items():
                own = getattr(delta, key)
                if value is None or value.shape[-2:] != own.shape[-2:]:
                    got = "none" if value is None else tuple(value.shape[-2:])
                    raise ValueError(
                        f"{site or 'the model'}: {key} of {source.folder} is {got}, here {tuple(own.shape[-2:])}"
                    )
            n = len(kept["u"])
            if delta.begin == "task" and not 0 <= delta.task < n:
                raise ValueError(
                    f"{site or 'the model'}: task = {delta.task}, but {source.folder} has the tasks 0 to {n - 1}"
                )
            with torch.no_grad():
                delta.prompt.copy_(kept["prompt"])
                for key in ("u", "v") if delta.begin != "shared" else ():
                    value = kept[key].mean(0) if delta.begin == "average" else kept[key][delta.task]
                    getattr(delta, key).copy_(value.expand_as(getattr(delta, key)))
