"""WebNLG 2017: facts to text, on a decoder and on an encoder-decoder; one training run, and the score of what it generates.

A row is a set of triples and one text that says them. An input is scored against all of its texts, and only inputs of the ten
categories that the training rows have: a method with a tensor for each category has none for the other five of the test split.
The data are CC BY-NC-SA 4.0 and no part of the repository.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from deltatune.train.data import Collate, Row, Rows

N_VALIDATION, N_TEST, N_NEW = (
    320,
    300,
    80,
)  # texts whose loss is taken, inputs that are answered, tokens an answer at most
EVAL_BATCH = 100
IGNORED = -100


class Facts(NamedTuple):
    """A set of triples of one category, as one line, and what was written about it."""

    category: str
    line: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class WebNLG:
    """The splits; `train` and `validation` have one text a row."""

    train: list[Facts]
    validation: list[Facts]
    test: list[Facts]

    @property
    def categories(self) -> list[str]:
        """Of the training rows, those with most rows first: their numbers are the task ids."""
        n = {name: sum(row.category == name for row in self.train) for name in {row.category for row in self.train}}
        return sorted(n, key=lambda name: (-n[name], name))

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each split as it is used."""
        return {
            name: hashlib.sha256(json.dumps(rows).encode()).hexdigest()
            for name, rows in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }


def line_of(triples: str) -> str:
    """`Aarhus | cityServed | "Aarhus, Denmark"` as plain words, one fact behind the other."""
    cells = [re.sub(r"\s+", " ", cell.replace("_", " ")).strip(' "') for cell in triples.split(" | ")]
    spaced = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cell).lower() if i % 3 == 1 else cell for i, cell in enumerate(cells)]
    return " ; ".join(" | ".join(spaced[i : i + 3]) for i in range(0, len(spaced), 3))


def read(shared: Path, n_validation: int, n_test: int) -> WebNLG:
    """From `shared/data/webnlg`: all training rows, so many validation rows, and so many inputs of the test split.

    Raises ValueError where the folder is not there.
    """
    import pyarrow.parquet as pq

    folder = shared / "data" / "webnlg"
    tables = {}
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.parquet"
        if not path.is_file():
            raise ValueError(
                f"no {path}: --shared (or DELTATUNE_SHARED) names the folder that holds data/webnlg and models"
            )
        tables[split] = pq.read_table(path).to_pylist()
    seen = {row["category"] for row in tables["train"]}
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in tables["test"]:
        if row["category"] in seen:
            grouped.setdefault((row["category"], line_of(row["triples"])), []).append(row["text"])
    single = {
        name: [Facts(r["category"], line_of(r["triples"]), (r["text"],)) for r in tables[name]] for name in tables
    }
    test = [Facts(category, line, tuple(texts)) for (category, line), texts in grouped.items()]
    return WebNLG(single["train"], _some(single["validation"], n_validation), _some(test, n_test))


def _some(rows: list[Facts], n: int) -> list[Facts]:
    """The `n` rows that come first by a hash of themselves: the same ones everywhere, in no order of the file."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())[:n]


def load(folder: Path) -> nn.Module:
    """The backbone in fp32."""
    both = _config(folder).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if both else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"no backbone in {folder}: --shared (or DELTATUNE_SHARED) names the folder that holds models")
    return AutoConfig.from_pretrained(folder)


class Coder:
    """Rows of tokens for one backbone: a decoder's prompt and answer in one row, an encoder-decoder's in two."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self.both: bool = _config(folder).is_encoder_decoder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.categories = list(categories)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    def prompts(self, facts: Sequence[Facts]) -> list[list[int]]:
        """What the answers are asked for with: a decoder's ends with a line break."""
        if self.both:
            return [[*row, self.tokenizer.eos_token_id] for row in self._ids([row.line for row in facts])]
        return self._ids([f"{row.line}\n" for row in facts])

    def rows(self, facts: Sequence[Facts]) -> Rows:
        """One row a text; a prompt's own tokens have no label."""
        coded: list[Row] = []
        for row, prompt, text in zip(
            facts, self.prompts(facts), self._ids([row.texts[0] for row in facts]), strict=True
        ):
            answer = [*text, self.tokenizer.eos_token_id]
            one: Row = {"input_ids": prompt, "labels": answer}
            if not self.both:
                one = {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
            coded.append(one | {"task_ids": self.categories.index(row.category)})
        return Rows(coded)


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """(B, T), rows of different lengths filled up on the right, or on the left."""
    longest = max(map(len, rows))
    full = [[fill] * (longest - len(row)) + [*row] if left else [*row] + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(full)


class Pad(Collate):
    """Batches padded on the right, with the rows' task ids where they are asked for; counts the tokens."""

    def __init__(self, coder: Coder, task_ids: bool) -> None:
        super().__init__(coder.tokenizer, False)
        self.both, self.task_ids = coder.both, task_ids

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
        if self.task_ids:
            batch["task_ids"] = torch.tensor([row["task_ids"] for row in rows])
        self.n_tokens += sum(map(len, ids)) + (sum(len(row["labels"]) for row in rows) if self.both else 0)
        return batch


@torch.inference_mode()
def loss(model: nn.Module, rows: Rows, collate: Pad) -> float:
    """Nats a token of the texts."""
    model.eval()
    device, total, n = next(model.parameters()).device, 0.0, 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for at in range(0, len(order), EVAL_BATCH):
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in order[at : at + EVAL_BATCH]]).items()}
        labels = batch["labels"] if collate.both else batch["labels"][:, 1:]
        n_here = int((labels != IGNORED).sum())
        total += float(model(**batch).loss) * n_here
        n += n_here
    return total / n


@torch.inference_mode()
def answers(model: Any, facts: Sequence[Facts], coder: Coder, task_ids: bool, cache: bool) -> list[str]:
    """Greedy answers in the order of `facts`; a decoder's prompts are padded on the left."""
    model.eval()
    device, prompts = next(model.parameters()).device, coder.prompts(facts)
    order, found = sorted(range(len(facts)), key=lambda i: len(prompts[i])), [""] * len(facts)
    for at in range(0, len(order), EVAL_BATCH):
        here = order[at : at + EVAL_BATCH]
        some = [prompts[i] for i in here]
        given = {
            "input_ids": padded(some, coder.tokenizer.pad_token_id, left=not coder.both),
            "attention_mask": padded([[1] * len(row) for row in some], 0, left=not coder.both),
        }
        if task_ids:
            given["task_ids"] = torch.tensor([coder.categories.index(facts[i].category) for i in here])
        given = {k: v.to(device) for k, v in given.items()}
        out = model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=N_NEW, use_cache=cache)
        new = out if coder.both else out[:, given["input_ids"].shape[1] :]
        for i, text in zip(here, coder.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            found[i] = text.strip()
    return found


def scores(found: Sequence[str], facts: Sequence[Facts]) -> dict[str, Any]:
    """BLEU and chrF of the corpus against all references, by sacrebleu, and how the two were computed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ValueError("scores of generated text need sacrebleu: pip install sacrebleu") from None
    n = max(len(row.texts) for row in facts)
    references = [[row.texts[i] if i < len(row.texts) else None for row in facts] for i in range(n)]
    bleu, chrf = BLEU(lowercase=False), CHRF()
    return {
        "bleu": bleu.corpus_score(list(found), references).score,
        "chrf": chrf.corpus_score(list(found), references).score,
        "signatures": [str(bleu.get_signature()), str(chrf.get_signature())],
    }
