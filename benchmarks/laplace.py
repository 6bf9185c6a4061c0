"""How sure a LoRA that was trained on few rows may be: its own probabilities, Laplace-LoRA's, a temperature's, an ensemble's.

    python benchmarks/laplace.py --shared FOLDER --device cuda --write
    python benchmarks/laplace.py --tasks glue/mrpc --n-train 200 --n-validation 100 --n-test 300 --n-steps 150 --batch 8   (a CPU)

`FOLDER` holds data/glue_* (by default what DELTATUNE_SHARED names, or ../shared); the backbone is MiniLM. A run trains LoRA on a few
hundred rows for many epochs, with the task's head. Then, on the same test rows:

    map          the softmax of what was trained
    laplace      dt.laplace of it, with the prior of largest evidence or of best validation likelihood; probit, and Monte Carlo
    temperature  the softmax of logits / T, T of best validation likelihood
    ensemble     the mean softmax of `--members` runs

Numbers are means over runs with Student's 95 % interval; differences to `map` have a paired bootstrap over the test rows.
`--write` writes results/laplace/laplace.json and laplace.md.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

import deltatune as dt
from deltatune.assess.measure import machine, versions
from deltatune.assess.stats import mean_interval, paired_bootstrap
from deltatune.tasks import Task, task
from deltatune.tasks.metrics import accuracy, brier, ece, nll, softmax
from deltatune.train.backbone import load_classifier
from deltatune.train.data import Collate, Rows, encode, predict
from deltatune.train.fit import Plan, fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "laplace"
SCORES = {
    "accuracy": lambda t, p: accuracy(t, np.asarray(p).argmax(-1)),
    "nll": nll,
    "ece": ece,
    "brier": brier,
}
MAP = "map"
Probabilities = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Settings:
    """What every run has alike."""

    backbone: str = "minilm"
    where: str = "q,v"
    r: int = 8
    alpha: float = 16.0
    n_kfac: int = 10
    n_samples: int = 1000
    n_train: int = 300
    n_validation: int = 200
    n_test: int = 500
    n_steps: int = 200
    batch: int = 16
    lr: float = 2e-3
    max_length: int = 64
    seeds: int = 3
    members: int = 3  # of an ensemble


@dataclass(frozen=True)
class Data:
    """A task's rows as they are used, encoded."""

    task: Task
    rows: dict[str, Rows]
    targets: dict[str, list[int]]


def read(name: str, settings: Settings, tokenizer: Any) -> Data:
    """The first rows of each split in the task's own stratified order."""
    whole = task(name)
    few = whole.limit(settings.n_train, min(settings.n_validation, len(whole.validation)))
    splits = few.splits | {"test": few.test.head(settings.n_test)}
    rows = {k: encode(s.texts, s.targets, tokenizer, settings.max_length) for k, s in splits.items()}
    return Data(few, rows, {k: [int(t) for t in s.targets] for k, s in splits.items()})


def batches(rows: Rows, collate: Collate, n: int) -> list[dict[str, Tensor]]:
    """All rows in their order, each once."""
    return [collate([rows[i] for i in range(at, min(at + n, len(rows)))]) for at in range(0, len(rows), n)]


def trained(data: Data, settings: Settings, seed: int, device: str) -> tuple[dt.Adapter, Collate]:
    """One run: a fresh head and a fresh LoRA, trained."""
    torch.manual_seed(seed)
    model, tokenizer = load_classifier(settings.backbone, data.task.labels)
    model.to(device)
    adapter = dt.attach(model, "laplace_lora", where=settings.where, r=settings.r, alpha=settings.alpha)
    collate = Collate(tokenizer, False)
    plan = Plan(n_steps=settings.n_steps, batch=settings.batch, lr=settings.lr, weight_decay=0.0, seed=seed)
    fit(model, data.rows["train"], collate, plan)
    return adapter, collate


def temperature(logits: Probabilities, targets: Sequence[int]) -> float:
    """The T of least negative log-likelihood of softmax(logits / T)."""
    found = minimize_scalar(lambda t: nll(targets, softmax(logits / np.exp(t))), bounds=(-3.0, 5.0), method="bounded")
    return float(np.exp(found.x))


