"""What LoRA and DoRA can be told: power, dropout, bias, places with hyperparameters of their own; beside HF PEFT's."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

import deltatune as dt
from deltatune.core.method import Method

D, FF, R = 32, 48, 4
IDS = torch.arange(12).view(2, 6) % 11 + 1
SMALL: dict[str, Any] = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": FF,
    "vocab_size": 13,
}


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.2)).to(dtype).eval()


def bert(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    model = BertModel(BertConfig(**SMALL, **quiet), add_pooling_layer=False)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.1)
    return model.to(dtype).eval()


def moved(tensors: list[Tensor]) -> None:
    """Away from the start; the same numbers for the same shapes in the same order."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tensors:
            p.add_((torch.randn(p.shape, generator=generator) * 0.2).to(p.dtype))


def states(model: nn.Module) -> Tensor:
    out: Tensor = model(IDS)[0]
    return out


THEIRS = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}


def hf(base: PreTrainedModel, adapter: dt.Adapter, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """HF PEFT's LoRA on the same layers with the same numbers; its tensors by our keys."""
    names = [site for _, site in adapter.deltas]
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=names, lora_alpha=16, r=R, **options))
    found: dict[str, Tensor] = {}
    for (_, site), delta in adapter.deltas.items():
        layer: Any = model.base_model.model.get_submodule(site)
        for key, p in delta.named_parameters():
            if key == "d":
                found[f"{site}.{key}"] = layer.base_layer.bias
                with torch.no_grad():
                    layer.base_layer.bias.add_(p)
                continue
            theirs = getattr(layer, THEIRS[key])["default"].weight
            with torch.no_grad():
                theirs.copy_(p.view(theirs.shape))
            found[f"{site}.{key}"] = theirs
    return model, found


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("lora", {}, {}),
    "rslora": ("lora", {"power": 0.5}, {"use_rslora": True}),
    "bias": ("lora", {"bias": True}, {"bias": "lora_only"}),
    "dora": ("dora", {}, {"use_dora": True}),
    "rsdora": ("dora", {"power": 0.5}, {"use_dora": True, "use_rslora": True}),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("case", CASES)
def test_as_peft_computes(case: str, dropout: float) -> None:
    """Outputs and gradients, in training mode too: the same entries are dropped."""
    method, ours, theirs = CASES[case]
    model = bert(torch.float64)
    adapter = dt.attach(model, method, r=R, dropout=dropout, where="q,v,mlp.up", **ours)
    start = states(model)
    torch.testing.assert_close(start, states(bert(torch.float64)), rtol=0, atol=1e-12)
    moved(adapter.parameters())
    other, found = hf(bert(torch.float64), adapter, lora_dropout=dropout, **theirs)
    for training in (False, True):
        model.train(training)
        other.train(training)
        torch.manual_seed(3)
        want = states(other)
        torch.manual_seed(3)
        have = states(model)
        torch.testing.assert_close(have, want, rtol=0, atol=1e-11)
    assert (want - start).abs().max() > 0.1
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    (want * weight).sum().backward()
    (have * weight).sum().backward()
    named = {name.partition(".")[2]: p for name, p in adapter.named_parameters()}
    assert named.keys() == found.keys()
    for key, p in named.items():
        grad = found[key].grad
        assert grad is not None and grad.any() and p.grad is not None
        torch.testing.assert_close(p.grad, grad.view(p.shape), rtol=0, atol=1e-9)


