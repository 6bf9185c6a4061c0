"""LoRAPrune beside its reference's scores and masks, and the smaller model that comes of it."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import deltatune as dt
from deltatune.core.shrink import shrink
from deltatune.methods.prune import LoRAPrune

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_lora_prune.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
fill, gradient, STEPS, N_HEADS = (MAKE[k] for k in ("fill", "gradient", "STEPS", "N_HEADS"))
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED, **more)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_attention_heads=4, initializer_range=0.2)).eval()


def ids(seed: int = 0) -> Tensor:
    return torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(seed))


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    if isinstance(model, ViTModel):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}
    if isinstance(model, T5ForConditionalGeneration):
        return {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 1)}
    return {"input_ids": ids(seed)}


def trained(model: nn.Module, n_steps: int = 4, n_micro: int = 1, **hyper: Any) -> dt.Adapter:
    """An adapter after its whole course."""
    torch.manual_seed(1)
    adapter = dt.attach(model, "lora_prune", **{"r": 4, "interval": 2, "head": None, **hyper})
    optimizer = torch.optim.SGD(adapter.groups(0.3))
    schedules = dt.Schedules([adapter])
    schedules.begin(optimizer, n_steps, n_micro)
    for step in range(n_steps):
        for _ in range(n_micro):
            (model(**inputs(model, step))[0].square().mean() / n_micro).backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
    schedules.end()
    return adapter


def masks(adapter: dt.Adapter) -> dict[str, Tensor]:
    return {name: d.kept for (_, name), d in adapter.deltas.items() if isinstance(d, LoRAPrune) and d.kept is not None}


def test_scores_and_masks_of_the_reference() -> None:
    """Importance within 1e-12 at every step, and the same heads and channels gone; ours goes on to the ratio at the end."""
    wide = {k.lower(): MAKE[k] for k in ("WIDTH", "WIDE")}
    model = LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=wide["width"], intermediate_size=wide["wide"], num_attention_heads=N_HEADS,
            num_hidden_layers=MAKE["N_LAYERS"],
        )
    ).double()  # fmt: skip
    adapter = dt.attach(
        model, "lora_prune", r=MAKE["R"], alpha=MAKE["ALPHA"], ratio=MAKE["RATIO"], warmup=MAKE["WARMUP"],
        final=MAKE["FINAL"], interval=MAKE["FREQ"],
    )  # fmt: skip
    theirs = {"a": "lora_A.weight", "b": "lora_B.weight"}
    with torch.no_grad():
        for (_, name), d in adapter.deltas.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.copy_(fill(f"{name}.weight", weight.shape))
            for key, of in theirs.items():
                d.get_parameter(key).copy_(fill(f"{name}.{of}", d.get_parameter(key).shape))
    schedule: Any = adapter.schedule
    schedule.begin(torch.optim.SGD(adapter.parameters()), STEPS)
    worst, n_compared = 0.0, 0
    for step in range(STEPS):
        for (_, name), d in adapter.deltas.items():
            for key, of in theirs.items():
                p = d.get_parameter(key)
                p.grad = gradient(step, f"{name}.{of}", p.shape)
        schedule.before_step(step)
        assert schedule.ratio(step) == pytest.approx(GOLDEN["ratios"][step], abs=1e-15)
        if step > schedule.last:
            continue
        for part, want in GOLDEN["scores"][step].items():
            reader = {"self_attn": "o_proj", "mlp": "down_proj"}[part.partition(".")[2]]
            n = len(want)
            key = f"layers.{part}.{reader}"
            got = schedule.scores[f"0|{key}"]
            worst = max(worst, float((got - torch.tensor(want, dtype=torch.float64)).abs().max()))
            if step < schedule.last:
                kept = masks(adapter)[key].unflatten(0, (n, -1))[:, 0]
                assert "".join(str(int(k)) for k in kept) == GOLDEN["masks"][step][part], (step, part)
                n_compared += 1
    assert worst < 1e-12 and n_compared == 4 * schedule.last
    ended = {len(m): int(m.sum()) for m in masks(adapter).values()}
    assert ended == {20: 8, 24: 10}  # 2 of 5 heads, where the reference stops at 3, and 10 of 24 channels
    assert GOLDEN["masks"][-1]["0.self_attn"].count("1") == 3


FAMILIES: dict[str, Any] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **GROUPED, head_dim=8)),
    "phi3, fused": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **GROUPED)),
    "vit": lambda: ViTModel(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    ),
    "bert, channels alone": bert,
    "gpt2, channels alone": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_inner=48, n_layer=2, n_head=4)),
    "t5, channels alone": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    ),
}  # fmt: skip


def in_blocks(model: nn.Module) -> int:
    named = model.named_parameters()
    return sum(
        p.numel() for n, p in named if p.ndim == 2 and "deltas" not in n and any(k.isdigit() for k in n.split("."))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smaller_model(family: str, tmp_path: Path) -> None:
    """It gives the masked model's outputs, has the share of its blocks' weights, and comes back from its folder."""
    build = FAMILIES[family]
    torch.manual_seed(0)
    model: PreTrainedModel = build().eval()
    before = in_blocks(model)
    heads_stay = "alone" in family
    half = 2 * 2 * 32 * 24 if heads_stay else before // 2  # two layers' two matrices of an MLP
    x = inputs(model, 9)
    with torch.no_grad():
        start = model(**x)[0]
    adapter = trained(model)
    small: Any = shrink(adapter)
    with torch.no_grad():
        want, got = model(**x)[0], small(**x)[0]
    assert not torch.allclose(want, start, atol=1e-3), "nothing was learned or masked"
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)
    assert in_blocks(small) == before - half
    assert all(bool(m.all()) is (heads_stay and len(m) == 32) for m in masks(adapter).values())
    assert type(small).__module__.startswith("transformers.") and not small.training
    small.save_pretrained(tmp_path)
    back = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(back(**x)[0], got)
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}, "a tensor is shared with the larger model"


def test_the_smaller_model_generates_and_trains() -> None:
    model: Any = llama()
    small: Any = shrink(trained(model))
    out = [m.generate(ids()[:1], max_new_tokens=5, do_sample=False, eos_token_id=None) for m in (model, small)]
    assert torch.equal(out[0], out[1])
    assert (
        small.config.num_attention_heads == 4 and small.config.num_key_value_heads == 2 and small.config.head_dim == 4
    )
    assert small.config.intermediate_size == 24 and model.config.intermediate_size == 48
    dt.attach(small, "lora")
    small(ids(), labels=ids()).loss.backward()


def test_the_head_comes_along() -> None:
    """What else the adapter changed, a copy of the task head, is folded in."""
    model = bert()
    adapter = trained(model, head="auto")
    assert adapter.n_head
    torch.testing.assert_close(shrink(adapter)(ids())[0], model(ids())[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("n_steps", "ratio", "final"), [(1, 0.58, 0.1), (2, 0.25, 0.0), (7, 0.9, 0.1), (11, 0.58, 0.5)]
)
def test_the_course_ends_at_the_ratio(n_steps: int, ratio: float, final: float) -> None:
    """Whatever the number of steps and their interval."""
    adapter = trained(llama(), n_steps, ratio=ratio, interval=7, final=final)
    for mask in masks(adapter).values():
        n = 4 if len(mask) == 32 else 48
        assert int(mask.sum()) * n // len(mask) == n - int(ratio * n + 1e-9)


def test_accumulation_changes_no_decision() -> None:
    one, two = (trained(llama(), n_micro=n) for n in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(masks(one).values(), masks(two).values(), strict=True))


def refused(adapter: dt.Adapter, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        shrink(adapter)
    assert all(w in str(error.value) for w in words), str(error.value)


def test_what_cannot_shrink_says_so() -> None:
    model = llama()
    refused(dt.attach(model, "lora_prune"), "masks nothing; train it")
    refused(
        trained(llama(), where="q,v,mlp.up"), "masks nothing; masks stand at attn.o and at mlp.down, and it does not"
    )
    adapter = trained(llama(), layers=[0])
    refused(adapter, "model.layers.0.mlp.down_proj keeps 24", "model.layers.1.mlp.down_proj 48 channels")
    adapter = dt.attach(bert(), "lora_prune")
    for (_, name), d in adapter.deltas.items():
        if name.endswith("attention.output.dense"):
            d.get_buffer("keep")[:16] = 0
    refused(adapter, "BertConfig cannot say 2 of 4 heads", "query.weight would be (16, 32)", "has (32, 32)")
    adapter.deltas["0", "bert.encoder.layer.1.attention.output.dense"].get_buffer("keep")[0] = 1
    refused(adapter, "cuts through one of its 4 heads")
    adapter = trained(llama())
    dt.attach(adapter.model, "lora", name="other")
    refused(adapter, "other", "stand on the model")
    adapter.model._deltatune  # noqa: B018  # still there: nothing was changed
    tied = trained(llama(tie_word_embeddings=True), where="attn,mlp,lm_head")
    refused(tied, "lm_head is adapted, and its weight is tied: model.embed_tokens.weight, lm_head.weight")


def test_numbers_of_the_course_are_for_all_sites() -> None:
    with pytest.raises(ValueError, match=r"one ratio for all its sites, not 0\.2 at .* and 0\.5 at"):
        trained(llama(), where={"attn": {"ratio": 0.2}, "mlp": {"ratio": 0.5}})


def test_bad_hyperparameters() -> None:
    for hyper, word in (({"ratio": 1.0}, "ratio = 1.0"), ({"warmup": 0.6, "final": 0.5}, "leave no step"),
                        ({"interval": 0}, "interval = 0"), ({"smooth": -0.1}, "smooth = -0.1")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            LoRAPrune(**hyper)  # type: ignore[arg-type]
