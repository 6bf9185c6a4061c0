"""CoDA: its router against public code, its block against a dense one that sees the chosen tokens alone; what it costs; errors."""

import inspect
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deltatune as dt
from deltatune.methods.conditional import Coda, soft_top_k, top_k

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_coda.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))["cases"]
VOCAB, D = 40, 16
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": D, "intermediate_size": 24, "num_attention_heads": 2}
QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}


def bert(**more: Any) -> Any:
    config = tf.BertConfig(vocab_size=VOCAB, **{**SIZES, **QUIET, "max_position_embeddings": 32, **more})
    return tf.BertModel(config, add_pooling_layer=False)


def roberta() -> Any:
    config = tf.RobertaConfig(vocab_size=VOCAB, **SIZES, **QUIET, max_position_embeddings=34, pad_token_id=0)
    return tf.RobertaModel(config, add_pooling_layer=False)


def distilbert() -> Any:
    sizes: dict[str, Any] = {
        "dim": D,
        "n_heads": 2,
        "n_layers": 2,
        "hidden_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=32, initializer_range=0.2)
    )


def modernbert() -> Any:
    """Rotary positions, and in every other layer a window."""
    sizes = {**SIZES, "num_hidden_layers": 4}
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    layout: dict[str, Any] = {"local_attention": 6, "global_attn_every_n_layers": 2, "max_position_embeddings": 64}
    config = tf.ModernBertConfig(vocab_size=VOCAB, **sizes, **special, **layout, pad_token_id=0, initializer_range=0.2)
    return tf.ModernBertModel(config)


def t5() -> Any:
    """Its first layer makes the bias of all."""
    sizes: dict[str, Any] = {"d_model": D, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 2, "dropout_rate": 0.0}
    config = tf.T5Config(vocab_size=VOCAB, **sizes, initializer_factor=4.0, decoder_start_token_id=0, pad_token_id=0)
    return tf.T5ForConditionalGeneration(config)


def vit() -> Any:
    return tf.ViTModel(tf.ViTConfig(**SIZES, **QUIET, image_size=12, patch_size=4), add_pooling_layer=False)


BACKBONES = (bert, roberta, distilbert, modernbert, t5, vit)
TEXT = BACKBONES[:-1]


def fresh(make: Callable[..., Any], **more: Any) -> Any:
    torch.manual_seed(0)
    return make(**more).double().eval()


def moved(model: nn.Module, **hyper: Any) -> dt.Adapter:
    adapter = dt.attach(model, "coda", head=None, **{"r": 4, **hyper})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adapter


