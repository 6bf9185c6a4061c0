"""Pruned biases: the paper has no code, so scores, rounds and the new start are done a second time, plainly."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.first_order import best

N_STEPS = 9
HYPER: dict[str, Any] = {"keep": 0.2, "search": 6, "rounds": 3}
LR = 0.02


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)
    ).double()


def loss(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x[part]) - 0.7).square().mean()


def ours(method: str, n_micro: int = 1, **hyper: Any) -> Iterator[tuple[int, nn.Sequential, dt.Adapter, Any]]:
    model = base()
    adapter = dt.attach(model, method, **HYPER | hyper, head=None)
    optimizer = torch.optim.AdamW(adapter.groups(LR))
    schedules = dt.Schedules([adapter])
    schedules.begin(optimizer, N_STEPS, n_micro)
    for step in range(N_STEPS):
        for i in range(n_micro):
            (loss(model, step, slice(i, None, n_micro)) / n_micro).backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
        yield step, model, adapter, optimizer
    schedules.end()


class Plain:
    """The same with whole biases, masks and an AdamW written out."""

    def __init__(self, whole: bool) -> None:
        self.whole, self.model = whole, base()
        self.biases = [m.bias for m in self.model if hasattr(m, "bias")]
        self.start = [b.detach().clone() for b in self.biases]
        self.masks = [torch.ones(len(b), dtype=torch.bool) for b in self.biases]
        self._moments()
        self._scores()

    def _moments(self) -> None:
        self.first, self.second = ([torch.zeros_like(b) for b in self.biases] for _ in range(2))
        self.t = 0

    def _scores(self) -> None:
        self.scores = [torch.zeros_like(b) for b in self.biases]

    def step(self, step: int) -> None:
        grads = torch.autograd.grad(loss(self.model, step), self.biases)
        self.t += 1
        with torch.no_grad():
            for i, (b, g) in enumerate(zip(self.biases, grads, strict=True)):
                self.scores[i] += ((b - self.start[i]) * g).abs()
                self.first[i].mul_(0.9).add_(0.1 * g)
                self.second[i].mul_(0.999).add_(0.001 * g * g)
                move = (self.first[i] / (1 - 0.9**self.t)) / ((self.second[i] / (1 - 0.999**self.t)).sqrt() + 1e-8)
                b -= LR * move * self.masks[i]
            done = step + 1
            if done in (2, 4, 6):
                self._prune(25 * 0.2 ** (done / 6))
                self._scores()
            if done == 6:
                for b, s in zip(self.biases, self.start, strict=True):
                    b.copy_(s)
                self._moments()

    def _prune(self, budget: float) -> None:
        left = round(budget)
        alive = [(i, j) for i, m in enumerate(self.masks) for j in range(len(m)) if m[j]]
        new = [torch.zeros_like(m) for m in self.masks]
        if self.whole:
            order = sorted({i for i, _ in alive}, key=lambda i: -float(self.scores[i].mean()))
            for i in order:
                if len(self.biases[i]) <= left or not any(bool(m.any()) for m in new):
                    new[i][:] = True
                    left -= len(self.biases[i])
        else:
            for i, j in sorted(alive, key=lambda at: -float(self.scores[at[0]][at[1]]))[:left]:
                new[i][j] = True
        self.masks = new
        for b, s, m in zip(self.biases, self.start, self.masks, strict=True):
            b[~m] = s[~m]


@pytest.mark.parametrize("method", ["u_bitfit", "s_bitfit"])
def test_against_the_plain_one(method: str) -> None:
    """The same entries are left after each round, and the same biases after each step, with moments of Adam."""
    plain = Plain(method == "s_bitfit")
    sizes = []
    for step, model, adapter, _ in ours(method):
        plain.step(step)
        left = [d.index.tolist() if method == "u_bitfit" else list(range(len(d.d))) for d in adapter.deltas.values()]
        assert left == [m.nonzero().flatten().tolist() for m in plain.masks], step
        sizes.append(adapter.params())
        with torch.no_grad():
            for delta, start, want in zip(adapter.deltas.values(), plain.start, plain.biases, strict=True):
                weight = model.get_submodule(delta.site.name).weight
                torch.testing.assert_close(delta.fold(weight, start)[1], want.detach(), rtol=0, atol=1e-12)
            x = torch.randn(3, 4, dtype=torch.float64)
            torch.testing.assert_close(model(x), plain.model(x), rtol=0, atol=1e-12)
    if method == "u_bitfit":
        assert sizes == [25, 15, 15, 9, 9, 5, 5, 5, 5]
    else:
        assert sizes[0] == 25 and sizes[1] <= 15 and sizes[3] <= 9 and sizes[-1] in (3, 6)


def test_the_budget_is_kept_in_optimiser_and_file(tmp_path: Path) -> None:
    """Values at indices: what is trained, optimised and saved; a site without any has none."""
    *_, (_, model, adapter, optimizer) = ours("u_bitfit")
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) == 2 * adapter.params()
    adapter.save(tmp_path)
    kept = load_file(tmp_path / "adapter.safetensors")
    values = {n: t for n, t in kept.items() if n.endswith(".d")}
    assert sum(t.numel() for t in values.values()) == 5 == adapter.params()
    again = base()
    loaded = dt.load(again, tmp_path)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(again(x), model(x))
    loaded.merge()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["u_bitfit", "s_bitfit"])
def test_accumulation_changes_nothing(method: str) -> None:
    *_, (_, _, one, _) = ours(method)
    *_, (_, _, three, _) = ours(method, n_micro=3)
    for a, b in zip(one.deltas.values(), three.deltas.values(), strict=True):
        torch.testing.assert_close(a.d, b.d, rtol=1e-9, atol=1e-12)
        assert method == "s_bitfit" or torch.equal(a.index, b.index)


@pytest.mark.parametrize("method", ["u_bitfit", "s_bitfit"])
def test_a_file_trains_on_as_it_is(method: str, tmp_path: Path) -> None:
    """What was found before is neither pruned again nor started anew, resumed or not; and steps may be few."""
    *_, (_, _, adapter, _) = ours(method)
    adapter.save(tmp_path)
    want = [d.d.detach().clone() for d in adapter.deltas.values()]
    for n_steps, cut in ((N_STEPS, 3), (3, 1)):
        state: dict[str, Any] = {}
        model = base()
        loaded = dt.load(model, tmp_path, trainable=True)
        for first in (0, cut):
            schedule, optimizer = loaded.schedule, torch.optim.SGD(loaded.groups(0.0))
            if first:
                schedule.load_state_dict(state)
            schedule.begin(optimizer, n_steps)
            for step in range(first, cut if not first else n_steps):
                loss(model, step).backward()
                schedule.before_step(step)
                schedule.after_step(step)
            state = schedule.state_dict()
        for d, values in zip(loaded.deltas.values(), want, strict=True):
            assert torch.equal(d.d, values)
            assert method == "s_bitfit" or torch.equal(d.index, adapter.deltas["0", d.site.name].index)


@pytest.mark.parametrize("method", ["u_bitfit", "s_bitfit"])
def test_a_step_that_overflowed_scores_nothing(method: str) -> None:
    """GradScaler leaves such a step out; the choice is that of the other steps' scores."""
    model = base()
    adapter = dt.attach(model, method, keep=0.2, search=4, rounds=1, head=None)
    optimizer, schedule = torch.optim.AdamW(adapter.groups(LR)), adapter.schedule
    schedule.begin(optimizer, N_STEPS)
    scores = {key: torch.zeros_like(d.d) for key, d in schedule.deltas().items()}
    for step in range(4):
        loss(model, step).backward()
        for key, d in schedule.deltas().items():
            scores[key] += (d.d * d.d.grad).abs().detach() * (step != 2)
            d.d.grad.mul_(float("inf") if step == 2 else 1.0)
        schedule.before_step(step)
        if step != 2:
            optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
    sizes = {key: len(s) if method == "s_bitfit" else 1 for key, s in scores.items()}
    want = best({key: (s.view(-1, sizes[key]).mean(1), sizes[key]) for key, s in scores.items()}, 5)
    for key, d in schedule.deltas().items():
        assert len(d.d) == int(want[key].sum()) * sizes[key]
        assert method == "s_bitfit" or d.index.tolist() == want[key].nonzero().flatten().tolist()


