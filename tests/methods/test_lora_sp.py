"""LoRA-SP beside HF PEFT's LoRA, of which the same entries are trained."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.freezing import LoRASP
from deltatune.methods.lora import LoRA

D_OUT, D_IN, R, ALPHA = 10, 14, 4, 8.0


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT), nn.ReLU(), nn.Linear(D_OUT, 3))


def attached(**hyper: Any) -> tuple[nn.Sequential, dt.Adapter, LoRASP]:
    model = base()
    adapter = dt.attach(model, "lora_sp", where=["0"], head=None, **{"r": R, "alpha": ALPHA, **hyper})
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, LoRASP)
    return model, adapter, delta


def rows(step: int) -> Tensor:
    return torch.randn(5, D_IN, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("fast", [True, False], ids=["linear", "fold"])
@pytest.mark.parametrize("keep", [0.5, 0.2, 1.0])
def test_as_a_lora_whose_other_entries_have_no_gradient(keep: float, fast: bool) -> None:
    """AdamW over ten steps: HF's A and B with their gradients masked, ours with the trained entries alone."""
    model, adapter, delta = attached(keep=keep)
    delta.has_linear, delta.fast = fast, fast
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    start = [t.detach().clone() for t in delta.factors()]
    masks = []
    with torch.no_grad():
        for own, value, at in ((a, start[0], delta.at_a), (b, start[1], delta.at_b)):
            own.copy_(value)
            masks.append(torch.zeros(own.numel()).index_fill_(0, at.long(), 1.0).view_as(own))
    mine = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.0)
    other = torch.optim.AdamW([a, b], lr=0.02, weight_decay=0.0)
    for step in range(10):
        x = rows(step)
        out, want = model(x), theirs(x)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        out.square().mean().backward()
        want.square().mean().backward()
        for p, mask in zip((a, b), masks, strict=True):
            assert p.grad is not None
            p.grad.mul_(mask)
        for optimizer in (mine, other):
            optimizer.step()
            optimizer.zero_grad()
    for have, want, before, mask in zip(delta.factors(), (a, b), start, masks, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(have[mask == 0], before[mask == 0]) and (have[mask == 1] != before[mask == 1]).any()
    assert adapter.params() == round(keep * R * D_IN) + round(keep * R * D_OUT)
    assert sum(int(mask.sum()) for mask in masks) == adapter.params()


def test_which_entries_is_drawn_and_kept(tmp_path: Path) -> None:
    """Half of them, evenly; a file to be trained on from has them, a finished one is a LoRA of the same function."""
    torch.manual_seed(1)
    at = [attached()[2].at_a for _ in range(2)]
    assert all((t.diff() > 0).all() and len(t) == R * D_IN // 2 for t in at)
    model, adapter, delta = attached(dropout=0.1)
    with torch.no_grad():
        delta.b.normal_()
    model.eval()
    adapter.save(tmp_path / "done")
    adapter.save(tmp_path / "on", resumable=True)
    for folder, kind in (("done", LoRA), ("on", LoRASP)):
        other = base()
        loaded = dt.load(other, tmp_path / folder)
        assert [type(d) for d in loaded.deltas.values()] == [kind]
        torch.testing.assert_close(other.eval()(rows(0)), model(rows(0)), rtol=0, atol=1e-6)
    (again,) = loaded.deltas.values()
    assert torch.equal(again.at_a, delta.at_a) and torch.equal(again.at_b, delta.at_b)


def test_places_with_a_share_of_their_own(tmp_path: Path) -> None:
    model = base()
    adapter = dt.attach(model, "lora_sp", where={"0": {"keep": 0.25}, "2": {"r": 2}}, r=3, head=None)
    assert adapter.params() == round(0.25 * 3 * D_IN) + round(0.25 * 3 * D_OUT) + round(0.5 * 2 * D_OUT) + 3
    adapter.save(tmp_path)
    other = base()
    dt.load(other, tmp_path)
    assert torch.equal(other(rows(0)), model(rows(0)))


def test_a_finished_tree_counts_what_its_sites_have(tmp_path: Path) -> None:
    """Beside a method whose sites have some of its tensors, on a layer with a kernel."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    dt.attach(model, dt.Sum(dt.LoKr(r=2, where=["0"]), dt.LoRASP(r=2, where=["2"])), head=None).save(tmp_path)
    card = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))
    assert card["n_params"] == dt.load(model, tmp_path, name="again").params()


@pytest.mark.parametrize("hyper", [{"keep": 0.0}, {"keep": 1.5}, {"r": 0}])
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(**hyper)
