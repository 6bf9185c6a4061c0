"""Statistics of a model over a few batches: what masks, prunings, starts and posteriors are made of.

    found = collect(model, batches, loss, {"fisher": Gradients({"w": w}), "inputs": Covariance({"q": layer})}, rows="example")
    found["fisher"]["w"], found["inputs"]["q"]

One pass, streaming: only the sums are kept. The batches are taken as they come, so a loader with a seed gives the same
numbers again; a progress bar goes around the loader. The model is left as it was.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .base import own_class

Loss = Callable[[Any, Any], Tensor]


class Statistic(Protocol):
    """What `collect` fills: it may hook modules, says of what it needs the loss's gradient, and sees each pass."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Those that are there before a forward."""

    def begin(self) -> None:
        """Before the first pass: make the sums, set the hooks."""

    def made(self) -> list[Tensor]:
        """What the forward that just ran made, whose gradient is wanted too."""

    def see(self, grads: Mapping[str, Tensor | None], of_made: Sequence[Tensor | None], real: Tensor | None) -> None:
        """After one forward and backward; `real` (B, T) are the tokens that are no padding."""

    def end(self) -> None:
        """Take the hooks off, whatever happened."""

    def result(self, n_passes: int) -> dict[str, Tensor]:
        """The statistic, by name."""


class Gradients:
    """The mean over passes of `of(d loss / d tensor, tensor)`, in fp32, one of a tensor's shape per name.

    The default, the square, is with rows="example" the diagonal of the empirical Fisher information; |g| a first-order
    saliency, |g t| a sensitivity, g itself the mean gradient. Of several processes all take part, and have the same mean:
    by rounding alone each would choose another mask.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], of: Callable[[Tensor, Tensor], Tensor] = lambda g, t: g.square()
    ) -> None:
        self.tensors: Mapping[str, Tensor] = dict(tensors)
        self.of = of

    def begin(self) -> None:
        self.total = {n: torch.zeros(t.shape, dtype=torch.float32, device=t.device) for n, t in self.tensors.items()}

    def made(self) -> list[Tensor]:
        return []

    def see(self, grads: Mapping[str, Tensor | None], of_made: Sequence[Tensor | None], real: Tensor | None) -> None:
        for name, t in self.tensors.items():
            grad = grads[name]
            if grad is None:
                raise ValueError(f"calibrate: the loss does not depend on {name}")
            self.total[name] += self.of(grad.float(), t.detach().float())

    def end(self) -> None:
        pass

    def result(self, n_passes: int) -> dict[str, Tensor]:
        found = {n: t / n_passes for n, t in self.total.items()}
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        n_processes = torch.distributed.get_world_size() if there else 1
        for name, mean in found.items():
            if n_processes > 1:
                torch.distributed.all_reduce(mean)
                mean /= n_processes
            if not bool(mean.isfinite().all()):  # else those that are no numbers would be the largest
                raise ValueError(f"calibrate: the gradients of {name} are not finite")
        return found


class Covariance:
    """E[v v^T] over real tokens, (D, D) in fp32, of the modules' inputs, of their outputs or of the loss's gradient there.

    Not centred; of an fp64 model in fp64. A gradient is that of the loss as it is given: a mean over B rows makes it 1 / B
    of a row's own.
    """

    def __init__(self, modules: Mapping[str, nn.Module], of: Literal["input", "output", "gradient"] = "input") -> None:
        if of not in ("input", "output", "gradient"):
            raise ValueError(f"calibrate: a covariance is of 'input', 'output' or 'gradient', not {of!r}")
        self.modules, self.of = dict(modules), of
        self.tensors: Mapping[str, Tensor] = {}

    def begin(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count = dict.fromkeys(self.modules, 0)
        self.seen: list[tuple[str, Tensor]] = []
        self.handles = [m.register_forward_hook(self._hook(n), with_kwargs=True) for n, m in self.modules.items()]

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            if self.of == "input":
                self.seen.append((name, (args[0] if args else next(iter(kwargs.values()))).detach()))
                return None
            head = out[0] if isinstance(out, tuple) else out
            if self.of == "output":
                self.seen.append((name, head.detach()))
                return None
            if not head.requires_grad:  # nothing below is trained: the graph begins here
                head = head.detach().requires_grad_()
            self.seen.append((name, head))
            return (head, *out[1:]) if isinstance(out, tuple) else head

        return hook

    def made(self) -> list[Tensor]:
        return [t for _, t in self.seen] if self.of == "gradient" else []

    def see(self, grads: Mapping[str, Tensor | None], of_made: Sequence[Tensor | None], real: Tensor | None) -> None:
        values = of_made if self.of == "gradient" else [t for _, t in self.seen]
        for (name, _), value in zip(self.seen, values, strict=True):
            if value is None:
                continue
            fits = real is not None and value.ndim == 3 and value.shape[:2] == real.shape
            rows = value[real] if fits else value.flatten(0, -2)
            self.add(name, rows if rows.dtype == torch.float64 else rows.float())
            self.count[name] += len(rows)
        self.seen.clear()

    def add(self, name: str, rows: Tensor) -> None:
        """Take in the vectors (n, D) that one forward gave there."""
        if name not in self.total:
            self.total[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total[name].addmm_(rows.t(), rows)

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def result(self, n_passes: int) -> dict[str, Tensor]:
        for name, n in self.count.items():
            if not n:
                raise ValueError(f"calibrate: {name} did not run, or has no gradient")
        return {n: t / self.count[n] for n, t in self.total.items()}


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    statistics: Mapping[str, Statistic],
    *,
    rows: Literal["batch", "example"] = "batch",
    most: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Each statistic over `batches`, all in one pass; `loss(model, batch)` is a scalar.

    With rows="example" each row of a batch, a mapping of tensors, is a pass of its own; `most` ends it after so many
    passes. `requires_grad` and `.grad` of all tensors are left as they were.

    Raises ValueError where there is no batch, where the loss does not depend on a tensor, or a gradient is not finite.
    """
    each = list(statistics.values())
    fixed = list({id(t): t for s in each for t in s.tensors.values()}.values())
    before = [t.requires_grad for t in fixed]
    n_passes = 0
    try:
        for statistic in each:
            statistic.begin()
        for t in fixed:
            t.requires_grad_(True)
        for batch in _passes(batches, rows, most):
            with torch.enable_grad():
                value = loss(model, batch)
                asked = [*fixed, *(t for s in each for t in s.made())]
                found: list[Tensor | None] = [None] * len(asked)
                if asked and value.requires_grad:
                    found = list(torch.autograd.grad(value, asked, allow_unused=True))
            by_id = dict(zip(map(id, fixed), found, strict=False))
            of_made = iter(found[len(fixed) :])
            for statistic in each:
                own = [next(of_made) for _ in statistic.made()]
                statistic.see({n: by_id[id(t)] for n, t in statistic.tensors.items()}, own, _real(batch))
            n_passes += 1
    finally:
        for statistic in each:
            statistic.end()
        for t, required in zip(fixed, before, strict=True):
            t.requires_grad_(required)
    if not n_passes:
        raise ValueError("calibrate: no batch was given")
    return {key: statistic.result(n_passes) for key, statistic in statistics.items()}


