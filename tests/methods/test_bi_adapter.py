"""Bi-Adapter against its reference code's numbers; what its file holds, and that it computes the same and trains on."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import files
from deltatune.methods.bi_adapter import levels

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_bi_adapter.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
fill, D, R = MAKE["fill"], MAKE["D"], MAKE["R"]
BITS = list(map(int, GOLDEN["levels"]))


def lora(bits: int, shape: tuple[int, int] = (8, 6), dtype: torch.dtype = torch.double, **hyper: Any) -> Any:
    """A linear layer (O, I), and the adapter on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype)
    return model, dt.attach(model, "bi_lora", where=["0"], bits=bits, head=None, **hyper)


def only(adapter: dt.Adapter) -> Any:
    (delta,) = adapter.deltas.values()
    return delta


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_references(bits: int) -> None:
    for found, want in zip(levels(bits), GOLDEN["levels"][str(bits)].values(), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(want), rtol=1e-6, atol=1e-7)


def test_two_levels_halve_the_normal_distribution() -> None:
    """+-0.6745, the quartiles: by themselves, without the reference."""
    quartile = math.sqrt(2) * torch.erfinv(torch.tensor(0.5, dtype=torch.double)).item()
    assert levels(1)[0] == pytest.approx((-quartile, quartile), rel=1e-6)
    assert levels(1)[1] == pytest.approx((0,), abs=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_weights_codes_and_gradients_are_the_references(bits: int) -> None:
    _, adapter = lora(bits, (6, 8), r=6)
    delta, want = only(adapter), GOLDEN["matrices"][str(bits)]
    with torch.no_grad():
        delta.a.copy_(fill("w", (6, 8)))
    runs = delta.w("a")
    torch.testing.assert_close(runs, torch.tensor(want["runs"], dtype=torch.double), rtol=2e-7, atol=1e-9)
    torch.testing.assert_close(runs, torch.tensor(want["loaded"], dtype=torch.double), rtol=2e-7, atol=1e-9)
    (fill("loss", (6, 8)) * runs).sum().backward()
    torch.testing.assert_close(delta.a.grad, torch.tensor(want["grad"], dtype=torch.double), rtol=1e-6, atol=1e-8)
    _, kept = adapter.finished()
    kept = {key.rpartition(".")[2]: value for key, value in kept.items()}
    assert kept["a_codes"].tolist() == want["bytes"]
    assert kept["a_mean"].item() == pytest.approx(want["mean"], rel=1e-10)
    assert kept["a_std"].item() == pytest.approx(want["std"], rel=1e-10)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_by_hand(bits: int) -> None:
    """Through the code as if it were z, and through mean and deviation: not the plain straight-through estimator."""
    _, adapter = lora(bits, (6, 8), r=6)
    delta = only(adapter)
    g = fill("loss", (6, 8))
    (g * delta.w("a")).sum().backward()
    w = delta.a.detach()
    z = (w - w.mean()) / w.std()
    c = (delta.w("a").detach() - w.mean()) / w.std()
    want = g + (g * (c - z)).sum() * z / (w.numel() - 1)
    torch.testing.assert_close(delta.a.grad, want, rtol=2e-4, atol=1e-5)  # but for the 1e-5 beside s
    if bits == 1:
        assert float((delta.a.grad - g).norm() / g.norm()) > 1e-3


def test_lora_is_the_references() -> None:
    model, adapter = lora(1, (D, D), r=R, scale=2.0)
    delta, x = only(adapter), fill("x", (1, 1, D))
    with torch.no_grad():
        delta.a.copy_(fill("down", (R, D)))
        delta.b.copy_(fill("up", (D, R)))
        added = model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)
    want = 2.0 * torch.tensor(GOLDEN["forms"]["lora"], dtype=torch.double)
    torch.testing.assert_close(added.flatten(), want, rtol=1e-6, atol=1e-8)


def vit(width: int = D) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return t.ViTModel(t.ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).double().eval()


