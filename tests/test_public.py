"""The public surface is one literal: a name that appears or goes is seen in review."""

from importlib.metadata import version
from types import ModuleType

import deltatune
from deltatune.version import VERSION

PUBLIC = [
    "APT",
    "ATTEMPT",
    "AdaLoRA",
    "Adapter",
    "AdapterDrop",
    "AttentionFusion",
    "Average",
    "BitFit",
    "ChildTuningD",
    "ChildTuningF",
    "Coda",
    "Copy",
    "DePT",
    "DoRA",
    "Full",
    "Hadamard",
    "Head",
    "HyperFormer",
    "HyperFormerPlus",
    "IA3",
    "IDPG",
    "InsertedPrompt",
    "Invertible",
    "LST",
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
    "Verbaliser",
    "XPrompt",
    "adapter_soup",
    "adapters",
    "adaptformer",
    "attach",
    "bad_x",
    "bank",
    "fixed",
    "hadamard",
    "load",
    "mad_x",
    "mam",
    "mera",
    "p_tuning_v2",
    "param",
    "pfeiffer",
    "sites",
    "spot",
    "warp",
]


def test_public_names() -> None:
    names = [name for name in dir(deltatune) if not name.startswith("_")]
    assert [name for name in names if not isinstance(getattr(deltatune, name), ModuleType)] == PUBLIC


def test_one_version() -> None:
    assert deltatune.__version__ == version("deltatune") == VERSION
