"""LoHa beside HF PEFT's, on both of its ways through a layer, and on convolutions with and without cores."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from beside import Beside, Names, close, flat, same, turned
from peft.tuners.loha.layer import make_weight_cp
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.products import with_core

PLAIN: Names = {
    "a1": ("hada_w1_b", same), "b1": ("hada_w1_a", same), "a2": ("hada_w2_b", same), "b2": ("hada_w2_a", same),
}  # fmt: skip
CORE: Names = {
    "a1": ("hada_w1_b", same), "b1": ("hada_w1_a", turned), "core1": ("hada_t1", flat),
    "a2": ("hada_w2_b", same), "b2": ("hada_w2_a", turned), "core2": ("hada_t2", flat),
}  # fmt: skip


def linear() -> nn.Module:
    return nn.Linear(40, 64)


def conv() -> nn.Module:
    return nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, dilation=2)


def pixel() -> nn.Module:
    return nn.Conv2d(6, 8, 1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Names]] = {
    "wide": (linear, {"r": 2}, PLAIN),
    "narrow": (linear, {"r": 6}, PLAIN),
    "convolution": (conv, {"r": 4}, PLAIN),
    "effective": (conv, {"r": 4, "effective": True}, CORE),
    "effective, one pixel": (pixel, {"r": 4, "effective": True}, PLAIN),
}


def beside(case: str) -> tuple[Beside, Tensor]:
    layer, hyper, names = LAYERS[case]
    config = peft.LoHaConfig(
        r=hyper["r"], alpha=3, use_effective_conv2d=hyper.get("effective", False), target_modules=["at"]
    )
    pair = Beside(layer, dt.LoHa(alpha=3, **hyper), config, names)
    shape = (2, 5, 40) if layer is linear else (2, 6, 9, 9)
    return pair, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", LAYERS)
def test_outputs_and_gradients(case: str) -> None:
    pair, x = beside(case)
    pair.starts_alike()
    assert torch.equal(pair.ours["at"](x), pair.base(x))
    pair.stir().look(x, but=("b1", "b2") if LAYERS[case][2] is CORE else ())


@pytest.mark.parametrize("case", ["wide", "narrow", "convolution"])
def test_a_course(case: str) -> None:
    pair, x = beside(case)
    pair.learn(x)


def test_both_ways_of_a_linear_layer_are_one() -> None:
    """Where the r^2 columns are few no weight is formed, else the folded one is used: here each in the other's place."""
    pair, x = beside("wide")
    assert pair.delta.fast and pair.delta.has_linear
    pair.stir()
    want = pair.ours["at"](x)
    pair.delta.has_linear = False  # as where others stand there too
    close(pair.ours["at"](x), want)
    pair.delta.fast = False
    close(pair.ours["at"](x), want)
    pair, _ = beside("narrow")
    assert not pair.delta.fast and not pair.delta.has_linear


def test_rank() -> None:
    """r^2 and not r."""
    pair, _ = beside("narrow")
    pair.stir()
    weight, _ = pair.delta.fold(torch.zeros(64, 40), None)
    assert int(torch.linalg.matrix_rank(weight)) == 36


def test_hf_pefts_own_backward_of_cores_is_wrong() -> None:
    """Its gradients of both B take the other product's core and A, as LyCORIS's of that time do; finite differences are ours."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    one, two = ([drawn(2, 2, 3, 3), drawn(2, 4), drawn(2, 3)] for _ in range(2))  # core, B, A

    def theirs(*six: Tensor) -> Tensor:
        return make_weight_cp(*six, torch.tensor(0.5, dtype=torch.float64)).flatten(1)

    def ours(*six: Tensor) -> Tensor:
        parts = [with_core(core.flatten(-2), b.t(), a) for core, b, a in (six[:3], six[3:])]
        return 0.5 * parts[0] * parts[1]

    close(ours(*one, *two), theirs(*one, *two))
    assert torch.autograd.gradcheck(ours, (*one, *two))
    found, want = (torch.autograd.grad(make(*one, *two).square().sum(), (*one, *two)) for make in (theirs, ours))
    same_ones = [torch.allclose(a, b) for a, b in zip(found, want, strict=True)]
    assert same_ones == [True, False, True, True, False, True]
