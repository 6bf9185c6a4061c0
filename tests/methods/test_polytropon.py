"""Polytropon beside HF PEFT's Poly: with equal tensors equal outputs, gradients and random draws, whole and in splits."""

import warnings
from typing import Any

import peft
import pytest
import torch
from soft import model_of, padded
from torch import Tensor

import deltatune as dt

TASKS = torch.tensor([2, 0, 1])
SIZES: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 4}
TARGETS = {"bert": ["query", "dense"], "llama": ["q_proj", "down_proj"]}


def turned(key: str, t: Tensor, like: Tensor) -> Tensor:
    """HF PEFT's tensor as ours is: A (split, skill, in, r), B (split, skill, r, out), logits (task, split skill)."""
    order = {"a": (1, 3, 0, 2), "b": (0, 3, 1, 2)}
    return t.permute(order[key]) if key in order else t.view(like.shape)


class Pair:
    """Our adapter and HF PEFT's on one small model each, with the same tensors."""

    def __init__(self, kind: str, n_splits: int) -> None:
        self.ours, self.theirs = model_of(kind), model_of(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cfg = peft.PolyConfig(target_modules=TARGETS[kind], n_splits=n_splits, **SIZES)
            self.hf: Any = peft.get_peft_model(self.theirs, cfg).base_model
        where = [name for name, module in self.theirs.named_modules() if hasattr(module, "poly_lora_A")]
        self.adapter = dt.attach(self.ours, "polytropon", where=where, head=None, n_splits=n_splits, **SIZES)
        self.pairs: list[tuple[str, Any, Any]] = []
        generator = torch.Generator().manual_seed(1)
        for (_, site), delta in self.adapter.deltas.items():
            own = self.theirs.get_submodule(site)
            for key, p in (("a", own.poly_lora_A), ("b", own.poly_lora_B)):
                self.pairs.append((key, getattr(delta, key), p["default"]))
            self.pairs.append(("z", delta.z, own.poly_router["default"].module_logits))
        with torch.no_grad():
            for key, mine, yours in self.pairs:
                yours.add_(torch.randn(yours.shape, generator=generator), alpha=0.3)
                mine.copy_(turned(key, yours, mine))

    def same(self, a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def noiseless(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("kind", "n_splits"), [("bert", 1), ("bert", 4), ("llama", 2)])
def test_beside_poly(kind: str, n_splits: int, train: bool) -> None:
    """In training both draw from one generator, layer after layer."""
    pair = Pair(kind, n_splits)
    for model in (pair.ours, pair.hf):
        model.train(train)
        noiseless(model)
    bare = model_of(kind)(**padded()).logits
    seen = []
    for model in (pair.ours, pair.hf):
        torch.manual_seed(7)
        seen.append(model(**padded(), task_ids=TASKS).logits)
    ours, theirs = seen
    real = padded()["attention_mask"].bool()
    assert (ours - bare)[real].abs().max() > 0.05
    pair.same(ours[real], theirs[real])
    for out in seen:
        out[real].square().mean().backward()
    for key, mine, yours in pair.pairs:
        assert mine.grad.any()
        pair.same(mine.grad, turned(key, yours.grad, mine))
    if train:
        torch.manual_seed(8)
        assert (pair.ours(**padded(), task_ids=TASKS).logits - ours)[real].abs().max() > 1e-3


def test_the_start_is_poly_s() -> None:
    pair = Pair("bert", 2)
    most: dict[str, tuple[float, float]] = {}
    for (_, site), delta in pair.adapter.deltas.items():
        own = pair.theirs.get_submodule(site)
        own.reset_poly_parameters("default", init_weights=True)
        for key, p in (("a", own.poly_lora_A["default"]), ("b", own.poly_lora_B["default"])):
            fresh = delta.slots[key].init(getattr(delta, key).shape, delta=delta)
            a, b = most.get(f"{key}{delta.site.d_in}", (0.0, 0.0))
            most[f"{key}{delta.site.d_in}"] = max(a, float(fresh.abs().max())), max(b, float(p.detach().abs().max()))
        logits = delta.slots["z"].init(delta.z.shape, delta=delta)
        assert 5e-4 < float(logits.abs().max()) <= 1e-3
    assert len(most) == 4
    assert all(a == b == 0 or 0.95 < a / b < 1.05 for a, b in most.values()), most


def test_logits_learn_at_their_own_rate() -> None:
    adapter = dt.attach(model_of("llama"), "polytropon", head=None, **SIZES)
    rates = {id(p): group["lr"] for group in adapter.groups(1e-3) for p in group["params"]}
    found = {name.rpartition(".")[2]: rates[id(p)] for name, p in adapter.named_parameters()}
    assert found == {"a": 1e-3, "b": 1e-3, "z": pytest.approx(0.1)}


def test_what_it_refuses() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"q_proj: polytropon: .*d_in/n_splits.* n_splits = 3"):
        dt.attach(model, "polytropon", head=None, n_splits=3)
    with pytest.raises(ValueError, match=r"polytropon: logit_lr = -1\.0, but it must lie above 0"):
        dt.attach(model, "polytropon", head=None, logit_lr=-1.0)
    assert "_deltatune" not in model.__dict__
