"""ATTEMPT against its reference repository on T5, for one task and for two; its sources, padding, labels and generation."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from soft import D as WIDTH
from soft import check_generate, check_padding, logits, model_of, moved, near, rows
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_attempt.py"))
backbone, fill, start = (MAKE[k] for k in ("backbone", "fill", "start"))
D, N, SOURCES, R, TASKS = (MAKE[k] for k in ("D", "N", "SOURCES", "R", "TASKS"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def saved(model: nn.Module, tmp_path: Path, n_sources: int = 2, n: int = 4, **hyper: Any) -> list[str]:
    """Folders of prompts on this backbone."""
    folders = []
    for i in range(n_sources):
        adapter = dt.attach(model, "prompt_tuning", n=n, head=None, **hyper)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(fill(f"source {i}", p.shape))
        folders.append(str(tmp_path / f"{n}-{i}"))
        adapter.save(folders[-1])
        adapter.detach()
    return folders


def attached(model: nn.Module, tmp_path: Path, n: int = 4, **hyper: Any) -> dt.Adapter:
    """Over two sources, its attention uneven."""
    folders = saved(model, tmp_path, n=n)
    return dt.attach(model, "attempt", sources=folders, n=n, r=8, temperature=0.02, head=None, **hyper)


def delta_of(adapter: dt.Adapter) -> Any:
    return next(iter(adapter.deltas.values()))


@pytest.mark.parametrize(("kind", "n_tasks"), [("single", 1), ("multi", 2)])
def test_as_the_reference_computes(kind: str, n_tasks: int, tmp_path: Path) -> None:
    """Logits, and the gradients of the prompts, of the shared network and its norm."""
    golden, model = GOLDEN[kind], backbone()
    folders = saved(model, tmp_path, SOURCES, N)
    hyper = {"n": N, "r": R, "n_tasks": n_tasks, "temperature": MAKE["TEMPERATURE"]}
    delta = delta_of(dt.attach(model, "attempt", sources=folders, head=None, **hyper))
    with torch.no_grad():
        for key, value in start(n_tasks).items():
            getattr(delta, key).copy_(value)
    given = {"task_ids": torch.tensor(TASKS)} if n_tasks > 1 else {}
    prompts = MAKE["looked_at"](model)
    seen = model(**MAKE["rows"](), **given).logits
    torch.testing.assert_close(prompts[0], exact(golden["prompts"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(seen, exact(golden["logits"]), rtol=0, atol=1e-6)  # T5's norms and softmax are fp32
    assert (seen - exact(GOLDEN["bare"])).abs().max() > 0.05
    loss = (fill("loss", seen.shape).double() * seen).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=1e-6)
    loss.backward()
    for key, want in golden["grads"].items():
        grad = getattr(delta, key).grad
        part = grad[:8] if key == "down" else grad[..., :8] if key == "up" else grad
        torch.testing.assert_close(part, exact(want), rtol=0, atol=1e-6)
    assert delta.frozen.grad is None


def test_sources_and_counts(tmp_path: Path) -> None:
    """The sources stand frozen in the file, the new prompt begins as the first; d (n + 2 r + 2) are trained, as the paper says."""
    model = backbone()
    folders = saved(model, tmp_path, 2, 3)
    adapter = dt.attach(model, "attempt", sources=folders, n=3, n_tasks=2, head=None)
    delta = delta_of(adapter)
    want = torch.stack([fill(f"source {i}", (3, D)) for i in range(2)])
    assert delta.n_sources == 2 and torch.equal(delta.frozen.float(), want) and not delta.frozen.requires_grad
    assert torch.equal(delta.prompt.detach().float(), want[:1].expand(2, -1, -1))
    assert adapter.params() == D * (2 * 3 + 2 * 100 + 2)
    assert 768 * (100 + 2 * 100 + 2) == 231_936, "the 232K of T5-base in the paper's tables"
    assert GOLDEN["config"]["temperature"] == pytest.approx(delta.temperature, rel=1e-3)
    assert delta.temperature == math.e
    moved(adapter)
    batch = MAKE["rows"]() | {"task_ids": torch.tensor([0, 1])}
    seen = logits(model, **batch)
    adapter.save(tmp_path / "mine")
    for folder in folders:
        for file in Path(folder).iterdir():
            file.unlink()
    other = backbone()
    assert torch.equal(delta_of(dt.load(other, tmp_path / "mine")).frozen, delta.frozen)
    assert torch.equal(logits(other, **batch), seen)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding(kind: str, tmp_path: Path) -> None:
    check_padding(kind, lambda model: attached(model, tmp_path))


@pytest.mark.parametrize(("kind", "n_tasks"), [("llama", 1), ("t5", 1), ("llama", 2), ("t5", 2)])
def test_generation(kind: str, n_tasks: int, tmp_path: Path) -> None:
    own = {"task_ids": torch.tensor([0, 1, 1])} if n_tasks > 1 else {}
    check_generate(kind, lambda model: attached(model, tmp_path, n_tasks=n_tasks), **own)


def test_rows_have_prompts_of_their_own(tmp_path: Path) -> None:
    """Without padding too: what is asked for, the answer's tokens, moves no prompt on a causal stack."""
    model = model_of("llama")
    delta = delta_of(moved(attached(model, tmp_path)))
    seen: list[Tensor] = []
    type(delta).prompts, plain = lambda self, *a: seen.append(plain(self, *a)) or seen[-1], type(delta).prompts
    try:
        ids, labels = rows(2), rows(2).clone()
        labels[:, :4] = -100
        logits(model, input_ids=ids, labels=labels)
        logits(model, input_ids=torch.cat([ids[:, :4], ids[:, 4:].roll(1, 1)], 1), labels=labels)
        logits(model, input_ids=ids)
    finally:
        type(delta).prompts = plain
    one, other, whole = seen
    assert torch.equal(one, other) and (one[0] - one[1]).abs().max() > 1e-3
    assert (one - whole).abs().max() > 1e-3
    with pytest.raises(ValueError, match="row 0 has no token that is given"):
        model(rows(2), labels=rows(2))


