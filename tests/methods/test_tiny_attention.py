"""Tiny attention against torch's own `MultiheadAttention` in the paper's place; on decoders; what it refuses."""

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import deltatune as dt

D, HEADS, LAYERS = 16, 2, 2
SIZES: dict[str, Any] = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": HEADS}


def bert() -> Any:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **dropout, max_position_embeddings=16, initializer_range=0.2)
    return BertModel(config, add_pooling_layer=False).double().eval()


def rows() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class Tiny(nn.Module):
    """LN, a linear layer to queries, keys and values, torch's attention between them, a linear layer back."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        m = width * n_heads
        self.norm, self.first, self.last = nn.LayerNorm(D), nn.Linear(D, 3 * m), nn.Linear(m, D)
        self.attention = nn.MultiheadAttention(m, n_heads, batch_first=True)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.first(self.norm(y)).chunk(3, -1)
        a, _ = self.attention(q, k, v, key_padding_mask=mask == 0, need_weights=False)
        out = self.last(a)
        assert isinstance(out, Tensor)
        return out

    def one_map(self) -> dict[str, Tensor]:
        """Its linear maps around the attention as one on each side, the attention's own included."""
        a, m = self.attention, self.last.in_features
        assert a.in_proj_weight is not None and a.in_proj_bias is not None
        inner, shift = a.in_proj_weight.view(3, m, m), a.in_proj_bias
        return {
            "gain": self.norm.weight,
            "offset": self.norm.bias,
            "qkv": (inner @ self.first.weight.view(3, m, D)).flatten(0, 1),
            "qkv_bias": (inner @ self.first.bias.view(3, m, 1)).flatten() + shift,
            "up": self.last.weight @ a.out_proj.weight,
            "up_bias": self.last.weight @ a.out_proj.bias + self.last.bias,
        }


@pytest.mark.parametrize(("width", "n_heads"), [(1, 1), (2, 3)])
def test_as_torchs_attention_computes(width: int, n_heads: int) -> None:
    """States of real tokens and all gradients: added to what the norm behind the attention gives, for MLP and residual."""
    model, other, mask = bert(), bert(), rows()["attention_mask"]
    adapter = dt.attach(model, "tiny_attention", width=width, n_heads=n_heads, head=None)
    m = width * n_heads
    assert adapter.params() == LAYERS * (2 * D + 3 * m * D + 3 * m + m * D + D)
    deltas = {d.site.layer: d for d in adapter.deltas.values()}
    assert {d.site.module for d in deltas.values()} == {
        f"encoder.layer.{i}.attention.output.LayerNorm" for i in range(LAYERS)
    }
    tiny = [Tiny(width, n_heads).double().eval() for _ in range(LAYERS)]
    maps = [{k: t.detach().clone().requires_grad_() for k, t in t.one_map().items()} for t in tiny]
    with torch.no_grad():
        for i, found in enumerate(maps):
            for key, value in found.items():
                getattr(deltas[i], key).copy_(value)
    for i, block in enumerate(other.encoder.layer):
        block.attention.register_forward_hook(lambda module, args, out, t=tiny[i]: (out[0] + t(out[0], mask), *out[1:]))
    real = mask == 1
    plain = bert()(**rows()).last_hidden_state[real]
    seen, want = (net(**rows()).last_hidden_state[real] for net in (model, other))
    torch.testing.assert_close(seen, want, rtol=0, atol=1e-10)
    assert (seen - plain).abs().max() > 0.05
    loss = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    (seen * loss).sum().backward()
    (want * loss).sum().backward()
    for i, t in enumerate(tiny):
        found = {k: getattr(deltas[i], k) for k in maps[i]}
        theirs = t.one_map()
        for p in t.parameters():  # the gradient of each of torch's tensors follows from ours by the chain rule
            assert p.grad is not None
            chained = torch.autograd.grad(
                [v for v in theirs.values() if v.requires_grad], p, [found[k].grad for k in theirs],
                retain_graph=True, allow_unused=True,
            )[0]  # fmt: skip
            assert chained is not None
            torch.testing.assert_close(chained, p.grad, rtol=0, atol=1e-9)


