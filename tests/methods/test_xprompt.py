"""XPrompt against its equations written a second time over a whole run: scores row by row, masks, the way back, moments.

The paper's repository holds no code.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import deltatune as dt
from deltatune.methods.xprompt import XPrompt
from deltatune.train.trainer import AdapterTrainer

D, N, PIECES, N_STEPS, TUNE, SCORE = 16, 6, 4, 14, 4, 3
HYPER: dict[str, Any] = {"n": N, "pieces": PIECES, "tune": TUNE, "score": SCORE, "keep_tokens": 0.5, "keep_pieces": 0.6}


def backbone() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    return model


def batch(step: int) -> dict[str, Tensor]:
    """Five rows, the last of them shorter."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 20, (5, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (5,), generator=generator)}


def prompt_of(adapter: dt.Adapter) -> Any:
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, XPrompt)
    return delta


def attached(**hyper: Any) -> tuple[nn.Module, dt.Adapter, torch.optim.Optimizer, dt.Schedules]:
    model = backbone()
    adapter = dt.attach(model, "xprompt", head=None, seed=3, **{**HYPER, **hyper})
    return model, adapter, optimiser(adapter), dt.Schedules([adapter])


def optimiser(adapter: dt.Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.groups(0.05, 0.1), eps=1e-6)


def go_on(run: tuple[Any, ...], start: int, stop: int) -> Iterator[int]:
    """Steps, and each one's number once it is done."""
    model, _, optimizer, schedules = run
    for step in range(start, stop):
        model(**batch(step)).loss.backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
        yield step


