"""VPT and AdaptFormer on transformers' ViT against forwards written by hand after the papers' code."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import deltatune as dt

D, HEADS, LAYERS, P, R = 32, 4, 3, 5, 6
N_PATCHES = 16


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "hidden_size": D, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_labels": 3, "initializer_range": 0.2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes, **dropout)).double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def blocks(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(site.name) for site in dt.sites(model, "block")]


def first(out: Any) -> Tensor:
    value = out[0] if isinstance(out, tuple) else out
    assert isinstance(value, Tensor)
    return value


def by_hand(model: Any, prompts: list[Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, states without prompts). Behind [CLS], in front of the patches; with prompts for each block the prompts'
    states are replaced in front of every block after the first; the head reads position 0."""
    h = model.vit.embeddings(pixels)
    p = prompts[0].shape[0]
    h = torch.cat([h[:, :1], prompts[0].expand(len(h), -1, -1), h[:, 1:]], 1)
    for i, block in enumerate(blocks(model)):
        if i and len(prompts) > 1:
            h = torch.cat([h[:, :1], prompts[i].expand(len(h), -1, -1), h[:, 1 + p :]], 1)
        h = first(block(h))
    h = model.vit.layernorm(h)
    return model.classifier(h[:, 0]), torch.cat([h[:, :1], h[:, 1 + p :]], 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(("where", "n_prompts"), [("block", LAYERS), ("blocks", 1)], ids=["deep", "shallow"])
def test_vpt_as_the_reference_inserts(where: str, n_prompts: int, checkpointing: bool) -> None:
    """Logits, states, and the gradients of prompts and head."""
    model, pixels = vit(), images()
    adapter = dt.attach(model, "vpt", n=P, where=where)
    found = [d.prompt for d in adapter.deltas.values() if isinstance(d, dt.VPT)]
    assert len(found) == n_prompts and all(p.shape == (P, D) for p in found)
    assert adapter.params() == n_prompts * P * D and adapter.n_head == 3 * D + 3
    with torch.no_grad():
        for p in found:
            p.mul_(5.0)
    other: Any = vit()
    for p in other.parameters():
        p.requires_grad_(False)
    other.classifier.requires_grad_(True)
    prompts = [p.detach().clone().requires_grad_() for p in found]
    want, states = by_hand(other, prompts, pixels)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    (want * weight).sum().backward()

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with torch.no_grad():
        bare = other(pixels).logits
    out = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(out.logits, want, rtol=0, atol=1e-12)
    assert (want - bare).abs().max() > 0.05
    assert out.hidden_states[-1].shape == states.shape == (2, 1 + N_PATCHES, D)
    with torch.no_grad():
        last = model.vit(pixels).last_hidden_state
    torch.testing.assert_close(last, states.detach(), rtol=0, atol=1e-12)
    (out.logits * weight).sum().backward()
    for mine, theirs in zip(found, prompts, strict=True):
        assert theirs.grad is not None and theirs.grad.any()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-11)
    heads = {tuple(p.shape): p.grad for p in adapter.head_parameters()}
    for p in other.classifier.parameters():
        torch.testing.assert_close(heads[tuple(p.shape)], p.grad, rtol=0, atol=1e-11)


def test_prompts_start_as_the_references_do_on_vit_b16() -> None:
    """U(-v, v), v = sqrt(6 / (3 * 16 * 16 + 768)) there; in general sqrt(3 / d)."""
    config = ViTConfig(num_hidden_layers=1, intermediate_size=32)
    adapter = dt.attach(ViTForImageClassification(config), "vpt", n=50)
    (prompt,) = (d.prompt.detach() for d in adapter.deltas.values() if isinstance(d, dt.VPT))
    v = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert 0.999 * v < prompt.abs().max() <= v
    assert float(prompt.std()) == pytest.approx(v / math.sqrt(3), rel=0.02)


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(hidden_size=D, num_attention_heads=HEADS, num_hidden_layers=2, intermediate_size=48, vocab_size=13)
    )


def swin() -> PreTrainedModel:
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


