"""DyLoRA against its reference repository's layer, at every rank, and the draw of its ranks."""

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.dylora import DyLoRA, Nested

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_dylora.py"))
fill, R, ALPHA, SHAPE = (MAKE[k] for k in ("fill", "R", "ALPHA", "SHAPE"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def attached(**hyper: object) -> tuple[nn.Sequential, dt.Adapter, DyLoRA]:
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.float64))
    options = {"r": R, "alpha": ALPHA, "where": ["0"], "head": None, **hyper}
    adapter = dt.attach(model, "dylora", **options)  # type: ignore[arg-type]
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, DyLoRA)
    with torch.no_grad():
        for key, p in {"w": model[0].weight, "a": delta.a, "b": delta.b}.items():
            p.copy_(fill(key, p.shape))
    return model, adapter, delta


def begun(adapter: dt.Adapter, n_steps: int = 10) -> Nested:
    schedule = adapter.schedule
    assert isinstance(schedule, Nested)
    schedule.begin(torch.optim.SGD(adapter.parameters(), lr=0.0), n_steps)
    return schedule


def rank(delta: DyLoRA) -> int:
    """The drawn one."""
    assert delta.drawn is not None
    scale, last = delta.drawn
    b = int((scale != 0).sum())
    assert last.nonzero().flatten().tolist() == [b - 1]
    return b


def near(have: Tensor | None, want: object) -> None:
    assert have is not None
    torch.testing.assert_close(have, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-11)


def test_as_the_reference_computes_at_every_rank() -> None:
    """The output, and the gradients with and without the frozen mode, on the fast path and on the weight path."""
    x, g = fill("x", (3, SHAPE[1])), fill("g", (3, SHAPE[0]))
    for frozen in (False, True):
        model, adapter, delta = attached(frozen=frozen)
        schedule, left = begun(adapter, 200), {str(b) for b in range(1, R + 1)}
        for step in range(200):
            b = str(rank(delta))
            if b in left:
                want = GOLDEN["ranks"][b]
                for fast in (True, False):
                    delta.has_linear, delta.fast = fast, fast
                    model.zero_grad()
                    out = model(x)
                    near(out.detach(), want["out"])
                    (out * g).sum().backward()
                    for key in ("a", "b"):
                        near(getattr(delta, key).grad, want["frozen" if frozen else "plain"][key])
                left.discard(b)
            schedule.after_step(step)
        assert not left


def test_any_rank_outside_of_training() -> None:
    """As the reference in evaluation; also merged, and in the file."""
    model, adapter, _ = attached()
    x = fill("x", (3, SHAPE[1]))
    for b in range(1, R + 1):
        adapter.set(rank=b)
        near(model(x).detach(), GOLDEN["eval"][str(b)])
        adapter.merge()
        near(model(x).detach(), GOLDEN["eval"][str(b)])
        adapter.unmerge()
    adapter.set(rank=None)
    near(model(x).detach(), GOLDEN["eval"][str(R)])
    for wrong in (0, R + 1):
        with pytest.raises(ValueError, match=f"rank = {wrong}"):
            adapter.set(rank=wrong)


def test_evaluation_amid_training_is_of_the_whole_rank() -> None:
    model, adapter, delta = attached()
    begun(adapter)
    model.eval()
    near(model(fill("x", (3, SHAPE[1]))).detach(), GOLDEN["eval"][str(R)])
    assert delta.drawn is not None


def test_the_draw_is_even_and_of_seed_and_step_alone() -> None:
    seen = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        place = {"0": {"r": 6}, "1": {"r": 6}, "2": {"r": 3, "r_min": 3}}
        adapter = dt.attach(model, "dylora", r_min=2, where=place, head=None, seed=seed)
        schedule, drawn = begun(adapter, 600), []
        for step in range(600):
            torch.rand(3)  # whatever else is drawn
            drawn.append([rank(d) for d in adapter.deltas.values() if isinstance(d, DyLoRA)])
            schedule.after_step(step)
        seen.append(drawn)
    assert seen[0] == seen[1] != seen[2]
    assert all(one == two and three == 3 for one, two, three in seen[0])
    counts = Counter(one for one, *_ in seen[0])
    assert sorted(counts) == [2, 3, 4, 5, 6] and min(counts.values()) > 90


def test_numbers_that_mean_nothing() -> None:
    for hyper, said in (({"rank": 9}, "rank = 9"), ({"r_min": 5}, "r_min = 5"), ({"r_min": 0}, "r_min = 0")):
        with pytest.raises(ValueError, match=said):
            attached(**hyper)
