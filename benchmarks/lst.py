"""What a training step of ladder side-tuning keeps for its backward, beside LoRA's and full fine-tuning's, on one BERT-base.

On a GPU 32 rows of 128 tokens, the allocator's peak above what was there before the forward; on a CPU 4 rows, the bytes
that autograd saves, each storage once. LoRA is the paper's, r = 8 on queries and values; the task head trains in all three.
Dropout is 0 in all three: with it the CPU's attention is not fused, and keeps what a GPU's does not.
"""

import gc
from collections.abc import Callable

import torch
from bench import Options, Row, agree, benchmark
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import deltatune as dt
from deltatune.assess.measure import saved_bytes

TOKENS = 128


def bert(device: str) -> nn.Module:
    """The same random BERT-base at every call, with a head for two classes."""
    torch.manual_seed(0)
    with torch.device(device):
        return BertForSequenceClassification(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def full(model: nn.Module) -> nn.Module:
    """Everything trains."""
    return model


def lora(model: nn.Module) -> nn.Module:
    """LoRA on queries and values."""
    dt.attach(model, "lora", r=8)
    return model


def lst(model: nn.Module) -> nn.Module:
    """A side block beside each block, widths divided by 8; what it starts from is no matter of memory."""
    dt.attach(model, "lst", r=8, weights="random", dropout=0.0)
    return model


@benchmark("lst")
def activations(options: Options) -> list[Row]:
    """MiB of one step in training mode, and how often LoRA's goes into it."""
    n_rows = 32 if options.device == "cuda" else 4
    rows = batch(n_rows, options.device)
    with torch.no_grad():
        logits = [prepare(bert(options.device)).eval()(**rows).logits for prepare in (full, lora)]
    agree("LoRA at its start", logits[1], logits[0], 1e-5)
    variants: dict[str, Callable[[nn.Module], nn.Module]] = {"full": full, "lora": lora, "lst": lst}
    found: dict[str, dict[str, float]] = {}
    for name, prepare in variants.items():
        model = prepare(bert(options.device))
        found[name] = (
            on_cuda(model.train(), rows) if options.device == "cuda" else {"forward": saved_bytes(model, rows)}
        )
        found[name]["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        del model
        gc.collect()
    what = "forward" if options.device == "cuda" else "forward, accounted"
    return [
        {f"BERT-base, {n_rows} x {TOKENS}": name, "trained parameters": int(cost["trained"])}
        | {f"{what} MiB": cost["forward"] / 2**20, "x LoRA": cost["forward"] / found["lora"]["forward"]}
        | ({"with backward MiB": cost["step"] / 2**20} if "step" in cost else {})
        for name, cost in found.items()
    ]


def batch(n_rows: int, device: str) -> dict[str, Tensor]:
    """The same random tokens at every call."""
    ids = torch.randint(1000, 30000, (n_rows, TOKENS), generator=torch.Generator().manual_seed(1))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    return {k: v.to(device) for k, v in rows.items()}


def on_cuda(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, float]:
    """The allocator's peak above what was there before, after the forward and after the backward of a second step."""
    model(**rows).loss.backward()  # libraries' workspaces, and the gradients' own memory
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(**rows).loss
    torch.cuda.synchronize()
    forward = torch.cuda.max_memory_allocated() - before
    loss.backward()
    torch.cuda.synchronize()
    return {"forward": forward, "step": torch.cuda.max_memory_allocated() - before}
