"""Every method of a category, trained once on a real task and scored: a cell is one JSON file, and where it is, it is done.

    python benchmarks/cells.py --category partial --shared FOLDER --models llama-17m,t5-22m,minilm --device cuda --workers 6
    python benchmarks/cells.py --category partial --table          prints the tables of results/partial
    python benchmarks/cells.py --category partial --write          puts them into docs/partial.md
    python benchmarks/cells.py --category quantised --models llama-17m --seeds 0,1,2 --device cuda --workers 6

`FOLDER` holds data/webnlg, data/glue_* and models (by default what DELTATUNE_SHARED names, or ../shared). The model says the task:
`minilm` classifies Python's documentation (`stdlib_docs`) with the machinery of `deltatune compare`, the others write WebNLG's texts.
Every method has its defaults, the same steps, rows and number of learning rates, spread over its own range; validation rows choose
one, test rows are touched once. On WebNLG what is scored was saved and loaded again. A method that is made of saved adapters gets
three, trained here first: on one category of WebNLG each; on another task each where they are prompts of a classifier, and where they
are whole adapters, which have its head, on a third of its own rows each. The category `quantised` compares ARMS instead: one size
and one range of learning rates on bases of several formats.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from multiprocessing import Manager, get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import webnlg
from memory import nbytes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

import deltatune as dt
from deltatune.assess.cells import Budget, Cell, path_of, read_folder, write_atomic
from deltatune.assess.measure import machine, versions
from deltatune.assess.run import Bench, Candidate, learning_rates
from deltatune.core.compose import PRESETS, Tree, looking
from deltatune.core.errors import unknown
from deltatune.core.method import METHODS, named
from deltatune.core.storage import format_of
from deltatune.quant import is_quantised, n_weights
from deltatune.tasks import task
from deltatune.train.data import Rows, some
from deltatune.train.fit import Plan, fit

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = ("additive", "partial", "reparameterized", "quantised")  # each with its page and its folder of results
OPEN, CLOSE = "<!-- cells -->", "<!-- /cells -->"
FROZEN = "none"  # the backbone as it is
ENCODER = "minilm"
BASELINES = {"webnlg": (FROZEN, "lora", "full"), "stdlib_docs": ("head", "lora", "full")}
OWN_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("webnlg", "dept"): {"length": 512}
}  # its default is too short for some rows


@dataclass(frozen=True)
class Arm:
    """A method as WebNLG's cells run it, under its own name or another."""

    method: str
    hyper: dict[str, Any] = field(default_factory=dict)
    to: str = ""  # the base's format
    options: dict[str, Any] = field(default_factory=dict)  # of the format
    lr: tuple[float, float] | None = None  # the method's own, where there is none


def _arms() -> dict[str, Arm]:
    """LoRA of one rank on all linears, on a plain base, at a little over 4 bits a weight, and at 2.5."""
    alike: dict[str, Any] = {"r": 16, "alpha": 16.0, "where": "linear"}
    lr = METHODS["lora"].lr
    low: dict[str, Any] = {"group": 64}  # codes of 2 bits and a scale in fp32
    lq: dict[str, Any] = {"groups": (64, 128), "steps": 5, "niter": 2}  # as many turns as loftq, in seconds
    return {
        FROZEN: Arm(FROZEN),
        f"{FROZEN}_nf4": Arm(FROZEN, to="bnb-nf4"),
        f"{FROZEN}_nf2": Arm(FROZEN, to="nf2", options=low),
        "full": Arm("full"),
        "lora": Arm("lora", alike, lr=lr),
        "qlora": Arm("qlora", alike | {"dropout": 0.0}, "bnb-nf4", lr=lr),
        "loftq": Arm("loftq", alike | {"to": "bnb-nf4", "double": True}, lr=lr),
        "lq_lora": Arm("lq_lora", alike | lq | {"bits": 4.127}, lr=lr),
        "qa_lora": Arm("qa_lora", alike, "int4", {"group": 32}, lr=lr),
        "qlora_nf2": Arm("qlora", alike | {"dropout": 0.0}, "nf2", low, lr=lr),
        "loftq_nf2": Arm("loftq", alike | {"to": "nf2"} | low, lr=lr),
        "lq_lora_2_5": Arm("lq_lora", alike | lq | {"bits": 2.5}, lr=lr),
    }


