"""Hadamard adapters against a BERT written by hand after the paper's equation; two stages; the norm behind attention."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
)

import deltatune as dt
from deltatune.core.schedule import Schedules

D, HEADS, LAYERS = 16, 2, 2
SIZES: dict[str, Any] = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": HEADS}


def bert() -> Any:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **dropout, max_position_embeddings=16, num_labels=3, initializer_range=0.2)
    return BertForSequenceClassification(config).double().eval()


def rows() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 2])}


def by_hand(model: Any, moved: list[tuple[Tensor, ...]]) -> Tensor:
    """Logits; `moved` is (w, b, weight of the norm, its bias) of each block."""
    batch = rows()
    h = model.bert.embeddings(batch["input_ids"])
    hidden = (batch["attention_mask"] == 0)[:, None, None]
    for block, (w, b, gain, offset) in zip(model.bert.encoder.layer, moved, strict=True):
        own = block.attention.self
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (own.query, own.key, own.value))
        scores = (q @ k.mT / math.sqrt(D // HEADS)).masked_fill(hidden, float("-inf"))
        a = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        a = w * a + b
        z = F.layer_norm(block.attention.output.dense(a) + h, (D,), gain, offset, 1e-12)
        h = block.output.LayerNorm(block.output.dense(F.gelu(block.intermediate.dense(z))) + z)
    pooled = torch.tanh(model.bert.pooler.dense(h[:, 0]))
    logits = F.linear(pooled, model.classifier.weight, model.classifier.bias)
    assert isinstance(logits, Tensor)
    return logits


def test_as_the_paper_writes_it() -> None:
    """Logits, the gradients of w, b and the norm, and the merged model."""
    model, other = bert(), bert()
    adapter = dt.attach(model, "hadamard")
    found: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for _, delta in sorted(adapter.deltas.items()):  # by the leaf's path: the product, then the norm
        if delta.site.layer is not None:
            found[delta.site.layer] += delta.parameters()
    assert adapter.params() == LAYERS * 4 * D and adapter.n_head == 3 * D + 3
    starts = [(torch.ones(D), torch.zeros(D)) for _ in range(LAYERS)]
    for (w, b, *_), (one, zero) in zip(found, starts, strict=True):
        assert torch.equal(w.double(), one.double()) and torch.equal(b.double(), zero.double())
    with torch.no_grad():
        plain = model(**rows()).logits
        torch.testing.assert_close(plain, other(**rows()).logits, rtol=0, atol=1e-12)
        for tensors in found:
            for p in tensors:
                p.add_(0.3 * torch.randn_like(p))
    moved = [tuple(p.detach().clone().requires_grad_() for p in tensors) for tensors in found]
    want, seen = by_hand(other, moved), model(**rows()).logits
    torch.testing.assert_close(seen, want, rtol=0, atol=1e-10)
    assert (seen - plain).abs().max() > 0.05
    seen.square().sum().backward()
    want.square().sum().backward()
    for tensors, hand in zip(found, moved, strict=True):
        for p, q in zip(tensors, hand, strict=True):
            assert p.grad is not None and q.grad is not None and q.grad.any()
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10)
    adapter.merge()
    torch.testing.assert_close(model(**rows()).logits, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("head", ["auto", None])
def test_two_stages(head: str | None) -> None:
    """The head alone for half of the steps, then everything but the head; without a head everything from the start."""
    model = bert()
    adapter = dt.attach(model, "hadamard", head=head)
    heads = {id(p) for p in adapter.head_parameters()}
    assert bool(heads) == (head is not None)
    schedules = Schedules([adapter])
    optimizer = torch.optim.AdamW(schedules.groups(1e-2, weight_decay=0.1))
    schedules.begin(optimizer, 5)
    for step in range(5):
        before = copy.deepcopy(dict(adapter.named_parameters()))
        model(**rows()).loss.backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
        for name, p in adapter.named_parameters():
            rests = bool(heads) and (id(p) in heads) != (step < 2)
            assert torch.equal(p, before[name]) == rests, (step, name)
    schedules.end()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_no_step(share: float) -> None:
    with pytest.raises(ValueError, match=f"head_first = {share}"):
        dt.attach(bert(), "hadamard", head_first=share)


NORMS: dict[str, tuple[Any, str]] = {
    "bert": (bert, "attention.output.LayerNorm"),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=30, dim=D, hidden_dim=24, n_layers=LAYERS, n_heads=HEADS)),
        "sa_layer_norm",
    ),
    "llama": (lambda: LlamaModel(LlamaConfig(**SIZES)), "post_attention_layernorm"),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_behind_the_attention(name: str) -> None:
    make, norm = NORMS[name]
    adapter = dt.attach(make(), "hadamard", head=None)
    trained = [d.site.module for d in adapter.deltas.values() if d.site.kind == "norm"]
    assert len(trained) == LAYERS and all(at.endswith(f".{norm}") for at in trained)


def test_no_norm_by_name() -> None:
    """BART's and OPT's names do not say on which side of the residual add a norm stands."""
    config = BartConfig(vocab_size=30, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)  # fmt: skip
    model: nn.Module = BartModel(config)
    with pytest.raises(ValueError, match="no 'mlp_norm'"):
        dt.attach(model, "hadamard")