@pytest.mark.parametrize("method", ["u_bitfit", "s_bitfit"])
def test_a_round_before_anything_moved_prunes_nothing(method: str) -> None:
    """d begins at 0, and so do its scores: the first of four rounds of a step each has nothing to go by."""
    sizes = [adapter.params() for _, _, adapter, _ in ours(method, search=4, rounds=4)]
    assert sizes[0] == 25 > sizes[1] and sizes[-1] <= 6


def test_a_search_of_no_step_prunes_nothing() -> None:
    *_, (_, _, adapter, _) = ours("u_bitfit", search=0)
    assert adapter.params() == 25


WRONG: dict[str, tuple[float, ...]] = {"keep": (0.0, 1.5), "search": (-1.0,), "rounds": (0,)}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_wrong_numbers(key: str, value: float) -> None:
    for method in (dt.UBitFit, dt.SBitFit):
        with pytest.raises(ValueError, match=f"{key} = {value}, but"):
            method(**{key: value})
    with pytest.raises(ValueError, match="search = 9 steps leave none of 9"):
        next(ours("s_bitfit", search=9))


def test_one_budget() -> None:
    adapter = dt.attach(base(), dt.UBitFit(where={"linear": {"keep": 0.3}, "norm": {}}), head=None)
    with pytest.raises(ValueError, match=r"u_bitfit has one keep for all its sites, not 0\.3 at 0 and 0\.1 at 2"):
        adapter.schedule.begin(torch.optim.SGD(adapter.parameters()), 9)


@pytest.mark.parametrize(("tensors", "message"), [
    ({"index": torch.tensor([1, 1], dtype=torch.int32), "d": torch.zeros(2)}, "index must ascend within the 6"),
    ({"index": torch.tensor([6], dtype=torch.int32), "d": torch.zeros(1)}, "index must ascend within the 6"),
    ({"index": torch.tensor([1], dtype=torch.int32), "d": torch.zeros(2)}, "are no list of entries"),
])  # fmt: skip
def test_damaged_files(tensors: dict[str, Tensor], message: str) -> None:
    first = next(iter(dt.attach(base(), "u_bitfit", head=None).deltas.values()))
    with pytest.raises(ValueError, match=message):
        first.check_ragged(tensors)
    whole = next(iter(dt.attach(base(), "s_bitfit", head=None).deltas.values()))
    with pytest.raises(ValueError, match="is there as a whole or not at all"):
        whole.check_ragged({"d": torch.zeros(2)})
