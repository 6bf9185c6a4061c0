"""X-LoRA beside HF PEFT's, with equal LoRAs and an equal classifier; caches, checkpoints, one graph."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.xlora.model import XLoraModel
from soft import D, check_generate, check_padding, logits, moved, near, padded, rows
from soft import model_of as small
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import deltatune as dt


def model_of(kind: str) -> Any:
    """A small backbone; of images too, and a Llama of one layer."""
    if kind == "one":
        model = small("llama")
        model.model.layers = model.model.layers[:1]
        return model
    if kind != "vit":
        return small(kind)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": D, "intermediate_size": 48}
    return ViTModel(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


LORAS: tuple[dict[str, Any], ...] = (
    {"r": 2, "alpha": 6.0, "where": "q,v"},
    {"r": 4, "alpha": 3.0, "where": "q,mlp.down"},
)


def saved(kind: str, folder: Path, loras: Any = LORAS) -> list[Path]:
    """Trained LoRAs in our format, and beside each in HF PEFT's."""
    found = []
    for i, hyper in enumerate(loras):
        model = model_of(kind)
        adapter = dt.attach(model, "lora", name=f"lora{i}", head=None, **hyper)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(10 + i)
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
        found.append(folder / f"{i}")
        adapter.save(found[-1])
        adapter.save(folder / f"{i}-peft", format="peft")
    return found


def put(model: Any, sources: list[Path], **hyper: Any) -> dt.Adapter:
    return dt.attach(model, "x_lora", sources=sources, head=None, **hyper)


