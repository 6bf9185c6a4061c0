"""A loop that is broken off and taken up again, at every step, ends where the unbroken one ends, bit for bit."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import deltatune as dt
from deltatune.train.trainer import AdapterTrainer

N_STEPS, N_MICRO = 9, 2
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "dropout": 0.1},
    "adalora": {"r": 6, "target": 2, "warmup": 2, "final": 3, "interval": 2, "where": "q,v,mlp.up"},
    "child_tuning_d": {"p": 0.2},
    "child_tuning_f": {"p": 0.4},
    "lora_prune": {"r": 4, "warmup": 0.2, "final": 0.3, "interval": 2},
    "propelt": {"r": 4, "keep": 0.5},
    "propelt_prefix": {"n": 3, "mid": 6, "keep": 0.3},
    "xprompt": {"n": 4, "pieces": 4, "tune": 2, "score": 2},
    "dylora": {"r": 4, "r_min": 2, "dropout": 0.1},
    "increlora": {"target": 3, "top": 2, "warmup": 1.0, "interval": 1.0, "where": "q,v,mlp.up", "dropout": 0.1},
    "sora": {"r": 4, "xi": 0.02, "last_xi": 0.1, "stages": 3},
    "delta_lora": {"r": 4, "start": 3.0},
    "periodic_lora": {"r": 3, "stages": 4, "dropout": 0.1},
    "aflora": {"r": 4, "window": 2, "warmup": 1.0, "final": 2.0, "where": "q,mlp"},
    "lora_sp": {"r": 4},
    "u_bitfit": {"keep": 0.2, "search": 6, "rounds": 3},
    "s_bitfit": {"keep": 0.2, "search": 6, "rounds": 3},
    "u_mam": {"n": 3, "r": 4, "keep": 0.2, "search": 6, "rounds": 3},
    "s_mam": {"n": 3, "r": 4, "keep": 0.2, "search": 6, "rounds": 3},
    "diff_pruning": {"keep": 0.05, "dense": 4, "penalty": 1e-3, "start": 1.0, "gate_lr": 20.0},
    "far": {"keep": 0.3, "prime": 3},
    "shira": {"keep": 0.1},
    "fish_mask": {"keep": 0.05},
    "sam": {"keep": 0.05},
    "lt_sft": {"keep": 0.05, "iterations": 2, "l1_dense": 0.1, "l1_sparse": 0.1},
    "spt": {"keep": 0.2, "r": 2},
    "oft": {"block": 4, "eps": 0.05},
    "pissa": {"r": 4, "dropout": 0.1},
    "lora_plus": {"r": 4, "bias": True},
    "adamix": {"r": 4, "n_experts": 3},
    "sparse_adapter": {"r": 4, "keep": 0.3},
    "adamix_lora": {"r": 4, "n_experts": 3, "consistency": 10.0},
    "lora_fa": {"r": 4, "corrected": True},
}


def base() -> PreTrainedModel:
    """The same model in every process; its dropout is random."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def batch(step: int, micro: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(0, 20, (4, 6), generator=generator)
    return {"input_ids": ids, "labels": (ids.sum(1) % 2)}


def optimiser(adapter: dt.Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.groups(1e-2, weight_decay=0.1))


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, schedules: dt.Schedules, first: int, last: int) -> None:
    """Steps `first` to `last`, without it. Dropout is a matter of the step alone."""
    for step in range(first, last):
        torch.manual_seed(1000 + step)
        for micro in range(N_MICRO):
            (model(**batch(step, micro)).loss / N_MICRO).backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()


def started(method: str) -> tuple[nn.Module, dt.Adapter, torch.optim.Optimizer, dt.Schedules]:
    model = base()
    torch.manual_seed(1)
    adapter = dt.attach(model, method, **METHODS[method])
    schedules = dt.Schedules([adapter])
    schedules.calibrate(lambda: [batch(-1, i) for i in range(3)], lambda m, rows: m(**rows).loss)
    optimizer = optimiser(adapter)
    schedules.begin(optimizer, N_STEPS, N_MICRO)
    return model, adapter, optimizer, schedules


