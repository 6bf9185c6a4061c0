"""What AdapterHub's `adapters` computes with the bottom layers left out: its form of AdapterDrop, Pfeiffer's adapter.

    ENV/bin/python tests/golden/make_adapter_drop.py    # ENV as in make_adapters.py: adapters 1.3 and its own transformers

writes tests/golden/adapter_drop.json: the last hidden states of backbones of four layers, bare and with adapters above the
bottom M alone. Tensors are formulas of their names (`make_adapters.py`). `leave_out` counts T5's decoder behind its encoder.
"""

import importlib.metadata
import json
import runpy
from pathlib import Path
from typing import Any

from torch import nn

MAKE = runpy.run_path(str(Path(__file__).resolve().with_name("make_adapters.py")))
MAKE["backbone"].__globals__["LAYERS"] = 4
GOLDEN = Path(__file__).resolve().with_name("adapter_drop.json")
BACKBONES = ("bert", "gpt2", "llama", "t5")
M = (1, 3)


def backbone(name: str) -> nn.Module:
    """Four layers, of T5 four and four."""
    model: nn.Module = MAKE["backbone"](name)
    return model


if __name__ == "__main__":
    import adapters as ah

    config, adapted = ah.SeqBnConfig, MAKE["adapted"]
    found: dict[str, Any] = {}
    for name in BACKBONES:
        found[name] = {"bare": MAKE["states"](backbone(name), name)}
        for m in M:
            left = [*range(m), *(range(4, 4 + m) if name == "t5" else ())]
            found[name][str(m)] = adapted(name, config(reduction_factor=MAKE["D"] / MAKE["R"], leave_out=left))
    card = {
        "command": "python tests/golden/make_adapter_drop.py",
        "versions": {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")},
        "states": {n: {key: MAKE["listed"](value) for key, value in every.items()} for n, every in found.items()},
    }
    text = json.dumps(card, separators=(",", ":")).replace(']]],"', ']]],\n"')
    GOLDEN.write_text(text + "\n", encoding="utf-8")
