"""Trainable parameters from shapes alone: the figures of docs/counts.md, ours and HF PEFT's, on the meta device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification, T5Config, T5ForConditionalGeneration

import deltatune as dt

PAGE = Path(__file__).resolve().parents[2] / "docs" / "counts.md"
HEAD = 592_130  # 768 x 768 + 768 + 768 x 2 + 2

# method, hyperparameters, ours, HF PEFT's configuration and what its print_trainable_parameters counts
ROBERTA: list[tuple[str, dict[str, Any], int, str, dict[str, Any], int | None]] = [
    ("lora", {"r": 8}, 294_912, "LoraConfig", {"r": 8}, 294_912 + HEAD),
    ("prompt_tuning", {"n": 20}, 15_360, "PromptTuningConfig", {"num_virtual_tokens": 20}, 15_360 + HEAD),
    ("prefix_tuning", {"n": 20}, 368_640, "PrefixTuningConfig", {"num_virtual_tokens": 20}, 368_640 + HEAD),
    ("ia3", {}, 55_296, "IA3Config", {}, 64_512 + HEAD),
    ("bitfit", {}, 102_144, "", {}, None),
    ("sequential", {}, 2_379_264, "", {}, None),
    ("residual", {"r": 64}, 1_208_064, "", {}, None),
    ("pfeiffer", {"r": 48}, 894_528, "", {}, None),
    ("parallel", {"r": 64}, 1_189_632, "", {}, None),
    ("mam", {"n": 30, "r": 384}, 7_644_672, "", {}, None),
    ("dora", {"r": 8}, 313_344, "LoraConfig", {"r": 8, "use_dora": True}, 313_344 + HEAD),
    (
        "adalora",
        {"r": 12},
        1_991_520,
        "AdaLoraConfig",
        {"init_r": 12, "total_step": 100, "target_modules": "all-linear"},
        1_991_520 + 72 + HEAD,
    ),
    ("s4", {}, 565_392, "", {}, None),
    ("propelt", {"r": 64}, 1_278_784, "", {}, None),
    ("propelt_lora", {"r": 32}, 1_277_952, "", {}, None),
    ("head", {}, 0, "", {}, None),
    ("full", {}, 124_055_040, "", {}, None),
]


def roberta() -> nn.Module:
    """RoBERTa-base with a head of two classes."""
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
        return RobertaForSequenceClassification(config)


def t5() -> nn.Module:
    """T5-base."""
    with torch.device("meta"):
        return T5ForConditionalGeneration(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))


def trained(model: nn.Module) -> int:
    """What takes gradients, counted from outside."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def written(n: int) -> bool:
    """Does the page say this figure?"""
    return f"{n:,}" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("method", "hyper", "n"), [row[:3] for row in ROBERTA], ids=[row[0] for row in ROBERTA])
def test_roberta_base(method: str, hyper: dict[str, Any], n: int) -> None:
    model = roberta()
    adapter = dt.attach(model, method, **hyper)
    assert (adapter.params(), adapter.n_head) == (n, HEAD)
    assert trained(model) == n + HEAD
    assert written(n)
    assert written(HEAD)


def test_a_mask_counts_what_can_move() -> None:
    """All 85,054,464 entries of the blocks have a gradient, 30 % of them move."""
    model = roberta()
    adapter = dt.attach(model, "child_tuning_d", p=0.3)
    assert (adapter.params(), adapter.n_head) == (25_516_339, HEAD)
    assert trained(model) == 85_054_464 + HEAD
    assert written(25_516_339)


def test_without_the_head() -> None:
    model = roberta()
    adapter = dt.attach(model, "lora", r=8, head=None)
    assert (adapter.params(), adapter.n_head, trained(model)) == (294_912, 0, 294_912)


@pytest.mark.parametrize(("method", "hyper", "n"), [("lora", {"r": 8}, 884_736), ("s4", {}, 1_130_784)])
def test_t5_base(method: str, hyper: dict[str, Any], n: int) -> None:
    model = t5()
    adapter = dt.attach(model, method, **hyper)
    assert (adapter.params(), adapter.n_head, trained(model)) == (n, 0, n)
    assert written(n)


@pytest.mark.parametrize(("config", "options", "n"), [row[3:] for row in ROBERTA if row[3]])
def test_hf_peft(config: str, options: dict[str, Any], n: int) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(roberta(), getattr(peft, config)(task_type="SEQ_CLS", **options))
    assert model.get_nb_trainable_parameters()[0] == n
    assert written(n)


def test_hf_peft_t5_base() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(t5(), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8))
    assert model.get_nb_trainable_parameters()[0] == 884_736
