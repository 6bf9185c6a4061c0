"""Soft tokens that are pooled, and prefixes that move the tokens behind them: the options that HF PEFT's files need."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from hf_models import IDS, PADDED, batch, config, logits, make, stir, theirs, written
from torch import Tensor

import deltatune as dt

N = 3


def put(arch: str, tree: Any) -> tuple[Any, dt.Adapter]:
    model = make(arch)
    adapter = dt.attach(model, tree, head=None)
    stir(model)
    return model, adapter


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_pooler_in_the_backbone_reads_the_first_real_state(as_dict: bool) -> None:
    """BERT pools inside its backbone; `pooled=True` gives it a soft token's state instead."""
    for pooled in (False, True):
        model, _ = put("bert-model", dt.PromptTuning(n=N, pooled=pooled))
        out = model(input_ids=IDS, return_dict=as_dict)
        assert out[0].shape[1] == IDS.shape[1] + N * pooled
        assert far(out[1], model.pooler(out[0])) < 1e-6
    sizes = {"vocab_size": 40, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    model = tr.AlbertModel(tr.AlbertConfig(**sizes, num_attention_heads=4)).eval()
    dt.attach(model, dt.PromptTuning(n=N))
    out = model(input_ids=IDS, return_dict=as_dict)
    assert far(out[1], model.pooler_activation(model.pooler(out[0][:, 0]))) < 1e-6


def test_pooled_and_not_cannot_run_together() -> None:
    model, _ = put("bert", dt.PromptTuning(n=N))
    dt.attach(model, dt.PromptTuning(n=N, pooled=True), name="two", head=None)
    with pytest.raises(ValueError, match="cannot run together"):
        model(input_ids=IDS)


@pytest.mark.parametrize("arch", ["bert", "roberta", "llama", "gpt2", "opt", "t5"])
def test_shift_moves_the_positions(arch: str) -> None:
    """Another function than without; positions given by hand are moved too; disabled and detached it leaves no trace."""
    where = r"decoder.*SelfAttention" if arch == "t5" else "attn"
    model, adapter = put(arch, dt.PrefixTuning(n=N, shift=True, where=where))
    plain, other = put(arch, dt.PrefixTuning(n=N, where=where))
    with torch.no_grad():
        for p, q in zip(other.parameters(), adapter.parameters(), strict=True):
            p.copy_(q)
    got = logits(model, arch)
    assert far(got, logits(plain, arch)) > 1e-2
    if arch in ("llama", "gpt2", "bert"):
        at = torch.arange(7)[None].expand(2, -1)
        given = batch(arch)
        with torch.no_grad():
            want = plain(**given, position_ids=at + N).logits
            assert far(model(**given, position_ids=at).logits, want) < 1e-6
            assert far(model(**given).logits, want) < 1e-6
    with adapter.disabled():
        assert torch.equal(logits(model, arch), logits(make(arch), arch))
    bare = make(arch)
    attributes = {n: set(vars(m)) for n, m in bare.named_modules()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, arch), got)
        dt.adapters(twin)["default"].detach()
        assert torch.equal(logits(twin, arch), logits(bare, arch))
        assert {n: set(vars(m)) for n, m in twin.named_modules()} == attributes
        assert {n: type(m) for n, m in twin.named_modules()} == {n: type(m) for n, m in bare.named_modules()}


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # HF PEFT's, of its own prompts
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_generation_agrees(arch: str, kind: str, tmp_path: Path) -> None:
    """Greedy tokens with the cache, and their scores, are those of HF PEFT's own `generate`."""
    hf: Any = theirs(arch, config(kind, arch, num_virtual_tokens=N))
    model: Any = make(arch)
    dt.load(model, written(hf, tmp_path))
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    how = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 0,
    }
    ours, want = model.generate(**given, **how), hf.generate(**given, **how)
    assert torch.equal(ours.sequences[:, -5:], want.sequences[:, -5:])
    for a, b in zip(ours.scores, want.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_shift_under_checkpointing() -> None:
    """T5's later layers take the first one's table: also where they are run again in the backward pass."""
    model, adapter = put("t5", dt.PrefixTuning(n=N, shift=True, where=r"decoder.*SelfAttention"))
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch("t5"), labels=IDS[:, :5].contiguous()).loss.backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert far(a, b) < 1e-6


def test_shift_refuses_what_it_cannot_move() -> None:
    model = make("bart")
    with pytest.raises(ValueError, match="BartDecoder takes none; use shift=False"):
        dt.attach(model, dt.PrefixTuning(n=N, shift=True, where=r".*decoder.*self_attn"))
    assert not dt.adapters(model) and not any(hasattr(type(m), "_deltatune_class") for m in model.modules())
    dt.attach(model, dt.PrefixTuning(n=N, where=r".*decoder.*self_attn"))
    model, _ = put("gpt2", dt.PrefixTuning(n=N, shift=True))
    long = torch.ones(1, 62, dtype=torch.long)
    with pytest.raises(ValueError, match="3 learned positions and 62 tokens exceed the 64 positions"):
        model(input_ids=long)
    model(input_ids=long[:, :61])
    model, _ = put("t5", dt.PrefixTuning(n=N, shift=True, where=r"decoder.*SelfAttention"))
    with pytest.raises(ValueError, match="does not run with a static cache"):
        model.generate(
            input_ids=IDS, attention_mask=PADDED, max_new_tokens=2, cache_implementation="static", disable_compile=True
        )


def test_rows_of_a_tied_table() -> None:
    """Rows of input and output are one tensor; the others are the base's own; merging into a tied table is refused."""
    model, adapter = put("gpt2", dt.TokenRows(ids=(5, 9), where=["transformer.wte", "lm_head"]))
    assert [tuple(p.shape) for p in adapter.parameters()] == [(2, 32)]
    ids = torch.tensor([[5, 1, 9, 2]])
    hidden = model.transformer(ids).last_hidden_state
    bare = make("gpt2")
    with torch.no_grad():
        bare.transformer.wte.weight[[5, 9]] = adapter.parameters()[0]  # type: ignore[index, operator, union-attr]
        assert far(bare(ids).logits, model(ids).logits) < 1e-5
    kept = [i for i in range(40) if i not in (5, 9)]
    assert far(model(ids).logits[..., kept], hidden @ make("gpt2").lm_head.weight[kept].T) < 1e-5  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="its weight is tied"):
        adapter.merge()


@pytest.mark.parametrize("ids", [(), (3, 3)])
def test_rows_are_named_once(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="each once"):
        dt.TokenRows(ids=ids)


def test_rows_of_a_table_that_scales() -> None:
    """Gemma's embedding multiplies what it looks up: trained rows too, as in HF PEFT."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8)).eval()
    table = model.get_input_embeddings()
    adapter = dt.attach(model, dt.TokenRows(ids=(5, 9)))
    with torch.no_grad():
        adapter.parameters()[0].mul_(2)
        want = table.weight.new_zeros(1, 2, 32)
        want[0, 0], want[0, 1] = adapter.parameters()[0][1], table.weight[4]
        assert far(table(torch.tensor([[9, 4]])), want * 32**0.5) < 1e-5
