"""SoRA against its reference repository's layer and optimiser of the gates."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.sora import SoRA, Threshold

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_sora.py"))
fill, gradient, start, R, ALPHA, SHAPE = (MAKE[k] for k in ("fill", "gradient", "start", "R", "ALPHA", "SHAPE"))
GATES, LR, STEPS, XI, SERIES = (MAKE[k] for k in ("GATES", "LR", "STEPS", "XI", "SERIES"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def attached(d_out: int, d_in: int, n: int = 1, **hyper: Any) -> tuple[nn.Sequential, dt.Adapter, list[SoRA]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(d_in, d_out, dtype=torch.float64) for _ in range(n)))
    adapter = dt.attach(model, "sora", where=[str(i) for i in range(n)], head=None, **hyper)
    deltas = [d for d in adapter.deltas.values() if isinstance(d, SoRA)]
    return model, adapter, deltas


def begun(adapter: dt.Adapter, n_steps: int = STEPS, n_micro: int = 1) -> Threshold:
    schedule = adapter.schedule
    assert isinstance(schedule, Threshold)
    schedule.begin(torch.optim.SGD(adapter.parameters(), lr=0.0), n_steps, n_micro)
    return schedule


def test_as_the_reference_computes() -> None:
    """The update and its gradients, on both paths."""
    model, _, (delta,) = attached(*SHAPE, r=R, alpha=ALPHA)
    golden = GOLDEN["layer"]
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p.zero_()
        for key, p in delta.named_parameters():
            p.copy_(fill(key, p.shape))
    for fast in (True, False):
        delta.has_linear, delta.fast = fast, fast
        model.zero_grad()
        out = model(fill("x", (3, SHAPE[1])))
        torch.testing.assert_close(out, torch.tensor(golden["out"], dtype=torch.float64), rtol=0, atol=1e-12)
        (out * fill("y", (3, SHAPE[0]))).sum().backward()
        for key, p in delta.named_parameters():
            torch.testing.assert_close(p.grad, torch.tensor(golden[key], dtype=torch.float64), rtol=0, atol=1e-12)


def test_gates_as_the_references_optimiser_moves_them() -> None:
    """Step by step, AdamW and the threshold. The reference's cuts twice: what ends within xi of 0 is 0 too, where the paper's
    T(x) = sign(x) max(|x| - xi, 0), ours, goes on; such a gate is the only difference."""
    _, adapter, (delta,) = attached(GATES, GATES, r=GATES, xi=XI, l1=0.0)
    optimizer, schedule = torch.optim.AdamW([delta.g], lr=LR, eps=0.0, weight_decay=0.0), begun(adapter)
    before, n_cut, n_zero = start(), 0, 0
    for step in range(STEPS):
        want = torch.tensor(GOLDEN["gates"][step], dtype=torch.float64)
        with torch.no_grad():
            delta.g.copy_(before)
        delta.g.grad = gradient(step)
        optimizer.step()
        schedule.after_step(step)
        have = delta.g.detach()
        cut = (have.abs() < XI) & (have != 0)
        torch.testing.assert_close(have.where(~cut, torch.zeros_like(have)), want, rtol=0, atol=1e-12)
        n_cut, n_zero, before = n_cut + int(cut.sum()), n_zero + int((have == 0).sum()), want
    assert n_cut > 5 and n_zero > 100 and int((before != 0).sum()) == 3


@pytest.mark.parametrize("last", GOLDEN["schedules"])
def test_thresholds_are_the_references(last: str) -> None:
    _, _, (delta,) = attached(*SHAPE, r=R, xi=XI, last_xi=float(last), stages=SERIES)
    have = [delta.xi_at(step, 4 * SERIES) for step in range(4 * SERIES)]
    torch.testing.assert_close(have, [x for x in GOLDEN["schedules"][last] for _ in range(4)])
    assert delta.xi_at(10**6, 20) == pytest.approx(float(last))


@pytest.mark.parametrize("n_micro", [1, 4])
def test_penalty_is_the_mean_of_all_gates(n_micro: int) -> None:
    """l1 sum |g| / (gates of all sites), once a step; with B = 0 the loss itself moves no gate."""
    model, adapter, deltas = attached(6, 6, n=3, r=4, l1=5.0)
    schedule = begun(adapter, n_micro=n_micro)
    for _ in range(n_micro):
        (model(fill("x", (3, 6))).square().mean() / n_micro).backward()
    for d in deltas:
        torch.testing.assert_close(d.g.grad, d.g.detach().sign() * 5.0 / 12)
        d.g.grad = None
    schedule.end()
    model(fill("x", (3, 6))).square().mean().backward()
    assert not any(d.g.grad.any() for d in deltas if isinstance(d.g.grad, Tensor)), "after the end nothing pulls"


def test_the_file_has_what_is_left_alone(tmp_path: Path) -> None:
    """Smaller by the pruned rows and columns, down to none at a site, and bit for bit the same function."""
    model, adapter, deltas = attached(48, 48, n=3, r=8)
    with torch.no_grad():
        for i, d in enumerate(deltas):
            d.b.normal_()
            d.g[: (3, 7, 8)[i]] = 0.0
    adapter.save(tmp_path / "one")
    adapter.save(tmp_path / "whole", resumable=True)
    small, whole = ((tmp_path / at / "adapter.safetensors").stat().st_size for at in ("one", "whole"))
    assert small < 0.5 * whole
    other, again, _ = attached(48, 48, n=3, r=8)
    again.detach()
    loaded = dt.load(other, tmp_path / "one")
    ranks = [d.g.numel() for d in loaded.deltas.values() if isinstance(d, SoRA)]
    assert ranks == [5, 1, 0] and loaded.params() == sum(ranks) * 97
    x = fill("x", (4, 48))
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    loaded.merge()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no gated rank"):
        deltas[0].check_ragged({"a": deltas[0].a, "g": deltas[0].g[:3], "b": deltas[0].b})


@pytest.mark.parametrize("hyper", [{"xi": -1.0}, {"last_xi": -1.0}, {"stages": 0}, {"l1": -1.0}])
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(*SHAPE, r=R, **hyper)
