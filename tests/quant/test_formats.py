"""What is read of each format is what its own library computes with; codes and words are those of the published layouts."""

import warnings
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import IDS, llama, moved
from torch import nn

import deltatune as dt
from deltatune.core.groups import BITS, GroupLinear, normal_floats, packed, unpacked
from deltatune.core.storage import format_of, unregistered

FORMATS = ("bnb-nf4", "bnb-fp4", "bnb-int8", "ao-int8", "int2", "int3", "int4", "int8", "nf2", "nf3", "nf4")


def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 48)


def quantised(to: str, **options: Any) -> Any:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = plain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up_proj(x)

    model = Model().requires_grad_(False)
    dt.quantise(model, to, **options)
    return model.up_proj


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_read_is_what_runs(to: str) -> None:
    layer = quantised(to)
    kind = format_of(layer)
    assert kind is not None
    weight = kind.read(layer, "weight")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    for training in (False, True):  # an inference packs bitsandbytes' weight in another order on some CPUs, in place
        layer.train(training)
        got, want = layer(x), F.linear(x, weight.float(), layer.bias)
        # LLM.int8 rounds its input to 8 bits too
        assert (got - want).abs().max() <= (0.03 if to == "bnb-int8" else 2e-5)
        assert torch.equal(kind.read(layer, "weight"), weight)
    exact = plain().weight.detach()
    lost = float((weight.detach() - exact).norm() / exact.norm())
    assert lost < {"2": 0.45, "3": 0.2, "4": 0.13, "8": 0.01}[to[-1]], lost


@pytest.mark.parametrize("to", ["bnb-nf4", "bnb-int8", "int4", "nf3"])
def test_gradient_of_the_input(to: str) -> None:
    layer = quantised(to).train()
    kind: Any = format_of(layer)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grad = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ kind.read(layer, "weight").float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("to", "options", "n"),
    # blocks of 64: an fp32 each, or a byte, with an fp32 for 256 of them, their mean and a table; and the table of the codes
    [
        ("bnb-nf4", {"double": False}, 96 * 4 + 64), ("bnb-nf4", {}, 96 + 4 + 4 + 256 * 4 + 64), ("bnb-int8", {}, 48 * 4),
        ("int4", {}, 0),
    ],
)  # fmt: skip
def test_scales_that_are_no_parameters_are_counted(to: str, options: dict[str, Any], n: int) -> None:
    layer = quantised(to, **options)
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    for _ in range(2):  # the first forward moves those of LLM.int8
        assert sum({t.data_ptr(): t.nbytes for t in unregistered(layer) if t.data_ptr() not in own}.values()) == n
        layer(torch.randn(5, 128))


