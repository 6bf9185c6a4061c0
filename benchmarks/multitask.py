"""Five GLUE tasks on one backbone: one adapter for all, against one for each. A cell is one JSON file; where it is, it is done.

    python benchmarks/multitask.py --shared FOLDER --device cuda --workers 6
    python benchmarks/multitask.py --table          prints the tables of results/multitask
    python benchmarks/multitask.py --write          puts them into docs/multitask.md

`FOLDER` holds data/glue_* (by default what DELTATUNE_SHARED names, or ../shared), which pyarrow reads. A cell has a seed and is

    single    a method on one task alone, for `n_steps`
    joint     a method on all tasks at once, for as many steps a task: tasks are drawn alike, unless --temperature says otherwise
    fusion    a method made of the single-task adapters of all tasks, which it is given as `sources`, on one task, for `n_steps`
    held_out  a method made of the single-task adapters of the other tasks, on a few shots of one; beside it those that have the
              shots alone

Every method has its defaults, the same rows and as many learning rates, spread over its own range; the validation rows choose one (by
the mean of the tasks' metrics in a joint run). Test rows are touched once, by what was saved and loaded again. Shots come without
validation rows: there the rate is the middle of the range. A fresh head a task is trained beside each, at one rate for all.

Adapters are kept in --adapters, for the cells made of them; one that is gone is trained again, at the rate that was chosen.
"""

import argparse
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing import Manager, get_context
from pathlib import Path
from queue import Empty
from typing import Any

import cells
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

import deltatune as dt
from deltatune.assess.cells import path_of, write_atomic
from deltatune.assess.measure import machine, versions
from deltatune.assess.run import learning_rates
from deltatune.assess.stats import Interval, bootstrap, mean_interval, paired_bootstrap
from deltatune.core.compose import PRESETS, Tree
from deltatune.core.errors import unknown
from deltatune.core.method import METHODS, named
from deltatune.tasks import Task, task
from deltatune.train import JointCollate, backbone, evaluate, joint_rows, load_joint, mixed, predict_tasks, save_joint
from deltatune.train.data import Rows
from deltatune.train.fit import Plan, fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "multitask", ROOT / "docs" / "multitask.md"
TASKS = ("cola", "mrpc", "rte", "sst2", "stsb")
BACKBONE, MAX_LENGTH, HEAD_LR = "minilm", 128, 0.05
REGIMES = {
    "single": ("lora", "pfeiffer"),
    "joint": ("lora", "hyperformer", "hyperformer++", "moelora", "polytropon"),
    "fusion": ("adapter_fusion",),
    "held_out": ("head", "lora", "lora_hub"),
}
MADE_OF = {"adapter_fusion": "pfeiffer", "lora_hub": "lora"}  # method -> whose single-task adapters are its sources
BASELINE = ("single", "lora")
# Nothing of these is trained: `batches` of shots choose how their sources are mixed, once there is a head.
SEARCHES = ("lora_hub",)
FORMAT = 1
TRIAL = "trial.json"  # beside the adapter of a learning rate that was tried


@dataclass(frozen=True)
class Size:
    """What every method gets alike."""

    name: str = "multitask-v1"
    n_steps: int = 600  # a task
    batch: int = 32
    lr_trials: int = 3
    temperature: str = "inf"  # of the tasks' shares in a joint run
    n_shots: int = 32  # of a task held out
    shot_steps: int = 100
    n_train: int = 0  # training rows a task at most; 0 for all
    n_eval: int = 0  # validation rows and test rows, likewise

    def __str__(self) -> str:
        return f"{self.n_steps} steps a task of {self.batch} rows, {self.lr_trials} learning rates ({self.name})"


TRY = Size("try-v1", n_steps=2, batch=4, lr_trials=1, n_shots=4, shot_steps=2, n_train=40, n_eval=8)


