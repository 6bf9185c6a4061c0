"""Diff pruning against its reference repository's step and projection, and what its phases promise."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.diff import largest

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_diff_pruning.py"))
fill, gate_of, noise, moved, Small = (MAKE[k] for k in ("fill", "gate_of", "noise", "moved", "Small"))
LOW, HIGH, PENALTY, N = (MAKE[k] for k in ("LOW", "HIGH", "PENALTY", "N"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
CLOSE = {"rtol": 0, "atol": 1e-10}


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def joined(delta: Any, of: Any) -> Tensor:
    """`of` each of the site's tensors, in the order of [W | b]."""
    return torch.cat([of(f"{delta.site.name}.{key}").flatten() for key in ("weight", "bias")])


def attached(**hyper: Any) -> tuple[nn.Module, dt.Adapter]:
    model = Small()
    return model, dt.attach(model, "diff_pruning", head=None, **hyper)


def given(monkeypatch: pytest.MonkeyPatch, adapter: dt.Adapter) -> None:
    """The golden's differences, gates and noise."""
    sizes = {n: tuple(p.shape) for n, p in Small().named_parameters()}
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.w.copy_(joined(d, lambda n: fill(f"w.{n}", sizes[n])))
            d.gate.copy_(joined(d, lambda n: gate_of(n, sizes[n])))
            d.group.copy_(joined(d, lambda n: gate_of(f"group.{n}", (1,))))

    def drawn(self: Any, part: str, n: int) -> Tensor:
        if part == "gate":
            return joined(self, lambda n: noise(n, sizes[n]))
        return joined(self, lambda n: noise(f"group.{n}", (1,)))

    monkeypatch.setattr(dt.DiffPruning, "noise", drawn)


@pytest.mark.parametrize("n_micro", [1, 3])
def test_a_step_is_the_references(n_micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs under the gates, and the gradients of differences and gates with the penalty's; also of three backward passes."""
    model, adapter = attached(penalty=PENALTY, low=LOW, high=HIGH)
    given(monkeypatch, adapter)
    model.train()
    schedule = adapter.schedule
    schedule.begin(torch.optim.SGD(adapter.groups(0.1)), 4, n_micro)
    golden = GOLDEN["step"]
    y = model(fill("x", (3, N)))
    torch.testing.assert_close(y.detach(), numbers(golden["y"]), **CLOSE)
    assert min(golden["open"].values()) > 0 and max(golden["open"].values()) < 1
    loss = fill("loss", y.shape)
    for row in range(n_micro):
        rows = slice(row, row + 1) if n_micro == 3 else slice(None)
        (loss[rows] * model(fill("x", (3, N))[rows])).sum().backward()
    schedule.before_step(0)
    for d in adapter.deltas.values():
        for key in ("w", "gate", "group"):
            want = joined(d, lambda n, key=key: numbers(golden["grads"][key][n]))
            assert want.count_nonzero() == want.numel() or key == "w"
            torch.testing.assert_close(getattr(d, key).grad, want, **CLOSE)


def test_gates_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = attached(low=LOW, high=HIGH)
    delta = next(iter(adapter.deltas.values()))
    gates = numbers([case["gate"] for case in GOLDEN["sampled"]])
    monkeypatch.setattr(dt.DiffPruning, "noise", lambda self, part, n: noise("gates", (n,)))
    delta.gate = nn.Parameter(gates)
    z = delta.opened("gate", True)
    z.sum().backward()
    torch.testing.assert_close(z.detach(), numbers([case["z"] for case in GOLDEN["sampled"]]), **CLOSE)
    slopes = numbers([case["slope"] for case in GOLDEN["sampled"]])
    torch.testing.assert_close(delta.gate.grad, slopes, **CLOSE)
    assert 0 < slopes.count_nonzero() < len(slopes)


@pytest.mark.parametrize("case", GOLDEN["cut"], ids=lambda case: str(case["target"]))
def test_the_cut_is_the_references(case: dict[str, Any]) -> None:
    """The same entries over all tensors."""
    _, adapter = attached(keep=case["target"])
    sizes = {n: tuple(p.shape) for n, p in Small().named_parameters()}
    values = {n: joined(d, lambda n: moved(n, sizes[n])) for (_, n), d in adapter.deltas.items()}
    masks = largest(values, case["target"])
    for (_, name), d in adapter.deltas.items():
        want = joined(d, lambda n: numbers([bit == "1" for bit in case["masks"][n]]))
        assert torch.equal(masks[name].double(), want), name


def test_equals_are_cut_to_the_share() -> None:
    masks = largest({"a": torch.tensor([1.0, 0.0, -1.0]), "b": torch.tensor([1.0, -1.0, 2.0])}, 0.5)
    assert masks["a"].tolist() == [True, False, True] and masks["b"].tolist() == [False, False, True]


def rows(step: int) -> Tensor:
    return fill(f"rows.{step}", (6, N))


def trained(
    n_steps: int = 6, n_micro: int = 1, **hyper: Any
) -> Iterator[tuple[int, nn.Module, dt.Adapter, torch.optim.Optimizer]]:
    """(step, ...) after each step of a hand-written loop."""
    model, adapter = attached(**{"keep": 0.2, "gate_lr": 30.0, "start": 1.0} | hyper)
    optimizer = torch.optim.AdamW(adapter.groups(0.01))
    schedules = dt.Schedules([adapter])
    schedules.begin(optimizer, n_steps, n_micro)
    model.train()
    for step in range(n_steps):
        for part in rows(step).chunk(n_micro):
            loss = (model(part) - 0.3).square().mean() / n_micro
            loss.backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
        yield step, model, adapter, optimizer
    schedules.end()


def test_phases() -> None:
    """Whole under its gates, then the largest fifth of it alone: trained, optimised and counted."""
    total = sum(p.numel() for p in Small().parameters())
    before: dict[str, Tensor] = {}
    for step, _, adapter, optimizer in trained():
        deltas = adapter.deltas
        if step < 2:
            assert all(d.is_dense for d in deltas.values()) and adapter.params() == 2 * total + 8
            assert {len(d.values) for d in deltas.values()} == {0}
            continue
        assert adapter.params() == round(0.2 * total)
        held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)
        kept = {
            f"{n} {i}": v
            for (_, n), d in deltas.items()
            for i, v in zip(d.index.tolist(), d.values.tolist(), strict=True)
        }
        assert held == (0 if step == 2 else 2 * round(0.2 * total))
        assert not before or kept.keys() == before.keys() and all(kept[k] != before[k] for k in kept)
        before = kept
    assert len(before) == round(0.2 * total)


