"""How much of each child runs: what `Gate`, `Mixture`, `Fuse` and `Route` decide by (core/mixed.py)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import normal
from ..core.method import param
from ..core.mixed import Mixer
from ..core.schedule import Schedule
from ..core.sharded import assign, whole


class Weigher(Mixer):
    """The common part of weights by a logit for each child: of a token, a row's mean token, a row's task, or of none."""

    category = "multi-task"
    lr = (1e-4, 1e-2)
    by: Literal["token", "sequence", "task", "constant"] = "token"  # what has weights of its own
    n_tasks: int = 1  # of by="task"
    g: Tensor = param("n d_in", normal(0.02))
    offset: Tensor = param("n")
    of_task: Tensor = param("n_tasks n", normal(0.02))

    reads = ("task_ids",)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.n_tasks < 1 or config.n_tasks > 1 and config.by != "task":
            raise ValueError(
                f'{cls.name}: n_tasks = {config.n_tasks} with by={config.by!r}; tasks go with by="task", 1 at least'
            )
        return config

    @classmethod
    def slots_of(cls, config):
        wanted = {"task": {"of_task"}, "constant": {"offset"}}.get(config.by, {"g", "offset"})
        return {
            key: slot for key, slot in super().slots_of(config).items() if key in wanted or key not in Weigher.slots
        }

    def build(self, base, dtype):
        super().build(base, dtype)
        self.reads_call = self.by in ("sequence", "task")

    @property
    def reads_input(self):
        return self.by in ("token", "sequence")

    @property
    def is_constant(self):
        return self.by == "constant"

    @property
    def is_per_row(self):
        return self.by != "token"

    def weights(self, x):
        if self.by == "constant":
            return self.squash(self.offset[None, None])
        if self.by == "task":
            return self.squash(self.of_task[self.task_ids()][:, None])
        if self.by == "sequence" and x.ndim == 3:
            x = self.without_soft(x)
            real = self.call.given(x.shape[1], self.site, x.device)[..., None].to(x.dtype)
            return self.of_row(x, real / real.sum(1, keepdim=True))
        made = self.squash(F.linear(x, self.g, self.offset))
        return made if made.ndim == 3 else made[:, None]

    def of_row(self, x, share):
        """(B, 1, n), the weights of the mean token; share (B or 1, T, 1)."""
        return self.squash(F.linear((x * share).sum(1, keepdim=True), self.g, self.offset))

    def squash(self, logits):
        """Weights (..., n) of logits."""
        raise NotImplementedError

    def without_soft(self, x):
        """The row's own tokens; learned ones stand in front."""
        seen = [
            t
            for t in (self.call.mask(self.site.stack), self.call.ids(self.site.stack))
            if t is not None and t.ndim == 2
        ]
        return x[:, -seen[0].shape[1] :] if seen and seen[0].shape[1] < x.shape[1] else x

    def task_ids(self):
        """(B)"""
        ids = None if self.call is None else self.call.task_ids
        if ids is None:
            raise ValueError(
                f'{self.site.name}: {self.name} with by="task" needs task_ids, a number from 0 for each row'
            )
        if not torch.compiler.is_compiling() and not bool(((ids >= 0) & (ids < self.n_tasks)).all()):
            raise ValueError(f"{self.site.name}: task_ids {ids.tolist()} are not all among the {self.n_tasks} tasks")
        return ids


class GateMixer(Weigher, name="gate"):
    """w_i = sigmoid(g_i x + c_i), each child's own; of a sequence the mean over its tokens."""

    def squash(self, logits):
        return torch.sigmoid(logits)

    def of_row(self, x, share):
        return (self.squash(F.linear(x, self.g, self.offset)) * share).sum(1, keepdim=True)


class SoftmaxMixer(Weigher, name="softmax"):
    """w = softmax(G x + c) over the children; with `top_k` the others have none.

    Two or more that stay add up to 1; one keeps its share.
    """

    top_k: int | None = None  # children of largest weight that run; None: all

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.top_k is not None and not 1 <= config.top_k <= config.n:
            raise ValueError(
                f"{cls.name}: top_k = {config.top_k}, but it must lie between 1 and the {config.n} children"
            )
        return config

    def squash(self, logits):
        if self.top_k is None or self.top_k == self.n:
            return logits.softmax(-1)
        kept = logits >= logits.topk(self.top_k, -1).values[..., -1:]
        if self.top_k == 1:  # else it would be 1 whatever the logits, and they would not learn
            return torch.where(kept, logits.softmax(-1), 0.0)
        return logits.masked_fill(~kept, -math.inf).softmax(-1)


def near_identity(shape, **_):
    """1 on the diagonal and 1e-6 elsewhere"""
    return torch.full(shape, 1e-6).fill_diagonal_(1.0)


