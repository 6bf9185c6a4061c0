"""The public surface is one literal: a name that appears or goes is seen in review."""

from importlib.metadata import version
from types import ModuleType

import deltatune
from deltatune.version import VERSION

PUBLIC = [
    "AdaLoRA",
    "Adapter",
    "Average",
    "BitFit",
    "ChildTuningD",
    "ChildTuningF",
    "Copy",
    "DoRA",
    "Full",
    "Hadamard",
    "Head",
    "IA3",
    "LoRA",
    "MPT",
    "Method",
    "PASTA",
    "PTuning",
    "PTuningMLP",
    "Parallel",
    "PrefixTuning",
    "ProPELTAdapter",
    "ProPELTLoRA",
    "ProPELTPrefix",
    "PromptTuning",
    "Residual",
    "SSF",
    "Schedule",
    "Schedules",
    "Sequential",
    "Site",
    "Stack",
    "Sum",
    "TinyAttention",
    "TokenRows",
    "VPT",
    "adapters",
    "adaptformer",
    "attach",
    "bank",
    "fixed",
    "hadamard",
    "load",
    "mam",
    "p_tuning_v2",
    "param",
    "pfeiffer",
    "sites",
]


def test_public_names() -> None:
    names = [name for name in dir(deltatune) if not name.startswith("_")]
    assert [name for name in names if not isinstance(getattr(deltatune, name), ModuleType)] == PUBLIC


def test_one_version() -> None:
    assert deltatune.__version__ == version("deltatune") == VERSION
