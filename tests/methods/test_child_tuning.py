"""Child-Tuning against its reference repository's masks and optimiser, and what its masks promise."""

import json
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.core.schedule import Schedule

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_child_tuning.py"))
fill, gradient, classifier, collate, examples = (
    MAKE[k] for k in ("fill", "gradient", "classifier", "collate", "examples")
)
SHAPES, STEPS = MAKE["SHAPES"], MAKE["STEPS"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
FISHER = GOLDEN["fisher"]


def batches() -> Iterator[dict[str, Any]]:
    """The golden's, in the order in which its Trainer drew them."""
    rows = examples()
    for picked in FISHER["batches"]:
        batch = collate([rows[i] for i in picked])
        yield {k: v for k, v in batch.items() if k != "idx"}


def mask_of(text: str, shape: Any) -> Tensor:
    return torch.tensor([bit == "1" for bit in text]).view(tuple(shape))


def calibrated() -> tuple[nn.Module, dt.Adapter]:
    """The golden's BERT under the golden's mask. It was made with gradients clipped to 0.05 where we clip to 1: a loss
    twenty times as large is the same clip."""
    model = classifier()
    adapter = dt.attach(model, "child_tuning_d", p=FISHER["reserve_p"])
    factor = 1 / FISHER["max_grad_norm"]
    adapter.calibrate(batches(), lambda m, batch: factor * m(**batch).loss)
    return model, adapter


def test_fisher_mask_is_the_references() -> None:
    """Bit for bit; embeddings, pooler and classifier have none there, and are not trained in place here."""
    model, adapter = calibrated()
    assert adapter.calibrated.keys() == FISHER["masks"].keys() == adapter.owned().keys()
    for name, text in FISHER["masks"].items():
        assert torch.equal(adapter.calibrated[name], mask_of(text, model.get_parameter(name).shape)), name
    n = sum(text.count("1") for text in FISHER["masks"].values())
    assert adapter.params() == n and 0 < n < sum(p.numel() for p in adapter.owned().values())


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 1.0])
def test_fisher_mask_by_hand(p: float) -> None:
    """Each tensor's gradient of a batch clipped alone to norm 1, squared, averaged; numpy's percentile of them all.

    In training mode, with labels as they are; the model is left as it was."""
    model = classifier().train()
    names = [n for n, _ in model.named_parameters() if "encoder.layer." in n]
    with torch.no_grad():
        for n in names:  # norms above and below 1
            model.get_parameter(n).mul_(3.0)
    total = {n: torch.zeros_like(model.get_parameter(n)) for n in names}
    norms = []
    for batch in batches():
        model.zero_grad()
        (30 * model(**batch).loss).backward()
        for n in names:
            grad = model.get_parameter(n)
            norms.append(float(nn.utils.clip_grad_norm_([grad], 1.0)))
            total[n] += grad.grad.square() / len(FISHER["batches"])
    assert min(norms) < 1 < max(norms)
    edge = np.percentile(np.concatenate([f.flatten().numpy() for f in total.values()]), (1 - p) * 100)
    model.zero_grad()
    before = {n: q.detach().clone() for n, q in model.named_parameters()}
    adapter = dt.attach(model, "child_tuning_d", p=p)
    grads = [q.grad for q in model.parameters()]
    adapter.calibrate(batches(), lambda m, batch: 30 * m(**batch).loss)
    for n in names:
        assert torch.equal(adapter.calibrated[n], total[n] >= edge), n
    assert sum(int(m.sum()) for m in adapter.calibrated.values()) == adapter.params()
    assert model.training and [q.grad for q in model.parameters()] == grads == [None] * len(grads)
    for n, q in before.items():
        assert torch.equal(model.get_parameter(n), q)


