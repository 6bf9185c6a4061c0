"""Cross-attention alone, in place: against the rule of the paper's code, and its clear refusal elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import deltatune as dt

WORDS = {"bart": "encoder_attn", "t5": "EncDecAttention"}  # fairseq's name, whose model BART's is; T5's


def base(arch: str) -> Any:
    torch.manual_seed(0)
    model: nn.Module
    if arch == "bart":
        model = BartForConditionalGeneration(BartConfig(
            vocab_size=30, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=1,
        ))  # fmt: skip
    else:
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=30, d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=24, decoder_start_token_id=0,
        ))  # fmt: skip
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.flip(1)[:, :4].contiguous()}


def by_the_papers_rule(model: nn.Module, word: str, norms: bool, words: bool) -> set[str]:
    """`word` in a parameter's name; its code takes in what lies in the norm of that name, and the embeddings where asked."""
    names = {n for n, _ in model.named_parameters() if word in n and (norms or "layer_norm" not in n)}
    return names | (
        {n for n, _ in model.named_parameters() if n.endswith("shared.weight") or "embed" in n} if words else set()
    )


@pytest.mark.parametrize("arch", WORDS)
def test_what_trains(arch: str) -> None:
    model = base(arch)
    adapter = dt.attach(model, "xattn")
    assert set(adapter.owned()) == by_the_papers_rule(model, WORDS[arch], norms=False, words=False)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter.owned())
    assert adapter.params() == 2 * 4 * (16 * 16 + (16 if arch == "bart" else 0))


def test_with_its_norms_and_new_words() -> None:
    """The whole of the paper's rule on the architecture that its code has: norms beside cross-attention, embeddings."""
    model = base("bart")
    adapter = dt.attach(model, "xattn", where=["cross", "encoder_attn_layer_norm"], head=None)
    assert set(adapter.owned()) == by_the_papers_rule(model, "encoder_attn", norms=True, words=False)
    adapter.detach()
    adapter = dt.attach(model, "xattn", where=["cross", "encoder_attn_layer_norm", "embed"], head=None)
    wanted = by_the_papers_rule(model, "encoder_attn", norms=True, words=True)
    tables = {
        id(p) for n, p in model.named_parameters() if n in wanted and "positions" not in n and "layernorm" not in n
    }
    assert {id(p) for p in adapter.owned().values()} == tables


@pytest.mark.parametrize("arch", WORDS)
def test_a_step_beside_the_frozen_rest(arch: str, tmp_path: Path) -> None:
    """The base frozen by hand but for cross-attention takes the same step; the file holds what moved; detach takes it back."""
    model, other = base(arch), base(arch)
    for n, p in other.named_parameters():
        p.requires_grad_(n in by_the_papers_rule(other, WORDS[arch], norms=False, words=False))
    adapter = dt.attach(model, "xattn")
    for m, parameters in ((model, adapter.groups(1e-2)), (other, [p for p in other.parameters() if p.requires_grad])):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        m(**batch()).loss.backward()
        optimizer.step()
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), n
    adapter.save(tmp_path)
    want = model(**batch()).logits
    again = base(arch)
    dt.load(again, tmp_path)
    assert torch.equal(again(**batch()).logits, want)
    adapter.detach()
    assert torch.equal(model(**batch()).logits, base(arch)(**batch()).logits)


def test_no_cross_attention() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=20, **sizes))
    with pytest.raises(ValueError, match="this backbone has no 'cross'; it has"):
        dt.attach(model, "xattn")
    assert not dt.adapters(model) and all(p.requires_grad for p in model.parameters())
