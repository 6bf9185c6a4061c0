"""IncreLoRA against its reference repository's allocator, step by step on the same gradients."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.increlora import RESERVE, Growth, IncreLoRA

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_increlora.py"))
fill, triplet, loss, SHAPES, STEPS = (MAKE[k] for k in ("fill", "triplet", "loss", "SHAPES", "STEPS"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SETTINGS = GOLDEN["settings"]


def attached(orth: float = 0.0, fast: bool = True, **hyper: Any) -> tuple[nn.ModuleDict, dt.Adapter]:
    model = nn.ModuleDict({n: nn.Linear(i, o, dtype=torch.float64) for n, (o, i) in SHAPES.items()})
    options = {"alpha": SETTINGS["lora_alpha"], "beta1": SETTINGS["beta1"], "beta2": SETTINGS["beta2"], "orth": orth}
    adapter = dt.attach(model, "increlora", **{"where": list(SHAPES), "head": None, **options, **hyper})
    with torch.no_grad():
        for name, delta in sites(adapter).items():
            model.get_submodule(name).weight.copy_(fill(f"{name}.w", SHAPES[name]))  # type: ignore[operator, union-attr]
            model.get_submodule(name).bias.zero_()  # type: ignore[operator, union-attr]
            delta.has_linear = fast
            for key, p in delta.named_parameters():
                p.copy_(fill(f"{name}.{key}", p.shape))
    return model, adapter


def sites(adapter: dt.Adapter) -> dict[str, IncreLoRA]:
    return {name: d for (_, name), d in adapter.deltas.items() if isinstance(d, IncreLoRA)}


def named(delta: IncreLoRA, name: str, first: int) -> None:
    """The triplets from number `first` on get their names' values."""
    with torch.no_grad():
        for k in range(first, len(delta.a)):
            delta.a[k], delta.b[:, k] = triplet(name, k)["a"][0], triplet(name, k)["b"][:, 0]


def options(settings: dict[str, int]) -> dict[str, Any]:
    """The reference's settings in our words."""
    warmup, interval = float(settings["init_warmup"]), float(settings["incre_interval"])
    return {"target": settings["target_rank"], "add": settings["incre_rank_num"], "top": settings["top_h"],
            "warmup": warmup, "interval": interval}  # fmt: skip


def begun(adapter: dt.Adapter, optimizer: Any, n_micro: int = 1) -> Growth:
    schedule = adapter.schedule
    assert isinstance(schedule, Growth)
    schedule.begin(optimizer, STEPS, n_micro)
    return schedule


def course(series: str, fast: bool = True, n_micro: int = 1) -> list[dict[str, Any]]:
    """Each step of the golden's series, on our side."""
    model, adapter = attached(fast=fast, **options(GOLDEN["series"][series]["settings"]))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=SETTINGS["lr"])
    schedule, deltas, steps = begun(adapter, optimizer, n_micro), sites(adapter), []
    for step in range(STEPS):
        for micro in range(n_micro):  # parts of the loss that are no shares of it alike
            part = 1.0 if n_micro == 1 else (2.5 if micro == 0 else -1.5 / (n_micro - 1))
            (part * loss(model, step)).backward()
        schedule.before_step(step)
        optimizer.step()
        before = {n: len(d.a) for n, d in deltas.items()}
        schedule.after_step(step)
        optimizer.zero_grad()
        for name, delta in deltas.items():
            named(delta, name, before[name])
        numbers = {"smooth": [float(schedule.smooth[f"0|{n}"]) for n in deltas]}
        numbers |= {"spread": [float(schedule.spread[f"0|{n}"]) for n in deltas]}
        steps.append({"step": step, "ranks": [len(d.e) for d in deltas.values()], **numbers})
    schedule.end()
    assert all(len(d.a) == len(d.e) == d.b.shape[1] for d in deltas.values()), "what waited is gone at the end"
    return steps


@pytest.mark.parametrize("fast", [True, False], ids=["linear", "fold"])
@pytest.mark.parametrize("series", GOLDEN["series"])
def test_as_the_reference_allocates(series: str, fast: bool) -> None:
    """The same ranks at every step, and the same importance behind them."""
    for have, want in zip(course(series, fast), GOLDEN["series"][series]["steps"], strict=True):
        assert have["ranks"] == want["ranks"], have["step"]
        for part in ("smooth", "spread"):
            torch.testing.assert_close(have[part], want[part], rtol=1e-9, atol=1e-13)
    assert len({tuple(s["ranks"]) for s in GOLDEN["series"][series]["steps"]}) > 1, (
        "ranks that never grow compare nothing"
    )


def test_backward_passes_of_a_step_decide_together() -> None:
    """The importance is that of the sum of their gradients; the reference's is that of the last one alone."""
    for have, want in zip(course("two", n_micro=3), GOLDEN["series"]["two"]["steps"], strict=True):
        assert have["ranks"] == want["ranks"], have["step"]
        torch.testing.assert_close(have["smooth"], want["smooth"], rtol=1e-9, atol=1e-13)