def rows(lengths: tuple[int, ...] = (10, 7), left: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right to the longest, all with `left` padded tokens in front."""
    generator = torch.Generator().manual_seed(2)
    length = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), length), generator=generator)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": nn.functional.pad(ids * mask, (left, 0)), "attention_mask": nn.functional.pad(mask, (left, 0))}


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, tf.ViTModel):
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3)).double()}
    more = (
        {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])} if isinstance(model, tf.T5PreTrainedModel) else {}
    )
    return rows() | more


@pytest.mark.parametrize("case", GOLDEN)
def test_router_as_the_public_one_computes(case: str) -> None:
    k, eps, size = MAKE["CASES"][case]
    s, real = MAKE["scores"](size).requires_grad_(), MAKE["real"]()
    soft = soft_top_k(s, torch.full((len(s), 1), k), real, eps)
    soft.backward(MAKE["upstream"]())
    for ours, key in ((soft, "soft"), (s.grad, "gradient")):
        assert ours is not None
        torch.testing.assert_close(ours, torch.tensor(GOLDEN[case][key], dtype=torch.float64), rtol=0, atol=1e-12)


def test_soft_top_k_solves_its_program() -> None:
    """min(1, exp((s + a) / eps)) with the a that makes the sum k, found by bisection."""
    s = torch.tensor([[0.9, -0.2, 0.4, 0.1, -0.7, 0.3]], dtype=torch.float64)
    got = soft_top_k(s, torch.tensor([[2]]), torch.ones_like(s, dtype=torch.bool), 0.1)
    low, high = -3.0, 3.0
    for _ in range(100):
        a = (low + high) / 2
        total = sum(min(1.0, math.exp((v + a) / 0.1)) for v in s[0].tolist())
        low, high = (a, high) if total < 2 else (low, a)
    want = torch.tensor([[min(1.0, math.exp((v + a) / 0.1)) for v in s[0].tolist()]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)  # 20 iterations come this near
    torch.testing.assert_close(soft_top_k(s, torch.tensor([[6]]), s > -2, 0.1), torch.ones_like(s))


def test_padding_is_chosen_last() -> None:
    s = torch.tensor([[5.0, 1.0, 9.0, 2.0, 7.0, 8.0], [3.0, 1.0, 2.0, 9.0, 9.0, 9.0]])
    real = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    index = top_k(s, torch.tensor([[2], [1]]), real, 3)
    assert index[0].tolist() == [0, 2, 4]
    assert index[1].tolist() == [0, 3, 4]


def plain(model: nn.Module, adapter: dt.Adapter, reduction: int, eps: float) -> None:
    """The equation on a model without adapters: each block runs densely and sees, by its mask, the chosen tokens alone."""
    deltas: dict[str, Any] = {d.site.module: d for d in adapter.deltas.values()}
    for name, delta in deltas.items():
        block: Any = model.get_submodule(name)
        run = block.forward
        names = list(inspect.signature(run).parameters)[1:]

        def forward(x: Tensor, *args: Any, run: Any = run, names: Any = names, d: Any = delta, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            norm = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            h = norm * d.gain + d.offset
            z = torch.relu(h @ d.down.T + d.down_bias) @ d.up.T + d.up_bias
            share = torch.zeros(x.shape[:2], dtype=x.dtype)
            mask = model._real  # type: ignore[attr-defined]
            for b, row in enumerate(mask):
                real = [t for t, one in enumerate(row.tolist()) if one]
                k = math.ceil(len(real) / reduction)
                s = torch.stack([h[b, t] @ d.router for t in real])
                a: Any = 0.0
                bias, now = -s, 4.0
                for _ in range(20):
                    a = now * (math.log(k) - torch.logsumexp((s + bias) / now, 0))
                    bias = -torch.clamp(s + a, min=0)
                    now = max(0.7 * now, eps)
                soft = torch.exp((s + a + bias) / eps)
                for i in sorted(range(len(real)), key=lambda i: -float(s[i].detach()))[:k]:
                    share[b, real[i]] = soft[i]
            seen = (share > 0)[:, None, None, :].expand(-1, 1, x.shape[1], -1)
            had = given.get("attention_mask")
            if had is not None and had.dtype != torch.bool:
                had = had >= 0
            own = torch.eye(x.shape[1], dtype=torch.bool)[None, None]  # tokens that see nothing would be NaN
            given["attention_mask"] = seen | own & ~seen if had is None else seen & had | own & ~seen
            out = run(x, **given)
            dense = out[0] if isinstance(out, tuple) else out
            y = x + z + share[..., None] * (dense - x)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        block.forward = forward


@pytest.mark.parametrize("make", BACKBONES)
def test_as_the_dense_block_under_a_mask_computes(make: Callable[..., Any]) -> None:
    """States of real tokens and all gradients, with padding, windows, rotary positions and T5's bias."""
    model, other = fresh(make), fresh(make)
    adapter = moved(model, reduction=3, eps=0.2)
    batch = batch_for(model)
    real = batch.get("attention_mask", torch.ones(2, 10)) != 0
    other._real = real
    plain(other, adapter, 3, 0.2)
    pick = (lambda out: out.encoder_last_hidden_state) if make is t5 else (lambda out: out.last_hidden_state)
    got, want = pick(model(**batch))[real], pick(other(**batch))[real]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    with adapter.disabled():
        assert (pick(model(**batch))[real] - got).abs().max() > 0.05
    up = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    named = dict(adapter.named_parameters())
    one, two = (torch.autograd.grad((t * up).sum(), list(named.values())) for t in (got, want))
    for name, a, b in zip(named, one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        assert a.abs().max() > 1e-8, name


@pytest.mark.parametrize("make", TEXT)
def test_padding_on_either_side(make: Callable[..., Any]) -> None:
    """A row's real tokens get what they get alone; T5's encoder by itself, as `generate` runs it."""
    model = fresh(make)
    moved(model, reduction=2)
    net = model.encoder if make is t5 else model
    batch, left = rows((10, 7)), rows((10, 7), left=3)
    together = net(**batch).last_hidden_state
    alone = [net(**{k: v[i : i + 1, :n] for k, v in batch.items()}).last_hidden_state[0] for i, n in enumerate((10, 7))]
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(together[1, :7], alone[1], rtol=0, atol=1e-10)
    if make is bert:
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if make is not distilbert:  # which counts padded tokens among its positions, and takes no others
        shifted = net(**left).last_hidden_state[1, 3:10]
        torch.testing.assert_close(shifted, alone[1], rtol=0, atol=1e-7)  # rotary tables are fp32


@torch.no_grad()
@pytest.mark.parametrize("make", BACKBONES)
def test_all_tokens_through_the_block_are_the_backbone_at_the_start(make: Callable[..., Any]) -> None:
    model = fresh(make)
    batch = batch_for(model)
    want = model(**batch)[0]
    adapter = dt.attach(model, "coda", r=4, reduction=1, head=None)
    assert torch.equal(model(**batch)[0], want)
    assert {key.rpartition(".")[2] for key, _ in adapter.named_parameters()} == set(Coda.slots) - {"router"}


@pytest.mark.parametrize("reduction", [2, 4])
def test_the_frozen_layers_run_on_a_share_of_the_tokens(reduction: int) -> None:
    """Matrix products of q, k, v, o and the MLP fall to 1 / reduction, those of the attention to its square."""
    model = fresh(bert, attn_implementation="eager")
    ids = torch.randint(3, VOCAB, (2, 16))

    def flops() -> dict[str, dict[Any, int]]:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return counter.get_flop_counts()

    dense = flops()
    dt.attach(model, "coda", r=4, reduction=reduction, head=None)
    sparse = flops()
    for i in range(2):
        at = f"BertModel.encoder.layer.{i}"
        for layer in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
            a, b = (sum(counts[f"{at}.{layer}"].values()) for counts in (dense, sparse))
            assert b * reduction == a > 0
        a, b = (counts[f"{at}.attention.self"][torch.ops.aten.bmm] for counts in (dense, sparse))
        assert b * reduction**2 == a > 0
    ours = sum(sparse["Global"].values()) - sum(dense["Global"].values()) / reduction
    assert ours < 0.35 * sum(dense["Global"].values())


def test_generates_alike_with_cache_without_and_with_beams() -> None:
    model = fresh(t5)
    adapter = moved(model, reduction=2)
    batch = rows((9, 6))
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    said = [model.generate(**batch, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said)
    beams = [model.generate(**batch, **options, num_beams=3, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*beams)
    step = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(6):
        step = torch.cat([step, model(**batch, decoder_input_ids=step).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said[0], step)
    states = model.encoder(**batch).last_hidden_state
    with adapter.disabled():
        assert (model.encoder(**batch).last_hidden_state - states).abs().max() > 0.05


def test_one_layer_hands_t5s_bias_on_whole() -> None:
    """The layer behind a routed first one gets the bias of all tokens."""
    model = fresh(t5)
    moved(model, reduction=2, layers=0)
    kept: dict[str, Any] = {}
    model.encoder.block[1].register_forward_pre_hook(lambda module, args: kept.update(bias=args[2]))
    model.encoder(**rows())
    with torch.no_grad():
        want = model.encoder.block[0].layer[0].SelfAttention.compute_bias(10, 10)
    assert torch.equal(kept["bias"], want)


def test_labels_train_it_and_the_deltas_inside_run_on_the_chosen_tokens() -> None:
    """LoRA in the frozen block and an attention that reads the call's mask, under CoDA, on rows with labels."""
    config = tf.BertConfig(vocab_size=VOCAB, **SIZES, **QUIET, max_position_embeddings=32)
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config).eval()
    tree = dt.Stack(dt.LoRA(r=2), dt.TinyAttention(dropout=0.0), Coda(r=4))
    adapter = dt.attach(model, tree)
    seen: list[int] = []
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(
        lambda m, args, out: seen.append(out.shape[1])
    )
    optimizer = torch.optim.AdamW(adapter.groups(1e-2))
    batch = rows((10, 7, 4, 9)) | {"labels": torch.tensor([0, 1, 1, 0])}
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None for p in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert set(seen) == {4}


def test_what_it_refuses() -> None:
    """Causal stacks, positions that the block makes itself, impossible numbers, and masks that it cannot read."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, **SIZES}
    with pytest.raises(ValueError, match="coda fits none of the 2 sites"):
        dt.attach(tf.LlamaModel(tf.LlamaConfig(**sizes)), "coda")
    umt5 = tf.UMT5Config(vocab_size=VOCAB, d_model=D, d_kv=8, num_heads=2, d_ff=24, num_layers=1)
    with pytest.raises(
        ValueError, match=r"encoder.block.0: coda: the block computes positions itself \(relative_attention_bias\)"
    ):
        dt.attach(tf.UMT5ForConditionalGeneration(umt5), "coda")
    with pytest.raises(ValueError, match=r"encoder.layer.0: coda: reduction = 0, but"):
        dt.attach(bert(), "coda", reduction=0)
    with pytest.raises(ValueError, match=r"encoder.layer.0: coda: eps = 0.0, but"):
        dt.attach(bert(), "coda", eps=0.0)
    model = fresh(bert)
    dt.attach(model, "coda")
    with pytest.raises(
        ValueError, match=r"encoder.layer.0: coda chooses among the real tokens of rows \(2, 10\).*\(2, 1, 10, 10\)"
    ):
        model(input_ids=rows()["input_ids"], attention_mask=torch.ones(2, 1, 10, 10, dtype=torch.bool))
    turned = tf.RoFormerModel(tf.RoFormerConfig(**sizes, embedding_size=D, max_position_embeddings=32)).eval()
    dt.attach(turned, "coda")
    with pytest.raises(
        ValueError, match=r"encoder.layer.0: coda runs the block on 4 of 10 tokens.*'sinusoidal_pos' of shape"
    ):
        turned(**rows())
