"""prefix_tuning(mid=...): a network makes the prefix while training, and the file holds keys and values alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel, T5Config, T5Model

import deltatune as dt
from deltatune.core.method import shared_tensor

D, HEADS, N, MID = 32, 4, 5, 7
IDS = torch.arange(12).view(2, 6) % 11 + 1


def model_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small backbone and its input."""
    torch.manual_seed(0)
    common = {
        "hidden_size": D,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 13,
    }
    if name == "bert":
        model: PreTrainedModel = BertModel(BertConfig(**common), add_pooling_layer=False)
    elif name == "llama":
        model = LlamaModel(LlamaConfig(**common, num_key_value_heads=2))
    else:
        model = T5Model(
            T5Config(vocab_size=13, d_model=D, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=HEADS)
        )
    return model.eval(), {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :4]} if name == "t5" else {})


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


def trained(adapter: dt.Adapter) -> None:
    """Away from the start, as training would bring it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)


NAMES = ["bert", "llama", "t5"]
WIDTH = {"bert": D, "llama": 2 * (D // HEADS), "t5": HEADS * 6}  # H_kv D_head
STACKS = {"bert": 1, "llama": 1, "t5": 2}
ATTENTIONS = {"bert": 2, "llama": 2, "t5": 5}


@pytest.mark.parametrize("name", NAMES)
def test_counts(name: str) -> None:
    """E (n, d), U (mid, d), u (mid) once a stack; V (2 H_kv D, mid), v a layer. Saved: 2 n H_kv D a layer."""
    model, _ = model_of(name)
    adapter = dt.attach(model, "prefix_tuning", n=N, mid=MID)
    width, layers = WIDTH[name], ATTENTIONS[name]
    assert adapter.params() == STACKS[name] * (N * D + MID * D + MID) + layers * 2 * width * (MID + 1)
    tree, tensors = adapter.finished()
    assert sum(t.numel() for t in tensors.values()) == layers * 2 * N * width
    flat = dt.attach(model_of(name)[0], tree)
    assert flat.params() == layers * 2 * N * width
    assert flat.finished()[1].keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_flat_and_computes_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, also under a bf16 base: the network runs in fp32."""
    model, batch = model_of(name)
    model.to(dtype)
    bare = outputs(model, batch)
    adapter = dt.attach(model, "prefix_tuning", n=N, mid=MID)
    trained(adapter)
    want = outputs(model, batch)
    assert (want - bare).abs().max() > 0.05
    adapter.save(tmp_path)
    held = load_file(tmp_path / "adapter.safetensors")
    del held["base.fingerprint"]
    assert {k.rpartition(".")[2] for k in held} == {"key", "value"} and len(held) == 2 * ATTENTIONS[name]
    card = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))
    assert (card["tree"]["config"]["n"], card["tree"]["config"]["mid"]) == (N, 0)
    assert card["n_params"] == sum(t.numel() for t in held.values())
    other, _ = model_of(name)
    other.to(dtype)
    loaded = dt.load(other, tmp_path, trainable=True)
    assert torch.equal(outputs(other, batch), want)
    assert loaded.params() == card["n_params"]
    assert torch.equal(outputs(model, batch), want), "saving changed the adapter"


@pytest.mark.parametrize("name", NAMES)
def test_the_networks_equation(name: str) -> None:
    """P = V tanh(U E + u) + v, keys first, and the gradient reaches every part."""
    model, batch = model_of(name)
    adapter = dt.attach(model, "prefix_tuning", n=N, mid=MID)
    trained(adapter)
    for delta in adapter.deltas.values():
        part: dict[str, Any] = {k: shared_tensor(k, delta) for k in ("embedding", "inner", "inner_bias")}
        h = torch.tanh(part["embedding"] @ part["inner"].T + part["inner_bias"])
        made = h @ delta.outer.T + delta.outer_bias  # type: ignore[attr-defined]
        key, value = (t.view(N, -1, delta.site.d_head).transpose(0, 1) for t in made.chunk(2, -1))
        have = delta.prefix()  # type: ignore[attr-defined]
        torch.testing.assert_close(have[0], key)
        torch.testing.assert_close(have[1], value)
    model(**batch).last_hidden_state.square().sum().backward()
    for n, p in adapter.named_parameters():
        assert p.grad is not None and p.grad.any(), n


def test_each_stack_of_t5_has_a_network() -> None:
    """The encoder's embedding and U are not the decoder's; within a stack all layers share one of each."""
    model, batch = model_of("t5")
    adapter = dt.attach(model, "prefix_tuning", n=N, mid=MID)
    parts: dict[str, set[int]] = {}
    for delta in adapter.deltas.values():
        for key in ("embedding", "inner", "inner_bias"):
            parts.setdefault(f"{delta.site.stack}.{key}", set()).add(id(shared_tensor(key, delta)))
    assert parts.keys() == {f"{s}.{k}" for s in ("encoder", "decoder") for k in ("embedding", "inner", "inner_bias")}
    assert all(len(ids) == 1 for ids in parts.values()) and len(set.union(*parts.values())) == 6
    assert adapter.bank is not None
    assert len(list(adapter.bank.parameters())) == 6
    before = outputs(model, batch)
    encoder = next(d for d in adapter.deltas.values() if d.site.stack == "encoder")
    with torch.no_grad():
        shared_tensor("inner", encoder).mul_(-1)
    decoder = {n: p for n, p in adapter.bank.named_parameters() if "decoder" in n}
    assert len(decoder) == 3
    assert not torch.equal(outputs(model, batch), before)


def test_a_finished_prefix_does_not_resume_and_a_resumable_does(tmp_path: Path) -> None:
    model, batch = model_of("bert")
    adapter = dt.attach(model, "prefix_tuning", n=N, mid=MID)
    trained(adapter)
    want = outputs(model, batch)
    adapter.save(tmp_path / "finished")
    adapter.save(tmp_path / "resumable", resumable=True)
    other, _ = model_of("bert")
    fresh = dt.attach(other, "prefix_tuning", n=N, mid=MID)
    with pytest.raises(ValueError, match=r"holds .*'mid': 0.*, the adapter 'default' is .*'mid': 7"):
        fresh.restore(tmp_path / "finished")
    fresh.restore(tmp_path / "resumable")
    own = dict(adapter.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in fresh.named_parameters())
    assert torch.equal(outputs(other, batch), want)
