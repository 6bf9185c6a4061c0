"""ProPELT across tasks beside its reference's T5; rows of several tasks in one batch, the file, one task alone, a merge."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import deltatune as dt
from deltatune.core import bits
from deltatune.core.method import shared_tensor

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_propelt_tasks.py"))
fill, filled, batch = (MAKE[k] for k in ("fill", "filled", "batch"))
R, TASKS, KEPT, WAYS = (MAKE[k] for k in ("R", "TASKS", "KEPT", "WAYS"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
IDS = torch.arange(TASKS).repeat_interleave(2)
FORMS = {"propelt": {"r": 4}, "propelt_lora": {"r": 4, "keep": 0.4}, "propelt_prefix": {"n": 3, "mid": 4, "keep": 0.4}}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_as_the_reference_computes(way: str) -> None:
    """Logits of rows of three tasks in one batch, and the gradient of every prototype and score; T5's norms are fp32."""
    golden = GOLDEN[way]
    model: Any = filled(T5ForConditionalGeneration(T5Config(**MAKE["sizes"]())))
    adapter = dt.attach(model, "propelt", r=R, keep=KEPT, n_tasks=TASKS, combine=way, head=None)
    found: dict[str, Tensor] = {}
    own: Any
    for own in adapter.deltas.values():
        at = f"{own.site.stack}.{own.site.layer}"
        for word in ("down", "up"):
            found |= {f"{word}.weight": shared_tensor(word, own), f"{word}.bias": shared_tensor(f"{word}_bias", own)}
            scores = getattr(own, f"{word}_score")
            each = {f"{at}.{t}.{word}": scores[t] for t in range(TASKS)} if way == "each" else {f"{at}.{word}": scores}
            found |= each
            if way != "each":
                found |= {f"task.{t}.{word}": shared_tensor(f"{word}_task_score", own)[t] for t in range(TASKS)}
    assert found.keys() == golden["grads"].keys()
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    logits = model(**batch(), task_ids=IDS).logits
    torch.testing.assert_close(logits, exact(golden["logits"]), rtol=0, atol=1e-6)
    loss = (fill("loss", logits.shape) * logits).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=1e-6)
    grads = dict(
        zip(found, torch.autograd.grad(loss, [_base(p) for p in found.values()], retain_graph=True), strict=True)
    )
    for key, want in golden["grads"].items():
        grad = grads[key] if grads[key].shape == found[key].shape else grads[key][_number(key)]
        assert exact(want).any()
        torch.testing.assert_close(grad, exact(want), rtol=0, atol=1e-6)
    alone = [
        model(**{k: v[2 * t : 2 * t + 2] for k, v in batch().items()}, task_ids=IDS[2 * t : 2 * t + 2]).logits
        for t in range(TASKS)
    ]
    torch.testing.assert_close(torch.cat(alone), logits, rtol=0, atol=1e-6)


def _base(p: Tensor) -> Tensor:
    """The tensor that a task's own is a part of."""
    return p if p._base is None else p._base


def _number(key: str) -> int:
    return int(key.split(".")[-2])


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, initializer_range=0.3)).eval()


def attached(form: str, model: Any, **more: Any) -> dt.Adapter:
    torch.manual_seed(1)
    adapter = dt.attach(model, form, head=None, n_tasks=TASKS, **{**FORMS[form], **more})
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return adapter


