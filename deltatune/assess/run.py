"""One cell: attach, train, evaluate, detach. The backbone is loaded once a seed and comes back bit for bit."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from ..core.attach import attach
from ..core.compose import PRESETS, Leaf, Per, Tree, looking, storage_of
from ..quant import is_quantised, n_weights, quantise
from ..tasks import Task
from ..tasks.metrics import LOWER_IS_BETTER
from ..train.backbone import load_classifier
from ..train.data import Collate, Rows, encode, predict, some
from ..train.fit import Fitted, Plan, fit
from .cells import Budget, Cell, Data, Key, Metric, Time, Trial, path_of, write_atomic
from .measure import machine, memory, saved_bytes, versions


@dataclass(frozen=True)
class Candidate:
    """A method as it enters a comparison: a name for its cells, and its tree."""

    name: str
    tree: Tree
    category: str
    paper: str
    lr: tuple[float, float]  # range of learning rates

    @property
    def label(self) -> str:
        """The method with its sizes and its place; a tree with a name says the name first."""
        inside, storage = _label(self.tree), storage_of(self.tree)
        return f"{f'{self.name}: ' if self.name in PRESETS else ''}{inside}{f', base in {storage}' if storage else ''}"


def _label(tree: Tree) -> str:
    if not isinstance(tree, Leaf):
        return f"{type(tree).__name__}({', '.join(_label(c) for c in tree.children)})"
    sizes = {k: v for k, v in vars(tree.config).items() if k in ("r", "n")}
    where = tree.method.where if tree.where is None else tree.where
    names = [place for place, _ in where.each] if isinstance(where, Per) else where
    place = f" on {names if isinstance(names, str) else ', '.join(names)}"
    return f"{tree.method.name}{''.join(f' {k}={v}' for k, v in sizes.items())}{'' if tree.method.category == 'baseline' else place}"


def range_of(tree: Tree) -> tuple[float, float]:
    """The learning rates that suit all methods of a tree, or what lies between them."""
    ranges = [leaf.method.lr for _, leaf in tree.leaves()]
    ends = max(low for low, _ in ranges), min(high for _, high in ranges)
    return min(ends), max(ends)


def learning_rates(low: float, high: float, n: int) -> list[float]:
    """`n` learning rates, geometrically spread over the range that the method's paper and its users take."""
    return [float(f"{low * (high / low) ** ((i + 1) / (n + 1)):.3g}") for i in range(n)]


Report = Callable[[str, int, int, float | None, float], None]  # phase, step, of how many, loss, tokens per second