ARMS = {"quantised": _arms()}  # by category
OTHER_TASKS = ("glue/sst2", "glue/mrpc", "glue/cola")  # what prompts that are sources of a classifier have learned
N_SOURCES, HEAD_LR, MAX_LENGTH = 3, 0.05, 64
OWN = N_SOURCES  # the number of a source that was trained on the task itself, for as long as the others
CHOOSES = ("spot",)  # methods that choose among their sources by such a one, their `task`
MOST_ROWS = 4000  # of a classifier's training rows
LATER = "not begun, the time is over"
FORMAT = 1


@dataclass(frozen=True)
class Size:
    """What every method gets alike, and the sources of those that have some."""

    name: str
    n_steps: int
    batch: int
    lr_trials: int
    n_source: int  # steps of a source
    n_validation: int  # texts whose loss chooses the learning rate; of a classifier: its task says
    n_test: int  # inputs that are answered; likewise

    def __str__(self) -> str:
        return f"{self.n_steps} steps of {self.batch} rows, {self.lr_trials} learning rates ({self.name})"


SIZES = {
    "webnlg": Size("additive-v1", n_steps=300, batch=32, lr_trials=3, n_source=150, n_validation=320, n_test=300),
    "stdlib_docs": Size("additive-v1", n_steps=300, batch=32, lr_trials=3, n_source=150, n_validation=0, n_test=0),
}
TRY = Size(
    "try-v1", n_steps=8, batch=4, lr_trials=1, n_source=4, n_validation=8, n_test=4
)  # does it run from end to end?


@dataclass(frozen=True)
class Job:
    """One cell, or with `source` set the training of one adapter that cells are made of."""

    model: str
    method: str
    size: Size
    seed: int
    shared: str
    out: str
    sources: str  # the folder that sources are kept in while this runs
    device: str
    threads: int
    command: str
    retry: bool = False
    source: int | None = None
    category: str = ""

    @property
    def task(self) -> str:
        """The model's."""
        return "stdlib_docs" if self.model == ENCODER else "webnlg"

    @property
    def name(self) -> str:
        """For a progress line."""
        return f"{self.model} {self.method}" + (f", source {self.source}" if self.source is not None else "")

    @property
    def path(self) -> Path:
        """Where its cell is kept."""
        place = path_of(self.out, self.model, self.method, self.task, self.seed)
        return place if self.task == "stdlib_docs" else place.with_name(place.name.replace(".cell.json", ".json"))

    @property
    def arm(self) -> Arm:
        """The category's own of this name, or the method."""
        own = ARMS.get(self.category, {}).get(self.method)
        return own or Arm(self.method, OWN_SIZES.get((self.task, self.method), {}))

    @property
    def lr(self) -> tuple[float, float]:
        """The range of its learning rates."""
        return self.arm.lr or named(self.arm.method).lr

    def folder(self, k: int) -> Path:
        """Of the `k`-th source adapter of this job's method, or of the method that it is made of."""
        return Path(self.sources) / self.model / (sources_of(self.method) or self.method) / str(k)


def sources_of(method: str) -> str:
    """The method whose saved adapters it is made of; "" for most, also where it can do without."""
    card = METHODS.get(method, PRESETS.get(method))  # an arm of another name has none
    return getattr(card, "sources", "") if getattr(card, "needs_sources", True) else ""


def source_numbers(method: str) -> list[int]:
    """Of the sources that it needs."""
    return [*range(N_SOURCES), *([OWN] if method in CHOOSES else [])] if sources_of(method) else []


def tree_of(job: Job, n_tasks: int = 1) -> Tree:
    """The method with its defaults; with a tensor for each task and with its sources, where it has such."""
    card, hyper = named(job.arm.method), dict(job.arm.hyper)
    if n_tasks > 1 and "n_tasks" in {name for name, *_ in card.hyperparameters()}:
        hyper["n_tasks"] = n_tasks
    if sources_of(job.method) and job.source is None:
        hyper["sources"] = tuple(str(job.folder(k)) for k in range(N_SOURCES))
        hyper |= {"task": str(job.folder(OWN))} if job.method in CHOOSES else {}
    return card(**hyper)  # type: ignore[return-value,arg-type]


def has_tasks(tree: Tree) -> bool:
    """Does it ask for the rows' task ids?"""
    return any(getattr(leaf.config, "n_tasks", 1) > 1 for _, leaf in tree.leaves())


# --- in a worker -------------------------------------------------------------------------------------------------------

