"""Penalties ride on the graph, and parameter groups are what a schedule says."""

import pytest
import torch

import deltatune as dt
from deltatune.contract.beds import BEDS
from deltatune.core.schedule import Schedule, Schedules, ride


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
def test_ride_gives_the_penalty_s_gradient(dtype: torch.dtype, scale: float) -> None:
    w = torch.randn(4, requires_grad=True)
    y = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    out = ride(y * 2, w.square().sum(), scale)
    assert torch.equal(out, y * 2)
    assert out.dtype == dtype
    out.sum().backward()
    assert w.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(w.grad, 2 * scale * w.detach())
    assert torch.equal(y.grad, torch.full_like(y, 2.0))


def test_ride_equals_the_penalty_on_the_loss() -> None:
    w = torch.randn(4, requires_grad=True)
    x = torch.randn(5, 4)
    ride(x * w, w.abs().sum(), 0.1).sum().backward()
    ridden, w.grad = w.grad, None
    ((x * w).sum() + 0.1 * w.abs().sum()).backward()
    torch.testing.assert_close(ridden, w.grad)


def test_groups_decay_matrices_alone() -> None:
    model = BEDS["biased"].model()
    adapter = dt.attach(model, dt.Sum(dt.LoRA(r=2), dt.BitFit()), where="q", head=None)
    decayed, others = adapter.groups(1e-3, 0.1)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for g in (decayed, others) for p in g["params"]} == {id(p) for p in adapter.parameters()}


def test_a_schedule_that_needs_groups_says_so() -> None:
    class Needs(Schedule):
        needs_groups = True

    adapter = dt.attach(BEDS["biased"].model(), "lora", where="q", head=None)
    course = Needs(adapter)
    course.begin(torch.optim.SGD(adapter.groups(0.1)), 3)
    assert course.n_steps == 3
    halves = [{"params": adapter.parameters()[:1], "lr": 0.1}, {"params": adapter.parameters()[1:], "lr": 0.2}]
    with pytest.raises(ValueError, match=r"'default'.*adapter\.groups"):
        course.begin(torch.optim.SGD(halves), 3)


def test_schedules_resume() -> None:
    model = BEDS["biased"].model()
    both = [dt.attach(model, "lora", where="q", head=None, name=name) for name in ("one", "two")]
    course = Schedules(both)
    course.begin(torch.optim.SGD(course.groups(0.1)), 7)
    again = Schedules(both)
    again.load_state_dict(course.state_dict())
    assert [s.n_steps for s in again.each.values()] == [7, 7]
    with pytest.raises(ValueError, match=r"\['one', 'two'\], here are \['one'\]"):
        Schedules(both[:1]).load_state_dict(course.state_dict())
