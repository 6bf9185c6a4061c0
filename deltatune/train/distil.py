"""Distillation from adapters: a student learns what teachers on the same frozen model answer and how they represent it.

    L = L_task + weight (KL(teacher's answers || student's) + |h_teacher - h_student|^2)

MPT's source stage (2303.02861): the teachers are prompts trained on one task each, and the student has them all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import adapters, only
from ..core.errors import unknown

_HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


@dataclass(frozen=True)
class Distil:
    """The loss of a student under teachers: names of adapters on the model, the k-th for rows of task k."""

    teachers: tuple[str, ...]
    weight: float = 0.9  # of both terms beside the task's own loss
    temperature: float = 1.0  # of the answers
    hidden: bool = True  # compare the hidden states too

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where a teacher is not on the model, or where no student is."""
        there = adapters(model)
        for name in self.teachers:
            if name not in there:
                raise unknown("teacher", name, there)
        if not self.teachers or not there.keys() - set(self.teachers):
            raise ValueError(
                f"distillation needs teachers and a student; teachers here: {self.teachers}, adapters: {[*there]}"
            )

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], attached: nn.Module | None = None
    ) -> tuple[Tensor, Any]:
        """(loss, the student's outputs) of one batch; `attached` is the model with the adapters where `model` is wrapped."""
        there = adapters(attached or model)
        tasks = batch.get("task_ids")
        n_rows = len(next(iter(batch.values())))
        if tasks is None and len(self.teachers) > 1:
            raise ValueError(f"distillation from {len(self.teachers)} teachers needs task_ids in the batch")
        rows = tasks if tasks is not None else torch.zeros(n_rows, dtype=torch.long)
        if bool(((rows < 0) | (rows >= len(self.teachers))).any()):
            raise ValueError(f"task ids up to {int(rows.max())}, but there are {len(self.teachers)} teachers")
        with only(there, there.keys() - set(self.teachers)):
            student = model(**batch, output_hidden_states=self.hidden)
        total: Tensor = student.loss
        for task in rows.unique().tolist():
            mine = (rows == task).nonzero().flatten().to(next(iter(batch.values())).device)
            with torch.no_grad(), only(there, {self.teachers[task]}):
                chosen = {k: v[mine] for k, v in batch.items()}
                teacher = (attached or model)(**chosen, output_hidden_states=self.hidden)
            extra = self.answers(teacher.logits, student.logits[mine], chosen["labels"])
            if self.hidden:
                extra = extra + self.states(teacher, student, mine, chosen)
            total = total + self.weight * len(mine) / n_rows * extra
        return total, student

    def answers(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        """KL(teacher || student), a mean over rows, or over the tokens that have a label."""
        if teacher.ndim == 3:
            asked = labels != -100
            teacher, student = teacher[asked], student[asked]
        p, q = (F.log_softmax(t.float() / self.temperature, -1) for t in (teacher, student))
        return F.kl_div(q, p, reduction="batchmean", log_target=True) * self.temperature**2

    def states(self, teacher: Any, student: Any, rows: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean squared distance of all layers' states, over real tokens."""
        terms = []
        for name in _HIDDEN:
            for a, b in zip(teacher.get(name) or (), student.get(name) or (), strict=True):
                b = b[rows]
                if a.shape != b.shape:
                    raise ValueError(
                        f"{name}: the teacher's {tuple(a.shape)} are not the student's {tuple(b.shape)}; prompts need one length"
                    )
                mask = batch.get("decoder_attention_mask" if name.startswith("decoder") else "attention_mask")
                far = (a.float() - b.float()).square().mean(-1)
                if mask is None:
                    terms.append(far.mean())
                    continue
                real = F.pad(mask, (far.shape[1] - mask.shape[1], 0), value=1) if far.shape[1] > mask.shape[1] else mask
                terms.append((far * real).sum() / real.sum())
        return torch.stack(terms).mean()


class TaskBatches(torch.utils.data.Sampler[int]):
    """Rows in an order whose every `batch` come from a random number of tasks, 2 to all of them, chosen anew each time."""

    def __init__(self, tasks: Sequence[int], batch: int, n_batches: int, seed: int = 0) -> None:
        self.rows: dict[int, list[int]] = {}
        for i, task in enumerate(tasks):
            self.rows.setdefault(task, []).append(i)
        if len(self.rows) < 2:
            raise ValueError(f"batches of several tasks need two tasks at least; the rows have {sorted(self.rows)}")
        self.batch, self.n_batches, self.seed = batch, n_batches, seed

    def __len__(self) -> int:
        return self.batch * self.n_batches

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        names = sorted(self.rows)
        for _ in range(self.n_batches):
            k = int(torch.randint(2, len(names) + 1, (), generator=generator))
            chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[:k].tolist()]
            for j in range(self.batch):
                rows = self.rows[chosen[j % k]]
                yield rows[int(torch.randint(len(rows), (), generator=generator))]