def test_as_bitsandbytes_reads() -> None:
    weight = plain().weight.detach()
    for name in ("nf4", "fp4"):
        data, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type=name
        )
        layer = quantised(f"bnb-{name}")
        kind: Any = format_of(layer)
        assert torch.equal(kind.read(layer, "weight"), bitsandbytes.functional.dequantize_4bit(data, state))
    ours, theirs = normal_floats(4), bitsandbytes.functional.get_4bit_type("nf4", device="cpu").data
    torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=0)
    data, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    torch.testing.assert_close(
        quantised("nf4", group=64).dequantize(), bitsandbytes.functional.dequantize_4bit(data, state), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed(bits: int) -> None:
    q = torch.randint(2**bits, (3, 48), generator=torch.Generator().manual_seed(0))
    kept = packed(q, bits)
    assert kept.dtype == torch.uint8 and kept.shape == (3, 48 * bits // 8)
    assert torch.equal(unpacked(kept, bits).long(), q)


def _words(q: np.ndarray[Any, Any], bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """(A, B, n) codes as 32-bit words, written down from the format's description: place order[i] holds the i-th."""
    out = np.zeros(q.shape[:-1], dtype=np.uint32)
    for i, place in enumerate(order):
        out |= q[..., i].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(out.view(np.int32))


@pytest.mark.parametrize(("bits", "second"), [(4, False), (4, True), (8, False), (2, True)])
def test_gptq(bits: int, second: bool) -> None:
    rng, n = np.random.default_rng(0), 32 // bits
    d_in, d_out, groups = 64, 32, 4
    q = rng.integers(0, 2**bits, (d_in, d_out))
    z = rng.integers(1, 2**bits, (groups, d_out))
    s = rng.random((groups, d_out)) + 0.1
    g_idx = rng.integers(0, groups, d_in)  # as act-order leaves them
    layer: Any = nn.Module()
    layer.bits, layer.in_features, layer.out_features, layer.bias = bits, d_in, d_out, None
    order = tuple(range(n))
    layer.qweight = _words(q.reshape(-1, n, d_out).transpose(0, 2, 1), bits, order)
    layer.qzeros = _words((z - (0 if second else 1)).reshape(groups, -1, n), bits, order)
    layer.scales, layer.g_idx = torch.from_numpy(s), torch.from_numpy(g_idx)
    if second:
        layer.qzero_format = lambda: 2
    kind: Any = format_of(layer)
    want = ((q - z[g_idx]) * s[g_idx]).T
    assert kind.name == "GPTQ"
    np.testing.assert_allclose(kind.read(layer, "weight").numpy(), want, atol=1e-12)


def test_awq() -> None:
    rng = np.random.default_rng(0)
    d_in, d_out, groups = 64, 32, 4
    q, z = rng.integers(0, 16, (d_in, d_out)), rng.integers(0, 16, (groups, d_out))
    s = rng.random((groups, d_out)) + 0.1
    layer: Any = nn.Module()
    layer.w_bit, layer.group_size, layer.bias = 4, 16, None
    inside = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each place of a word holds
    order = tuple(inside.index(i) for i in range(8))
    layer.qweight = _words(q.reshape(d_in, -1, 8), 4, order)
    layer.qzeros = _words(z.reshape(groups, -1, 8), 4, order)
    layer.scales = torch.from_numpy(s)
    kind: Any = format_of(layer)
    assert kind.name == "AWQ"
    np.testing.assert_allclose(
        kind.read(layer, "weight").numpy(), ((q - z.repeat(16, 0)) * s.repeat(16, 0)).T, atol=1e-12
    )


def test_hqq() -> None:
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is installed from its source alone")
    layer = quantize.HQQLinear(plain(), quantize.BaseQuantizeConfig(nbits=4, group_size=64), torch.float32, "cpu")
    kind: Any = format_of(layer)
    assert kind.name == "HQQ"
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer(x), F.linear(x, kind.read(layer, "weight"), layer.bias))


@pytest.mark.parametrize("to", ["bnb-nf4", "bnb-int8", "int4"])
@pytest.mark.parametrize("method", ["lora", "dora", "oft", "shira"])
def test_methods_on_formats(to: str, method: str) -> None:
    """The start is the base's, merging gives a plain layer, unmerging every bit back; requantised it says what it lost."""
    model = dt.quantise(llama(), to)
    want = model(IDS).logits
    before = {key: t.clone() for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    classes = [type(m) for m in model.modules()]
    adapter = dt.attach(model, method, head=None)
    loss = model(IDS, labels=IDS)
    # a delta on the weight takes the input as it is, which LLM.int8 rounds
    torch.testing.assert_close(loss.logits, want, atol=2e-2 if to == "bnb-int8" else 1e-6, rtol=0)
    loss.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() >= 0 for p in adapter.parameters())
    changed = moved(adapter) and model(IDS).logits
    assert (changed - want).abs().max() > 1e-3
    adapter.merge()
    # the input of LLM.int8 is not rounded any more once the layer is plain
    torch.testing.assert_close(model(IDS).logits, changed, atol=2e-2 if to == "bnb-int8" else 1e-5, rtol=0)
    assert type(model.model.layers[0].self_attn.q_proj).__mro__[1] is nn.Linear
    adapter.unmerge()
    torch.testing.assert_close(model(IDS).logits, changed, atol=0, rtol=0)
    with pytest.warns(UserWarning, match="relative error of"):
        adapter.merge(requantise=True)
    assert format_of(model.model.layers[0].self_attn.q_proj) is not None
    lost = (model(IDS).logits - changed).abs().max()
    assert 0 < lost < (0.05 if to == "bnb-int8" else 0.5)
    adapter.unmerge()
    adapter.detach()
    after = model.state_dict()
    assert before.keys() == {key for key, t in after.items() if isinstance(t, torch.Tensor)}
    assert all(torch.equal(after[key], t) for key, t in before.items())
    assert [type(m) for m in model.modules()] == classes


def test_a_merge_that_fails_half_way_leaves_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dt.quantise(llama(), "int4")
    adapter = moved(dt.attach(model, "lora", head=None))
    want, n = model(IDS).logits, 0

    def third(self: GroupLinear, weight: torch.Tensor) -> None:
        nonlocal n
        n += 1
        if n == 3:
            raise RuntimeError("no more")

    monkeypatch.setattr(GroupLinear, "write", third)
    with pytest.raises(RuntimeError, match="no more"):
        adapter.merge(requantise=True)
    assert torch.equal(model(IDS).logits, want)


def test_a_format_that_cannot_be_written() -> None:
    model = dt.quantise(llama(), "ao-int8")
    adapter = moved(dt.attach(model, "lora", head=None))
    want = model(IDS).logits
    with pytest.raises(ValueError, match=r"q_proj: torchao cannot be written here; merge without requantise"):
        adapter.merge(requantise=True)
    adapter.merge()
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=0)


def test_to_another_dtype() -> None:
    """Scales and zeros keep their digits."""
    layer = quantised("int4")
    want = layer.dequantize()
    assert torch.equal(layer.to(torch.bfloat16).dequantize(), want) and layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["qa_lora", "peqa"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_merged_into_the_codes(method: str, bits: int) -> None:
    """QA-LoRA moves zeros alone, PEQA scales alone: not one integer changes, and the outputs are those of the adapter."""
    model = dt.quantise(llama(), f"int{bits}", group=32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GroupLinear)}
    codes = {name: m.codes.clone() for name, m in layers.items()}
    others = {name: (m.scales if method == "qa_lora" else m.zeros).clone() for name, m in layers.items()}  # type: ignore[union-attr]
    adapter = moved(dt.attach(model, method, head=None, **({"r": 4} if method == "qa_lora" else {})))
    want = model(IDS).logits
    with pytest.warns(UserWarning, match="relative error of"):
        adapter.merge(requantise=True)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=0)
    for name, layer in layers.items():
        assert torch.equal(layer.codes, codes[name]), name
        same = layer.scales if method == "qa_lora" else layer.zeros
        torch.testing.assert_close(same, others[name], atol=1e-4, rtol=1e-4)


def test_qa_lora_is_its_equation() -> None:
    """zeros' = zeros - s (B A) / (g scales), as the paper's code merges."""
    model = dt.quantise(llama(), "int4", group=32)
    layer = model.model.layers[0].mlp.down_proj
    zeros, scales = layer.zeros.clone(), layer.scales.clone()
    adapter = moved(dt.attach(model, "qa_lora", r=4, alpha=8.0, where="down", head=None))
    delta = layer.deltas["default"]
    want = zeros - 2.0 * (delta.b @ delta.a) / 32 / scales
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter.merge(requantise=True)
    torch.testing.assert_close(layer.zeros, want.detach(), atol=1e-3, rtol=1e-4)
