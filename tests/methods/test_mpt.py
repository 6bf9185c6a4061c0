"""mpt: HF PEFT's multitask prompt tuning on equal weights, rows of several tasks in one batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig, get_peft_model
from soft import D, check_generate, check_padding, logits, model_of, moved, near, padded, rows
from torch import Tensor

import deltatune as dt

N, TASKS = 5, 4
IDS = torch.tensor([2, 0, 3])


def mpt(model: Any, **hyper: Any) -> dt.Adapter:
    """Four tasks of rank 2; away from the start, where every prompt is nearly 0."""
    return dt.attach(model, "mpt", **{"n": N, "n_tasks": TASKS, "r": 2, "head": None} | hyper)


def given(kind: str) -> dict[str, Tensor]:
    return padded(kind) | ({"decoder_input_ids": rows()[:, :4]} if kind == "t5" else {})


def test_hf_peft() -> None:
    """Outputs and every gradient of a batch with three tasks, padded on either side."""
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, num_tasks=TASKS, num_ranks=2)
    other = get_peft_model(model_of("llama"), config).eval()
    theirs = other.prompt_encoder["default"]
    pairs = {"prompt": theirs.embedding.weight, "u": theirs.prefix_task_cols, "v": theirs.prefix_task_rows}
    model = model_of("llama")
    adapter = mpt(model)
    own = {name.rpartition(".")[2]: p for name, p in adapter.named_parameters()}
    assert own.keys() == pairs.keys()
    with torch.no_grad():
        for p in (theirs.prefix_task_cols, theirs.prefix_task_rows):
            p.mul_(50.0)
        for name, p in own.items():
            p.copy_(pairs[name])
    batch = padded()
    want = other(**batch, task_ids=IDS).logits[:, N:]
    got = model(**batch, task_ids=IDS).logits
    near(got, want)
    near(model(**batch, task_ids=IDS.roll(1)).logits, other(**batch, task_ids=IDS.roll(1)).logits[:, N:])
    assert (got - model(**batch, task_ids=IDS.roll(1)).logits).abs().max() > 0.05
    real = batch["attention_mask"].bool()
    for out in (want, got):
        out[real].square().mean().backward()
    for name, p in own.items():
        near(p.grad, pairs[name].grad, 1e-4)  # type: ignore[arg-type]
    assert own["u"].grad is not None and not own["u"].grad[1].any(), "task 1 has no row"


def test_the_start_is_hf_peft_s() -> None:
    """P ~ N(0, 1), U and V ~ N(0, 0.02^2): by the spreads of HF PEFT's own."""
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=200, num_tasks=30, num_ranks=2)
    theirs = get_peft_model(model_of("llama"), config).prompt_encoder["default"]
    own = {n.rpartition(".")[2]: p for n, p in mpt(model_of("llama"), n=40, n_tasks=30).named_parameters()}
    pairs = {"prompt": theirs.embedding.weight, "u": theirs.prefix_task_cols, "v": theirs.prefix_task_rows}
    for name, want in pairs.items():
        assert own[name].std().item() == pytest.approx(want.std().item(), rel=0.1)
        assert abs(own[name].mean().item()) < 0.1 * want.std().item()


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_each_row_has_its_task(kind: str) -> None:
    """A row of task k is what prompt_tuning with P o (U_k V_k) makes of it."""
    model = model_of(kind)
    adapter = moved(mpt(model))
    got = logits(model, **given(kind), task_ids=IDS)
    (delta,) = adapter.deltas.values()
    parts: Any = delta
    for row, task in enumerate(IDS.tolist()):
        flat = model_of(kind)
        (prompt,) = dt.attach(flat, "prompt_tuning", n=N, head=None).parameters()
        with torch.no_grad():
            prompt.copy_(parts.prompt * (parts.u[task] @ parts.v[task]))
        near(got[row], logits(flat, **given(kind))[row])


def test_what_is_no_task_is_refused() -> None:
    model = model_of("llama")
    mpt(model)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"model: task id {wrong}, but mpt has the tasks 0 to 3"):
            model(**padded(), task_ids=torch.tensor([0, wrong, 1]))
    with pytest.raises(ValueError, match=r"model: mpt with 4 tasks needs task_ids of shape \(3,\), got none"):
        model(**padded())
    with pytest.raises(ValueError, match=r"needs task_ids of shape \(3,\), got \(2,\)"):
        model(**padded(), task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="task id 7"):
        model.generate(**padded(), max_new_tokens=1, task_ids=torch.tensor([0, 7, 1]))


def test_one_task_needs_no_ids() -> None:
    model = model_of("llama")
    moved(mpt(model, n_tasks=1))
    assert torch.equal(logits(model, **padded()), logits(model, **padded(), task_ids=torch.zeros(3, dtype=torch.long)))


def test_a_backbone_by_itself() -> None:
    """The attached model is its own backbone: no forward around it keeps the call."""
    whole, bare = model_of("llama"), model_of("llama").model
    for model in (whole, bare):
        torch.manual_seed(1)
        moved(mpt(model))
    want = whole(**padded(), task_ids=IDS, output_hidden_states=True).hidden_states[-1]
    near(bare(**padded(), task_ids=IDS).last_hidden_state, want)


