"""KronA beside HF PEFT's LoKr with both matrices whole, which is the same product, and beside torch.kron."""

from typing import Any

import peft
import pytest
import torch
from beside import Beside, close, same
from torch import Tensor, nn

import deltatune as dt


def linear() -> nn.Module:
    return nn.Linear(24, 60)


def test_outputs_and_gradients() -> None:
    """LoKr's scale is alpha / r, and its W1 is KronA's A. The sizes next below the root are those that LoKr takes."""
    config = peft.LoKrConfig(r=100, alpha=250, target_modules=["at"])
    tree = dt.KronA(scale=2.5, rows=6, cols=4)
    pair = Beside(linear, tree, config, {"a": ("lokr_w1", same), "b": ("lokr_w2", same)})
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pair.ours["at"](x), pair.base(x))
    pair.stir().look(x)
    pair.learn(x)


@pytest.mark.parametrize(("rows", "cols", "shapes"), [
    (0, 0, ((6, 4), (10, 6))), (32, 24, ((30, 24), (2, 1))), (1, 24, ((1, 24), (60, 1))), (7, 5, ((6, 4), (10, 6))),
])  # fmt: skip
def test_shapes(rows: int, cols: int, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each factor of a size is the divisor nearest to what was asked for; the layer forms no weight."""
    layer = linear()
    model = nn.ModuleDict({"at": layer})
    if rows == 32:
        with pytest.raises(ValueError, match=r"at: krona: rows = 61, but it must lie between 0 and 60"):
            dt.attach(model, dt.KronA(rows=61), where="at", head=None)
    adapter = dt.attach(model, dt.KronA(scale=0.3, rows=rows, cols=cols), where="at", head=None)
    delta: Any = next(iter(adapter.deltas.values()))
    a, b = delta.a, delta.b
    assert (tuple(a.shape), tuple(b.shape)) == shapes
    assert a.any() and not b.any() and adapter.params() == a.numel() + b.numel()
    with torch.no_grad():
        b.normal_()
    want = layer.weight + 0.3 * torch.kron(a, b)
    close(delta.fold(layer.weight, layer.bias)[0], want)
    x = torch.randn(3, 24)
    close_to: Tensor = nn.functional.linear(x, want, layer.bias)

    def fail(*_: Any) -> None:
        raise AssertionError("fold ran")

    monkeypatch.setattr(dt.KronA, "fold", fail)
    close(model["at"](x), close_to)


def test_rank() -> None:
    """The rank is the product of both ranks, above LoRA's for as many parameters."""
    model = nn.ModuleDict({"at": nn.Linear(64, 64)})
    adapter = dt.attach(model, "krona", where="at", head=None)
    delta: Any = next(iter(adapter.deltas.values()))
    with torch.no_grad():
        delta.b.normal_()
    assert adapter.params() == 128
    assert int(torch.linalg.matrix_rank(delta.fold(torch.zeros(64, 64), None)[0])) == 64
