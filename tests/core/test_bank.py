"""Tensors shared between sites: one storage, drawn from the seed; trained ones saved once."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import BEDS
from deltatune.core.files import read_adapter
from deltatune.core.method import Method

Toys = dict[str, type[Method]]
WHERE = "q,k,v,o,mlp.up,mlp.down"


def storages(adapter: dt.Adapter) -> dict[tuple[int, ...], set[int]]:
    found: dict[tuple[int, ...], set[int]] = {}
    for delta in adapter.deltas.values():
        found.setdefault(tuple(delta.a.shape), set()).add(delta.a.data_ptr())  # type: ignore[operator, union-attr]
    return found


def test_sites_of_one_shape_share_one_tensor_through_every_move(toys: Toys) -> None:
    model = BEDS["biased"].model()
    adapter = dt.attach(model, "toy_shared", where=WHERE, head=None)
    assert {shape: len(at) for shape, at in storages(adapter).items()} == {(32, 32): 1, (48, 32): 1, (32, 48): 1}
    out = model(**BEDS["biased"].batch())
    twin = copy.deepcopy(model)
    for moved in (model.to(torch.float64).to(torch.float32), twin):
        own = dt.adapters(moved)["default"]
        assert all(len(at) == 1 for at in storages(own).values())
        assert torch.equal(moved(**BEDS["biased"].batch()), out)
    assert not {p for at in storages(dt.adapters(twin)["default"]).values() for p in at} & {
        p for at in storages(dt.adapters(model)["default"]).values() for p in at
    }


def test_it_comes_from_the_adapter_s_seed_alone(toys: Toys) -> None:
    drawn = []
    for seed, generator, where in ((5, 1, WHERE), (5, 2, "mlp.down,o"), (6, 1, WHERE)):
        torch.manual_seed(generator)
        adapter = dt.attach(BEDS["biased"].model(), "toy_shared", where=where, head=None, seed=seed)
        after = torch.randn(3)
        torch.manual_seed(generator)
        dt.attach(BEDS["biased"].model(), "toy_shared", where=where, head=None, seed=seed + 1)
        assert torch.equal(torch.randn(3), after)  # the draw leaves the global generator where it was
        drawn.append(next(d.a for d in adapter.deltas.values() if d.site.role == "attn.o"))
    assert torch.equal(drawn[0], drawn[1])  # type: ignore[arg-type]
    assert not torch.equal(drawn[0], drawn[2])  # type: ignore[arg-type]


def test_no_draw_seeds_a_gpu(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Banks are drawn on the CPU; a GPU's generator, which draws the training's dropout, is not set back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    dt.attach(BEDS["biased"].model(), "toy_shared", where=WHERE, head=None, seed=5)
    assert not seeded


def test_a_frozen_bank_is_neither_trained_nor_saved(toys: Toys, tmp_path: Path) -> None:
    model = BEDS["biased"].model()
    adapter = dt.attach(model, "toy_shared", where=WHERE, head=None, seed=5)
    assert adapter.params() == 5 * 32 + 48
    adapter.save(tmp_path)
    _, tensors = read_adapter(tmp_path)
    assert not [name for name in tensors if name.startswith("bank") or name.endswith(".a")]
    torch.manual_seed(99)
    other = BEDS["biased"].model()
    dt.load(other, tmp_path)
    assert torch.equal(other(**BEDS["biased"].batch()), model(**BEDS["biased"].batch()))
    adapter.detach()
    assert "banks" not in model._modules


def test_a_trained_bank_is_saved_once(toys: Toys, tmp_path: Path) -> None:
    model = BEDS["biased"].model()
    adapter = dt.attach(model, "toy_common", where=WHERE, head=None)
    shared = {name: p for name, p in adapter.named_parameters() if name.startswith("bank.")}
    assert sorted(shared) == ["bank.a_32x32", "bank.a_32x48", "bank.a_48x32"]
    assert adapter.params() == 5 * 32 + 48 + 32 * 32 + 2 * 32 * 48
    assert len({id(p) for p in model.parameters() if p.requires_grad}) == len(adapter.parameters())
    model(**BEDS["biased"].batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in shared.values())
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.1 * torch.randn_like(p)
    adapter.save(tmp_path)
    _, tensors = read_adapter(tmp_path)
    assert [name for name in sorted(tensors) if "a_" in name or name.endswith(".a")] == sorted(shared)
    other = BEDS["biased"].model()
    again = dt.load(other, tmp_path)
    assert torch.equal(other(**BEDS["biased"].batch()), model(**BEDS["biased"].batch()))
    assert all(len(at) == 1 for at in storages(again).values())


def test_two_adapters_keep_two_banks(toys: Toys) -> None:
    model = BEDS["biased"].model()
    one, two = (
        dt.attach(model, "toy_shared", where="q", head=None, name=n, seed=i) for i, n in enumerate(("one", "two"))
    )
    assert one.bank is not two.bank
    assert storages(one)[32, 32].isdisjoint(storages(two)[32, 32])
    one.detach()
    model(**BEDS["biased"].batch())


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("method", ["toy_shared", "toy_common"])
def test_a_model_that_runs_its_children(toys: Toys, kind: Any, method: str, tmp_path: Path) -> None:
    """The banks are one more child, which passes on what it gets: the function is that of the layers inside a module."""

    def made(inside: bool) -> Any:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
        children = kind(layers) if kind is nn.ModuleList else kind(*layers)
        return nn.ModuleDict({"at": children}) if inside else children

    def run(model: Any) -> Tensor:
        x = torch.ones(3, 8)
        if isinstance(model, nn.Sequential):
            return model(x)  # type: ignore[no-any-return]
        for layer in model:
            x = layer(x)
        return x

    model, whole = made(False), made(True)
    want, names = run(model), [n for n, _ in model.named_modules()]
    adapter = dt.attach(model, method, where=["0", "2"], head=None)
    torch.manual_seed(0)
    other = dt.attach(whole, method, where=["at.0", "at.2"], head=None)
    for mine, theirs in zip(adapter.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs)
    out = run(model)
    assert torch.equal(out, run(whole["at"])) and not torch.equal(out, want)
    out.square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.save(tmp_path)
    loaded = made(False)
    dt.load(loaded, tmp_path)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(run(loaded), out) and torch.equal(run(twin), out)
    adapter.detach()
    assert torch.equal(run(model), want) and [n for n, _ in model.named_modules()] == names
