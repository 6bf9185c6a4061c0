"""Intrinsic SAID: its projection beside the reference's, and what one vector for all layers means."""

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import deltatune as dt
from deltatune.methods import intrinsic
from deltatune.methods.intrinsic import drawn, fastfood, keys_of, walsh_hadamard

GOLDEN = json.loads(
    (Path(__file__).resolve().parent.parent / "golden" / "intrinsic_said.json").read_text(encoding="utf-8")
)
IDS = torch.arange(1, 9).view(2, 4)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(config).eval()


def attached(model: Any, **hyper: Any) -> dt.Adapter:
    adapter = dt.attach(model, "intrinsic_said", **{"d": 40, "head": None, "seed": 5, **hyper})
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return adapter


@pytest.mark.parametrize("case", GOLDEN)
def test_fastfood_of_the_reference(case: str) -> None:
    """With the reference's random parts: the projection and, its division by the size taken back, the gradient."""
    one = GOLDEN[case]
    x, sign, gauss, want, grad = (torch.tensor(one[k]) for k in ("x", "sign", "gauss", "y", "grad"))
    x.requires_grad_(True)
    y = fastfood(x, one["n"], sign, torch.tensor(one["order"]), gauss)
    (y * torch.arange(1, one["n"] + 1)).sum().backward()
    assert x.grad is not None
    assert float((y.detach() - want).norm() / want.norm()) < 1e-6
    assert float((x.grad - grad).norm() / grad.norm()) < 1e-6


@pytest.mark.parametrize("k", [1, 3, 6, 7, 12, 13])
def test_the_transform_is_the_matrix(k: int) -> None:
    """H of 2^k as a Kronecker power of [[1, 1], [1, -1]]."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(k):
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    x = torch.randn(2**k, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), h @ x)


def test_what_is_drawn() -> None:
    """Signs, a permutation, and normal numbers, of 2^k places and another layer's differ; a unit vector stays one."""
    sign, order, gauss = drawn(65536, 60000, keys_of("3 layer"), "cpu", torch.float32)
    assert len(sign) == 65536 and sign.unique().tolist() == [-1, 1] and abs(float(sign.mean())) < 0.02
    assert (
        order.sort().values.tolist() == list(range(65536))
        and abs(float((order[1:] > order[:-1]).float().mean()) - 0.5) < 0.02
    )
    moments = [float((gauss**p).mean()) for p in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.1)
    other = drawn(65536, 60000, keys_of("3 other"), "cpu", torch.float32)
    assert abs(float((other[2] * gauss).mean())) < 0.02 and float((other[1] == order).float().mean()) < 0.001
    x = torch.zeros(20000)
    x[7] = 1.0
    assert float(fastfood(x, 60000, sign, order, gauss).norm()) == pytest.approx(1.0, abs=0.05)
    for n in (1, 2, 3, 5):
        assert sorted(drawn(1, n, keys_of("1"), "cpu", torch.float32)[1].tolist()) == list(
            range(max(2, 1 << (n - 1).bit_length()))
        )


def test_what_is_drawn_stays() -> None:
    """A file holds no random part: another draw of any of them would make every saved adapter another one."""
    sign, order, gauss = drawn(4, 5, keys_of("0 layer"), "cpu", torch.float32)
    assert sign.tolist() == [1, -1, -1, 1] and order.tolist() == [7, 3, 4, 6, 2, 1, 5, 0]
    want = [-2.1930525, -0.0678376, 1.4391129, 0.5506861, 1.4728341, -0.4538161, 0.0786205, 1.3407984]
    assert gauss.tolist() == pytest.approx(want, rel=1e-4)


def test_a_short_vector_is_a_long_one_with_zeros() -> None:
    """The first transform is not done where there is nothing but zeros."""
    x = torch.randn(40, dtype=torch.float64).requires_grad_()
    sign, order, gauss = drawn(1000, 1000, keys_of("1"), "cpu", torch.float64)
    short, whole = (fastfood(v, 1000, sign, order, gauss) for v in (x, torch.nn.functional.pad(x, (0, 984))))
    torch.testing.assert_close(short, whole, rtol=1e-12, atol=1e-12)
    one, two = (torch.autograd.grad(y.cos().sum(), x)[0] for y in (short, whole))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert torch.equal(drawn(40, 1000, keys_of("1"), "cpu", torch.float64)[0], sign[:64])


