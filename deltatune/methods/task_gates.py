"""Mixtures that are one for each task: rows of a batch have their own task's, and a weight is folded for one task."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.inits import kaiming, normal, uniform
from ..core.method import Method, bank, param

EPS = 1e-12


def add_product(y, h, b, scale):
    """y + scale h b^T in one matrix product, for y (..., O), h (..., R) and b (O, R)."""
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), b.t(), alpha=scale).view_as(y)


class TaskGates(Method):
    """The common part: which task a row, or a folded weight, is of.

    `adapter.set(task=2)` says it for rows that come without `task_ids`, and for `merge`.
    """

    category = "multi-task"
    kinds = frozenset({"linear"})
    reads_call = True
    reads = ("task_ids",)
    random_fold = True  # it reads the running call, which is over in the backward
    live = ("task",)
    n_tasks: int = 1  # how many tasks
    task: int | None = None  # the task of rows without task_ids, and of what is merged; with one task it is that

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.task is not None and not 0 <= config.task < config.n_tasks:
            raise ValueError(f"{cls.name}: task = {config.task}, but it has the tasks 0 to {config.n_tasks - 1}")
        return config

    def tasks(self, n_rows, device):
        if self.call.task_ids is None and self.task is not None:
            return torch.full((n_rows,), self.task, device=device)
        return Method.tasks(self, n_rows, device)

    def one_task(self):
        """The task of a folded weight, one index: that of all rows of the running forward, else the one that was set."""
        call, at = self.frame.call, f"{self.site.name}: {self.name}"
        if call is not None and call.task_ids is not None:
            ids = self.tasks(len(call.task_ids), call.task_ids.device)
            same, says = (
                (ids == ids[0]).all(),
                f"{at} works on the weight here, where all rows of a batch have one task",
            )
            if torch.compiler.is_compiling():
                torch._assert_async(same, says)
            elif not same:
                raise ValueError(f"{says}, not {sorted(set(ids.tolist()))}")
            return ids[:1]  # no number that a graph would have to know
        if self.task is None and self.n_tasks > 1:
            raise ValueError(
                f"{at} has another weight for each of its {self.n_tasks} tasks; choose one, as by "
                f"adapter.set(task=0), before it is merged"
            )
        return [self.task or 0]


class MOELoRA(TaskGates, name="moelora"):
    """W' = W + (alpha / r) sum_e w_e B_e A_e, w = softmax(G z_t) of the row's task t, B = 0 at the start.

    The E experts have rank r / E each; G and z are one for all layers.
    """

    paper = "2310.18339"
    where = "q,k,v,o,mlp"
    limits = {"r": "n_experts*min(d_in,d_out)"}
    lr = (1e-4, 1e-2)
    n_experts: int = 8  # E
    r: int = 16  # rank of all experts together; E divides it
    alpha: float = 32.0  # scale of the update, divided by r
    d_task: int = 64  # size of a task's embedding
    dropout: float = 0.1  # share of the update's inputs that is dropped while training
    a: Tensor = param("n_experts r/n_experts d_in", normal(0.01))
    b: Tensor = param("d_out n_experts r/n_experts")
    z: Tensor = bank("n_tasks d_task", normal(1.0), train=True)
    gate: Tensor = bank("n_experts d_task", kaiming, train=True)

    def shares(self, task):
        """w of each task: (..., E)"""
        return F.linear(self.z[task], self.gate).softmax(-1)

    def fold(self, weight, bias):
        b = self.b * self.shares(self.one_task())[0, :, None]
        return weight + self.alpha / self.r * (b.flatten(1) @ self.a.flatten(0, 1)), bias

    def post(self, y, x):
        w = self.exact.shares(self.tasks(y.shape[0], y.device)).to(y.dtype)
        h = F.linear(F.dropout(x, self.dropout, self.training), self.a.flatten(0, 1))
        w = w.repeat_interleave(self.r // self.n_experts, -1)
        h = h * w.view(-1, *(1,) * (h.ndim - 2), self.r)
        return add_product(y, h, self.b.flatten(1), self.alpha / self.r)


class Polytropon(TaskGates, name="polytropon"):
    """W' = W + (alpha / r) (sum_s w_s B_s) (sum_s w_s A_s), w = g / sum_s g_s, g = sigmoid(Z_t) of the row's task t.

    B = 0 at the start. While training each row draws g = sigmoid(Z_t + log u - log(1 - u)), u from U(0, 1). With
    n_splits (2211.03831) each part of the input's features, and of the output's, has a w of its own.
    """

    paper = "2202.13914"
    where = "q,k,v,o"
    limits = {"r": "min(d_in,d_out)"}
    lr = (1e-4, 1e-2)
    n_skills: int = 8  # how many skills, each a low-rank update
    n_splits: int = 1  # parts of the features with gates of their own; it divides what goes in and what comes out
    r: int = 16  # rank
    alpha: float = 1.0  # scale of the update, divided by r
    logit_lr: float = 100.0  # the logits' learning rate, as a multiple of the run's
    a: Tensor = param("n_skills r n_splits d_in/n_splits", uniform("d_in/n_splits"))
    b: Tensor = param("n_splits d_out/n_splits n_skills r")
    z: Tensor = param(
        "n_tasks n_splits n_skills", lambda shape, **_: torch.empty(shape).uniform_(-1e-3, 1e-3), lr="logit_lr"
    )

    def shares(self, z, drawn):
        """w of logits (..., n_skills)."""
        if drawn:
            eps = torch.finfo(z.dtype).eps
            z = z + torch.rand_like(z).clamp(eps, 1 - eps).logit()
        g = z.sigmoid()
        return g / (g.sum(-1, keepdim=True) + EPS)

    def fold(self, weight, bias):
        if self.training and torch.is_grad_enabled() and self.frame.call is not None:
            raise ValueError(
                f"{self.site.name}: {self.name} draws each row's skills while it trains, but what stands around it here "
                f"works on the weight; attach the other at other sites"
            )
        w = self.shares(self.z[self.one_task()], False)[0]
        a, b = torch.einsum("qs,srqi->rqi", w, self.a), torch.einsum("qs,qosr->qor", w, self.b)
        return weight + self.alpha / self.r * (b.flatten(0, 1) @ a.flatten(1)), bias

    def post(self, y, x):
        n, z = y.shape[0], self.exact.z
        task, drawn = self.tasks(n, y.device), self.training
        z = z if self.n_tasks == 1 and not drawn else z[task]  # what is the same for all rows is made once
        w = self.shares(z, drawn).to(y.dtype)
        a = torch.einsum("nqs,srqi->nrqi", w, self.a).flatten(2).expand(n, -1, -1)
        b = torch.einsum("nqs,qosr->nqor", w, self.b).flatten(1, 2).expand(n, -1, -1)
        h = x.reshape(n, -1, x.shape[-1]) @ a.mT
        return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), h, b.mT, alpha=self.alpha / self.r).view_as(y)
