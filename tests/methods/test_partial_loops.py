"""The phases of partial methods in our trainer and in a loop written by hand: the same decisions, the same values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import deltatune as dt
from deltatune.train.trainer import AdapterTrainer

N_STEPS, LR = 6, 1e-2
METHODS: dict[str, dict[str, Any]] = {
    "u_bitfit": {"keep": 0.2, "search": 4, "rounds": 2},
    "s_bitfit": {"keep": 0.2, "search": 4, "rounds": 2},
    "diff_pruning": {"keep": 0.05, "dense": 3, "penalty": 1e-3, "start": 1.0, "gate_lr": 20.0},
    "far": {"keep": 0.3, "prime": 2},
    "threshold_mask": {"skip": 0.0},
}


def attached(method: str) -> tuple[Any, dt.Adapter]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double().train()  # Adam makes steps of a gradient's rounding
    torch.manual_seed(1)
    return model, dt.attach(model, method, **METHODS[method])


def rows() -> list[dict[str, Tensor]]:
    """One batch, of which every step takes all."""
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_trainer_and_loop_agree(method: str, n_micro: int, tmp_path: Path) -> None:
    model, by_trainer = attached(method)
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=N_STEPS, per_device_train_batch_size=4 // n_micro,
        gradient_accumulation_steps=n_micro, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=0.0, save_strategy="no", logging_strategy="no", report_to="none", remove_unused_columns=False,
        dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = AdapterTrainer(model, options, train_dataset=rows())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model, by_hand = attached(method)
    optimizer = torch.optim.AdamW(by_hand.groups(LR))
    schedules = dt.Schedules([by_hand])
    schedules.begin(optimizer, N_STEPS)
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    for step in range(N_STEPS):
        model(**batch).loss.backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
    schedules.end()
    one, two = by_trainer.state_dict(), by_hand.state_dict()
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    for name, t in one.items():
        if t.is_floating_point():
            torch.testing.assert_close(t, two[name], rtol=0, atol=1e-7)
        else:
            assert torch.equal(t, two[name]), name
