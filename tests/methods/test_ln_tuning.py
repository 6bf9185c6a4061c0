"""LN tuning beside HF PEFT's on the same weights: outputs, gradients and a few optimiser steps."""

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import deltatune as dt

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = {"bert": torch.tensor([0, 1, 0]), "llama": IDS}
TARGETS = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}


def base(arch: str) -> Any:
    """In fp64, every norm away from 1 and 0, without dropout."""
    torch.manual_seed(0)
    model: nn.Module
    if arch == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(**SIZES, **quiet))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().train()


def pairs(arch: str) -> tuple[Any, Any, list[tuple[nn.Parameter, nn.Parameter, Tensor]]]:
    """Ours, theirs, and of each trained tensor ours, theirs and the base's."""
    model, other = base(arch), base(arch)
    adapter = dt.attach(model, "ln_tuning", head=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know norms
        theirs = peft.get_peft_model(other, peft.LNTuningConfig(target_modules=TARGETS[arch]))
    named = dict(theirs.named_parameters())
    plain = dict(base(arch).named_parameters())
    found = []
    for (_, site), delta in adapter.deltas.items():
        for slot, key in {"g": "weight", "d": "bias"}.items():
            if slot in delta._parameters:
                own = named[f"base_model.model.{site}.ln_tuning_layers.default.{key}"]
                found.append((delta._parameters[slot], own, plain[f"{site}.{key}"].detach()))
    assert len(found) == sum(p.requires_grad for p in theirs.parameters())
    return model, theirs, found


@pytest.mark.parametrize("arch", TARGETS)
def test_beside_hf_peft(arch: str) -> None:
    """Four steps of AdamW: ours trains what moves, theirs whole copies of the norms."""
    model, theirs, found = pairs(arch)
    assert any(not d.site.bias for d in dt.adapters(model)["default"].deltas.values()) is (arch == "llama")
    batch = {"input_ids": IDS, "labels": LABELS[arch]}
    optimizers = [torch.optim.AdamW([pair[i] for pair in found], lr=0.01, weight_decay=0.0) for i in range(2)]
    for _ in range(4):
        a, b = model(**batch), theirs(**batch)
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-10)
        a.loss.backward()
        b.loss.backward()
        for own, their, _ in found:
            torch.testing.assert_close(own.grad, their.grad, rtol=0, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for own, their, plain in found:
        assert own.detach().abs().max() > 0.01
        torch.testing.assert_close(plain + own.detach(), their.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("arch", "n"), [("bert", 5 * 32), ("llama", 5 * 16)])
def test_count_and_merge(arch: str, n: int) -> None:
    """Gains, and biases where the norm has them; merged it is the base with other norms."""
    model = base(arch).eval()
    adapter = dt.attach(model, "ln_tuning", head=None)
    assert adapter.params() == n
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
        want = model(input_ids=IDS).logits
        adapter.merge()
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=0, atol=1e-12)


def test_beside_bitfit() -> None:
    """Both train a norm's bias by one rule: b' = b + d."""
    models = [base("bert").eval() for _ in range(2)]
    deltas = [
        dt.attach(m, how, where="norm", head=None).deltas
        for m, how in zip(models, ("ln_tuning", "bitfit"), strict=True)
    ]
    with torch.no_grad():
        for key, delta in deltas[0].items():
            delta.d.copy_(torch.randn_like(delta.d))
            deltas[1][key].d.copy_(delta.d)
        a, b = (m(input_ids=IDS).logits for m in models)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
