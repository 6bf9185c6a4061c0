"""Liger-Kernel under and over adapters: on a CPU by Triton's interpreter, on a GPU with its RMSNorm too."""

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import foreign_liger
import pytest
import torch
from foreign import COLUMNS, Case, Refused, base, cells, check_cell, close, row

import deltatune as dt

LIGER = "Liger-Kernel: on a CPU by Triton's interpreter, which lacks its RMSNorm; on a GPU all"
NO_HEAD = Refused("this backbone has no 'head'")
UNSEEN = Refused("got no gradient: its site did not run, its forward was replaced after attach, or the loss reads")
HOLDS = "logits, loss, gradients, `disabled`, `detach`"


@functools.cache
def in_a_process(device: str) -> dict[Any, Any]:
    """What `foreign_liger.run` finds there, in one spawned process."""
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with tempfile.TemporaryDirectory(prefix="deltatune-") as folder, pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")  # Triton has no driver for a CPU; read when it is imported
        file = Path(folder) / "found.pt"
        torch.multiprocessing.spawn(foreign_liger.run, args=(str(file), device, torch.get_num_threads()))
        found = torch.load(file, weights_only=False)
    assert isinstance(found, dict)
    return found


def patched(case: Case, way: str) -> None:
    """Liger's own loss ran, and everything equals the same method without Liger."""
    found = in_a_process(case.device)[case.column, way]
    assert found["fused"]
    assert found["names"][0] == found["names"][1]
    for name, pair in found["pairs"].items():
        assert close(*pair, 1e-4), name


@row(
    LIGER,
    f"`apply_liger_kernel_to_llama(model=model)`, then attach: {HOLDS}",
    slow=tuple(COLUMNS),
    head=NO_HEAD,
)
def liger_before(case: Case) -> None:
    if case.column == "head":
        case.attached("causal")
    patched(case, "before")


@row(
    LIGER,
    f"attach, then `apply_liger_kernel_to_llama(model=model)`: {HOLDS}",
    slow=tuple(COLUMNS),
    head=NO_HEAD,
)
def liger_after(case: Case) -> None:
    if case.column == "head":
        case.attached("causal")
    patched(case, "after")


@row(
    LIGER,
    "the method on `lm_head` too, whose weight Liger's loss reads past the layer; in our trainer, or `ScheduleCallback`",
    slow=tuple(COLUMNS),
    lora=UNSEEN,
    sequential=UNSEEN,
    ia3=UNSEEN,
    prefix_tuning=Refused("names sites of kind linear, supported here: attention"),
    prompt_tuning=Refused("names sites of kind linear, supported here: input"),
    head=UNSEEN,
)
def liger_lm_head(case: Case) -> None:
    if case.column == "full":
        assert "lm_head.weight" in in_a_process(case.device)["full", "after"]["names"][0]
    elif case.column in foreign_liger.LM_HEAD:
        raise ValueError(in_a_process(case.device)[case.column, "lm_head"])
    else:
        dt.attach(base("causal"), case.column, **COLUMNS[case.column][1], where="attn.q,lm_head")


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@cells(__name__)
def test_cell_on_a_gpu(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path, "cuda")


@pytest.mark.slow
def test_a_layer_that_liger_replaced_is_refused() -> None:
    """Liger's RMSNorm would run past a delta on the norm."""
    assert "its forward was replaced on the instance (by liger_kernel" in in_a_process("cpu")["norm"]
