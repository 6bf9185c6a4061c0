"""What changes while training: parameter groups, ranks, masks, freezing, penalties, phases.

A `Schedule` belongs to one adapter. Our trainer, the plain `TrainerCallback` and a hand-written loop call the same
events in the same order:

    calibrate(batches, loss)             once, where the method looks at data first (`needs_data`): before the optimiser
    begin(optimizer, n_steps, n_micro)   once, when the optimiser exists; the number of optimiser steps is fixed here
    before_step(step), optimizer.step(), after_step(step), optimizer.zero_grad()
    end()

Gradients are still there in `after_step`. `state_dict` makes the schedule resumable at any step.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .adapter import Adapter
    from .method import Method


class Schedule:
    """The schedule that changes nothing; a method's own overrides the events it needs."""

    needs_groups = False  # True: the optimiser must have been built from `groups`; `begin` raises where it was not
    has_penalty = False  # True: it adds to gradients what is not scaled with the loss
    resizes = False  # True: it changes the shape of what is trained in mid-run, which DDP and FSDP do not follow
    hooks_model = False  # True: it hooks the model's own forward, which sees the rows of all that run there
    needs_data = False  # True: `calibrate` must have run; `begin` raises where it did not
    # what `calibrate` looks at, at most: so many rows, each once, or so many batches, over the rows again where they are few
    looks_at: tuple[int, Literal["rows", "batches"]] = (1024, "rows")

    def __init__(self, adapter: "Adapter") -> None:
        self.adapter = adapter
        self.n_steps = 0

    def calibrate(self, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> None:
        """Look at data before training. Raises ValueError where the method has no use for it."""
        names = ", ".join(sorted({leaf.method.name for _, leaf in self.adapter.tree.leaves()}))
        raise ValueError(f"adapter {self.adapter.name!r}: {names} needs no calibration data")

    def common(self, deltas: "Iterable[Method]", *keys: str) -> Any:
        """The hyperparameters of all `deltas`. Raises ValueError where they differ: in `keys`, or without any at all."""
        first, *others = deltas
        for d in others:
            if d.name != first.name:
                raise ValueError(f"adapter {self.adapter.name!r}: {first.name} and {d.name} have no course in common")
            for key in keys or first.config.__dataclass_fields__:
                one, other = getattr(first.config, key), getattr(d.config, key)
                if one != other:
                    raise ValueError(
                        f"adapter {self.adapter.name!r}: {first.name} has one {key} for all its sites, not {one!r} at "
                        f"{first.site.name} and {other!r} at {d.site.name}"
                    )
        return first.config

    def groups(self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: vectors take no weight decay, the task head its own rate where one is given."""
        heads, factors = {id(p) for p in self.adapter.head_parameters()}, self.adapter.lr_factors()
        parts: dict[tuple[bool, bool, float], list[Tensor]] = {}
        for p in self.adapter.parameters():
            parts.setdefault((id(p) in heads, p.ndim > 1, factors.get(id(p), 1.0)), []).append(p)
        return [
            {
                "params": ps,
                "lr": factor * (head_lr if of_head and head_lr is not None else lr),
                "weight_decay": weight_decay if matrix else 0.0,
                "factor": factor,
            }
            for (of_head, matrix, factor), ps in parts.items()
        ]

    def begin(self, optimizer: torch.optim.Optimizer, n_steps: int, n_micro: int = 1) -> None:
        """Called once before the first step; `n_micro` is the number of backward passes of one step.

        Raises ValueError where the optimiser misses what the schedule needs, or the data was not looked at.
        """
        self.n_steps = n_steps
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.resizes and there and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"adapter {self.adapter.name!r}: {type(self).__name__} changes in mid-run how much is trained, and the other "
                f"processes of DDP or FSDP would not follow; train it in one process"
            )
        if self.needs_data and not self.adapter._info.calibrated:
            raise ValueError(
                f"adapter {self.adapter.name!r}: {type(self).__name__} looks at data first; call "
                f"adapter.calibrate(batches) before training"
            )
        if self.needs_groups or self.adapter.lr_factors():
            have = {(frozenset(map(id, g["params"])), g.get("factor")) for g in optimizer.param_groups}
            want = [(frozenset(map(id, g["params"])), g.get("factor")) for g in self.groups(1.0)]
            if not all(w in have for w in want):
                raise ValueError(
                    f"adapter {self.adapter.name!r}: its method sets parameter groups of its own; build the "
                    f"optimiser from adapter.groups(lr, weight_decay)"
                )

    def before_step(self, step: int) -> None:
        """Before the optimiser's step number `step`, counted from 0; gradients are complete."""

    def after_step(self, step: int) -> None:
        """After the optimiser's step; gradients are still there."""

    def end(self) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"n_steps": self.n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.n_steps = state["n_steps"]


class Schedules:
    """The schedules of several adapters, called as one: what a trainer or a hand-written loop holds."""

    def __init__(self, adapters: Iterable["Adapter"]) -> None:
        self.each = {a.name: a.schedule for a in adapters}

    def groups(self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
        """Every adapter's parameter groups."""
        return [g for s in self.each.values() for g in s.groups(lr, weight_decay, head_lr)]

    def waiting(self) -> list[Schedule]:
        """Those that need data and have not seen any."""
        return [s for s in self.each.values() if s.needs_data and not s.adapter._info.calibrated]

    def calibrate(self, batches: Callable[[], Iterable[Any]], loss: Callable[[Any, Any], Tensor]) -> None:
        """`Schedule.calibrate` of each that waits for it; `batches()` starts them anew."""
        for s in self.waiting():
            s.calibrate(batches(), loss)

    def begin(self, optimizer: torch.optim.Optimizer, n_steps: int, n_micro: int = 1) -> None:
        """`Schedule.begin` of each."""
        for s in self.each.values():
            s.begin(optimizer, n_steps, n_micro)

    def before_step(self, step: int) -> None:
        """`Schedule.before_step` of each."""
        for s in self.each.values():
            s.before_step(step)

    def after_step(self, step: int) -> None:
        """`Schedule.after_step` of each."""
        for s in self.each.values():
            s.after_step(step)

    def end(self) -> None:
        """`Schedule.end` of each."""
        for s in self.each.values():
            s.end()

    def state_dict(self) -> dict[str, Any]:
        """By adapter name."""
        return {name: s.state_dict() for name, s in self.each.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; ValueError where the adapters are not those of the state."""
        if state.keys() != self.each.keys():
            raise ValueError(f"the saved schedules are of adapters {sorted(state)}, here are {sorted(self.each)}")
        for name, s in self.each.items():
            s.load_state_dict(state[name])


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, penalty: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad.new_full((), ctx.scale, dtype=torch.float32), None


def ride(y: Tensor, penalty: Tensor, scale: float = 1.0) -> Tensor:
    """`y` unchanged; in the backward the scalar fp32 `penalty` receives the gradient `scale`.

    A penalty on a delta's tensors thus needs no hook on the loss. `scale` carries gradient accumulation and the loss
    scale of mixed precision.
    """
    out = _Ride.apply(y, penalty, scale)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
