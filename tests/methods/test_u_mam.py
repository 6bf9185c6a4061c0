"""MAM pruned by first-order scores: the paper has no code, so units, rounds and optimiser are done a second time, plainly.

Their model is the unpruned methods' own, made anew at each step: a prefix and an adapter of each layer's own size.
"""

import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_adapters.py"))
N_STEPS, N, R, LAYERS, LR = 9, 3, 4, 2, 0.02
HYPER: dict[str, Any] = {"n": N, "r": R, "keep": 0.15, "search": 6, "rounds": 3}
METHODS = ["u_mam", "s_mam"]
Key = tuple[int, str]  # layer, tensor


def base() -> nn.Module:
    model: nn.Module = MAKE["backbone"]("bert").double()
    return model


def states(model: nn.Module) -> Tensor:
    out: Tensor = model(**MAKE["batch"]("bert"))[0]
    return out


def loss(model: nn.Module, step: int) -> Tensor:
    out = states(model)
    goal = torch.randn(out.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (out - goal).square().mean()


def ours(method: str, **hyper: Any) -> Iterator[tuple[int, nn.Module, dt.Adapter, Any]]:
    model = base()
    torch.manual_seed(3)
    adapter = dt.attach(model, method, **HYPER | hyper)
    optimizer = torch.optim.AdamW(adapter.groups(LR))
    schedule = adapter.schedule
    schedule.begin(optimizer, N_STEPS)
    yield -1, model, adapter, optimizer
    for step in range(N_STEPS):
        loss(model, step).backward()
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
        yield step, model, adapter, optimizer


def seen(adapter: dt.Adapter) -> dict[Key, Tensor]:
    """The tensors as the maths has them."""
    names = {"attn": ("key", "value"), "mlp": ("down", "down_bias", "up", "up_bias")}
    found = {}
    for delta in adapter.deltas.values():
        found |= {(delta.site.layer, name): getattr(delta, name).detach().clone() for name in names[delta.site.role]}
    return found


class Plain:
    """Whole tensors, or what is left of them, and an AdamW written out."""

    def __init__(self, whole: bool, start: dict[Key, Tensor]) -> None:
        self.whole, self.values = whole, {key: t.clone() for key, t in start.items()}
        self.masks = {key: torch.ones_like(t, dtype=torch.bool) for key, t in start.items()}
        self.total = sum(t.numel() for t in start.values())
        self.anew()

    def anew(self) -> None:
        self.t, self.first, self.second = 0, {}, {}
        for key, t in self.values.items():
            self.first[key], self.second[key] = torch.zeros_like(t), torch.zeros_like(t)
        self.look()

    def look(self) -> None:
        self.scores = {key: torch.zeros_like(t) for key, t in self.values.items()}

    def model(self) -> tuple[nn.Module, dict[Key, Tensor]]:
        """A prefix and an adapter of each layer's size with these values: the model, and what is trained there."""
        leaves, order = [], []
        for layer in range(LAYERS):
            n, r = self.values[layer, "key"].shape[1], self.values[layer, "down"].shape[0]
            if n:
                leaves.append(dt.PrefixTuning(n=n, layers=layer))
                order.append((layer, ("key", "value")))
            if r or self.values[layer, "up_bias"].numel():
                leaves.append(dt.Parallel(r=max(r, 1), scale=2.0, layers=layer))
                order.append((layer, ("down", "down_bias", "up", "up_bias")))
        model = base()
        adapter = dt.attach(model, dt.Sum(*leaves))
        trained = {}
        with torch.no_grad():
            for (path, _), delta in adapter.deltas.items():
                layer, names = order[int(path)]
                for name in names:
                    p, value = getattr(delta, name), self.values[layer, name]
                    p.copy_(value) if value.numel() else p.zero_()
                    trained |= {(layer, name): p} if value.numel() else {}
        return model, trained

    def step(self, step: int) -> None:
        model, trained = self.model()
        self.t += 1
        for key, g in zip(trained, torch.autograd.grad(loss(model, step), list(trained.values())), strict=True):
            value, m, v = self.values[key], self.first[key], self.second[key]
            self.scores[key] += (value * g).abs()
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            value -= LR * m / (1 - 0.9**self.t) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8) * self.masks[key]
        if step + 1 in (2, 4, 6):
            budget = round(self.total * HYPER["keep"] ** ((step + 1) / 6))
            self.prune_groups(budget) if self.whole else self.prune_entries(budget)
            self.look()

    def prune_entries(self, budget: int) -> None:
        alive = [(score, key, i) for key, mask in self.masks.items()
                 for i, (score, there) in enumerate(zip(self.scores[key].flatten().tolist(), mask.flatten().tolist(), strict=True))
                 if there]  # fmt: skip
        kept = {(key, i) for _, key, i in sorted(alive, key=lambda one: -one[0])[:budget]}
        for key, mask in self.masks.items():
            flat = torch.tensor([(key, i) in kept for i in range(mask.numel())])
            self.masks[key] = flat.view(mask.shape)
            self.values[key] *= self.masks[key]

    def prune_groups(self, budget: int) -> None:
        found: list[tuple[float, int, int, str, int]] = []  # score, entries, layer, kind, number
        for layer in range(LAYERS):
            s = {name: self.scores[layer, name] for name in ("key", "value", "down", "down_bias", "up", "up_bias")}
            for i in range(s["key"].shape[1]):
                parts = torch.cat([s["key"][:, i].flatten(), s["value"][:, i].flatten()])
                found.append((float(parts.mean()), len(parts), layer, "row", i))
            for i in range(s["down"].shape[0]):
                parts = torch.cat([s["down"][i], s["down_bias"][i : i + 1], s["up"][:, i]])
                found.append((float(parts.mean()), len(parts), layer, "rank", i))
            if s["up_bias"].numel():
                found.append((float(s["up_bias"].mean()), len(s["up_bias"]), layer, "offset", 0))
        kept: set[tuple[int, str, int]] = set()
        for _, size, *at in sorted(found, key=lambda one: -one[0]):
            if size <= budget or not kept:
                kept.add(tuple(at))  # type: ignore[arg-type]
                budget -= size
        dims = {"key": 1, "value": 1, "down": 0, "down_bias": 0, "up": 1}
        for layer in range(LAYERS):
            for name, dim in dims.items():
                kind = "row" if dim == 1 and name != "up" else "rank"
                key = (layer, name)
                rows = [i for i in range(self.values[key].shape[dim]) if (layer, kind, i) in kept]
                self.cut(key, lambda t, dim=dim, rows=rows: t.index_select(dim, torch.tensor(rows, dtype=torch.long)))
            if (layer, "offset", 0) not in kept:
                self.cut((layer, "up_bias"), lambda t: t[:0])

    def cut(self, key: Key, part: Any) -> None:
        for all_of in (self.values, self.first, self.second, self.masks):
            all_of[key] = part(all_of[key]).clone()


