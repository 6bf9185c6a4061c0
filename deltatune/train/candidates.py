"""Several candidates at once: N adapters on one frozen base, one forward and one backward a step, each with its own optimiser.

    together = candidates(model, [Candidate(dt.LoRA(r=8), lr=1e-3), Candidate(dt.LoRA(r=16), lr=3e-4, seed=1)])
    fitted = fit_together(together, rows, collate, Plan(n_steps=1000))    # what fit alone does with each candidate's plan
    with together.alone(0): predict(model, ...)
    together.split()[0].save("out")

A batch is N blocks of rows, each under its own adapter and head (train/blocks.py). The gradient of sum_k L_k, L_k the mean over
block k's rows, is for candidate k's tensors that of L_k alone, so that all are trained as if each were by itself: from the same
start, on the same rows in the same order, clipped by its own norm. What differs is padding, to the longest row of all blocks,
and what dropout draws. A candidate whose loss or gradient is not finite stops there, at the tensors it had; the others go on.
"""

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from ..core.adapter import Adapter, only
from ..core.attach import attach
from ..core.calibrate import looking, predicts_next
from ..core.compose import Tree
from ..core.method import Method, named
from ..core.schedule import Schedule
from .blocks import Blocks
from .data import Collate, Row, Rows
from .fit import Fitted, Plan, Progress, options_of
from .multitask import _Joint, heads_of
from .trainer import check_alive

Loss = Callable[[nn.Module, Tensor, Mapping[str, Tensor]], Tensor]  # model, logits and batch of one candidate's rows


@dataclass(frozen=True)
class Candidate:
    """One method with the seed of its start and its own learning rates; `tree` is a tree or a method's name."""

    tree: Tree | str
    lr: float = 1e-3
    head_lr: float | None = None  # None: the same
    seed: int = 0  # of its start and of its order of rows

    def plan(self, plan: Plan) -> Plan:
        """What `fit` is to be given to train this candidate alone."""
        return replace(plan, lr=self.lr, head_lr=self.head_lr, seed=self.seed)


@dataclass
class FittedTogether(Fitted):
    """What a run left of one candidate; its times are those of all together."""

    diverged: int | None = (
        None  # the step, counted from 1, whose loss or gradient was not finite: it did not take that step
    )


