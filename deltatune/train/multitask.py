"""Several tasks on one backbone with one adapter: a head for each task, rows of all tasks in one batch, one loss.

    model, tokenizer = load_joint("minilm", tasks)                  # tasks: of deltatune.tasks, in the order of their ids
    adapter = dt.attach(model, "hyperformer", n_tasks=len(tasks))   # a method that reads no task ids does as well
    rows = mixed(joint_rows(tasks, "train", tokenizer), 32 * 1000)  # also the rows that AdapterTrainer is given
    fit(model, rows, JointCollate(tokenizer), Plan(n_steps=1000))
    evaluate(model, tasks, joint_rows(tasks, "test", tokenizer), JointCollate(tokenizer))
    save_joint(adapter, "out")                                      # the adapter, all heads, and what they are heads of
    model, tokenizer = load_joint("minilm", "out")
    adapter = dt.load(model, "out")

Tasks are drawn as in HyperFormer's code (2106.04489): p_i = n_i^(1/T) / sum_j n_j^(1/T). A batch holds rows of all tasks, as in
MOELoRA's (2310.18339), which shuffles them all together; HyperFormer's takes one task for a whole batch. The expected gradient is
the same, and rows of several tasks give it with less noise. The loss is the mean over rows, each row's by its own head:
L = 1/B sum_b l_b = sum_i n_i/B L_i, whose expectation is sum_i p_i L_i.

The model keeps its class's name and its modules' names, so that adapters of single tasks and of several fit one another's
backbones. Its logits are those of all heads side by side, (B, sum_i C_i); `heads_of(model).columns` says which are a task's.
"""

import copy
import copyreg
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..core.adapter import Adapter
from ..core.errors import unknown
from ..core.files import write_atomic
from ..core.record import HEAD
from ..core.site import all_sites
from .backbone import load_classifier
from .data import Collate, Row, Rows, encode, predict

FILE = "tasks.json"  # beside the adapter's own two files
FORMAT = 1


class Examples(Protocol):
    """Rows of one split: one or two texts each, and a class or a value."""

    @property
    def texts(self) -> Sequence[Sequence[str]]: ...
    @property
    def targets(self) -> Sequence[Any]: ...