EVENTS: Any = None  # (worker, job's name, phase, step, of how many, loss, tokens per second)


def begin(events: Any, threads: int) -> None:
    """Set a worker up."""
    global EVENTS
    EVENTS = events
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on the GPUs that have it
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def telling(job: Job) -> Callable[..., None]:
    """Progress of this job to the one who shows it; every tenth step is enough."""

    def tell(phase: str, step: int, n_steps: int, loss: float | None, rate: float) -> None:
        if step % 10 == 0 or step == n_steps:
            EVENTS.put((os.getpid(), job.name, phase, step, n_steps, loss, rate))

    return tell


def work(job: Job) -> str:
    """Do it, and say in one line what came of it."""
    begun = time.perf_counter()
    if job.source is not None:
        (webnlg_source if job.task == "webnlg" else docs_source)(job)
        return f"trained in {time.perf_counter() - begun:.0f} s"
    return (webnlg_cell if job.task == "webnlg" else docs_cell)(job)


@cache
def data(shared: str, size: Size) -> webnlg.WebNLG:
    """Read once a process."""
    return webnlg.read(Path(shared), size.n_validation, size.n_test)


@cache
def coded(shared: str, size: Size, model: str) -> tuple[webnlg.Coder, Rows, Rows]:
    """WebNLG's training and validation rows as this backbone reads them; a process keeps them."""
    facts = data(shared, size)
    coder = webnlg.Coder(Path(shared) / "models" / model, facts.categories)
    return coder, coder.rows(facts.train), coder.rows(facts.validation)


@cache
def bench(model: str, name: str, size: Size, device: str, third: int | None = None) -> Bench:
    """A classifier's task on its backbone, or a third of the task's training rows; a process keeps them."""
    found = task(name)
    if len(found.train) > MOST_ROWS:
        found = found.limit(n_train=MOST_ROWS)
    if third is not None:
        found = replace(found, train=found.train.take(range(third, len(found.train), N_SOURCES)))
    rows = found.splits
    budget = Budget(size.name, size.n_steps, size.batch, size.lr_trials, *(len(rows[s]) for s in rows))
    return Bench(model, found, budget, MAX_LENGTH, HEAD_LR, device)


def source_of_docs(method: str, k: int) -> tuple[str, int | None]:
    """The task that the `k`-th source of a classifier is trained on, and which third of its rows."""
    if k == OWN:
        return "stdlib_docs", None
    return (OTHER_TASKS[k], None) if method == "prompt_tuning" else ("stdlib_docs", k)


def docs_source(job: Job) -> None:
    """A source adapter on the classifier's backbone."""
    assert job.source is not None
    os.environ["DELTATUNE_DATA"] = str(Path(job.shared) / "data")
    name, third = source_of_docs(job.method, job.source)
    b = bench(job.model, name, job.size, job.device, third)
    model = b.prepare(job.seed)
    torch.manual_seed(job.seed)
    adapter = dt.attach(model, tree_of(job))
    lr, tell = learning_rates(*named(job.method).lr, 1)[0], telling(job)
    plan = Plan(n_steps=job.size.n_source, batch=job.size.batch, lr=lr, head_lr=HEAD_LR, seed=job.seed)
    fit(model, b.rows["train"], b.collate, plan, progress=lambda *a: tell("source", *a))
    adapter.save(job.folder(job.source))
    adapter.detach()


def sources_said(job: Job, categories: Sequence[str]) -> list[str]:
    """What the method's sources are, for the cell."""
    said = []
    for k in source_numbers(job.method):
        if job.task == "webnlg":
            what = "the task itself" if k == OWN else categories[k]
        else:
            name, third = source_of_docs(sources_of(job.method), k)
            what = name if third is None else f"{name}, rows {third} + {N_SOURCES} i"
        said.append(f"{sources_of(job.method)} on {what}, {job.size.n_source} steps")
    return said