def test_beside_a_prompt_for_all() -> None:
    """(1, n, d) and (B, n, d) meet: a prompt of all rows in front of each row's own."""
    model = model_of("llama")
    tree = dt.Sum(dt.PromptTuning(n=2), dt.MPT(n=N, n_tasks=TASKS, r=2))
    adapter = moved(dt.attach(model, tree))
    got = logits(model, **padded(), task_ids=IDS)
    parts: dict[str, Any] = {path: delta for (path, _), delta in adapter.deltas.items()}
    flat = model_of("llama")
    (prompt,) = dt.attach(flat, "prompt_tuning", n=2 + N).parameters()
    with torch.no_grad():
        own = parts["1"].prompt * (parts["1"].u[IDS[1]] @ parts["1"].v[IDS[1]])
        prompt.copy_(torch.cat([parts["0"].prompt, own]))
    near(got[1], logits(flat, **padded())[1])


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding(kind: str) -> None:
    check_padding(kind, mpt, task_ids=IDS)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate(kind: str) -> None:
    """Also with beams, whose rows keep their prompt's task; T5's encoder runs outside the model's own forward."""
    check_generate(kind, mpt, task_ids=IDS)
    model = model_of(kind)
    moved(mpt(model))
    options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    one, other = (model.generate(**padded(kind), task_ids=ids, **options) for ids in (IDS, IDS.roll(1)))
    assert not torch.equal(one, other)
    assert model.__dict__["_deltatune"].frame.call is None
    dt.adapters(model)["default"].detach()
    with pytest.raises(ValueError, match="task_ids"):
        model.generate(**padded(kind), task_ids=IDS, **options)


def test_save(tmp_path: Path) -> None:
    """Counts: n d for all and r (n + d) for each task; the file holds all of it."""
    model = model_of("llama")
    adapter = moved(mpt(model))
    assert adapter.params() == N * D + TASKS * 2 * (N + D)
    adapter.save(tmp_path)
    other = model_of("llama")
    dt.load(other, tmp_path)
    assert torch.equal(logits(other, **padded(), task_ids=IDS), logits(model, **padded(), task_ids=IDS))


@pytest.mark.parametrize(
    ("begin", "theirs"),
    [("average", "AVERAGE_SOURCE_TASKS"), ("task", "EXACT_SOURCE_TASK"), ("shared", "ONLY_SOURCE_SHARED")],
)
def test_a_target_task_starts_as_in_hf_peft(begin: str, theirs: str, tmp_path: Path) -> None:
    """From a saved mpt of four tasks: its mean task, its task 2, or its prompt alone."""
    source = model_of("llama")
    adapter = moved(mpt(source))
    adapter.save(tmp_path / "ours")
    own = {name.rpartition(".")[2]: p.detach() for name, p in adapter.named_parameters()}
    torch.save(
        {"prompt_embeddings": own["prompt"], "prefix_task_cols": own["u"], "prefix_task_rows": own["v"]},
        tmp_path / "theirs.bin",
    )
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, num_tasks=1, num_ranks=2, prompt_tuning_init=theirs,
        prompt_tuning_init_state_dict_path=str(tmp_path / "theirs.bin"), prompt_tuning_init_task=2,
    )  # fmt: skip
    want = get_peft_model(model_of("llama"), config).prompt_encoder["default"]
    target = mpt(model_of("llama"), n_tasks=1, begin=begin, task=2, sources=[tmp_path / "ours"])
    got = {name.rpartition(".")[2]: p for name, p in target.named_parameters()}
    assert torch.equal(got["prompt"], want.embedding.weight)
    if begin == "shared":
        assert got["u"].abs().max() < 0.15 < own["u"].abs().max()
    else:
        near(got["u"], want.prefix_task_cols)
        near(got["v"], want.prefix_task_rows)


def test_factors_have_a_rate_of_their_own() -> None:
    adapter = mpt(model_of("llama"), task_lr=4 / 3)
    rates = {id(p): g["lr"] for g in adapter.groups(0.3) for p in g["params"]}
    got = {name.rpartition(".")[2]: rates[id(p)] for name, p in adapter.named_parameters()}
    assert got == {"prompt": pytest.approx(0.3), "u": pytest.approx(0.4), "v": pytest.approx(0.4)}


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    model = model_of("llama")
    mpt(model).save(tmp_path / "mpt")
    dt.adapters(model)["default"].detach()
    dt.attach(model, "prompt_tuning", n=N).save(tmp_path / "prompt")
    dt.adapters(model)["default"].detach()
    for sources, hyper, said in (
        ([tmp_path / "prompt"], {}, "holds 'prompt_tuning', and what is asked for is made of 'mpt'"),
        ([tmp_path / "mpt"], {"n": N + 1}, r"prompt of .*mpt is \(5, 32\), here \(6, 32\)"),
        ([tmp_path / "mpt"], {"begin": "task", "task": 4}, "task = 4, but .*mpt has the tasks 0 to 3"),
        ([tmp_path / "mpt"] * 2, {}, "2 were given"),
        ([], {}, "sources is empty"),
        (str(tmp_path), {}, "must be a list of folders"),
        ([tmp_path / "nowhere"], {}, "is no adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            mpt(model, sources=sources, **hyper)
        assert not dt.adapters(model)
    with pytest.raises(ValueError, match="lora is not made of saved adapters"):
        dt.attach(model, "lora", sources=[tmp_path / "mpt"])