class Together:
    """Candidates that stand on one model. Outside of `rows` and `alone` they are off: the model is its base."""

    def __init__(self, model: nn.Module, each: Sequence[Candidate], found: Sequence[Adapter]) -> None:
        self.model, self.candidates, self.adapters = model, tuple(each), tuple(found)

    @contextlib.contextmanager
    def rows(self, sizes: Sequence[int]) -> Iterator[None]:
        """Inside, a batch is `sizes[k]` rows of candidate k one behind the other; 0 leaves one out.

        The backward belongs inside too. Raises ValueError where there is not one size for each, or nothing to run.
        """
        if len(sizes) != len(self.adapters) or min(sizes) < 0 or not any(sizes):
            raise ValueError(
                f"{len(self.adapters)} candidates need a number of rows each, 1 for one at least, not {list(sizes)}"
            )
        running = [(a, n) for a, n in zip(self.adapters, sizes, strict=True) if n]
        frame = self.model.__dict__["_deltatune"].frame
        frame.among = Blocks([a._info.switch for a, _ in running], [n for _, n in running])
        try:
            for adapter, _ in running:
                adapter.enable()
            yield
        finally:
            frame.among = None
            for adapter, _ in running:
                adapter.disable()

    @contextlib.contextmanager
    def alone(self, k: int) -> Iterator[Adapter]:
        """The model under candidate k, as under any adapter, inside a `with`."""
        adapter = self.adapters[k]
        others = {a.name: a for a in self.adapters}
        with only(others, {adapter.name}):
            yield adapter

    def losses(self, batch: Mapping[str, Tensor], sizes: Sequence[int], loss: "Loss | None" = None) -> list[Tensor]:
        """One loss for each candidate that has rows, in order; inside `rows(sizes)`. `loss` is `mean_loss` by default."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if (
            getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            and "decoder_input_ids" not in inputs
        ):
            shifted = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if shifted is not None:
                inputs["decoder_input_ids"] = shifted(labels=batch["labels"])
        logits = self.model(**inputs).logits
        if len(logits) != sum(sizes):
            raise ValueError(
                f"the model gives {len(logits)} rows of logits for {sum(sizes)} rows; give it a loss of its own"
            )
        found, at = [], 0
        for n in sizes:
            if n:
                own = {k: v[at : at + n] for k, v in batch.items()}
                found.append((loss or mean_loss)(self.model, logits[at : at + n], own))
            at += n
        return found

    def split(self) -> tuple[Adapter, ...]:
        """Each candidate as an adapter of its own, to save, enable or detach; all are off."""
        return self.adapters

    def detach(self) -> None:
        """Take all of them off the model."""
        for adapter in reversed(self.adapters):
            adapter.detach()


def candidates(model: nn.Module, each: Sequence[Candidate], *, head: str | None = "auto") -> Together:
    """Attach all of them, named candidate0, candidate1, ..., off until they run together.

    Each starts as `torch.manual_seed(seed)` and `dt.attach(model, tree, seed=seed, head=head)` would alone. Raises ValueError naming
    the candidate, and changes nothing, where one cannot share a forward or a loop with others, or does not attach.
    """
    if not each:
        raise ValueError("no candidates; give one at least")
    trees = [_tree(k, candidate) for k, candidate in enumerate(each)]
    for k, (candidate, tree) in enumerate(zip(each, trees, strict=True)):
        for _, leaf in tree.leaves():
            if why := _why_not(leaf.method) or ("looks at data for its start" if leaf.method.starts_on else ""):
                raise ValueError(f"candidate {k}, {leaf.method.name}: it {why}; train it alone")
        for key, value in (("lr", candidate.lr), ("head_lr", candidate.head_lr)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"candidate {k}: {key} = {value}, but a learning rate lies above 0")
    found: list[Adapter] = []
    device = next(model.parameters()).device
    try:
        for k, (candidate, tree) in enumerate(zip(each, trees, strict=True)):
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(candidate.seed)
                try:
                    found.append(attach(model, tree, name=f"candidate{k}", head=head, seed=candidate.seed))
                    course = found[-1].schedule
                except ValueError as error:
                    raise ValueError(f"candidate {k}: {error}") from None
            adapter = found[-1]
            adapter.disable()
            if any(getattr(course, word) for word in _COURSE):
                raise ValueError(f"candidate {k}: it {_course(type(course))}; train it alone")
            for delta in adapter.deltas.values():
                if why := _why_not(delta):
                    raise ValueError(f"candidate {k}, {delta.name} at {delta.site.name}: it {why}; train it alone")
    except BaseException:
        for adapter in reversed(found):
            adapter.detach()
        raise
    return Together(model, each, found)


def _tree(k: int, candidate: Candidate) -> Tree:
    try:
        return named(candidate.tree)() if isinstance(candidate.tree, str) else candidate.tree
    except ValueError as error:
        raise ValueError(f"candidate {k}: {error}") from None


_APART = frozenset({"block", "attention", "input", "experts"})  # get more than rows of one tensor, or not rows at all


def _why_not(method: "Method | type[Method]") -> str:
    """Why a method, or one of its deltas, cannot share a forward or a loop; "" where it can."""
    site = None if isinstance(method, type) else method.site
    if method.in_place:
        return "trains the base itself, which all candidates share"
    if method.rebases or method.quantised:
        return "changes the base, or asks for one of its own"
    if method.schedule is not None and any(getattr(method.schedule, word) is True for word in _COURSE):
        return _course(method.schedule)
    if method.has_kv or method.has_tokens or method.has_embed:
        return "puts tokens, keys or values in front, which would move the other candidates' rows"
    if method.reads_call:
        return "reads masks or ids of the whole batch"
    if site is not None and (site.kind in _APART or site.leave is not None) or method.kinds and method.kinds <= _APART:
        return f"stands at {'whole blocks' if site is None else 'a whole ' + site.kind}, which gets more than rows of one tensor"
    return ""


# what a schedule may ask for that only a run of its own can give
_COURSE = ("needs_groups", "needs_data", "resizes", "has_penalty", "hooks_model")


def _course(schedule: type[Schedule]) -> str:
    return f"has a course that is a run's own, {schedule.__name__}"


def mean_loss(model: nn.Module, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over `batch["labels"]` (B) or (B, T), -100 left out: cross entropy, of one value or of values the squared error.

    Of a causal language model position t is held against label t + 1. Several tasks' heads have their own (train/multitask.py).
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"the batch has {', '.join(batch)} and no labels; the collator makes them, or give a loss of your own"
        )
    if isinstance(type(model), _Joint):
        return heads_of(model).losses(logits, labels, batch.get("task_ids")).mean()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return F.mse_loss(logits.view_as(labels), labels.to(logits.dtype))
    if labels.ndim == 2 and predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class _Picked:
    """Rows as a loader draws them; no list, through which accelerate would look for tensors."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows


