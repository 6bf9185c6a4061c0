"""FSDP2 on two processes, per block and per linear layer; DDP and FSDP2 on quantised bases."""

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
from foreign import Case, Refused, base, cells, check_cell, close, row

import deltatune as dt

SHARDED, CODED = "FSDP2 on two processes", "A quantised base on two processes"
HOLDS = "outputs, losses, `disabled`, `save`, `restore`; `detach`, `merge` and a later `attach` refuse"

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")


@functools.cache
def in_two_processes() -> tuple[Path, dict[tuple[str, ...], Any]]:
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


def coded(case: Case, to: str, how: str) -> None:
    """The gradients of one process, and the same file."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if case.column == "full":
        dt.attach(dt.quantise(base(), to, **foreign_sharded.CODES[to]), "full")
    folder, everything = in_two_processes()
    found = everything.get((case.column, to, how), "the processes died")
    if isinstance(found, str):
        raise (AttributeError if found.startswith("AttributeError") else ValueError)(found)
    assert found["got"].keys() == found["want"].keys()
    assert all(close(found["got"][n], t) for n, t in found["want"].items())
    model = foreign_sharded.coded(case, to)
    adapter = dt.adapters(model)["default"]
    adapter.save(case.tmp)
    one, other = ((at / "adapter.safetensors").read_bytes() for at in (case.tmp, folder / case.column / f"{to}-{how}"))
    assert one == other


IN_PLACE = Refused("trains it in place, and its weight is quantised")
OURS = Refused("LLM.int8 keeps its scales at the parameter, and FSDP2 puts a plain one in its place")
THEIRS = Refused("'Parameter' object has no attribute 'CB'", AttributeError)


@row(CODED, "DDP on `bnb-nf4`, `bnb-int8` and `int4`: the gradients and the file of one process", full=IN_PLACE)
def ddp_codes(case: Case) -> None:
    for to in foreign_sharded.CODES:
        coded(case, to, "ddp")


@row(CODED, "`fully_shard` per block on `bnb-nf4` and `int4`: the same", full=IN_PLACE)
def fsdp2_codes(case: Case) -> None:
    for to in ("bnb-nf4", "int4"):
        coded(case, to, "fsdp2")


@row(
    CODED,
    "`fully_shard` per block on `bnb-int8`; where the first linear layer has no delta, bitsandbytes' own error",
    THEIRS,
    lora=OURS,
    full=IN_PLACE,
)
def fsdp2_int8(case: Case) -> None:
    coded(case, "bnb-int8", "fsdp2")


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)
