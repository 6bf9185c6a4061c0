"""Kernel-mix against its reference code's attention; grouped heads by hand, cross-attention, generation."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from soft import D, check_generate, check_padding, logits, model_of, moved, near, rows
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import deltatune as dt
from deltatune.core.inits import kaiming
from deltatune.methods.kernel_mix import faint

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_kernel_mix.py"))
fill, HEADS, SHAPE, RANKS, SCRIPT = (MAKE[k] for k in ("fill", "HEADS", "SHAPE", "RANKS", "SCRIPT"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def bert(d: int, heads: int) -> Any:
    config = BertConfig(
        vocab_size=11, hidden_size=d, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=d
    )
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_as_the_reference_computes(checkpointed: bool) -> None:
    """An attention of BERT, and the gradients of its input and of every tensor."""
    model = bert(SHAPE[-1], HEADS).double()
    attention = model.encoder.layer[0].attention
    own = attention.self
    adapter = dt.attach(model, "kernel_mix", head=None, **RANKS)
    layers = {"q": own.query, "k": own.key, "v": own.value, "o": attention.output.dense}
    deltas = {delta.site.role[-1]: delta for delta in adapter.deltas.values()}
    with torch.no_grad():
        for part, layer in layers.items():
            layer.weight.copy_(fill(f"{part}.weight", layer.weight.shape))
            layer.bias.copy_(fill(f"{part}.bias", layer.bias.shape))
            for key, p in deltas[part].named_parameters():
                p.copy_(fill(f"{part}.{key}", p.shape))
    x = fill("x", SHAPE).requires_grad_()
    tensors = {f"{part}.{key}": p for part, delta in deltas.items() for key, p in delta.named_parameters()}
    golden = {key: torch.tensor(value, dtype=torch.float64) for key, value in GOLDEN["attention"].items()}
    assert {"out", "x", *tensors} == golden.keys() and len(tensors) == 15
    run = (
        (lambda x: torch.utils.checkpoint.checkpoint(attention, x, use_reentrant=False)) if checkpointed else attention
    )
    out = run(x)[0]
    torch.testing.assert_close(out, golden["out"], rtol=0, atol=1e-12)
    grads = torch.autograd.grad((out * fill("y", SHAPE)).sum(), [x, *tensors.values()])
    for key, grad in zip(("x", *tensors), grads, strict=True):
        torch.testing.assert_close(grad.flatten(), golden[key], rtol=0, atol=1e-12)
    assert not model.__dict__["_deltatune"].frame.stash


@pytest.mark.parametrize("start", ["houlsby", "he"])
def test_it_starts_as_the_reference(start: str) -> None:
    """The same draws; with "he" nothing changes at first."""
    torch.manual_seed(0)
    drawn = faint(kaiming)((HEADS, 2, SHAPE[-1]), delta=SimpleNamespace(start=start))
    torch.testing.assert_close(drawn, torch.tensor(GOLDEN["starts"][start]))
    model = model_of("bert")
    plain = logits(model, input_ids=rows())
    adapter = dt.attach(model, "kernel_mix", head=None, start=start)
    assert torch.equal(logits(model, input_ids=rows()), plain) == (start == "he")
    zero = {name.rpartition(".")[2] for name, p in adapter.named_parameters() if not p.any()}
    assert zero == ({"b", "bias", "d"} if start == "he" else set())


def test_it_trains_as_many_as_the_reference() -> None:
    with torch.device("meta"):
        model = bert(768, 12)
    assert dt.attach(model, "kernel_mix", head=None, **SCRIPT).params() == GOLDEN["params"] == 50688


def test_grouped_heads() -> None:
    """Four heads of q and o, two of k and v: what each layer of a Llama gives, one head at a time."""
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for part in "qkvo":
        attention.get_submodule(f"{part}_proj").register_forward_hook(
            lambda module, args, out, part=part: seen.update({part: (args[0], out)})
        )
    adapter = moved(dt.attach(model, "kernel_mix", head=None))
    logits(model, input_ids=rows())
    d = D // 4
    heads = {"q": 4, "v": 2, "o": 4}
    for part, n in heads.items():
        delta: Any = adapter.deltas["0", f"model.layers.1.self_attn.{part}_proj"]
        layer, (x, y) = attention.get_submodule(f"{part}_proj"), seen[part]
        want = nn.functional.linear(x, layer.weight) + delta.bias + x @ delta.c.T @ delta.d.T
        each = [x] * n if part == "q" else (seen["k"][1] if part == "v" else x).split(d, -1)
        for h, source in enumerate(each):
            read = source @ delta.a[h].T
            if part == "o":
                want = want + read @ delta.b[:, 2 * h : 2 * h + 2].T
            else:
                own = slice(h * d, (h + 1) * d)
                want[..., own] = want[..., own] + read @ delta.b[own].T
        near(y, want)
        assert len(each) == n and delta.a.shape[0] == n
    check_generate("llama", lambda model: dt.attach(model, "kernel_mix", head=None))


def test_t5_with_cross_attention() -> None:
    """Cross-attention's values read its keys, those of the encoder's states; padded, and generated with the cache."""

    def attach(model: Any) -> dt.Adapter:
        adapter = dt.attach(model, "kernel_mix", where="q,k,v,o", head=None)
        assert len(adapter.deltas) == 2 * 4 * 3
        return adapter

    check_padding("t5", attach)
    check_generate("t5", attach)


def test_dropout_while_training() -> None:
    """Of v's two inputs, the keys and then x, each is dropped by itself."""
    model = model_of("bert")
    adapter = moved(dt.attach(model, "kernel_mix", head=None, dropout=0.5))
    own, x = model.bert.encoder.layer[0].attention.self, torch.ones(1, 1, D)
    delta: Any = adapter.deltas["0", "bert.encoder.layer.0.attention.self.value"]
    plain = nn.functional.linear(x, own.value.weight, own.value.bias) + delta.bias
    for training in (True, False):
        delta.train(training)
        torch.manual_seed(3)
        keys = own.key(x)
        have = own.value(x)
        torch.manual_seed(3)
        keys, x_ = (nn.functional.dropout(t, 0.5, training) for t in (keys, x))
        read = torch.stack([k @ a.T for k, a in zip(keys.split(D // 4, -1), delta.a, strict=True)])
        each = [r @ b.T for r, b in zip(read, delta.b.split(D // 4), strict=True)]
        near(have, plain + torch.cat(each, -1) + x_ @ delta.c.T @ delta.d.T)


def test_one_graph() -> None:
    """torch.compile takes k, which leaves its keys, and v, which takes them, in one."""
    model = model_of("bert")
    moved(dt.attach(model, "kernel_mix", head=None))
    want = logits(model, input_ids=rows())
    torch.compiler.reset()
    near(logits(torch.compile(model, backend="eager", fullgraph=True), input_ids=rows()), want)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "hyper", "says"),
    [
        (
            "bert",
            {"where": "attn.q,attn.v"},
            r"value: kernel_mix updates .* with attn.v, where must name attn.k too",
        ),
        ("bert", {"where": "attn.q,attn.k"}, r"key: kernel_mix updates .* with attn.k, where must name attn.v too"),
        ("bert", {"r_q": 9}, r"query: kernel_mix: r_q = 9, but it must lie between 1 and d_head = 8"),
        ("bert", {"r_v": 0}, r"query: kernel_mix: r_v = 0, .* between 1 and min\(d_in,d_out\) = 32"),
        ("llama", {"r_shared_v": 17}, r"k_proj: kernel_mix: r_shared_v = 17, .* between 1 and min\(d_in,d_out\) = 16"),
        ("bert", {"where": "mlp.up"}, "kernel_mix fits none of the 2 sites"),
        ("gpt2", {}, r"h.0.attn.c_attn\[q\]: kernel_mix: q, k and v lie in one matrix here"),
        ("gpt2", {"where": "attn.v"}, "kernel_mix fits none of the 1 sites"),
    ],
)
def test_what_it_refuses(kind: str, hyper: dict[str, Any], says: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model: Any = GPT2Model(GPT2Config(**sizes)) if kind == "gpt2" else model_of(kind)
    with pytest.raises(ValueError, match=says):
        dt.attach(model, "kernel_mix", head=None, **hyper)
    assert "_deltatune" not in model.__dict__


def test_keys_that_did_not_run() -> None:
    model = model_of("bert")
    dt.attach(model, "kernel_mix", head=None)
    with pytest.raises(
        ValueError, match=r"0.attention.self.value: kernel_mix: its attention's k did not run before its v"
    ):
        model.bert.encoder.layer[0].attention.self.value(torch.ones(1, 1, D))