class Bench:
    """A task on a backbone under a budget: what its cells share is computed once."""

    def __init__(
        self,
        backbone: str,
        task: Task,
        budget: Budget,
        max_length: int,
        head_lr: float | None = None,
        device: str = "cpu",
    ) -> None:
        self.backbone, self.task, self.budget, self.max_length = backbone, task, budget, max_length
        self.head_lr, self.device = head_lr, device
        self.rows: dict[str, Rows] = {}
        self.model: nn.Module | None = None
        self.stands: tuple[int, str] | None = None  # seed and format of the model

    def prepare(self, seed: int, storage: str = "") -> nn.Module:
        """The backbone with this seed's fresh head, quantised where a format is named; the rows are encoded the first time."""
        if self.model is None or self.stands != (seed, storage):
            torch.manual_seed(seed)
            self.model, tokenizer = load_classifier(self.backbone, self.task.labels)
            self.model.to(self.device)
            if storage:
                quantise(self.model, storage)
            self.stands = (seed, storage)
            self.collate = Collate(tokenizer, self.task.kind == "regression")
            if not self.rows:
                for name, split in self.task.splits.items():
                    self.rows[name] = encode(split.texts, split.targets, tokenizer, self.max_length)
        return self.model

    def run(
        self, candidate: Candidate, seed: int, folder: str | os.PathLike[str], report: Report, config: Mapping[str, Any]
    ) -> Cell:
        """Measure one cell and write it; what fails is written as failed, and the others go on."""
        key = Key(self.backbone, candidate.name, self.task.name, seed)
        storage = storage_of(candidate.tree)
        cell = Cell(
            status="failed",
            error="not finished",
            key=key,
            label=candidate.label,
            category=candidate.category,
            paper=candidate.paper,
            budget=self.budget,
            config={**config, "method": candidate.tree.to_dict(), "max_length": self.max_length, "head_lr": self.head_lr}
            | ({"base": storage} if storage else {}),
            versions=versions(),
            machine=machine(),
            data=Data(**{name: split.hash for name, split in self.task.splits.items()}),
            n_trainable=None, n_head=None, n_stored=None, n_backbone=None, memory=None, time=None, file_bytes=None,
            metric=None, nll=None, ece=None, lr=None, trials=(), curve=(), reliability=(), predictions=None,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        path = path_of(folder, key.backbone, key.method, key.task, key.seed)
        try:
            cell = self._measure(cell, candidate, seed, path, report)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            self.model = None  # whatever state it is in, the next cell starts from a fresh one
            cell = replace(cell, error=f"{type(error).__name__}: {error}"[:2000])
        cell.write(path)
        return cell

    def _trial(self, candidate: Candidate, seed: int, lr: float, report: Report) -> tuple[Any, Fitted, int]:
        if self.model is not None and self.stands is not None and not self.stands[1] and is_quantised(self.model):
            self.model = None  # the method before this one has quantised it for itself
        model = self.prepare(seed, storage_of(candidate.tree))
        torch.manual_seed(seed)
        size = self.budget.batch
        looked = looking(candidate.tree, lambda n: some(self.rows["train"], self.collate, n, size, seed, self.device))
        adapter = attach(model, looked)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            longest = sorted(self.rows["train"].rows, key=lambda r: -len(r["input_ids"]))[: self.budget.batch]
            batch = {k: v.to(self.device) for k, v in self.collate(longest).items()}
            activations = saved_bytes(model, batch)
            plan = Plan(n_steps=self.budget.n_steps, batch=self.budget.batch, lr=lr, head_lr=self.head_lr, seed=seed)
            fitted = fit(model, self.rows["train"], self.collate, plan, progress=lambda *a: report("train", *a))
        except BaseException:
            adapter.detach()
            raise
        return adapter, fitted, activations

    def _score(self, model: nn.Module, split: str) -> tuple[dict[str, float], torch.Tensor]:
        outputs = predict(model, self.rows[split], self.collate, 4 * self.budget.batch)
        if not torch.isfinite(outputs).all():
            raise ValueError(f"the outputs on the {split} rows are not finite: the run diverged")
        return self.task.scores(outputs.numpy(), self.task.splits[split].targets), outputs

    def _measure(self, cell: Cell, candidate: Candidate, seed: int, path: Any, report: Report) -> Cell:
        begun = time.perf_counter()
        rates = learning_rates(*candidate.lr, self.budget.lr_trials)
        trials: list[Trial] = []
        best: tuple[float, float] | None = None
        kept: tuple[Any, Fitted, int] | None = None
        for lr in rates:
            if kept is not None:
                kept[0].detach()
            kept = self._trial(candidate, seed, lr, report)
            try:
                score = self._score(self.model, "validation")[0][self.task.metric]  # type: ignore[arg-type]
            except ValueError:
                score = math.nan
            trials.append(Trial(lr, score if math.isfinite(score) else None))
            sign = -1 if self.task.metric in LOWER_IS_BETTER else 1
            if math.isfinite(score) and (best is None or sign * score > sign * best[1]):
                best = (lr, score)
        assert kept is not None
        if best is None:
            kept[0].detach()
            raise ValueError(f"every learning rate diverged: {', '.join(f'{t.lr:g}' for t in trials)}")
        if trials[-1].lr != best[0]:  # the best is not what stands there now: the same run again
            kept[0].detach()
            kept = self._trial(candidate, seed, best[0], report)
        adapter, fitted, activations = kept
        model = adapter.model
        report("test", 0, 0, None, 0.0)
        at = time.perf_counter()
        scores, outputs = self._score(model, "test")
        eval_s = time.perf_counter() - at
        split = memory(model, adapter, activations, fitted.optimizer_bytes)
        with tempfile.TemporaryDirectory() as scratch:
            adapter.save(scratch)
            file_bytes = sum(os.path.getsize(os.path.join(scratch, f)) for f in os.listdir(scratch))
        n_trainable, n_head = adapter.params(), adapter.n_head
        n_stored = sum(t.numel() for t in adapter.state_dict().values())
        adapter.detach()
        predictions = path.with_name(path.name.partition(".")[0] + ".predictions.jsonl")
        _write_predictions(predictions, self.task, outputs)
        classes = self.task.kind == "classification"
        return replace(
            cell,
            status="done",
            error=None,
            n_trainable=n_trainable,
            n_head=n_head,
            n_stored=n_stored,
            n_backbone=n_weights(model) - n_head,
            memory=split,
            time=Time(fitted.train_s, fitted.step_ms, fitted.tokens_per_s, eval_s, time.perf_counter() - begun),
            file_bytes=file_bytes,
            metric=Metric(self.task.metric, scores[self.task.metric], best[1]),
            nll=scores.get("nll"),
            ece=scores.get("ece"),
            lr=best[0],
            trials=tuple(trials),
            curve=tuple((s, x if math.isfinite(x) else None) for s, x in fitted.curve),
            reliability=_reliability(self.task, outputs) if classes else (),
            predictions=predictions.name,
        )


def _write_predictions(path: Any, task: Task, outputs: torch.Tensor) -> None:
    lines = []
    probabilities = outputs.softmax(-1) if task.labels else outputs
    for target, row in zip(task.test.targets, probabilities, strict=True):
        answer: Any = int(row.argmax()) if task.labels else float(row[0])
        line: dict[str, Any] = {"target": target, "prediction": answer}
        if task.labels:
            line["probs"] = [round(float(p), 5) for p in row]
        lines.append(json.dumps(line))
    write_atomic(path, "\n".join(lines) + "\n")


def _reliability(task: Task, outputs: torch.Tensor, n_bins: int = 15) -> tuple[tuple[float, float, int], ...]:
    """(mean confidence, accuracy, rows) of each bin of confidence that has rows."""
    confidence, answer = outputs.softmax(-1).max(-1)
    right = answer == torch.tensor(task.test.targets)
    at = (confidence * n_bins).long().clamp(max=n_bins - 1)
    found = []
    for b in range(n_bins):
        here = at == b
        n = int(here.sum())
        if n:
            found.append((float(confidence[here].mean()), float(right[here].float().mean()), n))
    return tuple(found)
