"""p_tuning and p_tuning_mlp: HF PEFT's encoder on equal weights, and a file that holds the prompt alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from soft import D, check_generate, check_padding, logits, model_of, moved, near, padded, rows
from torch import Tensor

import deltatune as dt

N = 5
METHODS = {"p_tuning": "LSTM", "p_tuning_mlp": "MLP"}


def theirs(method: str) -> Any:
    """HF PEFT's model with its encoder, as wide as the paper's: d / 2 in each direction of the LSTM, d in the MLP."""
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_reparameterization_type=METHODS[method],
        encoder_hidden_size=D // 2 if method == "p_tuning" else D, encoder_num_layers=2,
    )  # fmt: skip
    model = get_peft_model(model_of("llama"), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(3.0)
    return model.eval()


def seen(method: str, of: Any) -> dict[str, Tensor]:
    """Every weight of HF PEFT's encoder, or with `of` its gradient, under our names and in our shapes."""

    def linear(key: str, at: int) -> dict[str, Tensor]:
        part = of.mlp_head[at]
        return {key: part.weight, f"{key}_bias": part.bias}

    if method == "p_tuning_mlp":
        parts = linear("inner", 0) | linear("middle", 2) | linear("outer", 4)
        return parts | {"embedding": of.embedding.weight}
    tables = {key: [getattr(of.lstm_head, f"{key}_l{i}{way}") for i in (0, 1) for way in ("", "_reverse")]
              for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
    return {
        "embedding": of.embedding.weight,
        "cells": torch.stack(tables["weight_ih"]).unflatten(0, (2, 2)),
        "back": torch.stack(tables["weight_hh"]).unflatten(0, (2, 2)),
        "bias": torch.stack([torch.stack(pair) for pair in zip(tables["bias_ih"], tables["bias_hh"], strict=True)]).flatten(),
    } | linear("inner", 0) | linear("outer", 2)  # fmt: skip


class Gradients:
    """A module seen by the gradients of its parameters."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        return found.grad if isinstance(found, Tensor) else Gradients(found)

    def __getitem__(self, at: int) -> Any:
        return Gradients(self.module[at])


@pytest.mark.parametrize("method", METHODS)
def test_hf_peft(method: str, tmp_path: Path) -> None:
    """Outputs and every gradient on padded rows; and the prompt that HF PEFT saves is ours."""
    other = theirs(method)
    encoder = other.prompt_encoder["default"]
    model = model_of("llama")
    adapter = dt.attach(model, method, n=N)
    own = {name.rpartition(".")[2]: p for name, p in adapter.named_parameters()}
    weights = seen(method, encoder)
    assert weights.keys() == own.keys()
    assert sum(p.numel() for p in encoder.parameters()) == adapter.params()
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])
    given = padded()
    want, got = other(**given).logits[:, N:], model(**given).logits
    near(got, want)
    assert (got - logits(model_of("llama"), **given)).abs().max() > 0.05
    real = given["attention_mask"].bool()
    for out in (want, got):
        out[real].square().mean().backward()
    for name, grad in seen(method, Gradients(encoder)).items():
        near(own[name].grad, grad, 1e-4)  # type: ignore[arg-type]
    other.save_pretrained(tmp_path)
    (prompt,) = adapter.finished()[1].values()
    near(prompt, load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"])
    read = model_of("llama")
    dt.load(read, tmp_path)  # HF PEFT's own file
    near(logits(read, **given), got.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_prompt_tuning(method: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One tensor, under prompt_tuning's name, with the same outputs bit for bit; a resumable one holds the network."""
    model = model_of(kind).to(dtype)
    given = padded() | ({"decoder_input_ids": rows()[:, :4]} if kind == "t5" else {})
    adapter = moved(dt.attach(model, method, n=N, head=None))
    want = logits(model, **given)
    adapter.save(tmp_path / "finished")
    card = json.loads((tmp_path / "finished" / "adapter.json").read_text(encoding="utf-8"))
    assert (card["tree"]["method"], card["tree"]["config"]["n"], card["n_params"]) == ("prompt_tuning", N, N * D)
    held = load_file(tmp_path / "finished" / "adapter.safetensors")
    del held["base.fingerprint"]
    assert {k.rpartition(".")[2]: tuple(v.shape) for k, v in held.items()} == {"prompt": (N, D)}
    other = model_of(kind).to(dtype)
    loaded = dt.load(other, tmp_path / "finished", trainable=True)
    assert torch.equal(logits(other, **given), want)
    assert loaded.params() == N * D
    adapter.save(tmp_path / "resumable", resumable=True)
    again = dt.attach(model_of(kind).to(dtype), method, n=N, head=None)
    with pytest.raises(ValueError, match=rf"'prompt_tuning'.*, the adapter 'default' is .*'{method}'"):
        again.restore(tmp_path / "finished")
    again.restore(tmp_path / "resumable")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter.parameters(), strict=True))


def test_places_with_their_own_length(tmp_path: Path) -> None:
    """What `where` gives a place goes into the finished tree."""
    model = model_of("llama")
    adapter = moved(dt.attach(model, "p_tuning", where={"input": {"n": 3}}))
    want = logits(model, **padded())
    adapter.save(tmp_path)
    other = model_of("llama")
    assert dt.load(other, tmp_path).params() == 3 * D
    assert torch.equal(logits(other, **padded()), want)


def test_counts() -> None:
    """By hand: E; two directions of two layers, each 2 d (d + d / 2) and two biases of 2 d; two linears, or three."""
    lstm = 4 * (2 * D * (D + D // 2) + 2 * 2 * D)
    assert dt.attach(model_of("llama"), "p_tuning", n=N).params() == N * D + lstm + 2 * (D * D + D)
    assert dt.attach(model_of("llama"), "p_tuning_mlp", n=N).params() == N * D + 3 * (D * D + D)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_padding(method: str, kind: str) -> None:
    check_padding(kind, lambda model: dt.attach(model, method, n=N, head=None))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_generate(method: str, kind: str) -> None:
    check_generate(kind, lambda model: dt.attach(model, method, n=N))


def test_an_odd_width_is_refused() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=9, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8, vocab_size=11)
    model = BertModel(config, add_pooling_layer=False)
    with pytest.raises(ValueError, match=r"p_tuning: dimension 'd_in/2' is 4\.5"):
        dt.attach(model, "p_tuning")
    assert dt.attach(model, "p_tuning_mlp", n=2).params() == 2 * 9 + 3 * 90
