"""DePT against its reference repository on T5 and GPT-2: logits and gradients; its defaults, rates, padding and generation."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from soft import check_generate, check_padding, model_of, moved, padded, rows
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_dept.py"))
backbone, fill, real, start = (MAKE[k] for k in ("backbone", "fill", "real", "start"))
D, N, R, LENGTH = (MAKE[k] for k in ("D", "N", "R", "LENGTH"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def attached(model: nn.Module, **hyper: Any) -> dt.Adapter:
    """At the golden's values."""
    adapter = dt.attach(model, "dept", head=None, **{"n": N, "r": R, "length": LENGTH} | hyper)
    with torch.no_grad():
        for key, p in tensors(adapter).items():
            p.copy_(start()[key])
    return adapter


def tensors(adapter: dt.Adapter) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: p for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_as_the_reference_computes(kind: str) -> None:
    golden, model = GOLDEN[kind], backbone(kind)
    near = 1e-6 if kind == "t5" else 1e-8  # T5's norms and softmax are fp32
    own = tensors(attached(model))
    logits = real(kind, model(**MAKE["rows"](kind)).logits)
    torch.testing.assert_close(logits, exact(golden["logits"]), rtol=0, atol=near)
    assert (logits - exact(golden["bare"])).abs().max() > 0.05
    loss = (fill("loss", logits.shape).double() * logits).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=10 * near)
    loss.backward()
    assert own.keys() == golden["grads"].keys()
    for key, want in golden["grads"].items():
        torch.testing.assert_close(own[key].grad, exact(want), rtol=0, atol=10 * near)


def test_the_reference_s_numbers_and_start() -> None:
    """T5-base's sizes, what is zero at the start, and the two learning rates of a checkpoint that it publishes."""
    model, theirs = backbone("t5"), GOLDEN["defaults"]
    adapter = dt.attach(model, "dept", head=None)
    delta: Any = next(iter(adapter.deltas.values()))
    found = (delta.n, delta.r, delta.length, delta.alpha)
    assert found == tuple(theirs[k] for k in ("num_virtual_tokens", "r", "max_length", "lora_alpha"))
    assert (60 * 768 + 30 * (256 + 768)) == 100 * 768, "at T5-base's width as many as a prompt of 100"
    assert adapter.params() == 60 * D + 30 * (256 + D)
    assert GOLDEN["start"]["zero"] and not delta.b.any()
    assert GOLDEN["start"]["spread"] == pytest.approx(1, abs=0.02)
    assert float(delta.a.detach().abs().max()) * 30**0.5 == pytest.approx(1, abs=0.02)
    table = model.get_input_embeddings().weight
    assert (delta.prompt[:, None] == table).all(-1).any(-1).all(), "rows of the vocabulary"
    rates = {id(p): group["lr"] for group in adapter.groups(theirs["learning_rate"]) for p in group["params"]}
    assert rates[id(delta.prompt)] == theirs["learning_rate"]
    assert rates[id(delta.a)] == rates[id(delta.b)] == pytest.approx(theirs["lora_embedding_lr"])


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding(kind: str) -> None:
    check_padding(kind, lambda model: dt.attach(model, "dept", n=5, r=4, length=16, head=None))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation(kind: str) -> None:
    check_generate(kind, lambda model: dt.attach(model, "dept", n=5, r=4, length=16, head=None))


def test_a_row_longer_than_the_table() -> None:
    """Its real tokens count, not the padding; what is generated has places too."""
    model = model_of("llama")
    moved(dt.attach(model, "dept", n=2, length=5, head=None))
    with pytest.raises(ValueError, match="model: a row of 7 tokens, but dept has places for 5"):
        model(rows())
    given = {k: v[1:2] for k, v in padded("llama").items()}  # five tokens behind two of padding
    assert model(**given).logits.shape[:2] == (1, 7)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="a row of 6 tokens"):
            model.generate(**given, max_new_tokens=3, min_new_tokens=3, use_cache=use_cache, do_sample=False)


def test_an_image_has_no_words() -> None:
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(
        ValueError, match="it reads embedded words, and this backbone's input is made by ViTPatchEmbeddings"
    ):
        dt.attach(model, "dept", head=None)
