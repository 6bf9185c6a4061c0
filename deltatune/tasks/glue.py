"""GLUE (1804.07461): nine tasks over sentences and pairs, from the folder named by `DELTATUNE_DATA` or from the hub.

Where a task has no labelled test split its published validation split becomes the test split, and a tenth of the
training rows, at most 1,000, becomes the validation split.
"""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from deltatune.tasks import files
from deltatune.tasks.task import Kind, Task, register


class Row(NamedTuple):
    """One line of the table below."""

    text: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    licence: str
    summary: str


_NLI = ("entailment", "not_entailment")
_SST = "Stanford Sentiment Treebank (research)"
_MRPC = "Microsoft Research Paraphrase Corpus (research)"
TABLE = {
    "cola": Row(("sentence",), ("unacceptable", "acceptable"), "matthews", "CoLA (research)", "is it grammatical?"),
    "sst2": Row(("sentence",), ("negative", "positive"), "accuracy", _SST, "sentiment of film reviews"),
    "mrpc": Row(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1", _MRPC, "paraphrases in news"),
    "qqp": Row(("question1", "question2"), ("not_duplicate", "duplicate"), "f1", "Quora terms", "same question?"),
    "stsb": Row(("sentence1", "sentence2"), (), "pearson", "CC BY-SA 4.0", "similarity from 0 to 5 (regression)"),
    "mnli": Row(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy", "OANC, CC BY", "inference"
    ),
    "qnli": Row(("question", "sentence"), _NLI, "accuracy", "CC BY-SA 4.0", "does the sentence hold the answer?"),
    "rte": Row(("sentence1", "sentence2"), _NLI, "accuracy", "RTE 1-5 (research)", "textual entailment"),
    "wnli": Row(("sentence1", "sentence2"), _NLI[::-1], "accuracy", "CC BY 4.0", "pronouns, as inference"),
}
HUB = "nyu-mll/glue"
VARIABLE = "DELTATUNE_DATA"


def glue(short: str) -> Task:
    """The task `glue/<short>`: `$DELTATUNE_DATA/glue_<short>` where that variable is set, else the hub's copy.

    Raises: ValueError where the folder, a column or the hub is missing, or a label does not fit.
    """
    row = TABLE[short]
    root = os.environ.get(VARIABLE)
    if root:
        folder = Path(root) / f"glue_{short}"
        if not folder.is_dir():
            raise ValueError(f"task 'glue/{short}': {VARIABLE} names {root}, which has no folder {folder.name}")
        tables, source = files.read_folder(folder), f"folder {folder.name}"
    else:
        tables, source = _hub(short), f"hub {HUB} {short}"
    kind: Kind = "classification" if row.labels else "regression"
    return files.build(
        tables,
        name=f"glue/{short}",
        kind=kind,
        text=row.text,
        label="label",
        labels=row.labels,
        metric=row.metric,
        licence=row.licence,
        source=source,
        validation_as_test=True,
    )


def _hub(short: str) -> dict[str, files.Table]:
    where = f"set {VARIABLE} to a folder that has glue_{short} to read it from there"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"task 'glue/{short}' comes from the hub through the package 'datasets'; {where}") from error
    try:
        loaded = datasets.load_dataset(HUB, short)
    except Exception as error:  # the hub's client raises many unrelated types; the user needs one sentence
        raise ValueError(f"task 'glue/{short}' could not be read from the hub ({error}); {where}") from error
    tables = {}
    for split in loaded:
        if (name := files.split_name(split)) is not None:
            columns = {c: list(loaded[split][c]) for c in loaded[split].column_names}
            tables[name] = files.Table(f"{HUB} {short} {split}", columns)
    return tables


for _short, _row in TABLE.items():
    register(f"glue/{_short}", f"{_row.summary}, {_row.metric}")(partial(glue, _short))