@dataclass(frozen=True)
class Job:
    """One cell; `task` is "all" where it is of all of them."""

    regime: str
    method: str
    task: str
    seed: int
    size: Size
    shared: str
    out: str
    sources: str  # the folder that adapters are kept in
    device: str
    threads: int
    command: str

    @property
    def name(self) -> str:
        """For a progress line."""
        return f"{self.regime} {self.method} on {self.task}, seed {self.seed}"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it is the measurement of."""
        return self.regime, self.method, self.task, self.seed

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of GLUE."""
        return TASKS if self.task == "all" else (self.task,)

    @property
    def path(self) -> Path:
        """Where its cell is kept."""
        place = path_of(self.out, BACKBONE, self.method, f"{self.regime}-{self.task}", self.seed)
        return place.with_name(place.name.replace(".cell.json", ".json"))

    @property
    def folder(self) -> Path:
        """Where its adapter is kept, apart from those of other sizes."""
        size = "-".join(str(getattr(self.size, f.name)) for f in fields(Size))
        return Path(self.sources) / size / f"{self.regime}-{self.task}" / f"{self.method}-seed{self.seed}"

    def made_of(self) -> "list[Job]":
        """The cells whose adapters it is made of."""
        part = MADE_OF.get(self.method) or getattr(named(self.method), "sources", "")
        if not part or self.regime not in ("fusion", "held_out"):
            return []
        names = [name for name in TASKS if self.regime == "fusion" or name != self.task]
        return [replace(self, regime="single", method=part, task=name) for name in names]


def kept(job: Job) -> dict[str, Any] | None:
    """The job's cell, where there is one. Raises ValueError where it was measured under another size."""
    if not job.path.is_file():
        return None
    cell: dict[str, Any] = json.loads(job.path.read_text(encoding="utf-8"))
    if cell["budget"] != asdict(job.size):
        raise ValueError(f"{job.path} was measured under {cell['budget']}, this run is {job.size}; give another --out")
    return cell


# --- in a worker -------------------------------------------------------------------------------------------------------


@cache
def tokenizer() -> Any:
    """The backbone's."""
    return AutoTokenizer.from_pretrained(backbone.path_of(BACKBONE))


@cache
def data(name: str, shared: str, size: Size) -> Task:
    """A task, read once a process."""
    os.environ["DELTATUNE_DATA"] = str(Path(shared) / "data")
    found = task(f"glue/{name}")
    if size.n_train:
        found = found.limit(n_train=min(size.n_train, len(found.train)))
    if size.n_eval:
        found = found.limit(n_validation=min(size.n_eval, len(found.validation)))
        found = replace(found, test=found.test.head(size.n_eval))
    return found


@cache
def coded(names: tuple[str, ...], split: str, shared: str, size: Size) -> Rows:
    """The rows of these tasks' split, encoded once a process."""
    return joint_rows([data(name, shared, size) for name in names], split, tokenizer(), MAX_LENGTH)


def tree_of(job: Job, **more: Any) -> Tree:
    """The method with its defaults; with a tensor for each task and with its sources, where it has such."""
    card, hyper = named(job.method), dict(more)
    if len(job.tasks) > 1 and "n_tasks" in {name for name, *_ in card.hyperparameters()}:
        hyper["n_tasks"] = len(job.tasks)
    if parts := job.made_of():
        hyper["sources"] = tuple(str(part.folder) for part in parts)
    return card(**hyper)  # type: ignore[return-value]


def work(job: Job) -> str:
    """Do it, and say in one line what came of it."""
    begun, before = time.perf_counter(), kept(job)
    tasks = [data(name, job.shared, job.size) for name in job.tasks]
    found: dict[str, Any] = {"data": {t.name: {s: rows.hash for s, rows in t.splits.items()} for t in tasks}}
    done = before if before is not None and before["status"] == "done" else None
    try:
        found |= (shots if job.regime == "held_out" else trained)(job, tasks, [done["lr"]] if done else [])
        if done:  # it was measured in an earlier run, and only its adapter was missing
            return f"trained again in {time.perf_counter() - begun:.0f} s"
        found |= tested(job, tasks, found)
    except (ValueError, RuntimeError, ArithmeticError, NotImplementedError) as error:
        if not done:
            record(job, {**found, "status": "failed", "error": f"{type(error).__name__}: {error}"})
        if done or (isinstance(error, RuntimeError) and "CUDA" in str(error)):
            raise  # the process is of no more use
        return f"failed: {error}"
    found["seconds"]["total"] = time.perf_counter() - begun
    record(job, found)
    scores = ", ".join(f"{name.partition('/')[2]} {100 * found['scores'][name][t.metric]:.1f}"
                       for name, t in zip(found["scores"], tasks, strict=True))  # fmt: skip
    return f"{scores} at {found['lr']:g} in {found['seconds']['total']:.0f} s"


