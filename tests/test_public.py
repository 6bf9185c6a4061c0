"""The public surface is one literal: a name that appears or goes is seen in review."""

from importlib.metadata import version
from types import ModuleType

import deltatune
from deltatune.version import VERSION

PUBLIC = [
    "Adapter",
    "Average",
    "BitFit",
    "Copy",
    "Full",
    "Head",
    "IA3",
    "LoRA",
    "Method",
    "PrefixTuning",
    "PromptTuning",
    "Schedule",
    "Schedules",
    "Sequential",
    "Site",
    "Stack",
    "Sum",
    "adapters",
    "attach",
    "bank",
    "fixed",
    "load",
    "param",
    "sites",
]


def test_public_names() -> None:
    names = [name for name in dir(deltatune) if not name.startswith("_")]
    assert [name for name in names if not isinstance(getattr(deltatune, name), ModuleType)] == PUBLIC


def test_one_version() -> None:
    assert deltatune.__version__ == version("deltatune") == VERSION
