"""How deltas run beside what others do to a module: hooks, patches, layers read directly, slices, the onion."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import BEDS
from deltatune.contract.checks import State, perturb
from deltatune.core.method import METHODS, Method

Toys = dict[str, type[Method]]


def attached(model: nn.Module, name: str = "default", method: str = "lora", where: str = "q") -> dt.Adapter:
    torch.manual_seed(1)
    return perturb(dt.attach(model, method, where=where, head=None, name=name))


@pytest.mark.parametrize("hooked_first", [True, False], ids=["hook-attach", "attach-hook"])
def test_accelerate_s_hooks(hooked_first: bool) -> None:
    """A hook keeps the bound forward that it found; attach and detach rebind it."""
    batch = BEDS["biased"].batch()
    plain = BEDS["biased"].model()
    without = plain(**batch)
    attached(plain)
    want = plain(**batch)
    model = BEDS["biased"].model()
    site = model.get_submodule("layers.0.self_attn.q_proj")
    if hooked_first:
        add_hook_to_module(site, AlignDevicesHook("cpu"))
        add_hook_to_module(model, AlignDevicesHook("cpu"))
    adapter = attached(model)
    if not hooked_first:
        add_hook_to_module(site, AlignDevicesHook("cpu"))
        add_hook_to_module(model, AlignDevicesHook("cpu"))
    assert torch.equal(model(**batch), want)
    with adapter.disabled():
        assert torch.equal(model(**batch), without)
    adapter.detach()
    assert torch.equal(model(**batch), without)
    attached(model)
    assert torch.equal(model(**batch), want)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(**batch), want)
    dt.adapters(model)["default"].detach()
    assert type(site) is nn.Linear
    assert torch.equal(model(**batch), without)


class WithTorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.free = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.layer(self.attn(x, x, x)[0]))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("attn.out_proj", "MultiheadAttention reads this layer's weight without calling it"),
        ("layer.linear1", "TransformerEncoderLayer's fast path reads this layer's weight"),
        ("layer.self_attn.out_proj", "reads this layer's weight"),
    ],
)
def test_a_layer_that_is_not_called_is_refused(target: str, reason: str) -> None:
    model = WithTorchAttention().eval()
    before = State(model)
    with pytest.raises(ValueError, match=f"^{target}: .*{reason}.*no effect"):
        dt.attach(model, "lora", where=["free", target], r=2)
    before.restored(model)
    dt.attach(model, "lora", where=["free"], r=2)


def test_a_patched_forward_is_refused() -> None:
    model = BEDS["biased"].model()
    site = model.get_submodule("layers.0.self_attn.q_proj")
    site.forward = lambda x: F.linear(x, site.weight)  # type: ignore[assignment, arg-type]
    before = State(model)
    with pytest.raises(
        ValueError, match=r"^layers\.0\.self_attn\.q_proj: its forward was replaced on the instance.*test_runtime"
    ):
        dt.attach(model, "lora", where="q,v")
    before.restored(model)


MEETING = ("toy_in", "toy_out", "toy_slow", "lora")


def chain(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A plain model whose weight went through the folds of `model`'s adapters, innermost first."""
    plain = BEDS["biased"].model(torch.float64)
    at = "layers.0.self_attn.q_proj"
    layer = plain.get_submodule(at)
    weight, bias = layer.weight, layer.bias
    for name in names:
        (delta,) = dt.adapters(model)[name].deltas.values()
        weight, bias = delta.fold(weight, bias)  # type: ignore[assignment, arg-type]
    layer.weight.data, layer.bias.data = weight.detach(), bias.detach()  # type: ignore[union-attr]
    return plain


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_onion_is_the_chain_of_folds(toys: Toys, n: int) -> None:
    """In every order, and with any of them switched off; each written by its `pre`, `post` or fold alone."""
    batch = BEDS["biased"].batch()
    for names in itertools.permutations(MEETING, n):
        model = BEDS["biased"].model(torch.float64)
        for name in names:
            attached(model, name, name)
        torch.testing.assert_close(model(**batch), chain(model, names)(**batch), rtol=1e-9, atol=1e-9)
        with dt.adapters(model)[names[0]].disabled():
            torch.testing.assert_close(model(**batch), chain(model, names[1:])(**batch), rtol=1e-9, atol=1e-9)


