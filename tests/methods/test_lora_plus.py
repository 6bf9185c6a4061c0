"""LoRA+ beside HF PEFT's `create_loraplus_optimizer`: its groups, and several steps from the same start."""

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import deltatune as dt

LR, DECAY = 3e-3, 0.1


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def both(ratio: float, bias: bool = False) -> tuple[Any, Any, nn.Module, dt.Adapter, dict[str, nn.Parameter]]:
    """HF PEFT's model and optimiser, ours with its values, and their tensor of each of ours."""
    cfg = peft.LoraConfig(target_modules=["one", "two"], r=4, lora_alpha=6, lora_bias=bias)
    theirs: Any = peft.get_peft_model(Net(), cfg)
    yours = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    model = Net()
    hyper: dict[str, Any] = {"r": 4, "alpha": 6.0, "bias": bias, "ratio": ratio}
    adapter = dt.attach(model, "lora_plus", where=["one", "two"], head=None, **hyper)
    ends = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "d": "lora_B.default.bias"}
    pairs = {n: yours[f"base_model.model.{n.split('.')[1]}.{ends[n[-1]]}"] for n, _ in adapter.named_parameters()}
    assert len(pairs) == len(yours) == (6 if bias else 4)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            p.copy_(pairs[name])
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY
    )
    return theirs, other, model, adapter, pairs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ratio", [16.0, 4.0])
def test_as_hf_peft_groups(ratio: float, bias: bool) -> None:
    """The rate and the weight decay of every tensor."""
    _, other, _, adapter, pairs = both(ratio, bias)
    have, want = (
        {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        for groups in (adapter.groups(LR, weight_decay=DECAY), other.param_groups)
    )
    for name, p in adapter.named_parameters():
        assert have[id(p)] == want[id(pairs[name])]
        assert have[id(p)][0] == LR * (1.0 if name.endswith("a") else ratio)


@pytest.mark.parametrize("ratio", [16.0, 4.0])
def test_as_hf_peft_trains(ratio: float) -> None:
    theirs, other, model, adapter, pairs = both(ratio)
    optimizer = torch.optim.AdamW(adapter.groups(LR, weight_decay=DECAY))
    adapter.schedule.begin(optimizer, 8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        x, target = torch.randn(6, 12, generator=generator), torch.randn(6, 9, generator=generator)
        for net, opt in ((model, optimizer), (theirs, other)):
            (net(x) - target).square().mean().backward()
            opt.step()
            opt.zero_grad()
        for name, p in adapter.named_parameters():
            torch.testing.assert_close(p, pairs[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
    assert (model(x) - Net()(x)).abs().max() > 0.1


def test_an_optimiser_with_one_rate_is_refused() -> None:
    adapter = dt.attach(Net(), "lora_plus", where=["one"], head=None)
    with pytest.raises(ValueError, match="its method sets parameter groups of its own"):
        adapter.schedule.begin(torch.optim.AdamW(adapter.parameters(), lr=LR), 8)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio = 0.0, but it must lie above 0"):
        dt.attach(Net(), "lora_plus", where=["one"], ratio=0.0, head=None)