def test_parts_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn once a layer, bit for bit the same function; in no copy and no state, and gone where the adapter is."""
    draws: list[int] = []

    def counted(*given: Any) -> Any:
        draws.append(1)
        return drawn(*given)

    monkeypatch.setattr(intrinsic, "drawn", counted)
    model, other = bert(), bert()
    adapter = attached(model, keep_random=True)
    attached(other)
    with torch.inference_mode():
        model(IDS)
    assert len(draws) == 13 == len(intrinsic._KEPT)
    for one in (model, other):
        one(IDS).logits.square().sum().backward()
    assert len(draws) == 13 + 2 * 13, "the other draws in the forward and in the backward"
    for p, q in zip(adapter.parameters(), dt.adapters(other)["default"].parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    assert len(intrinsic._KEPT) == 13 and torch.equal(twin(IDS).logits, other(IDS).logits)
    del twin
    gc.collect()
    assert sum(t.numel() for t in adapter.state_dict().values()) == 40
    assert all("deltas" not in n and "banks" not in n for n, _ in model.named_buffers())
    model.double()(IDS).logits.sum().backward()  # another dtype is drawn for
    model.float()
    adapter.set(keep_random=False)
    assert torch.equal(model(IDS).logits, other(IDS).logits) and not intrinsic._KEPT
    adapter.set(keep_random=True)
    model(IDS)
    adapter.detach()
    del adapter
    gc.collect()
    assert not intrinsic._KEPT


@pytest.mark.parametrize("said", [True, False])
def test_one_vector_moves_all_layers(said: bool) -> None:
    """d numbers are trained; each layer's update is its scale times a linear function of the one vector."""
    model = bert()
    adapter = attached(model, said=said)
    n = len(adapter.deltas)
    assert n == 13 and adapter.params() == 40 and (adapter.bank is not None)
    assert len(list(adapter.bank.parameters())) == 1 and sum(p.numel() for p in adapter.bank.parameters()) == (
        40 - n if said else 40
    )

    def updates() -> dict[str, Tensor]:
        found = {}
        for (_, name), d in adapter.deltas.items():
            layer = model.get_submodule(name)
            weight, bias = d.fold(layer.weight.detach(), layer.bias.detach())  # type: ignore[operator, union-attr, arg-type]
            assert bias is not None
            found[name] = torch.cat([(weight - layer.weight).flatten(), bias - layer.bias]).detach()  # type: ignore[operator]
        return found

    before = updates()
    with torch.no_grad():
        next(adapter.bank.parameters()).mul_(2)
    for name, now in updates().items():
        torch.testing.assert_close(now, 2 * before[name], atol=1e-5, rtol=1e-4)
    if said:
        (name, delta), *_ = [(name, d) for (_, name), d in adapter.deltas.items()]
        with torch.no_grad():
            delta.get_parameter("s").zero_()
        assert not updates()[name].any()


def test_the_seed_is_the_projection(tmp_path: Path) -> None:
    """Neither is saved but the seed: the file holds d numbers, and another seed is another adapter."""
    model = bert()
    adapter = attached(model)
    want = model(IDS).logits
    adapter.save(tmp_path)
    assert sum(t.numel() for t in adapter.state_dict().values()) == 40
    other = bert()
    torch.manual_seed(123)
    dt.load(other, tmp_path)
    assert torch.equal(other(IDS).logits, want)
    model = bert()
    attached(model, seed=6)
    assert not torch.allclose(model(IDS).logits, want, atol=1e-4)


def test_impossible_numbers() -> None:
    with pytest.raises(ValueError, match="'d-n_scales' is 0 where d = 13, n_scales = 13"):
        dt.attach(bert(), "intrinsic_said", d=13, head=None)
    with pytest.raises(ValueError, match=r"d = 500, but it must lie between 1 and d_in\*d_out = 256"):
        dt.attach(bert(), "intrinsic_said", d=500, head=None)
