"""The command line: verbs only. Options of a method come from its declaration: `--method lora --method.r 16`.

Any run can be written as one YAML file (`--config run.yaml`), and every run saves its effective one.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import methods as _methods  # noqa: F401  fills the registry
from .core.compose import PRESETS, Tree, layers_of, looking, placed, storage_of, tree_from_dict, where_of
from .core.errors import unknown
from .core.method import METHODS, Method, named
from .core.sources import saved
from .version import VERSION

CONSOLE = Console()
BASE = "base"  # in a run's folder, the base that the method has quantised for itself
PLACE = ("name", "where", "layers")  # of a method on the command line, beside its hyperparameters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. A user's mistake is one line on standard error and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(VERSION)
        return 0
    try:
        if args[0] not in VERBS:
            raise unknown("verb", args[0], VERBS)
        return VERBS[args[0]](args[1:]) or 0
    except ValueError as error:
        print(f"deltatune: {error}", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [f"  {name:8s} {(function.__doc__ or '').splitlines()[0]}" for name, function in VERBS.items()]
    return "usage: deltatune VERB [options]   (deltatune VERB --help says which)\n\n" + "\n".join(lines)


def _parser(verb: str, function: Callable[..., Any]) -> ArgumentParser:
    return ArgumentParser(prog=f"deltatune {verb}", description=function.__doc__, exit_on_error=False)


def _parse(parser: ArgumentParser, args: list[str]) -> Namespace:
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        text = str(error)
        raise ValueError(text if len(text) < 600 else text[:600] + " ...") from None


def _method_args(parser: ArgumentParser, args: list[str], default: str) -> list[str]:
    """Add the options of the method that the arguments (or their --config) name; a tree is taken as it is."""
    given = dict(_config_of(args).get("method") or {}) if isinstance(_config_of(args).get("method"), Mapping) else {}
    if isinstance(_config_of(args).get("method"), str):
        raise ValueError("method in a configuration is a mapping: method: {name: lora, r: 16}")
    out, name = [], None
    for i, arg in enumerate(args):  # --method lora is short for --method.name lora
        if arg == "--method" and i + 1 < len(args):
            out.append("--method.name")
            name = args[i + 1]
        elif arg.startswith("--method="):
            name = arg.partition("=")[2]
            out.append(f"--method.name={name}")
        else:
            out.append(arg)
    if "op" in given:
        if name is not None or any(a.startswith("--method.") for a in out):
            raise ValueError("the configuration's method is a tree; --method options cannot change it")
        parser.add_argument("--method", type=dict)
        return out
    name = name or given.get("name") or default
    card = named(name)
    told = ("sources", "n_sources") if card.sources else ()  # its folders, below, and their number, which they say
    known = {key: (kind, default) for key, kind, default in card.hyper() if key not in told and kind is not object}
    for arg in out:
        if arg.startswith("--method."):
            key = arg[len("--method.") :].partition("=")[0]
            if key not in known and key not in (*PLACE, *told[:1]):
                raise unknown(f"hyperparameter of {name}", key, [*known, *PLACE, *told[:1]])
    comments = {n: c for n, _, _, c in card.hyperparameters()}
    parser.add_argument("--method.name", type=str, default=name, help="registered method; deltatune methods lists them")
    parser.add_argument(
        "--method.where",
        type=str | list[str] | dict[str, Any] | None,
        default=None,
        help=f"its place (default: {card.where})",
    )  # type: ignore[arg-type]
    parser.add_argument(
        "--method.layers",
        type=int | list[int] | str | None,
        default=None,
        help="layer numbers, or a share of the depth such as 1/6-1/2; all by default",
    )  # type: ignore[arg-type]
    for key, (kind, default) in known.items():
        parser.add_argument(f"--method.{key}", type=kind, default=default, help=comments.get(key, ""))
    if card.sources:
        of = f"folders of saved adapters, such as {card.sources}'s, with commas between"
        parser.add_argument("--method.sources", type=list[str] | str | None, default=None, help=of)  # type: ignore[arg-type]
    return out


def _config_of(args: list[str]) -> dict[str, Any]:
    for i, arg in enumerate(args):
        path = (
            args[i + 1]
            if arg == "--config" and i + 1 < len(args)
            else arg.partition("=")[2]
            if arg.startswith("--config=")
            else ""
        )
        if path:
            if not os.path.isfile(path):
                raise ValueError(f"no configuration file {path!r}")
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if not isinstance(read, dict):
                raise ValueError(f"{path} is not a mapping of options")
            return read
    return {}


def _tree(method: Any) -> Tree:
    """The tree of a parsed `method`: a name with hyperparameters, or a node, whose parts may be such, or `{saved: FOLDER}`."""
    data = method.as_dict() if hasattr(method, "as_dict") else dict(method)
    if "op" in data:
        return tree_from_dict(data, METHODS, _tree)
    if "saved" in data:
        if extra := sorted(data.keys() - {"saved", "frozen"}):
            raise unknown("key of a saved adapter", extra[0], ("saved", "frozen"))
        return saved(**{"folder": data["saved"], **{k: v for k, v in data.items() if k == "frozen"}})  # type: ignore[no-any-return]
    if "name" not in data:
        raise unknown("key of a tree", next(iter(data), "(none)"), ("op", "method", "name", "saved"))
    name, where, layers = (data.pop(k, None) for k in PLACE)
    where = where.as_dict() if isinstance(where, Namespace) else where
    card = named(name)  # type: ignore[arg-type]
    if sources := data.pop("sources", None):
        data["sources"] = sources.split(",") if isinstance(sources, str) else sources
    elif card.sources and card.needs_sources:
        raise ValueError(
            f"{name} is made of saved adapters, such as {card.sources}'s; give it --method.sources FOLDER,..."
        )
    return placed(card(**data), where_of(where), layers_of(layers))


def _plain(config: Namespace, drop: Sequence[str] = ("config",)) -> dict[str, Any]:
    return {k: v for k, v in config.as_dict().items() if k not in drop and v is not None}


def _task_args(parser: ArgumentParser, task: str | None) -> None:
    parser.add_argument("--task", type=str | None, default=task, help="a named task, such as stdlib_docs or glue/sst2")  # type: ignore[arg-type]
    parser.add_argument(
        "--data", type=str | None, default=None, help="your own CSV, TSV, JSONL, parquet file, or folder"
    )  # type: ignore[arg-type]
    parser.add_argument("--text", type=str | None, default=None, help="its text column, or two with a comma between")  # type: ignore[arg-type]
    parser.add_argument("--label", type=str | None, default=None, help="its label column")  # type: ignore[arg-type]
    parser.add_argument("--kind", type=str | None, default=None, help="classification or regression, where not obvious")  # type: ignore[arg-type]


def _task(config: Namespace, n_train: int | None) -> Any:
    from .tasks import task

    name = None if config.data else config.task
    if config.kind not in (None, "classification", "regression"):
        raise unknown("kind", config.kind, ("classification", "regression"))
    found = task(name, data=config.data, text=config.text, label=config.label, kind=config.kind)
    return found.limit(min(n_train, len(found.train))) if n_train is not None else found


def methods(args: list[str]) -> int:
    """List the methods: category, paper, place, count, hyperparameters."""
    parser = _parser("methods", methods)
    parser.add_argument("--json", action="store_true", help="as a list of objects")
    config = _parse(parser, args)
    rows = [
        {
            "name": name,
            "category": m.category,
            "paper": m.paper,
            "where": m.where,
            "count": m.count(),
            "mergeable": m.mergeable(),
            "equation": m.about(),
            "hyperparameters": [
                {"name": n, "type": t, "default": d, "comment": c} for n, t, d, c in m.hyperparameters()
            ],
        }
        for name in (*METHODS, *PRESETS)
        for m in (named(name),)
    ]  # fmt: skip
    if config.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    table = Table(title=f"{len(rows)} methods")
    for column in ("method", "what", "where", "merges"):
        table.add_column(column, no_wrap=column in ("method", "merges"), overflow="fold")
    for row in rows:
        about = f"{row['equation']}\n{row['category']}; {row['count']} parameters at a site"
        cells = [row["name"], about, row["where"], "yes" if row["mergeable"] else "no"]
        table.add_row(*(Text(str(c)) for c in cells), end_section=True)
    CONSOLE.print(table)
    return 0


def sites_(args: list[str]) -> int:
    """Print a model's places with roles, sizes and counts, before anything is attached."""
    from .core.site import all_sites, sites
    from .train.backbone import load_shapes

    parser = _parser("sites", sites_)
    parser.add_argument("model", type=str, help="a folder, a model of the hub, or minilm")
    parser.add_argument("--where", type=str | None, default=None, help="only those that this selects")  # type: ignore[arg-type]
    parser.add_argument(
        "--layers", type=int | list[int] | str | None, default=None, help="numbers, or 1/6-1/2 of the depth"
    )  # type: ignore[arg-type]
    config = _parse(parser, args)
    model = load_shapes(config.model)
    found = all_sites(model) if config.where is None else sites(model, config.where, config.layers)
    table = Table(
        title=f"{len(found)} site{'' if len(found) == 1 else 's'} of {config.model}",
        caption=f"{sum(s.n_weights for s in found):,} weights",
        caption_justify="left",
    )
    for column, side in (
        ("site", "left"),
        ("kind", "left"),
        ("role", "left"),
        ("layer", "right"),
        ("in", "right"),
        ("out", "right"),
        ("weights", "right"),
    ):
        table.add_column(column, justify=side, no_wrap=column == "site")  # type: ignore[arg-type]
    for s in found:
        layer = "" if s.layer is None else str(s.layer)
        table.add_row(
            Text(s.name or "(the model)"),
            s.kind,
            s.role or "",
            layer,
            f"{s.d_in:,}",
            f"{s.d_out:,}",
            f"{s.n_weights:,}" if s.n_weights else "",
        )
    CONSOLE.print(table)
    return 0


