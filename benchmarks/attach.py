"""LoRA on all linears of an 8B Llama on the meta device: attaching it, switching between two, disabling one.

Each implementation gets a fresh model at every turn of `attach`. Switching makes the other of two adapters the active
one; disabling enters and leaves the `with` block.
"""

from collections.abc import Callable
from typing import Any

from bench import Options, Red, Row, benchmark, in_turns, llama, median
from peft import LoraConfig, get_peft_model
from torch import nn

import deltatune as dt

CONFIG = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
N_PARAMS = 41_943_040


@benchmark("attach")
def attach(options: Options) -> list[Row]:
    """Milliseconds, the median of the turns."""
    n = options.repeats or 5
    times: dict[str, list[float]] = {"ours": [], "HF PEFT": []}
    put: dict[str, Callable[[nn.Module], Any]] = {
        "ours": lambda model: dt.attach(model, "lora", where="all-linear", r=16),
        "HF PEFT": lambda model: get_peft_model(model, CONFIG),
    }
    for _ in range(n):
        for name, function in put.items():
            model = llama("8b", "meta")
            times[name] += in_turns({name: lambda f=function, m=model: f(m)}, 1)[name]  # type: ignore[misc]
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if count != N_PARAMS:
                raise Red(f"{name} trains {count:,} parameters, not {N_PARAMS:,}")
    rows = [row("attach", {name: median(ts) for name, ts in times.items()})]

    model = llama("8b", "meta")
    one = dt.attach(model, "lora", where="all-linear", r=16, name="one")
    two = dt.attach(model, "lora", where="all-linear", r=16, name="two")
    theirs = get_peft_model(llama("8b", "meta"), CONFIG, adapter_name="one")
    theirs.add_adapter("two", CONFIG)

    def ours_to(old: dt.Adapter, new: dt.Adapter) -> None:
        old.disable()
        new.enable()

    def ours_round() -> None:
        ours_to(one, two)
        ours_to(two, one)

    def theirs_round() -> None:
        theirs.set_adapter("two")
        theirs.set_adapter("one")

    ours_to(one, two)
    theirs.set_adapter("two")
    if (one.enabled, two.enabled, theirs.active_adapter) != (False, True, "two"):
        raise Red("switching to the second adapter did not make it the active one")
    rounds = in_turns({"ours": ours_round, "HF PEFT": theirs_round}, 4 * n)
    rows.append(row("switch", {name: median(ts) / 2 for name, ts in rounds.items()}))

    def ours_disabled() -> None:
        with one.disabled():
            pass

    def theirs_disabled() -> None:
        with theirs.disable_adapter():
            pass

    rounds = in_turns({"ours": ours_disabled, "HF PEFT": theirs_disabled}, 4 * n)
    rows.append(row("disable", {name: median(ts) for name, ts in rounds.items()}))
    return rows


def row(what: str, seconds: dict[str, float]) -> Row:
    """Both, and their ratio."""
    ours, theirs = seconds["ours"] * 1e3, seconds["HF PEFT"] * 1e3
    return {"8B on meta, all linears": what, "ours ms": ours, "HF PEFT ms": theirs, "ours / HF PEFT": ours / theirs}