def plain_losses(model: Any, prompt: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """(B), each row's loss by transformers alone behind the given prompt."""
    own = model.get_input_embeddings()(rows["input_ids"])
    n_rows, n = len(own), len(prompt)
    mask = torch.cat([torch.ones(n_rows, n, dtype=torch.long), rows["attention_mask"]], 1)
    states = model.bert(inputs_embeds=torch.cat([prompt.expand(n_rows, -1, -1), own], 1), attention_mask=mask)[0][:, n:]
    return F.cross_entropy(model.classifier(model.bert.pooler(states)), rows["labels"], reduction="none")


def factors(model: Any, prompt: Tensor, n_parts: int, rows: dict[str, Tensor]) -> Tensor:
    """(P, n_parts), the sum over rows of |dL/dg| for a g that multiplies each part of a token."""
    total = torch.zeros(len(prompt), n_parts)
    for i in range(len(rows["input_ids"])):
        g = torch.ones(len(prompt), n_parts, requires_grad=True)
        scaled = (prompt.detach().view(len(prompt), n_parts, -1) * g[..., None]).flatten(1)
        (loss,) = plain_losses(model, scaled, {k: v[i : i + 1] for k, v in rows.items()})
        total += torch.autograd.grad(loss, g)[0].abs()
    return total


def best(scores: Tensor, n: int) -> Tensor:
    """The mask of the n largest."""
    edge = scores.flatten().sort(descending=True).values[n - 1]
    return scores >= edge


def second_time() -> tuple[Tensor, list[float]]:
    """The whole course by hand: (the prompt without what went, every step's loss)."""
    model, adapter, _, _ = attached()
    prompt = nn.Parameter(prompt_of(adapter).prompt.detach().clone())
    adapter.detach()
    rows = list(range(N))
    mask = torch.ones(N, PIECES)
    scores = torch.zeros(N, 1)
    optimizer = torch.optim.AdamW([prompt], 0.05, weight_decay=0.1, eps=1e-6)
    losses = []
    for step in range(N_STEPS):
        entries = mask.repeat_interleave(D // PIECES, 1)
        there = (prompt * entries)[rows]
        if step == TUNE:
            kept = prompt.detach().clone()
        if TUNE <= step < TUNE + 2 * SCORE:
            scores[rows] += factors(model, there, scores.shape[1], batch(step))
        loss = plain_losses(model, there, batch(step)).mean()
        losses.append(float(loss.detach()))
        (prompt.grad,) = torch.autograd.grad(loss, prompt)
        optimizer.step()
        if step + 1 == TUNE + SCORE:
            mask *= best(scores, 3)  # half of 6 tokens
            rows = mask.any(1).nonzero().flatten().tolist()
            scores = torch.zeros(N, PIECES)
            for value in ("exp_avg", "exp_avg_sq"):
                optimizer.state[prompt][value] *= mask.repeat_interleave(D // PIECES, 1)
        if step + 1 == TUNE + 2 * SCORE:
            mask *= best(scores, 7)  # 0.6 of 12 pieces
            rows = mask.any(1).nonzero().flatten().tolist()
            with torch.no_grad():
                prompt.copy_(kept)
            optimizer = torch.optim.AdamW([prompt], 0.05, weight_decay=0.1, eps=1e-6)
    return (prompt * mask.repeat_interleave(D // PIECES, 1))[rows].detach(), losses


def test_the_whole_course_a_second_time() -> None:
    run = model, adapter, optimizer, schedules = attached()
    schedules.begin(optimizer, N_STEPS)
    want, want_losses = second_time()
    lengths: list[int] = []
    block = model.get_submodule("bert.encoder.layer.0")
    block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    losses, steps = [], go_on(run, 0, N_STEPS)
    for step in range(N_STEPS):
        with torch.no_grad():
            losses.append(float(model(**batch(step)).loss))  # what is looked at without gradients does not count
        assert next(steps) == step
    tree, tensors = adapter.finished()
    (got,) = tensors.values()
    apart = max(abs(a - b) for a, b in zip(losses, want_losses, strict=True))
    assert apart < 1e-5, apart
    soft.near(got, want, 1e-5)
    assert bool((got == 0).any()) and len(got) <= 3 and len(set(losses)) == N_STEPS
    assert lengths[0] == 6 + N and lengths[-1] == 6 + len(got)
    assert max(lengths[2 * (TUNE + SCORE) :]) == 6 + 3, "pruned tokens are in no sequence"
    assert prompt_of(adapter).prompt.shape == (N, D), "no tensor of a live optimiser changes its size"
    assert tree.to_dict()["method"] == "prompt_tuning" and tree.to_dict()["config"]["n"] == len(got)


@pytest.mark.parametrize("n_parts", [1, PIECES])
def test_importance_is_of_each_row_by_itself(n_parts: int) -> None:
    """The absolute value is taken before the mean over rows, also of those that are left after the first pruning."""
    model, adapter, _, _ = attached()
    delta = prompt_of(adapter)
    delta.scores = torch.zeros(N, n_parts)
    rows = list(range(N)) if n_parts == 1 else [0, 2, 3, 4, 5]
    delta.mask[1] = float(n_parts == 1)
    model(**batch(0)).loss.backward()
    with adapter.disabled():
        want = factors(model, delta.prompt[rows], n_parts, batch(0))
    soft.near(delta.scores[rows], want)
    assert (n_parts == 1) == bool(delta.scores[1].any())
    summed = (delta.prompt.grad * delta.prompt.detach()).view(N, n_parts, -1).sum(-1)[rows].abs() * 5
    assert float((summed - want).norm() / want.norm()) > 0.1


def test_what_was_pruned_does_not_move_what_is_left() -> None:
    """Moments of pruned entries are gone with them, and all of them with the way back."""
    run = _, adapter, optimizer, schedules = attached()
    schedules.begin(optimizer, N_STEPS)
    delta = prompt_of(adapter)
    for step in go_on(run, 0, N_STEPS):
        state: Any = optimizer.state.get(delta.prompt, {})
        gone = delta.mask.repeat_interleave(D // PIECES, 1) == 0
        if step + 1 < TUNE + SCORE:
            assert not gone.any() and int(state["step"]) == step + 1
        elif step + 1 == TUNE + 2 * SCORE:
            assert not state and gone.any(), "the way back starts the optimiser anew"
        else:
            assert gone.any() and not state["exp_avg"][gone].any() and state["exp_avg"][~gone].all()
    assert int(optimizer.state[delta.prompt]["step"]) == N_STEPS - TUNE - 2 * SCORE
    assert delta.scores is None and schedules.state_dict()["default"]["values"] == {}


def test_the_finished_file_is_a_prompt(tmp_path: Path) -> None:
    run = model, adapter, optimizer, schedules = attached()
    schedules.begin(optimizer, N_STEPS)
    assert len(list(go_on(run, 0, N_STEPS))) == N_STEPS
    schedules.end()
    adapter.save(tmp_path)
    want = soft.logits(model, **batch(0))
    twin = backbone()
    loaded = dt.load(twin, tmp_path)
    assert isinstance(next(iter(loaded.deltas.values())), dt.PromptTuning) and loaded.params() <= 3 * D
    assert torch.equal(soft.logits(twin, **batch(0)), want)
    adapter.save(tmp_path / "more", resumable=True)
    again = backbone()
    dt.load(again, tmp_path / "more")
    assert torch.equal(soft.logits(again, **batch(0)), want), "the masks are in the file that is trained on"


def left(run: tuple[Any, ...]) -> dict[str, Tensor]:
    """All that a run leaves."""
    _, adapter, optimizer, schedules = run
    state = schedules.state_dict()["default"]
    found = {f"file {n}": t.clone() for n, t in adapter.state_dict().items()}
    found |= {f"{key} {n}": t.clone() for key in ("values", "scores") for n, t in state[key].items()}
    moments = optimizer.state_dict()["state"].get(0, {})
    return found | {f"state {n}": t.clone() for n, t in moments.items()} | {"done": torch.tensor(state["done"])}


CUTS = (0, 2, TUNE, 5, TUNE + SCORE, 8, TUNE + 2 * SCORE, 12)


def test_resumed_in_every_phase(tmp_path: Path) -> None:
    """At its start and in its midst."""
    run = _, adapter, optimizer, schedules = attached()
    schedules.begin(optimizer, N_STEPS)
    course, cuts = go_on(run, 0, N_STEPS), {}
    for step in range(N_STEPS):
        if step in CUTS:
            at = tmp_path / str(step)
            adapter.save(at, resumable=True)
            torch.save({"optimizer": optimizer.state_dict(), "schedules": schedules.state_dict()}, at / "state.pt")
            cuts[step] = left(run)
        next(course)
    end = left(run)
    for step, cut in cuts.items():
        folder = tmp_path / str(step)
        model = backbone()
        other = dt.load(model, folder, trainable=True)
        again = model, other, optimiser(other), dt.Schedules([other])
        state = torch.load(folder / "state.pt", weights_only=True)
        again[3].load_state_dict(state["schedules"])
        again[2].load_state_dict(state["optimizer"])
        again[3].begin(again[2], N_STEPS)
        for want, got in ((cut, left(again)), (end, (list(go_on(again, step, N_STEPS)), left(again))[1])):
            assert want.keys() == got.keys(), step
            assert all(torch.equal(want[n], got[n]) for n in want), step
    _, other, _, schedules = attached()
    with pytest.raises(ValueError, match="other sites"):
        schedules.load_state_dict(
            {"default": {"n_steps": 9, "done": 5, "values": {"0|x": torch.zeros(1)}, "scores": {}}}
        )


def trained(out: Path, resume: str | None = None) -> dict[str, Tensor]:
    """By our trainer, with two backward passes a step."""
    model = backbone()
    adapter = dt.attach(model, "xprompt", head=None, seed=3, **HYPER)
    options = TrainingArguments(
        output_dir=str(out), max_steps=N_STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.05, seed=3, save_strategy="steps", save_steps=8, logging_strategy="no", report_to="none",
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{k: v[i] for k, v in batch(step).items()} for step in range(12) for i in range(5)]
    trainer = AdapterTrainer(
        model, options, data_collator=lambda f: {k: torch.stack([r[k] for r in f]) for k in f[0]}, train_dataset=rows
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return adapter.state_dict()


def test_our_trainer_prunes_and_resumes(tmp_path: Path) -> None:
    end = trained(tmp_path)
    (mask,) = (t for n, t in end.items() if n.endswith(".mask"))
    assert int(mask.sum()) == 7 and int(mask.any(1).sum()) <= 3
    again = trained(tmp_path / "again", str(tmp_path / "checkpoint-8"))  # while pieces are looked at
    assert all(torch.equal(end[n], again[n]) for n in end)


def pruned(model: nn.Module) -> dt.Adapter:
    """Three of five tokens and some of their pieces are left."""
    adapter = dt.attach(model, "xprompt", head=None, n=5, pieces=4, seed=1)
    mask = prompt_of(adapter).mask
    mask[1] = mask[4] = 0
    mask[0, 2] = mask[3, 1:] = 0
    return adapter


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding_and_generation_after_pruning(kind: str) -> None:
    soft.check_padding(kind, pruned)
    if kind != "bert":
        soft.check_generate(kind, pruned)


def test_what_it_refuses() -> None:
    model = backbone()
    for hyper, words in (
        ({"keep_tokens": 0.0}, "keep_tokens = 0.0"),
        ({"keep_pieces": 1.5}, "keep_pieces = 1.5"),
        ({"tune": -1}, "tune = -1"),
        ({"pieces": 5}, "bert: xprompt: pieces = 5 does not divide the width 16"),
        ({"pieces": 0}, "pieces = 0"),
    ):
        with pytest.raises(ValueError, match=words):
            dt.attach(model, "xprompt", head=None, **hyper)
    _, _, optimizer, schedules = attached(tune=6, score=4)
    with pytest.raises(ValueError, match=r"tune = 6 steps and score = 4 .* leave none of 14"):
        schedules.begin(optimizer, N_STEPS)


def test_a_run_too_short_for_its_shares_prunes_nothing() -> None:
    run = _, adapter, optimizer, schedules = attached(tune=0.4, score=0.1)
    schedules.begin(optimizer, 9)  # a tenth of nine steps is none
    assert len(list(go_on(run, 0, 9))) == 9
    assert prompt_of(adapter).mask.all()
