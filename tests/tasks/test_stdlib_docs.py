"""The embedded default: the same rows each time, no near-duplicates across splits, sources that lack parts."""

import platform
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from deltatune.tasks import Task, stdlib_docs, task


@pytest.fixture(scope="module")
def docs() -> Task:
    return task("stdlib_docs")


def test_size_and_balance(docs: Task) -> None:
    assert set(docs.labels) <= set(stdlib_docs.FAMILIES)
    n = {split: len(rows) for split, rows in docs.splits.items()}
    if not docs.notes:
        assert 3500 <= sum(n.values()) <= 5300  # a distribution may leave parts of the library out
        assert len(docs.labels) == 8
    assert n["validation"] == n["test"] == sum(n.values()) // 10
    for rows in docs.splits.values():
        share = Counter(rows.targets)
        for i in range(len(docs.labels)):
            assert share[i] / len(rows) == pytest.approx(Counter(docs.train.targets)[i] / n["train"], abs=0.01)
    assert platform.python_version() in docs.source


def test_deterministic(docs: Task) -> None:
    stdlib_docs.gather.cache_clear()
    assert task("stdlib_docs").hash == docs.hash


def test_no_near_duplicates(docs: Task) -> None:
    texts = [text for rows in docs.splits.values() for (text,) in rows.texts]
    assert len({frozenset(re.findall("[a-z]+", text.lower())) for text in texts}) == len(texts)
    assert all(len(re.findall("[A-Za-z]{2,}", text)) >= stdlib_docs.MIN_WORDS and "\n" not in text for text in texts)


def test_nothing_is_imported() -> None:
    before = set(sys.modules)
    stdlib_docs.gather.cache_clear()
    stdlib_docs.gather()
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("tkinter", "turtle", "xmlrpc")}


def library(root: Path) -> None:
    (root / "xml" / "tests").mkdir(parents=True)
    (root / "xml" / "__init__.py").write_text(
        'class Parser:\n    """Parse the markup of one document.\n\n    More about it.\n    """\n\n'
        '    def close(self):\n        """Close this parser and its\n        input stream."""\n\n'
        '    def _hidden(self):\n        """Nobody should see this text here."""\n\n'
        '    def __len__(self):\n        """Too short."""\n\n'
        'if True:\n    def g():\n        """Not at the top of the module."""\n'
    )
    (root / "xml" / "tests" / "test_xml.py").write_text('def f():\n    """A test is no documentation."""\n')
    (root / "tarfile.py").write_text('async def f():\n    """Close this PARSER, and its input stream!"""\n')
    (root / "zipfile.py").write_text('def f():\n    """Read every member of the archive."""\n')
    (root / "gzip.py").write_text('def f():\n    """Every member of the archive: read!"""\n')
    (root / "shutil.py").write_text("def f(:\n")
    (root / "unknown.py").write_text('def f():\n    """This module is in no family."""\n')


def test_what_is_gathered(tmp_path: Path) -> None:
    library(tmp_path)
    assert stdlib_docs.gather(str(tmp_path)) == (
        ("Parse the markup of one document.", "text"),
        ("Every member of the archive: read!", "files"),
    ), "one of two near-duplicates, none of those that two families share, no broken file"


def test_families_that_an_installation_lacks(docs: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(row for row in stdlib_docs.gather() if row[1] != "gui")
    monkeypatch.setattr(stdlib_docs, "gather", lambda: kept)
    without = task("stdlib_docs")
    assert "gui" not in without.labels
    assert without.notes[-1] == "family 'gui' is left out: 0 rows here"
    monkeypatch.setattr(stdlib_docs, "gather", tuple)
    with pytest.raises(ValueError, match="no source files of its standard library"):
        task("stdlib_docs")