def train(args: list[str]) -> int:
    """Fine-tune a backbone with one method, on a named task or on your own data, into a folder."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    parser = _parser("train", train)
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_argument(
        "--model", type=str, default="minilm", help="the backbone: a folder, a model of the hub, or minilm"
    )
    _task_args(parser, "stdlib_docs")
    parser.add_argument("--out", type=str, required=True, help="the run's folder")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument(
        "--lr", type=float | None, default=None, help="learning rate; by default the middle of the method's range"
    )  # type: ignore[arg-type]
    parser.add_argument("--head_lr", type=float | None, default=None, help="the task head's own; by default the same")  # type: ignore[arg-type]
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--warmup", type=float, default=0.06, help="share of the steps")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--n_train", type=int | None, default=None, help="only so many training rows")  # type: ignore[arg-type]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", type=bool, default=False, help="autocast to bfloat16")
    parser.add_argument("--checkpointing", type=bool, default=False, help="recompute activations")
    parser.add_argument("--save_steps", type=int, default=0, help="a checkpoint each so many steps")
    parser.add_argument("--resume", type=bool, default=False, help="go on from the newest checkpoint in --out")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda")  # type: ignore[arg-type]
    parser.add_argument(
        "--quantise",
        type=str | None,
        default=None,
        help="the base's format, such as bnb-nf4; by default the method's own",
    )  # type: ignore[arg-type]
    args = _method_args(parser, args, "lora")
    config = _parse(parser, args)
    tree = _tree(config.method)
    for name, least in (("steps", 1), ("batch", 1), ("max_length", 2)):
        if config[name] < least:
            raise ValueError(f"--{name} is {config[name]}; it must be at least {least}")
    task = _task(config, config.n_train)

    import torch

    from .assess.cells import write_atomic
    from .assess.matrix import claim
    from .assess.run import learning_rates, range_of
    from .core.attach import attach
    from .quant import n_weights, quantise, save_base
    from .quant.base import chosen_for
    from .train.backbone import load_classifier, load_shapes
    from .train.data import Collate, encode, predict, some
    from .train.fit import Plan, fit, optimizer_of

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.quantise = config.quantise or storage_of(tree) or None
    if config.quantise is not None:
        chosen_for(load_shapes(config.model), config.quantise)
    plain = _plain(config, ("config", "resume", "device"))
    claim(config.out, {"verb": "train", **plain})
    for note in (str(task), *task.notes):
        CONSOLE.print(note, highlight=False)
    torch.manual_seed(config.seed)
    model, tokenizer = load_classifier(config.model, task.labels)
    model.to(device)
    if config.quantise is not None:
        quantise(model, config.quantise)
    collate = Collate(tokenizer, task.kind == "regression")
    rows = {
        name: encode(split.texts, split.targets, tokenizer, config.max_length) for name, split in task.splits.items()
    }
    looked = looking(tree, lambda n: some(rows["train"], collate, n, config.batch, config.seed, device))
    adapter = attach(model, looked)
    preset = PRESETS.get(getattr(config.method, "name", ""))
    rates = preset.lr if preset is not None else range_of(tree)
    lr = config.lr if config.lr is not None else learning_rates(*rates, 1)[0]
    n_all = n_weights(model)
    CONSOLE.print(
        f"{adapter.params():,} parameters trained and {adapter.n_head:,} in the head, of {n_all:,}"
        f"{f', base in {config.quantise}' if config.quantise else ''}; learning rate {lr:g}; {device}, {optimizer_of(model)[1]}",
        highlight=False,
    )
    plan = Plan(
        config.steps, config.batch, lr, config.head_lr, config.weight_decay, config.warmup, seed=config.seed, bf16=config.bf16,
        checkpointing=config.checkpointing, save_steps=config.save_steps,
    )  # fmt: skip
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE) as bar:
        line = bar.add_task("train", total=plan.n_steps)

        def progress(step: int, n_steps: int, loss: float | None, rate: float) -> None:
            text = f"{'' if loss is None else f'loss {loss:.3f}, '}{rate:,.0f} tokens/s"
            if device == "cuda":
                text += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            bar.update(line, completed=step, description=text)

        fitted = fit(
            model,
            rows["train"],
            collate,
            plan,
            out=os.path.join(config.out, "checkpoints"),
            resume=config.resume,
            progress=progress,
        )
    scores = {
        s: task.scores(predict(model, rows[s], collate, 4 * config.batch).numpy(), task.splits[s].targets)
        for s in ("validation", "test")
    }
    adapter.save(os.path.join(config.out, "adapter"))
    tokenizer.save_pretrained(os.path.join(config.out, "adapter"))
    result = {
        "scores": scores, "n_params": adapter.params(), "n_head": adapter.n_head, "lr": lr, "labels": list(task.labels),
        "train_s": fitted.train_s, "step_ms": fitted.step_ms, "tokens_per_s": fitted.tokens_per_s, "curve": fitted.curve,
    }  # fmt: skip
    write_atomic(os.path.join(config.out, "result.json"), json.dumps(result, indent=1) + "\n")
    rebased = any(leaf.method.rebases for _, leaf in tree.leaves())
    if rebased:
        adapter.detach()
        save_base(model, os.path.join(config.out, BASE))
    table = Table()
    for column in ("split", *scores["test"]):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, found in scores.items():
        table.add_row(split, *(f"{v:.3f}" for v in found.values()))
    CONSOLE.print(table)
    CONSOLE.print(
        f"{config.out}/adapter holds the adapter{f', {config.out}/{BASE} its base' if rebased else ''}; "
        f"trained in {fitted.train_s:.0f} s, {fitted.tokens_per_s:,.0f} tokens/s",
        highlight=False,
    )
    return 0


def compare(args: list[str]) -> int:
    """Measure methods beside each other on one backbone and one task, and write a report."""
    from .assess.live import Live
    from .assess.matrix import ALL, BUDGETS, DEMO, QUICK, all_methods, budget_of, candidates, claim, run_matrix
    from .assess.report import report, table
    from .assess.run import Bench
    from .train.backbone import load_shapes

    parser = _parser("compare", compare)
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_argument(
        "--model", type=str, default="minilm", help="the backbone: a folder, a model of the hub, or minilm"
    )
    _task_args(parser, "stdlib_docs")
    parser.add_argument(
        "--methods",
        type=list[str] | str | None,
        default=None,
        help=f"names with commas between, or {ALL}; by default {', '.join(DEMO)}",
    )  # type: ignore[arg-type]
    parser.add_argument(
        "--hyper",
        type=dict[str, dict[str, Any]],
        default={},
        help="hyperparameters of some: --hyper.lora '{r: 16}', --hyper.spot '{sources: [runs/mnli/adapter]}'",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--budget", type=str, default="demo-v1", help=f"one of {', '.join(BUDGETS)}")
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} under quick-v1, by default into results/quick"
    )
    parser.add_argument("--out", type=str, default="results/demo", help="the results folder; what is there is done")
    parser.add_argument("--retry", action="store_true", help="measure failed cells again")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda")  # type: ignore[arg-type]
    config = _parse(parser, args)
    budget = "quick-v1" if config.quick else config.budget
    if budget not in BUDGETS:
        raise unknown("budget", budget, BUDGETS)
    if config.seeds < 1:
        raise ValueError(f"--seeds is {config.seeds}; it must be at least 1")
    names = config.methods.split(",") if isinstance(config.methods, str) else config.methods
    left_out: list[str] = []
    if names == [ALL]:
        names, left_out = all_methods(load_shapes(config.model), config.hyper)
    entries = candidates([n.strip() for n in names] if names else QUICK if config.quick else DEMO, config.hyper)
    out = "results/quick" if config.quick and config.out == "results/demo" else config.out
    size = BUDGETS[budget]
    begun = time.perf_counter()
    task = _task(config, size.n_train)
    if size.n_validation is not None and size.n_validation < len(task.validation):
        task = task.limit(n_validation=size.n_validation)

    import torch

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plain = {"verb": "compare", **_plain(config, ("config", "quick", "retry", "device", "out")), "budget": budget}
    claim(out, {**plain, "methods": [e.name for e in entries]}, may_grow=("methods", "seeds", "hyper"))
    for note in (str(task), *task.notes, *left_out):
        CONSOLE.print(note, highlight=False)
    bench = Bench(config.model, task, budget_of(budget, size, task), size.max_length, size.head_lr, device)
    seeds = range(config.seeds)
    title = f"{task.name} on {config.model}: {size.n_steps} steps of {size.batch} rows ({budget})"
    with Live(CONSOLE, title, entries, seeds) as live:
        cells = list(run_matrix(bench, entries, seeds, out, plain, live.tell, config.retry))
    page = report(out)
    CONSOLE.print(table(cells, out))
    CONSOLE.print(f"{page}  ({time.perf_counter() - begun:.0f} s)", highlight=False)
    failed = [c for c in cells if c.status == "failed"]
    return 1 if failed else 0


def report_(args: list[str]) -> int:
    """Write the report of a results folder again: HTML, Markdown, CSV."""
    from .assess.cells import read_folder
    from .assess.report import report, table

    parser = _parser("report", report_)
    parser.add_argument("folder", type=str, help="a results folder")
    parser.add_argument("--out", type=str | None, default=None, help="where to, by default the folder itself")  # type: ignore[arg-type]
    config = _parse(parser, args)
    page = report(config.folder, config.out)
    CONSOLE.print(table(read_folder(config.folder), config.folder))
    CONSOLE.print(str(page), highlight=False)
    return 0


def _check_empty(out: str) -> None:
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out} exists and is not an empty folder")


def _format_in(given: str) -> str | None:
    """The format of the base that a run's folder names."""
    run = Path(given) / "run.yaml"
    return yaml.safe_load(run.read_text(encoding="utf-8")).get("quantise") if run.is_file() else None