ROWS = torch.randint(0, 30, (6, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_the_file_holds_bits_of_layers_and_tasks(form: str, way: str, tmp_path: Path) -> None:
    """L + T masks, or L T; loaded it answers the same, and is the same file again."""
    model = bert()
    adapter = attached(form, model, combine=way)
    out = model(input_ids=ROWS, task_ids=IDS).logits
    other = model(input_ids=ROWS, task_ids=IDS.flip(0)).logits
    assert (out - other).abs().max() > 1e-3, "tasks without effect would compare nothing"
    adapter.save(tmp_path / "one")
    loaded = dt.load(twin := bert(), tmp_path / "one", trainable=True)
    assert torch.equal(twin(input_ids=ROWS, task_ids=IDS).logits, out)
    loaded.save(tmp_path / "two")
    one, two = (load_file(tmp_path / at / "adapter.safetensors") for at in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    packed = {k: t for k, t in one.items() if "bits" in k}
    n_sites = len(adapter.deltas)
    n_tensors = {"propelt": 2, "propelt_lora": 2, "propelt_prefix": 1}[form]
    n_roles = 2 if form == "propelt_lora" else 1
    want = n_sites * n_tensors + (n_roles * n_tensors if way != "each" else 0)
    assert len(packed) == want and {t.dtype for t in packed.values()} == {torch.uint8}
    assert {t.ndim for k, t in packed.items() if k.startswith("bank")} == ({2} if way != "each" else set())
    twin(input_ids=ROWS, task_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.parameters())
    assert all(name.startswith("bank.") for name, _ in loaded.named_parameters())
    adapter.save(tmp_path / "all", resumable=True)
    again = dt.load(third := bert(), tmp_path / "all")
    assert again.tree == adapter.tree and torch.equal(third(input_ids=ROWS, task_ids=IDS).logits, out)


@pytest.mark.parametrize("form", FORMS)
def test_one_task_for_all_rows(form: str) -> None:
    """`adapter.set(task=t)` needs no ids, and LoRA's then merges; the trained masks keep their share of each task's scores."""
    model = bert()
    adapter = attached(form, model)
    want = model(input_ids=ROWS, task_ids=torch.full((6,), 2)).logits
    with pytest.raises(ValueError, match=rf"{form} with 3 tasks needs task_ids of shape \(6,\), got none"):
        model(input_ids=ROWS)
    with pytest.raises(ValueError, match=f"task id 3, but {form} has the tasks 0 to 2"):
        model(input_ids=ROWS, task_ids=torch.full((6,), 3))
    if form == "propelt_lora":
        with pytest.raises(ValueError, match="propelt_lora cannot be merged: it defines no fold"):
            adapter.merge()
    adapter.set(task=2)
    torch.testing.assert_close(model(input_ids=ROWS).logits, want, rtol=0, atol=1e-5)
    if form == "propelt_lora":
        adapter.merge()
        torch.testing.assert_close(model(input_ids=ROWS).logits, want, rtol=0, atol=1e-5)
        adapter.unmerge()
    adapter.set(task=None)
    torch.testing.assert_close(model(input_ids=ROWS, task_ids=torch.full((6,), 2)).logits, want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=f"{form}: task = 3, but it has the tasks 0 to 2"):
        adapter.set(task=3)
    d: Any = next(iter(adapter.deltas.values()))
    key = {"propelt": "down_", "propelt_lora": "a_", "propelt_prefix": ""}[form]
    shape = shared_tensor(f"{key}task_score", d).shape[1:]
    masks = d.read(f"{key}task_", shape, TASKS)
    assert [int(m.sum()) for m in masks] == [int(bits.top(m, d.keep).sum()) for m in masks]
    assert masks.shape == (TASKS, *shape)


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_another_tree(form: str, tmp_path: Path) -> None:
    """`dt.saved` of a finished file brings the tasks' masks too, and asks for no seed."""
    attached(form, model := bert()).save(tmp_path)
    want = model(input_ids=ROWS, task_ids=IDS).logits
    torch.manual_seed(3)
    dt.attach(other := bert(), dt.Sum(dt.LoRA(r=2, where="o"), dt.saved(tmp_path)), head=None, seed=4)
    torch.testing.assert_close(other(input_ids=ROWS, task_ids=IDS).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_task_that_was_set_is_that_of_rows_without(form: str) -> None:
    """Rows that bring ids run as these say."""
    adapter = attached(form, model := bert())
    want = model(input_ids=ROWS, task_ids=IDS).logits
    adapter.set(task=1)
    torch.testing.assert_close(model(input_ids=ROWS, task_ids=IDS).logits, want, rtol=0, atol=1e-6)


def test_in_a_weight_all_rows_have_one_task() -> None:
    """Under a method that works on the weight: the call's own task, also in the gradients, and no mixture."""
    model = bert()
    tree = dt.Stack(dt.ProPELTLoRA(r=4, keep=0.4, n_tasks=TASKS, task=0), dt.DoRA(r=2))
    adapter = dt.attach(model, tree, head=None)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    found = []
    for ids, task in ((torch.full((6,), 2), 0), (None, 2)):
        adapter.set(task=task)
        logits = model(input_ids=ROWS, task_ids=ids).logits
        found.append([logits, *torch.autograd.grad(logits.square().sum(), adapter.parameters())])
    adapter.set(task=1)
    assert (model(input_ids=ROWS).logits - found[0][0]).abs().max() > 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"works on the weight here, where all rows of a batch have one task, not \[0, 1, 2\]"
    ):
        model(input_ids=ROWS, task_ids=IDS)


def test_counts_rates_and_places() -> None:
    """Task scores come once for all layers, at the scores' rate; two leaves have their own; a convolution is refused."""
    model = bert()
    adapter = attached("propelt", model, where="block")
    r, d = 4, 16
    assert adapter.params() == (2 * r * d + r + d) + 2 * r * d * (2 + TASKS)
    rates = {id(p): g["lr"] for g in adapter.groups(1e-4) for p in g["params"]}
    for name, p in adapter.named_parameters():
        assert rates[id(p)] == pytest.approx(1e-4 * 30 if "score" in name else 1e-4), name
    adapter.detach()
    tree = dt.Stack(*(dt.ProPELTAdapter(r=4, n_tasks=TASKS, masks="fixed", where="block") for _ in range(2)))
    held = dt.attach(model, tree, head=None).finished()[1]
    assert sum(k.startswith("bank.") and k.count("task_bits") == 1 for k in held) == 4
    with pytest.raises(ValueError, match="n_tasks = 0, but it must be at least 1"):
        dt.attach(bert(), "propelt_lora", n_tasks=0)
    with pytest.raises(ValueError, match="propelt_lora cannot sit on a embedding"):
        dt.attach(bert(), "propelt_lora", n_tasks=2, where="embed")
