"""What AdapterHub's `adapters` makes of three adapters by `average_adapter`.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0                   # first, so that no other package chooses its build
    ENV/bin/pip install 'adapters==1.3.*' torch==2.13.0
    ENV/bin/python tests/golden/make_merging.py

The script writes tests/golden/merging.json: the last hidden states of the small backbones of make_adapters.py under what each
way makes of adapters 0, 1 and 2. No weight is stored: every tensor of adapter i is `of(i, fill(...))`, entry by entry.
"""

import datetime
import importlib.metadata
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().with_name("merging.json")
MAKE = runpy.run_path(str(Path(__file__).resolve().with_name("make_adapters.py")))
R = MAKE["R"]
SHARES, WEIGHTS = (0.5, 0.3, 0.2), (1.0, 0.6, -0.8)  # these sum to 1, those not
# of each the backbone, the configuration, the strategy, the weights and the rank
CASES: list[tuple[str, str, str, tuple[float, ...], int | None]] = [
    ("bert", config, "linear", SHARES, None)
    for config in ("lora", "ia3", "seq_bn", "par_bn", "prefix_flat", "prefix", "mam_flat")
]
CASES += [("bert", "lora", "linear", WEIGHTS, None), ("gpt2", "lora", "linear", SHARES, None)]
CASES += [(name, "lora", "lora_linear_only_negate_b", WEIGHTS, None) for name in ("bert", "gpt2")]
CASES += [("bert", "lora", "lora_delta_w_svd", WEIGHTS, rank) for rank in (R, R - 1)]


def of(i: int, t: Tensor) -> Tensor:
    """Adapter i's numbers, of those that make_adapters.py gives the one tensor."""
    return torch.sin((i + 2) * t)


def key(case: tuple[Any, ...]) -> str:
    """A case's name in the file."""
    name, config, strategy, weights, rank = case
    return " ".join(
        [name, config, strategy, "shares" if weights == SHARES else "weights", *([str(rank)] if rank else [])]
    )


def adapted(case: tuple[Any, ...]) -> Tensor:
    """The last hidden states under the adapter that `average_adapter` makes."""
    import adapters as ah

    name, config, strategy, weights, rank = case
    model: Any = MAKE["backbone"](name)
    ah.init(model)
    for i in range(3):
        model.add_adapter(f"a{i}", config=MAKE["configs"](name)[config])
    with torch.no_grad():
        MAKE["set_adapter"](model)  # all three alike
        for path, p in model.named_parameters():
            for i in range(3):
                if f".a{i}." in path:
                    p.copy_(of(i, p))
    model.average_adapter(
        "mean", ["a0", "a1", "a2"], list(weights), combine_strategy=strategy, normalize_weights=False, svd_rank=rank
    )
    model.set_active_adapters("mean")
    return MAKE["states"](model.eval(), name)


if __name__ == "__main__":
    card = {
        "command": "python tests/golden/make_merging.py",
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")},
        "states": {key(case): MAKE["listed"](adapted(case)) for case in CASES},
    }
    text = json.dumps(card, separators=(",", ":")).replace(']]],"', ']]],\n"')  # a line for each case
    GOLDEN.write_text(text + "\n", encoding="utf-8")
