"""The matrix of foreign hands: a row is what another library does to a model, a column is one method of each word.

A row is a function of one `Case` that asserts what must hold. Every cell is `EXACT` (the function passes), `Refused`
(it raises an error with this text, and the row asserts what is left), or `Documented` (it passes, and asserts what the
sentence says). `docs/make_foreign.py` writes the page from this table.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt

COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("fold, post, linear", {"r": 4}),
    "sequential": ("post", {"r": 8}),
    "ia3": ("pre, post, fold", {}),
    "prefix_tuning": ("kv", {"n": 5}),
    "prompt_tuning": ("tokens", {"n": 5}),
    "full": ("in place", {}),
    "head": ("fold alone", {}),
}


@dataclass(frozen=True)
class Refused:
    """The cell raises `error` whose text contains `message`."""

    message: str
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class Documented:
    """The cell does this, and the row asserts it."""

    what: str


EXACT = Documented("")
Outcome = Refused | Documented


@dataclass
class Row:
    """One line of the table: what is done, in which words, and the outcome by column."""

    name: str
    group: str
    what: str
    check: "Callable[[Case], None]"
    default: Outcome
    cells: Mapping[str, Outcome]
    slow: tuple[str, ...] = ()

    def outcome(self, column: str) -> Outcome:
        """What this row does to that method."""
        return self.cells.get(column, self.default)


ROWS: dict[str, Row] = {}


def row(group: str, what: str, default: Outcome = EXACT, *, slow: tuple[str, ...] = (), **cells: Outcome) -> Any:
    """Register a function of a `Case` as a row; `default` is the outcome of the columns that `cells` does not name."""

    def register(check: "Callable[[Case], None]") -> "Callable[[Case], None]":
        name = check.__name__
        assert name not in ROWS, name
        ROWS[name] = Row(name, group, what, check, default, cells, slow)
        return check

    return register


def cells(module: str) -> Any:
    """The parametrization of a test over the cells of the rows that `module` registered."""
    params = [
        pytest.param(r.name, column, id=f"{r.name}-{column}", marks=[pytest.mark.slow] if column in r.slow else [])
        for r in ROWS.values()
        if r.check.__module__ == module
        for column in COLUMNS
    ]
    return pytest.mark.parametrize(("name", "column"), params)


def check_cell(name: str, column: str, tmp_path: Path, device: str = "cpu") -> None:
    """One cell: run the row on that method and compare with the outcome that the table promises."""
    r = ROWS[name]
    outcome = r.outcome(column)
    case = Case(column, tmp_path, device)
    if isinstance(outcome, Refused):
        with pytest.raises(outcome.error, match=re.escape(outcome.message)):
            r.check(case)
        for after in case.after:
            after()
    else:
        r.check(case)


@dataclass
class Case:
    """One method on tiny random backbones, and what the row functions share."""

    column: str
    tmp: Path
    device: str = "cpu"
    after: list[Callable[[], None]] = field(default_factory=list)  # what a refusal must leave true

    def attach(self, model: nn.Module, seed: int = 1) -> dt.Adapter:
        """The method on `model`, moved off its start, so that losing it shows."""
        torch.manual_seed(seed)
        adapter = dt.attach(model, self.column, **COLUMNS[self.column][1])
        return moved(adapter, seed)

    def attached(self, kind: str = "llama", seed: int = 1) -> nn.Module:
        """A backbone with the method on it."""
        model = base(kind)
        self.attach(model, seed)
        return model

    def unchanged(self, model: nn.Module, kind: str = "llama") -> None:
        """After a refusal `model` has the base's keys, classes and outputs: asserted once the error is seen."""
        keys, types, want = list(model.state_dict()), [type(m) for m in model.modules()], outputs(model, kind)

        def same() -> None:
            assert list(model.state_dict()) == keys
            assert [type(m) for m in model.modules()] == types
            assert torch.equal(outputs(model, kind), want)

        self.after.append(same)


def moved(adapter: dt.Adapter, seed: int = 1) -> dt.Adapter:
    """The adapter with noise on everything that it trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return adapter


_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}


@functools.cache
def _made(kind: str) -> nn.Module:
    import transformers as t

    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    llama = _SIZES | special | {"num_key_value_heads": 2, "num_labels": 3}
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    torch.manual_seed(0)
    if kind == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**_SIZES, num_labels=3))
    elif kind == "llama":
        model = t.LlamaForSequenceClassification(t.LlamaConfig(**llama))
    elif kind == "causal":
        model = t.LlamaForCausalLM(t.LlamaConfig(**llama))
    elif kind == "tied":
        model = t.LlamaForCausalLM(t.LlamaConfig(**llama, tie_word_embeddings=True))
    else:
        assert kind == "t5", kind
        model = t.T5ForConditionalGeneration(t.T5Config(**t5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2))
    with torch.no_grad():  # transformers' N(0, 0.02) makes every output alike
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.eval()


def base(kind: str = "llama") -> Any:
    """A tiny random backbone, the same weights at every call; two layers, width 32."""
    import copy

    return copy.deepcopy(_made(kind))


def batch(kind: str = "llama") -> dict[str, Tensor]:
    """Four rows of nine tokens, two of them padded."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[3, 4:] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "t5":
        given["decoder_input_ids"] = torch.randint(3, 64, (4, 5), generator=generator)
    return given


def labels(kind: str = "llama") -> Tensor:
    """Labels for `batch`."""
    if kind in ("llama", "bert"):
        return torch.tensor([0, 1, 2, 1])
    given = batch(kind)
    return given["decoder_input_ids"] if kind == "t5" else given["input_ids"]


def outputs(model: Any, kind: str = "llama") -> Tensor:
    """The logits on `batch`, without gradients."""
    with torch.no_grad():
        logits = model(**batch(kind)).logits
    assert isinstance(logits, Tensor)
    return logits


def gradients(model: Any, kind: str = "llama") -> dict[str, Tensor]:
    """The gradients of one loss, by parameter; every trained parameter has one."""
    model.zero_grad(set_to_none=True)
    given = batch(kind)
    given.pop("decoder_input_ids", None)
    model(**given, labels=labels(kind)).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    silent = [n for n, g in found.items() if g is None]
    assert not silent, f"no gradient at {silent}"
    return {n: g.clone() for n, g in found.items() if g is not None}


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    """Is the relative distance of two tensors below `limit`?"""
    return bool((a - b).norm() <= limit * b.norm().clamp_min(1e-9))
