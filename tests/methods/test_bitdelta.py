"""BitDelta against its reference code's numbers; what it is made of, what its file holds, and scales that are distilled."""

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import deltatune as dt
from deltatune.core import bits, files
from deltatune.methods.bitdelta import logits_apart

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_bitdelta.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
Model, fill, T, MERGED = MAKE["Model"], MAKE["fill"], MAKE["T"], MAKE["MERGED"]
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8, 3], [9, 8, 7, 6, 5]])}
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **more)).eval()
    with torch.no_grad():  # transformers' N(0, 0.02) makes every output alike
        for p in model.parameters():
            p.mul_(6.0 if p.ndim > 1 else 1.0)
    return model


def bert() -> Any:
    torch.manual_seed(0)
    return t.BertForSequenceClassification(t.BertConfig(**SIZES | {"num_labels": 3})).eval()


def moved(model: Any, scale: float = 0.05, names: str = "") -> Any:
    """A fine-tuned copy, few of whose entries moved far."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if names in name:
                p.add_(scale * p.abs().mean() * torch.randn(p.shape, generator=generator) ** 3)
    return twin


def saved(model: Any, folder: Path, method: str = "lora", head: Any = "auto", **hyper: Any) -> str:
    """The folder of an adapter that was moved, and taken off again."""
    adapter = dt.attach(model, method, head=head, **hyper)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator) * (p.abs().mean() + 0.1))
    adapter.save(folder)
    adapter.detach()
    return str(folder)


def pair() -> tuple[Any, Any]:
    """The golden base, and its fine-tuning where that is compressed."""
    base, fine = Model(), Model(fine=True)
    for (name, p), own in zip(fine.named_parameters(), base.parameters(), strict=True):
        if name.rpartition(".")[0] not in GOLDEN["compressed"]:
            p.data = own.data
    return base, fine


def test_signs_scales_outputs_and_gradients_are_the_references() -> None:
    base, fine = pair()
    adapter = dt.attach(base, "bitdelta", tuned=fine, where=GOLDEN["compressed"], head=None)
    assert len(adapter.deltas) == len(GOLDEN["layers"]) == 4
    deltas: dict[Any, Any] = dict(adapter.deltas)
    for (_, site), delta in deltas.items():
        want = GOLDEN["layers"][site]
        weight = base.get_submodule(site).weight
        assert delta.alpha.item() == pytest.approx(want["alpha"], rel=1e-6)
        signs = bits.unpack(delta.signs, tuple(weight.shape))
        assert "".join(str(int(bit)) for bit in signs.flatten()) == want["signs"]
        out = base.get_submodule(site)(fill("x", (1, T, weight.shape[1])))
        torch.testing.assert_close(out, torch.tensor(want["out"]), rtol=1e-5, atol=1e-6)
        (fill("loss", (1, T, weight.shape[0])) * out).sum().backward()
        assert delta.alpha.grad.item() == pytest.approx(want["grad"], rel=1e-4)
    adapter.merge()
    torch.testing.assert_close(base.get_submodule(MERGED).weight, torch.tensor(GOLDEN["layers"][MERGED]["merged"]))


def test_it_stands_at_what_the_reference_compresses() -> None:
    model = llama()
    adapter = dt.attach(model, "bitdelta_full", tuned=moved(model), head=None)
    stands = {site for (path, site), _ in adapter.deltas.items() if path == "0"}
    blocks = [n for n, m in model.named_modules() if ("mlp" in n or "self_attn" in n) and isinstance(m, nn.Linear)]
    assert stands == {n for n in blocks if "proj" in n}
    assert adapter.params() == len(stands)


def test_a_fine_tuned_model_comes_back_nearly(tmp_path: Path) -> None:
    """Norms, embeddings and head to the bit, matrices by sign; a folder of `full` gives what the model itself gives."""
    model = llama()
    fine, plain = moved(model), llama()
    keep: Any = {"head": None}
    adapter = dt.attach(model, "bitdelta_full", tuned=fine, **keep)
    with torch.no_grad():
        want, far, out = (m(**BATCH).logits for m in (fine, plain, model))
    assert float((out - want).norm()) < 0.7 * float((far - want).norm())
    adapter.merge()
    for name, p in fine.named_parameters():
        if "proj" not in name:
            torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-6, atol=1e-7)
        else:
            change = (model.get_parameter(name) - plain.get_parameter(name)).abs()
            mean = (p - plain.get_parameter(name)).abs().mean()
            torch.testing.assert_close(change, mean.expand_as(change), rtol=1e-3, atol=1e-6)
    full = dt.attach(plain, "full")
    with torch.no_grad():
        for name, p in fine.named_parameters():
            plain.get_parameter(name).copy_(p)
    full.save(tmp_path)
    full.detach()
    dt.attach(plain, "bitdelta_full", sources=[tmp_path], **keep)
    assert torch.equal(plain(**BATCH).logits, llama_with(fine, keep)(**BATCH).logits)


def llama_with(fine: Any, keep: Any) -> Any:
    model = llama()
    dt.attach(model, "bitdelta_full", tuned=fine, **keep)
    return model


def test_the_file_holds_a_bit_a_weight_and_a_scale(tmp_path: Path) -> None:
    model = llama()
    source = saved(model, tmp_path / "lora", where="q,v,mlp.down", r=2)
    adapter = dt.attach(model, "bitdelta", sources=[source])
    roles = {d.site.role for d in adapter.deltas.values() if d.is_moved}
    assert roles == {"attn.q", "attn.v", "mlp.down"}, "where the LoRA stood"
    want = model(**BATCH).logits
    adapter.save(tmp_path / "bits")
    _, tensors = files.read_adapter(tmp_path / "bits")
    held = sum(v.numel() * v.element_size() for k, v in tensors.items() if k.startswith("0."))
    n = [16 * 16, 16 * 16, 16 * 24] * 2
    assert held == sum(n) // 8 + 4 * len(n)
    assert adapter.params() == len(n)
    adapter.detach()
    dt.load(model, tmp_path / "bits")
    assert torch.equal(model(**BATCH).logits, want)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit", "copy"])
def test_of_any_adapter_that_folds(method: str, tmp_path: Path) -> None:
    """Signs and scales of fold(W) - W, by merging the source; biases as they were, and the task head."""
    model = bert()
    hyper = {"where": "q,mlp.up"} if method in ("lora", "dora", "copy") else {}
    source = saved(model, tmp_path, method, **hyper)
    merged, plain = bert(), bert()
    dt.load(merged, source).merge()
    norms: Any = {"rest": "norm"} if method == "bitfit" else {}
    adapter = dt.attach(model, "bitdelta_full" if norms else "bitdelta", sources=[source], **norms)
    head = dict(model.classifier.deltas.named_parameters()) if hasattr(model.classifier, "deltas") else {}
    assert head
    deltas: dict[Any, Any] = dict(adapter.deltas)
    for (path, site), delta in deltas.items():
        if path == "head":
            torch.testing.assert_close(delta.weight, merged.get_submodule(site).weight)
            continue
        own, other = plain.get_submodule(site), merged.get_submodule(site)
        torch.testing.assert_close(delta.fold(own.weight, own.bias)[1], other.bias, rtol=1e-5, atol=1e-6)
        change = other.weight - own.weight
        if path == "1" or not delta.is_moved:
            assert not change.any()
            continue
        assert delta.alpha.item() == pytest.approx(change.abs().mean().item(), rel=1e-4, abs=1e-9)
        clear = change.abs() > 1e-6
        assert torch.equal((2 * bits.unpack(delta.signs, tuple(change.shape)).float() - 1)[clear], change.sign()[clear])


def test_slices_of_a_fused_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=40)).eval()
    source = saved(model, tmp_path, where="q,v", r=2)
    adapter = dt.attach(model, "bitdelta", sources=[source])
    deltas: list[Any] = [*adapter.deltas.values()]
    (whole,) = (d for d in deltas if d.is_moved)
    adapter.detach()
    adapter = dt.attach(model, "bitdelta", sources=[source], where="q,v")
    deltas = [*adapter.deltas.values()]
    q, v = (d.alpha.item() for d in deltas)
    assert whole.alpha.item() == pytest.approx((q + v) / 3, rel=1e-5), "k's rows did not change"
    adapter.detach()
    with pytest.raises(ValueError, match=r"changed more of transformer.h.0.attn.c_attn.weight than .*c_attn\[q\]"):
        dt.attach(model, "bitdelta_full", sources=[source], where="q", rest="norm")


def test_scales_are_distilled() -> None:
    """On the fine-tuned model's logits: the loss falls, and nothing but the scales moves."""
    model = llama()
    fine = moved(model, 0.3)
    adapter = dt.attach(model, "bitdelta_full", tuned=fine, head=None)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    batches = [
        {"input_ids": torch.randint(1, 40, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(40)
    ]
    optimizer = torch.optim.AdamW(adapter.groups(2e-3))
    start = logits_apart(model, fine, BATCH).item()
    for batch in batches:
        logits_apart(model, fine, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logits_apart(model, fine, BATCH).item() < 0.9 * start, "on rows that it was not distilled on"
    changed = {k for k, v in adapter.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.endswith(".alpha")}


def test_logits_apart_is_the_mean_squared_difference() -> None:
    one, two = llama(), moved(llama())
    want = (one(**BATCH).logits - two(**BATCH).logits).square().mean()
    torch.testing.assert_close(logits_apart(one, two, BATCH), want)
    assert not any(p.grad is not None for p in two.parameters())


def test_rows_of_one_batch_under_two_fine_tunings(tmp_path: Path) -> None:
    """One base in memory, and each row's own bits: what the method is for."""
    model, outs = llama(), []
    for name, scale in (("a", 0.1), ("b", 0.2)):
        adapter = dt.attach(model, "bitdelta", tuned=moved(model, scale, "proj"), head=None)
        adapter.save(tmp_path / name)
        outs.append(model(**BATCH).logits)
        adapter.detach()
    dt.attach(model, dt.Route(dt.saved(tmp_path / "a"), dt.saved(tmp_path / "b")), head=None)
    both = model(**BATCH, adapter_ids=torch.tensor([0, 1])).logits
    torch.testing.assert_close(both[0], outs[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1], outs[1][1], rtol=1e-4, atol=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    model = llama()
    lora = saved(model, tmp_path / "lora", r=2)
    prefix = saved(model, tmp_path / "prefix", "prefix_tuning", n=3)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"tuned": moved(model, names="norm")},
            "the tuned model changed model.layers.0.input_layernorm.weight, and no bit",
        ),
        ({"tuned": llama(tie_word_embeddings=True)}, "the tuned model changed lm_head.weight"),
        ({"tuned": bert()}, "the tuned model has no model.embed_tokens.weight"),
        ({"tuned": "out"}, "tuned must be a fine-tuned model, not 'out'"),
        ({"sources": [lora, lora]}, "made of one fine-tuning, not of 2"),
        ({"sources": [lora], "tuned": model}, "not both"),
        ({"sources": [prefix], "where": "q"}, "prefix_tuning in .* defines no fold"),
        ({}, "give it sources"),
    ]
    for hyper, words in cases:
        with pytest.raises(ValueError, match=words):
            dt.attach(model, "bitdelta", head=None, **hyper)
        assert "_deltatune" not in model.__dict__ or not dt.adapters(model)


def test_a_place_that_is_named_is_all_that_is_taken() -> None:
    model = llama()
    adapter = dt.attach(model, "bitdelta", tuned=moved(model), where="q", head=None)
    assert {d.site.role for d in adapter.deltas.values()} == {"attn.q"}
    assert adapter.params() == 2
    adapter.detach()
    adapter = dt.attach(model, "bitdelta", tuned=moved(model), layers=1, head=None)
    assert {d.site.layer for d in adapter.deltas.values()} == {1}
    assert adapter.params() == 7


def test_all_that_a_full_fine_tuning_changed_is_kept() -> None:
    """By default, with positions and a task head, or an output layer: norms, embeddings and heads to the bit."""
    for build in (bert, llama):
        model = build()
        fine = moved(model)
        dt.attach(model, "bitdelta_full", tuned=fine).merge()
        for name, p in fine.named_parameters():
            if re.search(r"orm|embed|lm_head|classifier|bias$", name):
                torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-6, atol=1e-7)


def test_a_tied_table_is_kept_whole_or_refused(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    source = saved(model, tmp_path, "full", head=None)
    with pytest.raises(
        ValueError, match=r"changed model.embed_tokens.weight, to which lm_head.weight is tied, and no bit"
    ):
        dt.attach(model, "bitdelta_full", sources=[source], rest="norm,embed", head=None)
    whole = dt.attach(model, "bitdelta_full", sources=[source], head=None)
    whole.detach()
    with pytest.raises(ValueError, match=r"changed lm_head.weight, and no bit stands there"):
        dt.attach(model, "bitdelta_full", tuned=moved(model), rest="norm,embed", head=None)


def test_a_base_without_values_is_refused(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "lora", r=2)
    with torch.device("meta"):
        model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="is on the meta device; there is nothing to tell a change from"):
        dt.attach(model, "bitdelta", sources=[source], head=None)
