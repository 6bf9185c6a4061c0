"""transformers' Trainer for adapters: their parameter groups and schedules, and checkpoints that hold them alone."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from ..core.adapter import Adapter, adapters
from ..core.calibrate import looking
from ..core.schedule import Schedule, Schedules
from .distil import Distil

SCHEDULES = "schedules.pt"


def trained(model: nn.Module) -> list[Adapter]:
    """The adapters on the model that have something to train. Raises ValueError where there is none."""
    found = [a for a in adapters(model).values() if any(p.requires_grad for p in a.parameters())]
    if not found:
        have = adapters(model)
        why = f"adapters {', '.join(have)} are not trainable" if have else "the model has no adapter"
        raise ValueError(f"nothing to train: {why}; call dt.attach(model, ...) or adapter.trainable() first")
    return found


def check_alive(model: nn.Module, optimizer: Any, found: list[Adapter]) -> None:
    """Every declared trained tensor is in the optimiser, in its dtype, with a finite gradient, and nothing else trains.

    Raises ValueError naming the tensor and the likely cause. Called once, before the first optimiser step.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    mine: set[int] = set()
    for adapter in found:
        in_place = set(adapter._info.owned)
        asleep = {id(p) for d in adapter.deltas.values() if getattr(d, "asleep", False) for p in d.parameters()}
        for name, p in adapter.named_parameters():
            mine.add(id(p))
            where = f"adapter {adapter.name!r}: {name}"
            if not p.requires_grad:
                raise ValueError(f"{where} does not require a gradient; other code froze it after attach")
            if id(p) not in held:
                raise ValueError(f"{where} is not in the optimiser; build it after attach, from adapter.groups(lr)")
            if p.dtype in (torch.float16, torch.bfloat16) and name.partition(".")[2] not in in_place:
                raise ValueError(
                    f"{where} is {p.dtype}: the model was cast after attach; cast it first, deltas stay fp32"
                )
            if p.grad is None and (id(p) in asleep or not p.numel()):  # a resumed run may begin where it is left out
                continue
            if p.grad is None:
                raise ValueError(
                    f"{where} got no gradient: its site did not run, its forward was replaced after attach, or the loss "
                    f"reads the layer's weight past the delta"
                )
            if not torch.isfinite(p.grad).all():
                raise ValueError(
                    f"{where} has a gradient that is not finite at the first step; lower the learning rate"
                )
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in mine:
            raise ValueError(f"{name} is trained though no adapter declares it; requires_grad was set by other code")


class ScheduleCallback(TrainerCallback):
    """The schedules' events for any Trainer, TRL's included; and the liveness check before the first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, trained(model)
        self.schedules = Schedules(self.found)
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16 and any(s.has_penalty for s in self.schedules.each.values()):
            raise ValueError("fp16 scales the loss, and a method's penalty would not be scaled with it; train in bf16")
        self.schedules.begin(kwargs["optimizer"], state.max_steps, args.gradient_accumulation_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.checked:
            check_alive(self.model, kwargs["optimizer"], self.found)
            self.checked = True
        self.schedules.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedules.after_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedules.end()

    def restore(self, folder: str) -> None:
        """The schedules' state from a checkpoint; any Trainer that resumes calls it, see `hf.install_trainer`."""
        self.schedules.load_state_dict(torch.load(os.path.join(folder, SCHEDULES), weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        states = self.schedules.state_dict()  # on every rank, since it may gather
        if args.should_save:
            torch.save(states, os.path.join(folder, SCHEDULES))


class AdapterTrainer(Trainer):
    """A Trainer whose optimiser comes from the adapters' groups and whose checkpoints hold adapters alone.

    The loss of a step of several passes, or on several devices, is the mean of theirs. The Trainer takes it from the signature
    that a forward with **kwargs divides its loss by the number of labels of the whole step, `num_items_in_batch`, as causal
    language models do; most others take it and do not (classifiers, T5, BART), and their gradients would be as many times
    too large as there are passes. So the loss is asked, once.
    """

    def __init__(
        self, model: nn.Module, *args: Any, head_lr: float | None = None, distil: Distil | None = None, **kwargs: Any
    ) -> None:
        self.events, self.head_lr, self.distil = ScheduleCallback(model), head_lr, distil
        self.reads_n_items: bool | None = None  # does the loss read num_items_in_batch? None until it was asked
        if distil is not None:
            distil.check(model)
        super().__init__(model, *args, **kwargs)
        if distil is not None:  # its loss is a mean over the micro-batch, which the Trainer then scales itself
            self.model_accepts_loss_kwargs = False
        self.add_callback(self.events)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.distil is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self.distil.loss(model, inputs, self.events.model)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        args = self.args
        several = args.gradient_accumulation_steps > 1 or args.world_size > 1 or args.n_gpu > 1
        if n_items is not None and several and self.compute_loss_func is None:
            if self.reads_n_items is None:
                self.reads_n_items = self._ask(batches[0], n_items)
            if self.reads_n_items is False:
                self.model_accepts_loss_kwargs, n_items = False, None
        return batches, n_items

    @torch.no_grad()
    def _ask(self, batch: Any, n_items: Any) -> bool | None:
        """Is the loss of one batch another where the step is said to have twice as many labels? None where it is 0."""
        losses = []
        with looking(self.events.model, False, self.args.seed), self.compute_loss_context_manager():
            for n in (n_items, 2 * n_items):
                inputs = dict(self._prepare_inputs(batch))  # a loss of its own takes the labels out of it
                losses.append(self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=n).float().mean())
        one, two = losses
        said = torch.where(one == 0, -1, (~torch.isclose(one, two, rtol=1e-3, atol=0.0)).int())
        heard = int(self.accelerator.gather(said[None]).max())  # one answer for all ranks, else some wait for others
        return None if heard < 0 else bool(heard)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            for schedule in self.events.schedules.waiting():
                schedule.calibrate(self._calibration(schedule), lambda m, batch: m(**batch).loss)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.events.schedules.groups(self.args.learning_rate, self.args.weight_decay, self.head_lr)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _calibration(self, schedule: Schedule) -> Iterator[Any]:
        """The rows or batches of the training rows that the schedule looks at, in an order that the seed gives.

        Where there are too few for its batches they come again, each time in another order. The training's order is not
        touched. Raises ValueError where the rows cannot be counted.
        """
        if not has_length(self.train_dataset):
            raise ValueError(
                f"adapter {schedule.adapter.name!r}: {type(schedule).__name__} looks at data first, and these training rows "
                f"cannot be counted; call adapter.calibrate(batches) before the trainer"
            )
        n_rows, (most, unit), size = len(self.train_dataset), schedule.looks_at, self.args.train_batch_size  # type: ignore[arg-type]
        n = min(most, n_rows) if unit == "rows" else most * size
        draw = torch.Generator().manual_seed(self.args.seed)
        order = torch.cat([torch.randperm(n_rows, generator=draw) for _ in range(0, n, n_rows)])[:n]
        rows: Any = torch.utils.data.Subset(self.train_dataset, order.tolist())  # type: ignore[arg-type]
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        for batch in torch.utils.data.DataLoader(rows, size, collate_fn=collate):
            yield self._prepare_inputs(batch)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        assert folder is not None
        every = adapters(self.events.model)  # also those that are not trained: who resumes asks for all
        for name, adapter in every.items():
            adapter.save(folder if len(every) == 1 else os.path.join(folder, name))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))
