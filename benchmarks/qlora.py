"""A step of QLoRA beside HF PEFT on the same bitsandbytes layers, over the floor of the frozen NF4 model.

The floor is the base in NF4, scales quantised again, where the output of the input embeddings alone requires a gradient: what a
backward costs without any weight to train. HF PEFT is as `get_peft_model` leaves it, once with the fp32 adapters of its default and
once with adapters in bf16; `prepare_model_for_kbit_training` is not called, which would put norms, embeddings and head into fp32 and
checkpoint activations: all variants have the same base. All of them stand beside each other, and their steps go in turns.
"""

import gc
import json
from pathlib import Path
from typing import Any

import peft
import torch
from bench import (
    SHAPES,
    Options,
    Row,
    alike,
    batch,
    begun,
    benchmark,
    in_turns,
    llama,
    markdown,
    median,
    wait,
    write,
)
from step import floor
from torch import Tensor, nn

import deltatune as dt

RANK, ALPHA = 16, 16
TITLES = ("floor", "ours", "HF PEFT", "HF PEFT bf16")


def quantised(options: Options, dtype: torch.dtype) -> Any:
    """The same base at every call."""
    return dt.quantise(llama(options.shape, options.device, dtype), "bnb-nf4").requires_grad_(False)


def prepared(name: str, options: Options, dtype: torch.dtype) -> nn.Module:
    """A variant on a base of its own."""
    model = quantised(options, dtype)
    if name == "floor":
        return floor(model)
    if name == "ours":
        dt.attach(model, "qlora", r=RANK, alpha=ALPHA, dropout=0.0)
        return model  # type: ignore[no-any-return]
    model.is_loaded_in_4bit = True  # how HF PEFT knows that its own 4-bit layers are meant
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=name == "HF PEFT")
    kinds = {type(m).__name__ for m in wrapped.modules() if hasattr(m, "lora_A")}
    if kinds != {"Linear4bit"}:
        raise ValueError(f"HF PEFT adapts {', '.join(sorted(kinds)) or 'nothing'}, not Linear4bit alone")
    return wrapped.eval()  # type: ignore[no-any-return]


def check(options: Options, dtype: torch.dtype, of_logits: float, of_grads: float) -> None:
    """Raise Red unless ours gives HF PEFT's logits and gradients, within these relative errors."""
    both = (lambda name=name: prepared(name, options, dtype) for name in ("ours", "HF PEFT"))
    alike(*both, options, dtype, of_logits, of_grads)


class Stepped:
    """One variant with its optimiser; `stands` is what it holds between its steps."""

    def __init__(self, name: str, options: Options, dtype: torch.dtype) -> None:
        self.device, before = options.device, allocated(options.device)
        self.model = prepared(name, options, dtype)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=fused) if self.trained else None
        self.step(batch(options.shape, options.device)[:1, :8])
        self.stands = allocated(self.device) - before

    def step(self, ids: Tensor) -> None:
        """Forward, backward, AdamW."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def peak(self, ids: Tensor) -> float:
        """Bytes of a step's peak without what the other variants hold; 0 on a CPU."""
        if self.device != "cuda":
            return 0.0
        others = allocated(self.device) - self.stands
        torch.cuda.reset_peak_memory_stats()
        self.step(ids)
        wait(self.device)
        return torch.cuda.max_memory_allocated() - others


def allocated(device: str) -> int:
    """Bytes that are held now; 0 on a CPU."""
    gc.collect()
    wait(device)
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def profiled(one: Stepped, ids: Tensor) -> str:
    """Where three steps' time went: the thirty operations with most of it."""
    from torch.profiler import ProfilerActivity, profile

    cuda = one.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        for _ in range(3):
            one.step(ids)
        wait(one.device)
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)  # type: ignore[no-any-return]


@benchmark("qlora")
def qlora(options: Options) -> list[Row]:
    """The median of a step with its 10th and 90th percentile, over the floor's; on a GPU its peak memory."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    check(options, torch.float32, 1e-4, 1e-4)
    if dtype == torch.bfloat16:  # gradients through many layers of bf16 differ by as much as HF PEFT's two modes do
        check(options, dtype, 5e-2, 2e-1)
    names = TITLES if dtype == torch.bfloat16 else TITLES[:3]
    rows = begun("qlora", options)
    variants = {name: Stepped(name, options, dtype) for name in names}
    every, profiles = batch(options.shape, options.device), []
    for ids in (every[:1], every):
        size = f"{ids.shape[0]} x {ids.shape[1]}"
        if not any(row["batch"] == size for row in rows):
            steps = {name: (lambda one=one, ids=ids: one.step(ids)) for name, one in variants.items()}
            in_turns(steps, 3, options.device)
            times = in_turns(steps, options.repeats or 20, options.device)
            for name, ts in times.items():
                ordered = sorted(ts)
                rows.append(
                    {"batch": size, "variant": name, "step ms": median(ts) * 1e3}
                    | {f"{p} %": ordered[p * (len(ts) - 1) // 100] * 1e3 for p in (10, 90)}
                    | {"x floor": median(ts) / median(times["floor"])}
                    | ({"peak GiB": variants[name].peak(ids) / 2**30} if options.device == "cuda" else {})
                )
            write("qlora", options, rows, done=False)
        if options.profile:
            profiles += [f"{name}, {size}\n{profiled(variants[name], ids)}\n" for name in ("floor", "ours")]
    if options.profile:
        path = options.out / f"qlora-{options.device}-{options.shape}.profile.txt"
        path.write_text("\n".join(profiles), encoding="utf-8")
    return rows


def page(folder: Path) -> str:
    """What a folder of results holds of the 1.1B shape, for docs/quantised.md."""
    path = folder / "qlora-cuda-1b.json"
    if not path.is_file():
        return ""
    card = json.loads(path.read_text(encoding="utf-8"))
    shown = []
    for row in card["rows"]:
        shown.append(
            {"batch": row["batch"], "": row["variant"], "step ms": f"{row['step ms']:.1f}"}
            | {"10 to 90 %": f"{row['10 %']:.1f} to {row['90 %']:.1f}", "x floor": f"{row['x floor']:.2f}"}
            | {"peak GiB": f"{row['peak GiB']:.2f}"}
        )
    n, has = SHAPES["1b"].config, card["versions"]
    return (
        f"A Llama of {n['num_hidden_layers']} layers and width {n['hidden_size']} (1.1 billion), base in NF4, LoRA of rank {RANK} on "
        f"all linears, bf16, {card['machine']['gpu']}, torch {has['torch']}, bitsandbytes {has['bitsandbytes']}. "
        f"`{card['command']}`\n\n{markdown(shown)}"
    )
