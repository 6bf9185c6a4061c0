"""HyperFormer and HyperFormer++ against the reference's modules on a T5: states and gradients; counts, tasks by row."""

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from soft import check_generate, check_padding, logits, model_of, moved, near, padded, rows
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_hyperformer.py"))
fill, backbone, states = MAKE["fill"], MAKE["backbone"], MAKE["states"]
R, TASKS, SIZES, STACKS, LAYERS = MAKE["R"], MAKE["TASKS"], MAKE["SIZES"], MAKE["STACKS"], MAKE["LAYERS"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
METHODS = ("hyperformer", "hyperformer++")
IDS = torch.tensor([2, 0, 1])
SMALL: dict[str, Any] = {"n_tasks": TASKS, "r": 3, **SIZES}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def put(model: Any, method: str, **hyper: Any) -> dt.Adapter:
    return dt.attach(model, method, head=None, **SMALL | hyper)


def by_reference(adapter: dt.Adapter) -> dict[str, list[Tensor]]:
    """Key in the golden file -> our tensors, which are its rows where there are several."""
    found: dict[str, list[Tensor]] = {}
    for _, delta in sorted(adapter.deltas.items()):
        site, one = delta.site, delta.name == "hyperformer"
        for key in delta.slots_of(delta.config):
            at = "" if key == "task" or one else f"{site.stack}."
            at = f"{site.stack}.{site.layer}.{site.role}." if one and key.startswith("maker") else at
            of_many = {"layer": "layers", "place": "places"}.get(key)
            tensor = delta.bank_parameter(key) if delta.slots[key].shared else getattr(delta, key)
            parts = found.setdefault(f"{at}{of_many or key}", [])
            if all(tensor is not part for part in parts):
                parts.append(tensor)
    for stack in STACKS:
        if f"{stack}.places" in found:
            found[
                f"{stack}.places"
            ].reverse()  # the reference's first is the MLP's, in order of name ours is attention's
    return found


@pytest.mark.parametrize("method", METHODS)
def test_as_the_reference_computes(method: str) -> None:
    """One batch with a row of each task; the reference ran three."""
    golden, model = GOLDEN[method], backbone()
    torch.testing.assert_close(states(model), exact(GOLDEN["bare"]), rtol=0, atol=1e-9)
    found = by_reference(put(model, method, r=R))
    assert found.keys() == golden["probes"].keys()
    shapes = {k: parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape) for k, parts in found.items()}
    with torch.no_grad():
        for key, parts in found.items():
            value = fill(key, shapes[key])
            for p, piece in zip(parts, value[None] if len(parts) == 1 else value, strict=True):
                p.copy_(piece)
    seen = states(model, task_ids=torch.arange(TASKS))
    torch.testing.assert_close(seen, exact(golden["states"]), rtol=0, atol=1e-9)
    assert (seen - exact(GOLDEN["bare"])).abs().max() > 0.1
    loss = (fill("loss", seen.shape) * seen).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=1e-9)
    loss.backward()
    for key, parts in found.items():
        grads = [part.grad for part in parts]
        assert all(grad is not None and grad.any() for grad in grads), key
        whole = torch.stack(grads).view(shapes[key])  # type: ignore[arg-type]
        got = float((fill(f"probe of {key}", shapes[key]) * whole).sum())
        assert got == pytest.approx(golden["probes"][key], abs=1e-9), key


def test_the_start_is_the_reference_s() -> None:
    adapter = put(model_of("bert"), "hyperformer++", d_task=256, d_hidden=128, d_code=64, r=8)
    delta = next(iter(adapter.deltas.values()))
    for key, (mean, std) in GOLDEN["start"].items():
        tensor = delta.bank_parameter(key).detach()
        spread = max(std, 1e-12)
        assert float(tensor.std()) == pytest.approx(std, rel=0.2, abs=1e-12), key
        assert abs(float(tensor.mean()) - mean) <= 6 * spread / tensor.numel() ** 0.5 + abs(mean) * (std > 0), key