def theirs(kind: str, sources: list[Path], **options: Any) -> Any:
    """HF PEFT's on a model of its own, as deep in training mode as ours."""
    model = model_of(kind)
    model.config.use_cache = False
    adapters = {str(i): str(s.with_name(f"{s.name}-peft")) for i, s in enumerate(sources)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = peft.XLoraConfig(hidden_size=D, adapters=adapters, xlora_dropout_p=0.0, **options)
        whole: Any = peft.get_peft_model(model, cfg)
    assert isinstance(whole.base_model, XLoraModel)
    return whole


def stirred(whole: Any, adapter: dt.Adapter) -> list[tuple[Tensor, Any]]:
    """Pairs of our classifier's tensors, moved, and HF PEFT's, equal to them: layers in order, matrices stacked."""
    moved(adapter)
    by_name: dict[str, list[nn.Parameter]] = {}
    for name, p in adapter.named_parameters():
        key = name.rpartition(".")[2].removeprefix("bank.")
        by_name.setdefault(key.rpartition("_")[0] if name.startswith("bank.") else key, []).append(p)
    ours: list[list[Tensor]] = []
    for weight in ("first", "inner", "last", "own"):
        for own in zip(by_name.get(weight, ()), by_name.get(f"{weight}_bias", ()), strict=True):
            ours += zip(*own, strict=True) if weight == "inner" else [own]  # type: ignore[list-item]
    layers = [m for m in whole.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    if len(ours) > len(layers):  # the last of each matrix
        own = ours[len(layers) - 1 :]
        ours[len(layers) - 1 :] = [[torch.cat([pair[i] for pair in own]) for i in (0, 1)]]
    pairs = [
        (a, b) for pair, m in zip(ours, layers, strict=True) for a, b in zip(pair, (m.weight, m.bias), strict=True)
    ]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    return pairs


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "layer": ({"per": "layer", "temperature": 0.5}, {"layerwise_scalings": True, "softmax_temperature": 0.5}),
    "deep": (
        {"depth": 3, "hidden": 8, "dropout": 0.0, "scale": 1.5},
        {"xlora_depth": 3, "xlora_size": 8, "global_scaling_weight": 1.5},
    ),
    "deep layer": (
        {"depth": 2, "hidden": 8, "dropout": 0.0, "per": "layer"},
        {"xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": True},
    ),
    "raw": ({"softmax": "none"}, {"enable_softmax": False}),
    "top_k": ({"top_k": 1, "per": "layer"}, {"top_k_lora": 1, "layerwise_scalings": True}),
    "top": ({"softmax": "top", "top_k": 2}, {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_beside_hf_peft(case: str, tmp_path: Path) -> None:
    """Outputs, and the classifier's gradients, of LoRAs with other ranks, scales and places."""
    hyper, options = CASES[case]
    sources = saved("llama", tmp_path)
    model, whole = model_of("llama"), theirs("llama", sources, **options)
    pairs = stirred(whole, adapter := put(model, sources, **hyper))
    given = padded()
    real = given["attention_mask"].bool()
    ours, others = model(**given).logits[real], whole(**given).logits[real]
    assert (ours - logits(model_of("llama"), **given)[real]).abs().max() > 0.1
    torch.testing.assert_close(ours, others, rtol=1e-4, atol=2e-5)
    for out in (ours, others):
        out.square().mean().backward()
    grads = [p.grad for p in adapter.parameters()]
    assert all(g is not None for g in grads) and sum(bool(g.any()) for g in grads) > 0  # type: ignore[union-attr]
    if "own" in {name.rpartition(".")[2] for name, _ in adapter.named_parameters()}:
        whole_grad = torch.cat([d.own.grad for d in adapter.deltas.values()])
        torch.testing.assert_close(whole_grad, pairs[-2][1].grad, rtol=1e-3, atol=1e-6)
        return
    for a, b in pairs:
        if a.is_leaf:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_by_hand(kind: str, tmp_path: Path) -> None:
    """Where HF PEFT's does not run: with token types, of an image. Other adapters are no part of the first pass."""
    sources = saved(kind, tmp_path)
    model, bare = model_of(kind), model_of(kind)
    given: dict[str, Tensor] = padded()
    if kind == "bert":
        given["token_type_ids"] = (torch.arange(7) > 3).long().expand(3, -1)
    else:
        given = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(4))}
    other = moved(dt.attach(model, "lora", name="other", head=None, where="mlp.up"))
    adapter = moved(put(model, sources))
    delta: Any = next(d for d in adapter.deltas.values() if d.site.role == "attn.q")
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(delta.site.module)
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(**given)
        states = bare(**given, output_hidden_states=True).hidden_states[-1]
        (plain, _), (x, y) = seen
        near(plain, x) if delta.site.layer == 0 else None
        w = (states @ delta.last.T + delta.last_bias).softmax(-1)
        want = nn.functional.linear(x, layer.weight, layer.bias)
        for i, hyper in enumerate(LORAS):
            own = delta.b[:, i, : hyper["r"]] @ delta.a[i, : hyper["r"]]
            want = want + w[..., i : i + 1] * (x @ own.T)
    near(y, want)
    assert other.enabled and adapter.enabled
    assert not delta.a[0, 2:].any() and not delta.b[:, 0, 2:].any(), "what is beyond a smaller rank is 0"


def test_generate_and_padding(tmp_path: Path) -> None:
    """With the cache, where HF PEFT forbids it, the tokens are those without it; three beams too."""
    sources = saved("llama", tmp_path)
    check_generate("llama", lambda model: put(model, sources, per="layer"))
    check_padding("llama", lambda model: put(model, sources, depth=2, hidden=8))


def test_an_own_loop_with_a_cache(tmp_path: Path) -> None:
    from transformers import DynamicCache

    model = model_of("llama")
    moved(put(model, saved("llama", tmp_path)))
    ids, cache = rows(), DynamicCache()
    whole = logits(model, input_ids=ids)
    near(logits(model, input_ids=ids[:, :4], past_key_values=cache), whole[:, :4])
    near(logits(model, input_ids=ids[:, 4:], past_key_values=cache), whole[:, 4:])
    with torch.no_grad():
        bare = model_of("llama")(input_ids=ids[:, :4], past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="x_lora: the cache has 4 tokens, none of a pass without adapters"):
        model(input_ids=ids[:, 4:], past_key_values=bare)
    assert model.__dict__["_deltatune"].frame.call is None


@pytest.mark.parametrize(("reentrant", "depth"), [(False, 2), (True, 1), (True, 2)])
def test_checkpoints(reentrant: bool, depth: int, tmp_path: Path) -> None:
    """The same gradients, of a classifier that runs once for all layers; what a reentrant one cannot do it says."""
    model = model_of("llama")
    adapter = moved(put(model, saved("llama", tmp_path), depth=depth, hidden=8, dropout=0.0, loras="trained"))
    want = torch.autograd.grad(model(**padded()).logits.square().mean(), adapter.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if reentrant and depth > 1:
        with pytest.raises(ValueError, match=r"q_proj: x_lora with depth = 2 .* reentrant checkpoints; .*False"):
            model(**padded())
        return
    model(**padded()).logits.square().mean().backward()
    for p, grad in zip(adapter.parameters(), want, strict=True):
        assert p.grad is not None and grad.any()
        near(p.grad, grad, 1e-4)


def test_one_graph(tmp_path: Path) -> None:
    """Both passes, and their gradients, in training; transformers installs what gives hidden states in a first run."""
    model = model_of("one").train()
    adapter = moved(put(model, saved("one", tmp_path), depth=2, hidden=8, dropout=0.0))
    want = logits(model, **padded())
    torch.compiler.reset()
    try:
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        out = compiled(**padded()).logits
        near(out, want)
        out.square().mean().backward()
    finally:
        torch.compiler.reset()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_set_save_and_take_off(tmp_path: Path) -> None:
    """A file runs without the sources; top_k and scale change on a standing adapter; nothing is left behind."""
    sources = saved("llama", tmp_path)
    model = model_of("llama")
    cls, attributes, bare = type(model), set(vars(model)), logits(model, **padded())
    adapter = moved(put(model, sources))
    assert {site for _, site in adapter.deltas} == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert adapter.params() == 2 * (D + 1)
    want = logits(model, **padded())
    adapter.set(top_k=1, scale=0.5)
    changed = logits(model, **padded())
    assert (changed - want).abs().max() > 0.05
    adapter.save(tmp_path / "whole")
    for one in sources:
        (one / "adapter.json").unlink()
    other = model_of("llama")
    dt.load(other, tmp_path / "whole")
    assert torch.equal(logits(other, **padded()), changed)
    with pytest.raises(ValueError, match="x_lora: top_k = 3, but a token keeps between 1 and all 2 LoRAs"):
        adapter.set(top_k=3)
    with adapter.disabled():
        assert torch.equal(logits(model, **padded()), bare)
    adapter.detach()
    assert type(model) is cls and set(vars(model)) == attributes


def test_two_of_them(tmp_path: Path) -> None:
    """Each has its own classifier, over the states of one pass."""
    sources = saved("llama", tmp_path)
    model = model_of("llama")
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    one, two = (moved(put(model, sources, name=name, where="q")) for name in ("one", "two"))
    with torch.no_grad():
        two.parameters()[0].mul_(-3.0)
    both = logits(model, **padded())
    assert len(calls) == 2
    with one.disabled():
        second = logits(model, **padded())
    with two.disabled():
        first = logits(model, **padded())
    assert (both - first).abs().max() > 0.01 and (first - second).abs().max() > 0.01


def test_what_it_refuses(tmp_path: Path) -> None:
    sources = saved("llama", tmp_path / "a")
    odd = saved(
        "llama", tmp_path / "b", ({"r": 2, "bias": True}, {"r": 2, "where": "lm_head"}, {"where": {"q": {"r": 2}}})
    )
    embed = saved("llama", tmp_path / "c", ({"r": 2, "where": "embed"},))

    def refused(match: str, sources: Any, kind: str = "llama", **hyper: Any) -> None:
        model = model_of(kind)
        with pytest.raises(ValueError, match=match):
            put(model, sources, **hyper)
        assert "_deltatune" not in model.__dict__

    refused("b/0 has biases too, and x_lora takes LoRAs of one scale and without biases", [*sources, odd[0]])
    refused("b/1 has a LoRA at lm_head of kind linear; name it in `where`", [sources[0], odd[1]])
    refused("b/2 has places with hyperparameters of their own", [sources[0], odd[2]])
    refused(
        "c/0 has a LoRA at model.embed_tokens of kind embedding; x_lora stands on linear layers", [sources[0], embed[0]]
    )
    refused(r"1: its rank at .*q_proj is 4, and this x_lora has r = 2", sources, r=2)
    for n in (1, 3):
        refused(f"x_lora: n_sources = {n}, but 2 sources are given", sources, n_sources=n)
    refused("x_lora: softmax = 'top' is over the top_k LoRAs, and top_k is None", sources, softmax="top")
    refused("x_lora fits none of the", saved("t5", tmp_path / "d"), kind="t5")
    with pytest.raises(ValueError, match="x_lora is made of saved adapters, of lora; give it sources"):
        dt.attach(model_of("llama"), "x_lora")
    model = model_of("llama")
    put(model, sources)
    dt.attach(model, "prompt_tuning", name="soft", n=3, head=None)
    with pytest.raises(
        ValueError, match=r"q_proj: x_lora has scalings for the model's \(3, 7\) tokens, and here \(3, 10\)"
    ):
        model(**padded())