def left(model: nn.Module, adapter: dt.Adapter, optimizer: Any, schedules: dt.Schedules) -> dict[str, Any]:
    """All that a run leaves, flat."""
    found: dict[str, Any] = {f"adapter {n}": p.detach().clone() for n, p in adapter.named_parameters()}
    found |= {f"file {n}": t.clone() for n, t in adapter.state_dict().items()}
    found |= {f"finished {n}": t.clone() for n, t in adapter.finished()[1].items()}
    found |= {f"base {n}": p.detach().clone() for n, p in model.named_parameters() if "deltas" not in n}

    def flat(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                flat(f"{name} {key}", one)
        elif isinstance(value, list):
            for i, one in enumerate(value):
                flat(f"{name} {i}", one)
        else:
            found[name] = value.clone() if isinstance(value, Tensor) else value

    flat("optimizer", optimizer.state_dict())
    flat("schedules", schedules.state_dict())
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    names = [*one, *(n for n in two if n not in one)]

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return [n for n in names if n not in one or n not in two or not same(one[n], two[n])]


@functools.cache
def unbroken(method: str) -> dict[str, Any]:
    run = started(method)
    before = left(*run)
    model, _, optimizer, schedules = run
    go_on(model, optimizer, schedules, 0, N_STEPS)
    schedules.end()
    end = left(*run)
    assert differences(before, end), "a run that changes nothing compares nothing"
    return end


def broken(method: str, folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A run that is saved before each step and at the end, into folders: (folder, what it left) of each."""
    run = model, adapter, optimizer, schedules = started(method)
    for step in range(N_STEPS + 1):
        at = folder / str(step)
        adapter.save(at, resumable=True)
        torch.save({"optimizer": optimizer.state_dict(), "schedules": schedules.state_dict()}, at / "state.pt")
        yield at, left(*run)
        if step < N_STEPS:
            go_on(model, optimizer, schedules, step, step + 1)
    schedules.end()


def resumed(folder: Path, keep_schedules: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """The other half, which knows the folder alone: what it starts from, and its end."""
    torch.manual_seed(77)
    model = base()
    adapter = dt.load(model, folder, trainable=True)
    schedules = dt.Schedules([adapter])
    state = torch.load(folder / "state.pt", weights_only=True)
    if keep_schedules:
        schedules.load_state_dict(state["schedules"])
    optimizer = optimiser(adapter)
    optimizer.load_state_dict(state["optimizer"])
    schedules.begin(optimizer, N_STEPS, N_MICRO)
    run = model, adapter, optimizer, schedules
    start = left(*run)
    go_on(model, optimizer, schedules, int(folder.name), N_STEPS)
    schedules.end()
    return start, left(*run)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_at_every_step(method: str, tmp_path: Path) -> None:
    """Adapter, base, file, optimiser and schedule, after the cut and at the end; and saving changes nothing."""
    for folder, at_the_cut in broken(method, tmp_path):
        start, end = resumed(folder)
        assert not differences(at_the_cut, start), folder.name
        assert not differences(unbroken(method), end), folder.name
    assert not differences(unbroken(method), at_the_cut)


def test_the_schedules_state_matters(tmp_path: Path) -> None:
    """Without it other ranks are kept, or the masks are not there: what is compared above is not empty."""
    folder = [at for at, _ in broken("adalora", tmp_path / "adalora")][5]
    _, end = resumed(folder, keep_schedules=False)
    found = differences(unbroken("adalora"), end)
    assert any(n.startswith("adapter ") and n.endswith(".e") for n in found)
    folder, _ = next(broken("child_tuning_d", tmp_path / "d"))
    with pytest.raises(ValueError, match="looks at data first"):
        resumed(folder, keep_schedules=False)


def test_the_methods_move_what_they_say() -> None:
    """The settings above prune, mask and freeze within the nine steps."""
    ada = {n: v for n, v in unbroken("adalora").items() if n.startswith("schedules ") and " kept " in n}
    n_sites = len(ada)
    assert sum(int(k.sum()) for k in ada.values()) == 2 * n_sites and n_sites > 2
    masks = {n: v for n, v in unbroken("child_tuning_d").items() if " masks " in n}
    assert masks and all(v.dtype == torch.uint8 for v in masks.values())
    start = started("child_tuning_d")
    before, after = left(*start), unbroken("child_tuning_d")
    moved = sum(int((before[n] != after[n]).sum()) for n in before if n.startswith("base ") and "encoder.layer" in n)
    assert moved == start[1].params()


def test_the_courses_of_lora_move_what_they_say() -> None:
    """Ranks grow to the target, gates are pruned, matrices freeze, the weight follows, products are unloaded."""
    grown = [len(v) for n, v in unbroken("increlora").items() if n.startswith("file ") and n.endswith(".e")]
    assert sum(grown) == 3 * len(grown) and max(grown) > min(grown)
    gates = [v for n, v in unbroken("sora").items() if n.startswith("file ") and n.endswith(".g")]
    assert 0 < sum(int((v == 0).sum()) for v in gates) < sum(len(v) for v in gates)
    n_frozen = sum(n.startswith("schedules ") and " frozen " in n for n in unbroken("aflora"))
    assert 6 < n_frozen <= 12, "those of the square q are frozen from the start"
    for method, key, n in (("delta_lora", ".a0", 4), ("periodic_lora", ".down", 9)):
        found = [len(v) for name, v in unbroken(method).items() if name.startswith("file ") and name.endswith(key)]
        assert found and set(found) <= {n, 0}, found


def rows() -> list[dict[str, Tensor]]:
    """Twenty of them, in two epochs of the run below."""
    return [{k: t[0] for k, t in batch(500 + i, 0).items()} for i in range(20)]


def collate(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([row[k] for row in found]) for k in found[0]}


def trained(method: str, out: Path, resume: Path | None = None, beside: bool = False) -> dict[str, Any]:
    """What our trainer leaves after N_STEPS steps of two backward passes, with a checkpoint at every step; `beside`
    another adapter, which is not trained."""
    model = base()
    if beside:
        torch.manual_seed(5)
        dt.attach(model, "lora", name="frozen", where="attn.o", head=None).trainable(False)
    torch.manual_seed(1 if resume is None else 99)
    adapter = dt.attach(model, method, **METHODS[method])
    options = TrainingArguments(
        output_dir=str(out), max_steps=N_STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=N_MICRO,
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0, seed=3, save_strategy="steps", save_steps=1,
        logging_strategy="no", report_to="none", remove_unused_columns=False,
        dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = AdapterTrainer(model, options, data_collator=collate, train_dataset=rows())
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.state.global_step == N_STEPS and trainer.optimizer is not None
    return left(model, adapter, trainer.optimizer, trainer.events.schedules)


LONG = ["adalora", "child_tuning_d", "propelt", "diff_pruning", "far", "increlora", "fish_mask", "lt_sft", "spt"]


@pytest.mark.parametrize("method", LONG)
def test_our_trainer_resumes(method: str, tmp_path: Path) -> None:
    """From the first step, from the end of an epoch in the midst of what moves, and from the middle of the next."""
    end = trained(method, tmp_path)
    for cut in (1, 5, 7):
        again = trained(method, tmp_path / f"from {cut}", tmp_path / f"checkpoint-{cut}")
        assert not differences(end, again), cut


def test_our_trainer_resumes_beside_a_frozen_adapter(tmp_path: Path) -> None:
    end = trained("lora", tmp_path, beside=True)
    assert not differences(end, trained("lora", tmp_path / "again", tmp_path / "checkpoint-4", beside=True))
