"""HydraLoRA, MoV and MoLoRA against their reference code, whose routers are fp32; heads, padding, generation."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from soft import D, check_generate, check_padding, logits, model_of, moved, near, padded
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import deltatune as dt

HERE = Path(__file__).resolve().parent.parent / "golden"
MAKE = runpy.run_path(str(HERE / "make_hydra_lora.py"))
fill, SHAPE, D_OUT, SIZES = MAKE["fill"], MAKE["SHAPE"], MAKE["D_OUT"], MAKE["SIZES"]
HYDRA = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
MIXED = json.loads((HERE / "mov.json").read_text(encoding="utf-8"))
SET = MIXED["settings"]
METHODS = ("hydra_lora", "molora", "mov")


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def filled(delta: Any) -> dict[str, nn.Parameter]:
    """The delta's tensors, with the values of their names."""
    found = dict(delta.named_parameters())
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return found


def same(out: Tensor, x: Tensor, found: dict[str, nn.Parameter], golden: dict[str, Any]) -> None:
    """The golden outputs, and gradients under the golden loss."""
    torch.testing.assert_close(out.view_as(exact(golden["out"])), exact(golden["out"]), rtol=0, atol=2e-6)
    weight = fill("y", exact(golden["out"]).shape).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), [x, *found.values()])
    assert golden["grads"].keys() == {"x", *found}
    for key, grad in zip(("x", *found), grads, strict=True):
        torch.testing.assert_close(grad.flatten(), exact(golden["grads"][key]), rtol=0, atol=1e-5)


def layer(d_in: int, method: str, **hyper: Any) -> tuple[nn.Module, Any]:
    model = nn.ModuleDict({"at": nn.Linear(d_in, D_OUT).double()})
    adapter = dt.attach(model, method, where="at", head=None, **hyper)
    return model["at"], next(iter(adapter.deltas.values()))


def test_hydra_lora_as_the_reference_computes() -> None:
    linear, delta = layer(SHAPE[-1], "hydra_lora", dropout=0.0, **SIZES)
    with torch.no_grad():
        for key, p in (("weight", linear.weight), ("bias", linear.bias)):
            p.copy_(fill(key, p.shape))
    x, found = fill("x", SHAPE).requires_grad_(), filled(delta)
    same(linear(x), x, found, HYDRA)


def test_molora_as_the_reference_computes() -> None:
    """The golden numbers are of the update alone, and so is ours under a layer that gives 0."""
    linear, delta = layer(SET["d_in"], "molora", n_experts=SET["n_experts"], r=SET["r"])
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    x, found = fill("x", (*SET["shape"], SET["d_in"])).requires_grad_(), filled(delta)
    same(linear(x), x, found, MIXED["molora"])


def test_mov_as_the_reference_computes() -> None:
    """Keys a head at a time, values too; in the MLP what goes into the last matrix."""
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, intermediate_size=SET["d_in"], num_hidden_layers=1,
        vocab_size=11,
    )  # fmt: skip
    adapter = dt.attach(LlamaModel(config).double(), "mov", head=None, n_experts=SET["n_experts"])
    deltas = {delta.site.role: delta for delta in adapter.deltas.values()}
    assert deltas.keys() == {"attn.k", "attn.v", "mlp.down"}
    for role in ("attn.k", "attn.v"):
        y = fill("x", (*SET["shape"], SET["heads"], SET["d_head"])).flatten(-2).requires_grad_()
        found = filled(deltas[role])
        same(deltas[role].post(y, None), y, found, MIXED["heads"])
    x, found = fill("x", (*SET["shape"], SET["d_in"])).requires_grad_(), filled(deltas["mlp.down"])
    same(deltas["mlp.down"].pre(x), x, found, MIXED["vector"])
    assert deltas["mlp.down"].post(x, None) is x


def test_the_starts_are_the_references() -> None:
    """As far, or as wide, as theirs."""
    _, delta = layer(400, "hydra_lora")
    for key, most in HYDRA["starts"].items():
        assert float(getattr(delta, key).detach().abs().max()) == pytest.approx(most, rel=0.05), key
    assert not delta.b.any()
    _, delta = layer(400, "molora")
    assert float(delta.a.detach().std()) == pytest.approx(0.02, rel=0.05) and not delta.b.any()
    assert float(delta.router.detach().std()) == pytest.approx(0.02, rel=0.05)
    _, delta = layer(400, "mov")
    assert bool((delta.vectors == 1).all()) and delta.router.shape == (30, D_OUT)


def test_mov_on_a_fused_projection() -> None:
    """GPT-2's keys and values in one matrix with its queries."""
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    model = GPT2Model(GPT2Config(**sizes)).eval()
    attention, x = model.h[0].attn.c_attn, torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = attention(x).split(8, -1)
    adapter = moved(dt.attach(model, "mov", head=None))
    found: dict[str, Any] = {delta.site.role: delta for delta in adapter.deltas.values()}
    want = [q]
    for role, y in (("attn.k", k), ("attn.v", v)):
        heads = y.view(2, 5, 2, 4)
        w = (heads @ found[role].router.T).softmax(-1)
        want.append((heads * torch.einsum("bthe,ehd->bthd", w, found[role].vectors.view(30, 2, 4))).flatten(2))
    near(attention(x), torch.cat(want, -1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding(kind: str, method: str) -> None:
    check_padding(kind, lambda model: dt.attach(model, method, head=None))


@pytest.mark.parametrize("method", METHODS)
def test_generate(method: str) -> None:
    check_generate("llama", lambda model: dt.attach(model, method, head=None))


@pytest.mark.parametrize("method", METHODS)
def test_what_it_refuses(method: str) -> None:
    """No weight for all tokens; the numbers that fit nowhere."""
    model = model_of("bert")
    adapter = moved(dt.attach(model, method, head=None))
    want = logits(model, **padded())
    with pytest.raises(ValueError, match=f"layer.0.* {method} cannot be merged: it defines no fold"):
        adapter.merge()
    assert torch.equal(logits(model, **padded()), want)
    with pytest.raises(ValueError, match=f"layer.0.*{method}: .*n_experts = 0"):
        dt.attach(model, method, name="two", n_experts=0)
    if method != "mov":
        with pytest.raises(ValueError, match=rf"r = 40, but it must lie between 1 and min\(d_in,d_out\) = {D}"):
            dt.attach(model, method, name="two", r=40)


@pytest.mark.parametrize("method", METHODS)
def test_shares_under_autocast(method: str) -> None:
    """A softmax in fp32, shares as narrow as what they weigh: a wide input would widen all experts' activations."""
    linear, delta = layer(8, method)
    linear.float()
    x = torch.randn(3, 8 if method != "mov" else D_OUT)
    with torch.autocast("cpu", torch.bfloat16):
        w = delta.shares(x)
        logits = nn.functional.linear(x, delta.router)
    assert logits.dtype == w.dtype == torch.bfloat16
    assert torch.equal(w, logits.softmax(-1, torch.float32).bfloat16())
