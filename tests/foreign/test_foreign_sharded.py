"""FSDP2 on two processes: per block and per linear layer."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import foreign_sharded
import pytest
import torch
from foreign import Case, cells, check_cell, close, row

SHARDED = "FSDP2 on two processes"
HOLDS = "outputs, losses, `disabled`, `save`, `restore`; `detach`, `merge` and a later `attach` refuse"

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")


@functools.cache
def in_two_processes() -> tuple[Path, dict[tuple[str, str], Any]]:
    """Every method under every sharding, from one pair of processes; nothing where they died."""
    folder = Path(tempfile.mkdtemp(prefix="deltatune-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    died = torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException
    with contextlib.suppress(*died):
        torch.multiprocessing.spawn(foreign_sharded.run, args=(str(folder), torch.get_num_threads()), nprocs=2)
    file = folder / "found.pt"
    return folder, torch.load(file, weights_only=False) if file.exists() else {}


def sharded(case: Case, way: str) -> None:
    """Outputs, losses, `disabled`, `save` on every rank, `restore` into shards; structural verbs refuse."""
    folder, everything = in_two_processes()
    found = everything.get((case.column, way), "the processes died")
    assert isinstance(found, dict), found
    for key in ("outputs", "trained", "disabled", "restored"):
        assert close(*found[key]), key
    ours, alone = found["losses"]
    assert ours == pytest.approx(alone, rel=1e-5)
    assert ours[0] != ours[1]
    assert found["params"][0] == found["params"][1]
    assert close(foreign_sharded.saved(folder, case.column, way), found["trained"][1])
    assert found["errors"].pop("attach") == "the model is sharded already; attach first, then shard"
    assert set(found["errors"]) == {"detach", "merge"}
    assert all("attach, detach and merge before sharding" in error for error in found["errors"].values())


@row(SHARDED, f"`fully_shard` per block: {HOLDS}")
def fsdp2_per_block(case: Case) -> None:
    sharded(case, "block")


@row(SHARDED, f"`fully_shard` per linear layer: {HOLDS}")
def fsdp2_per_linear(case: Case) -> None:
    sharded(case, "linear")


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)
