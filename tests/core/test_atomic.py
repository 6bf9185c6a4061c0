"""All or nothing: whatever step of attach, load or merge fails, the model is bit for bit what it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.contract.beds import BEDS, outputs
from deltatune.contract.checks import State, perturb
from deltatune.core import attach as verbs
from deltatune.core import base, files, identity, record
from deltatune.core.method import METHODS, Method

TREES = {
    "lora": lambda: (dt.LoRA(r=2), "biased", "q,v"),
    "sum": lambda: (dt.Sum(dt.LoRA(r=2), dt.BitFit()), "bias-free", "q,mlp.down"),
    "span": lambda: (METHODS["toy_parallel"](), "span", None),
    "bank": lambda: (METHODS["toy_shared"](), "biased", "q,v"),
    "reader": lambda: (METHODS["mask_reader"](), "attention", "mlp.down"),
    "tokens": lambda: (dt.PromptTuning(n=3), "input", None),
    "full": lambda: (dt.Full(), "biased", None),
}
ATTACHING: list[tuple[Any, str]] = [
    (Method, "build"),
    (verbs, "base_fingerprint"),
    (verbs, "swap"),
    (verbs, "place"),
    (record, "add"),
    (verbs, "refresh"),
]


class Injected(Exception):
    """The failure that a test puts in the way."""


def break_call(patch: pytest.MonkeyPatch, owner: Any, name: str, n: int, after: bool) -> Callable[[], bool]:
    """Let the `n`-th call of `owner.name` fail, before or after it did its work; was it reached?"""
    real = getattr(owner, name)
    calls = [0]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != n:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Injected(f"{name}, call {n}")

    patch.setattr(owner, name, breaking)
    return lambda: calls[0] >= n


def unhurt(model: nn.Module, before: State, out: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    before.restored(model)
    assert torch.equal(outputs(model, batch), out)


@pytest.mark.parametrize("second", [False, True], ids=["first", "beside-another"])
@pytest.mark.parametrize("kind", TREES)
def test_attach(toys: dict[str, type[Method]], kind: str, second: bool) -> None:
    tree, bed, where = TREES[kind]()
    batch = BEDS[bed].batch()
    reached = 0
    for owner, name in ATTACHING:
        for n in (1, 2, 3):
            for after in (False, True):
                model = BEDS[bed].model()
                if second:
                    perturb(dt.attach(model, "lora", where="k", head=None, name="other"))
                before, out = State(model), outputs(model, batch)
                with pytest.MonkeyPatch.context() as patch:
                    was_reached = break_call(patch, owner, name, n, after)
                    try:
                        dt.attach(model, tree, where=where, head=None)
                    except Injected:
                        unhurt(model, before, out, batch)
                        reached += 1
                    else:
                        assert not was_reached()
    assert reached >= (2 if kind == "full" else 6), "hardly a stage of attach was reached"


LOADING: list[tuple[Any, str]] = [
    *ATTACHING,
    (files, "read_adapter"),
    (identity, "same_base"),
    (files, "check_keys"),
    (verbs, "integrate"),
    (dt.Adapter, "state_dict"),
    (dt.Adapter, "owned"),
]


@pytest.mark.parametrize("kind", ["lora", "sum", "bank", "full", "tokens"])
def test_load(toys: dict[str, type[Method]], kind: str, tmp_path: Path) -> None:
    tree, bed, where = TREES[kind]()
    batch = BEDS[bed].batch()
    source = perturb(dt.attach(BEDS[bed].model(), tree, where=where, head=None))
    source.save(tmp_path)
    reached = 0
    for owner, name in LOADING:
        for n in (1, 2, 3):
            for after in (False, True):
                model = BEDS[bed].model()
                before, out = State(model), outputs(model, batch)
                with pytest.MonkeyPatch.context() as patch:
                    was_reached = break_call(patch, owner, name, n, after)
                    try:
                        dt.load(model, tmp_path)
                    except Injected:
                        unhurt(model, before, out, batch)
                        reached += 1
                    else:
                        assert not was_reached()
    assert reached >= 10, "hardly a stage of load was reached"


@pytest.mark.parametrize(
    "bed", ["biased", "bias-free", "transposed", "slices", "embedding", "norm", "experts", "conv2d"]
)
def test_merge(bed: str) -> None:
    """A write that fails half way through, on any site, is undone everywhere."""
    place = BEDS[bed].place
    tree = dt.BitFit() if bed == "bias-free" else dt.Copy() if bed == "norm" else dt.LoRA(r=2)
    batch = BEDS[bed].batch()
    reached = 0
    for owner, name in ((base, "write"), (base, "folded"), (base, "snapshot"), (base, "restored")):
        for n in (1, 2, 3):
            for after in (False, True):
                model = BEDS[bed].model()
                adapter = perturb(dt.attach(model, tree, where=place, head=None))
                before, out = State(model), outputs(model, batch)
                with pytest.MonkeyPatch.context() as patch:
                    was_reached = break_call(patch, owner, name, n, after)
                    try:
                        adapter.merge()
                    except Injected:
                        reached += 1
                        assert adapter.enabled
                    else:
                        assert not was_reached()
                        adapter.unmerge()
                unhurt(model, before, out, batch)
    assert reached >= 8, "hardly a stage of merge was reached"
