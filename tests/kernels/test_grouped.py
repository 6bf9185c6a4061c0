"""Blocks of rows with a low-rank change each: one product for all against one after another."""

import pytest
import torch
from torch import Tensor

from deltatune.kernels.lora import add_each, add_grouped

DOUBLE = {"dtype": torch.float64}
Pairs = list[tuple[Tensor, Tensor, float]]


def pairs_of(ranks: tuple[int, ...], scales: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Pairs:
    torch.manual_seed(0)
    made = [
        (torch.randn(r, 13, dtype=dtype), torch.randn(7, r, dtype=dtype), s) for r, s in zip(ranks, scales, strict=True)
    ]
    return [(a.requires_grad_(), b.requires_grad_(), s) for a, b, s in made]


@pytest.mark.parametrize("ranks", [(3,), (4, 4, 4), (1, 5, 13)])
@pytest.mark.parametrize("scale", ["one", "equal", "each"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_equal_to_one_after_another(ranks: tuple[int, ...], scale: str, shape: tuple[int, ...]) -> None:
    n = len(ranks)
    pairs = pairs_of(ranks, {"one": (1.0,) * n, "equal": (0.3,) * n, "each": (0.3, -2.0, 1.5)[:n]}[scale])
    x = torch.randn(2 * n, *shape, 13, **DOUBLE, requires_grad=True)
    w = torch.randn(7, 13, **DOUBLE)
    ends = [x, *(t for a, b, _ in pairs for t in (a, b))]
    given = torch.randn(2 * n, *shape, 7, **DOUBLE)
    ours, naive = add_grouped(x @ w.t(), x, pairs), add_each(x @ w.t(), x, pairs)
    torch.testing.assert_close(ours, naive)
    for one, other in zip(*(torch.autograd.grad(y, ends, given) for y in (ours, naive)), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


def test_a_block_that_is_no_number_touches_no_other() -> None:
    pairs = pairs_of((2, 5, 3), (1.0, 2.0, 3.0))
    x, y = torch.randn(6, 4, 13, **DOUBLE), torch.randn(6, 4, 7, **DOUBLE)
    want = add_grouped(y.clone(), x, pairs)
    x[2:4] = torch.nan
    got = add_grouped(y.clone(), x, pairs)
    assert torch.equal(got[:2], want[:2]) and torch.equal(got[4:], want[4:]) and got[2:4].isnan().all()
    grads = torch.autograd.grad(torch.cat([got[:2], got[4:]]).sum(), [a for a, _, _ in pairs], allow_unused=True)
    assert all(g.isfinite().all() for g in (grads[0], grads[2]) if g is not None)


def test_a_view_is_left_as_it_is() -> None:
    pairs, x = pairs_of((2, 2), (1.0, 1.0)), torch.randn(4, 13, **DOUBLE)
    whole = torch.randn(6, 7, **DOUBLE)
    kept = whole.clone()
    torch.testing.assert_close(add_grouped(whole[1:5], x, pairs), add_each(kept[1:5], x, pairs))
    assert torch.equal(whole, kept)


def test_bf16_rows_under_fp32_factors() -> None:
    pairs = pairs_of((4, 2), (0.5, 2.0), torch.float32)
    x = torch.randn(8, 3, 13).bfloat16().requires_grad_()
    y = torch.randn(8, 3, 7).bfloat16()
    got = add_grouped(y.clone(), x, pairs)
    assert got.dtype == torch.bfloat16
    want = add_each(y.float(), x.float(), pairs)
    assert (got.float() - want).norm() <= 1e-2 * want.norm()
    for one, other in zip(
        *(torch.autograd.grad(t.float().sum(), [a for a, _, _ in pairs]) for t in (got, want)), strict=True
    ):
        assert one.dtype == torch.float32 and (one - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize(("rows", "of_y"), [(5, 5), (4, 6)])
def test_rows_that_are_no_blocks(rows: int, of_y: int) -> None:
    with pytest.raises(ValueError, match="are not 2 blocks of equally many rows"):
        add_grouped(torch.zeros(of_y, 7), torch.zeros(rows, 13), pairs_of((1, 1), (1.0, 1.0), torch.float32))
