"""LST against its reference on one T5: states, gradients, pruned start; memory, caches, paddings; what it refuses."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import deltatune as dt
from deltatune.assess.measure import saved_bytes
from deltatune.core.adapter import Adapter

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_lst.py"))
fill, batch, rows = (MAKE[k] for k in ("fill", "batch", "rows"))
LAYERS, R, SIDE, SIZES = (MAKE[k] for k in ("LAYERS", "R", "SIDE", "SIZES"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
NEAR = 2e-6  # the reference's norms and softmaxes are in fp32, also in an fp64 model
DROP = [i for i in range(LAYERS) if i not in SIDE]


def t5() -> nn.Module:
    """The golden's backbone, fp64."""
    model = T5ForConditionalGeneration(T5Config(**SIZES)).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def own(adapter: Adapter) -> dict[str, Tensor]:
    """Its tensors by the golden's names."""
    return {f"{d.site.stack}.{d.site.layer}.{n}": p for d in adapter.deltas.values() for n, p in d.named_parameters()}


@torch.no_grad()
def moved(adapter: Adapter, seed: int = 0, scale: float = 0.3) -> Adapter:
    """The adapter with every tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return adapter


def test_as_the_reference_computes() -> None:
    """T5 with a dropped block, padding in the encoder, and the side decoder's cross-attention."""
    model = t5()
    adapter = dt.attach(model, "lst", r=R, drop=DROP, head=None)
    tensors = own(adapter)
    assert tensors.keys() == GOLDEN["grads"].keys()
    with torch.no_grad():
        for name, p in tensors.items():
            p.copy_(fill(name, p.shape))
    seen: list[Tensor] = []
    model.get_submodule(f"decoder.block.{LAYERS - 1}").register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(**batch())
    want = torch.tensor(GOLDEN["states"], dtype=torch.float64)
    assert want.std() > 0.05
    torch.testing.assert_close(seen[0].detach(), want, rtol=0, atol=NEAR)
    loss = (fill("loss", want.shape).double() * seen[0]).sum()
    assert float(loss.detach()) == pytest.approx(GOLDEN["loss"], abs=NEAR)
    loss.backward()
    for name, p in tensors.items():
        assert p.grad is not None, name
        got = float((fill(name, p.shape).double() * p.grad).sum())
        assert got == pytest.approx(GOLDEN["grads"][name], rel=1e-5, abs=NEAR), name


def test_starts_as_the_reference_prunes() -> None:
    """fisher-v2: rows and columns of the backbone by squared gradients, in one chain through encoder and decoder."""
    model = t5()
    adapter = dt.attach(model, "lst", r=R, drop=DROP, head=None)
    before = {n: p.clone() for n, p in own(adapter).items()}
    adapter.calibrate(rows())
    tensors = own(adapter)
    for name, want in GOLDEN["pruned"].items():
        got = float((fill(name, tensors[name].shape).double() * tensors[name].detach()).sum())
        assert got == pytest.approx(want, abs=1e-5), name  # a norm's scale is read through its eps
    left = tensors.keys() - GOLDEN["pruned"].keys()
    assert {n.split(".")[2] for n in left} == {
        "first",
        "first_bias",
        "ladder",
        "ladder_bias",
        "alpha",
        "lift",
        "lift_bias",
    }
    assert all(torch.equal(tensors[n], before[n]) for n in left)
    assert all(p.grad is None for p in model.parameters())


def llama(**more: Any) -> nn.Module:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.3, **more)).eval()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)).eval()


def bert(**more: Any) -> nn.Module:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return BertModel(BertConfig(**sizes, **more), add_pooling_layer=False).eval()


