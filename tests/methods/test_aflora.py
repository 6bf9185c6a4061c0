"""AFLoRA against its reference repository: the layer, and which matrix freezes at which step."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.methods.freezing import AFLoRA, Freezing

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_aflora.py"))
fill, gradient, SHAPES, R, STEPS = (MAKE[k] for k in ("fill", "gradient", "SHAPES", "R", "STEPS"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SETTINGS = GOLDEN["settings"]
EPOCH = STEPS // SETTINGS["num_train_epochs"]


def attached(**hyper: Any) -> tuple[nn.ModuleDict, dt.Adapter, dict[str, AFLoRA]]:
    model = nn.ModuleDict({n: nn.Linear(i, o, dtype=torch.float64) for n, (o, i) in SHAPES.items()})
    options = {"r": R, "beta1": SETTINGS["beta1"], "beta2": SETTINGS["beta2"], "window": SETTINGS["deltaT"]}
    adapter = dt.attach(model, "aflora", **{"where": list(SHAPES), "head": None, **options, **hyper})
    deltas = {name: d for (_, name), d in adapter.deltas.items() if isinstance(d, AFLoRA)}
    with torch.no_grad():
        for name, d in deltas.items():
            for key in ("a", "b"):
                getattr(d, key).copy_(fill(f"{name}.{key}", getattr(d, key).shape))
    return model, adapter, deltas


def begun(adapter: dt.Adapter, n_steps: int = STEPS) -> Freezing:
    schedule = adapter.schedule
    assert isinstance(schedule, Freezing)
    schedule.begin(torch.optim.SGD(adapter.parameters(), lr=0.0), n_steps)
    return schedule


@pytest.mark.parametrize("final", GOLDEN["series"])
def test_as_the_reference_freezes(final: str) -> None:
    """Step by step. What is frozen gets no gradient from that step on."""
    warmup, steps = float(EPOCH * SETTINGS["initial_warmup"]), float(EPOCH * int(final))
    _, adapter, deltas = attached(warmup=warmup, final=steps)
    schedule, seen = begun(adapter), set()
    for step, want in enumerate(GOLDEN["series"][final]):
        for name, d in deltas.items():
            for key in ("a", "b"):
                p = getattr(d, key)
                p.grad = gradient(step, f"{name}.{key}", p.shape) if key not in d.frozen else None
        schedule.before_step(step)
        frozen = sorted(name[2:].replace("|", ".") for name in schedule.frozen)
        assert frozen == want["frozen"], step
        if want["share"] is not None:
            assert schedule.share(step)[0] == pytest.approx(want["share"])
        for name, d in deltas.items():
            for key in ("a", "b"):
                assert (getattr(d, key).grad is None) is (f"{name}.{key}" in frozen)
                assert (key in d.frozen) is (f"{name}.{key}" in frozen)
        seen.add(len(frozen))
    assert len(seen) > 3 and 6 in seen


def test_as_the_reference_computes() -> None:
    """The output and all gradients, on both paths; and the vectors' start."""
    golden = GOLDEN["layer"]
    model, _, deltas = attached()
    delta = deltas["0"]
    for key in ("d", "e"):
        assert getattr(delta, key).tolist() == pytest.approx(GOLDEN["start"][key])
    with torch.no_grad():
        model.get_submodule("0").weight.copy_(fill("w", SHAPES["0"]))  # type: ignore[operator, union-attr]
        model.get_submodule("0").bias.zero_()  # type: ignore[operator, union-attr]
        for key, p in delta.named_parameters():
            p.copy_(fill(key, p.shape))
    for fast in (True, False):
        delta.has_linear, delta.fast = fast, fast
        model.zero_grad()
        out = model["0"](fill("x", (3, SHAPES["0"][1])))
        torch.testing.assert_close(out, torch.tensor(golden["out"], dtype=torch.float64), rtol=0, atol=1e-11)
        (out * fill("y", (3, SHAPES["0"][0]))).sum().backward()
        for key, p in delta.named_parameters():
            torch.testing.assert_close(
                p.grad, torch.tensor(golden["grads"][key], dtype=torch.float64), rtol=0, atol=1e-11
            )


def test_square_layers_are_frozen_from_the_start_and_nothing_moves_them() -> None:
    """As in the paper, where those are attention's; their vectors train, under weight decay and moments too."""
    for square_frozen in (True, False):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        adapter = dt.attach(
            model, "aflora", where=["0", "2"], r=2, square_frozen=square_frozen, warmup=2.0, final=1.0, head=None
        )
        optimizer, schedule = torch.optim.AdamW(adapter.groups(0.05, weight_decay=0.3)), adapter.schedule
        schedule.begin(optimizer, 8)
        square = adapter.deltas["0", "0"]
        before = {key: p.detach().clone() for key, p in square.named_parameters()}
        for step in range(2):
            model(fill(f"x {step}", (3, 6)).float()).square().mean().backward()
            schedule.before_step(step)
            optimizer.step()
            schedule.after_step(step)
            optimizer.zero_grad()
        moved = {key for key, p in square.named_parameters() if not torch.equal(p, before[key])}
        assert moved == ({"d", "e"} if square_frozen else {"a", "b", "d", "e"})
        schedule.end()
        model(fill("x", (3, 6)).float()).square().mean().backward()
        assert all(p.grad is not None for p in adapter.parameters()), "after the end all could be trained again"


def test_a_matrix_without_gradient_is_named() -> None:
    _, adapter, _ = attached()
    with pytest.raises(ValueError, match=r"^aflora: 0\.0\.a has no gradient at step 0"):
        begun(adapter).before_step(0)


def test_another_sites_state_is_refused() -> None:
    _, adapter, _ = attached()
    state: dict[str, Any] = {"n_steps": 3, "frozen": ["0|9|a"], "now": {}, "smooth": {}, "spread": {}}
    with pytest.raises(ValueError, match="other sites"):
        adapter.schedule.load_state_dict(state)


def test_numbers_of_the_course_are_for_all_sites() -> None:
    _, adapter, _ = attached(where={"0": {"window": 3}, "1": {"window": 4}})
    with pytest.raises(ValueError, match="aflora has one window for all its sites, not 3 at 0 and 4 at 1"):
        begun(adapter)


@pytest.mark.parametrize("hyper", [{"window": 0}, {"warmup": -1.0}, {"final": -1.0}, {"beta1": 0.0}, {"r": 0}])
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(**hyper)