def trained(job: Job, tasks: list[Task], rates: list[float]) -> dict[str, Any]:
    """Train at each learning rate and leave what validates best in the job's folder."""
    tell, size = cells.telling(job), job.size
    rows = coded(job.tasks, "train", job.shared, size)
    validation = coded(job.tasks, "validation", job.shared, size)
    n_steps, tried = size.n_steps * len(tasks), list[tuple[dict[str, Any], Path]]()
    for lr in rates or learning_rates(*named(job.method).lr, size.lr_trials):
        folder = job.folder.with_name(
            f".{job.folder.name}-{lr:g}"
        )  # in the folder itself is what was chosen, or nothing
        if (folder / TRIAL).is_file():  # of a run that was cut off behind it
            tried.append((json.loads((folder / TRIAL).read_text(encoding="utf-8")), folder))
            continue
        torch.manual_seed(job.seed)
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = load_joint(BACKBONE, tasks)[0].to(job.device)
        n_backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier."))
        tree = tree_of(job)
        adapter, collate = dt.attach(model, tree, seed=job.seed), JointCollate(tokenizer())
        drawn = mixed(rows, n_steps * size.batch, float(size.temperature), job.seed)
        # Batches of rows of like length would be batches of like tasks.
        plan = Plan(n_steps=n_steps, batch=size.batch, lr=lr, head_lr=HEAD_LR, seed=job.seed, by_length=False)
        n_trainable, n_head = adapter.params(), adapter.n_head
        fitted = fit(model, drawn, collate, plan, progress=lambda *a: tell("train", *a))
        found = {
            "hyper": tree.to_dict(), "n_trainable": n_trainable, "n_head": n_head, "n_backbone": n_backbone, "lr": lr,
            "n_steps": n_steps, "curve": [(s, round(x, 4) if math.isfinite(x) else None) for s, x in fitted.curve],
            "step_ms": fitted.step_ms, "tokens_per_s": fitted.tokens_per_s, "train_s": fitted.train_s,
        }  # fmt: skip
        if job.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        try:
            scores = evaluate(model, tasks, validation, collate, 4 * size.batch)
            found["validation"] = {t.name: scores[t.name][t.metric] for t in tasks}
            save_joint(adapter, folder)
        except ValueError:  # its outputs are not finite
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TRIAL, json.dumps(found))
        tried.append((found, folder))
    means = [sum(one.get("validation", {"": math.nan}).values()) / len(tasks) for one, _ in tried]
    trials = [
        {"lr": one["lr"], "validation": mean if math.isfinite(mean) else None}
        for (one, _), mean in zip(tried, means, strict=True)
    ]
    if not any(map(math.isfinite, means)):
        raise ValueError(f"every learning rate diverged: {', '.join(str(t['lr']) for t in trials)}")
    found, folder = tried[int(np.nanargmax(means))]
    shutil.rmtree(job.folder, ignore_errors=True)
    folder.rename(job.folder)
    (job.folder / TRIAL).unlink()
    train_s = sum(one.pop("train_s") for one, _ in tried)
    for _, rest in tried:
        shutil.rmtree(rest, ignore_errors=True)
    return found | {"trials": trials, "seconds": {"train": train_s}}


def shots(job: Job, tasks: list[Task], rates: list[float]) -> dict[str, Any]:
    """A few rows of one task, all in each batch; the model is left trained.

    What is only searched for is searched on the second half of them, under a head of the first half, which is no judge of rows
    that it was trained on; then the head goes on with all of them, over what was found.
    """
    tell, size, searches = cells.telling(job), job.size, job.method in SEARCHES
    few = [t.limit(n_train=size.n_shots, seed=job.seed) for t in tasks]
    torch.manual_seed(job.seed)
    model = load_joint(BACKBONE, tasks)[0].to(job.device)
    rows, collate = joint_rows(few, "train", tokenizer(), MAX_LENGTH), JointCollate(tokenizer())
    first = "head" if searches else job.method
    lr = rates[0] if rates else learning_rates(*named(first).lr, 1)[0]
    tree = tree_of(replace(job, method=first))

    def learn(given: Rows) -> tuple[dt.Adapter, dict[str, Any]]:
        adapter = dt.attach(model, tree, seed=job.seed)
        plan = Plan(n_steps=size.shot_steps, batch=len(given), lr=lr, head_lr=HEAD_LR, seed=job.seed)
        fitted = fit(model, given, collate, plan, progress=lambda *a: tell("train", *a))
        said = {"n_trainable": adapter.params(), "n_head": adapter.n_head, "step_ms": fitted.step_ms}
        return adapter, said | {"seconds": {"train": fitted.train_s}}

    def settled(adapter: dt.Adapter) -> None:
        adapter.merge()
        adapter.detach()

    found: dict[str, Any] = {"lr": lr, "hyper": tree.to_dict(), "shots": [t.train.hash for t in few]}
    if not searches:
        return found | learn(rows)[1] | {"model": model}
    half = len(rows) // 2  # the order is stratified, so both halves are
    settled(learn(Rows(rows.rows[:half]))[0])
    tell("search", 0, 0, None, 0.0)
    begun, batch = time.perf_counter(), {k: v.to(job.device) for k, v in collate(rows.rows[half:]).items()}
    # The paper's code divides the shots' mean loss by their number once more; its text does not, and l1 is brought to it.
    searched = tree_of(job, batches=(batch,), l1=0.05 / (len(rows) - half), seed=job.seed)
    adapter = dt.attach(model, searched, head=None, seed=job.seed)
    weights, search_s = adapter.calibrated["weights"].tolist(), time.perf_counter() - begun
    settled(adapter)
    found |= learn(rows)[1]
    found["seconds"]["search"] = search_s
    return found | {"weights": weights, "n_trainable": len(weights), "hyper": {"method": job.method}, "model": model}