def test_what_is_cut_is_the_whole_of_z_and_w() -> None:
    """The function is that of the kept entries of z_t z w, at the gates without noise."""
    for step, model, _, _ in trained(4, dense=2):
        if step == 1:
            after = model.eval()(rows(9))
            break
    for step, _, adapter, _ in trained(4, dense=3):
        if step == 1:
            change = {n: d.change(noise=False).detach() for (_, n), d in adapter.deltas.items()}
            masks = largest(change, 0.2)
            other = Small()
            with torch.no_grad():
                for (_, n), d in adapter.deltas.items():
                    kept = change[n] * masks[n]
                    for key, part in zip(
                        ("weight", "bias"), kept.split([d.n_weight, d.size - d.n_weight]), strict=True
                    ):
                        p = other.get_parameter(f"{n}.{key}")
                        p.add_(part.view(p.shape))
            torch.testing.assert_close(after, other(rows(9)), **CLOSE)
            return
    raise AssertionError


@pytest.mark.parametrize("n_micro", [2, 3])
def test_accumulation_changes_nothing(n_micro: int) -> None:
    """One batch in parts: one draw of the gates, one penalty, the same cut, the same values."""
    *_, (_, _, whole, _) = trained(penalty=0.01)
    *_, (_, _, parts, _) = trained(n_micro=n_micro, penalty=0.01)
    for key, d in whole.deltas.items():
        assert torch.equal(d.index, parts.deltas[key].index)
        torch.testing.assert_close(d.values, parts.deltas[key].values, rtol=1e-7, atol=1e-9)


def test_the_noise_is_the_steps() -> None:
    """Other steps, sites and seeds draw others; one step always the same, gradient checkpointing's second forward too."""
    model, adapter = attached()
    model.train()
    first, second, *_ = adapter.deltas.values()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    one = first.noise("gate", 20)
    assert torch.equal(one, first.noise("gate", 20)) and not torch.equal(one, second.noise("gate", 20))
    x = rows(0)
    assert torch.equal(model(x), model(x))
    first.draw = 1, 0
    two = first.noise("gate", 20)
    first.draw = 1, 5
    assert not torch.equal(one, two) and not torch.equal(two, first.noise("gate", 20))


def test_files(tmp_path: Path) -> None:
    """Values at indices, from either phase; a finished file never makes the whole difference again."""
    for step, model, adapter, _ in trained():
        if step not in (1, 5):
            continue
        model.eval()
        folder = tmp_path / str(step)
        adapter.save(folder)
        kept = load_file(folder / "adapter.safetensors")
        assert {n.rpartition(".")[2] for n in kept if n.startswith("0.")} == {"index", "values"}
        again = Small()
        loaded = dt.load(again, folder)
        assert not any("w" in d._parameters for d in loaded.deltas.values())
        assert json.loads((folder / "adapter.json").read_text())["n_params"] == loaded.params()
        assert torch.equal(again(rows(7)), model(rows(7)))
        model.train()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0.0}, "keep = 0.0, but a share lies above 0"),
    ({"low": 0.1}, "low = 0.1 and high = 1.5, but a gate's interval"),
    ({"high": 1.0}, "low = -1.5 and high = 1.0, but"),
    ({"penalty": -1.0}, "penalty = -1.0, but it must be at least 0"),
]


@pytest.mark.parametrize(("hyper", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_numbers(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        dt.DiffPruning(**hyper)
    assert message in str(error.value)


def test_no_step_is_left() -> None:
    with pytest.raises(ValueError, match="dense = 6 steps leave none of 6"):
        next(trained(dense=6))


def test_a_file_trains_on_as_it_is(tmp_path: Path) -> None:
    """Its entries stay, whatever `dense` says of the steps, and their values move; a resumable one too."""
    *_, (_, _, adapter, _) = trained()
    for resumable in (False, True):
        adapter.save(tmp_path, resumable=resumable)
        for n_steps in (6, 2):
            model = Small()
            loaded = dt.load(model, tmp_path, trainable=True)
            optimizer, schedule = torch.optim.AdamW(loaded.groups(0.01)), loaded.schedule
            schedule.begin(optimizer, n_steps)
            for step in range(n_steps):
                (model(rows(step)) - 0.3).square().mean().backward()
                schedule.before_step(step)
                optimizer.step()
                schedule.after_step(step)
                optimizer.zero_grad()
            schedule.end()
            for key, d in loaded.deltas.items():
                before = adapter.deltas[key]
                assert torch.equal(d.index, before.index) and (
                    not len(d.values) or bool((d.values != before.values).all())
                )


def test_one_budget() -> None:
    adapter = dt.attach(Small(), dt.DiffPruning(where={"linear": {"keep": 0.3}, "norm": {}}), head=None)
    with pytest.raises(ValueError, match="diff_pruning has one keep for all its sites"):
        adapter.schedule.begin(torch.optim.SGD(adapter.groups(0.1)), 9)