def docs_cell(job: Job) -> str:
    """A cell of `deltatune compare`, without its predictions."""
    card = named(job.method)
    b = bench(job.model, job.task, job.size, job.device)
    try:
        tree = tree_of(job)
        dt.attach(b.prepare(job.seed), tree).detach()
    except (ValueError, NotImplementedError) as error:
        b.model = None
        record(job, {"status": "unfit", "error": str(error)})
        return f"does not fit: {error}"
    config = {"command": job.command, "sources": sources_said(job, ())}
    cell = b.run(
        Candidate(job.method, tree, card.category, card.paper, card.lr), job.seed, job.out, telling(job), config
    )
    if cell.predictions is not None:
        (job.path.parent / cell.predictions).unlink()
    cell = replace(cell, predictions=None, error=cell.error and clean(job, cell.error))
    cell.write(job.path)
    unfit_path(job.path).unlink(missing_ok=True)
    if cell.metric is None or cell.time is None:
        return f"failed: {cell.error}"
    return f"{cell.metric.name} {cell.metric.test:.3f} at {cell.lr:g} in {cell.time.total_s:.0f} s"


def webnlg_source(job: Job) -> None:
    """An adapter of one category of WebNLG."""
    assert job.source is not None
    coder, rows, _ = coded(job.shared, job.size, job.model)
    model = webnlg.load(Path(job.shared) / "models" / job.model).to(job.device)
    own = [row for row in rows.rows if job.source in (OWN, row["task_ids"])]
    torch.manual_seed(job.seed)
    adapter = dt.attach(model, tree_of(job))
    lr = learning_rates(*named(job.method).lr, 1)[0]
    plan = Plan(n_steps=job.size.n_source, batch=job.size.batch, lr=lr, seed=job.seed)
    tell = telling(job)
    fit(model, Rows(own), webnlg.Pad(coder, False), plan, progress=lambda *a: tell("source", *a))
    adapter.save(job.folder(job.source))


def clean(job: Job, error: str) -> str:
    """The error without this machine's folders, on one line."""
    for name, folder in (("SOURCES", job.sources), ("SHARED", job.shared)):
        error = error.replace(folder, name) if folder else error
    return " ".join(error.split())[:2000]


def record(job: Job, found: dict[str, Any]) -> None:
    """Write a cell of ours; one field a line."""
    card = None if job.arm.method == FROZEN else named(job.arm.method)
    if "error" in found:
        found["error"] = clean(job, found["error"])
    plain = {
        "format": FORMAT,
        "status": found.pop("status", "done"),
        "key": {"backbone": job.model, "method": job.method, "task": job.task, "seed": job.seed},
        "category": "baseline" if card is None else card.category,
        "paper": "" if card is None else card.paper,
        "budget": asdict(job.size),
        **found,
        "versions": versions(),
        "machine": asdict(machine()),
        "command": job.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in plain.items()]
    path = job.path if job.task == "webnlg" else unfit_path(job.path)
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def unfit_path(path: Path) -> Path:
    """Where it is noted that a method does not fit a classifier: `compare`'s own cells have no such state."""
    return path.with_name(path.name.replace(".cell.json", ".unfit.json"))


def webnlg_cell(job: Job) -> str:
    """Train at each learning rate, keep what validates best, load it again, and score what it generates."""
    begun = time.perf_counter()
    facts = data(job.shared, job.size)
    model, arm = webnlg.load(Path(job.shared) / "models" / job.model).to(job.device), job.arm
    if arm.to:
        dt.quantise(model, arm.to, **arm.options)
    found: dict[str, Any] = {"data": facts.hashes, "n_backbone": n_weights(model)}
    tree = None
    with tempfile.TemporaryDirectory() as scratch:
        if arm.method != FROZEN:
            try:
                tree = tree_of(job, len(facts.categories))
                coder, rows, _ = coded(job.shared, job.size, job.model)
                pad, size = webnlg.Pad(coder, has_tasks(tree)), job.size.batch
                looked = looking(tree, lambda n: some(rows, pad, n, size, job.seed, job.device))
                start = starter(model, looked, Path(scratch))
            except (ValueError, NotImplementedError) as error:
                record(job, {**found, "status": "unfit", "error": str(error)})
                return f"does not fit: {error}"
            found |= {"hyper": tree.to_dict()}
            found |= {"sources": sources_said(job, facts.categories)}
        if is_quantised(model):
            found |= {"base": arm.to or job.method, "bits": bits(model)}
        try:
            found |= _measured(job, model, facts, tree, None if tree is None else start, Path(scratch))
        except (ValueError, RuntimeError, ArithmeticError, NotImplementedError) as error:
            record(job, {**found, "status": "failed", "error": f"{type(error).__name__}: {error}"})
            if isinstance(error, RuntimeError) and "CUDA" in str(error):
                raise  # the process is of no more use
            return f"failed: {error}"
    found["seconds"]["total"] = time.perf_counter() - begun
    record(job, found)
    s = found["scores"]
    return f"BLEU {s['bleu']:.2f}, chrF {s['chrf']:.1f}, {s['validation_loss']:.3f} nats, {found['seconds']['total']:.0f} s"


