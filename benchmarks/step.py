"""Forward, backward and AdamW of LoRA on all linears: ours, HF PEFT, full fine-tuning, over the frozen floor.

The floor is the same frozen model where the output of the input embeddings alone requires a gradient: what backward
costs without any weight to train. Every variant gets a fresh model in every round, and the rounds go in turns.
"""

import gc
from collections.abc import Callable

import torch
from bench import Options, Row, alike, batch, benchmark, in_turns, llama, low
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import deltatune as dt

STEPS = 8


def floor(model: nn.Module) -> nn.Module:
    """Nothing trains, and the backward goes down to the embeddings' output."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_(True))
    return model


def full(model: nn.Module) -> nn.Module:
    """Everything trains."""
    return model


def ours(model: nn.Module) -> nn.Module:
    """Ours: fp32 tensors of its own."""
    dt.attach(model, "lora", where="all-linear", r=16)
    return model


def peft(model: nn.Module, **options: bool) -> nn.Module:
    """HF PEFT, by default with fp32 adapters and its inputs cast to them."""
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(model, config, **options).eval()


def peft_low(model: nn.Module) -> nn.Module:
    """HF PEFT with adapters in the base's dtype."""
    return peft(model, autocast_adapter_dtype=False)


@benchmark("step")
def step(options: Options) -> list[Row]:
    """The 10th percentile of a step; on a GPU the peak memory of a round."""
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    variants: dict[str, Callable[[nn.Module], nn.Module]] = {
        "floor": floor,
        "full": full,
        "ours": ours,
        "HF PEFT": peft,
    }
    if dtype == torch.bfloat16:
        variants["HF PEFT bf16"] = peft_low
    ids = batch(options.shape, device)
    check(options, torch.float32, 1e-4, 1e-4)
    if dtype != torch.float32:  # gradients through many layers of bf16 differ by as much as HF PEFT's two modes do
        check(options, dtype, 5e-2, 2e-1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    peak: dict[str, float] = {}
    for _ in range(options.repeats or 3):
        for name, prepare in variants.items():
            try:
                times[name] += steps(prepare(llama(options.shape, device, dtype)), ids, device)
            except torch.OutOfMemoryError:
                times[name] = []
            if device == "cuda":
                peak[name] = torch.cuda.max_memory_allocated() / 2**30
            gc.collect()
    title, base = f"{options.shape}, {ids.shape[0]} x {ids.shape[1]}", low(times["floor"])
    return [
        {title: name, "step ms": low(ts) * 1e3 if ts else "out of memory", "x floor": low(ts) / base if ts else ""}
        | ({"peak GiB": peak[name]} if peak else {})
        for name, ts in times.items()
    ]


def steps(model: nn.Module, ids: Tensor, device: str) -> list[float]:
    """Seconds of each step, after three that warm up; the peak of memory counts from there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def one() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    in_turns({"step": one}, 3, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return in_turns({"step": one}, STEPS, device)["step"]


def check(options: Options, dtype: torch.dtype, of_logits: float, of_grads: float) -> None:
    """Raise Red unless ours and HF PEFT give the same logits and gradients, within these relative errors."""
    both = (lambda make=make: make(llama(options.shape, options.device, dtype)) for make in (ours, peft))
    alike(*both, options, dtype, of_logits, of_grads)
