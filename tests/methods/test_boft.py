"""BOFT beside HF PEFT's on the same weights: each number of factors, the layer and whole courses of AdamW."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn

import deltatune as dt


class BlockDiagonal:
    """What HF PEFT's CUDA extension computes; without it, it runs one factor."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    def backward(self, grad: Tensor, blocks: Tensor) -> list[Tensor]:
        n, size = blocks.shape[1], blocks.shape[-1]
        parts = [grad[:, i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(n)]
        return [torch.stack(parts, 1).contiguous()]


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal())


class Net(nn.Module):
    """Two layers, the second without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(32, 16), nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 32, generator=generator), torch.randn(6, 5, generator=generator)


def upper(blocks: Tensor) -> Tensor:
    """Ours of theirs: they rotate by (I - S)(I + S)^-1 for the skew part S of their blocks."""
    rows, cols = torch.triu_indices(blocks.shape[-1], blocks.shape[-1], 1)
    return -0.5 * (blocks - blocks.mT)[..., rows, cols]


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (4, 3), (2, 4), (8, 2)])
def test_as_hf_peft_trains(size: int, factors: int) -> None:
    """They train whole blocks of which the skew part counts, here its half is trained: the same steps under AdamW."""
    options: dict[str, Any] = {"boft_block_size": size, "boft_n_butterfly_factor": factors}
    names = ["one", "two"]
    if size * 2 ** (factors - 1) > 16:
        names = ["one"]
    theirs: Any = peft.get_peft_model(Net(), peft.BOFTConfig(target_modules=names, **options))
    model = Net()
    adapter = dt.attach(model, "boft", where=names, block=size, factors=factors, head=None)
    layers = [m for m in theirs.modules() if isinstance(m, boft_layer.BOFTLayer)]
    deltas: list[Any] = list(adapter.deltas.values())
    with torch.no_grad():
        for d, m in zip(deltas, layers, strict=True):
            r, s = m.boft_R["default"], m.boft_s["default"]
            skew = torch.randn(r.shape, generator=torch.Generator().manual_seed(r.numel()))
            r.copy_(0.3 * (skew - skew.mT))
            s.copy_(1 + 0.1 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1)))
            d.q.copy_(upper(r))
            d.s.copy_(s[:, 0])
    x, _ = batch(99)
    assert (model(x) - Net()(x)).abs().max() > 0.1
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=2e-6)
    pairs = [(theirs, [p for p in theirs.parameters() if p.requires_grad]), (model, adapter.parameters())]
    for net, parameters in pairs:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-12)
        for step in range(10):
            rows, target = batch(step)
            (net(rows) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
    for d, m in zip(deltas, layers, strict=True):
        torch.testing.assert_close(d.q, upper(m.boft_R["default"]), rtol=0, atol=1e-5)
        torch.testing.assert_close(d.s, m.boft_s["default"][:, 0], rtol=0, atol=1e-5)


def test_factors_mix_blocks() -> None:
    """An input reaches 2^(m - 1) blocks of the rotated one, and with all factors every one."""
    for factors, reached in ((1, 4), (2, 8), (3, 16), (4, 32)):
        model = Net()
        adapter = dt.attach(model, "boft", where=["one"], block=4, factors=factors, head=None)
        (delta,) = adapter.deltas.values()
        with torch.no_grad():
            delta.q.normal_(0.0, 0.5)  # type: ignore[operator]
        turned, _ = delta.fold(torch.eye(32)[:16], None)
        assert {int((row.abs() > 1e-7).sum()) for row in turned} == {reached}
        torch.testing.assert_close(turned @ turned.t(), torch.eye(16), rtol=0, atol=1e-5)
        assert adapter.params() == factors * 8 * 6 + 16


def test_as_many_factors_as_the_width_allows() -> None:
    """12 of block 4 are three blocks, which no half can pair; the start leaves the layer's outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8))
    x = torch.randn(2, 12)
    want = model(x)
    adapter = dt.attach(model, "boft", where=["0", "1"], block=4, factors=4, head=None)
    assert [tuple(d.q.shape) for d in adapter.deltas.values()] == [(1, 3, 6), (2, 2, 6)]  # type: ignore[union-attr]
    assert torch.equal(model(x), want)


def test_refused() -> None:
    with pytest.raises(ValueError, match="factors = 0, but it must be at least 1"):
        dt.attach(Net(), "boft", where=["one"], factors=0, head=None)
    with pytest.raises(ValueError, match="block = 40, but it must lie between 1 and d_in = 32"):
        dt.attach(Net(), "boft", where=["one"], block=40, head=None)