COUNTS: Mapping[str, Callable[[int, int, int], int]] = {
    # (numbers of one adapter, places, stacks)
    "hyperformer": lambda n, places, stacks: n * 65 * places + 8 * 64 + 128 * 65 + 64 * 129,
    "hyperformer++": lambda n, places, stacks: (
        8 * 64 + stacks * (n * 65 + 128 * (3 * 64 + 1) + 64 * 129 + 2 * 64 + (places // stacks // 2 + 2) * 64)
    ),
}


@pytest.mark.parametrize(("method", "times", "percent"), [("hyperformer", 1.54, 6.86), ("hyperformer++", 1.02, 0.29)])
def test_the_paper_s_counts(method: str, times: float, percent: float) -> None:
    """Of T5-base on GLUE's eight tasks, reduction 32: all parameters as a multiple, those trained per task in percent.

    The paper trains T5's own norms beside it, 47,616 numbers.
    """
    with torch.device("meta"):
        config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
        model = T5ForConditionalGeneration(config)
    n_base = sum(p.numel() for p in model.parameters())
    adapter = dt.attach(model, method, n_tasks=8, head=None)
    assert adapter.params() == COUNTS[method](2 * 24 * 768 + 24 + 3 * 768, 48, 2)
    assert 1 + adapter.params() / n_base == pytest.approx(times, abs=0.01)
    assert (adapter.params() + 47_616) / n_base / 8 * 100 == pytest.approx(percent, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_one_hypernetwork_for_what_the_paper_says(method: str) -> None:
    model = model_of("t5")
    adapter = put(model, method)
    names = [name for name, _ in adapter.named_parameters() if "maker" in name and "bias" not in name]
    assert len(names) == (2 * LAYERS * 2 if method == "hyperformer" else 2)
    assert sum(name.startswith("bank.task") for name, _ in adapter.named_parameters()) == 1
    assert not any("EncDecAttention" in site for _, site in adapter.deltas), "the paper has none behind cross-attention"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_each_row_has_its_task(kind: str, method: str, tmp_path: Path) -> None:
    """Rows of a batch are those of three batches of one task each, also after a save and a load."""
    model = model_of(kind)
    adapter = moved(put(model, method))
    given = padded(kind) | ({"decoder_input_ids": rows()[:, :4]} if kind == "t5" else {})
    got = logits(model, **given, task_ids=IDS)
    for row, task in enumerate(IDS.tolist()):
        near(got[row], logits(model, **given, task_ids=torch.full((3,), task))[row])
    assert (got - logits(model, **given, task_ids=IDS.roll(1))).abs().max() > 0.05
    adapter.save(tmp_path)
    other = model_of(kind)
    dt.load(other, tmp_path)
    assert torch.equal(logits(other, **given, task_ids=IDS), got)


@pytest.mark.parametrize(
    ("kind", "method"), [("bert", "hyperformer"), ("llama", "hyperformer++"), ("t5", "hyperformer++")]
)
def test_padding(kind: str, method: str) -> None:
    check_padding(kind, lambda model: put(model, method), task_ids=IDS)


@pytest.mark.parametrize(("kind", "method"), [("llama", "hyperformer"), ("t5", "hyperformer++")])
def test_generate(kind: str, method: str) -> None:
    check_generate(kind, lambda model: put(model, method), task_ids=IDS)


@pytest.mark.parametrize("method", METHODS)
def test_what_it_refuses(method: str) -> None:
    model = model_of("bert")
    put(model, method)
    site = "layer.0.attention.output.dense"
    with pytest.raises(ValueError, match=rf"{site}: task id 3, but {method.replace('+', '.')} has the tasks 0 to 2"):
        model(**padded(), task_ids=torch.tensor([0, 3, 1]))
    with pytest.raises(ValueError, match=rf"{site}: .* with 3 tasks needs task_ids of shape \(3,\), got none"):
        model(**padded())
    with pytest.raises(ValueError, match=rf"{site}: .*r = 33, but it must lie between 1 and d_out = 32"):
        put(model_of("bert"), method, r=33)
    with pytest.raises(ValueError, match=rf"{site}: .*n_tasks = 0"):
        put(model_of("bert"), method, n_tasks=0)


def test_one_task_needs_no_ids() -> None:
    model = model_of("llama")
    moved(put(model, "hyperformer++", n_tasks=1))
    assert torch.equal(logits(model, **padded()), logits(model, **padded(), task_ids=torch.zeros(3, dtype=torch.long)))
