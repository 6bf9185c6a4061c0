"""LoftQ: its start beside HF PEFT's, what more steps win, and that nothing of the base is lost or taken for another."""

import importlib.util
import json
import runpy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.contract.checks import State
from deltatune.core.compose import tree_from_dict
from deltatune.core.groups import GroupLinear
from deltatune.core.method import METHODS
from deltatune.methods.loftq import alternated, factors, maker, marks, read

HERE = Path(__file__).resolve().parent.parent / "golden"
ONE = runpy.run_path(str(HERE / "make_loftq.py"))
GOLDEN = json.loads((HERE / "loftq.json").read_text(encoding="utf-8"))
matrix, found, RANK = ONE["matrix"], ONE["found"], ONE["RANK"]
bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
FORMATS = ["nf2", "nf4", "int4", pytest.param("bnb-nf4", marks=bnb)]
IDS = {"input_ids": torch.arange(12).view(2, 6) % 20}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """bitsandbytes' first import warns of what is none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama() -> Any:
    """Two small layers, biases of attention included."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, attention_bias=True
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        p.data += (0.1 if name.endswith("bias") else 0.03) * torch.randn_like(p)
    return model.eval()


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def split(weight: Tensor, to: str, steps: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Q, B, A."""
    with torch.no_grad():
        make = maker(to, options, linear(weight))
        layer, b, a, _ = alternated(weight, make, partial(factors, r=RANK), steps)
        return read(layer), b, a


def error(weight: Tensor, q: Tensor, b: Tensor, a: Tensor) -> float:
    return float((weight - q - b @ a).norm() / weight.norm())


def best(errors: list[float], steps: int) -> int:
    """Which of the first `steps` has the least error."""
    return min(range(steps), key=errors.__getitem__)


@pytest.mark.parametrize("to", ["nf2", "nf4"])
def test_as_hf_peft_starts(to: str) -> None:
    """HF PEFT takes the last of its steps, here the best of them is taken: it is one of theirs each time."""
    weight = matrix("w")
    theirs = GOLDEN[to]
    for steps in range(1, len(theirs) + 1):
        want = theirs[best([t["error"] for t in theirs], steps)]
        got = found(weight, *split(weight, to, steps, group=64))
        assert got == pytest.approx(want, rel=1e-5, abs=1e-4)
    if to == "nf2":  # two bits: theirs grows again behind the third step
        assert theirs[5]["error"] > theirs[2]["error"] + 5e-3


@bnb
@pytest.mark.parametrize(("to", "bits"), [("bnb-nf4", 4), ("bnb-int8", 8)])
def test_as_hf_peft_starts_by_bitsandbytes(to: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF PEFT's own loop as it is, but that its GPU is the CPU."""
    import bitsandbytes
    from peft.utils.loftq_utils import loftq_init

    def on_cpu(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            args = tuple("cpu" if a == "cuda" else a for a in args)
            return move(self, *args, **{k: "cpu" if v == "cuda" else v for k, v in kwargs.items()})

        return to

    monkeypatch.setattr(torch.Tensor, "to", on_cpu(torch.Tensor.to))
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", on_cpu(bitsandbytes.nn.Params4bit.to))
    weight = matrix("w")
    errors = []
    for steps in range(1, 6):
        q, a, b = loftq_init(weight, bits, RANK, steps)
        ours = split(weight, to, steps, **({"double": False} if bits == 4 else {}))
        errors.append(error(weight, q, b, a))
        assert errors == sorted(errors, reverse=True)
        torch.testing.assert_close(ours[0], q, rtol=0, atol=0 if bits == 4 else 1e-6)
        torch.testing.assert_close(ours[1] @ ours[2], b @ a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", ["nf2", "nf3", "nf4", "int2", "int3", "int4", "int8"])
def test_more_steps_lose_less(to: str) -> None:
    """Never more than with one step fewer; with four bits and more each step wins, with fewer the first ones do."""
    for name in ("w", "v", "u"):
        weight = matrix(name, (96, 64))
        errors = [error(weight, *split(weight, to, steps, group=32)) for steps in range(1, 7)]
        assert errors == sorted(errors, reverse=True)
        n = len(set(errors))
        assert errors[1] < errors[0] and (n == 6 or int(to[-1]) < 4), errors
        plain = float((weight - read(GroupLinear.of(linear(weight), int(to[-1]), 32, to[:-1]))).norm() / weight.norm())
        assert errors[0] < plain


def test_random_subspaces_are_near() -> None:
    """And alike each time, whatever the generator's state."""
    weight = matrix("w", (96, 128))
    b, a = factors(weight, RANK)
    torch.manual_seed(1)
    d, c = factors(weight, RANK, niter=4)
    state = torch.get_rng_state()
    assert (weight - d @ c).norm() < 1.005 * (weight - b @ a).norm()
    full = factors(weight, 96, niter=0)
    torch.testing.assert_close(full[0] @ full[1], weight, rtol=0, atol=1e-4)
    torch.manual_seed(2)
    assert all(torch.equal(x, y) for x, y in zip(factors(weight, RANK, niter=4), (d, c), strict=True))
    torch.set_rng_state(state)
    factors(weight, RANK, niter=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_the_base_and_the_factors_are_near_the_weights(to: str, alpha: float) -> None:
    model, plain, coded = llama(), llama(), llama()
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    adapter = dt.attach(model, "loftq", r=8, alpha=alpha, to=to, group=64, where="attn.q,mlp.down")
    dt.quantise(
        coded, to, where="attn.q,mlp.down", **({"block": 64, "double": False} if "bnb" in to else {"group": 64})
    )
    assert len(adapter.deltas) == 4
    for d in adapter.deltas.values():
        layer, w = model.get_submodule(d.site.module), before[f"{d.site.module}.weight"]
        with torch.no_grad():
            whole = read(layer) + d.scale * d.b @ d.a
            assert (w - whole).norm() < 0.9 * (w - read(coded.get_submodule(d.site.module))).norm()
            torch.testing.assert_close(d.a.norm(dim=1), d.b.norm(dim=0))
            assert torch.equal(d.mark, marks(read(layer)))
        if f"{d.site.module}.bias" in before:
            assert torch.equal(layer.bias, before[f"{d.site.module}.bias"])
    own = {d.site.module for d in adapter.deltas.values()}
    for name, p in model.named_parameters():
        if name in before and name.rpartition(".")[0] not in own:
            assert torch.equal(p, before[name])
    with torch.no_grad():
        want, theirs, got = (m(**IDS).logits for m in (plain, coded, model))
        assert (got - want).norm() < 0.9 * (theirs - want).norm()
        with adapter.disabled():
            assert not torch.equal(model(**IDS).logits, got)


def trained(model: Any, adapter: Any, n: int = 3) -> None:
    optimizer = torch.optim.AdamW(adapter.groups(1e-3))
    losses = []
    for _ in range(n):
        loss = model(**IDS, labels=IDS["input_ids"]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("to", FORMATS)
def test_base_and_adapter_come_back(to: str, tmp_path: Path) -> None:
    """From two folders, bit for bit; on any other base the adapter's is refused, and that base is as it was."""
    model = llama()
    adapter = dt.attach(model, "loftq", r=4, to=to, group=64, head=None)
    trained(model, adapter)
    with torch.no_grad():
        want = model(**IDS).logits
    adapter.save(tmp_path / "adapter")
    adapter.restore(tmp_path / "adapter")
    adapter.detach()
    dt.save_base(model, tmp_path / "base")
    other = dt.load_base(tmp_path / "base")
    again = dt.load(other, tmp_path / "adapter", trainable=True)
    with torch.no_grad():
        assert torch.equal(other(**IDS).logits, want)
    trained(other, again)
    again.detach()
    part = dt.attach(other, dt.Stack(dt.saved(tmp_path / "adapter", frozen=True), dt.IA3()), head=None)
    with torch.no_grad():
        assert torch.equal(other(**IDS).logits, want)
    part.merge()
    with torch.no_grad():
        torch.testing.assert_close(other(**IDS).logits, want, rtol=0, atol=1e-5)

    options: dict[str, Any] = {"block": 64, "double": False} if "bnb" in to else {"group": 64}
    plain, coded = llama(), dt.quantise(llama(), to, **options)
    for base, why in ((plain, "its layer here is a plain one"), (coded, "its layer here keeps other codes")):
        before = State(base)
        for make in (dt.load, lambda m, folder: dt.attach(m, dt.Stack(dt.saved(folder), dt.IA3()), head=None)):
            with pytest.raises(ValueError, match=rf"q_proj: loftq: {why}.* dt\.load_base\(folder\) reads it"):
                make(base, tmp_path / "adapter")
            before.restored(base)


def test_with_one_step_any_base_of_those_codes_is_the_same(tmp_path: Path) -> None:
    """q(W) is what `dt.quantise` makes, so the adapter stands on that too."""
    model = llama()
    adapter = dt.attach(model, "loftq", to="nf4", steps=1, head=None)
    adapter.save(tmp_path)
    other = dt.quantise(llama(), "nf4")
    dt.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(**IDS).logits, model(**IDS).logits)


def boom(adapter: Any, path: str) -> None:
    raise ValueError("boom")


def fails(model: Any, why: str, method: Any = "loftq", **kwargs: Any) -> None:
    """Attaching raises, and the model is as it was."""
    before, layers = State(model), dict(model.named_modules())
    with torch.no_grad():
        want = model(**IDS).logits
    with pytest.raises(ValueError, match=why):
        dt.attach(model, method, name="late", **({"to": "nf4"} | kwargs if method == "loftq" else kwargs))
    before.restored(model)
    assert all(m is layers[n] for n, m in model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(**IDS).logits, want)


def test_what_fails_leaves_the_model_as_it_was() -> None:
    fails(llama(), "q_proj: group is 24; it must be in eights and divide the layer's 64", group=24)
    fails(llama(), "r = 65", r=65)
    fails(dt.quantise(llama(), "nf4"), r"q_proj: it is quantised already \(groups of codes\)")
    fails(dt.quantise(llama(), "nf4", where="mlp.up", layers=1), "layers.1.mlp.up_proj: it is quantised already")
    late = replace(dt.IA3(), start=boom)  # behind the base's own change
    fails(llama(), "boom", dt.Stack(dt.LoftQ(to="nf4"), late))
    fails(llama(), "it is quantised already", dt.Stack(dt.LoftQ(to="nf4", where="q"), dt.LoftQ(to="nf4", where="q")))
    sick = llama()
    with torch.no_grad():
        sick.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    before = State(sick)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: its weight is not finite"):
        dt.attach(sick, "loftq", to="nf4")
    before.restored(sick)
    tied = llama()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    fails(tied, r"its weight is tied: .*layers\.0\.mlp\.up_proj\.weight, .*layers\.1\.mlp\.up_proj\.weight")
    fails(llama(), "exactly one of input_ids or inputs_embeds", probe={**IDS, "inputs_embeds": torch.ones(2, 6, 64)})


def test_a_tree_that_stood_is_no_start() -> None:
    """It would silently be a LoRA from B = 0 on a plain base."""
    model, other = llama(), llama()
    adapter = dt.attach(model, "loftq", to="nf4", head=None)
    fails(other, "loftq starts from a plain base's weights, and this tree was attached once already", adapter.tree)
    written = tree_from_dict(dt.Stack(dt.LoftQ(to="nf4"), dt.IA3()).to_dict(), METHODS)
    fails(other, "loftq starts from a plain base's weights", written)


def test_other_adapters_keep_their_base() -> None:
    model = llama()
    first = dt.attach(model, "ia3", head=None)
    fails(model, "would replace layers under adapter 'default', which stands on this model too")
    first.detach()
    dt.attach(model, "loftq", to="nf4", name="one", head=None)
    second = dt.attach(model, "ia3", name="two", head=None)  # around the codes: fine
    with torch.no_grad():
        assert model(**IDS).logits.isfinite().all()
    second.detach()


def test_it_takes_whole_plain_linear_layers() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=4)).eval()
    fails(model, "attn.q quantises|q.*quantises whole layers, and this is a part of one", where="q")
    fails(model, "c_fc: a Conv1D cannot be quantised", where="mlp.up")
    with pytest.raises(ValueError, match="loftq fits none of the 1 sites"):
        dt.attach(llama(), "loftq", to="nf4", where="lm_head")
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="its weight is on the meta device"):
        dt.attach(empty, "loftq", to="nf4")


@pytest.mark.parametrize(
    ("hyper", "why"),
    [
        ({"to": "nf5"}, "unknown format 'nf5'; did you mean 'nf4'"),
        ({"to": "ao-int8"}, "to = 'ao-int8' has no file, so that no adapter could be loaded; take bnb-nf4"),
        ({"to": "nf4", "double": True}, "double is an option of bitsandbytes' 4 bits, not of nf4"),
        ({"to": "bnb-int8", "group": 64}, "group = 64, but bnb-int8 has no groups"),
        ({"steps": 0}, "steps = 0, but it must be at least 1"),
        ({"alpha": 0.0}, "alpha = 0.0, but the start divides by it"),
        ({"niter": -1}, "niter = -1, but it must be at least 0"),
    ],
)
def test_hyperparameters(hyper: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        dt.LoftQ(**hyper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama()
    for p in model.parameters():  # rotary tables are fp32 in every model
        p.data = p.data.to(dtype)
    adapter = dt.attach(model, "loftq", to="nf4", r=4, niter=2, head=None)
    with torch.no_grad():
        want = model(**IDS).logits
    assert want.dtype == dtype
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    dt.save_base(model, tmp_path / "base")
    other = dt.load_base(tmp_path / "base")
    dt.load(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(**IDS).logits, want)


def test_places_of_their_own_and_hooks() -> None:
    """Each place has its steps and rank; a hook on a layer goes on, and the layer is the same object."""
    model = llama()
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: seen.append(1))
    adapter = dt.attach(
        model, "loftq", to="int4", head=None, where={"q": {"r": 2}, "mlp.up": {"r": 6, "to": "nf3", "steps": 1}}
    )
    assert model.model.layers[0].self_attn.q_proj is layer
    assert {d.a.shape[0] for d in adapter.deltas.values()} == {2, 6}
    kinds = {(m.code, m.bits) for m in model.modules() if isinstance(m, GroupLinear)}
    assert kinds == {("int", 4), ("nf", 3)}
    with torch.no_grad():
        model(**IDS)
    assert seen


@pytest.mark.parametrize("method", ["loftq", "lq_lora"])
def test_combined(method: str, tmp_path: Path) -> None:
    """Those of one base are combined as LoRA is, into one of the same kind, which knows its base; others are refused."""
    hyper: dict[str, Any] = {"where": "q,down"} | (
        {"to": "nf4"} if method == "loftq" else {"bits": 4.0, "formats": ("nf3", "nf4")}
    )
    model = llama()
    adapter = dt.attach(model, method, r=4, steps=3, head=None, **hyper)
    adapter.save(tmp_path / "a")
    trained(model, adapter)
    adapter.save(tmp_path / "b")
    with torch.no_grad():
        moved = {d.site.module: 0.3 * d.scale * d.b @ d.a for d in adapter.deltas.values()}
    adapter.restore(tmp_path / "a")
    with torch.no_grad():
        want = {d.site.module: moved[d.site.module] + 0.7 * d.scale * d.b @ d.a for d in adapter.deltas.values()}
    adapter.detach()
    dt.save_base(model, tmp_path / "base")
    both = [tmp_path / "a", tmp_path / "b"]
    for way in ("cat", "svd", "linear", "average", "ties"):
        exact = way in ("cat", "svd")
        new = dt.combine(
            model, both, [0.7, 0.3], way, **{"rank": 8} if way == "svd" else {"density": 0.5} if way == "ties" else {}
        )
        for d in new.deltas.values():
            assert d.name == method and torch.equal(d.mark, marks(read(model.get_submodule(d.site.module))))
            if exact:
                with torch.no_grad():
                    torch.testing.assert_close(d.scale * d.b @ d.a, want[d.site.module], rtol=0, atol=1e-5)
        with torch.no_grad():
            logits = model(**IDS).logits
        new.save(tmp_path / way)
        new.detach()
        again = dt.load_base(tmp_path / "base")
        dt.load(again, tmp_path / way)
        with torch.no_grad():
            assert torch.equal(again(**IDS).logits, logits)
        with pytest.raises(ValueError, match="its layer here is a plain one"):
            dt.load(llama(), tmp_path / way)
    with pytest.raises(ValueError, match=rf"{method} belongs to the codes that it chose, which values would not know"):
        dt.combine(model, both, method="values")
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    dt.attach(other, method, r=4, steps=3, head=None, **hyper).save(tmp_path / "other")
    before = State(model)
    for way in ("cat", "svd", "linear", "average"):
        with pytest.raises(ValueError, match=rf"other: .*q_proj: {method}: its layer here keeps other codes"):
            dt.combine(model, [tmp_path / "a", tmp_path / "other"], method=way, **{"rank": 4} if way == "svd" else {})
        before.restored(model)