def tested(job: Job, tasks: list[Task], found: dict[str, Any]) -> dict[str, Any]:
    """The test rows' scores and answers, by what lies in the job's folder, or of a few shots by the model as it stands."""
    cells.telling(job)("test", 0, 0, None, 0.0)
    model, begun = found.pop("model", None), time.perf_counter()
    collate, more = JointCollate(tokenizer()), dict[str, Any]()
    if model is None:
        model, _ = load_joint(BACKBONE, job.folder)
        dt.load(model.to(job.device), job.folder)
        rows = coded(job.tasks, "validation", job.shared, job.size)
        again = evaluate(model, tasks, rows, collate, 4 * job.size.batch)
        for t in tasks:
            if abs(again[t.name][t.metric] - found["validation"][t.name]) > 5e-3:
                raise ValueError(
                    f"{t.name}: it validated at {found['validation']}, and loaded again at {again[t.name]}"
                )
        more["file_bytes"] = sum(f.stat().st_size for f in job.folder.iterdir())
    outputs = predict_tasks(model, coded(job.tasks, "test", job.shared, job.size), collate, 4 * job.size.batch)
    scores, answers, targets = {}, {}, {}
    for t in tasks:
        scores[t.name] = t.scores(outputs[t.name].numpy(), t.test.targets)
        own = outputs[t.name].argmax(-1).tolist() if t.labels else outputs[t.name][:, 0].tolist()
        answers[t.name] = short(own)
        targets[t.name] = {"hash": t.test.hash, "metric": t.metric, "targets": short(t.test.targets)}
    remember(job, targets)
    found["seconds"]["test"] = time.perf_counter() - begun
    return {"scores": scores, "answers": answers, **more}


def short(values: Sequence[Any]) -> Any:
    """Classes 0 to 9 as a text of digits, values to four digits."""
    if all(isinstance(v, int) and 0 <= v <= 9 for v in values):
        return "".join(map(str, values))
    return [float(f"{v:.4g}") for v in values]


def long(values: Any) -> np.ndarray[Any, Any]:
    """What `short` was given."""
    return np.array([int(c) for c in values] if isinstance(values, str) else values)


def remember(job: Job, targets: dict[str, Any]) -> None:
    """Keep the test rows' targets once for all cells, in a file a task, so that tables need no data."""
    for name, one in targets.items():
        path = Path(job.out) / "targets" / f"{name.partition('/')[2]}.json"
        if not path.is_file():
            write_atomic(path, json.dumps(one) + "\n")
        elif json.loads(path.read_text(encoding="utf-8"))["hash"] != one["hash"]:
            raise ValueError(f"{path} is of other test rows of {name}; give another --out")


