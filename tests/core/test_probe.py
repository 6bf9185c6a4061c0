"""The effect probe sees what only a run can show, and leaves no trace."""

import pytest
import torch
from torch import nn

import deltatune as dt


class Net(nn.Module):
    """`read` is used past its forward, `unused` not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.used(x) @ self.read.weight.t()}


def test_probe() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = dt.attach(model, "lora", where=["used"], r=2)
    state = torch.random.get_rng_state()
    values = [p.detach().clone() for p in adapter.parameters()]
    adapter.probe(x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(values, adapter.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in adapter.parameters()) and model.training
    adapter.detach()

    adapter = dt.attach(model, "lora", where=["used", "read", "unused"], r=2)
    with pytest.raises(ValueError, match=r"no effect at 0\.read, 0\.unused: the forward does not call"):
        adapter.probe(x)
    adapter.detach()
    with pytest.raises(ValueError, match=r"no effect at 0\.unused"):
        dt.attach(model, "lora", where=["used", "unused"], r=2, probe={"x": x})
    assert not dt.adapters(model) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.used) is nn.Linear
    dt.attach(model, "lora", where=["used"], r=2, probe={"x": x})
