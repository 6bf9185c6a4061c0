"""Methods that have a mixture for each task: whose task a row is, what is merged, and what stands in the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from soft import check_generate, logits, model_of, moved, near, padded, rows
from torch import Tensor

import deltatune as dt

METHODS = ("moelora", "polytropon")
IDS = torch.tensor([2, 0, 1])


def put(model: Any, method: str, **hyper: Any) -> dt.Adapter:
    return moved(dt.attach(model, method, head=None, **{"n_tasks": 3, "r": 8, "alpha": 32.0} | hyper))


def of_task(task: int, n_rows: int = 3) -> Tensor:
    return torch.full((n_rows,), task)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_each_row_has_its_task(kind: str, method: str, tmp_path: Path) -> None:
    """Rows of a batch are those of batches of one task each, also after a save and a load; a set task is theirs who say none."""
    model = model_of(kind)
    adapter = put(model, method)
    given = padded(kind) | ({"decoder_input_ids": rows()[:, :4]} if kind == "t5" else {})
    got = logits(model, **given, task_ids=IDS)
    for row, task in enumerate(IDS.tolist()):
        near(got[row], logits(model, **given, task_ids=of_task(task))[row])
    assert (got - logits(model, **given, task_ids=IDS.roll(1))).abs().max() > 0.05
    adapter.set(task=1)
    assert torch.equal(logits(model, **given), logits(model, **given, task_ids=of_task(1)))
    assert torch.equal(logits(model, **given, task_ids=IDS), got)
    adapter.save(tmp_path)
    other = model_of(kind)
    dt.load(other, tmp_path)
    assert torch.equal(logits(other, **given, task_ids=IDS), got)
    assert torch.equal(logits(other, **given), logits(model, **given)), "the set task is in the file"


@pytest.mark.parametrize("method", METHODS)
def test_merged_for_each_task(method: str) -> None:
    """Merged and unmerged for one task after the other, on the training mode too; without one there is nothing to merge."""
    model = model_of("llama").train()  # no dropout of its own
    adapter = put(model, method)
    with pytest.raises(
        ValueError, match=rf"q_proj: {method} has another weight for each of its 3 tasks; .*set\(task=0\)"
    ):
        adapter.merge()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for task in (2, 0):
        model.eval()
        want = logits(model, input_ids=rows(), task_ids=of_task(task))
        model.train()
        adapter.set(task=task)
        adapter.merge()
        near(logits(model, input_ids=rows()), want)
        adapter.unmerge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    adapter.merge()
    adapter.detach()
    near(logits(model, input_ids=rows()), want)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_weight(method: str) -> None:
    """Under a method that works on the weight all rows have one task, whose gradients are those of the other way; or an error."""
    model = model_of("llama")
    adapter = put(model, method, where="q", **({"dropout": 0.0} if method == "moelora" else {}))
    given = {"input_ids": rows(), "task_ids": of_task(2)}
    want = model(**given).logits
    grads = torch.autograd.grad(want.square().mean(), adapter.parameters())
    outer = dt.attach(model, "loha", name="outer", head=None, where="q")  # 0 at the start, and a fold alone
    outer.trainable(False)
    assert not any(d.fast or d.has_linear for d in outer.deltas.values())
    got = model(**given).logits
    near(got, want)
    for a, b in zip(torch.autograd.grad(got.square().mean(), adapter.parameters()), grads, strict=True):
        near(a, b, 1e-4)
    with pytest.raises(ValueError, match=rf"q_proj: {method} works on the weight here, .* one task, not \[0, 1, 2\]"):
        model(input_ids=rows(), task_ids=IDS)
    if method == "polytropon":
        with pytest.raises(ValueError, match="q_proj: polytropon draws each row's skills while it trains"):
            model.train()(**given)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_weight_in_one_graph(method: str) -> None:
    """There too rows of several tasks are refused, while it runs."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    delta: Any = next(iter(put(model, method, where=["0"]).deltas.values()))
    delta.fast = False
    compiled: Any = torch.compile(model.eval(), backend="eager", fullgraph=True)
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near(compiled(x, task_ids=of_task(2)), model(x, task_ids=of_task(2)))
        with pytest.raises(
            RuntimeError, match=f"0: {method} works on the weight here, where all rows .* have one task"
        ):
            compiled(x, task_ids=IDS)


@pytest.mark.parametrize("method", METHODS)
def test_generate(method: str) -> None:
    check_generate("llama", lambda model: put(model, method), task_ids=IDS)


@pytest.mark.parametrize("method", METHODS)
def test_what_it_refuses(method: str) -> None:
    model = model_of("bert")
    adapter = put(model, method)
    site = "layer.0.attention.self.query"
    with pytest.raises(ValueError, match=rf"{site}: task id 3, but {method} has the tasks 0 to 2"):
        model(**padded(), task_ids=torch.tensor([0, 3, 1]))
    with pytest.raises(ValueError, match=rf"{site}: {method} with 3 tasks needs task_ids of shape \(3,\), got none"):
        model(**padded())
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"{method}: task = {wrong}, but it has the tasks 0 to 2"):
            adapter.set(task=wrong)
    assert adapter.tree.config.task is None


def test_one_task_needs_no_ids() -> None:
    model = model_of("llama")
    adapter = put(model, "moelora", n_tasks=1)
    want = logits(model, **padded())
    assert torch.equal(want, logits(model, **padded(), task_ids=of_task(0)))
    adapter.merge()
    near(logits(model, **padded()), want)