def _passes(batches: Iterable[Any], rows: str, most: int | None) -> Iterator[Any]:
    done = 0
    for batch in batches:
        n_rows = len(next(iter(batch.values()))) if rows == "example" else 1
        for i in range(n_rows):
            yield {k: v[i : i + 1] for k, v in batch.items()} if rows == "example" else batch
            done += 1
            if done == most:  # before another batch is asked for
                return


@contextlib.contextmanager
def looking(model: nn.Module, training: bool, seed: int) -> Iterator[None]:
    """The model in that mode, and what it draws from `seed`; afterwards both as they were, batch norms' means too."""
    modes = [(m, m.training) for m in model.modules()]
    kept = [(b, b.clone()) for m in model.modules() if "running_mean" in m._buffers for b in m.buffers(False)]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        torch.default_generator.manual_seed(seed)
        for device in devices:  # torch.manual_seed reseeds the other GPUs too
            torch.cuda.default_generators[device.index].manual_seed(seed)
        try:
            model.train(training)
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            for buffer, value in kept:
                buffer.copy_(value)


def predicts_next(model: nn.Module) -> bool:
    """Is what the model answers at a token about the next one, as its own loss takes it? A decoder's, by transformers' names."""
    name, both = own_class(model).__name__, getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not both and name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _real(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def gradients(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Loss,
    of: Callable[[Tensor], Tensor] = torch.square,
) -> dict[str, Tensor]:
    """mean over `batches` of `of(d loss / d tensor)`, in fp32, one tensor per name: `collect` of one `Gradients`."""
    return collect(model, batches, loss, {"": Gradients(tensors, lambda g, t: of(g))})[""]
