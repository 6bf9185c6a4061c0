"""Distillation: the loss written a second time, plainly; a student that comes nearer to its teachers; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor

import deltatune as dt
from deltatune.train.distil import Distil, TaskBatches
from deltatune.train.trainer import AdapterTrainer

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}
IDS = torch.tensor([[5, 6, 7, 8, 0], [9, 8, 7, 6, 5], [4, 4, 9, 0, 0], [3, 9, 1, 2, 7]])
TASKS = torch.tensor([0, 1, 1, 0])


def moved(adapter: dt.Adapter, seed: int) -> dt.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return adapter


def setting(kind: str = "llama") -> tuple[Any, dict[str, Tensor]]:
    """Two teachers and a student of two tasks on one model; a batch of both tasks."""
    torch.manual_seed(0)
    labels = IDS.masked_fill(IDS == 0, -100)
    batch = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": labels, "task_ids": TASKS}
    if kind == "llama":
        model: Any = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    elif kind == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=3))
        batch["labels"] = torch.tensor([0, 2, 1, 1])
    else:
        sizes: dict[str, Any] = {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
        }
        model = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    with torch.no_grad():  # transformers' N(0, 0.02) makes every output alike
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    for i in range(2):
        adapter = moved(dt.attach(model.eval(), "prompt_tuning", n=3, name=f"teacher{i}", head=None), i)
        adapter.trainable(False)
        adapter.disable()
    moved(dt.attach(model, "mpt", n=3, n_tasks=2, name="student"), 7)
    return model, batch


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_loss_written_again(kind: str) -> None:
    model, batch = setting(kind)
    found, _ = Distil(("teacher0", "teacher1"), weight=0.9).loss(model, batch)
    there = dt.adapters(model)
    there["student"].disable()
    plain = {k: v for k, v in batch.items() if k != "task_ids"}
    want = model(**batch).loss * 0
    there["student"].enable()
    student = model(**batch, output_hidden_states=True)
    want = want + student.loss
    there["student"].disable()
    for task in range(2):
        mine = TASKS.eq(task)
        there[f"teacher{task}"].enable()
        teacher = model(**{k: v[mine] for k, v in plain.items()}, output_hidden_states=True)
        there[f"teacher{task}"].disable()
        p, q = teacher.logits.detach(), student.logits[mine]
        if kind != "bert":
            asked = plain["labels"][mine] != -100
            p, q = p[asked], q[asked]
        kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
        far = []
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            for a, b in zip(teacher.get(name) or (), student.get(name) or (), strict=True):
                real = plain["attention_mask"][mine].bool()
                if name == "encoder_hidden_states":
                    real = F.pad(real, (3, 0), value=True)
                square = (a.detach() - b[mine]).square().mean(-1)
                far.append(square.mean() if name == "decoder_hidden_states" else square[real].mean())
        want = want + 0.9 * 0.5 * (kl + sum(far) / len(far))
    torch.testing.assert_close(found, want)
    grads = torch.autograd.grad(found, there["student"].parameters())
    for g, w in zip(grads, torch.autograd.grad(want, there["student"].parameters()), strict=True):
        assert (g - w).norm() <= 1e-3 * w.norm()


def test_a_student_comes_nearer_to_its_teachers(tmp_path: Path) -> None:
    """Through the trainer, with gradient accumulation; the teachers stand still."""
    model, batch = setting()
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    distil = Distil(("teacher0", "teacher1"))
    before = float(distil.loss(model, batch)[0].detach())
    kept = [p.detach().clone() for i in range(2) for p in dt.adapters(model)[f"teacher{i}"].parameters()]
    options = t.TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=0.05, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    AdapterTrainer(model, options, train_dataset=rows, distil=distil).train()
    assert float(distil.loss(model.eval(), batch)[0].detach()) < 0.9 * before
    now = [p for i in range(2) for p in dt.adapters(model)[f"teacher{i}"].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_what_it_refuses() -> None:
    model, batch = setting()
    with pytest.raises(ValueError, match=r"unknown teacher 'teecher0'; did you mean 'teacher0'"):
        Distil(("teecher0",)).check(model)
    with pytest.raises(ValueError, match="needs teachers and a student"):
        Distil(("teacher0", "teacher1", "student")).check(model)
    with pytest.raises(ValueError, match="needs task_ids"):
        Distil(("teacher0", "teacher1")).loss(model, {k: v for k, v in batch.items() if k != "task_ids"})
    with pytest.raises(ValueError, match="task ids up to 1, but there are 1 teachers"):
        Distil(("teacher0",)).loss(model, batch)
    dt.adapters(model)["teacher1"].detach()
    dt.attach(model, "prompt_tuning", n=4, name="teacher1", head=None).disable()
    two, _ = setting("t5")
    dt.adapters(two)["teacher1"].detach()
    dt.attach(two, "prompt_tuning", n=4, name="teacher1", head=None).disable()
    with pytest.raises(ValueError, match="prompts need one length"):
        Distil(("teacher0", "teacher1")).loss(two, batch)


def test_batches_of_several_tasks() -> None:
    """Each batch has 2 to all tasks in about equal shares, the number drawn anew; equal seeds give equal orders."""
    tasks = [i % 5 for i in range(50)]
    order = list(TaskBatches(tasks, 10, 200, seed=3))
    assert order == list(TaskBatches(tasks, 10, 200, seed=3)) != list(TaskBatches(tasks, 10, 200, seed=4))
    sizes = [len({tasks[i] for i in order[at : at + 10]}) for at in range(0, 2000, 10)]
    assert set(sizes) == {2, 3, 4, 5} and len(order) == len(TaskBatches(tasks, 10, 200)) == 2000
    with pytest.raises(ValueError, match="two tasks at least"):
        TaskBatches([1, 1], 2, 1)