def record(job: Job, found: dict[str, Any]) -> None:
    """Write the cell, one field a line."""
    found.pop("model", None)
    if "error" in found:
        found["error"] = cells.clean(job, found["error"])  # type: ignore[arg-type]
    card = named(job.method)
    regime, method, name, seed = job.key
    plain = {
        "format": FORMAT,
        "status": found.pop("status", "done"),
        "key": {"backbone": BACKBONE, "regime": regime, "method": method, "task": name, "seed": seed},
        "category": card.category,
        "paper": card.paper,
        "budget": asdict(job.size),
        "head_lr": HEAD_LR,
        "max_length": MAX_LENGTH,
        "sources": [f"{part.regime} {part.method} on {part.task}" for part in job.made_of()],
        **found,
        "versions": versions(),
        "machine": asdict(machine()),
        "command": job.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
    write_atomic(job.path, ("{\n" + ",\n".join(lines) + "\n}\n").replace(job.sources, "ADAPTERS"))


# --- the one who shows and waits ---------------------------------------------------------------------------------------


class Runner:
    """Workers beside each other, each a process of its own, which is replaced where it dies. A cell waits for those it is made of."""

    def __init__(self, n_workers: int, threads: int, events: Any, until: float) -> None:
        self.local, self.events, self.threads, self.until = threading.local(), events, threads, until
        self.pool, self.made = ThreadPoolExecutor(n_workers), list[ProcessPoolExecutor]()
        self.futures: dict[tuple[str, str, str, int], Future[str]] = {}

    def submit(self, job: Job) -> Future[str]:
        """Queue it, behind those that it is made of."""
        self.futures[job.key] = self.pool.submit(self._run, job)
        return self.futures[job.key]

    def _run(self, job: Job) -> str:
        if time.perf_counter() > self.until:
            return cells.LATER
        for part in job.made_of():
            if part.key in self.futures:
                self.futures[part.key].exception()  # waits
            if not (part.folder / "adapter.json").is_file():
                return f"{cells.LATER if time.perf_counter() > self.until else 'failed'}: there is no adapter of {part.name}"
        if getattr(self.local, "process", None) is None:
            self.local.process = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=cells.begin, initargs=(self.events, self.threads)
            )
            self.made.append(self.local.process)
        try:
            return self.local.process.submit(work, job).result()  # type: ignore[no-any-return]
        except (BrokenProcessPool, RuntimeError) as error:
            self.local.process.shutdown(wait=False)
            self.local.process = None
            if not job.path.is_file():
                record(job, {"status": "failed", "error": f"the process died: {error}"})
            return f"failed, and its process was replaced: {error}"

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)
        for process in self.made:
            process.shutdown(cancel_futures=True)


def is_there(method: str) -> bool:
    """Is there a method or preset of that name?"""
    return method in METHODS or method in PRESETS


def jobs_of(given: argparse.Namespace, console: Console) -> list[Job]:
    """What is to be done: what others are made of first, the largest of the rest before the small."""
    size = TRY if given.tried else Size()
    asked = {"n_steps": given.steps, "batch": given.batch, "lr_trials": given.trials, "temperature": given.temperature}
    changed = {key: value for key, value in asked.items() if value is not None}
    size = replace(size, **changed, name=f"{size.name}, changed") if changed else size
    words = [
        "python benchmarks/multitask.py",
        f"--device {given.device} --workers {given.workers} --seeds {given.seeds}",
    ]
    words += [f"--{key.removeprefix('n_').removeprefix('lr_')} {value}" for key, value in changed.items()]
    command = " ".join([*words, *(["--try"] if given.tried else [])])
    regimes = given.regimes.split(",") if given.regimes else list(REGIMES)
    for regime in regimes:
        if regime not in REGIMES:
            raise unknown("regime", regime, REGIMES)
    methods = given.methods.split(",") if given.methods else None
    for method in methods or ():
        if not is_there(method):
            raise unknown("method", method, (*METHODS, *PRESETS))
    wanted: dict[tuple[str, str, str, int], Job] = {}
    for regime in regimes:
        for method in REGIMES[regime] if methods is None else methods:
            if methods is not None and method not in REGIMES[regime] and len(regimes) > 1:
                continue  # one regime and a method together say what is meant, also of another method
            if not is_there(method):
                console.print(f"{regime}: no method {method!r} here, left out", highlight=False)
                continue
            for seed in range(given.seeds):
                for name in ("all",) if regime == "joint" else given.tasks.split(","):
                    if name != "all" and name not in TASKS:
                        raise unknown("task", name, TASKS)
                    job = Job(regime, method, name, seed, size, str(given.shared), str(given.out), str(given.adapters), given.device,
                              given.threads, command)  # fmt: skip
                    wanted[job.key] = job
    todo: dict[tuple[str, str, str, int], Job] = {}
    parts: dict[tuple[str, str, str, int], Job] = {}
    for job in wanted.values():
        before = kept(job)
        if before is None or (given.retry and before["status"] != "done"):
            todo[job.key] = job
            parts |= {p.key: p for p in job.made_of() if not (p.folder / "adapter.json").is_file()}
    order = ("joint", "single", "fusion", "held_out")
    rest = sorted((job for key, job in todo.items() if key not in parts), key=lambda job: order.index(job.regime))
    return [*parts.values(), *rest]


