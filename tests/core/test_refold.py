"""A folded weight that is computed again in the backward: the gradients of plain autograd, and nothing kept."""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import refold
from deltatune.kernels import sparse
from deltatune.kernels.sparse import tiled


def folding(delta: nn.Linear, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight + delta.weight.tanh(), bias + delta.bias


class Kept:
    """What autograd holds of one saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that holds itself would never go


def setting() -> tuple[nn.Linear, functools.partial[tuple[Tensor, Tensor]], Tensor]:
    torch.manual_seed(0)
    delta = nn.Linear(6, 5).double()
    fold = functools.partial(folding, delta, torch.randn(5, 6).double(), torch.randn(5).double())
    return delta, fold, torch.randn(2, 3, 6).double().requires_grad_()


def test_gradients_are_autograds() -> None:
    delta, fold, x = setting()
    plain = F.linear(x, *fold())
    weights = torch.randn_like(plain)
    again = refold.linear(x, fold, [delta])
    assert torch.equal(plain, again)
    want = torch.autograd.grad((plain * weights).sum(), [x, *delta.parameters()])
    got = torch.autograd.grad((again * weights).sum(), [x, *delta.parameters()])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_gradients() -> None:
    delta, fold, x = setting()
    assert torch.autograd.gradgradcheck(
        lambda x, *_: refold.linear(x, fold, [delta]), (x, *delta.parameters()), nondet_tol=1e-12
    )


def test_nothing_dense_is_kept() -> None:
    delta, fold, x = setting()
    kept: list[weakref.ref[Kept]] = []

    def keep(t: Tensor) -> Kept:
        held = Kept(t)
        kept.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        out = refold.linear(x, fold, [delta])
    alive = [held.tensor.numel() for ref in kept if (held := ref()) is not None]
    assert sorted(alive) == sorted([x.numel(), *(p.numel() for p in delta.parameters())])
    out.sum().backward()


def test_a_delta_on_weights_alone_uses_it() -> None:
    """A model of fold-only deltas keeps no folded weight, and forward-mode and functional transforms still go through."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    dt.attach(model, "shira", where="linear", keep=0.1, head=None)
    x = torch.randn(3, 16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x).sum().backward()
    weights = {p.data_ptr() for p in model.parameters()}
    assert not [t for t in kept if t.ndim == 2 and t.shape in {(32, 16), (16, 32)} and t.data_ptr() not in weights]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tangents = {n: torch.ones_like(p) for n, p in trained.items()}
    out = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (trained,), (tangents,))
    assert bool(out[1].detach().any())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["tile", "sampled"])
def test_sparse_is_its_naive_twin(bias: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.SAMPLED_UP_TO, "cpu", 2.0 if form == "sampled" else 0.0)
    torch.manual_seed(1)
    weight, b = torch.randn(5, 6).double(), torch.randn(5).double() if bias else None
    index = torch.tensor([0, 7, 12, 29] + ([30, 33] if bias else []), dtype=torch.int32)
    values, x = torch.randn(len(index)).double().requires_grad_(), torch.randn(2, 3, 6).double().requires_grad_()
    want = F.linear(x, *sparse.scattered(weight, b, index, values))
    got = sparse.linear(x, weight, b, index, values, 4)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad((got * weights).sum(), [x, values]),
        torch.autograd.grad((want * weights).sum(), [x, values]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
