"""AdapterDrop with 6 of 12 layers left out: a training step over all 12 adapters, and several tasks over separate forwards.

HF PEFT has no such adapters; what is beside it are our own in every layer, and one full forward for each task.
"""

from typing import Any

import torch
from bench import Options, Row, agree, benchmark, in_turns, low
from coda import encoder, ids, step_of

import deltatune as dt
from deltatune.methods.drop import answers

TASKS = (2, 4, 8)


@benchmark("adapter_drop")
def adapter_drop(options: Options) -> list[Row]:
    """The 10th percentile of each, and ratios."""
    tokens, repeats = ids(options.device), options.repeats or 12
    steps = {}
    for m in (0, 6):
        model = encoder(options.device)
        adapter = dt.attach(model, "adapter_drop", r=48, m=m, head=None)
        steps[str(m)] = step_of(model, adapter, tokens)
    in_turns(steps, 2, options.device)
    times = {m: low(ts) for m, ts in in_turns(steps, repeats, options.device).items()}
    rows: list[Row] = [
        {
            "6 of 12 layers without adapter": "training step",
            "all ms": times["0"] * 1e3,
            "dropped ms": times["6"] * 1e3,
            "ratio": times["6"] / times["0"],
        }
    ]
    model = encoder(options.device)
    names = [f"task{i}" for i in range(max(TASKS))]
    for name in names:
        dt.attach(model, "adapter_drop", name=name, r=48, m=6, head=None)

    def apart(n: int) -> dict[str, Any]:
        found = dt.adapters(model)
        given = {}
        for name in names[:n]:
            for other, adapter in found.items():
                adapter.enable() if other == name else adapter.disable()
            given[name] = model(tokens)
        return given

    with torch.no_grad():
        one, other = apart(max(TASKS)), answers(model, names, input_ids=tokens)
        for name in names:
            agree(name, other[name].last_hidden_state, one[name].last_hidden_state, 0.0)
        for n in TASKS:
            both = {"apart": lambda n=n: apart(n), "shared": lambda n=n: answers(model, names[:n], input_ids=tokens)}
            in_turns(both, 1, options.device)
            took = {name: low(ts) for name, ts in in_turns(both, repeats, options.device).items()}
            rows.append(
                {
                    "6 of 12 layers without adapter": f"{n} tasks, one batch",
                    "all ms": took["apart"] * 1e3,
                    "dropped ms": took["shared"] * 1e3,
                    "ratio": took["shared"] / took["apart"],
                }
            )
    return rows