@pytest.mark.parametrize("build", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
def test_generates_as_it_reads(build: Any) -> None:
    """Token by token with a cache the logits are those of the whole row at once, padded rows and beams included."""
    torch.manual_seed(0)
    model = build()
    moved(dt.attach(model, "lst", r=4, head=None))
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    short = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    said = model.generate(**given, **short, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(said.sequences, model.generate(**given, **short, use_cache=False))
    if build is t5:
        seen = model(**given, decoder_input_ids=said.sequences[:, :-1]).logits
    else:
        mask = torch.cat([given["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        at = (mask.cumsum(1) - 1).clamp_min(0)
        seen = model(said.sequences[:, :-1], attention_mask=mask, position_ids=at).logits[:, 3:]
    assert seen.std() > 0.05
    torch.testing.assert_close(torch.stack(said.logits, 1), seen.detach().float(), rtol=0, atol=1e-4)
    beams = [model.generate(**given, **short, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_encoder_changes_nothing(side: str) -> None:
    model = t5()
    moved(dt.attach(model, "lst", r=4, head=None))
    rows = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 13, 14]])}
    pad = (3, 0) if side == "left" else (0, 3)
    padded = rows | {"input_ids": nn.functional.pad(rows["input_ids"], pad)}
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    torch.testing.assert_close(model(**padded).logits, model(**rows).logits, rtol=0, atol=1e-9)


def test_the_encoder_stays_the_backbone_s() -> None:
    """The backbone's decoder reads what it read before; what its side network ends with reaches the side decoder alone."""
    model = t5()
    adapter = moved(dt.attach(model, "lst", r=4, head=None))
    with adapter.disabled():
        before = model(**batch()).encoder_last_hidden_state
    out = model(**batch())
    assert torch.equal(out.encoder_last_hidden_state, before)
    with torch.no_grad():
        own(adapter)[f"encoder.{LAYERS - 1}.norm_last"].mul_(2)
    assert not torch.allclose(model(**batch()).logits, out.logits)
    states = model.get_encoder()(**{k: batch()[k] for k in ("input_ids", "attention_mask")})
    given = batch() | {"encoder_outputs": (states.last_hidden_state,)}
    with pytest.raises(ValueError, match="the encoder's side states are not here"):
        model(**given)


def kept_flags(model: nn.Module) -> list[bool]:
    """A list that each forward fills: does the output of each block require a gradient?"""
    flags: list[bool] = []
    for block in model.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(
            lambda m, a, out: flags.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    return flags


def test_nothing_of_the_backbone_is_kept() -> None:
    """What the forward saves is the taps and the side network; each non-final block's output takes no gradient."""
    torch.manual_seed(0)
    kept = {}
    for name, hyper in {"lora": {"r": 4}, "lst": {"r": 8, "dropout": 0.0}}.items():
        model = llama(use_cache=False)
        dt.attach(model, name, head=None, **hyper)
        flags = kept_flags(model)
        ids = torch.randint(0, 40, (4, 16))
        kept[name] = saved_bytes(model, {"input_ids": ids, "labels": ids})
        assert flags == ([False, False, True] if name == "lst" else [True] * 3)
    assert kept["lst"] < kept["lora"] / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused(reentrant: bool) -> None:
    model = llama(use_cache=False).train()
    dt.attach(model, "lst", r=4, head=None)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"lst keeps no activations of the backbone.*turn checkpointing off"):
        model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({"r": 5}, r"layers\.0.*r = 5 does not divide the model's width 32"),
        ({"r": 16}, r"layers\.0.*r = 16 does not divide the width of a head 8"),
        ({"r": 0}, r"layers\.0.*r = 0.*between 1 and d_in = 32"),
        ({"drop": (3,)}, r"layers\.0.*drop names layer 3, but the stack has 3 layers"),
    ],
)
def test_what_it_refuses(hyper: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dt.attach(llama(), "lst", head=None, **hyper)


def test_a_network_without_blocks_is_refused() -> None:
    model = llama()
    dt.attach(model, "lst", r=4, layers=[2], drop=[2], head=None)
    with pytest.raises(ValueError, match="no side block runs in front of it"):
        model(torch.tensor([[5]]))


def test_side_blocks_are_small_copies() -> None:
    """Norms, their places, gates, heads and scales are the backbone's."""
    found = {}
    for name, model in {"bert": bert(), "llama": llama(), "t5": t5()}.items():
        adapter = dt.attach(model, "lst", r=4, head=None)
        found[name] = [d for d in adapter.deltas.values() if d.site.stack != "encoder"][-1]
    assert [d.ends_with_norm for d in found.values()] == [True, False, False]  # type: ignore[attr-defined]
    assert [d.is_rms for d in found.values()] == [False, True, True]  # type: ignore[attr-defined]
    assert [d.gate is not None for d in found.values()] == [False, True, False]
    assert [d.q_bias is not None for d in found.values()] == [True, False, False]
    assert [d.scale for d in found.values()] == [2**-0.5, 2**-0.5, 1.0]
    assert found["llama"].k.shape == (4, 8) and found["llama"].q.shape == (8, 8)  # type: ignore[union-attr]
    x = torch.tensor([-1.0, 2.0])
    for name, f in {"bert": nn.functional.gelu, "llama": nn.functional.silu, "t5": nn.functional.relu}.items():
        torch.testing.assert_close(found[name].act(x), f(x))  # type: ignore[operator]


def test_a_start_for_every_backbone() -> None:
    """Fused projections, shared keys and norms that come behind: what is pruned are rows and columns of the backbone's."""
    torch.manual_seed(0)
    for build in (llama, gpt2, bert, vit):
        model = build()
        for p in model.parameters():  # no norm is 1 and no bias 0
            p.data += 0.1 * torch.randn_like(p) * (p.ndim == 1)
        adapter = dt.attach(model, "lst", r=4, head=None)
        data = (
            [{"pixel_values": torch.randn(1, 3, 8, 8)}]
            if build is vit
            else [{"input_ids": torch.tensor([[5, 6, 7, 8]])}] * 2
        )
        before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        adapter.calibrate(data, lambda m, b: m(**b)[0].square().mean() + m(**b)[0].mean())
        same = {n.rpartition(".")[2] for n, p in adapter.named_parameters() if torch.equal(p, before[n])}
        ends = {"norm_last", "norm_last_bias"} if build is bert else set()  # behind BERT's blocks stands no norm
        assert same == {"first", "first_bias", "ladder", "ladder_bias", "alpha", "lift", "lift_bias"} | ends, (
            build.__name__
        )
        for site in dt.sites(model, "q"):
            delta = next(d for d in adapter.deltas.values() if d.site.layer == site.layer)
            if not site.rows:
                whole = model.get_submodule(site.module).weight
                assert isinstance(delta.q, Tensor) and isinstance(whole, Tensor)
                assert all(bool((whole == w).any()) for w in delta.q.flatten())
        adapter.schedule.begin(torch.optim.SGD(adapter.parameters(), 0.1), 1)
        moved(adapter)
        with pytest.raises(ValueError, match="has been trained"):
            adapter.calibrate(data)


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()