@pytest.mark.parametrize("where", ["block", "blocks"])
@pytest.mark.parametrize("build", [bert, swin], ids=["bert", "swin"])
def test_vpt_needs_patches_that_attend_to_all(build: Any, where: str) -> None:
    """A text has a mask and positions, a window no place for a prompt."""
    model = build()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"^vpt fits none of the \d+ sites that '?block"):
        dt.attach(model, "vpt", where=where)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_vpt_on_the_image_side_alone() -> None:
    """CLIP has a stack that reads patches beside one that reads text."""
    small = {"hidden_size": D, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 48}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 13, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        vision_config={**small, "image_size": 16, "patch_size": 4}, projection_dim=16,
    )  # fmt: skip
    adapter = dt.attach(CLIPModel(config), "vpt", n=P)
    assert [site.partition(".")[0] for _, site in adapter.deltas] == ["vision_model"] * 2


def adapted_by_hand(model: Any, parts: list[dict[str, Tensor]], pixels: Tensor, scale: float, dropout: float) -> Tensor:
    """x <- x + attn(norm1(x)); x + MLP(norm2(x)) + s (dropout(relu(x D^T + c)) U^T + e): the adapter reads x itself."""
    h = model.vit.embeddings(pixels)
    for block, part in zip(blocks(model), parts, strict=True):
        seen: list[Tensor] = []
        norm = block.get_submodule("layernorm_after")
        handle = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        h = first(block(h))
        handle.remove()
        (x,) = seen
        down = F.dropout(F.relu(x @ part["down"].T + part["down_bias"]), dropout)
        h = h + scale * (down @ part["up"].T + part["up_bias"])
    return model.classifier(model.vit.layernorm(h)[:, 0])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adaptformer_as_the_reference(dropout: float) -> None:
    """Outputs, and the gradient of every tensor; in training mode the same units are dropped, drawn layer by layer."""
    model, pixels = vit(), images()
    adapter = dt.attach(model, dt.adaptformer(r=R, dropout=dropout))
    assert adapter.params() == LAYERS * (2 * R * D + R + D)
    deltas = [d for d in adapter.deltas.values() if isinstance(d, dt.Parallel)]
    assert len(deltas) == LAYERS
    names = ("down", "down_bias", "up", "up_bias")
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, vit()(pixels).logits, rtol=0, atol=1e-12)
    for d in deltas:
        assert not any(getattr(d, n).any() for n in ("down_bias", "up", "up_bias"))
        assert 0.8 * D**-0.5 < d.down.abs().max() <= D**-0.5
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for d in deltas:
            for n in names:
                getattr(d, n).copy_(torch.randn(getattr(d, n).shape, generator=generator))
    other = vit()
    parts = [{n: getattr(d, n).detach().clone().requires_grad_() for n in names} for d in deltas]
    if dropout:
        model.train()
    torch.manual_seed(4)
    want = adapted_by_hand(other, parts, pixels, 0.1, dropout)
    torch.manual_seed(4)
    have = model(pixels).logits
    torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
    weight = torch.randn(want.shape, generator=generator).double()
    (want * weight).sum().backward()
    (have * weight).sum().backward()
    for d, part in zip(deltas, parts, strict=True):
        for n in names:
            grad = part[n].grad
            assert grad is not None and grad.any()
            torch.testing.assert_close(getattr(d, n).grad, grad, rtol=0, atol=1e-11)
    model.eval()
    with torch.no_grad():
        quiet = adapted_by_hand(other, parts, pixels, 0.1, 0.0)
        torch.testing.assert_close(model(pixels).logits, quiet, rtol=0, atol=1e-12)
        assert not dropout or (have - quiet).abs().max() > 1e-3


def test_adaptformers_defaults() -> None:
    """Both published configurations: width 64, s = 0.1, no norm of its own; the image model's dropout of 0.1."""
    ((_, leaf),) = dt.adaptformer().leaves()
    assert (leaf.config.r, leaf.config.scale, leaf.config.dropout) == (64, 0.1, 0.1)
