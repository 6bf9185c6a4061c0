"""One training run on encoded rows: the same optimiser, warm-up and decay for every method."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .data import Collate, Rows
from .trainer import AdapterTrainer, trained

_NEW = "activation_checkpointing"  # its name since transformers 5.2x
_CHECKPOINTING = _NEW if _NEW in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


@dataclass(frozen=True)
class Plan:
    """How long and how: AdamW, linear warm-up and decay, gradients clipped."""

    n_steps: int = 100  # optimiser steps
    batch: int = 32  # rows a step
    lr: float = 1e-3  # learning rate
    head_lr: float | None = None  # the task head's own learning rate; None: the same
    weight_decay: float = 0.01  # of matrices; vectors take none
    warmup: float = 0.06  # share of the steps
    clip: float = 1.0  # largest norm of the gradient
    by_length: bool = True  # rows of like length in a batch: less padding
    seed: int = 0  # of the order of rows, dropout and starts
    bf16: bool = False  # autocast to bfloat16
    checkpointing: bool = False  # recompute activations
    save_steps: int = 0  # a checkpoint each so many steps; 0 for none


@dataclass
class Fitted:
    """What a run left: (step, loss) points, and its time."""

    curve: list[tuple[int, float]] = field(default_factory=list)
    train_s: float = 0.0
    step_ms: float = 0.0
    tokens_per_s: float = 0.0
    optimizer_bytes: int = 0


Progress = Callable[[int, int, float | None, float], None]  # step, of how many, loss, tokens per second


class _Watch(TrainerCallback):
    def __init__(self, collate: Collate, progress: Progress | None) -> None:
        self.collate, self.progress = collate, progress
        self.fitted = Fitted()
        self.times: list[float] = []
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.before = time.perf_counter(), self.collate.n_tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.times.append(now - self.at)
        if self.progress is not None:
            rate = (self.collate.n_tokens - self.before) / (now - self.begun)
            self.progress(state.global_step, state.max_steps, self.loss, rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self.fitted.curve.append((state.global_step, self.loss))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.begun
        self.fitted.train_s = seconds
        self.fitted.step_ms = 1e3 * statistics.median(self.times) if self.times else 0.0
        self.fitted.tokens_per_s = (self.collate.n_tokens - self.before) / seconds
        states = kwargs["optimizer"].state.values()
        self.fitted.optimizer_bytes = sum(
            t.nbytes for s in states for t in s.values() if hasattr(t, "nbytes") and t.ndim
        )


def optimizer_of(model: nn.Module) -> tuple[str | None, str]:
    """transformers' name of the AdamW that all trained methods ask for, None for its default; and in words what it is."""
    if not all(leaf.method.paged for adapter in trained(model) for _, leaf in adapter.tree.leaves()):
        return None, "AdamW"
    if next(model.parameters()).device.type != "cuda":
        return None, "plain AdamW, its pages are CUDA's alone"
    if importlib.util.find_spec("bitsandbytes") is None:
        return None, "plain AdamW, its pages need bitsandbytes"
    return "paged_adamw_32bit", "paged AdamW"


def options_of(model: nn.Module, plan: Plan, folder: str) -> TrainingArguments:
    """The plan in the Trainer's words; checkpoints go into `folder`."""
    more: dict[str, Any] = {_CHECKPOINTING: True} if plan.checkpointing else {}
    optimizer, _ = optimizer_of(model)
    more |= {} if optimizer is None else {"optim": optimizer}
    return TrainingArguments(
        **more,
        output_dir=folder,
        max_steps=plan.n_steps,
        per_device_train_batch_size=plan.batch,
        learning_rate=plan.lr,
        weight_decay=plan.weight_decay,
        warmup_steps=round(plan.warmup * plan.n_steps),
        max_grad_norm=plan.clip,
        seed=plan.seed,
        bf16=plan.bf16,
        train_sampling_strategy="group_by_length" if plan.by_length else "random",
        logging_strategy="steps",
        logging_steps=max(1, plan.n_steps // 25),
        save_strategy="steps" if plan.save_steps else "no",
        save_steps=plan.save_steps or 500,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )


def fit(
    model: nn.Module,
    rows: Rows,
    collate: Collate,
    plan: Plan,
    *,
    out: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Fitted:
    """Train what is attached to `model` for `plan.n_steps` steps. Raises ValueError where nothing is trainable."""
    with tempfile.TemporaryDirectory() as scratch:
        options = options_of(model, plan, out or scratch)
        watch = _Watch(collate, progress)
        trainer = AdapterTrainer(
            model, options, data_collator=collate, train_dataset=rows, callbacks=[watch], head_lr=plan.head_lr
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume or None)
        model.eval()
    return watch.fitted