def answers(
    data: Data, settings: Settings, seed: int, device: str
) -> tuple[dict[str, Probabilities], dict[str, float]]:
    """(test probabilities by method, what was found on the way) of one run."""
    adapter, collate = trained(data, settings, seed, device)
    model = adapter.model
    logits = {k: predict(model, data.rows[k], collate, 64).double().numpy() for k in ("train", "validation", "test")}
    found = {MAP: softmax(logits["test"])}
    t = temperature(logits["validation"], data.targets["validation"])
    found["temperature"] = softmax(logits["test"] / t)
    notes = {"temperature": t, "train_accuracy": accuracy(data.targets["train"], logits["train"].argmax(-1))}
    cut = {k: batches(rows, collate, settings.batch) for k, rows in data.rows.items()}
    begun = time.perf_counter()
    by_evidence = dt.laplace.fit(adapter, cut["train"], n_kfac=settings.n_kfac)
    notes["fit_s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    sights = [by_evidence.sight(batch) for batch in cut["test"]]
    notes["predict_s"] = time.perf_counter() - begun
    by_rows = by_evidence.tuned("validation", cut["validation"])
    for prior, posterior in (("evidence", by_evidence), ("validation", by_rows)):
        notes[f"prior_{prior}"] = posterior.prior
        mean = torch.cat([sight.mean for sight in sights])
        covariance = torch.cat([sight.covariance(posterior.values, posterior.prior) for sight in sights])
        for how in ("probit", "mc"):
            p = dt.laplace.probabilities(mean, covariance, how, settings.n_samples, seed)
            found[f"laplace ({prior}, {how})"] = p.double().cpu().numpy()
    return found, notes


def measured(data: Data, settings: Settings, device: str) -> dict[str, Any]:
    """A task: `seeds` runs, beside each an ensemble of itself and `members` - 1 others of no other ensemble."""
    runs, notes = [], []
    for seed in range(settings.seeds):
        begun = time.perf_counter()
        found, note = answers(data, settings, seed, device)
        members = [found[MAP]]
        for i in range(1, settings.members):
            adapter, collate = trained(data, settings, seed + i * settings.seeds, device)
            members.append(softmax(predict(adapter.model, data.rows["test"], collate, 64).double().numpy()))
        if settings.members > 1:
            found[f"ensemble of {settings.members}"] = np.mean(members, 0)
        runs.append(found)
        notes.append(note)
        print(f"  {data.task.name}: run {seed + 1} of {settings.seeds}, {time.perf_counter() - begun:.0f} s, "
              f"nll {nll(data.targets['test'], found[MAP]):.3f} as trained", flush=True)  # fmt: skip
    targets = data.targets["test"]
    methods: dict[str, Any] = {}
    for name in runs[0]:
        one: dict[str, Any] = {}
        for metric, score in SCORES.items():
            values = [score(targets, run[name]) for run in runs]
            mean, interval = mean_interval(values)
            one[metric] = {"mean": mean, "interval": interval, "runs": values}
            if name != MAP:
                ours, theirs = ([run[n].tolist() for run in runs] for n in (name, MAP))
                difference = float(np.mean(values)) - methods[MAP][metric]["mean"]
                drawn = paired_bootstrap(score, targets, ours, theirs, n_resamples=1000)
                one[metric] |= {"minus_map": difference, "minus_map_interval": drawn}
        methods[name] = one
    return {
        "hash": data.task.hash,
        "rows": {k: len(rows) for k, rows in data.rows.items()},
        "classes": len(data.task.labels),
        "methods": methods,
        "notes": notes,
    }


def table(result: dict[str, Any]) -> str:
    """The numbers as Markdown: a mean with the half-width of its interval; NLL and ECE also less those of `map`."""
    lines = ["# Laplace-LoRA beside its own mean, a temperature and an ensemble", "", f"`{result['command']}` on "
             f"{result['machine']['device']}: MiniLM, means over {result['settings']['seeds']} runs ± half of Student's 95 % "
             "interval; differences to map with a paired bootstrap's 95 % interval over the test rows.", ""]  # fmt: skip
    for name, one in result["tasks"].items():
        sizes = one["rows"]
        lines += [f"**{name}**, {one['classes']} classes, {sizes['train']} training and {sizes['test']} test rows", ""]
        lines += ["| method | accuracy | NLL | ECE | NLL − map | ECE − map |", "| --- | --- | --- | --- | --- | --- |"]
        for method, scores in one["methods"].items():
            cells = [method]
            for metric in ("accuracy", "nll", "ece"):
                mean, interval = scores[metric]["mean"], scores[metric]["interval"]
                cells.append(f"{mean:.3f}" + (f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else ""))
            for metric in ("nll", "ece"):
                s = scores[metric]
                cells.append("" if method == MAP else "{:+.3f} ({:+.3f} to {:+.3f})".format(
                    s["minus_map"], *s["minus_map_interval"]))  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default=os.environ.get("DELTATUNE_SHARED", str(ROOT.parent / "shared")))
    parser.add_argument("--tasks", default="stdlib_docs,glue/mrpc")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="write results/laplace/laplace.json and .md")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    os.environ.setdefault("DELTATUNE_DATA", str(Path(options.shared) / "data"))
    settings = replace(Settings(), **{f.name: getattr(options, f.name) for f in fields(Settings)})
    begun = time.perf_counter()
    found: dict[str, Any] = {}
    for name in options.tasks.split(","):
        _, tokenizer = load_classifier(settings.backbone, ("a", "b"))
        found[name] = measured(read(name, settings, tokenizer), settings, options.device)
    changed = {k: v for k, v in asdict(settings).items() if v != getattr(Settings(), k)}
    words = ["python benchmarks/laplace.py"]
    words += [
        f"--{k}={getattr(options, k)}" for k in ("tasks", "device") if getattr(options, k) != parser.get_default(k)
    ]
    words += [f"--{k.replace('_', '-')}={v}" for k, v in changed.items()]
    result = {
        "benchmark": "laplace",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(words),
        "machine": asdict(machine()) | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "seconds": round(time.perf_counter() - begun),
        "settings": asdict(settings),
        "tasks": found,
    }
    print(table(result))
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "laplace.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "laplace.md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
