"""SSF against its reference repository on one ViT: logits and gradients; merged, in bf16, and where it stands."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTForImageClassification

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_ssf.py"))
fill, images = MAKE["fill"], MAKE["images"]
D, LAYERS, HEADS, MLP, CLASSES = (MAKE[k] for k in ("D", "LAYERS", "HEADS", "MLP", "CLASSES"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
ROLES = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.o": "o", "mlp.up": "up", "mlp.down": "down"}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def name_of(site: dt.Site) -> str:
    """The golden's name of a layer."""
    if site.kind == "conv2d":
        return "patches"
    if site.layer is None:
        return "norm"
    side = "norm_attn" if "before" in site.name else "norm_mlp"
    return f"{site.layer}.{ROLES.get(site.role or '', side)}"


def vit() -> nn.Module:
    sizes: dict[str, Any] = {
        "image_size": MAKE["SIZE"],
        "patch_size": MAKE["PATCH"],
        "hidden_size": D,
        "num_labels": CLASSES,
    }
    sizes |= {"intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    model: Any = ViTForImageClassification(ViTConfig(**sizes, layer_norm_eps=1e-6)).double().eval()
    with torch.no_grad():
        for key in ("cls", "positions"):
            p = getattr(model.vit.embeddings, {"cls": "cls_token", "positions": "position_embeddings"}[key])
            p.copy_(fill(key, p.shape))
        for site in dt.sites(model, "linear,norm,conv2d,head"):
            layer, name = model.get_submodule(site.module), "head" if site.role == "head" else name_of(site)
            for key, p in layer.named_parameters():
                p.copy_(fill(f"{name}.{key}", p.shape))
    assert isinstance(model, nn.Module)
    return model


def attached(model: nn.Module) -> tuple[dt.Adapter, dict[str, Tensor]]:
    adapter = dt.attach(model, "ssf", head=None)
    found = {f"{name_of(d.site)}.{key}": p for d in adapter.deltas.values() for key, p in d.named_parameters()}
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return adapter, found


def test_as_the_reference_computes() -> None:
    """Logits, loss, the gradient of every tensor, and the merged model, in fp64."""
    model = vit()
    with torch.no_grad():
        torch.testing.assert_close(model(images()).logits, exact(GOLDEN["bare"]), rtol=0, atol=1e-9)
    adapter, found = attached(model)
    assert found.keys() == GOLDEN["grads"].keys() and len(found) == 2 * (2 + 8 * LAYERS)
    logits = model(images()).logits
    torch.testing.assert_close(logits, exact(GOLDEN["logits"]), rtol=0, atol=1e-9)
    assert (logits - exact(GOLDEN["bare"])).abs().max() > 0.1
    loss = (fill("loss", logits.shape).double() * logits).sum()
    assert float(loss.detach()) == pytest.approx(GOLDEN["loss"], abs=1e-9)
    loss.backward()
    for key, want in GOLDEN["grads"].items():
        grad = found[key].grad
        assert grad is not None and (exact(want).any() or key.endswith("k.offset"))  # softmax takes no notice of it
        torch.testing.assert_close(grad, exact(want), rtol=0, atol=1e-9)
    adapter.merge()
    torch.testing.assert_close(model(images()).logits, logits, rtol=0, atol=1e-9)
    adapter.detach()
    torch.testing.assert_close(model(images()).logits, logits, rtol=0, atol=1e-9)


def test_starts_as_the_reference() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(2, 4096))
    adapter = dt.attach(layer, "ssf", where="linear", head=None)
    for key, p in adapter.named_parameters():
        mean, std = GOLDEN["start"][key.rpartition(".")[2]]
        assert float(p.detach().mean()) == pytest.approx(mean, abs=2e-3)
        assert float(p.detach().std()) == pytest.approx(std, rel=0.05)


def test_small_steps_show_in_bf16() -> None:
    """w = 1 + 3/1024 is 1 in bf16, whose next number is 1 + 8/1024: on the whole the activations still grow by w."""
    layer = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    adapter = dt.attach(layer, "ssf", where="linear", head=None)
    with torch.no_grad():
        layer[0].weight.copy_(torch.eye(8))  # type: ignore[operator]
        for key, p in adapter.named_parameters():
            p.fill_(1 + 3 / 1024 if key.endswith("gain") else 0.0)
    x = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    grown = float(layer(x).detach().double().sum() / x.double().sum())
    assert torch.tensor(1 + 3 / 1024).bfloat16() == 1
    assert grown == pytest.approx(1 + 3 / 1024, abs=1e-3)


def test_no_offset_on_an_rmsnorm() -> None:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = LlamaModel(LlamaConfig(**sizes))
    adapter = dt.attach(model, "ssf", head=None)
    assert {d.site.kind for d in adapter.deltas.values()} == {"linear"} and len(adapter.deltas) == 7
    with pytest.raises(ValueError, match="fits none"):
        dt.attach(model, "ssf", where="norm", name="other", head=None)
