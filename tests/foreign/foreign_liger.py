"""What a process with Liger-Kernel in it finds; its patches stay in the process."""

from pathlib import Path
from typing import Any

import torch
from foreign import COLUMNS, Case, base, batch, labels
from torch import Tensor

import deltatune as dt
from deltatune.train.trainer import check_alive

WAYS = ("before", "after")
LM_HEAD = (
    "lora",
    "sequential",
    "ia3",
    "head",
)  # the columns that can stand on `lm_head` beside the attention's queries


def run(rank: int, file: str, device: str, n_threads: int) -> None:
    """Every method under every order of attach and Liger, beside itself without Liger; written to `file`."""
    torch.set_num_threads(n_threads)
    found: dict[Any, Any] = {}
    plain = {}
    for column in COLUMNS:
        if column != "head":
            model = base("causal").to(device)
            Case(column, Path()).attach(model)
            plain[column] = passes(model, device)
    bare = passes(base("causal").to(device), device)["logits"]
    for column, want in plain.items():
        for way in WAYS:
            found[column, way] = one(column, way, device, want, bare)
    for column in LM_HEAD:
        found[column, "lm_head"] = lm_head(column, device)
    found["norm"] = norm(device)
    torch.save(found, file)


def kernels(model: Any, device: str) -> None:
    """Liger on this model; its RMSNorm calls libdevice, which the interpreter does not have."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model, rms_norm=device != "cpu")


def given(device: str) -> dict[str, Tensor]:
    """Two short rows, one of them padded: the interpreter runs row by row."""
    rows = {**batch("causal"), "labels": labels("causal")}
    return {name: tensor[[0, 3], :5].to(device) for name, tensor in rows.items()}


def passes(model: Any, device: str) -> dict[str, Any]:
    """The logits in evaluation, then the loss and the gradients of a training step."""
    model.eval()
    rows = given(device)
    target = rows.pop("labels")
    with torch.no_grad():
        logits = model(**rows).logits.cpu()
    out = model.train()(**rows, labels=target)
    if out.loss.requires_grad:
        out.loss.backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"logits": logits, "loss": out.loss.detach().cpu(), "grads": grads, "fused": out.logits is None}


def one(column: str, way: str, device: str, want: dict[str, Any], bare: Tensor) -> dict[str, Any]:
    """Pairs (with Liger, without) of one method in one order."""
    model = base("causal").to(device)
    if way == "before":
        kernels(model, device)
    adapter = Case(column, Path()).attach(model)
    if way == "after":
        kernels(model, device)
    got = passes(model, device)
    found: dict[str, Any] = {"fused": got["fused"], "names": (list(got["grads"]), list(want["grads"]))}
    found["pairs"] = {name: (got[name], want[name]) for name in ("logits", "loss")}
    found["pairs"] |= {name: (grad, want["grads"][name]) for name, grad in got["grads"].items()}
    rows = given(device)
    rows.pop("labels")
    model.eval()
    with torch.no_grad():
        with adapter.disabled():
            found["pairs"]["disabled"] = (model(**rows).logits.cpu(), bare)
        adapter.detach()
        found["pairs"]["detached"] = (model(**rows).logits.cpu(), bare)
    return found


def lm_head(column: str, device: str) -> str:
    """What the liveness check says of a delta on the layer whose weight Liger's loss reads."""
    model = base("causal").to(device)
    adapter = dt.attach(model, column, **COLUMNS[column][1], where="attn.q,lm_head")
    kernels(model, device)
    passes(model, device)
    try:
        check_alive(model, torch.optim.SGD(adapter.parameters(), 0.1), [adapter])
    except ValueError as error:
        return str(error)
    return ""


def norm(device: str) -> str:
    """What attach says of a layer whose forward Liger replaced on the instance."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = base("causal").to(device)
    apply_liger_kernel_to_llama(model=model)
    try:
        dt.attach(model, "copy", where="norm")
    except ValueError as error:
        return str(error)
    return ""