class _Course:
    """One candidate's optimiser, rates and rows: those that `fit` would make of its plan."""

    def __init__(self, model: nn.Module, adapter: Adapter, plan: Plan, rows: Rows, folder: str) -> None:
        self.adapter, self.plan, self.fitted = adapter, plan, FittedTogether()
        trainer = Trainer(model, options_of(model, plan, folder), data_collator=_Picked, train_dataset=rows)  # type: ignore[arg-type]
        self.loader = trainer.get_train_dataloader()
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        self.optimizer = cls(adapter.groups(plan.lr, plan.weight_decay, plan.head_lr), **options)
        self.scheduler = trainer.create_scheduler(plan.n_steps, self.optimizer)
        self.every = trainer.args.logging_steps
        self.schedule = adapter.schedule
        self.schedule.begin(self.optimizer, plan.n_steps)
        self.state = torch.get_rng_state()  # the order of rows comes from it, and goes on from where it was left
        self.drawn = self._draw()
        self.since: list[float] = []
        self.n_tokens = 0

    def _draw(self) -> Iterator[_Picked]:
        epoch = 0
        while True:
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(epoch)
            yield from self.loader
            epoch += 1

    def next(self) -> list[Row]:
        """The rows of the next step."""
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(self.state)
            rows = next(self.drawn).rows
            self.state = torch.get_rng_state()
        return rows

    def note(self, step: int, loss: float) -> None:
        """Keep the loss; the curve has the mean of each interval, as the Trainer's."""
        self.since.append(loss)
        if step % self.every == 0:
            self.fitted.curve.append((step, sum(self.since) / len(self.since)))
            self.since = []

    def stop(self, step: int) -> None:
        """It diverged."""
        self.fitted.diverged = step
        for p in self.adapter.parameters():
            p.grad = None
        self.adapter.trainable(False)