class Two(nn.Module):
    """The golden's two tensors, each the weight of a layer: there decay falls on both, and here on matrices alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Linear(4, 3, bias=False), nn.Linear(5, 1, bias=False)
        self.double()
        with torch.no_grad():
            for key, shape in SHAPES.items():
                self.weight(key).copy_(fill(key, shape))

    def weight(self, key: str) -> Tensor:
        """The golden's tensor of that name, in the golden's shape."""
        return self.get_parameter(f"{key}.weight").view(SHAPES[key])

    def graded(self, step: int) -> None:
        for key in SHAPES:
            p = self.get_parameter(f"{key}.weight")
            p.grad = gradient(step, key).double().view(p.shape)


def trained(options: dict[str, Any], adapter: dt.Adapter, model: Two) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(step, tensors) of torch's AdamW after each step, as the reference counts: there eps is not divided by the root
    of the second moment's correction, so that ours takes another eps each step; there decay comes after the step, so
    that ours starts from p / c and is seen as c p, with c = 1 - lr decay. Gradients do not hang on p."""
    c = 1 - options["lr"] * options["weight_decay"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.div_(c)
    groups = adapter.groups(options["lr"], options["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=tuple(options["betas"]), weight_decay=0.5)
    schedule = adapter.schedule
    schedule.begin(optimizer, STEPS)
    for step in range(STEPS):
        one, two = (1 - beta ** (step + 1) for beta in options["betas"])
        for group in optimizer.param_groups:
            group["eps"] = options["eps"] / math.sqrt(two)
            if not options.get("correct_bias", True):
                assert not options["weight_decay"]
                group["lr"] = options["lr"] * one / math.sqrt(two)
        model.graded(step)
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        yield step, {key: c * model.weight(key).detach() for key in SHAPES}
    schedule.end()


@pytest.mark.parametrize("name", [n for n in GOLDEN["runs"] if n.startswith("d")])
def test_d_steps_as_the_reference(name: str) -> None:
    """Also its moments, which see the masked gradient alone. Decay moves frozen entries there, and none here."""
    run = GOLDEN["runs"][name]
    model = Two()
    adapter = dt.attach(model, "child_tuning_d", where=["w", "b"], head=None)
    mask = mask_of(run["masks"]["w"], SHAPES["w"])
    adapter.calibrated = {"w.weight": mask, "b.weight": torch.ones(1, 5, dtype=torch.bool)}
    decay = run["options"]["weight_decay"]
    frozen = None
    for step, have in trained(run["options"], adapter, model):
        want = {k: torch.tensor(v, dtype=torch.float64) for k, v in run["steps"][step].items()}
        torch.testing.assert_close(have["b"], want["b"], rtol=0, atol=1e-11)
        torch.testing.assert_close(have["w"][mask], want["w"][mask], rtol=0, atol=1e-11)
        assert frozen is None or torch.equal(have["w"][~mask], frozen)
        frozen = have["w"][~mask]
        start = fill("w", SHAPES["w"]).double()[~mask]
        there = start * (1 - run["options"]["lr"] * decay) ** (step + 1)
        torch.testing.assert_close(want["w"][~mask], there, rtol=0, atol=1e-11)
        torch.testing.assert_close(frozen, start, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", [n for n in GOLDEN["runs"] if n.startswith("f")])
def test_f_steps_as_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference's draws in the place of ours."""
    run = GOLDEN["runs"][name]
    draws = iter([d for masks in run["masks"] for d in (masks["w"], masks["b"])])

    def bernoulli_(self: Tensor, p: float, *, generator: torch.Generator) -> Tensor:
        assert p == run["options"]["reserve_p"] and isinstance(generator, torch.Generator)
        return self.copy_(mask_of(next(draws), self.shape))

    monkeypatch.setattr(Tensor, "bernoulli_", bernoulli_)
    model = Two()
    adapter = dt.attach(model, "child_tuning_f", p=run["options"]["reserve_p"])
    assert list(adapter.owned()) == ["w.weight", "b.weight"]
    for step, have in trained(run["options"], adapter, model):
        for key, want in run["steps"][step].items():
            torch.testing.assert_close(have[key], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-11)
    assert next(draws, None) is None


class Wide(nn.Module):
    """Enough entries for a share to show."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(100, 100, bias=False), nn.Linear(100, 100)


def drawn(p: float, step: int, seed: int) -> dict[str, Tensor]:
    """F's masked gradients of that step, all of them 1 before it."""
    adapter = dt.attach(Wide(), "child_tuning_f", p=p, seed=seed)
    for q in adapter.parameters():
        q.grad = torch.ones_like(q)
    schedule = adapter.schedule
    schedule.begin(torch.optim.SGD(adapter.groups(0.1)), 10)
    schedule.before_step(step)
    found = {}
    for name, q in adapter.owned().items():
        assert q.grad is not None
        found[name] = q.grad
    return found


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_f_draws_bernoulli_over_p(p: float) -> None:
    """Values are 0 and 1 / p, their mean is 1, and each step and tensor has a draw of its own."""
    seen = []
    for step in (0, 1):
        found = drawn(p, step, seed=3)
        assert list(found) == ["one.weight", "two.weight", "two.bias"]
        for name in ("one.weight", "two.weight"):
            grad = found[name]
            assert set(grad.unique().tolist()) == {0.0, float(torch.tensor(1.0) / p)}
            assert abs(float((grad != 0).float().mean()) - p) < 5 * math.sqrt(p * (1 - p) / grad.numel())
            seen.append(grad != 0)
    for i, one in enumerate(seen):  # as often alike as independent draws are
        for two in seen[:i]:
            alike = p * p + (1 - p) * (1 - p)
            assert abs(float((one == two).float().mean()) - alike) < 0.03


def test_f_draws_from_the_adapters_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    adapter = dt.attach(Wide(), "child_tuning_f", seed=5)
    first = drawn(0.3, 4, seed=5)
    for q in adapter.parameters():
        q.grad = torch.ones_like(q)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    adapter.schedule.before_step(4)
    assert torch.equal(before, torch.get_rng_state()), "the global generator moved"
    for name, q in adapter.owned().items():
        assert q.grad is not None and torch.equal(q.grad, first[name])
    assert not torch.equal(drawn(0.3, 4, seed=6)["one.weight"], first["one.weight"])
    assert not torch.equal(state, before)


def test_f_lets_momentum_move_what_is_not_drawn() -> None:
    """As in the paper's code; and a parameter without a gradient is left alone."""
    model = Wide()
    adapter = dt.attach(model, "child_tuning_f", p=0.5)
    optimizer = torch.optim.SGD(adapter.groups(0.1), momentum=0.9)
    schedule = adapter.schedule
    schedule.begin(optimizer, 2)
    for step in range(2):
        model.one.weight.grad = torch.ones_like(model.one.weight)
        schedule.before_step(step)
        before = model.one.weight.detach().clone()
        optimizer.step()
    assert ((model.one.weight != before) & (model.one.weight.grad == 0)).any()
    assert model.two.weight.grad is None


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_decay_moves_no_frozen_entry(make: Any) -> None:
    """Bit for bit over real steps, though the optimiser has a decay of its own; on the others it is AdamW's."""
    model, adapter = calibrated()
    before = {n: p.detach().clone() for n, p in adapter.owned().items()}
    rest = {
        n: p.detach().clone() for n, p in model.named_parameters() if "encoder.layer." not in n and "deltas" not in n
    }
    optimizer = make(adapter.groups(1e-2, weight_decay=0.3), weight_decay=0.3)
    schedule = adapter.schedule
    schedule.begin(optimizer, 3)
    model.train()
    for step in range(3):
        for batch in batches():
            (model(**batch).loss / len(FISHER["batches"])).backward()
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
    for name, p in adapter.owned().items():
        mask = adapter.calibrated[name]
        assert torch.equal(p[~mask], before[name][~mask]), name
        assert (p[mask] != before[name][mask]).all(), name
    for name, old in rest.items():
        assert torch.equal(model.get_parameter(name), old), name
    assert all(p.requires_grad for p in adapter.head_parameters())


def test_decay_is_adamws_on_the_share_that_trains() -> None:
    """Without gradients p <- (1 - lr decay) p there, at the rate that a scheduler has set; vectors take none."""
    _, adapter = calibrated()
    before = {n: p.detach().clone() for n, p in adapter.owned().items()}
    optimizer = torch.optim.AdamW(adapter.groups(1e-2, weight_decay=0.3))
    adapter.schedule.begin(optimizer, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    schedule = adapter.schedule
    schedule.begin(optimizer, 1)
    for p in adapter.owned().values():
        p.grad = torch.zeros_like(p)
    schedule.before_step(0)
    optimizer.step()
    for name, p in adapter.owned().items():
        factor = torch.ones_like(p).masked_fill(adapter.calibrated[name], 1 - 0.05 * 0.3 if p.ndim > 1 else 1.0)
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-14, atol=0)


def test_d_has_its_own_groups() -> None:
    _, adapter = calibrated()
    schedule = adapter.schedule
    assert schedule.needs_groups and schedule.needs_data
    with pytest.raises(
        ValueError, match=r"its method sets parameter groups of its own; build the optimiser from adapter\.groups"
    ):
        schedule.begin(torch.optim.AdamW(adapter.parameters(), weight_decay=0.1), 3)


def test_d_has_its_own_groups_where_all_are_matrices() -> None:
    """One group then, as wide as an optimiser's over all parameters, whose decay would move what is frozen."""
    model = Two()
    adapter = dt.attach(model, "child_tuning_d", where=["w", "b"], head=None)
    adapter.calibrated = {n: torch.ones_like(p, dtype=torch.bool) for n, p in adapter.owned().items()}
    with pytest.raises(ValueError, match=r"adapter\.groups"):
        adapter.schedule.begin(torch.optim.AdamW(adapter.parameters(), weight_decay=0.1), 3)


def test_d_looks_at_data_first() -> None:
    adapter = dt.attach(classifier(), "child_tuning_d")
    with pytest.raises(ValueError, match=r"FisherMask looks at data first; call adapter\.calibrate\(batches\)"):
        adapter.schedule.begin(torch.optim.AdamW(adapter.groups(1e-3)), 3)
    with pytest.raises(ValueError, match="no batch was given"):
        adapter.calibrate([])
    whole = dt.attach(Two(), "child_tuning_d", where=["w", "b"])
    with pytest.raises(ValueError, match=r"the loss does not depend on b\.weight"):
        whole.calibrate([{"x": torch.ones(4).double()}], lambda m, batch: m.w(batch["x"]).sum())
    free = dt.attach(Two(), "child_tuning_f")
    assert type(free.schedule) is not Schedule and not free.schedule.needs_data
    with pytest.raises(ValueError, match="child_tuning_f needs no calibration data"):
        free.calibrate(batches())


@pytest.mark.parametrize("method", ["child_tuning_d", "child_tuning_f"])
@pytest.mark.parametrize("p", [0.0, 1.5, -0.1])
def test_a_share_is_a_share(method: str, p: float) -> None:
    with pytest.raises(ValueError, match=f"{method}: p = {p}, but a share lies above 0 and not above 1"):
        dt.attach(Two(), method, p=p)


def test_another_models_masks_are_refused() -> None:
    _, adapter = calibrated()
    state = adapter.schedule.state_dict()
    assert {m.dtype for m in state["masks"].values()} == {torch.uint8}
    assert all(len(m) == -(-adapter.owned()[n].numel() // 8) for n, m in state["masks"].items())
    other = dt.attach(classifier(), "child_tuning_d", where="mlp.down")
    with pytest.raises(ValueError, match="the saved masks are of other parameters"):
        other.schedule.load_state_dict(state)
