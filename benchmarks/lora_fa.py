"""What LoRA keeps for the backward beyond the frozen model, and how much of that LoRA-FA keeps, on all linear layers.

On a CPU BERT-base with 12 layers, on a GPU the Llama of 1.1 billion parameters in bf16, both random. The frozen model's
embedded input asks for a gradient, so that it keeps what a gradient needs to pass through it. Bytes are what autograd saves,
each storage once; on a GPU also what the allocator holds more behind a forward than in front of it.
"""

import gc
from typing import Any

import torch
from bench import Options, Row, benchmark, in_turns, llama, low
from bench import batch as ids_of
from lst import batch as sentences
from lst import bert
from torch import Tensor, nn

import deltatune as dt
from deltatune.assess.measure import saved_bytes

RANK = 8
VARIANTS: dict[str, dict[str, Any] | None] = {
    "frozen": None,
    "lora": {"r": RANK},
    "lora, dropout 0.1": {"r": RANK, "dropout": 0.1},
    "lora_fa": {"r": RANK},
    "lora_fa, dropout 0.1": {"r": RANK, "dropout": 0.1},
}


def model_of(name: str, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with its variant attached, and one batch."""
    if device == "cuda":
        model: Any = llama("1b", device, torch.bfloat16).train()
        ids = ids_of("1b", device)
        rows = {"input_ids": ids, "labels": ids}
    else:
        model, rows = bert(device).train(), sentences(4, device)
    hyper = VARIANTS[name]
    if hyper is None:
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    else:
        dt.attach(model, name.partition(",")[0], where="all-linear", head=None, **hyper)
    return model, rows


def held(model: nn.Module, rows: dict[str, Tensor]) -> float:
    """Bytes that the allocator holds more behind a forward than in front of it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = model(**rows).loss
    torch.cuda.synchronize()
    more = torch.cuda.memory_allocated() - before
    del loss
    return more


@benchmark("lora_fa")
def lora_fa(options: Options) -> list[Row]:
    """Bytes, and the 10th percentile of a forward and backward; on a GPU one variant after the other."""
    on_gpu = options.device == "cuda"
    found: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        model, rows = model_of(name, options.device)

        def step(model: nn.Module = model, rows: dict[str, Tensor] = rows) -> None:
            model(**rows).loss.backward()
            for p in model.parameters():
                p.grad = None

        in_turns({name: step}, 2, options.device)
        found[name] = {"saved": saved_bytes(model, rows), "held": held(model, rows) if on_gpu else 0.0}
        found[name]["time"] = low(
            in_turns({name: step}, options.repeats or (10 if on_gpu else 7), options.device)[name]
        )
        del model, rows, step
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    floor, lora = found["frozen"], found["lora"]
    what = "Llama of 1.1 billion, bf16, 8 x 1024" if on_gpu else "BERT-base, 4 x 128"
    table = []
    for name, cost in found.items():
        row: Row = {f"{what}, r {RANK}": name}
        for key in ("saved", "held") if on_gpu else ("saved",):
            row |= {
                f"{key} MiB": cost[key] / 2**20,
                f"{key}, beyond frozen, x lora": (cost[key] - floor[key]) / (lora[key] - floor[key]),
            }
        table.append(row | {"step ms": cost["time"] * 1e3, "time x frozen": cost["time"] / floor["time"]})
    return table