def test_power() -> None:
    """alpha / r^power, on the fast path and in fold."""
    for power in (0.0, 0.5, 1.0):
        model = llama(torch.float64)
        adapter = dt.attach(model, "lora", r=R, alpha=3.0, power=power, where="q")
        moved(adapter.parameters())
        for (_, site), delta in adapter.deltas.items():
            layer: Any = model.get_submodule(site)
            x = torch.randn(3, D, dtype=torch.float64)
            update = 3.0 / R**power * (delta.b @ delta.a)  # type: ignore[attr-defined]
            torch.testing.assert_close(layer(x), x @ (layer.weight + update).T, rtol=0, atol=1e-12)
            torch.testing.assert_close(delta.fold(layer.weight, None)[0], layer.weight + update, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_dropout_falls_in_training_alone(method: str) -> None:
    model = llama()
    adapter = dt.attach(model, method, r=R, dropout=0.5, where="q,v")
    moved(adapter.parameters())
    plain = llama()
    dt.attach(plain, method, r=R, where="q,v")
    mine, theirs = (list(dt.adapters(m)["default"].parameters()) for m in (model, plain))
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
        assert torch.equal(states(model), states(plain))
        model.train()
        plain.train()
        one, two = states(model), states(model)
        assert not torch.equal(one, two) and torch.equal(states(plain), states(plain))
        model.eval()
        assert torch.equal(states(model), states(plain.eval()))


def test_dropout_of_dora_by_hand() -> None:
    """It falls on the input of all that training changes: y + (m / n - 1) W x' + (m / n) s B A x', n the row norm."""
    model = bert(torch.float64)
    adapter = dt.attach(model, "dora", r=R, dropout=0.4, where=["layer.0.attention.self.query"])
    moved(adapter.parameters())
    ((_, site),) = adapter.deltas
    delta: Any = adapter.deltas["0", site]
    layer: Any = model.get_submodule(site)
    x = torch.randn(5, D, dtype=torch.float64)
    model.train()
    torch.manual_seed(5)
    have = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    update = delta.scale * (delta.b @ delta.a)
    ratio = delta.m / (layer.weight + update).norm(dim=1)
    want = (
        F.linear(x, layer.weight, layer.bias) + (ratio - 1) * (dropped @ layer.weight.T) + ratio * (dropped @ update.T)
    )
    torch.testing.assert_close(have, want, rtol=0, atol=1e-12)


def test_dropout_that_cannot_be_honoured() -> None:
    """Where the weight is what is adapted there is no input to drop: embeddings, experts, convolutions, a slice."""
    mixtral = MixtralModel(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))
    vit = ViTModel(ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=4))
    for model, where, kind in (
        (bert(), "embedding", "embedding"),
        (mixtral, "experts", "experts"),
        (vit, "conv2d", "conv2d"),
    ):
        before = {n: type(m) for n, m in model.named_modules()}
        for method in ("lora", "dora"):
            with pytest.raises(ValueError, match=rf"^\S+: {method}: dropout = 0.1 cannot be honoured on a {kind}"):
                dt.attach(model, method, r=2, dropout=0.1, where=where)
        assert {n: type(m) for n, m in model.named_modules()} == before
        dt.attach(model, "lora", r=2, where=where).detach()
    gpt2 = GPT2Model(GPT2Config(vocab_size=13, n_positions=16, n_embd=D, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"^h\.0\.attn\.c_attn\[q\]: dora: dropout = 0.1 cannot be honoured on a"):
        dt.attach(gpt2, "dora", r=2, dropout=0.1, where="q")
    dt.attach(gpt2, "lora", r=2, dropout=0.1, where="q")
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout = {dropout}, but it must lie between 0 and 1"):
            dt.attach(bert(), "lora", dropout=dropout)


def test_dropout_inside_what_works_on_the_weight() -> None:
    """DoRA around LoRA folds it; in evaluation that is right, in training LoRA's dropout would be lost."""
    model = bert()
    dt.attach(model, dt.Stack(dt.LoRA(r=R, dropout=0.1), dt.DoRA(r=R)))
    with torch.no_grad():
        states(model)
    model.train()
    with pytest.raises(
        ValueError, match=r"query: its dropout needs the activations, but what stands around it here works"
    ):
        states(model)
    other = bert().train()
    dt.attach(other, dt.Stack(dt.LoRA(r=R), dt.DoRA(r=R)))
    states(other)


def test_bias() -> None:
    """b' = b + d, on layers with a bias and without one; merged and saved."""
    model = bert(torch.float64)
    adapter = dt.attach(model, "lora", r=R, bias=True, where="q")
    assert adapter.params() == 2 * (2 * R * D + D)
    moved(adapter.parameters())
    for (_, site), delta in adapter.deltas.items():
        layer: Any = model.get_submodule(site)
        x = torch.randn(3, D, dtype=torch.float64)
        w, b = delta.fold(layer.weight, layer.bias)
        assert b is not None
        torch.testing.assert_close(b, layer.bias + delta.d, rtol=0, atol=0)  # type: ignore[attr-defined]
        torch.testing.assert_close(layer(x), F.linear(x, w, b), rtol=0, atol=1e-12)
    want = states(model)
    adapter.merge()
    torch.testing.assert_close(states(model), want, rtol=0, atol=1e-12)
    bare = llama(torch.float64)
    free = dt.attach(bare, "lora", r=R, bias=True, where="q")
    moved(free.parameters())
    want = states(bare)
    free.merge()
    torch.testing.assert_close(states(bare), want, rtol=0, atol=1e-12)
    free.unmerge()
    assert bare.get_submodule(next(iter(free.deltas))[1]).bias is None


PLACES: dict[str, dict[str, Any]] = {"attn": {"r": 8}, "mlp": {"r": 32, "alpha": 64.0}}


@pytest.mark.parametrize("written", ["attach", "leaf", "tree"])
def test_places_with_their_own_numbers(written: str, tmp_path: Path) -> None:
    """Counts, the scale of each place, the base's numbers where a place has none; saved and loaded."""
    model = llama()
    if written == "attach":
        adapter = dt.attach(model, "lora", dropout=0.25, where=PLACES)
    elif written == "leaf":
        adapter = dt.attach(model, dt.LoRA(dropout=0.25, where=PLACES))  # type: ignore[arg-type]
    else:
        adapter = dt.attach(model, dt.Sum(dt.LoRA(dropout=0.25), dt.IA3(where="v")), where=PLACES)
    kv = D // 2
    lora = 2 * (8 * (D + D + D + kv + D + kv + D + D) + 32 * 3 * (D + FF))
    ia3 = 2 * kv if written == "tree" else 0
    assert adapter.params() == lora + ia3
    for delta in adapter.deltas.values():
        if isinstance(delta, dt.LoRA):
            in_mlp = (delta.site.role or "").startswith("mlp")
            assert (delta.r, delta.alpha, delta.dropout) == ((32, 64.0, 0.25) if in_mlp else (8, 16.0, 0.25))
            assert delta.scale == 2.0 and delta.a.shape[0] == delta.r
    moved(adapter.parameters())
    want = states(model)
    adapter.save(tmp_path)
    other = llama()
    loaded = dt.load(other, tmp_path, trainable=True)
    assert loaded.tree == adapter.tree and loaded.params() == adapter.params()
    assert torch.equal(states(other), want)
    assert [d.config for d in loaded.deltas.values()] == [d.config for d in adapter.deltas.values()]
    twin = copy.deepcopy(model)
    assert torch.equal(states(twin), want)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        (
            {"attn": {"r": 2}, "q": {"r": 4}},
            r"layers\.0\.self_attn\.q_proj lies in two places of where, 'attn' and 'q'",
        ),
        ({"all-linear": None, "mlp.down": {"r": 4}}, r"layers\.0\.mlp\.down_proj lies in two places of where"),
        ({"attn": {"rank": 2}}, r"hyperparameter of lora.*'rank'"),
        ({"attn": {"r": "2"}}, r"lora: r must be int, not '2'"),
        ({"attn": {"r": 33}}, r"layers\.0\.self_attn\.q_proj: lora: r = 33"),
        ({"attnn": {"r": 2}}, r"'attnn'"),
        ({"attn": 8}, r"gives each place its hyperparameters, .* not 'attn': 8"),
        ({}, "where is an empty mapping"),
    ],
)
def test_places_that_cannot_be(where: dict[str, Any], match: str) -> None:
    """One error that names the site or the word, and the model is as it was."""
    model = llama()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        dt.attach(model, "lora", where=where)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_no_places_for_what_trains_the_base() -> None:
    with pytest.raises(ValueError, match="child_tuning_d trains the base itself; its hyperparameters are the same"):
        dt.attach(bert(), "child_tuning_d", where={"attn": {"p": 0.1}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dora_starts_at_the_rows_norms(dtype: torch.dtype) -> None:
    """m = |W| of each row of the weight as it is stored, in fp32, and the model's own outputs."""
    model = bert(dtype)
    bare = states(model)
    adapter = dt.attach(model, "dora", r=R, where="all-linear")
    for (_, site), delta in adapter.deltas.items():
        weight: Tensor = model.get_submodule(site).weight  # type: ignore[assignment]
        m: Tensor = delta.m  # type: ignore[attr-defined]
        assert m.dtype == torch.float32
        torch.testing.assert_close(m, weight.float().norm(dim=1), rtol=1e-6, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(states(model), bare, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False], ids=["biased", "bias-free"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_doras_fast_path_is_its_fold(dtype: torch.dtype, bias: bool) -> None:
    """W A^T comes from the layer's own product, so that no weight is formed; m and B far from the start."""
    model = (bert if bias else llama)(dtype)
    adapter = dt.attach(model, "dora", r=R, where="q,v,mlp.up")
    moved(adapter.parameters())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for (_, site), delta in adapter.deltas.items():
        layer: Any = model.get_submodule(site)
        assert isinstance(delta, Method) and delta.has_linear and (layer.bias is not None) == bias
        x = torch.randn(7, layer.in_features).to(dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        own = None if layer.bias is None else layer.bias.to(exact)
        weight, b = delta.fold(layer.weight.to(exact), own)
        want = F.linear(x.to(exact), weight, b)
        have = layer(x)
        assert have.dtype == dtype
        size = want.abs().max()
        assert (have.to(exact) - want).abs().max() < tolerance * size
