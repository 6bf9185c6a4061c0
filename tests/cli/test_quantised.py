"""Quantised bases from the command line: each method gets the base, and the data, that it needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import deltatune as dt
from deltatune.assess import matrix
from deltatune.assess.cells import read_folder
from deltatune.cli import main
from deltatune.core.storage import format_of
from deltatune.methods import lq_lora
from deltatune.train.backbone import load_classifier, load_shapes

LABELS = ("down", "up")


@pytest.fixture(scope="module")
def wide(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The backbone of the other tests, of a width that holds a group of 64."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(backbone, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return str(folder)


def trained(wide: str, reviews: Path, out: Path, *more: str) -> int:
    quick = ["--steps", "4", "--batch", "16", "--max_length", "32", "--device", "cpu"]
    return main(["train", "--model", wide, "--data", str(reviews), "--out", str(out), *quick, *more])


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(["the film was very good"], return_tensors="pt")).logits
    return found


def test_lq_lora_looks_at_the_training_rows(
    wide: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its errors are weighted with them; the run keeps the base that it made, and `merge` and `combine` read that one."""
    seen: list[int] = []
    look = lq_lora.information

    def spied(adapter: Any, deltas: Any, batches: Any, loss: Any) -> Any:
        seen.append(sum(len(b["labels"]) for b in batches))
        return look(adapter, deltas, batches, loss)

    monkeypatch.setattr(lq_lora, "information", spied)
    method = ["--method", "lq_lora", "--method.r", "4", "--method.bits", "4.0"]
    assert trained(wide, reviews, tmp_path / "run", *method, "--n_train", "40") == 0
    assert seen == [40]
    assert "its base" in capsys.readouterr().out
    base, tokenizer = dt.load_base(tmp_path / "run" / "base"), AutoTokenizer.from_pretrained(wide)
    dt.load(base, tmp_path / "run" / "adapter")
    want = logits(base, tokenizer)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(
        logits(load_classifier(str(tmp_path / "merged"), LABELS)[0], tokenizer), want, atol=1e-4, rtol=0
    )
    runs = [str(tmp_path / "run")] * 2
    assert main(["combine", *runs, "--method", "cat", "--head", "0", "--out", str(tmp_path / "sum")]) == 0
    again = dt.load_base(tmp_path / "run" / "base")
    dt.load(again, tmp_path / "sum")
    torch.testing.assert_close(logits(again, tokenizer), want, atol=1e-4, rtol=0)


def test_compare(
    wide: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each cell on its own base; those of the same seed begin from the same head, and a plain one follows on a plain base."""
    tiny = matrix.Size(n_steps=2, batch=16, lr_trials=1, head_lr=0.05, n_train=32, n_validation=16, max_length=16)
    monkeypatch.setitem(matrix.BUDGETS, "tiny-v1", tiny)
    hyper = {name: {"r": 4} for name in ("qlora", "qa_lora", "qdylora", "loftq")} | {"lq_lora": {"r": 4, "bits": 4.0}}
    names, _ = matrix.all_methods(load_shapes(wide), hyper)
    assert {*hyper, "peqa"} <= {*names}
    out = tmp_path / "results"
    args = [
        "compare",
        "--model",
        wide,
        "--data",
        str(reviews),
        "--budget",
        "tiny-v1",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    options = [f"--hyper.{name}={json.dumps(own)}" for name, own in hyper.items()]
    assert main([*args, "--methods", "loftq,lora,lq_lora,qlora,qdylora,qa_lora,peqa", *options]) == 0, (
        capsys.readouterr()
    )
    cells = {c.key.method: c for c in read_folder(out)}
    assert {name: c.config.get("base") for name, c in cells.items()} == {
        "lora": None, "loftq": None, "lq_lora": None, "qlora": "bnb-nf4", "qdylora": "bnb-nf4", "qa_lora": "int4",
        "peqa": "int4",
    }  # fmt: skip
    assert cells["qlora"].label.endswith("base in bnb-nf4")
    assert len({c.n_backbone for c in cells.values()}) == 1
    plain = cells["lora"].memory
    assert plain is not None
    for name, c in cells.items():
        assert c.status == "done" and c.memory is not None and c.n_trainable
        assert (c.memory.weights < plain.weights) == (name != "lora"), name


def test_a_width_that_no_group_divides(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`all` leaves the method out, and says why."""
    names, left_out = matrix.all_methods(load_shapes(backbone), {"qlora": {"r": 4}})
    assert "qlora" in names and "qa_lora" not in names
    why = next(text for text in left_out if text.startswith("qa_lora"))
    assert "query: group is 64; it must be in eights and divide the layer's 32 inputs" in why


def test_what_cannot_be_quantised_writes_nothing(
    backbone: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to, why in (
        ("int5", "unknown format 'int5'"),
        ("int4", "group is 64; it must be in eights and divide the layer's 32"),
    ):
        assert trained(backbone, reviews, tmp_path / "run", "--method", "lora", "--quantise", to) == 2
        assert why in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_paged_optimiser_is_asked_for(
    wide: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one word; where it cannot be, the line says what is there."""
    assert trained(wide, reviews, tmp_path / "run", "--method", "qlora", "--method.r", "4") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "base in bnb-nf4" in shown and "cpu, plain AdamW, its pages are CUDA's alone" in shown
    model = dt.quantise(load_classifier(wide, LABELS)[0], "bnb-nf4")
    dt.load(model, tmp_path / "run" / "adapter")
    assert any(format_of(m) is not None for m in model.modules())
