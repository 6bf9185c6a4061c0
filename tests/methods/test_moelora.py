"""MOELoRA against its reference code: two layers of one gate, every gradient, the weight merged for each task, the start."""

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_moelora.py"))
fill, WIDTHS, SHAPE, SIZES = MAKE["fill"], MAKE["WIDTHS"], MAKE["SHAPE"], MAKE["SIZES"]
TASKS = torch.tensor(MAKE["TASKS"])
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def layers() -> tuple[nn.Sequential, dt.Adapter, dict[str, nn.Parameter]]:
    """The two layers, their adapter, and its tensors by the golden file's names."""
    model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(WIDTHS))).double()
    adapter = dt.attach(model, "moelora", where=["0", "1"], head=None, dropout=0.0, **SIZES)
    found = {
        name.removeprefix("0.") if name.startswith("0.") else name.split("_")[0].removeprefix("bank."): p
        for name, p in adapter.named_parameters()
    }
    assert found.keys() == GOLDEN["grads"].keys() - {"x"}
    with torch.no_grad():
        for key, p in (*model.named_parameters(), *found.items()):
            if "deltas" not in key and "banks" not in key:
                p.copy_(fill(key, p.shape))
    return model, adapter, found


def test_as_the_reference_computes() -> None:
    model, _, found = layers()
    x = fill("x", (*SHAPE, WIDTHS[0])).requires_grad_()
    out = model(x, task_ids=TASKS)
    torch.testing.assert_close(out, exact(GOLDEN["out"]), rtol=0, atol=1e-12)
    grads = torch.autograd.grad((out * fill("y", out.shape)).sum(), [x, *found.values()])
    for key, grad in zip(("x", *found), grads, strict=True):
        assert grad.any()
        torch.testing.assert_close(grad.flatten(), exact(GOLDEN["grads"][key]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", range(SIZES["n_tasks"]))
def test_merged_for_a_task(task: int) -> None:
    """The reference's weight, and the outputs of a batch of that task."""
    model, adapter, _ = layers()
    x = fill("x", (*SHAPE, WIDTHS[0]))
    want = model(x, task_ids=torch.full((SHAPE[0],), task))
    adapter.set(task=task)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    adapter.merge()
    torch.testing.assert_close(model[1].weight.flatten(), exact(GOLDEN["merged"][task]), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    adapter.unmerge()
    other = (task + 1) % SIZES["n_tasks"]
    assert (model(x, task_ids=torch.full((SHAPE[0],), other)) - want).abs().max() > 1e-3


def test_the_start_is_the_reference_s() -> None:
    """As wide as its tensors; one gate for all layers, so that the count is LoRA's and the gate's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 300))
    adapter = dt.attach(
        model, "moelora", where=["0", "1"], head=None, n_experts=100, r=100, n_tasks=500, alpha=1.0, d_task=64
    )
    found = {name.rpartition(".")[2].split("_")[0]: p.detach() for name, p in adapter.named_parameters()}
    for key, std in GOLDEN["starts"].items():
        assert float(found[key].std()) == pytest.approx(std, rel=0.02), key
    assert not found["b"].any()
    assert adapter.params() == 100 * (700 + 600) + 500 * 64 + 100 * 64