def starter(model: Any, tree: Tree, scratch: Path) -> Callable[[], dt.Adapter]:
    """What attaches the tree anew for each trial. Raises ValueError where it does not fit.

    A method that quantises the base does it here, once: its trials begin with what it left, on the codes that stay.
    """
    adapter = dt.attach(model, tree, head=None)
    rebases = any(leaf.method.rebases for _, leaf in tree.leaves())
    if rebases:
        adapter.save(scratch / "start")
    adapter.detach()
    return (
        partial(dt.load, model, scratch / "start", trainable=True)
        if rebases
        else partial(dt.attach, model, tree, head=None)
    )


def bits(model: Any) -> float:
    """Bits of a weight of the quantised layers, with all that is kept beside the codes."""
    layers = [module for module in model.modules() if format_of(module) is not None]
    return 8 * sum(map(nbytes, layers)) / sum(layer.in_features * layer.out_features for layer in layers)


def _measured(
    job: Job, model: Any, facts: webnlg.WebNLG, tree: Tree | None, start: Callable[[], dt.Adapter] | None, scratch: Path
) -> dict[str, Any]:
    tell, asks = telling(job), tree is not None and has_tasks(tree)
    coder, _, validation = coded(job.shared, job.size, job.model)
    pad = webnlg.Pad(coder, asks)
    found: dict[str, Any] = {"n_trainable": 0, "seconds": {}}
    if start is not None:
        found |= _trained(job, model, start, pad, scratch)
    tell("generate", 0, 0, None, 0.0)
    at, cached = time.perf_counter(), True
    try:
        texts = webnlg.answers(model, facts.test, coder, asks, cached)
    except ValueError as error:
        if "use_cache" not in str(error):
            raise
        cached = False
        texts = webnlg.answers(model, facts.test, coder, asks, cached)
    found["seconds"]["generate"] = time.perf_counter() - at
    found["generation"] = {"inputs": len(facts.test), "tokens": webnlg.N_NEW, "search": "greedy", "cache": cached}
    found["scores"] = webnlg.scores(texts, facts.test) | {"validation_loss": webnlg.loss(model, validation, pad)}
    chosen = next((t["validation_loss"] for t in found.get("trials", ()) if t["lr"] == found["lr"]), None)
    if chosen is not None and abs(found["scores"]["validation_loss"] - chosen) > 1e-3 * chosen:
        raise ValueError(f"loaded again it has a loss of {found['scores']['validation_loss']}, and had {chosen}")
    return found


def _trained(job: Job, model: Any, start: Callable[[], dt.Adapter], pad: webnlg.Pad, scratch: Path) -> dict[str, Any]:
    """Leaves the best of the trials on the model, loaded from its file."""
    _, rows, validation = coded(job.shared, job.size, job.model)
    tell, best, found = telling(job), math.inf, dict[str, Any]()
    trials, train_s = [], 0.0
    for lr in learning_rates(*job.lr, job.size.lr_trials):
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(job.seed)
        adapter = start()
        curve, step_ms, rate = [], 0.0, 0.0
        if any(p.requires_grad for p in adapter.parameters()):
            plan = Plan(n_steps=job.size.n_steps, batch=job.size.batch, lr=lr, seed=job.seed)
            fitted = fit(model, rows, pad, plan, progress=lambda *a: tell("train", *a))
            curve, step_ms, rate = fitted.curve, fitted.step_ms, fitted.tokens_per_s
            train_s += fitted.train_s
        peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if job.device == "cuda" else {}
        here = webnlg.loss(model, validation, pad)
        trials.append({"lr": lr, "validation_loss": here if math.isfinite(here) else None})
        if here < best:
            best = here
            adapter.save(scratch / f"{lr:g}")
            finite = [(s, round(x, 4) if math.isfinite(x) else None) for s, x in curve]
            found = {
                "n_trainable": adapter.params(),
                "lr": lr,
                "curve": finite,
                "step_ms": step_ms,
                "tokens_per_s": rate,
                **peak,
            }
        adapter.detach()
        if not curve:
            break  # it has nothing to train: no learning rate changes it
    if not found:
        raise ValueError(f"every learning rate diverged: {', '.join(str(t['lr']) for t in trials)}")
    folder = scratch / f"{found['lr']:g}"
    found["file_bytes"] = sum(f.stat().st_size for f in folder.iterdir())
    dt.load(model, folder)
    return found | {"trials": trials, "seconds": {"train": train_s}}