def fit_together(
    together: Together,
    rows: Rows,
    collate: Collate,
    plan: Plan,
    *,
    loss: "Loss | None" = None,
    progress: Progress | None = None,
) -> list[FittedTogether]:
    """Train all candidates for `plan.n_steps` steps of `plan.batch` rows each; the plan's own rates and seed are not used.

    Before the first step the first candidate is held against the model under it alone: its loss, and that it depends on no other's
    tensors. Raises ValueError where that fails, where a tensor gets no gradient, on `plan.save_steps`, and in several processes.
    """
    model, device = together.model, next(together.model.parameters()).device
    if plan.save_steps:
        raise ValueError(
            f"save_steps = {plan.save_steps}, but candidates that train together write no checkpoints; leave it 0"
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ValueError("candidates train together in one process; give each process candidates of its own")
    n_before = collate.n_tokens
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng([device] if device.type == "cuda" else []):
        each = [
            _Course(model, adapter, candidate.plan(plan), rows, folder)
            for adapter, candidate in zip(together.adapters, together.candidates, strict=True)
        ]
        torch.manual_seed(plan.seed)  # of dropout
        checkpoints = plan.checkpointing and not getattr(model, "is_gradient_checkpointing", False)
        if checkpoints:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        model.train()
        times, begun = [], time.perf_counter()
        try:
            for step in range(1, plan.n_steps + 1):
                at = time.perf_counter()
                if not _step(together, each, step, collate, plan, loss):
                    break
                times.append(time.perf_counter() - at)
                if progress is not None:
                    known = [c.fitted.curve[-1][1] for c in each if c.fitted.curve and c.fitted.diverged is None]
                    rate = (collate.n_tokens - n_before) / (time.perf_counter() - begun)
                    progress(step, plan.n_steps, min(known, default=None), rate)
        finally:
            model.eval()
            if checkpoints:
                model.gradient_checkpointing_disable()  # type: ignore[operator]
            for course in each:
                course.optimizer.zero_grad()
                if course.fitted.diverged is not None:
                    course.adapter.trainable(True)
    seconds = time.perf_counter() - begun
    for schedule in (c.schedule for c in each if c.fitted.diverged is None):
        schedule.end()
    for course in each:
        own = course.fitted
        own.train_s, own.step_ms = seconds, 1e3 * statistics.median(times) if times else 0.0
        own.tokens_per_s = course.n_tokens / seconds
        state = (t for s in course.optimizer.state.values() for t in s.values())
        own.optimizer_bytes = sum(t.nbytes for t in state if hasattr(t, "nbytes") and t.ndim)
    return [course.fitted for course in each]


def _step(
    together: Together, each: list[_Course], step: int, collate: Collate, plan: Plan, loss: "Loss | None"
) -> bool:
    """One step of all that go on; False where none does."""
    model, device = together.model, next(together.model.parameters()).device
    going = [c for c in each if c.fitted.diverged is None]
    if not going:
        return False
    drawn = [c.next() for c in going]
    for course, own in zip(going, drawn, strict=True):
        course.n_tokens += sum(len(row["input_ids"]) for row in own if "input_ids" in row)
    sizes = dict(zip(map(id, going), map(len, drawn), strict=True))
    n_rows = [sizes.get(id(c), 0) for c in each]
    batch = {k: v.to(device) for k, v in collate([row for own in drawn for row in own]).items()}
    lowered = torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16)
    if step == 1:
        with lowered:
            _check(together, batch, n_rows, loss)
    with together.rows(n_rows):
        with lowered:
            losses = together.losses(batch, n_rows, loss)
        torch.stack(losses).sum().backward()
    norms = [
        torch.nn.utils.clip_grad_norm_(c.adapter.parameters(), plan.clip if plan.clip > 0 else math.inf) for c in going
    ]
    known = torch.stack([*map(torch.Tensor.detach, losses), *norms]).tolist()  # the GPU is waited for once
    for course, value, norm in zip(going, known, known[len(going) :], strict=False):
        if not (math.isfinite(value) and math.isfinite(norm)):
            course.stop(step)
    left = [c for c in going if c.fitted.diverged is None]
    if step == 1 and left:
        held = SimpleNamespace(param_groups=[g for c in left for g in c.optimizer.param_groups])
        check_alive(model, held, [c.adapter for c in left])
    for course, value in zip(going, known, strict=False):
        if course.fitted.diverged is None:
            course.schedule.before_step(step - 1)
            course.optimizer.step()
            course.schedule.after_step(step - 1)
            course.scheduler.step()
            course.optimizer.zero_grad()
            course.note(step, value)
    return bool(left)


def _check(together: Together, batch: Mapping[str, Tensor], n_rows: Sequence[int], loss: "Loss | None") -> None:
    """The first candidate's loss is the one that the model has under it alone, and no other's tensors are in it."""
    model = together.model
    own = {k: v[: n_rows[0]] for k, v in batch.items()}
    with looking(model, False, 0):
        with together.rows(n_rows):
            joint = together.losses(batch, n_rows, loss)[0]
            others = [p for a in together.adapters[1:] for p in a.parameters()]
            grads = torch.autograd.grad(joint, others, allow_unused=True) if others else ()
        with together.alone(0), torch.no_grad():
            made = model(**own)
            theirs = made.get("loss") if loss is None else None
            alone = (loss or mean_loss)(model, made.logits, own) if theirs is None else theirs
    # no numbers are another's own, that are 0 times what is none
    if any(g is not None and bool(g.nan_to_num(0.0, 0.0, 0.0).any()) for g in grads):
        raise ValueError(
            "candidate 0's loss depends on another candidate's tensors: this backbone does not keep rows apart"
        )
    value, want = joint.item(), float(alone)
    if math.isfinite(want) and not abs(value - want) <= _slack(model) * (1 + abs(want)):
        raise ValueError(
            f"candidate 0's loss is {value:.6g} beside the others and {want:.6g} alone: give fit_together the model's own `loss`, or "
            f"train the candidates one by one"
        )


def _slack(model: nn.Module) -> float:
    return max(float(torch.finfo(p.dtype).eps ** 0.5) for p in model.parameters() if p.is_floating_point())