def test_as_the_reference_computes() -> None:
    for fast in (True, False):
        model, adapter = attached(fast=fast)
        for name, layer in model.items():
            want = torch.tensor(GOLDEN["out"][name], dtype=torch.float64)
            torch.testing.assert_close(layer(fill("x.0", (2, SHAPES[name][1]))), want, rtol=0, atol=1e-11)
        loss(model, 0).backward()
        for name, delta in sites(adapter).items():
            for key, p in delta.named_parameters():
                want = torch.tensor(GOLDEN["grads"][f"{name}.{key}"], dtype=torch.float64).view(p.shape)
                torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fast", [True, False], ids=["linear", "fold"])
@pytest.mark.parametrize("n_micro", [1, 3])
def test_penalty_is_the_references(fast: bool, n_micro: int) -> None:
    """With e = 0 the loss itself moves neither A nor B."""
    golden = GOLDEN["penalty"]
    model, adapter = attached(orth=golden["weight"], fast=fast)
    with torch.no_grad():
        for delta in sites(adapter).values():
            delta.e.zero_()
    schedule = begun(adapter, torch.optim.SGD(adapter.parameters(), lr=0.0), n_micro)
    for _ in range(n_micro):
        (loss(model, 0) / n_micro).backward()
    for name, delta in sites(adapter).items():
        for key in ("a", "b"):
            want = torch.tensor(golden["grads"][f"{name}.{key}"], dtype=torch.float64)
            torch.testing.assert_close(getattr(delta, key).grad, want, rtol=1e-6, atol=1e-9)
    schedule.end()


def test_what_waits_trains_and_its_gate_does_not() -> None:
    """Their gate is no part of e: no gradient, weight decay or clipping can reach it; moments begin anew where a site grew."""
    model, adapter = attached(target=2, top=1, warmup=0.0, interval=2.0)
    optimizer = torch.optim.AdamW(adapter.groups(0.05, weight_decay=0.3))
    schedule, deltas = begun(adapter, optimizer), sites(adapter)
    grew: list[str] = []
    for step in range(4):
        before = {n: (len(d.e), d.a.detach().clone()) for n, d in deltas.items()}
        loss(model, step).backward()
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
        grew = [n for n, d in deltas.items() if len(d.e) > before[n][0]]
        assert bool(grew) is (step == 2)
        for name, delta in deltas.items():
            assert len(delta.a) == len(delta.e) + 1
            if name in grew:
                assert float(delta.e.detach()[-1]) == RESERVE and not optimizer.state.get(delta.a)
            elif step == 1:
                assert (delta.a[1:] != before[name][1][1:]).all(), "the one that waits trains"
    state = optimizer.state_dict()["state"]
    assert len(state) == 3 * len(deltas)


def test_a_grown_adapter_loads(tmp_path: Path) -> None:
    """A finished one, whose sites have ranks of their own, and a damaged one."""
    model, adapter = attached(**options(GOLDEN["series"]["two"]["settings"]))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    schedule = begun(adapter, optimizer)
    for step in range(9):
        loss(model, step).backward()
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
    schedule.end()
    assert len({len(d.e) for d in sites(adapter).values()}) > 1
    adapter.save(tmp_path)
    other, again = attached()
    again.detach()
    loaded = dt.load(other, tmp_path)
    for name, delta in sites(loaded).items():
        x = fill("x", (2, SHAPES[name][1]))
        assert torch.equal(other[name](x), model[name](x))
        bad = {"a": delta.a[:0], "e": delta.e[:0], "b": delta.b[:, :0]}
        with pytest.raises(ValueError, match="triplets"):
            delta.check_ragged(bad)
        with pytest.raises(ValueError, match="do not fit"):
            delta.check_ragged({**bad, "a": delta.a[:, :1]})
    assert adapter.params() == loaded.params() == sum(len(d.e) * (1 + sum(SHAPES[n])) for n, d in sites(loaded).items())


def test_a_site_that_did_not_run_is_named() -> None:
    model, adapter = attached()
    schedule = begun(adapter, torch.optim.SGD(adapter.parameters(), lr=0.0))
    model["0"](fill("x", (2, 6))).sum().backward()
    with pytest.raises(ValueError, match=r"^increlora: 1 has no gradient at step 0"):
        schedule.before_step(0)


def test_numbers_of_the_course_are_for_all_sites() -> None:
    _, adapter = attached(where={"0": {"target": 3}, "1": {"target": 4}})
    with pytest.raises(ValueError, match="increlora has one target for all its sites, not 3 at 0 and 4 at 1"):
        begun(adapter, torch.optim.SGD(adapter.parameters(), lr=0.0))


@pytest.mark.parametrize(
    "hyper",
    [{"target": 0}, {"add": 0}, {"top": 0}, {"interval": -1.0}, {"beta2": 1.0}, {"r": 0}, {"r": 4, "target": 3}],
)
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(**hyper)


def test_another_sites_state_is_refused() -> None:
    _, adapter = attached()
    state: dict[str, Any] = {"n_steps": 3, "smooth": {"0|9": Tensor([1.0])}, "spread": {"0|9": Tensor([1.0])}}
    with pytest.raises(ValueError, match="other sites"):
        adapter.schedule.load_state_dict(state)
