"""What every benchmark shares: the registry, clocks, models, checks, the table and the JSON.

A benchmark is a function of `Options` that returns rows. It runs HF PEFT beside us in the same process and run, in
turns, so that whatever else the machine does hits both. It checks first that both compute the same, and raises `Red`
where they do not: then no number is printed.
"""

import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

Row = dict[str, Any]  # column -> text or number


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    device: str
    shape: str
    repeats: int | None
    out: Path
    profile: bool = False


class Red(Exception):
    """The comparison does not hold, so there is nothing to measure."""


BENCHMARKS: dict[str, Callable[[Options], list[Row]]] = {}


def benchmark(name: str) -> Callable[[Callable[[Options], list[Row]]], Callable[[Options], list[Row]]]:
    """Register a benchmark."""

    def register(function: Callable[[Options], list[Row]]) -> Callable[[Options], list[Row]]:
        BENCHMARKS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Shape:
    """A Llama and the batch that it is stepped with."""

    config: dict[str, int]
    rows: int
    tokens: int


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, rows: int, tokens: int) -> Shape:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return Shape(dict(zip(names, (vocab, hidden, inner, layers, heads, kv), strict=True)), rows, tokens)


SHAPES = {
    "deep": _shape(64, 32, 64, 24, 4, 4, 1, 4),  # next to no arithmetic: what is left is the cost per call
    "small": _shape(2000, 256, 704, 4, 4, 4, 4, 64),
    "1b": _shape(32000, 2048, 5632, 22, 32, 4, 8, 1024),
    "8b": _shape(128256, 4096, 14336, 32, 32, 8, 4, 1024),
    "tiny": _shape(512, 128, 256, 3, 4, 4, 4, 32),
    "7b": _shape(32000, 4096, 11008, 32, 32, 32, 4, 512),
    "13b": _shape(32000, 5120, 13824, 40, 40, 40, 4, 512),
}
SHAPED = ("step", "memory", "qlora", "low_rank", "candidates")  # benchmarks that --shape is for


def llama(shape: str, device: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same random Llama at every call."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape].config, use_cache=False)).eval()
    finally:
        torch.set_default_dtype(before)


def batch(shape: str, device: str) -> Tensor:
    """The same random tokens at every call."""
    s = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(s.config["vocab_size"], (s.rows, s.tokens), generator=generator).to(device)


def pairs_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """LoRA's (A, B) by the base's name of the layer, of ours and of HF PEFT's."""
    import deltatune as dt

    ours = [adapter.deltas for adapter in dt.adapters(model).values()]
    if ours:
        return {site: (delta.a, delta.b) for deltas in ours for (_, site), delta in deltas.items()}  # type: ignore[misc]
    return {
        name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def fill(model: nn.Module) -> None:
    """Put the same numbers into the pairs of every implementation; B is not 0, so that they show."""
    pairs = pairs_of(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for site in sorted(pairs):
            for p in pairs[site]:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def agree(what: str, a: Tensor, b: Tensor, most: float) -> None:
    """Raise Red unless ||a - b|| <= most ||b||."""
    a, b = a.detach().double(), b.detach().double()
    error = ((a - b).norm() / b.norm()).item()
    if not error <= most:
        raise Red(f"{what}: ||a - b|| / ||b|| = {error:.1e}, more than {most:.0e}")


def alike(
    ours: Callable[[], nn.Module],
    theirs: Callable[[], nn.Module],
    options: Options,
    dtype: torch.dtype,
    of_logits: float,
    of_grads: float,
) -> None:
    """Raise Red unless both, filled alike, give the same logits and gradients of their pairs, within these relative errors."""
    ids = batch(options.shape, options.device)[:1, :64]
    found = []
    for make in (ours, theirs):
        model = make()
        fill(model)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append((out.logits.detach(), {n: [p.grad for p in pair] for n, pair in pairs_of(model).items()}))
        del model, out
        gc.collect()
    (logits, grads), (other, others) = found
    agree(f"{dtype} logits", logits, other, of_logits)
    if grads.keys() != others.keys():
        raise ValueError(f"the adapted layers differ: {sorted(grads.keys() ^ others.keys())[:4]}")
    for name, pair in grads.items():
        for key, a, b in zip("AB", pair, others[name], strict=True):
            agree(f"{dtype} gradient of {name} {key}", a, b, of_grads)


def in_turns(functions: Mapping[str, Callable[[], Any]], n: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of `n` calls of each, in turns, the garbage collector off as in timeit."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(n):
            for name, function in functions.items():
                wait(device)
                start = time.perf_counter()
                function()
                wait(device)
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def low(times: list[float]) -> float:
    """The 10th percentile: what it costs where nothing else runs."""
    return sorted(times)[len(times) // 10]


def median(times: list[float]) -> float:
    """The middle one."""
    return sorted(times)[len(times) // 2]


def machine(device: str) -> dict[str, Any]:
    """What it ran on: no name and no path of it."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name()}
    return found | {"threads": torch.get_num_threads(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are compared."""
    import deltatune.version

    found = {"python": platform.python_version(), "deltatune": deltatune.version.VERSION}
    compared = ("torch", "transformers", "peft", *(["bitsandbytes"] if "bitsandbytes" in sys.modules else []))
    return found | {name: importlib.metadata.version(name) for name in compared}


def command(name: str, options: Options) -> str:
    """What runs it again."""
    shape = f" --shape {options.shape}" if name in SHAPED else ""
    repeats = f" --repeats {options.repeats}" if options.repeats else ""
    return f"python benchmarks/run.py {name} --device {options.device}{shape}{repeats}"


def path_of(name: str, options: Options) -> Path:
    """One JSON per benchmark, device and shape."""
    parts = [name, options.device, *([options.shape] if name in SHAPED else [])]
    return options.out / f"{'-'.join(parts)}.json"


def write(name: str, options: Options, rows: list[Row], done: bool = True) -> Path:
    """The rows with what they ran on; a new run replaces the old one, and what is not `done` lies beside it."""
    card = {
        "benchmark": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command(name, options),
        "machine": machine(options.device),
        "versions": versions(),
        "rows": rows,
    }
    path = path_of(name, options)
    part = path.with_suffix(".part.json")
    options.out.mkdir(parents=True, exist_ok=True)
    (path if done else part).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    if done:
        part.unlink(missing_ok=True)
    return path


def begun(name: str, options: Options) -> list[Row]:
    """The rows that a run which was cut off has left, if it was this command on this machine with these versions."""
    part = path_of(name, options).with_suffix(".part.json")
    if not part.is_file():
        return []
    card = json.loads(part.read_text(encoding="utf-8"))
    same = {"command": command(name, options), "machine": machine(options.device), "versions": versions()}
    return card["rows"] if all(card[key] == value for key, value in same.items()) else []


def put(page: Path, name: str, inside: str) -> None:
    """Text between the page's markers of this name. Raises ValueError where one is missing."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(opening)
    _, closed, after = rest.partition(closing)
    if not (opened and closed):
        raise ValueError(f"{page.name} needs the markers {opening} and {closing}, in this order")
    page.write_text(f"{before}{opening}\n{inside}{closing}{after}", encoding="utf-8")


def markdown(rows: list[Row]) -> str:
    """The rows as a table of a page."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, ["---"] * len(heads), *([text(row.get(head, "")) for head in heads] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def table(rows: list[Row]) -> str:
    """The rows as text, numbers to three digits."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([text(row.get(head, "")) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    lines = []
    for line in cells:
        name, *numbers = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([line[0].ljust(len(name)), *numbers]))
    return "\n".join(lines)


def text(value: Any) -> str:
    """A cell."""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
