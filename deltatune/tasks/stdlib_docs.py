"""The embedded default: which family of modules is this piece of Python's own documentation about?

The texts are the first paragraphs of the docstrings of the functions, classes and methods in the running interpreter's
standard library, read from its source files with `ast`: nothing is imported or run, so it needs no tkinter and no
display. Modules written in C are left out, as their docstrings depend on how the interpreter was built, and so is
idlelib, an application whose parts belong to every family.

A text that names its own module keeps the name, as a reader would see it: with the names removed a frozen encoder with
logistic regression loses one to two points, so they are no short cut. Texts with the same set of words count as one,
and as none where two families share them, so that near-duplicates are never on both sides of a split.

The rows depend on the Python version, which is part of the task's source and so of its hash.
"""

import ast
import platform
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path

from deltatune.tasks.task import Split, Task, divide, register

FAMILIES = {
    "text": "_markupbase _strptime argparse base64 codecs configparser csv difflib encodings gettext html json locale "
    "optparse plistlib pprint quopri re reprlib shlex sre_compile sre_parse string stringprep textwrap tomllib xml",
    "numbers": "_pydatetime _pydecimal _pylong bisect calendar colorsys datetime decimal fractions hashlib heapq hmac "
    "numbers random secrets statistics zoneinfo",
    "files": "_compression _pyio bz2 compression dbm filecmp fileinput fnmatch genericpath glob gzip io linecache "
    "lzma ntpath nturl2path os pathlib pickle pickletools posixpath pty shelve shutil sqlite3 stat tarfile tempfile "
    "tty wave zipapp zipfile",
    "network": "email ftplib http imaplib ipaddress mailbox mimetypes netrc poplib smtplib socket socketserver ssl "
    "urllib uuid webbrowser wsgiref xmlrpc",
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal "
    "subprocess threading",
    "language": "__future__ _collections_abc _py_abc _sitebuiltins _weakrefset abc annotationlib ast code codeop "
    "collections compileall contextlib copy copyreg ctypes dataclasses dis enum functools graphlib importlib inspect "
    "keyword modulefinder opcode operator pkgutil platform py_compile pyclbr runpy site symtable sysconfig token "
    "tokenize types typing venv weakref zipimport",
    "testing": "bdb cProfile cmd doctest logging pdb profile pstats pydoc rlcompleter tabnanny timeit trace traceback "
    "tracemalloc unittest warnings",
    "gui": "curses tkinter turtle turtledemo",
}
MIN_WORDS = 4
MIN_ROWS = 50


@cache
def gather(root: str | None = None) -> tuple[tuple[str, str], ...]:
    """(text, family) of every distinct docstring under `root`, by default the running interpreter's library.

    Modules that an installation lacks, or that this interpreter cannot parse, are passed over.
    """
    library = Path(root or sysconfig.get_path("stdlib"))
    found: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for family, modules in FAMILIES.items():
        for module in modules.split():
            for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
                if {"test", "tests"}.isdisjoint(path.relative_to(library).parts):
                    for text in _paragraphs(path):
                        found[tuple(sorted(set(re.findall("[a-z]+", text.lower()))))].append((text, family))
    return tuple(same[0] for same in found.values() if len({family for _, family in same}) == 1)


@register("stdlib_docs", "documentation of Python's standard library, eight families of modules; needs no download")
def stdlib_docs() -> Task:
    """About 4,700 rows, 80 / 10 / 10, stratified; always the same rows for one Python version.

    Raises: ValueError where the installation has too little of the library's source.
    """
    docs = gather()
    counts = {family: sum(f == family for _, f in docs) for family in FAMILIES}
    labels = tuple(family for family, n in counts.items() if n >= MIN_ROWS)
    if len(labels) < 2:
        raise ValueError(
            f"task 'stdlib_docs' found {len(docs)} docstrings in {sysconfig.get_path('stdlib')}: this Python has no "
            "source files of its standard library; use a full installation, or data of your own"
        )
    notes = [f"family {family!r} is left out: {n} rows here" for family, n in counts.items() if n < MIN_ROWS]
    rows = Split([(text,) for text, f in docs if f in labels], [labels.index(f) for _, f in docs if f in labels])
    tenth = len(rows) // 10
    train, validation, test = divide(rows, "classification", [tenth, tenth])
    return Task(
        name="stdlib_docs",
        version=1,
        kind="classification",
        text=("text",),
        labels=labels,
        metric="accuracy",
        licence="PSF-2.0",
        source=f"docstrings of the standard library of {platform.python_implementation()} {platform.python_version()}",
        train=train,
        validation=validation,
        test=test,
        notes=tuple(notes),
    )


def _paragraphs(path: Path) -> Iterator[str]:
    """First paragraphs of at least `MIN_WORDS` words, of the public functions, classes and methods in one file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            nodes.append(child)
            doc = ast.get_docstring(child, clean=False)
            if doc and (not child.name.startswith("_") or child.name.startswith("__")):
                text = " ".join(re.split(r"\n\s*\n", cleandoc(doc))[0].split())
                if len(re.findall("[A-Za-z]{2,}", text)) >= MIN_WORDS:
                    yield text
