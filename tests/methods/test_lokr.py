"""LoKr beside HF PEFT's in each of its forms, and the sizes that it cuts a layer into."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from beside import Beside, Names, close, flat, same, turned
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import shapes
from deltatune.core.base import Base
from deltatune.methods.products import cut

W1: Names = {"w1": ("lokr_w1", same)}
BOTH: Names = {"a1": ("lokr_w1_b", same), "b1": ("lokr_w1_a", same)}
W2: Names = {"w2": ("lokr_w2", lambda t: t.flatten(1))}
LOW: Names = {"a2": ("lokr_w2_b", same), "b2": ("lokr_w2_a", same)}
CORE: Names = {"a2": ("lokr_w2_b", same), "b2": ("lokr_w2_a", turned), "core": ("lokr_t2", flat)}


def linear() -> nn.Module:
    return nn.Linear(24, 60)


def conv() -> nn.Module:
    return nn.Conv2d(12, 30, 3, stride=2, padding=1, groups=2)


def pixel() -> nn.Module:
    return nn.Conv2d(12, 30, 1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Names]] = {
    "low rank": (linear, {"r": 2}, W1 | LOW),
    "whole": (linear, {"r": 8}, W1 | W2),
    "whole at its edge": (linear, {"r": 5}, W1 | W2),
    "both": (linear, {"r": 2, "both": True}, BOTH | LOW),
    "both asked for, whole": (linear, {"r": 3, "both": True}, W1 | LOW),
    "a factor": (linear, {"r": 2, "factor": 3}, W1 | LOW),
    "a bound": (linear, {"r": 2, "factor": 5}, W1 | LOW),
    "a factor above the root": (linear, {"r": 1, "factor": 12, "both": True}, BOTH | LOW),
    "convolution": (conv, {"r": 2}, W1 | LOW),
    "convolution, whole": (conv, {"r": 8}, W1 | W2),
    "effective": (conv, {"r": 2, "effective": True}, W1 | CORE),
    "effective both": (conv, {"r": 1, "effective": True, "both": True}, BOTH | CORE),
    "effective, whole": (conv, {"r": 8, "effective": True}, W1 | W2),
    "effective, one pixel": (pixel, {"r": 1, "effective": True}, W1 | LOW),
}


def beside(case: str) -> tuple[Beside, Tensor]:
    layer, hyper, names = LAYERS[case]
    config = peft.LoKrConfig(
        r=hyper["r"], alpha=3, use_effective_conv2d=hyper.get("effective", False), decompose_both=hyper.get("both", False),
        decompose_factor=hyper.get("factor", -1), target_modules=["at"],
    )  # fmt: skip
    pair = Beside(layer, dt.LoKr(alpha=3, **hyper), config, names)
    shape = (2, 5, 24) if layer is linear else (2, 12, 9, 9)
    return pair, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", LAYERS)
def test_outputs_and_gradients(case: str) -> None:
    pair, x = beside(case)
    pair.starts_alike()
    assert torch.equal(pair.ours["at"](x), pair.base(x))
    pair.stir().look(x)
    n = sum(p.numel() for p in pair.hf.values())
    dims = pair.delta.dims(Base(pair.base, pair.delta.site))
    assert pair.adapter.params() == n == shapes.sizes(dt.LoKr.count(), dims)[0]


@pytest.mark.parametrize("case", ["both", "effective"])
def test_a_course(case: str) -> None:
    pair, x = beside(case)
    pair.learn(x)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 12, 16, 100])
def test_sizes(factor: int) -> None:
    for n in (*range(1, 130), 768, 3072, 4096, 11008):
        assert cut(n, factor) == factorization(n, factor)


def test_no_weight_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layer runs by reshaping its input, which is the folded weight's own function."""
    pair, x = beside("low rank")
    pair.stir()
    weight, bias = pair.delta.fold(pair.base.weight, pair.base.bias)

    def fail(*_: Any) -> None:
        raise AssertionError("fold ran")

    monkeypatch.setattr(dt.LoKr, "fold", fail)
    close(pair.ours["at"](x), nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("factor", [0, -2])
def test_no_such_factor(factor: int) -> None:
    with pytest.raises(ValueError, match=f"factor = {factor}, but it must be -1 or at least 1"):
        dt.LoKr(factor=factor)