def test_start() -> None:
    """Queries, keys and values as `nn.Linear` starts, the way back at a hundredth of it."""
    torch.manual_seed(0)
    adapter = dt.attach(bert(), "tiny_attention", width=8, n_heads=4, head=None)
    bound = {"qkv": D**-0.5, "qkv_bias": D**-0.5, "up": 0.01 * 32**-0.5, "up_bias": 0.01 * 32**-0.5}
    for key, p in adapter.named_parameters():
        last = key.rpartition(".")[2]
        if last in bound:
            assert 0.6 * bound[last] < float(p.detach().abs().max()) <= bound[last]


def test_on_a_decoder_no_token_sees_a_later_one() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    adapter = dt.attach(model, "tiny_attention", head=None)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    other = ids.clone()
    other[0, 3:] = 9
    one, two = (model(i, attention_mask=torch.ones_like(i), use_cache=False).logits for i in (ids, other))
    torch.testing.assert_close(one[:, :3], two[:, :3])
    other[0, 0] = 11
    moved = model(other, attention_mask=torch.ones_like(other), use_cache=False).logits
    assert (moved[:, 2] - two[:, 2]).abs().max() > 1e-3
    with adapter.disabled():
        assert (model(ids, use_cache=False).logits - one).abs().max() > 1e-2


@pytest.mark.parametrize("n_beams", [1, 3])
def test_a_decoder_generates_with_a_cache_as_without(n_beams: int) -> None:
    """Its keys and values lie in the cache; two adapters keep theirs apart, and a dynamic cache without sizes serves too."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for name in ("one", "two"):
        adapter = dt.attach(model, "tiny_attention", name=name, head=None, width=3, n_heads=2)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p))
    ids = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 5, 5, 9]])
    options: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "num_beams": n_beams}
    said = model.generate(ids, use_cache=False, do_sample=False, **options)
    assert torch.equal(model.generate(ids, use_cache=True, do_sample=False, **options), said)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), do_sample=False, **options), said)
    with adapter.disabled():
        assert not torch.equal(model.generate(ids, do_sample=False, **options), said)
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(ids, cache_implementation="static", **options)


def test_heads_are_averaged_at_inference() -> None:
    """One head of the means in eval mode and in the file; equal heads are averaged into themselves."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    adapter = dt.attach(model, "tiny_attention", head=None, width=2, n_heads=4, average=True, dropout=0.0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    ids = torch.tensor([[3, 4, 5, 6, 7]])

    def one(train: bool) -> torch.Tensor:
        for delta in adapter.deltas.values():
            delta.train(train)
        with torch.no_grad():
            return model(ids).logits

    assert (one(True) - one(False)).abs().max() > 1e-3
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        want = one(False)
        adapter.detach()
        loaded = dt.load(model, folder)
        torch.testing.assert_close(model(ids).logits, want)
        assert {d.config.n_heads for d in loaded.deltas.values()} == {1}
        loaded.detach()
    adapter = dt.attach(model, "tiny_attention", head=None, width=2, n_heads=4, average=True, dropout=0.0)
    with torch.no_grad():
        for delta in adapter.deltas.values():
            for key, lead in (("qkv", (3, 4, 2)), ("qkv_bias", (3, 4, 2))):
                p = getattr(delta, key)
                p.copy_(torch.randn(3, 1, 2, *p.shape[1:]).expand(*lead, *p.shape[1:]).reshape(p.shape))
            delta.up.copy_(torch.randn(D, 1, 2).expand(D, 4, 2).reshape(D, 8))
    torch.testing.assert_close(one(True), one(False))


def test_images_have_no_mask() -> None:
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": D, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=HEADS))
    adapter = dt.attach(model, "tiny_attention")
    adapter.probe(pixel_values=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert {d.site.role for d in adapter.deltas.values()} == {"attn", "head"}


def test_an_attention_that_does_not_say_whether_it_is_causal() -> None:
    model = BloomModel(BloomConfig(vocab_size=30, hidden_size=D, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="does not say whether a token sees later ones"):
        dt.attach(model, "tiny_attention")