@pytest.mark.parametrize("method", METHODS)
def test_against_the_plain_one(method: str) -> None:
    """The same units are left after each round, and the same values and states after each step, with moments of Adam."""
    sizes = []
    for step, model, adapter, _ in ours(method):
        values = seen(adapter)
        if step < 0:
            plain = Plain(method == "s_mam", values)
            continue
        plain.step(step)
        if step == 5:  # what is left starts again from draws of its own
            assert not any(
                values[layer, name].any() for layer in range(LAYERS) for name in ("up", "up_bias", "down_bias")
            )
            plain.values = {key: t.clone() for key, t in values.items()}
            plain.anew()
        for key, want in plain.values.items():
            torch.testing.assert_close(
                values[key], want, rtol=0, atol=1e-12, msg=lambda m, at=(step, key): f"{at}: {m}"
            )
        if step in (1, 5, 8):
            torch.testing.assert_close(states(model), states(plain.model()[0]), rtol=0, atol=1e-12)
        sizes.append(adapter.params())
    total = LAYERS * (2 * N * 16 + 2 * R * 16 + R + 16)
    budgets = [round(total * HYPER["keep"] ** (i / 3)) for i in (1, 2, 3)]
    if method == "u_mam":
        assert sizes == [total, *(b for b in budgets[:2] for _ in (0, 1)), *[budgets[2]] * 4]
    else:
        assert sizes[0] == total and all(0 <= b - sizes[i] < 33 for b, i in zip(budgets, (1, 3, 5), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_new_start(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the methods themselves start, and the same whatever the run's generator says, a GPU's too; moments begin again."""
    ends, seeded = [], []
    for seed in (0, 1):
        course = ours(method, keep=1.0)
        for _ in range(6):
            next(course)
            torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "manual_seed_all", seeded.append)
            _, _, adapter, optimizer = next(course)
        assert not seeded, "a GPU's generator, which draws the training's dropout, would be set back"
        ends.append(seen(adapter))
        assert not optimizer.state
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    for layer in range(LAYERS):
        assert 0 < ends[0][layer, "down"].abs().max() <= 1 / math.sqrt(16)
        assert 0.01 < ends[0][layer, "key"].std() < 0.03
        assert not torch.equal(ends[0][layer, "key"], ends[0][layer, "value"])
    assert not torch.equal(ends[0][0, "key"], ends[0][1, "key"])


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_kept_in_optimiser_and_file(method: str, tmp_path: Path) -> None:
    *_, (_, model, adapter, optimizer) = ours(method)
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) == 2 * adapter.params()
    adapter.save(tmp_path)
    kept = load_file(tmp_path / "adapter.safetensors")
    numbers = {n: t for n, t in kept.items() if "fingerprint" not in n and t.is_floating_point()}
    assert sum(t.numel() for t in numbers.values()) == adapter.params()
    again = base()
    loaded = dt.load(again, tmp_path, trainable=True)
    assert torch.equal(states(again), states(model))
    schedule = loaded.schedule
    schedule.begin(torch.optim.SGD(loaded.parameters()), N_STEPS)
    assert schedule.search == 0 and not schedule.scores, "what is pruned already would be pruned again"


def test_nothing_of_a_layer_may_be_left(tmp_path: Path) -> None:
    """A layer whose rows, ranks and bias are all gone is the base's own; so is its gradient."""
    *_, (_, model, adapter, _) = ours("s_mam", keep=0.01)
    empty = [d for d in adapter.deltas.values() if not d.n_left()]
    assert adapter.params() <= 33 and len(empty) >= 2
    loss(model, 0).backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapter.parameters() if p.grad is not None)
    with adapter.disabled():
        bare = states(model)
    for p in adapter.parameters():
        p.data.zero_()
    assert all(d in empty for d in adapter.deltas.values() if d.site.role == "attn"), "a prefix of zeros is no base"
    torch.testing.assert_close(states(model), bare, rtol=0, atol=1e-14)


def test_one_course_for_both() -> None:
    adapter = dt.attach(base(), dt.Sum(dt.UPrefix(n=2, keep=0.2), dt.UParallel(r=2, keep=0.3)))
    with pytest.raises(ValueError, match=r"what is pruned has one keep, not 0\.2 of u_prefix and 0\.3 of u_parallel"):
        adapter.schedule.begin(torch.optim.SGD(adapter.parameters()), 9)
    with pytest.raises(ValueError, match=r"u_prefix and u_parallel: search = 9 steps leave none of 9"):
        next(ours("u_mam", search=9))


@pytest.mark.parametrize("leaf", [dt.UPrefix, dt.SPrefix])
def test_wrong_places(leaf: Any) -> None:
    with pytest.raises(ValueError, match="mid = 4, but what is pruned is the prefix itself"):
        leaf(mid=4)
    with pytest.raises(ValueError, match="s_prefix: shift = True, but tokens cannot start behind prefixes of several"):
        dt.SPrefix(shift=True)


@pytest.mark.parametrize(("leaf", "tensors", "message"), [
    (dt.UParallel, {"down_index": torch.tensor([64], dtype=torch.int32), "down_values": torch.zeros(1)}, "within the 64"),
    (dt.UParallel, {"up_index": torch.tensor([1], dtype=torch.int64), "up_values": torch.zeros(1)}, "no list of entries"),
    (dt.SParallel, {"down": torch.zeros(2, 16), "up": torch.zeros(16, 1)}, r"have \[1, 2\] of one rank left"),
    (dt.SParallel, {"down": torch.zeros(5, 16)}, r"must be \(4, 16\) with some of its 4 left"),
    (dt.SParallel, {"up": torch.zeros(15, 2)}, r"must be \(16, 4\) with some of its 4 left"),
    (dt.SParallel, {"up_bias": torch.zeros(3)}, r"\(16,\) is there as a whole or not at all"),
])  # fmt: skip
def test_damaged_files(leaf: Any, tensors: dict[str, Tensor], message: str) -> None:
    (delta,) = dt.attach(base(), leaf(r=R, layers=0)).deltas.values()
    with pytest.raises(ValueError, match=message):
        delta.check_ragged(tensors)
