"""Adapter files of format 1 load from now on: tests/fixtures/format1/, made once by tests/fixtures/make_format1.py."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltatune as dt

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MAKE = runpy.run_path(str(FIXTURES / "make_format1.py"))
FOLDERS = sorted(path.parent for path in FIXTURES.glob("format1/*/adapter.json"))


def test_none_is_lost() -> None:
    assert {folder.name for folder in FOLDERS} >= MAKE["FIXTURES"].keys()


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_loads(folder: Path, tmp_path: Path) -> None:
    model = MAKE["tiny"]()
    with torch.no_grad():
        bare = model(**MAKE["inputs"]()).logits
        adapter = dt.load(model, folder)
        logits = model(**MAKE["inputs"]()).logits
    want = torch.tensor(json.loads((folder / "logits.json").read_text(encoding="utf-8")))
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    assert (want - bare).abs().max() > 1e-2, "an adapter that does nothing would show nothing"

    card = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    assert (card["format"], card["n_params"], card["n_head"]) == (1, adapter.params(), adapter.n_head)
    adapter.save(tmp_path)
    old, new = (load_file(at / "adapter.safetensors") for at in (folder, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old.keys() - {"base.fingerprint"})