def test_what_it_refuses(tmp_path: Path) -> None:
    """A source of another length, another place or another method; a missing task."""
    model = model_of("t5")
    folders = saved(model, tmp_path, n=4)
    with pytest.raises(ValueError, match=rf"4 tokens of width {WIDTH}, and attempt at encoder has 7 of width {WIDTH}"):
        dt.attach(model, "attempt", sources=folders, n=7, head=None)
    there = saved(model, tmp_path / "decoder", 1, 4, side="decoder")
    with pytest.raises(ValueError, match="no prompt in front of encoder"):
        dt.attach(model, "attempt", sources=there, n=4, head=None)
    with pytest.raises(ValueError, match="give it sources"):
        dt.attach(model, "attempt", n=4, head=None)
    assert "deltas" not in model.encoder._modules
    adapter = dt.attach(model, "attempt", sources=folders, n=4, n_tasks=3, head=None)
    with pytest.raises(ValueError, match=r"attempt with 3 tasks needs task_ids of shape \(3,\)"):
        model(input_ids=rows(), decoder_input_ids=rows()[:, :2])
    ids = torch.tensor([0, 1, 2])
    out = logits(model, input_ids=rows(), decoder_input_ids=rows()[:, :2], task_ids=ids)
    near(
        out, logits(model, input_ids=rows(), decoder_input_ids=rows()[:, :2], task_ids=ids.flip(0))
    )  # one start for all
    moved(adapter)
    out = logits(model, input_ids=rows(), decoder_input_ids=rows()[:, :2], task_ids=ids)
    other = logits(model, input_ids=rows(), decoder_input_ids=rows()[:, :2], task_ids=ids.flip(0))
    near(out[1], other[1])
    assert (out[0] - other[0]).abs().max() > 1e-3
