"""Delta-LoRA against a layer that writes into its weight, somebody else's and the paper's algorithm as it stands."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.moving import DeltaLoRA

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_delta_lora.py"))
fill, inputs, loss, SHAPE, R, ALPHA = (MAKE[k] for k in ("fill", "inputs", "loss", "SHAPE", "R", "ALPHA"))
RATIO, START, STEPS, LR, DECAY = (MAKE[k] for k in ("RATIO", "START", "STEPS", "LR", "DECAY"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def attached(**hyper: Any) -> tuple[nn.Sequential, dt.Adapter, DeltaLoRA]:
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], dtype=torch.float64))
    options = {"r": R, "alpha": ALPHA, "ratio": RATIO, "start": float(START)}
    adapter = dt.attach(model, "delta_lora", where=["0"], head=None, **{**options, **hyper})
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, DeltaLoRA)
    with torch.no_grad():
        model[0].weight.copy_(fill("w", SHAPE))
        model[0].bias.zero_()
        delta.a.copy_(fill("a", delta.a.shape))
    return model, adapter, delta


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> None:
    loss(step, model(inputs(step))).backward()
    schedule.before_step(step)
    optimizer.step()
    schedule.after_step(step)
    optimizer.zero_grad()


@pytest.mark.parametrize("fast", [True, False], ids=["linear", "fold"])
def test_as_another_layer_moves_its_weight(fast: bool) -> None:
    """Step by step; ours holds the weight's change as two fixed factors, and the base keeps every bit."""
    model, adapter, delta = attached()
    delta.has_linear, delta.fast = fast, fast
    optimizer, schedule = torch.optim.AdamW(adapter.groups(LR, weight_decay=DECAY)), adapter.schedule
    schedule.begin(optimizer, STEPS)
    moved = []
    for step in range(STEPS):
        stepped(model, optimizer, schedule, step)
        want = GOLDEN["steps"].get(str(step + 1))
        moved.append(len(delta.a0) > 0)
        if want:
            have = {"out": model(fill("x", (3, SHAPE[1]))).detach(), "a": delta.a.detach(), "b": delta.b.detach()}
            for key, value in have.items():
                torch.testing.assert_close(value, torch.tensor(want[key], dtype=torch.float64), rtol=0, atol=1e-11)
    assert moved == [step >= START for step in range(STEPS)]
    assert torch.equal(model[0].weight, fill("w", SHAPE))
    adapter.merge()
    want = torch.tensor(GOLDEN["steps"][str(STEPS)]["out"], dtype=torch.float64)
    torch.testing.assert_close(model(fill("x", (3, SHAPE[1]))), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("start", [0, 2, 7])
def test_as_the_papers_algorithm(start: int) -> None:
    """Algorithm 1 on a dense W: for t > K, W += lambda s (B A - what it was before the step). Two layers and a ReLU, fp64."""
    torch.manual_seed(0)
    first = [torch.randn(7, 6, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)]
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)).double()
    adapter = dt.attach(model, "delta_lora", where=["0", "2"], r=3, alpha=4.0, ratio=1.5, start=float(start), head=None)
    deltas = [d for d in adapter.deltas.values() if isinstance(d, DeltaLoRA)]
    with torch.no_grad():
        for layer, w in zip((model[0], model[2]), first, strict=True):
            layer.weight.copy_(w)
            layer.bias.zero_()
    dense = [w.clone() for w in first]
    factors = [[t.detach().clone().requires_grad_() for t in (d.a, d.b)] for d in deltas]
    plain = torch.optim.AdamW([t for pair in factors for t in pair], lr=0.05, weight_decay=0.1)
    optimizer, schedule = torch.optim.AdamW(adapter.groups(0.05, weight_decay=0.1)), adapter.schedule
    schedule.begin(optimizer, 10)

    def out(x: Tensor) -> Tensor:
        for i, (w, (a, b)) in enumerate(zip(dense, factors, strict=True)):
            x = x @ (w + 4 / 3 * b @ a).t()
            x = x.relu() if i == 0 else x
        return x

    for step in range(10):
        stepped(model, optimizer, schedule, step)
        loss(step, out(inputs(step))).backward()
        was = [(b @ a).detach() for a, b in factors]
        plain.step()
        plain.zero_grad()
        if step > start:
            for w, (a, b), before in zip(dense, factors, was, strict=True):
                w += 1.5 * 4 / 3 * ((b @ a).detach() - before)
        x = inputs(100)
        torch.testing.assert_close(model(x), out(x), rtol=1e-9, atol=1e-11)
    assert not torch.equal(dense[0], first[0])


def test_it_loads_and_goes_on_from_where_the_weight_is(tmp_path: Path) -> None:
    model, adapter, delta = attached()
    optimizer, schedule = torch.optim.AdamW(adapter.groups(LR)), adapter.schedule
    schedule.begin(optimizer, STEPS)
    for step in range(STEPS):
        stepped(model, optimizer, schedule, step)
    adapter.save(tmp_path)
    other, again, _ = attached()
    again.detach()
    dt.load(other, tmp_path)
    assert torch.equal(other(inputs(0)), model(inputs(0)))
    for bad in ({"a0": delta.a0, "b0": delta.b0[:, :1]}, {"a0": delta.a0[:, :2], "b0": delta.b0}):
        with pytest.raises(ValueError, match="factors"):
            delta.check_ragged(bad)


@pytest.mark.parametrize("hyper", [{"dropout": 0.1}, {"ratio": -1.0}, {"start": -1.0}])
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(**hyper)