def run(given: argparse.Namespace, console: Console) -> int:
    """All of it; the number of cells that failed."""
    jobs = jobs_of(given, console)
    console.print(f"{len(jobs)} to do, {given.workers} beside each other on {given.device}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[more]}"),
               TimeRemainingColumn())  # fmt: skip
    begun, n_bad, n_done = time.perf_counter(), 0, 0
    with Manager() as manager, Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        events = manager.Queue()
        runner = Runner(given.workers, given.threads, events, begun + given.seconds)
        whole = progress.add_task("all", total=len(jobs), more="")
        lines: dict[int, Any] = {}
        waiting = {runner.submit(job): job for job in jobs}
        try:
            while waiting:
                try:
                    worker, name, phase, step, n_steps, loss, rate = events.get(timeout=0.2)
                    if worker not in lines:
                        lines[worker] = progress.add_task(name, total=1, more="")
                    more = f"{phase}{'' if loss is None else f', loss {loss:.3f}'}{f', {rate:,.0f} tokens/s' if rate else ''}"
                    progress.update(lines[worker], description=name, total=n_steps or 1, completed=step, more=more)
                except Empty:
                    pass
                for future in [f for f in waiting if f.done()]:
                    job, n_done = waiting.pop(future), n_done + 1
                    progress.update(whole, completed=n_done)
                    error = future.exception()
                    said = future.result() if error is None else f"failed: {type(error).__name__}: {error}"
                    n_bad += said.startswith("failed")
                    left = (time.perf_counter() - begun) / n_done * (len(jobs) - n_done)
                    console.print(
                        f"[{n_done}/{len(jobs)}] {job.name}: {said}  (about {left:.0f} s left)",
                        highlight=False,
                        markup=False,
                    )
        finally:
            runner.close()
    console.print(f"{time.perf_counter() - begun:.0f} s", highlight=False)
    return n_bad


# --- the tables --------------------------------------------------------------------------------------------------------

Array = np.ndarray[Any, Any]


def fast_f1(t: Array, a: Array) -> float:
    """`f1` of two classes, as `tasks.metrics` has it through sklearn."""
    n = int((t == 1).sum() + (a == 1).sum())
    return 2 * int(((t == 1) & (a == 1)).sum()) / n if n else 0.0


def fast_matthews(t: Array, a: Array) -> float:
    """`matthews` of two classes, likewise."""
    tp, fp = int(((t == 1) & (a == 1)).sum()), int(((t == 0) & (a == 1)).sum())
    fn, tn = int(((t == 1) & (a == 0)).sum()), int(((t == 0) & (a == 0)).sum())
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def fast_pearson(t: Array, a: Array) -> float:
    """`pearson`, likewise."""
    t, a = t - t.mean(), a - a.mean()
    below = float(np.sqrt((t @ t) * (a @ a)))
    return float(t @ a) / below if below else 0.0


FAST: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda t, a: float((t == a).mean()),
    "f1": fast_f1,
    "matthews": fast_matthews,
    "pearson": fast_pearson,
}  # a bootstrap asks thousands of times


@dataclass(frozen=True)
class Row:
    """A method under a regime: its cells by seed and task."""

    regime: str
    method: str
    cells: dict[int, dict[str, dict[str, Any]]]  # seed -> task -> cell

    def seeds(self, name: str) -> list[int]:
        """Those that have an answer to the task."""
        return sorted(seed for seed, found in self.cells.items() if name in found)

    def score(self, name: str, seed: int, metric: str) -> float:
        """On the test rows."""
        return float(self.cells[seed][name]["scores"][f"glue/{name}"][metric])

    def answers(self, name: str, seed: int) -> Array:
        """To the test rows."""
        return long(self.cells[seed][name]["answers"][f"glue/{name}"])

    def whole(self) -> list[int]:
        """The seeds that have all tasks."""
        return sorted(seed for seed, found in self.cells.items() if found.keys() >= set(TASKS))

    def mean(self, seed: int, targets: dict[str, Any]) -> float:
        """Over all tasks, of their metrics on the test rows."""
        return sum(self.score(name, seed, targets[name]["metric"]) for name in TASKS) / len(TASKS)


