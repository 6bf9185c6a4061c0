"""PeriodicLoRA against its algorithm, plainly, on a weight that is written into: the paper's authors published no code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.moving import PeriodicLoRA

D_OUT, D_IN, R, S, LR, STEPS = 5, 6, 2, 3.0, 0.05, 11


def rows(step: int) -> Tensor:
    return torch.randn(4, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def target(step: int) -> Tensor:
    return torch.randn(4, D_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + step))


def attached(**hyper: Any) -> tuple[nn.Sequential, dt.Adapter, PeriodicLoRA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, dtype=torch.float64))
    adapter = dt.attach(model, "periodic_lora", where=["0"], head=None, r=R, alpha=S * R, **hyper)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, PeriodicLoRA)
    return model, adapter, delta


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> None:
    (model(rows(step)) - target(step)).square().mean().backward()
    schedule.before_step(step)
    optimizer.step()
    schedule.after_step(step)
    optimizer.zero_grad()


@pytest.mark.parametrize("fast", [True, False], ids=["linear", "fold"])
@pytest.mark.parametrize("momentum", [0.0, 0.4])
@pytest.mark.parametrize("stages", [1, 2, 4, 6, 11])
def test_as_the_algorithm_on_a_dense_weight(stages: int, momentum: float, fast: bool) -> None:
    """W += (1 - m) s B A at a stage's end, B *= m, A new where m is 0, a new AdamW; up to where the sum is kept dense."""
    model, adapter, delta = attached(stages=stages, momentum=momentum)
    delta.has_linear, delta.fast = fast, fast
    optimizer, schedule = torch.optim.AdamW(adapter.groups(LR, weight_decay=0.1)), adapter.schedule
    schedule.begin(optimizer, STEPS)
    first = model[0].weight.detach().clone()
    w, bias = first.clone(), model[0].bias.detach()
    a, b = (t.detach().clone().requires_grad_() for t in (delta.a, delta.b))
    plain = torch.optim.AdamW([a, b], lr=LR, weight_decay=0.1)
    ends, n_ends = [k * STEPS // stages for k in range(1, stages)], 0
    for step in range(STEPS):
        stepped(model, optimizer, schedule, step)
        (rows(step) @ (w + S * b @ a).t() + bias - target(step)).square().mean().backward()
        plain.step()
        plain.zero_grad()
        if step + 1 in ends:
            with torch.no_grad():
                w += (1 - momentum) * S * b @ a
                a, b = a.detach().clone(), momentum * b
                if not momentum:
                    a = delta.a.detach().clone()
                    assert float(a.abs().max()) < D_IN**-0.5 and len(a.unique()) == a.numel()
            a.requires_grad_()
            b.requires_grad_()
            plain = torch.optim.AdamW([a, b], lr=LR, weight_decay=0.1)
            n_ends += 1
        x = rows(500)
        torch.testing.assert_close(model(x), x @ (w + S * b @ a).t() + bias, rtol=1e-9, atol=1e-11)
    schedule.end()
    assert n_ends == stages - 1 and torch.equal(model[0].weight, first)
    assert delta.dense is (n_ends * R * (D_OUT + D_IN) > D_OUT * D_IN)
    assert delta.dense or len(delta.down) == n_ends * R
    if stages == 6 and not momentum:  # what LoRA cannot reach
        assert int(torch.linalg.matrix_rank(w + S * b @ a - first)) == min(D_OUT, D_IN) > R
    adapter.merge()
    torch.testing.assert_close(model(rows(501)), rows(501) @ (w + S * b @ a).t() + bias, rtol=1e-9, atol=1e-11)


def test_a_new_a_is_of_seed_step_and_site_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        adapter = dt.attach(model, "periodic_lora", where=["0", "1"], r=2, stages=2, head=None, seed=seed)
        schedule = adapter.schedule
        schedule.begin(torch.optim.SGD(adapter.parameters(), lr=0.0), 4)
        torch.rand(len(found))
        for step in range(2):
            schedule.after_step(step)
        found.append([d.a.detach() for d in adapter.deltas.values() if isinstance(d, PeriodicLoRA)])
    assert all(torch.equal(one, two) for one, two in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("stages", [2, 6])
def test_it_loads(stages: int, tmp_path: Path) -> None:
    """Factors, and a dense sum."""
    model, adapter, delta = attached(stages=stages)
    optimizer, schedule = torch.optim.AdamW(adapter.groups(LR)), adapter.schedule
    schedule.begin(optimizer, STEPS)
    for step in range(STEPS):
        stepped(model, optimizer, schedule, step)
    adapter.save(tmp_path)
    other, again, _ = attached()
    again.detach()
    dt.load(other, tmp_path)
    assert torch.equal(other(rows(0)), model(rows(0))) and delta.dense is (stages == 6)
    for bad in ({"down": delta.down, "up": delta.up[:, :1]}, {"down": delta.a, "up": delta.up[:1]}):
        with pytest.raises(ValueError, match="factors"):
            delta.check_ragged(bad)


@pytest.mark.parametrize("hyper", [{"stages": 0}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(**hyper)