def _adapter_in(given: str) -> tuple[Path, str | None, tuple[str, ...] | None]:
    """The folder of an adapter, or of a run's, and where it is a run's its base and its labels."""
    folder = Path(given)
    if not (folder / "run.yaml").is_file():
        return folder, None, None
    run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    labels = json.loads((folder / "result.json").read_text(encoding="utf-8"))["labels"]
    return folder / "adapter", run.get("model"), tuple(labels)


def _base(name: str, labels: tuple[str, ...] | None, run: str | None) -> tuple[Any, Any]:
    """The base `name`, in the format of a run's; or that which its method has quantised. And the tokenizer, where there is one."""
    from .quant import load_base, quantise
    from .train.backbone import load_any

    model, tokenizer = load_any(name, labels)
    if run is not None and (Path(run) / BASE).is_dir():
        return load_base(Path(run) / BASE), tokenizer
    if run is not None and (kept := _format_in(run)) is not None:
        quantise(model, kept)
    return model, tokenizer


def _merged(verb: str, function: Callable[..., Any], args: list[str], formats: tuple[str, ...]) -> int:
    from .core.attach import load

    parser = _parser(verb, function)
    parser.add_argument("adapter", type=str, help="an adapter's folder, or a run's")
    parser.add_argument("--model", type=str | None, default=None, help="its base; by default the run's own")  # type: ignore[arg-type]
    parser.add_argument("--out", type=str, required=True, help="where the result goes")
    if formats:
        parser.add_argument("--format", type=str, default=formats[0], help=f"one of {', '.join(formats)}")
    config = _parse(parser, args)
    if formats and config.format not in formats:
        raise unknown("format", config.format, formats)
    _check_empty(config.out)
    folder, own_model, labels = _adapter_in(config.adapter)
    model_name = config.model or own_model
    if model_name is None:
        raise ValueError(f"{config.adapter} does not say where its base lies; give --model")
    model, tokenizer = _base(model_name, labels, config.adapter)
    adapter = load(model, folder)
    n = adapter.params() + adapter.n_head
    if formats and config.format == "peft":
        adapter.save(config.out, format="peft")
        CONSOLE.print(f"{config.out}: {n:,} parameters in HF PEFT's format, for {model_name}", highlight=False)
        return 0
    adapter.merge()
    adapter.detach()
    model.save_pretrained(config.out)
    if tokenizer is not None:
        tokenizer.save_pretrained(config.out)
    CONSOLE.print(f"{config.out}: {model_name} with {n:,} adapted parameters merged in", highlight=False)
    return 0


