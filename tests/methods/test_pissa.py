"""PiSSA beside HF PEFT's on the same weights: the start, gradients and courses of AdamW; the base keeps its values."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 12, generator=generator), torch.randn(6, 9, generator=generator)


def course(model: nn.Module, parameters: list[Any], n_steps: int = 15) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(n_steps):
        x, target = batch(step)
        torch.manual_seed(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("alpha", "power"), [(4, 1.0), (7, 1.0), (7, 0.5)])
def test_as_hf_peft_trains(alpha: int, power: float, dropout: float) -> None:
    """They train A and B on what is left of the base, here it is whole: the same start bit for bit, and the same course."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": alpha, "use_rslora": power == 0.5, "lora_dropout": dropout}
    cfg = peft.LoraConfig(target_modules=["one", "two"], init_lora_weights="pissa", **options)
    theirs: Any = peft.get_peft_model(Net(), cfg).train()
    model = Net().train()
    hyper: dict[str, Any] = {"r": 4, "alpha": alpha, "power": power, "dropout": dropout}
    adapter = dt.attach(model, "pissa", where=["one", "two"], head=None, **hyper)
    yours = [p for p in theirs.parameters() if p.requires_grad]
    mine = [p for d in adapter.deltas.values() for p in (d.a, d.b)]
    assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))
    course(theirs, yours)
    course(model, mine)
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    x, _ = batch(99)
    assert (model.eval()(x) - Net()(x)).abs().max() > 0.1
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=0, atol=1e-5)
    adapter.detach()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))


def test_the_start_is_exact() -> None:
    """Attached it leaves every bit, in the fast path and the folded weight; the fixed part is the best of its rank."""
    x, _ = batch(0)
    for dtype in (torch.float32, torch.bfloat16):
        model, bare = Net().to(dtype), Net().to(dtype)
        adapter = dt.attach(model, "pissa", where=["one", "two"], r=3, head=None)
        assert torch.equal(model(x.to(dtype)), bare(x.to(dtype)))
        for delta, layer in zip(adapter.deltas.values(), (bare.one, bare.two), strict=True):
            weight = layer.weight.detach().float()
            assert torch.equal(delta.fold(weight, None)[0], weight)
            left = weight - delta.scale * delta.b0 @ delta.a0  # type: ignore[operator]
            torch.testing.assert_close(
                torch.linalg.svdvals(left)[:6], torch.linalg.svdvals(weight)[3:9], rtol=0, atol=1e-5
            )


def test_the_random_svd_nears_the_exact_one() -> None:
    """With many subspace iterations the products are the same; theirs too, drawn from the same seed."""
    exact, near = Net(), Net()
    deltas: list[Any] = []
    for model, niter in ((exact, None), (near, 300)):
        deltas += dt.attach(model, "pissa", where=["one"], r=3, niter=niter, head=None).deltas.values()
    products = [d.scale * d.b0 @ d.a0 for d in deltas]
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-4)
    cfg = peft.LoraConfig(target_modules=["one"], r=3, lora_alpha=8, init_lora_weights="pissa_niter_300")
    theirs: Any = peft.get_peft_model(Net(), cfg)
    layer = theirs.base_model.model.one
    product = 8 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(products[1], product, rtol=0, atol=1e-4)
    torch.manual_seed(5)
    a, _ = deltas[1].principal(exact.one.weight.detach())
    torch.manual_seed(5)
    _, s, v = torch.svd_lowrank(exact.one.weight.detach(), 3, niter=300)
    torch.testing.assert_close(a, (s * 3 / 8).sqrt()[:, None] * v.t(), rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "niter": ({"niter": -1}, "niter = -1, but it must be at least 0"),
    "alpha": ({"alpha": 0.0}, "alpha = 0.0, but the start divides by it"),
    "r": ({"r": 13}, "r = 13, but it must lie between 1 and min"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    hyper, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dt.attach(Net(), "pissa", where=["one"], head=None, **hyper)
