"""IDPG: the equation written a second time, with torch.kron and a frozen pass by hand; padding, labels and generation."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from soft import D, check_generate, check_padding, logits, model_of, moved, near, padded, rows
from torch import Tensor
from transformers import ViTConfig, ViTModel

import deltatune as dt

SIZES: dict[str, Any] = {"n": 3, "r": 8, "k": 4}


def idpg(model: Any, **hyper: Any) -> dt.Adapter:
    """Its outputs well apart for other inputs, as after training."""
    adapter = moved(dt.attach(model, "idpg", head=None, **SIZES | hyper))
    delta: Any = next(iter(adapter.deltas.values()))
    with torch.no_grad():
        for p in (delta.part_in, delta.part_out):
            p.mul_(3.0)
    return adapter


def by_hand(delta: Any, s: Tensor) -> Tensor:
    """(B, n, D), with every Kronecker product written out."""
    down = sum(torch.kron(a, w) for a, w in zip(delta.rule_in, delta.part_in, strict=True))
    up = sum(torch.kron(a, w) for a, w in zip(delta.rule_out, delta.part_out, strict=True))
    assert isinstance(down, Tensor) and isinstance(up, Tensor) and down.shape == (D, SIZES["r"])
    return (F.gelu(s @ down + delta.inner) @ up + delta.outer).view(len(s), SIZES["n"], D)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("bert", "words"), ("bert", "first"), ("bert", "mean"), ("llama", "words"), ("llama", "mean"), ("t5", "mean")],
)
def test_the_equation(kind: str, sentence: str) -> None:
    """Outputs, and the gradients of every tensor, of rows padded on both sides; other adapters are no part of s."""
    model = model_of(kind)
    given = padded(kind)
    extra: dict[str, Tensor] = {}
    if kind == "bert":
        extra = {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    mask = given["attention_mask"].bool()
    table, own = model.get_input_embeddings(), ("encoder" if kind == "t5" else model.base_model_prefix)
    backbone = model.get_submodule(own)
    x = table(given["input_ids"])
    if sentence != "words":
        x = backbone(**given, **extra).last_hidden_state
    if sentence == "first":
        s = torch.stack([row[m][0] for row, m in zip(x, mask, strict=True)])
    else:
        s = torch.stack([row[m].mean(0) for row, m in zip(x, mask, strict=True)])
    dt.attach(model, "lora", head=None, name="other")
    for p in dt.adapters(model)["other"].parameters():
        p.requires_grad_(False).add_(0.3)
    adapter = idpg(model, sentence=sentence)
    delta: Any = next(iter(adapter.deltas.values()))
    seen: list[Tensor] = []
    block = model.get_submodule(next(site.name for site in dt.sites(model, "block")))
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = given | extra | ({"decoder_input_ids": rows()[:, :4]} if kind == "t5" else {})
    model(**batch)
    handle.remove()
    assert len(seen) == (2 if sentence != "words" else 1), "the frozen pass, and the real one"
    prompts = by_hand(delta, s.detach())
    if kind == "bert":  # its positions and norm come behind the embedding
        prompts = model.bert.embeddings(inputs_embeds=prompts)
    near(seen[-1][:, : SIZES["n"]], prompts, 1e-5)
    assert (prompts[0] - prompts[1]).abs().max() > 1e-2
    weight = torch.randn(prompts.shape, generator=torch.Generator().manual_seed(5))
    own_grads = torch.autograd.grad((seen[-1][:, : SIZES["n"]] * weight).sum(), adapter.parameters(), retain_graph=True)
    for got, want in zip(own_grads, torch.autograd.grad((prompts * weight).sum(), adapter.parameters()), strict=True):
        near(got, want, 1e-5)


def test_the_start_and_the_count() -> None:
    """The reference's start: N(0, 0.05^2), and U(-0.5, 0.5) for the last bias; the count."""
    adapter = dt.attach(model_of("llama"), "idpg", head=None, n=200)
    found = {name.rpartition(".")[2]: p.detach() for name, p in adapter.named_parameters()}
    for key in ("rule_in", "part_out"):
        assert float(found[key].std()) == pytest.approx(0.05, rel=0.05)
    assert 0.49 < float(found["outer"].abs().max()) <= 0.5 and abs(float(found["outer"].mean())) < 0.02
    assert adapter.params() == 2 * 16**3 + D * 16 // 16 + 16 + 16 * 200 * D // 16 + 200 * D


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("sentence", ["words", "mean"])
def test_padding(kind: str, sentence: str) -> None:
    check_padding(kind, lambda model: idpg(model, sentence=sentence))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("sentence", ["words", "mean"])
def test_generation(kind: str, sentence: str) -> None:
    check_generate(kind, lambda model: idpg(model, sentence=sentence))


@pytest.mark.parametrize("sentence", ["words", "mean"])
def test_labels_do_not_leak(sentence: str) -> None:
    """What the answer says moves no prompt, so that the prompt's own logits stay as they are."""
    model = model_of("llama")
    idpg(model, sentence=sentence)
    ids, labels = rows(), rows().clone()
    labels[:, :4] = -100
    other = torch.cat([ids[:, :4], ids[:, 4:].flip(0)], 1)
    one = logits(model, input_ids=ids, labels=labels)
    near(logits(model, input_ids=other, labels=labels)[:, :4], one[:, :4])
    near(logits(model, input_ids=ids[:, :4]), one[:, :4])
    assert (logits(model, input_ids=ids)[:, :4] - one[:, :4]).abs().max() > 1e-3


def test_the_frozen_pass_leaves_nothing_behind() -> None:
    """Copies keep to their own backbone; adapters are on again; checkpointing gives the same gradients."""
    model = model_of("bert")
    adapter = idpg(model, sentence="first")
    want = logits(model, input_ids=rows())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        delta: Any = next(iter(next(iter(dt.adapters(other).values())).deltas.values()))
        assert delta.backbone is other.bert
        near(logits(other, input_ids=rows()), want)
    assert adapter.enabled and next(iter(adapter.deltas.values())).switch.on
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        out = model(input_ids=rows()).logits.square().mean()
        grads.append(torch.autograd.grad(out, adapter.parameters()))
    for a, b in zip(*grads, strict=True):
        near(a, b)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="model: idpg: sentence = 'first' reads a state that on a causal stack"):
        dt.attach(model_of("llama"), "idpg", sentence="first", head=None, **SIZES)
    with pytest.raises(ValueError, match="idpg"):
        dt.attach(model_of("llama"), "idpg", head=None, n=3, r=8, k=5)
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(
        ValueError, match="it reads embedded words, and this backbone's input is made by ViTPatchEmbeddings"
    ):
        dt.attach(model, "idpg", head=None)
