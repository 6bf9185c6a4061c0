"""A method registered from outside needs nothing but its class."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune import contract
from deltatune.core.method import Method

HERE = Path(__file__).parent


def test_it_passes_the_suite(toy: type[Method]) -> None:
    results = contract.run(toy, seed=3)
    assert not [r for r in results if r.status == "failed"], contract.text(results)
    passed = {r.check for r in results if r.status == "passed"}
    assert passed >= {*(c.name for c in contract.checks_of(toy)), *contract.PAIR} - {"limits", "peft_round_trip"}
    assert {r.check for r in results if r.status == "skipped"} == {"limits", "peft_round_trip"}
    assert contract.table(results).row_count == len(results)


def test_it_is_attached_saved_and_loaded(toy: type[Method], tmp_path: Path) -> None:
    bed = contract.BEDS["biased"]
    model, batch = bed.model(), bed.batch()
    plain = model(**batch)
    adapter = dt.attach(model, "toy", where="q,v")
    assert torch.equal(model(**batch), plain)
    assert adapter.params() == 2 * 32 + adapter.n_head * 0
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.5
    adapter.save(tmp_path)
    other = bed.model()
    dt.load(other, tmp_path)
    assert torch.equal(other(**batch), model(**batch))
    assert not torch.equal(other(**batch), plain)
    adapter.merge()
    torch.testing.assert_close(model(**batch), other(**batch), rtol=1e-5, atol=1e-5)


def test_it_meets_the_library_s_own(toy: type[Method]) -> None:
    bed = contract.BEDS["biased"]
    model = bed.model()
    adapter = dt.attach(model, dt.Sum(dt.LoRA(r=2), toy()), where="q,v", head=None)
    assert adapter.params() == 2 * (2 * 32 + 32 * 2 + 32)


def test_the_tree_of_deltatune_is_as_it_was(toy: type[Method]) -> None:
    """It is known by its own module alone."""
    assert toy.__module__ == "toy"
    code = (
        "from deltatune.core.method import METHODS as m; assert 'toy' not in m; import toy; assert m['toy'] is toy.Toy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=_path())
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_checked_is_named(toy: type[Method]) -> None:
    with pytest.raises(ValueError, match=r"unknown kind of site 'linaer'; did you mean 'linear'"):
        contract.run(toy, kinds=["linaer"])
    with pytest.raises(ValueError, match=r"unknown dtype 'float23'; did you mean 'float32'"):
        contract.run(toy, dtypes=["float23"])
    with pytest.raises(ValueError, match=r"toy fits no bed of kind attention"):
        contract.run(toy, kinds=["attention"])
    with pytest.raises(ValueError, match=r"named subclass of deltatune\.Method"):
        contract.run(torch.nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown check 'savelod'; did you mean 'save_load'"):
        contract.run_check(toy, "savelod")


def _path() -> dict[str, str]:
    root = str(HERE.parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
