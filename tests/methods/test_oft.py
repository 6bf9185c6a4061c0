"""OFT beside HF PEFT's on the same weights: the layer, its gradients and whole courses of AdamW; what it is and refuses."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "series": ({}, {}),
    "seven terms": ({"terms": 7}, {"num_cayley_neumann_terms": 7}),
    "exact": ({"terms": 0}, {"use_cayley_neumann": False}),
    "one block": ({"share": True}, {"block_share": True}),
    "constrained": ({"eps": 0.05}, {"coft": True, "eps": 0.05}),
    "constrained, one block": ({"eps": 0.05, "share": True}, {"coft": True, "eps": 0.05, "block_share": True}),
}


class Net(nn.Module):
    """Two layers of unlike widths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 12, generator=generator), torch.randn(6, 5, generator=generator)


def course(model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[int], None], n_steps: int = 12) -> None:
    for step in range(n_steps):
        x, target = batch(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("case", SETTINGS)
def test_as_hf_peft_trains(case: str) -> None:
    """From the same random blocks: outputs, and each trained tensor after a course of AdamW with weight decay."""
    hyper, options = SETTINGS[case]
    theirs: Any = peft.get_peft_model(Net(), peft.OFTConfig(target_modules=["one", "two"], oft_block_size=4, **options))
    model = Net()
    adapter = dt.attach(model, "oft", where=["one", "two"], block=4, head=None, **hyper)
    sign = -1 if case == "exact" else 1  # theirs rotates by the inverse where the inverse is exact
    yours = [m.weight for m in theirs.modules() if type(m).__name__ == "OFTRotationModule"]
    mine = [d.q for d in adapter.deltas.values()]
    with torch.no_grad():
        for q, p in zip(mine, yours, strict=True):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            q.copy_(sign * p)  # type: ignore[operator]
    x, _ = batch(99)
    a, b = model(x), theirs(x)
    assert (a - Net()(x)).abs().max() > (0.001 if "constrained" in case else 0.05)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    schedule = adapter.schedule
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    schedule.begin(optimizer, 12)
    course(theirs, torch.optim.AdamW(yours, lr=1e-2, weight_decay=0.1), lambda step: None)
    course(model, optimizer, schedule.after_step)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
    for q, p in zip(mine, yours, strict=True):  # theirs has been projected by the forward above, ours after the step
        torch.testing.assert_close(sign * q, p, rtol=0, atol=1e-5)  # type: ignore[operator]


def test_it_rotates() -> None:
    """Rows keep their lengths and angles with the exact inverse, nearly so with the series; R = I leaves every bit."""
    model = Net()
    weight = model.one.weight.detach().clone()
    adapter = dt.attach(model, "oft", where=["one"], block=6, terms=0, head=None)
    x, _ = batch(0)
    assert torch.equal(model(x), Net()(x))
    (delta,) = adapter.deltas.values()
    with torch.no_grad():
        delta.q.normal_()  # type: ignore[operator]
    folded, _ = delta.fold(weight, None)
    torch.testing.assert_close(folded @ folded.t(), weight @ weight.t(), rtol=0, atol=1e-5)
    assert (folded - weight).abs().max() > 0.1
    assert adapter.params() == 2 * 15


def test_the_constraint_holds_after_each_step() -> None:
    """All of a layer's blocks together stay within eps, which a course without it leaves."""
    model = Net()
    adapter = dt.attach(model, "oft", where=["one"], block=4, eps=0.01, head=None)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.schedule.begin(optimizer, 5)
    (delta,) = adapter.deltas.values()
    norms = []
    for step in range(5):
        x, target = batch(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        norms.append(float(delta.skew(delta.q.detach()).norm()))  # type: ignore[operator]
        adapter.schedule.after_step(step)
        assert float(delta.skew(delta.q.detach()).norm()) <= 0.01 + 1e-7  # type: ignore[operator]
        optimizer.zero_grad()
    assert max(norms) > 0.02


def test_no_weight_is_formed_on_a_linear_layer() -> None:
    """What the forward keeps for the backward is of the input's size and of the blocks': nothing is as large as the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    dt.attach(model, "oft", where=["0"], block=8, head=None)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 256)).sum()
    own = [n for n in kept if n == 256 * 256]  # the frozen weight itself, which the input's gradient needs
    assert len(own) == 1 and max(n for n in kept if n != 256 * 256) <= 32 * 8 * 8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "terms": ({"terms": 2}, "terms = 2, but it must be 0, which is exact, or at least 3"),
    "eps": ({"eps": 0.0}, "eps = 0.0, but a bound must lie above 0"),
    "block": ({"block": 30}, "block = 30, but it must lie between 1 and d_in"),
    "one": ({"block": 1}, "blocks of 1 in a width of 12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    hyper, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dt.attach(Net(), "oft", where=["one", "two"], head=None, **hyper)
