"""Tiny attention against torch's own `MultiheadAttention` in the paper's place; on decoders; what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
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
    said = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, max_new_tokens=3, do_sample=False)
    step = ids
    for _ in range(3):
        step = torch.cat([step, model(step, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, step)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)


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
