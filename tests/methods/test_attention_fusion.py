"""Attention fusion: its equation a second time on real backbones, what it learns on states that differ, and what it keeps.

The paper has no code; a third party's module, which cites its equations 1 and 2, scores the embedded input beside all
blocks' outputs with one vector, as here (and adds a norm, dropout and an activation that the paper's count leaves no room for).
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import deltatune as dt
from deltatune.core.adapter import Adapter

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
ROWS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, initializer_range=0.3)).double().eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).double().eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()


def blocks(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(site.module) for site in dt.sites(model, "block") if site.stack != "encoder"]


def fused(model: nn.Module) -> tuple[Adapter, Tensor]:
    """Attached, with a query that is not 0."""
    adapter = dt.attach(model, "attention_fusion", head=None)
    (query,) = adapter.parameters()
    with torch.no_grad():
        query.copy_(torch.randn(query.shape, generator=torch.Generator().manual_seed(1)))
    return adapter, query


def states_of(model: nn.Module, rows: dict[str, Tensor]) -> list[Tensor]:
    """What each block of the bare model reads and gives: the embedded input, then each output."""
    found: list[Tensor] = []

    def read(module: nn.Module, args: Any) -> None:
        found.append(args[0].detach())

    def look(module: nn.Module, args: Any, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out).detach())

    hooks = [blocks(model)[0].register_forward_pre_hook(read), *(b.register_forward_hook(look) for b in blocks(model))]
    model(**rows)
    for hook in hooks:
        hook.remove()
    return found


def with_last(model: nn.Module, instead: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """The bare model's logits where its last block gives `instead`."""
    hook = blocks(model)[-1].register_forward_hook(
        lambda module, args, out: (instead, *out[1:]) if isinstance(out, tuple) else instead
    )
    logits: Tensor = model(**rows).logits
    hook.remove()
    return logits


@pytest.mark.parametrize("build", [bert, llama, t5])
def test_the_equation_a_second_time(build: Any) -> None:
    model = build()
    rows = dict(ROWS) | ({"decoder_input_ids": torch.tensor([[0, 6, 7], [0, 8, 9]])} if build is t5 else {})
    states = states_of(model, rows)
    assert len(states) == 4
    _, query = fused(bare := copy.deepcopy(model))
    want = torch.empty_like(states[0])
    for i in range(want.shape[0]):
        for t in range(want.shape[1]):
            scores = [float(sum(a * b for a, b in zip(query.tolist(), h[i, t].tolist(), strict=True))) for h in states]
            weights = torch.tensor(scores, dtype=torch.float64).exp()
            want[i, t] = sum(
                (w / weights.sum() * h[i, t] for w, h in zip(weights, states, strict=True)), want.new_zeros(32)
            )
    got, plain = bare(**rows).logits, model(**rows).logits
    torch.testing.assert_close(got, with_last(model, want, rows), rtol=0, atol=1e-9)
    assert (got - plain).abs().max() > 1e-2


def test_starts_at_the_mean_and_is_one_vector() -> None:
    model = bert()
    mean = torch.stack(states_of(model, ROWS)).mean(0)
    want = with_last(model, mean, ROWS)
    adapter = dt.attach(model, "attention_fusion", head=None)
    assert adapter.params() == 32
    torch.testing.assert_close(model(**ROWS).logits, want, rtol=0, atol=1e-12)


def test_learns_and_is_copied_on_states_that_differ() -> None:
    """What the contract's random Llama, whose states of a token are nearly one, cannot show."""
    model = bert()
    adapter, query = fused(model)
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(adapter.groups(0.1))
    losses = []
    for _ in range(20):
        loss = model(**ROWS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    twin, want = copy.deepcopy(model), model(**ROWS).logits
    assert torch.equal(twin(**ROWS).logits, want)
    with torch.no_grad():
        Adapter(twin, adapter.name).parameters()[0].neg_()
    assert (twin(**ROWS).logits - want).abs().max() > 1e-3
    assert torch.equal(model(**ROWS).logits, want)
    assert query.grad is None


def test_no_gradient_enters_the_backbone() -> None:
    """All blocks' outputs but the last are without one; a block that gradient checkpointing runs again is refused."""
    model = bert()
    fused(model)
    flags: list[bool] = []
    for block in blocks(model):
        block.register_forward_hook(
            lambda m, a, out: flags.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    model(**ROWS)
    assert flags == [False, False, True]
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        ValueError, match=r"attention_fusion keeps no activations of the backbone.*turn checkpointing off"
    ):
        model(**ROWS, labels=torch.tensor([0, 1])).loss.backward()


@pytest.mark.parametrize("build", [llama, t5])
def test_generates_with_and_without_a_cache(build: Any) -> None:
    model = build()
    fused(model)
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    short = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    short |= {"output_logits": True, "return_dict_in_generate": True}
    for n_beams in (1, 3):
        one, other = (
            model.generate(ids, attention_mask=(ids != 0).long(), **short, num_beams=n_beams, use_cache=use)
            for use in (True, False)
        )
        assert torch.equal(one.sequences, other.sequences)
        if n_beams == 1:
            torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", [(3, 0), (0, 3)])
def test_padding_changes_nothing(pad: tuple[int, int]) -> None:
    model = llama()
    fused(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    at = nn.functional.pad(torch.arange(4)[None], pad)
    padded = nn.functional.pad(ids, pad)
    got = model(padded, attention_mask=(padded != 0).long(), position_ids=at).logits[padded != 0]
    torch.testing.assert_close(got, model(ids).logits[0], rtol=0, atol=1e-9)