# --- the one who shows and waits ---------------------------------------------------------------------------------------


def results_of(category: str) -> Path:
    """Where its cells are kept."""
    return ROOT / "results" / category


def page_of(category: str) -> Path:
    """Where its tables stand."""
    return ROOT / "docs" / f"{category}.md"


def candidates(model: str, category: str) -> list[str]:
    """The task's baselines, then every method and preset of the category, or its arms."""
    if category in ARMS:
        return list(ARMS[category])
    cards = [named(name) for name in (*METHODS, *PRESETS)]
    own = sorted(c.name for c in cards if c.category == category and not getattr(c, "helper", False))
    return list(dict.fromkeys([*BASELINES["stdlib_docs" if model == ENCODER else "webnlg"], *own]))


def is_done(job: Job) -> bool:
    """Is the cell there? Raises ValueError where it was measured under another size."""
    for path in (job.path, unfit_path(job.path)):
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if any(kept["budget"][key] != getattr(job.size, key) for key in ("n_steps", "batch", "lr_trials")):
                raise ValueError(
                    f"{path} was measured under {kept['budget']}, this run is {job.size}; give another --out"
                )
            return kept["status"] == "done" or not job.retry
    return False


class Runner:
    """Workers beside each other, each a process of its own, which is replaced where it dies."""

    def __init__(self, n_workers: int, threads: int, events: Any, until: float) -> None:
        self.local, self.events, self.threads = threading.local(), events, threads
        self.pool, self.until = ThreadPoolExecutor(n_workers), until
        self.made: list[ProcessPoolExecutor] = []
        self.sources: dict[tuple[str, str, int], Future[Any]] = {}

    def submit(self, job: Job) -> Future[str]:
        """Queue it; a cell that needs sources waits for them, which were queued before it."""
        future = self.pool.submit(self._run, job)
        if job.source is not None:
            self.sources[job.model, job.method, job.source] = future
        return future

    def _run(self, job: Job) -> str:
        if time.perf_counter() > self.until:
            return LATER
        made_of = "" if job.source is not None else sources_of(job.method)
        try:
            for k in source_numbers(job.method) if made_of else ():
                self.sources[job.model, made_of, k].result()
        except Exception as error:  # whatever befell the source is why there is no cell
            record(job, {"status": "failed", "error": f"its source: {type(error).__name__}: {error}"})
            return f"failed, its source did: {error}"
        if getattr(self.local, "process", None) is None:
            self.local.process = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=begin, initargs=(self.events, self.threads)
            )
            self.made.append(self.local.process)
        try:
            return self.local.process.submit(work, job).result()  # type: ignore[no-any-return]
        except (BrokenProcessPool, RuntimeError) as error:
            self.local.process.shutdown(wait=False)
            self.local.process = None
            if job.source is not None:
                raise
            if job.task == "webnlg" and not job.path.is_file():
                record(job, {"status": "failed", "error": f"the process died: {error}"})
            return f"failed, and its process was replaced: {error}"

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)
        for process in self.made:
            process.shutdown(cancel_futures=True)


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """What is to be done, the sources first and the cells made of them last."""
    small = {"n_steps": given.steps, "batch": given.batch, "lr_trials": given.trials}
    changed = {key: value for key, value in small.items() if value is not None}
    command = f"python benchmarks/cells.py --category {given.category} --models {given.models} --device {given.device}"
    command += f" --workers {given.workers}" + (f" --seeds {given.seeds}" if given.seeds != "0" else "")
    command += "".join(f" --{name.removeprefix('n_').removeprefix('lr_')} {v}" for name, v in changed.items())
    command += " --try" if given.tried else ""
    cells: list[Job] = []
    for model in given.models.split(","):
        names = given.methods.split(",") if given.methods else candidates(model, given.category)
        size = TRY if given.tried else SIZES["stdlib_docs" if model == ENCODER else "webnlg"]
        size = replace(size, **changed, name=f"{size.name}, changed") if changed else size
        cells += [
            Job(model, name, size, seed, str(given.shared), str(given.out), given.scratch, given.device,
                given.threads, command, given.retry, category=given.category)
            for n, seed in enumerate(map(int, given.seeds.split(",")))
            for name in names
            if n == 0 or not name.startswith(FROZEN)  # what does not train is the same at every seed
        ]  # fmt: skip
    cells = [job for job in cells if not is_done(job)]
    parts = {
        (job.model, sources_of(job.method), k): replace(job, method=sources_of(job.method), source=k)
        for job in cells
        for k in source_numbers(job.method)
    }
    return list(parts.values()) + sorted(cells, key=lambda job: bool(sources_of(job.method)))