def test_a_stack_is_the_onion(toys: Toys) -> None:
    batch = BEDS["biased"].batch()
    for names in itertools.permutations(MEETING, 3):
        model, apart = (BEDS["biased"].model(torch.float64) for _ in range(2))
        stack = perturb(dt.attach(model, dt.Stack(*(METHODS[n]() for n in names)), where="q", head=None))  # type: ignore[arg-type]
        for i, name in enumerate(names):
            (delta,) = dt.attach(apart, name, where="q", head=None, name=name).deltas.values()
            delta.load_state_dict(next(d for (p, _), d in stack.deltas.items() if p == str(i)).state_dict())
        assert torch.equal(model(**batch), apart(**batch))


FIRST, SECOND, THIRD = (dt.pfeiffer(r=r) for r in (2, 3, 4))
MET: dict[str, tuple[dt.core.compose.Tree, Callable[..., Tensor]]] = {  # of f_i(z) = z + A_i(N(z)), what the norm gets
    "sum": (dt.Sum(FIRST, SECOND), lambda z, f, g: f(z) + g(z) - z),
    "average": (dt.Average(FIRST, SECOND, THIRD), lambda z, f, g, h: (f(z) + g(z) + h(z)) / 3),
    "a stack averaged": (dt.Average(dt.Stack(FIRST, SECOND), THIRD), lambda z, f, g, h: (g(f(z)) + h(z)) / 2),
    "an average stacked": (dt.Stack(dt.Average(FIRST, SECOND), THIRD), lambda z, f, g, h: h((f(z) + g(z)) / 2)),
    "a stack gated": (dt.Gate(dt.Stack(FIRST, SECOND), by="constant"), lambda z, f, g: z + (g(f(z)) - z) / 2),
    "a gate summed": (
        dt.Sum(dt.Gate(FIRST, by="constant"), SECOND),
        lambda z, f, g: z + (f(z) - z) / 2 + (g(z) - z),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MET)
def test_changes_of_a_norm_s_input_meet_in_front_of_it(name: str, dtype: torch.dtype) -> None:
    """Pfeiffer's form, each node written out."""
    tree, meet = MET[name]
    bed, seen = BEDS["attention-bert"], []
    model = bed.model()
    adapter = perturb(dt.attach(model, tree, layers=0, head=None), 0.3)
    for delta in adapter.deltas.values():
        if delta.name == "gate":
            delta.offset.data.zero_()  # type: ignore[union-attr, operator]
    layer: Any = model.get_submodule("encoder.layer.0.output.LayerNorm")
    layer.register_forward_hook(lambda m, args, out: seen.extend((args[0].float(), out.float())))
    plain = {key: getattr(layer, key).detach().clone() for key in ("weight", "bias")}
    with torch.no_grad():
        model.to(dtype)(**bed.batch())

    def norm(v: Tensor) -> Tensor:
        return F.layer_norm(v, v.shape[-1:], plain["weight"], plain["bias"], layer.eps)

    each = [lambda v, d=d: v + d.float().mlp(norm(v)) for d in adapter.deltas.values() if d.name == "sequential"]  # type: ignore[misc, operator]
    z, y = seen
    torch.testing.assert_close(y, norm(meet(z, *each)), rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)
    assert (y - norm(z)).abs().max() > 0.1


def test_what_changes_a_norm_s_input_meets_its_like_alone() -> None:
    model = BEDS["attention-bert"].model()
    before = State(model)
    with pytest.raises(
        ValueError, match=r"LayerNorm:post_norm: sequential, ln_tuning cannot meet in average: sequential has no"
    ):
        dt.attach(model, dt.Average(dt.pfeiffer(r=2), dt.LNTuning(where="post_norm")), head=None)
    before.restored(model)


def test_disabled_never_touches_requires_grad() -> None:
    model = BEDS["biased"].model()
    adapter = attached(model, where="q,v")
    adapter.parameters()[0].requires_grad_(False)  # by hand
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    with adapter.disabled(), adapter.disabled():
        assert {n: p.requires_grad for n, p in model.named_parameters()} == required
        assert not adapter.enabled
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    adapter.disable()
    with adapter.disabled():
        pass
    assert not adapter.enabled
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")


def test_the_second_attach_freezes_nothing_of_the_first() -> None:
    model = BEDS["biased"].model()
    first = dt.attach(model, "lora", where="q", name="one")
    first.parameters()[0].requires_grad_(False)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    second = dt.attach(model, "ia3", name="two")
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in required} == required
    assert all(p.requires_grad for p in second.parameters())
    second.detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(0)
    return GPTNeoXModel(
        GPTNeoXConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()


ROWS = torch.arange(96)
FUSED = {  # model, fused layer, its rows of q, k and v written out by hand
    "gpt2": (gpt2, "h.0.attn.c_attn", ROWS.view(3, 32)),
    "neox": (neox, "layers.0.attention.query_key_value", ROWS.view(4, 3, 8).transpose(0, 1).reshape(3, 32)),
    "bed": (BEDS["slices"].model, "layers.0.self_attn.qkv_proj", ROWS.view(3, 32)),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("path", ["fast", "fold"])
def test_a_slice_moves_its_own_rows(name: str, path: str) -> None:
    build, at, rows = FUSED[name]
    model, plain = build(), build()
    adapter = attached(model, where="q,v")
    x = torch.randn(2, 3, 32)
    want = plain.get_submodule(at)(x)
    assert [d.site.role for d in adapter.deltas.values()] == ["attn.q", "attn.v"]
    for delta, own in zip(adapter.deltas.values(), (rows[0], rows[2]), strict=True):
        delta.fast = path == "fast"
        want[..., own] += 2.0 * F.linear(F.linear(x, delta.a), delta.b)  # type: ignore[arg-type]
    torch.testing.assert_close(model.get_submodule(at)(x), want, rtol=1e-5, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(model.get_submodule(at)(x), want, rtol=1e-5, atol=1e-5)
    merged, own = (m.get_parameter(f"{at}.weight") for m in (model, plain))
    dim = 1 if name == "gpt2" else 0
    assert torch.equal(merged.index_select(dim, rows[1]), own.index_select(dim, rows[1]))
    adapter.unmerge()
    assert torch.equal(merged, own)


class Attention(nn.Module):
    """One head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q_proj(x) @ self.k_proj(x).mT).softmax(-1)
        out: Tensor = x + self.o_proj(weights @ self.v_proj(x))
        return out


class Feed(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down_proj(self.up_proj(x).relu())
        return out


class Blocks(nn.Module):
    """Blocks that run their children one after the other."""

    def __init__(self) -> None:
        super().__init__()
        parts = [OrderedDict[str, nn.Module](attn=Attention(), mlp=Feed()) for _ in range(2)]
        self.layers = nn.ModuleList(nn.Sequential(part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_that_is_a_sequential() -> None:
    """The deltas at it are one more child, which passes on what it gets."""
    model, x = Blocks(), torch.randn(2, 5, 8)
    want = model(x)
    adapter = dt.attach(model, "loreft", r=2, head=None)
    assert [site for _, site in adapter.deltas] == ["layers.0", "layers.1"]
    assert not torch.allclose(model(x), want, atol=1e-3)
    adapter.detach()
    assert torch.equal(model(x), want)
