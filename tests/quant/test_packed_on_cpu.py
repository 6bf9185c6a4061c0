"""bitsandbytes packs 4-bit weights anew for an inference on CPUs with AVX-512 bf16: what is read stays what it was."""

from typing import Any

import pytest
import torch
from torch import nn

from deltatune.core.storage import format_of
from deltatune.quant.layers import KINDS

bnb: Any = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("packs", [False, True])
@torch.no_grad()
def test_reading_is_no_writing(double: bool, packs: bool) -> None:
    torch.manual_seed(0)
    layer: Any = KINDS["bnb-nf4"].make(nn.Linear(128, 96), quant_type="nf4", block=64, double=double).eval()
    kind = format_of(layer)
    assert kind is not None
    before, x = kind.read(layer, "weight"), torch.randn(5, 128)
    if packs:  # as other libraries make the layer
        if not bnb.functional.has_avx512bf16():
            pytest.skip("this CPU has no AVX-512 bf16")
        layer.support_avx512bf16_for_cpu = True
    y = layer(x)
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) is packs
    for _ in range(2):
        now = kind.read(layer, "weight")
        assert (now - before).norm() <= (3e-3 if packs else 0) * before.norm()  # packed, the scales are bf16
        assert torch.equal(layer(x), y)
