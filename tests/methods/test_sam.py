"""SAM's masks against the reference runner's."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fish_mask import attached, looked, loss, masks_of
from torch import Tensor

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_sam.py"))
collate, examples = MAKE["collate"], MAKE["examples"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SETTINGS = GOLDEN["settings"]
BURN_IN = SETTINGS["burnin"] - 1  # the runner looks at one step less than it is told


def batches() -> list[dict[str, Tensor]]:
    rows = examples()
    return [{k: v for k, v in collate([rows[i] for i in picked]).items() if k != "idx"} for picked in GOLDEN["batches"]]


def options(**changed: Any) -> dict[str, Any]:
    return {"keep": SETTINGS["share"], "burn_in": BURN_IN, "clip": SETTINGS["max_grad_norm"]} | changed


def test_the_masks_are_the_references() -> None:
    """Bit for bit: each tensor's own share, none of a vector that is too small for it."""
    _, adapter = attached("sam", **options())
    adapter.calibrate(batches())
    want = {n.replace("encoder.", "bert.", 1): m for n, m in GOLDEN["masks"].items()}
    got = masks_of(adapter)
    assert got == want
    assert {m.count("1") for n, m in got.items() if n.endswith("bias") and len(m) < 14} == {0}
    assert adapter.params() == sum(m.count("1") for m in want.values()) > 50


def test_the_sums_are_the_references() -> None:
    """Clipped over all tensors together, the classifier's too."""
    (name, shown), *_ = GOLDEN["sums"].items()
    site = "0|" + name.replace("encoder.", "bert.", 1).removesuffix(".bias")
    got = looked(attached("sam", **options())[1], batches())[site][-8:] * BURN_IN
    torch.testing.assert_close(got, torch.tensor(shown).abs(), rtol=1e-5, atol=1e-9)
    free = looked(attached("sam", **options(clip=0.0))[1], batches())[site][-8:] * BURN_IN
    assert float((free - got).norm() / got.norm()) > 0.5


def test_signs_matter() -> None:
    """Gradients that cancel are not chosen, though their squares are large."""
    signs = iter([1.0, -1.0])
    found = looked(attached("sam", **options(clip=0.0))[1], batches()[:1] * 2, lambda m, b: next(signs) * loss(m, b))
    assert max(float(s.max()) for s in found.values()) < 1e-7


@pytest.mark.parametrize(("hyper", "said"), [({"burn_in": 0}, "burn_in = 0"), ({"clip": -1.0}, "clip = -1.0")])
def test_bad_hyperparameters(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attached("sam", **hyper)