def test_adapter_is_the_references_and_stands_where_it_does() -> None:
    """Beside the MLP and its norm: what it reads is the residual stream, what it adds joins the MLP's."""
    model, images = vit(), fill("images", (2, 3, 8, 8))
    adapter = dt.attach(model, "bi_adapter", r=R, scale=0.1, head=None)
    delta, x = only(adapter), fill("x", (1, 1, D))
    assert delta.site.name.endswith(":mlp+norm")
    with torch.no_grad():
        delta.down.copy_(fill("down", (R, D)))
        delta.up.copy_(fill("up", (D, R)))
        want = 0.1 * torch.tensor(GOLDEN["forms"]["adaptformer"], dtype=torch.double)
        torch.testing.assert_close(delta.post(torch.zeros_like(x), x).flatten(), want, rtol=1e-6, atol=1e-8)
        out = model(pixel_values=images).last_hidden_state
        adapter.disable()
        (block,) = (m for m in model.modules() if type(m).__name__ == "ViTLayer")
        (norm,) = (m for n, m in block.named_modules() if n in ("layernorm_after", "post_attention_layernorm"))
        seen: list[Tensor] = []
        hooks = [
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
            block.register_forward_hook(
                lambda _, args, y: y + 0.1 * torch.relu(seen[0] @ delta.w("down").T) @ delta.w("up").T
            ),
        ]
        torch.testing.assert_close(model(pixel_values=images).last_hidden_state, out)
        for hook in hooks:
            hook.remove()
        assert float((model(pixel_values=images).last_hidden_state - out).norm() / out.norm()) > 1e-3


@pytest.mark.parametrize(("bits", "r"), [(1, 3), (2, 4), (3, 5), (4, 3), (8, 3)])
def test_the_file_holds_bits_and_eight_bytes_a_matrix(bits: int, r: int, tmp_path: Path) -> None:
    model, adapter = lora(bits, (10, 7), torch.float32, r=r)
    x = torch.randn(5, 7)
    want = model(x)
    adapter.save(tmp_path / "one")
    card, tensors = files.read_adapter(tmp_path / "one")
    held = [t for key, t in tensors.items() if key.startswith("0.")]
    padded = [-(-n // 8) * bits for n in (r * 7, 10 * r)]
    assert sum(t.numel() * t.element_size() for t in held) == sum(padded) + 2 * 8
    assert card["tree"]["config"]["weights"] == "coded"
    adapter.detach()
    loaded = dt.load(model, tmp_path / "one")
    assert torch.equal(model(x), want)
    assert not [*loaded.parameters()]


def test_training_goes_on_from_a_resumable_file(tmp_path: Path) -> None:
    """Two steps, saved, two more: the same bits as four."""
    x, y = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)), torch.ones(8, 10)

    def steps(model: Any, adapter: dt.Adapter, n: int) -> None:
        optimizer = torch.optim.SGD(adapter.groups(0.1))
        for _ in range(n):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, adapter = lora(1, (10, 7), torch.float32, r=4)
    start = (model(x) - y).square().mean().item()
    steps(model, adapter, 2)
    adapter.save(tmp_path, resumable=True)
    steps(model, adapter, 2)
    want = model(x)
    assert (want - y).square().mean().item() < start
    adapter.detach()
    again = dt.load(model, tmp_path, trainable=True)
    steps(model, again, 2)
    assert torch.equal(model(x), want)


def test_codes_are_chosen_in_fp32_over_bf16(tmp_path: Path) -> None:
    model, adapter = lora(1, (16, 16), torch.bfloat16, r=8)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    want = model(x)
    adapter.save(tmp_path)
    adapter.detach()
    dt.load(model, tmp_path)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_cannot_be(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits = {bits}, but it must lie between 1 and 8"):
        dt.attach(vit(16), "bi_adapter", bits=bits)


def test_one_entry_has_no_deviation() -> None:
    model = nn.Sequential(nn.Linear(1, 3))
    with pytest.raises(ValueError, match="0: bi_lora: its matrix 'a' has one entry"):
        dt.attach(model, "bi_lora", where=["0"], r=1, head=None)