class NearIdentity(Schedule):
    """Adds penalty |I - V|^2 to the loss, once a step."""

    has_penalty = True

    @torch.no_grad()
    def before_step(self, step):
        for d in self.adapter.deltas.values():
            if isinstance(d, AttentionMixer) and d.penalty and d.v.grad is not None:  # frozen, or no row ran it
                v = whole(d.v)
                pull = 2 * d.penalty * (v - torch.eye(len(v), dtype=v.dtype, device=v.device))
                assign(d.v.grad, whole(d.v.grad) + pull)


class AttentionMixer(Mixer, name="attention"):
    """y' = y + sum_i p_i V c_i, p = softmax_i((Q y)^T K c_i / temperature), c_i child i's change; V near the identity."""

    paper = "2005.00247"
    category = "multi-task"
    lr = (1e-5, 5e-3)
    schedule = NearIdentity
    penalty: float = 0.01  # weight of |I - V|^2 in the loss
    temperature: float = 1.0  # divides the scores
    q: Tensor = param("d_out d_out", normal(0.02))
    q_bias: Tensor = param("d_out")
    k: Tensor = param("d_out d_out", normal(0.02))
    k_bias: Tensor = param("d_out")
    v: Tensor = param("d_out d_out", near_identity)

    @property
    def is_per_row(self):
        return False

    def mix(self, x, y, changes, seen):
        each = torch.stack(list(changes.values()), -2)  # (..., n, O)
        q, k = F.linear(seen, self.q, self.q_bias), F.linear(each, self.k, self.k_bias)
        p = (k @ q[..., None]).squeeze(-1).div(self.temperature).softmax(-1)
        return y + (p[..., None] * F.linear(each, self.v)).sum(-2)


class RowMixer(Mixer, name="rows"):
    """w_i = 1 where a row's `adapter_ids` is i, else 0; -1 has no child."""

    category = "multi-task"
    reads_call = True
    reads = ("adapter_ids",)

    @property
    def reads_input(self):
        return False

    def rows(self, like):
        """(B), on the device of `like` (B, ...), or of an embedding that all rows share, as positions are, (1, ...).

        Raises ValueError where they are missing, or not one for each row.
        """
        ids = self.call.adapter_ids
        at, n = self.site.name or "the model", self.n
        if ids is None:
            raise ValueError(
                f"{at}: adapter_ids are missing, a tensor with the number of each row's adapter, -1 for none"
            )
        shared = self.site.kind == "embedding" and like.shape[:1] == (1,) and ids.ndim == 1
        if ids.shape != like.shape[:1] and not shared or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"{at}: adapter_ids of {ids.dtype} and shape {tuple(ids.shape)}; here are {like.shape[0]} rows, and each needs "
                f"one whole number"
            )
        if not torch.compiler.is_compiling() and (wrong := [i for i in self.known() if not -1 <= i < n]):
            raise ValueError(f"{at}: adapter id {wrong[0]}, but there are the adapters 0 to {n - 1}, and -1 for none")
        return ids.to(like.device)

    def known(self):
        """The ids that occur; a GPU is waited for once a call, not at every site."""
        ids, stash = self.call.adapter_ids, self.frame.stash
        if stash.get("adapter_ids") is not ids:
            stash["adapter_ids"], stash["adapter_ids that occur"] = ids, ids.unique().cpu()
        return stash["adapter_ids that occur"].tolist()

    def running(self):
        return range(-1, self.n) if torch.compiler.is_compiling() else self.known()

    def weights(self, x):
        ids = self.rows(x)
        return (ids[:, None, None] == torch.arange(self.n, device=ids.device)).float()

    def in_front(self, w, parts, dim):
        """The row's own child's; all rows have one, of one length."""
        at, sizes = self.site.name or "the model", {part.shape[dim] for part in parts.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"{at}: rows of one batch cannot have {sorted(sizes)} learned tokens in front; their adapters need one length"
            )
        if not torch.compiler.is_compiling() and (without := sorted({*self.known()} - parts.keys())):
            raise ValueError(
                f"{at}: the rows of adapter_ids {without} put no tokens in front here and others of this batch do; run them apart"
            )
        if torch.compiler.is_compiling():  # else those rows would have another child's
            says = (
                f"{at}: rows without learned tokens in front cannot run in a graph where another row's child has some"
            )
            torch._assert_async((w[:, 0, sorted(parts)] > 0).any(1).all(), says)
        first, *others = parts.items()
        out = first[1].expand(len(w), *[-1] * (first[1].ndim - 1))
        for i, part in others:
            out = torch.where((w[:, 0, i] > 0).view(-1, *[1] * (part.ndim - 1)), part, out)
        return out
