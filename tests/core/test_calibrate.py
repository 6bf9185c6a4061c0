"""Statistics of gradients over batches, and nothing left behind."""

import pytest
import torch
from torch import Tensor, nn

from deltatune.core.calibrate import gradients


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("of", [torch.square, torch.abs, lambda g: g], ids=["square", "abs", "mean"])
def test_the_mean_of_what_was_asked(of) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    tensors = {"w": model[0].weight, "b": model[2].bias}
    got = gradients(model, tensors, batches(3), loss, of)
    want = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for batch in batches(3):
        for name, grad in zip(tensors, torch.autograd.grad(loss(model, batch), list(tensors.values())), strict=True):
            want[name] += of(grad) / 3
    for name in tensors:
        torch.testing.assert_close(got[name], want[name])


def test_nothing_is_left_behind() -> None:
    model = nn.Linear(4, 3).to(torch.bfloat16).requires_grad_(False)
    model.bias.requires_grad_(True)
    with torch.no_grad():
        got = gradients(model, {"w": model.weight}, [b.bfloat16() for b in batches(2)], loss)
    assert got["w"].dtype == torch.float32
    assert not got["w"].requires_grad
    assert (model.weight.requires_grad, model.bias.requires_grad) == (False, True)
    assert model.weight.grad is None
    assert model.bias.grad is None


def test_errors_name_the_tensor_and_restore() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    idle = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match="does not depend on idle"):
        gradients(model, {"w": model.weight, "idle": idle}, batches(1), loss)
    with pytest.raises(ValueError, match="no batch"):
        gradients(model, {"w": model.weight}, [], loss)
    assert not any(t.requires_grad for t in (model.weight, model.bias, idle))
