"""Our trainer: what it shows a method that looks at data first, and what a step of several passes is the gradient of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback

import deltatune as dt
from deltatune.core.schedule import Schedule
from deltatune.train.trainer import AdapterTrainer

N_ROWS = 12
IDS = torch.randint(3, 20, (N_ROWS, 6), generator=torch.Generator().manual_seed(2))
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip


def base(arch: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if arch == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return tr.BertForSequenceClassification(tr.BertConfig(**SIZES, **quiet, **options)).double()
    cls = tr.LlamaForCausalLM if arch == "lm" else tr.LlamaForSequenceClassification
    return cls(tr.LlamaConfig(**SIZES, pad_token_id=0, **options)).double()


def rows(kind: str = "class", n: int = N_ROWS) -> list[dict[str, Any]]:
    """Sums as classes or as values, or the tokens themselves: of each row another number of them."""
    if kind == "class":
        return [{"input_ids": row, "labels": row.sum() % 2} for row in IDS[:n]]
    if kind == "value":
        return [{"input_ids": row, "labels": row.sum().double() / 50} for row in IDS[:n]]
    found = [{"input_ids": row, "labels": row.clone()} for row in IDS[:n]]
    for i, row in enumerate(found):
        row["labels"][: 1 + i] = -100
    return found


def trainer(model: nn.Module, out: Path, data: Any, cls: type[tr.Trainer] = AdapterTrainer, **options: Any) -> Any:
    given = tr.TrainingArguments(**{
        "output_dir": str(out), "max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    } | options)  # fmt: skip
    made = cls(model, given, train_dataset=data)
    made.remove_callback(PrinterCallback)
    return made


class Kept(tr.TrainerCallback):
    """The gradient before the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def of_a_step(arch: str, kind: str, n_micro: int, out: Path, cls: type[tr.Trainer], **options: Any) -> Tensor:
    """The gradient of one step of four rows in `n_micro` passes."""
    model = base(arch, **({"num_labels": 1} if kind == "value" else {}))
    if cls is AdapterTrainer:
        adapter = dt.attach(model, "lora", r=2)
        torch.manual_seed(3)
        for p in adapter.parameters():
            nn.init.normal_(p)
    sizes = {"per_device_train_batch_size": 4 // n_micro, "gradient_accumulation_steps": n_micro}
    made, kept = trainer(model, out, rows(kind, 4), cls, **sizes, **options), Kept()
    made.add_callback(kept)
    made.train()
    return kept.gradient


LOSSES = [("bert", "class"), ("bert", "value"), ("llama", "class"), ("llama", "value"), ("lm", "lm")]


@pytest.mark.parametrize(("arch", "kind"), LOSSES, ids=["-".join(x) for x in LOSSES])
def test_passes_have_the_gradient_of_the_whole(arch: str, kind: str, tmp_path: Path) -> None:
    """Of a mean over the rows, and of one over the tokens that divides by the number of the whole step's."""
    whole = of_a_step(arch, kind, 1, tmp_path, AdapterTrainer)
    for n_micro in (2, 4):
        torch.testing.assert_close(of_a_step(arch, kind, n_micro, tmp_path, AdapterTrainer), whole, rtol=0, atol=1e-12)
    assert float(whole.norm()) > 1e-3


@pytest.mark.parametrize("kind", ["class", "lm"])
def test_a_loss_of_the_trainers_own_is_asked_too(kind: str, tmp_path: Path) -> None:
    """Label smoothing's divides by the number that it is given, whatever the model's own would do."""
    arch = "bert" if kind == "class" else "lm"
    one, two = (of_a_step(arch, kind, n, tmp_path, AdapterTrainer, label_smoothing_factor=0.1) for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_the_stock_trainer_takes_the_signatures_word(tmp_path: Path) -> None:
    """A plain BERT has twice the gradient there in two passes: where this fails the question is no longer needed."""
    one, two = (of_a_step("bert", "class", n, tmp_path, tr.Trainer) for n in (1, 2))
    torch.testing.assert_close(two, 2 * one)


def test_a_batch_without_labels_says_nothing(tmp_path: Path) -> None:
    """Its loss is 0 either way; the next step's is asked."""
    model = base("lm")
    dt.attach(model, "lora", r=2)
    data = rows("lm", 4)
    data[0]["labels"][:] = -100
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    made = trainer(model, tmp_path, data, **options)
    seen = []
    ask = made._ask
    made._ask = lambda *args: seen.append(ask(*args)) or seen[-1]
    made.train()
    assert seen == [None, True] and made.model_accepts_loss_kwargs


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    """Modes, random numbers and gradients are as they were."""
    model = base("bert").train()
    dt.attach(model, "lora", r=2)
    made = trainer(model, tmp_path, rows(), gradient_accumulation_steps=2)
    before = torch.get_rng_state()
    assert made._ask({k: v[None] for k, v in rows()[0].items()}, torch.tensor(2)) is False
    assert torch.equal(before, torch.get_rng_state())
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


class Looks(Schedule):
    """Keeps the rows that it is shown."""

    needs_data = True

    def calibrate(self, batches: Any, loss: Any) -> None:
        self.seen = [[IDS.tolist().index(row) for row in batch["input_ids"].tolist()] for batch in batches]
        self.adapter.calibrated = {"seen": torch.ones(1)}


def shown(looks_at: tuple[int, str], out: Path, data: Any, **options: Any) -> list[list[int]]:
    """The numbers of the rows in the batches that such a schedule is shown."""
    model = base("bert")
    adapter = dt.attach(model, "lora", r=2)
    made = trainer(model, out, data, per_device_train_batch_size=5, **options)
    schedule: Any = Looks(adapter)
    schedule.looks_at = looks_at
    made.events.schedules.each[adapter.name] = schedule
    made.create_optimizer()
    found: list[list[int]] = schedule.seen
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def test_rows_come_once_and_batches_as_often_as_asked_for(tmp_path: Path) -> None:
    """Twelve rows in batches of five: 1,024 rows are these twelve, seven batches are each row at least twice."""
    once = shown((1024, "rows"), tmp_path, rows())
    assert [len(b) for b in once] == [5, 5, 2] and sorted(flat(once)) == list(range(N_ROWS))
    assert flat(shown((7, "rows"), tmp_path, rows())) == flat(once)[:7]
    often = shown((7, "batches"), tmp_path, rows())
    assert [len(b) for b in often] == [5] * 7
    first, second, rest = (flat(often)[i : i + N_ROWS] for i in (0, N_ROWS, 2 * N_ROWS))
    assert first == flat(once) and sorted(second) == sorted(first) and second != first and len(set(rest)) == 11
    assert often == shown((7, "batches"), tmp_path, rows()) != shown((7, "batches"), tmp_path, rows(), seed=1)


def test_every_schedule_has_what_it_asks_for(tmp_path: Path) -> None:
    """`sam` sees its 30 batches of two of twelve rows; `fish_mask` and `spt` as many as they say, and no more."""
    for method, hyper, n_batches in (
        ("sam", {"burn_in": 30}, 30), ("spt", {"n_batches": 9}, 9), ("fish_mask", {"n_samples": 8}, 4),
        ("fish_mask", {}, 6), ("child_tuning_d", {}, 6),
    ):  # fmt: skip
        model = base("bert")
        dt.attach(model, method, **hyper)
        made = trainer(model, tmp_path, rows(), per_device_train_batch_size=2)
        made.n_shown = 0
        batches = made._calibration

        def counted(schedule: Any, made: Any = made, batches: Any = batches) -> Iterator[Any]:
            for batch in batches(schedule):
                made.n_shown += 1
                yield batch

        made._calibration = counted
        made.create_optimizer()
        assert made.n_shown == n_batches, method


def test_columns_that_training_does_not_see(tmp_path: Path) -> None:
    """The trainer takes them off its rows, and off those that are shown before."""
    more = [row | {"text": "no tensor", "length": torch.tensor(6)} for row in rows()]
    assert shown((1024, "rows"), tmp_path, more) == shown((1024, "rows"), tmp_path, rows())
    model = base("bert")
    dt.attach(model, "fish_mask")
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer(model, tmp_path, more).train()
    assert all("length" not in names for names in seen) and len(seen) > N_ROWS


class Stream(torch.utils.data.IterableDataset):
    """Rows without a number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(rows() * 3)


def test_rows_that_cannot_be_counted(tmp_path: Path) -> None:
    model = base("bert")
    adapter = dt.attach(model, "fish_mask")
    with pytest.raises(
        ValueError, match=r"Fisher looks at data first, and these training rows cannot be counted; call"
    ):
        trainer(model, tmp_path, Stream()).train()
    adapter.calibrate([{k: v[None] for k, v in row.items()} for row in rows()])
    trainer(model, tmp_path, Stream()).train()