class AnyTask(Protocol):
    """What is read of a `deltatune.tasks.Task`; `train` knows no tasks itself."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def splits(self) -> Mapping[str, Any]: ...
    def scores(self, outputs: Any, targets: Any) -> dict[str, float]: ...


@dataclass(frozen=True)
class TaskHead:
    """What a model knows of a task: its name, its classes (none: one value), what a value's squared error is divided by."""

    name: str
    labels: tuple[str, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.labels and not 0 < self.scale < math.inf:
            raise ValueError(f"task {self.name!r}: scale = {self.scale}, but an error is divided by a number above 0")

    @classmethod
    def of(cls, task: "AnyTask | TaskHead") -> "TaskHead":
        """The head of a task. Of a value, `scale` is the variance of the training rows: guessing their mean has the loss 1,
        beside the log C of guessing among C classes, so that no task outweighs the others by its unit."""
        if isinstance(task, TaskHead):
            return task
        if task.labels:
            return cls(task.name, tuple(task.labels))
        values = torch.tensor(task.splits["train"].targets, dtype=torch.float64)
        scale = float(values.var(correction=0))
        if not scale > 0:
            raise ValueError(f"task {task.name!r}: all {len(values)} training rows have the value {float(values[0]):g}")
        return cls(task.name, (), scale)

    @property
    def n_outputs(self) -> int:
        """Width of the head."""
        return len(self.labels) or 1

    @property
    def key(self) -> str:
        """The name of its module: `glue/cola` is `glue_cola`."""
        return re.sub(r"\W+", "_", self.name)


class Heads(nn.Module):
    """The task heads in the one head's place: all of them on all rows, side by side. They are small beside any backbone."""

    first: Tensor  # (n_tasks), the first column of each
    mine: Tensor  # (n_tasks, sum C), which columns are whose
    scale: Tensor  # (n_tasks), of values; 0 marks classes

    def __init__(self, tasks: Sequence[TaskHead], make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        widths = torch.tensor([task.n_outputs for task in self.tasks])
        self.register_buffer("first", widths.cumsum(0) - widths, persistent=False)
        owners = torch.arange(len(self.tasks)).repeat_interleave(widths)
        self.register_buffer("mine", owners == torch.arange(len(self.tasks))[:, None], persistent=False)
        scales = [0.0 if task.labels else task.scale for task in self.tasks]
        self.register_buffer("scale", torch.tensor(scales), persistent=False)
        for task in self.tasks:
            if hasattr(self, task.key):
                raise ValueError(
                    f"task {task.name!r}: {task.key!r} is taken, by another task or by this module; rename it"
                )
            self.add_module(task.key, make(task.n_outputs))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([getattr(self, task.key)(*args, **kwargs) for task in self.tasks], -1)

    def number(self, name: str) -> int:
        """The id of a task. Raises ValueError with the nearest names."""
        names = [task.name for task in self.tasks]
        if name not in names:
            raise unknown("task", name, names)
        return names.index(name)

    def columns(self, name: str) -> slice:
        """Which of the model's logits are this task's."""
        i = self.number(name)
        start = sum(task.n_outputs for task in self.tasks[:i])
        return slice(start, start + self.tasks[i].n_outputs)

    def losses(self, logits: Tensor, labels: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """(B), each row's own: -log softmax of its task's classes, or the squared error of a value over its task's scale.

        Raises ValueError where ids or classes are missing, or are not there.
        """
        n, k = len(logits), len(self.tasks)
        if task_ids is None and k == 1:
            task_ids = torch.zeros(n, dtype=torch.long, device=logits.device)
        if task_ids is None or task_ids.shape != (n,) or labels.shape != (n,):
            got = "none" if task_ids is None else tuple(task_ids.shape)
            raise ValueError(
                f"a loss of {n} rows of {k} tasks needs task_ids and labels of shape ({n},), not {got} and {tuple(labels.shape)}"
            )
        if not torch.compiler.is_compiling() and (wrong := task_ids[(task_ids < 0) | (task_ids >= k)]).numel():
            raise ValueError(f"task id {int(wrong[0])}, but the model has heads of the tasks 0 to {k - 1}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mine, scale, first = self.mine[task_ids], self.scale[task_ids].to(logits.dtype), self.first[task_ids]
        is_value = scale > 0
        target = torch.where(is_value, 0, labels.long())
        if not torch.compiler.is_compiling() and bool(
            (odd := (target < 0) | (target >= mine.sum(1)) | ~is_value & (labels != target)).any()
        ):
            row = int(odd.nonzero()[0])
            task = self.tasks[int(task_ids[row])]
            raise ValueError(
                f"row {row}: label {labels[row].item():g}, but {task.name} has the classes 0 to {task.n_outputs - 1}"
            )
        entropy = F.cross_entropy(logits.masked_fill(~mine, -math.inf), first + target, reduction="none")
        error = logits.gather(1, first[:, None])[:, 0] - labels.to(logits.dtype)
        return torch.where(is_value, error.square() / scale.where(is_value, 1.0), entropy)


class _Joint(type):
    """The class of the classes below, so that pickle can say how one is made."""


@functools.cache
def _joint_class(cls: type) -> type:
    """`cls`, a classifier of transformers, with a forward that takes `task_ids` and has the loss of all heads."""
    theirs = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    names = [p.name for p in theirs.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels, task_ids = given.pop("labels", None), given.pop("task_ids", None)
        is_plain = given.pop("return_dict", None) is False
        out = cls.forward(self, **given, return_dict=True)  # type: ignore[attr-defined]
        if labels is not None:
            loss = heads_of(self).losses(out.logits, labels, task_ids).mean()
            out = type(out)(loss=loss, **{k: v for k, v in out.items() if k != "loss"})
        return out.to_tuple() if is_plain else out

    own = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(theirs.parameters.values())
    at = len(parameters) - (parameters[-1].kind == inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = theirs.replace(parameters=[*parameters[:at], own, *parameters[at:]])  # type: ignore[attr-defined]
    more = {
        "forward": forward,
        "accepts_loss_kwargs": False,
    }  # the Trainer's word for a loss that is a mean of its batch
    about = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return _Joint(cls.__name__, (cls,), {**about, **more})


def _reduce(cls: _Joint) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _joint_class, cls.__bases__


copyreg.pickle(_Joint, _reduce)


def heads_of(model: nn.Module) -> Heads:
    """The model's task heads. Raises ValueError where it has none."""
    found = next((m for m in model.modules() if isinstance(m, Heads)), None)
    if found is None:
        raise ValueError("the model has one head; load_joint or add_heads gives it one for each task")
    return found


def add_heads(model: nn.Module, tasks: "Sequence[AnyTask | TaskHead]") -> nn.Module:
    """Give a classifier of transformers a fresh head for each task, in place, and the loss of all; returns it.

    The head's last module is copied for each task, with as many outputs as the task has; what a model has in front of it
    (DistilBERT's `pre_classifier`) is one for all. Row b of a batch is of task `task_ids[b]`, a number in the order of `tasks`.
    Raises ValueError where adapters stand on the model already, or where it has no head.
    """
    heads = [TaskHead.of(task) for task in tasks]
    config: Any = getattr(model, "config", None)
    if not heads:
        raise ValueError("no task: a model needs one head at least")
    if "_deltatune" in model.__dict__:
        raise ValueError("the model has adapters, and one of them may train its head; add the heads first, then attach")
    if isinstance(type(model), _Joint):
        raise ValueError(f"the model has heads already: {', '.join(task.name for task in heads_of(model).tasks)}")
    n_labels = getattr(config, "num_labels", 0)
    last = [s.module for s in all_sites(model) if s.role == HEAD and s.kind == "linear" and s.d_out == n_labels]
    if not last:
        raise ValueError(
            f"{type(model).__name__} has no task head of num_labels = {n_labels} outputs; AutoModelForSequenceClassification gives one"
        )
    root, _, inner = last[-1].partition(".")
    old = model.get_submodule(root)

    def make(n_outputs: int) -> nn.Module:
        new = copy.deepcopy(old)
        for name, module in [*new.named_modules()]:
            if isinstance(module, nn.Linear):
                fresh = nn.Linear(
                    module.in_features, n_outputs if name == inner else module.out_features, module.bias is not None,
                    module.weight.device, module.weight.dtype,
                )  # fmt: skip
                if name:
                    new.set_submodule(name, fresh)
                else:
                    new = fresh
        return new.apply(model._init_weights)  # type: ignore[arg-type]  # by the architecture's own rule

    made = Heads(heads, make).to(next(old.parameters()).device).train(model.training)
    setattr(model, root, made)
    base: Any = type(model)
    model.__class__ = _joint_class(base)
    words = [f"{task.name}: {label}" if label else task.name for task in heads for label in task.labels or ("",)]
    config.num_labels, config.problem_type = len(words), None
    config.id2label, config.label2id = dict(enumerate(words)), {word: i for i, word in enumerate(words)}
    if hasattr(model, "num_labels"):
        setattr(model, "num_labels", len(words))  # noqa: B010
    return model


def load_joint(
    backbone: str, tasks: "Sequence[AnyTask | TaskHead] | str | os.PathLike[str]"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The backbone with a fresh head for each task, and its tokenizer. A folder that `save_joint` wrote says the tasks too."""
    if isinstance(tasks, (str, os.PathLike)):
        tasks = read_tasks(tasks)
    model, tokenizer = load_classifier(backbone, ("a", "b"))  # two outputs, which the heads replace
    return add_heads(model, tasks), tokenizer


def save_joint(adapter: Adapter, folder: str | os.PathLike[str], *, resumable: bool = False) -> None:
    """`adapter.save`, whose file holds all heads, and beside it `tasks.json`: what they are heads of.

    Raises ValueError where the adapter trains no head: the fresh ones that it was trained under would be lost.
    """
    heads = heads_of(adapter.model)
    if not adapter.n_head:
        raise ValueError(
            f"adapter {adapter.name!r} was attached with head=None: its file would hold none of the {len(heads.tasks)} heads"
        )
    adapter.save(folder, resumable=resumable)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    card = {"format": FORMAT, "tasks": [asdict(task) for task in heads.tasks]}
    write_atomic(Path(folder) / FILE, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())


def read_tasks(folder: str | os.PathLike[str]) -> list[TaskHead]:
    """What `save_joint` wrote of the tasks. Raises ValueError naming the file and what is wrong with it."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE}: save_joint writes it beside an adapter of several tasks")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']}; this version reads format {FORMAT}")
        return [TaskHead(str(t["name"]), tuple(map(str, t["labels"])), float(t["scale"])) for t in card["tasks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from None


def joint_rows(tasks: Sequence[AnyTask], split: str, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Rows:
    """The rows of one split of all tasks, task by task, each with `task_ids`, its task's number."""
    found: list[Row] = []
    for i, task in enumerate(tasks):
        if split not in task.splits:
            raise unknown(f"split of {task.name}", split, task.splits)
        part: Examples = task.splits[split]
        found += [row | {"task_ids": i} for row in encode(part.texts, part.targets, tokenizer, max_length).rows]
    return Rows(found)


def shares(sizes: Sequence[int], temperature: float = 10.0) -> Tensor:
    """p_i = n_i^(1/T) / sum_j n_j^(1/T), fp64: T = 1 draws by size, T = inf all tasks alike, HyperFormer's code has 10."""
    if not temperature > 0 or not sizes or min(sizes) < 1:
        raise ValueError(f"temperature {temperature} must be above 0, and the sizes {list(sizes)} at least 1")
    weights = (torch.tensor(sizes, dtype=torch.float64) / max(sizes)) ** (1.0 / temperature)
    return weights / weights.sum()


def mixed(rows: Rows, n: int, temperature: float = 10.0, seed: int = 0) -> Rows:
    """`n` rows as they are drawn: each time a task, with the probabilities of `shares`, and its next row.

    Of one task each row comes once before any comes again. What a Trainer is given in this way is also what methods that
    look at data first see, and a resumed run draws the same.
    """
    groups: dict[int, list[int]] = {}
    for at, row in enumerate(rows.rows):
        groups.setdefault(row["task_ids"], []).append(at)
    if n < 1 or not groups:
        raise ValueError(f"{n} rows cannot be drawn from {len(rows)}")
    generator = torch.Generator().manual_seed(seed)
    p = shares([len(group) for group in groups.values()], temperature)
    drawn = torch.multinomial(p, n, replacement=True, generator=generator)
    order = torch.empty(n, dtype=torch.long)
    for i, group in enumerate(groups.values()):
        places = (drawn == i).nonzero()[:, 0]
        rounds = range(-(-len(places) // len(group)))
        picked = torch.cat([torch.randperm(len(group), generator=generator) for _ in rounds]) if rounds else places
        order[places] = torch.tensor(group)[picked[: len(places)]]
    return Rows([rows.rows[at] for at in order.tolist()])


class JointCollate(Collate):
    """Pads rows of several tasks to a batch with `task_ids`; the labels, classes and values alike, are fp32."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, regression=True)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = super().__call__([{k: v for k, v in row.items() if k != "task_ids"} for row in rows])
        return batch | {"task_ids": torch.tensor([row["task_ids"] for row in rows])}


Report = Callable[[str, int, int], None]  # task, how many of its rows are done, of how many


def predict_tasks(
    model: nn.Module, rows: Rows, collate: JointCollate, batch: int = 64, report: Report | None = None
) -> dict[str, Tensor]:
    """By task, in the order of its own rows: (n_i, C_i) logits or values, fp32 on the CPU.

    Raises ValueError where a row is of a task that the model has no head for.
    """
    heads, found = heads_of(model), dict[str, Tensor]()
    if odd := {row["task_ids"] for row in rows.rows} - set(range(len(heads.tasks))):
        raise ValueError(f"rows of task {min(odd)}, but the model has heads of the tasks 0 to {len(heads.tasks) - 1}")
    for i, task in enumerate(heads.tasks):
        own = [row for row in rows.rows if row["task_ids"] == i]
        if not own:
            continue
        parts = []
        for at in range(0, len(own), 16 * batch):
            parts.append(predict(model, Rows(own[at : at + 16 * batch]), collate, batch)[:, heads.columns(task.name)])
            if report is not None:
                report(task.name, min(at + 16 * batch, len(own)), len(own))
        found[task.name] = torch.cat(parts)
    return found


def evaluate(
    model: nn.Module,
    tasks: Sequence[AnyTask],
    rows: Rows,
    collate: JointCollate,
    batch: int = 64,
    report: Report | None = None,
) -> dict[str, dict[str, float]]:
    """By task, all metrics of its kind on its rows; `tasks` are those that the rows were made of.

    Raises ValueError where the model has other heads, or where outputs are not finite.
    """
    names, have = [task.name for task in tasks], [task.name for task in heads_of(model).tasks]
    if names != have:
        raise ValueError(f"the rows are of the tasks {names}, the model's heads, in this order, of {have}")
    outputs = predict_tasks(model, rows, collate, batch, report)
    targets: dict[str, list[Any]] = {}
    for row in rows.rows:
        targets.setdefault(names[row["task_ids"]], []).append(row["labels"])
    return {
        task.name: task.scores(outputs[task.name].numpy(), targets[task.name]) for task in tasks if task.name in outputs
    }