def run(given: argparse.Namespace, console: Console) -> int:
    """All of it; the number of cells that failed."""
    jobs = jobs_of(given)
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
                    more = (
                        phase
                        + ("" if loss is None else f", loss {loss:.3f}")
                        + (f", {rate:,.0f} tokens/s" if rate else "")
                    )
                    progress.update(lines[worker], description=name, total=n_steps or 1, completed=step, more=more)
                except Empty:
                    pass
                for future in [f for f in waiting if f.done()]:
                    job = waiting.pop(future)
                    n_done += 1
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


def table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def over(values: Sequence[float], digits: int) -> str:
    """One value, or the mean of several seeds with their standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def generation_table(cells: list[dict[str, Any]]) -> str:
    """Of one backbone, the best BLEU first; seeds of one method in one row."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for c in cells:
        if c["status"] == "done":
            methods.setdefault(c["key"]["method"], []).append(c)
    of = {name: [c["scores"] for c in group] for name, group in methods.items()}
    mean = {name: {k: statistics.mean(s[k] for s in of[name]) for k in ("bleu", "validation_loss")} for name in of}
    floor, sizes = mean.get(FROZEN), any("bits" in c for group in methods.values() for c in group)
    rows = []
    for name, group in sorted(methods.items(), key=lambda item: -mean[item[0]]["bleu"]):
        c, s = group[0], of[name]
        notes = ["baseline"] * (c["category"] == "baseline" or name in BASELINES["webnlg"])
        if floor is not None and not name.startswith(FROZEN) and (
            mean[name]["bleu"] <= floor["bleu"] or mean[name]["validation_loss"] >= floor["validation_loss"]
        ):  # fmt: skip
            notes.append("did not learn")
        notes += [] if c["generation"]["cache"] else ["without a cache"]
        curve = [x for _, x in c.get("curve", ()) if x is not None]
        rates = " ".join(dict.fromkeys(f"{c['lr']:g}" for c in group if "lr" in c and curve))
        rows.append([
            f"`{name}`", *([f"{c['bits']:.2f}" if "bits" in c else "32"] if sizes else []), f"{c['n_trainable']:,}", rates,
            f"{curve[0]:.2f} to {curve[-1]:.2f}" if curve else "", over([x["validation_loss"] for x in s], 3),
            over([x["bleu"] for x in s], 2), over([x["chrf"] for x in s], 1),
            f"{statistics.median(c.get('step_ms', 0) for c in group):.0f}" if curve else "", ", ".join(notes),
        ])  # fmt: skip
    head = ["method", *(["bits"] if sizes else []), "trainable", "lr", "training loss", "validation", "BLEU", "chrF"]
    return table([*head, "ms a step", ""], rows)


def classifier_table(cells: list[Cell]) -> str:
    """Of one backbone, the highest score first."""
    done = sorted((c for c in cells if c.metric and c.time), key=lambda c: -c.metric.test)  # type: ignore[union-attr]
    floor = next((c.metric.test for c in done if c.key.method == "head" and c.metric), None)
    rows = []
    for c in done:
        assert c.metric and c.time
        notes = ["baseline"] * (c.category == "baseline" or c.key.method in BASELINES["stdlib_docs"])
        if floor is not None and c.key.method != "head" and c.metric.test <= floor:
            notes.append("did not learn more than the head")
        losses = [x for _, x in c.curve if x is not None]
        rows.append([
            f"`{c.key.method}`", f"{c.n_trainable:,}", f"{c.lr:g}", f"{losses[0]:.2f} to {losses[-1]:.2f}",
            f"{c.metric.validation:.3f}", f"{c.metric.test:.3f}", f"{c.nll:.3f}", f"{c.time.step_ms:.0f}", ", ".join(notes),
        ])  # fmt: skip
    return table(["method", "trainable", "lr", "training loss", "validation", "test", "NLL", "ms a step", ""], rows)