def merge(args: list[str]) -> int:
    """Merge an adapter into its base and write a plain transformers model."""
    return _merged("merge", merge, args, ())


def export(args: list[str]) -> int:
    """Write what a serving stack reads: --format merged, a plain transformers model, or peft, HF PEFT's adapter."""
    return _merged("export", export, args, ("merged", "peft"))


def combine_(args: list[str]) -> int:
    """Make one adapter of several trained ones: averages, TIES, DARE, negation (`--weights=-1`), a low rank."""
    from .merging import WAYS, combine

    parser = _parser("combine", combine_)
    parser.add_argument("adapters", type=str, nargs="+", help="folders of adapters of one base, or of runs")
    parser.add_argument("--method", type=str, default="linear", help=f"one of {', '.join(WAYS)}")
    parser.add_argument(
        "--weights", type=list[float] | str | None, default=None, help="with commas between; 1 / n each, of ties 1"
    )  # type: ignore[arg-type]
    parser.add_argument("--density", type=float | None, default=None, help="share of the entries that pruning keeps")  # type: ignore[arg-type]
    parser.add_argument("--sign", type=str, default="total", help="what elects a sign in ties: total or frequency")
    parser.add_argument("--rank", type=int | None, default=None, help="of an svd form")  # type: ignore[arg-type]
    parser.add_argument("--keep", type=float | None, default=None, help="largest share of entries in a values form")  # type: ignore[arg-type]
    parser.add_argument(
        "--head", type=int | None, default=None, help="whose task head is taken, a number from 0; by default none"
    )  # type: ignore[arg-type]
    parser.add_argument("--seed", type=int, default=0, help="of what DARE drops")
    parser.add_argument("--model", type=str | None, default=None, help="their base; by default the first run's own")  # type: ignore[arg-type]
    parser.add_argument("--out", type=str, required=True, help="where the adapter goes")
    config = _parse(parser, args)
    _check_empty(config.out)
    weights = config.weights
    if isinstance(weights, str):
        try:
            weights = [float(w) for w in weights.split(",")]
        except ValueError:
            raise ValueError(f"--weights are numbers with commas between, not {weights!r}") from None
    folders, models, labels = zip(*map(_adapter_in, config.adapters), strict=True)
    model_name = config.model or next(filter(None, models), None)
    if model_name is None:
        raise ValueError(f"{config.adapters[0]} does not say where its base lies; give --model")
    own = labels[config.head] if config.head in range(len(labels)) else None
    model, _ = _base(model_name, own or next(filter(None, labels), None), config.adapters[0])
    adapter = combine(
        model, folders, weights, config.method, density=config.density, sign=config.sign, rank=config.rank,
        keep=config.keep, head=config.head, seed=config.seed,
    )  # fmt: skip
    adapter.save(config.out)
    n, left = adapter.params() + adapter.n_head, adapter.residual
    CONSOLE.print(
        f"{config.out}: {n:,} parameters by {config.method} of {len(folders)} adapters for {model_name}"
        + (f"; {left:.1%} of the change is left out" if adapter.residuals else "")
        + (
            "; no task head: --head takes a source's"
            if config.head is None and any(own is not None for own in labels)
            else ""
        ),
        highlight=False,
    )
    return 0


def check(args: list[str]) -> int:
    """Run the contract suite on a method: a registered name, or MODULE:CLASS from anywhere."""
    from .contract import run, table

    parser = _parser("check", check)
    parser.add_argument("method", type=str, help="a registered name, or module:Class")
    parser.add_argument("--full", action="store_true", help="every kind of site and every dtype")
    parser.add_argument("--seed", type=int, default=0)
    config = _parse(parser, args)
    if ":" in config.method:
        module, _, name = config.method.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise ValueError(f"cannot import {module!r}: {error}") from None
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ValueError(f"{config.method} is not a deltatune.Method")
    elif config.method in METHODS:
        found = METHODS[config.method]
    else:
        raise unknown("method", config.method, METHODS)
    results = run(found, seed=config.seed, full=config.full)
    CONSOLE.print(table(results))
    return 1 if any(r.status == "failed" for r in results) else 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "methods": methods,
    "sites": sites_,
    "train": train,
    "compare": compare,
    "report": report_,
    "merge": merge,
    "export": export,
    "combine": combine_,
    "check": check,
}

if __name__ == "__main__":
    sys.exit(main())