def read(folder: Path) -> tuple[list[Row], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Rows in the order of REGIMES; (metric, targets) by task; the cells that failed. Raises ValueError where there are none."""
    rows: dict[tuple[str, str], Row] = {}
    bad, order = [], [(regime, method) for regime, methods in REGIMES.items() for method in methods]
    for path in sorted((folder / BACKBONE).rglob("*.json")) if (folder / BACKBONE).is_dir() else ():
        cell = json.loads(path.read_text(encoding="utf-8"))
        key = cell["key"]
        if cell["status"] != "done":
            bad.append(cell)
            continue
        row = rows.setdefault((key["regime"], key["method"]), Row(key["regime"], key["method"], {}))
        for name in TASKS if key["task"] == "all" else (key["task"],):
            row.cells.setdefault(key["seed"], {})[name] = cell
    if not rows and not bad:
        raise ValueError(f"{folder} has no cells")
    targets = {}
    for path in sorted((folder / "targets").glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        targets[path.stem] = {"metric": one["metric"], "targets": long(one["targets"])}
    found = sorted(
        rows.values(), key=lambda r: order.index((r.regime, r.method)) if (r.regime, r.method) in order else len(order)
    )
    return found, targets, bad


def difference(ours: Row, theirs: Row, name: str, targets: dict[str, Any]) -> tuple[float, Interval] | None:
    """Of the means over the seeds that both have, with a paired bootstrap's interval over the test rows; None without such."""
    seeds = sorted({*ours.seeds(name)} & {*theirs.seeds(name)})
    if not seeds:
        return None
    score, t = FAST[targets[name]["metric"]], targets[name]["targets"]
    a, b = ([row.answers(name, s) for s in seeds] for row in (ours, theirs))
    at = float(np.mean([score(t, x) for x in a]) - np.mean([score(t, x) for x in b]))
    return at, paired_bootstrap(score, t, a, b)  # type: ignore[arg-type]


def mean_difference(ours: Row, theirs: Row, targets: dict[str, Any]) -> tuple[float, Interval, Interval | None] | None:
    """Of the mean over tasks: over test rows, all tasks' drawn from together, and over the seeds, each paired with its own."""
    seeds = sorted({*ours.whole()} & {*theirs.whole()})
    if not seeds:
        return None
    ends = np.cumsum([0, *(len(targets[name]["targets"]) for name in TASKS)])
    pairs = {name: [(ours.answers(name, s), theirs.answers(name, s)) for s in seeds] for name in TASKS}

    def of(rows: Array) -> float:
        total = 0.0
        for name, low, high in zip(TASKS, ends, ends[1:], strict=False):
            own = rows[(rows >= low) & (rows < high)] - low
            score, t = FAST[targets[name]["metric"]], targets[name]["targets"][own]
            total += sum(score(t, a[own]) - score(t, b[own]) for a, b in pairs[name]) / len(seeds)
        return total / len(TASKS)

    n, apart = int(ends[-1]), [ours.mean(seed, targets) - theirs.mean(seed, targets) for seed in seeds]
    return of(np.arange(n)), bootstrap(of, n), mean_interval(apart)[1]


def between(interval: Interval | None) -> str:
    """In hundredths, signed."""
    return "" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def score_table(rows: list[Row], targets: dict[str, Any]) -> str:
    """Mean test scores in hundredths, the mean over tasks with Student's interval over the seeds, and what it costs."""
    lines = []
    for row in rows:
        every = [cell for found in row.cells.values() for cell in found.values()]
        own = [[row.score(name, s, targets[name]["metric"]) for s in row.seeds(name)] for name in TASKS]
        line = [f"`{row.method}`", row.regime, *(f"{100 * np.mean(v):.1f}" if v else "" for v in own)]
        means = [row.mean(seed, targets) for seed in row.whole()]
        said = ""
        if means:
            mean, interval = mean_interval(means)
            said = f"{100 * mean:.1f}" + (f" ± {50 * (interval.high - interval.low):.1f}" if interval else "")
        first = {
            id(cell): cell["n_trainable"] for cell in row.cells[min(row.cells)].values()
        }  # a joint cell is of all tasks
        step_ms, rates = np.median([cell["step_ms"] for cell in every]), {cell["lr"] for cell in every}
        lines.append(
            [*line, said, f"{sum(first.values()):,}", f"{step_ms:.0f}", ", ".join(f"{r:g}" for r in sorted(rates))]
        )
    names = [f"{name} ({targets[name]['metric']})" if name in targets else name for name in TASKS]
    head = ["method", "trained", *names, "mean", "parameters, all tasks", "ms a step", "learning rates"]
    return cells.table(head, lines)


def difference_table(rows: list[Row], baseline: Row, targets: dict[str, Any]) -> str:
    """In hundredths, with a paired bootstrap's interval over the test rows; of the mean also Student's over the seeds' differences."""
    lines = []
    for row in rows:
        line = [f"`{row.method}`", row.regime]
        for name in TASKS:
            apart = difference(row, baseline, name, targets)
            line.append("" if apart is None else f"{100 * apart[0]:+.1f} ({between(apart[1])})")
        mean = mean_difference(row, baseline, targets)
        line += ["", ""] if mean is None else [f"{100 * mean[0]:+.1f} ({between(mean[1])})", between(mean[2])]
        lines.append(line)
    return cells.table(["method", "trained", *TASKS, "mean", "mean, over seeds"], lines)


def tables(folder: Path) -> str:
    """Everything in a results folder. Raises ValueError where it has no cell."""
    rows, targets, bad = read(folder)
    full, held = ([row for row in rows if (row.regime == "held_out") is is_held] for is_held in (False, True))
    parts = []
    if rows:
        cell = next(iter(next(iter(rows[0].cells.values())).values()))
        size, on, n_seeds = Size(**cell["budget"]), cell["machine"]["device"], max(len(row.cells) for row in rows)
        parts.append(
            f"{BACKBONE}, {size}, tasks of a joint run drawn with T = {size.temperature}, {n_seeds} seeds, {on}.\n"
        )
    if full:
        parts.append(f"### Test scores\n\n{score_table(full, targets)}")
    baseline = next((row for row in full if (row.regime, row.method) == BASELINE), None)
    others = [row for row in full if row is not baseline]
    if baseline is not None and others:
        parts.append(f"### Less single-task LoRA\n\n{difference_table(others, baseline, targets)}")
    if held:
        parts.append(f"### A task held out, {size.n_shots} shots\n\n{score_table(held, targets)}")
        alone = next((row for row in held if row.method == "head"), None)
        if alone is not None and len(held) > 1:
            others = [row for row in held if row is not alone]
            parts.append(f"### Less the head alone\n\n{difference_table(others, alone, targets)}")
    said = [f"- `{c['key']['method']}` ({c['key']['regime']}, {c['key']['task']}, seed {c['key']['seed']}) failed: {c['error']}"
            for c in bad]  # fmt: skip
    return "\n".join([*parts, *(["\n".join(said) + "\n"] if said else [])])


def write_page(page: Path, folder: Path) -> None:
    """Put the tables between the page's markers. Raises ValueError where a marker is missing."""
    text = page.read_text(encoding="utf-8")
    before, opened, rest = text.partition(cells.OPEN)
    _, closed, after = rest.partition(cells.CLOSE)
    if not (opened and closed):
        raise ValueError(f"{page.name} needs the markers {cells.OPEN} and {cells.CLOSE}, in this order")
    page.write_text(f"{before}{cells.OPEN}\n{tables(folder)}{cells.CLOSE}{after}", encoding="utf-8")


def main() -> int:
    """Run, or show."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("DELTATUNE_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--regimes", help=f"of {', '.join(REGIMES)}, with commas between; all by default")
    parser.add_argument("--methods", help="names with commas between; by default each regime's own")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of single, fusion and held_out cells")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes beside each other")
    parser.add_argument("--threads", type=int, default=1, help="of torch, a process")
    parser.add_argument("--steps", type=int, help=f"a task, instead of {Size.n_steps}")
    parser.add_argument("--batch", type=int, help="likewise")
    parser.add_argument("--trials", type=int, help="likewise, learning rates")
    parser.add_argument("--temperature", help="of a joint run's tasks: p_i ~ n_i^(1/T); all alike by default")
    parser.add_argument("--try", dest="tried", action="store_true", help=f"only whether it runs: {TRY}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing later; run again for the rest")
    parser.add_argument(
        "--out", type=Path, help=f"by default {RESULTS.relative_to(ROOT)}, with --try out/multitask-try"
    )
    parser.add_argument("--adapters", type=Path, default=ROOT / "out" / "multitask", help="where adapters are kept")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    given.out = given.out or (ROOT / "out" / "multitask-try" if given.tried else RESULTS)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if given.table:
            print(tables(given.out))
        if given.write:
            write_page(PAGE, given.out)
        if given.table or given.write:
            return 0
        return min(run(given, console), 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
