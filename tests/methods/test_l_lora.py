"""L-LoRA against its reference's outputs and gradients, against HF PEFT's LoRA with A held, and what being linear is good for."""

import json
import runpy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_l_lora.py"))
fill, start, after, R, ALPHA, T = (MAKE[k] for k in ("fill", "start", "after", "R", "ALPHA", "T"))
D_IN, D_OUT, STARTS = (MAKE[k] for k in ("D_IN", "D_OUT", "STARTS"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def base() -> nn.Sequential:
    layer = nn.Linear(D_IN, D_OUT, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(fill("w", layer.weight.shape))
        layer.bias.copy_(fill("bias", layer.bias.shape))
    return nn.Sequential(layer)


def attached(model: nn.Module, name: str = "one", **options: Any) -> tuple[dt.Adapter, Any]:
    adapter = dt.attach(model, "l_lora", where=["0"], name=name, r=R, alpha=ALPHA, head=None, **options)
    (delta,) = adapter.deltas.values()
    return adapter, delta


def put(delta: Any, values: dict[str, Tensor], at: str = "") -> None:
    with torch.no_grad():
        for key, value in values.items():
            getattr(delta, key + at).copy_(value)


@pytest.mark.parametrize("path", ["fast", "fold"])
@pytest.mark.parametrize("name", STARTS)
def test_the_reference(name: str, path: str) -> None:
    model, want = base(), GOLDEN[name]
    _, delta = attached(model)
    put(delta, start(STARTS[name]), "0")
    put(delta, after())
    x = fill("x", (T, D_IN)).requires_grad_()
    y = model(x) if path == "fast" else F.linear(x, *delta.fold(model[0].weight, model[0].bias))
    grads = torch.autograd.grad((y * fill("g", y.shape)).sum(), [delta.a, delta.b, x])
    same = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, torch.tensor(want["y"], dtype=torch.float64), **same)
    for key, grad in zip(("a", "b", "x"), grads, strict=True):
        torch.testing.assert_close(grad, torch.tensor(want["grads"][key], dtype=torch.float64), **same)
    if STARTS[name] == 0:
        assert not grads[0].any()  # so A never moves


def test_the_start_is_kept() -> None:
    model = base()
    _, delta = attached(model)
    assert torch.equal(delta.a0, delta.a)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(delta.a), id(delta.b)}
    assert not delta.b0.any()
    assert delta.a.any()
    assert {n for n, _ in delta.named_parameters()} == {"a", "b"}
    assert {n for n, _ in delta.named_buffers()} == {"a0", "b0"}


def trained(model: nn.Module, parameters: list[Tensor], seed: int = 0) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    for step in range(6):
        x = fill(f"x {seed} {step}", (T, D_IN))
        (model(x) - fill(f"target {seed} {step}", (T, D_OUT))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_training_is_that_of_hf_pefts_lora_with_a_held() -> None:
    """What follows from B0 = 0, step by step in AdamW."""
    model, other = base(), base()
    adapter, delta = attached(model)
    config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=ALPHA)
    theirs = peft.get_peft_model(other, config, autocast_adapter_dtype=False)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.data = delta.a.detach().clone()
        layer.lora_B["default"].weight.data = delta.b.detach().clone()
    layer.lora_A["default"].weight.requires_grad_(False)
    trained(model, adapter.parameters())
    trained(theirs, [layer.lora_B["default"].weight])
    assert torch.equal(delta.a, delta.a0)
    torch.testing.assert_close(delta.b, layer.lora_B["default"].weight, rtol=1e-12, atol=1e-12)
    x = fill("x", (T, D_IN))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_trainings_from_one_start_add_up() -> None:
    """p0 + sum_i c_i (p_i - p0) changes the weight by sum_i c_i of what each changes, wherever p0 is."""
    weight = base()[0].weight.detach()
    changes, moved = [], []
    for i in range(3):
        _, delta = attached(base())
        put(delta, start(0.8), "0")
        put(delta, {k: fill(f"{k} {i}", v.shape) for k, v in start(0.8).items()})
        changes.append(delta.fold(weight, None)[0] - weight)
        moved.append({k: getattr(delta, k).detach() - getattr(delta, f"{k}0") for k in ("a", "b")})
    _, delta = attached(base())
    put(delta, start(0.8), "0")
    origin = start(0.8)
    fixed = delta.scale * origin["b"] @ origin["a"]
    scales = (0.3, 0.5, -0.7)
    put(delta, {k: origin[k] + sum(c * m[k] for c, m in zip(scales, moved, strict=True)) for k in ("a", "b")})
    want = weight + fixed + sum(c * (change - fixed) for c, change in zip(scales, changes, strict=True))
    torch.testing.assert_close(delta.fold(weight, None)[0], want, rtol=1e-12, atol=1e-12)


def test_two_adapters_merge_into_their_sum() -> None:
    torch.manual_seed(0)
    model, weight = base(), base()[0].weight.detach()
    first, one = attached(model, "first")
    second, two = attached(model, "second")
    put(two, {"a": one.a, "b": one.b})
    put(two, {"a": one.a0, "b": one.b0}, "0")
    trained(model, first.parameters(), seed=1)
    trained(model, second.parameters(), seed=2)
    changes = [d.fold(weight, None)[0] - weight for d in (one, two)]
    x = fill("x", (T, D_IN))
    before = model(x)
    first.merge()
    second.merge()
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].weight, weight + sum(changes), rtol=1e-12, atol=1e-12)
    together = {k: getattr(one, k) + getattr(two, k) - getattr(one, f"{k}0") for k in ("a", "b")}
    put(one, {k: v.detach() for k, v in together.items()})
    torch.testing.assert_close(one.fold(weight, None)[0], weight + sum(changes), rtol=1e-12, atol=1e-12)


def test_a_file_brings_its_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = base()
    adapter, _ = attached(model)
    trained(model, adapter.parameters())
    adapter.save(tmp_path)
    torch.manual_seed(1)
    again = base()
    dt.load(again, tmp_path)
    x = fill("x", (T, D_IN))
    assert torch.equal(again(x), model(x))
