"""The fused low-rank layers against plain PyTorch: alone, and inside a model on every way that one is run."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core import beneath
from deltatune.kernels.lora import fused
from deltatune.kernels.lora.fused import Part, together
from deltatune.kernels.lora.kept import recipe

DOUBLE = {"dtype": torch.float64}


def parts_of(d_outs: tuple[int, ...], biased: bool, ranks: tuple[int, ...]) -> list[Part]:
    """Layers of 13 inputs."""
    made = []
    for i, (d_out, r) in enumerate(zip(d_outs, ranks, strict=True)):
        a = torch.randn(r, 13, **DOUBLE, requires_grad=True)
        b = torch.randn(d_out, r, **DOUBLE, requires_grad=True)
        weight = torch.randn(d_out, 13, **DOUBLE)
        kept = None if i == 1 else weight  # the second is read, as a quantised one is
        bias = torch.randn(d_out, **DOUBLE) if biased else None
        made.append(
            Part(kept, bias, None if kept is not None else lambda w=weight: w, a, b, (a.detach(), b.detach()), 0.3 + i)
        )
    return made


def plain(x: Tensor, parts: list[Part]) -> list[Tensor]:
    """The same, operation by operation."""
    found = []
    for p in parts:
        weight = p.read() if p.weight is None else p.weight
        found.append(F.linear(x, weight, p.bias) + p.scale * F.linear(F.linear(x, p.a), p.b))
    return found


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("d_outs", "ranks"), [((7,), (3,)), ((7, 1), (0, 3)), ((7, 5, 11), (1, 4, 13))])
@pytest.mark.parametrize("shape", [(13,), (5, 13), (2, 3, 13)])
@pytest.mark.parametrize("narrow_first", [False, True])
def test_equal_to_plain(
    d_outs: tuple[int, ...],
    ranks: tuple[int, ...],
    biased: bool,
    shape: tuple[int, ...],
    narrow_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "NARROW_FIRST", {"cpu"} if narrow_first else set())
    parts, x = parts_of(d_outs, biased, ranks), torch.randn(shape, **DOUBLE, requires_grad=True)
    ends = [x, *(p.a for p in parts), *(p.b for p in parts)]
    given = [torch.randn(*shape[:-1], n, **DOUBLE) for n in d_outs]
    ours, theirs = together(x, parts), plain(x, parts)
    for y, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, other)
    for own, other in zip(
        torch.autograd.grad(ours, ends, given), torch.autograd.grad(theirs, ends, given), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_unused_outputs_and_frozen_inputs() -> None:
    torch.manual_seed(0)
    parts, x = parts_of((7, 5), False, (3, 2)), torch.randn(4, 13, **DOUBLE)
    y, _ = together(x, parts)
    y.sum().backward()
    assert x.grad is None and parts[1].b.grad is None
    own = [p.grad for p in (parts[0].a, parts[0].b, parts[1].a)]
    for p in parts:
        p.a.grad = p.b.grad = None
    plain(x, parts)[0].sum().backward()
    torch.testing.assert_close(own[:2], [parts[0].a.grad, parts[0].b.grad])
    assert not own[2].any()


def test_differentiated_twice() -> None:
    torch.manual_seed(0)
    parts, x = parts_of((7, 5), True, (3, 2)), torch.randn(4, 13, **DOUBLE, requires_grad=True)
    ends, found = [x, *(p.a for p in parts), *(p.b for p in parts)], []
    for make in (together, plain):
        first = torch.autograd.grad(sum((y**2).sum() for y in make(x, parts)), ends, create_graph=True)
        found.append(torch.autograd.grad(sum((g**3).sum() for g in first), ends))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("narrow_first", [False, True])
def test_written_into(narrow_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may add to an output in place, as a second update of the layer does."""
    monkeypatch.setattr(fused, "NARROW_FIRST", {"cpu"} if narrow_first else set())
    parts, x = parts_of((7,), False, (3,)), torch.randn(2, 4, 13, **DOUBLE, requires_grad=True)
    (y,) = together(x, parts)
    y.mul_(2.0)
    (of_x,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(of_x, torch.autograd.grad(2 * plain(x, parts)[0].sum(), x)[0])


@pytest.mark.parametrize(
    ("make", "n"),
    [
        (lambda u, v: F.silu(u) * v, 2),
        (lambda u, v: F.gelu(u, approximate="tanh"), 1),
        (lambda u, v: F.silu(u), 1),
        (lambda u, v: u * 2.0, 0),  # a number counts for less than a tensor of its dtype
        (lambda u, v: u + v, 0),
        (lambda u, v: u, 0),
    ],
)
def test_made_again(make: object, n: int) -> None:
    u, v = (torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    x = make(u, v)  # type: ignore[operator]
    parts, again = recipe(x)
    assert (again is None) == (n == 0) and len(parts) == max(n, 1)
    assert torch.equal(x, parts[0] if again is None else again(*parts))
    with torch.autograd.graph.save_on_cpu():  # nothing is kept as it is: it would be fetched
        assert recipe(x)[1] is None


# --- in a model --------------------------------------------------------------------------------------------------------


def llama(**more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes, **more))


def filled(model: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)


def step(model: LlamaForCausalLM) -> list[Tensor]:
    ids = torch.arange(18).view(2, 9)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Narrow products first, inputs made again; how many layers ran in each call."""
    seen: list[int] = []
    own = fused.together

    def counted(x: Tensor, parts: list[Part]) -> tuple[Tensor, ...]:
        seen.append(len(parts))
        return own(x, parts)

    monkeypatch.setattr(fused, "together", counted)
    monkeypatch.setattr(fused, "NARROW_FIRST", {"cpu"})
    monkeypatch.setattr(fused, "REMADE", {"cpu"})
    return seen


def plainly(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(beneath, "frozen", lambda *a: None)
        return step(model)


def near(own: list[Tensor], other: list[Tensor]) -> None:
    assert len(own) == len(other) > 1
    for a, b in zip(own, other, strict=True):
        assert (a - b).norm() <= (1e-12 if a.dtype == torch.float64 else 1e-5) * b.norm()


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("to", ["", "int4", "bnb-nf4"])
def test_layers_of_one_input_at_once(
    as_on_a_gpu: list[int], monkeypatch: pytest.MonkeyPatch, checkpoints: bool, to: str
) -> None:
    model = llama() if to == "bnb-nf4" else llama().double()
    if to:
        dt.quantise(model, to, **({"group": 16} if to == "int4" else {}))
    model.train()
    dt.attach(model, "lora", where="all-linear", r=4)
    filled(model)
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = plainly(model, monkeypatch)
    assert not as_on_a_gpu
    near(step(model), expected)
    assert as_on_a_gpu == [3, 1, 2, 1] * (4 if checkpoints else 2)  # q k v, o, gate up, down
    near(step(copy.deepcopy(model)), expected)


def test_a_layer_that_others_run_without(as_on_a_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made for a layer that then sees another input is not taken, and from then on it runs alone."""
    model = llama().double()
    dt.attach(model, "lora", where="all-linear", r=4)
    filled(model)
    for block in model.model.layers:
        block.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = plainly(model, monkeypatch)
    for _ in range(2):
        near(step(model), expected)
    assert as_on_a_gpu[0] == 3 and as_on_a_gpu.count(3) <= 2


def test_only_what_is_on_and_a_pair(as_on_a_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().double()
    dt.attach(model, dt.Stack(dt.LoRA(where="attn.q,attn.k", r=2), dt.DoRA(where="attn.v", r=2)))
    second = dt.attach(model, "lora", where="attn.k", r=2, name="second")
    filled(model)
    expected = plainly(model, monkeypatch)
    near(step(model), expected)
    assert as_on_a_gpu == [1, 1]  # k has two, v's is no pair
    as_on_a_gpu.clear()
    with second.disabled():
        near(step(model), plainly(model, monkeypatch))
    assert as_on_a_gpu == [2, 2]


def test_factors_are_cast_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = beneath._cast_all
    monkeypatch.setattr(beneath, "_cast_all", lambda *a: calls.append(1) or own(*a))
    model = llama().bfloat16()
    dt.attach(model, "lora", where="all-linear", r=4)
    filled(model)
    loss, *grads = step(model)
    assert calls == [1] and all(g.dtype == torch.float32 for g in grads)
    other, *others = plainly(model, monkeypatch)
    assert calls == [1] and abs(loss - other) < 0.02
    for a, b in zip(grads, others, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm()  # bf16's own
    with torch.no_grad():  # no cast outlives its forward
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    assert abs(step(model)[0] - loss) > 1e-3


@pytest.mark.parametrize("to", ["", "bnb-nf4"])
def test_inputs_are_let_go(as_on_a_gpu: list[int], to: str) -> None:
    """A product that the graph can make again is not kept, neither by the operation nor by what reads a quantised weight."""
    model = llama()
    if to:
        dt.quantise(model, to)
    dt.attach(model, "lora", where="mlp.down", r=4)
    seen: list[weakref.ref[Tensor]] = []
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    ids = torch.arange(18).view(2, 9)
    loss = model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_(), labels=ids).loss
    gc.collect()
    assert len(seen) == 2 and not any(ref() is not None for ref in seen)
    loss.backward()


def test_a_forward_that_is_cut_off_leaves_nothing() -> None:
    model = llama()
    dt.attach(model, "lora", where="all-linear", r=4)
    ids = torch.arange(18).view(2, 9)

    def stop(module: torch.nn.Module, args: object) -> None:
        raise RuntimeError("cut off")

    hook = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="cut off"):
        model(input_ids=ids)
    hook.remove()
    assert not model.__dict__["_deltatune"].frame.ahead
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)
