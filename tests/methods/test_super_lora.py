"""SuperLoRA beside its equation, written down plainly: the group's whole matrix, flattened and dealt out."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import deltatune as dt
from deltatune.methods.intrinsic import drawn, fastfood

IDS = torch.arange(1, 9).view(2, 4)
CASES: dict[str, dict[str, Any]] = {
    "one matrix": {},
    "two groups": {"groups": 2, "alpha": 0.5},
    "three groups of uneven size": {"groups": 3},
    "LoNKr": {"splits": 2},
    "LoNKr of three factors, two groups": {"splits": 3, "groups": 2},
    "projected": {"share": 0.3},
    "projected, two factors": {"share": 0.25, "splits": 2},
}


def attached(**hyper: Any) -> tuple[BertModel, dt.Adapter]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model = BertModel(config, add_pooling_layer=False).eval().double()
    adapter = dt.attach(model, "super_lora", **{"r": 3, "where": "q,v,mlp.up", **hyper})
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    return model, adapter


@pytest.mark.parametrize("case", CASES)
def test_the_equation(case: str) -> None:
    model, adapter = attached(**CASES[case])
    config: Any = next(iter(adapter.deltas.values())).config
    deltas = list(adapter.deltas.values())
    moved: list[Tensor] = []
    for group in range(config.groups):
        mine = [d for i, d in enumerate(deltas) if i * config.groups // len(deltas) == group]
        first: Any = mine[0]
        factors = [b @ a for a, b in zip(first.a, first.b, strict=True)]
        entries = functools.reduce(torch.kron, factors).flatten()
        needed = [-(-int(100 * config.share) * d.site.d_in * d.site.d_out // 100) for d in mine]
        assert len(entries) >= sum(needed), "the matrix holds the group"
        side = factors[0].shape[0]
        assert (side - 1) ** (2 * config.splits) < sum(needed), "and is the smallest"
        at = 0
        for d, n in zip(mine, needed, strict=True):
            own, at = entries[at : at + n], at + n
            if config.share < 1:
                size = d.site.d_in * d.site.d_out
                own = fastfood(own, size, *drawn(len(own), size, getattr(d, "keys"), "cpu", torch.float64))  # noqa: B009
            moved.append(config.alpha * own)
    assert adapter.bank is not None
    assert (
        adapter.params()
        == sum(p.numel() for p in adapter.bank.parameters())
        == sum(
            2 * config.r * config.splits * g.side
            for g in {getattr(d, "group"): d for d in deltas}.values()  # type: ignore[attr-defined]  # noqa: B009
        )
    )
    for d, want in zip(deltas, moved, strict=True):
        weight: Any = model.get_submodule(d.site.name).weight
        got = d.fold(weight.detach(), None)[0] - weight
        assert float(want.detach().abs().max()) > 1e-3
        torch.testing.assert_close(got.detach().flatten(), want.detach(), atol=1e-12, rtol=1e-10)


def test_few_numbers_and_a_file(tmp_path: Path) -> None:
    """Fewer numbers than LoRA of the same rank, shared by all layers, saved once."""
    model, adapter = attached()
    assert adapter.params() == 2 * 3 * 43 and len(adapter.deltas) == 6  # 43^2 >= 4 * 16 * 16 + 2 * 16 * 24 = 1792
    adapter.save(tmp_path)
    other, _ = attached()
    dt.adapters(other)["default"].detach()
    dt.load(other, tmp_path)
    assert torch.equal(other(IDS)[0], model(IDS)[0])


def test_bad_hyperparameters() -> None:
    for hyper, word in (
        ({"share": 0.0}, "share = 0.0"),
        ({"splits": 0}, "'splits' is 0"),
        ({"groups": 0}, "groups = 0"),
        ({"groups": 7}, "groups = 7, but there are 6"),
    ):
        with pytest.raises(ValueError, match=word):
            attached(**hyper)
