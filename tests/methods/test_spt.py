"""SPT's choice of what trains against its reference code's."""

import functools
import json
import runpy
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.sparse import deltas_of, opened
from deltatune.methods.spt import chosen

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_spt.py"))
Blocks, gradient, BATCHES = MAKE["Blocks"], MAKE["gradient"], MAKE["BATCHES"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SETTINGS, SWEEP = GOLDEN["settings"], GOLDEN["sweep"]
R, ALPHA, BETA = SETTINGS["low_rank_dim"], SETTINGS["alpha"], SETTINGS["beta"]
CLASS_TOKEN = 768  # what the reference adds to every count


@functools.cache
def squares() -> dict[str, Tensor]:
    """Each parameter's sum of squared gradients."""
    shapes = {n: p.shape for n, p in Blocks().named_parameters()}
    total = {n: torch.zeros(shape) for n, shape in shapes.items()}
    for n, shape in shapes.items():
        for i in range(BATCHES):
            total[n] += gradient(n, shape, i) ** 2
    return total


def parts() -> dict[str, tuple[Tensor, float, float]]:
    found = {}
    for name, s in squares().items():
        cost = len(s) if s.ndim == 1 else R * sum(s.shape)
        found[name] = (s, cost, cost / (BETA if s.ndim == 1 else ALPHA))
    return found


@pytest.mark.parametrize("budget", SWEEP)
def test_the_choice_is_the_references(budget: str) -> None:
    """On its grid of 20,000 more sensitive entries a step: matrices, vectors, and every single position."""
    taus = [int(np.ceil(j * 0.02 * 1e6)) for j in range(1, 80)]
    want = SWEEP[budget]
    found, whole = chosen(parts(), taus, float(budget) * 1e6 - CLASS_TOKEN)
    vectors = [n for n, s in squares().items() if s.ndim == 1]
    assert {n for n in whole if n not in vectors} == set(want["matrices"])
    assert {n for n in whole if n in vectors} == set(want["vectors"])
    counts = {n: len(at) for n, at in found.items() if n not in whole}
    assert counts == want["counts"]
    places = b"".join(found[n].numpy().astype(np.int64).tobytes() for n in want["counts"])
    assert zlib.crc32(places) == want["crc"]


def attached(model: nn.Module, **hyper: Any) -> dt.Adapter:
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    return dt.attach(model, "spt", where=names, head=None, **hyper)


class Summed(nn.Module):
    """A loss through the layers, of the gradients that `gradient` says."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks().blocks[:1]

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        h = block.norm1(x)
        h = x + block.attn["proj"](torch.tanh(block.attn["q"](h)) * block.attn["k"](h) + block.attn["v"](h))
        return h + block.mlp["fc2"](torch.relu(block.mlp["fc1"](block.norm2(h))))


def data(i: int) -> Tensor:
    return torch.randn(5, MAKE["WIDTH"], generator=torch.Generator().manual_seed(i))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def test_calibrated() -> None:
    """Squares of whole batches' gradients, the budget of `keep`; and it trains what the choice says, from the base's function."""
    torch.manual_seed(0)
    model = Summed()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(3):
        for (n, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss(model, data(i)), list(model.parameters())), strict=True
        ):
            total[n] += g**2
    want = model(data(9)).detach()
    n_all = sum(p.numel() for p in model.parameters())
    budget = round(0.1 * n_all)
    adapter = attached(model, keep=0.1, n_batches=3)
    adapter.calibrate([data(i) for i in range(5)], loss)
    spec = {}
    for n, s in total.items():
        cost = len(s) if s.ndim == 1 else R * sum(s.shape)
        spec[n] = (s, cost, cost / (5.0 if s.ndim == 1 else 10.0))
    found, whole = chosen(spec, [int(np.ceil(j * budget / 50)) for j in range(1, 80)], budget)
    n_whole, n_single = sum(spec[n][1] for n in whole), sum(len(at) for n, at in found.items() if n not in whole)
    assert adapter.params() == n_whole + n_single and abs(adapter.params() - budget) < 0.2 * budget
    assert sum(n.startswith("blocks.0.attn") or "mlp" in n for n in whole) > 0 and n_single
    structured = {f"{site}.weight" for (_, site), d in adapter.deltas.items() if isinstance(d, dt.SPT) and d.a.numel()}
    assert structured == {n for n in whole if total[n].ndim == 2} and structured
    torch.testing.assert_close(model(data(9)), want, rtol=0, atol=1e-5)
    for p in adapter.parameters():
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p))
    moved = model(data(9)).detach()
    assert float((moved - want).abs().max()) > 0.1
    adapter.merge()
    torch.testing.assert_close(model(data(9)), moved, rtol=1e-4, atol=1e-4)
    adapter.unmerge()


def test_again_from_one_seed(tmp_path: Path) -> None:
    """The updates' start is the adapter's seed's, and a file brings all shapes."""
    torch.manual_seed(0)
    model = Summed()
    adapter = attached(model, keep=0.1, seed=4)
    adapter.calibrate([data(0)], loss)
    first = {n: t.clone() for n, t in adapter.state_dict().items()}
    torch.manual_seed(5)
    adapter.calibrate([data(0)], loss)
    assert all(torch.equal(first[n], t) for n, t in adapter.state_dict().items())
    adapter.save(tmp_path)
    adapter.detach()
    again = dt.load(model, tmp_path)
    assert all(torch.equal(first[n], t) for n, t in again.state_dict().items())


BAD = [({"ratio": 0.0}, r"ratio = 0\.0"), ({"n_batches": 0}, "n_batches = 0"), ({"r": 4096}, "r = 4096")]


@pytest.mark.parametrize(("hyper", "said"), BAD)
def test_bad_hyperparameters(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attached(Summed(), **hyper)


def test_choosing_seeds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates are drawn on the CPU; a GPU's generator, which draws the training's dropout, is not set back."""
    adapter = attached(Summed(), keep=0.1)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    schedule: Any = adapter.schedule
    with opened(deltas_of(schedule)) as values:
        scores = {name: torch.rand(v.shape) for name, v in values.items()}
    before = torch.get_rng_state()
    schedule.choose(scores)
    assert torch.equal(torch.get_rng_state(), before) and not seeded
    assert any(d.a.numel() for d in deltas_of(schedule).values())