def tables(folder: Path) -> str:
    """Everything in a results folder. Raises ValueError where it has no cell."""
    ours: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith(".cell.json"):
            continue
        cell = json.loads(path.read_text(encoding="utf-8"))
        ours.setdefault(cell["key"]["backbone"], []).append(cell)
    theirs: dict[str, list[Cell]] = {}
    for found in read_folder(folder):
        theirs.setdefault(found.key.backbone, []).append(found)
    if not ours and not theirs:
        raise ValueError(f"{folder} has no cells")
    parts = []
    for model in sorted({*ours, *theirs}):
        mine, classified = ours.get(model, []), theirs.get(model, [])
        if classified:
            b, on = classified[0].budget, classified[0].machine.device
            size = f"{b.n_steps} steps of {b.batch} rows, {b.lr_trials} learning rates"
            n = f"{b.n_train:,} training and {b.n_test} test rows"
            parts.append(
                f"### {classified[0].key.task} on {model}\n\nAccuracy; {size}, {n}, {on}.\n\n{classifier_table(classified)}"
            )
        elif any(c["status"] == "done" for c in mine):
            first = next(c for c in mine if c["status"] == "done")
            b, n, on = first["budget"], first["generation"]["inputs"], first["machine"]["device"]
            size = f"{b['n_steps']} steps of {b['batch']} rows, {b['lr_trials']} learning rates"
            seeds = len({c["key"]["seed"] for c in mine if c["status"] == "done"})
            size += f", {seeds} seeds, mean ± standard deviation" if seeds > 1 else ""
            parts.append(f"### WebNLG on {model}\n\n{size}, {n} test inputs, greedy, {on}.\n\n{generation_table(mine)}")
        bad = [(c["key"]["method"], c["status"], c["error"]) for c in mine if c["status"] != "done"]
        bad += [(c.key.method, c.status, c.error or "") for c in classified if c.status == "failed"]
        if bad:
            said = {"unfit": "does not fit", "failed": "failed"}
            parts.append("\n".join(f"- `{name}` {said[status]}: {error}" for name, status, error in sorted(bad)) + "\n")
    return "\n".join(parts)


def write_page(page: Path, folder: Path) -> None:
    """Put the tables between the page's markers. Raises ValueError where a marker is missing."""
    text = page.read_text(encoding="utf-8")
    before, opened, rest = text.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not (opened and closed):
        raise ValueError(f"{page.name} needs the markers {OPEN} and {CLOSE}, in this order")
    page.write_text(f"{before}{OPEN}\n{tables(folder)}{CLOSE}{after}", encoding="utf-8")


def main() -> int:
    """Run, or show."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("DELTATUNE_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--category", choices=CATEGORIES, required=True)
    parser.add_argument("--models", default=f"llama-17m,t5-22m,{ENCODER}", help="folders of FOLDER/models, or minilm")
    parser.add_argument("--methods", help="names with commas between; by default the baselines and the category")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes beside each other")
    parser.add_argument("--threads", type=int, default=1, help="of torch, a process")
    parser.add_argument("--seeds", default="0", help="numbers with commas between")
    parser.add_argument("--steps", type=int, help="another number than the task's own")
    parser.add_argument("--batch", type=int, help="likewise")
    parser.add_argument("--trials", type=int, help="likewise, learning rates")
    parser.add_argument(
        "--try", dest="tried", action="store_true", help=f"only whether it runs: {TRY}; give an --out of its own"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing later; run again for the rest")
    parser.add_argument("--out", type=Path, help="by default the category's folder")
    parser.add_argument("--retry", action="store_true", help="measure again what failed or did not fit")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--write", action="store_true", help="put the tables into the category's page")
    given = parser.parse_args()
    given.out = given.out or results_of(given.category)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if given.table:
            print(tables(given.out))
        if given.write:
            write_page(page_of(given.category), given.out)
        if given.table or given.write:
            return 0
        for name in given.methods.split(",") if given.methods else ():
            own = ARMS.get(given.category, {})
            if name != FROZEN and name not in own and name not in METHODS and name not in PRESETS:
                raise unknown("method", name, (FROZEN, *own, *METHODS, *PRESETS))
        with tempfile.TemporaryDirectory() as given.scratch:
            return min(run(given, console), 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
