"""A category's page says what its folder of results holds; WebNLG's rows are what a backbone should see."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.core.compose import looking

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cells  # noqa: E402
import memory  # noqa: E402
import webnlg  # noqa: E402

AGAIN = "run `python benchmarks/cells.py --category {} --write`"


def cell(folder: Path, method: str, bleu: float, nats: float, status: str = "done", **more: Any) -> None:
    """A cell as a run writes it."""
    job = cells.Job(
        "llama-17m", method, cells.TRY, 0, "", str(folder), "", "cpu", 1, "python benchmarks/cells.py --try"
    )
    found = {
        "n_trainable": 7,
        "lr": 0.5,
        "curve": [[1, 3.0], [2, 2.0]],
        "step_ms": 12.3,
        "generation": {"inputs": 4, "cache": True},
        "scores": {"bleu": bleu, "chrf": 20.0, "validation_loss": nats},
    }
    cells.record(job, {"status": status, **found, **more})


def test_the_tables_rank_and_mark(tmp_path: Path) -> None:
    cell(tmp_path, "none", 1.0, 5.0)
    cell(tmp_path, "lora", 9.0, 2.0)
    cell(tmp_path, "ia3", 10.5, 1.5)
    cell(tmp_path, "pasta", 0.9, 4.9)
    cell(tmp_path, "vpt", 0.0, 0.0, "unfit", error="images only")
    text = cells.tables(tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `ia3`", "| `lora`", "| `none`", "| `pasta`"]
    assert [row[-1] for row in rows] == [" |", "baseline |", "baseline |", "did not learn |"]
    assert rows[0][1:6] == ["7", "0.5", "3.00 to 2.00", "1.500", "10.50"]
    assert "- `vpt` does not fit: images only" in text
    with pytest.raises(ValueError, match="no such results folder"):
        cells.tables(tmp_path / "empty")


def test_a_cell_that_is_there_is_done(tmp_path: Path) -> None:
    job = cells.Job("llama-17m", "lora", cells.TRY, 0, "", str(tmp_path), "", "cpu", 1, "")
    assert not cells.is_done(job)
    cell(tmp_path, "lora", 9.0, 2.0)
    assert cells.is_done(job)
    assert json.loads(job.path.read_text())["budget"] == asdict(cells.TRY)
    other = cells.Job("llama-17m", "lora", cells.SIZES["webnlg"], 0, "", str(tmp_path), "", "cpu", 1, "")
    with pytest.raises(ValueError, match="give another --out"):
        cells.is_done(other)


def test_facts_are_plain_words() -> None:
    line = webnlg.line_of('Aarhus_Airport | cityServed | "Aarhus, Denmark" | Aarhus | leaderName | Jacob_Bundsgaard')
    assert line == "Aarhus Airport | city served | Aarhus, Denmark ; Aarhus | leader name | Jacob Bundsgaard"


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"webnlg/train.parquet: --shared"):
        webnlg.read(tmp_path, 1, 1)


class Words:
    """A tokenizer of single characters; 0 fills up, 1 ends."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts: list[str], add_special_tokens: bool) -> Any:
        return type("Out", (), {"input_ids": [[ord(c) for c in text] for text in texts]})


def test_a_decoder_s_prompt_has_no_label() -> None:
    coder = object.__new__(webnlg.Coder)
    coder.both, coder.tokenizer, coder.categories = False, Words(), ["Food", "City"]
    facts = [webnlg.Facts("City", "ab", ("xyz",)), webnlg.Facts("Food", "abcd", ("x",))]
    batch = webnlg.Pad(coder, task_ids=True)(coder.rows(facts).rows)
    a, b, c, d, x, y, z, n = map(ord, "abcdxyz\n")
    assert batch["input_ids"].tolist() == [[a, b, n, x, y, z, 1], [a, b, c, d, n, x, 1]]
    assert batch["labels"].tolist() == [[-100] * 3 + [x, y, z, 1], [-100] * 5 + [x, 1]]
    assert batch["task_ids"].tolist() == [1, 0] and batch["attention_mask"].all()
    assert webnlg.padded([[1, 2], [3]], 0, left=True).tolist() == [[1, 2], [0, 3]]
    assert torch.equal(webnlg.padded([[1, 2], [3]], 0), torch.tensor([[1, 2], [3, 0]]))


@pytest.mark.parametrize("category", cells.CATEGORIES)
def test_page_is_current(category: str) -> None:
    page, folder = cells.page_of(category).read_text(encoding="utf-8"), cells.results_of(category)
    tables = cells.tables(folder) if folder.is_dir() else ""  # nothing was measured yet
    assert page.partition(cells.OPEN)[2].partition(cells.CLOSE)[0] == f"\n{tables}", AGAIN.format(category)


def test_seeds_are_one_row(tmp_path: Path) -> None:
    base = {"bits": 4.127}
    for seed, bleu in enumerate((8.0, 10.0)):
        job = cells.Job(
            "llama-17m", "qlora", cells.TRY, seed, "", str(tmp_path), "", "cpu", 1, "", category="quantised"
        )
        scores = {"bleu": bleu, "chrf": 20.0, "validation_loss": 2.0}
        found = {"n_trainable": 7, "lr": 0.1 + seed, "curve": [[1, 3.0]], "generation": {"inputs": 4, "cache": True}}
        cells.record(job, {**found, **base, "scores": scores})
    cell(tmp_path, "none", 1.0, 5.0)
    text = cells.tables(tmp_path)
    assert "2 seeds, mean ± standard deviation" in text
    assert "| `qlora` | 4.13 | 7 | 0.1 1.1 | 3.00 to 3.00 | 2.000 ± 0.000 | 9.00 ± 1.41 | 20.0 ± 0.0 | 0 |  |" in text
    assert "| `none` | 32 | 7 |" in text


@pytest.mark.parametrize("name", ["lora", "qlora", "loftq_nf2", "lq_lora_2_5", "qa_lora"])
def test_arms_begin_each_trial_alike(name: str, tmp_path: Path) -> None:
    job = cells.Job("llama-17m", name, cells.TRY, 0, "", "", "", "cpu", 1, "", category="quantised")
    model = memory.base("tiny", "cpu").float()
    if job.arm.to:
        dt.quantise(model, job.arm.to, **job.arm.options)
    ids = torch.arange(8).view(2, 4)
    start = cells.starter(model, looking(cells.tree_of(job), lambda n: [{"input_ids": ids, "labels": ids}]), tmp_path)
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        adapter = start()
        assert all(d.config.r == 16 for d in adapter.deltas.values()) and len(adapter.deltas) == 21
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seen.append(loss.item())
        with torch.no_grad():
            for p in adapter.parameters():
                assert p.grad is not None
                p.add_(0.1)
        adapter.detach()
    assert seen[0] == seen[1]
    assert job.lr == dt.LoRA.lr
    if name != "lora":
        assert 2 < cells.bits(model) < (6.1 if name == "qa_lora" else 4.6 if name == "qlora" else 2.6)  # with tables
