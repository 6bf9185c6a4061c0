"""One pair of processes on gloo runs every distributed check in turn: starting processes is what costs.

Each rank takes half of the rows; DDP's and FSDP2's gradients must be those of one process with all rows, and the file
that `save` writes must be the same file.
"""

import datetime
import json
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ..core.compose import Preset
from ..core.method import Method
from .beds import BEDS
from .checks import TOLERANCE, Trial, alike, sources_for

PAIR = ("ddp", "fsdp2")
Job = tuple[str, type[Method] | Preset, str, str]  # one of PAIR, method, bed, dtype


def two_processes(jobs: Sequence[Job], seed: int = 0) -> list[str]:
    """What went wrong in each job; "" where nothing did."""
    if not dist.is_available() or not dist.is_gloo_available():
        return ["skipped: this torch has no gloo"] * len(jobs)
    with tempfile.TemporaryDirectory() as folder:
        try:
            pickle.dumps(list(jobs))
        except (pickle.PicklingError, AttributeError) as error:
            return [f"skipped: another process cannot import the class ({error})"] * len(jobs)
        mp.spawn(_process, args=(folder, list(jobs), seed), nprocs=2)
        found: list[str] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    return found


def _process(rank: int, folder: str, jobs: list[Job], seed: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for _, method, bed, dtype in jobs:  # before there is a group: each rank saves its own
        if method.sources and method.needs_sources:
            sources_for(method.name, BEDS[bed], getattr(torch, dtype))
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    found = []
    for n, (name, method, bed, dtype) in enumerate(jobs):
        mine = ""
        try:
            _equal(name, method, bed, getattr(torch, dtype), seed, os.path.join(folder, str(n)))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            mine = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        both: list[Any] = [None, None]
        dist.all_gather_object(both, mine)
        found.append(next((text for text in both if text), ""))
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still run, and a process that ends around them now and then aborts


def _equal(name: str, method: type[Method] | Preset, bed: str, dtype: torch.dtype, seed: int, folder: str) -> None:
    trial = Trial(method, BEDS[bed], dtype, seed)
    model, adapter = trial.attached()
    trial.loss(model).backward()
    want = {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None and p.numel()}
    if dist.get_rank() == 0:
        adapter.save(os.path.join(folder, "one"))
    dist.barrier()

    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model, adapter = trial.attached()
    wrapped = _ddp(model) if name == "ddp" else _fsdp2(model)
    trial.loss(wrapped, rows=half).backward()
    got = {n: _whole(p.grad) for n, p in adapter.named_parameters() if p.grad is not None and p.numel()}
    assert got.keys() == want.keys(), f"{sorted(want.keys() - got.keys())} have no gradient under {name}"
    alike(got, want, TOLERANCE[dtype], f"under {name}")
    for p in model.parameters():
        p.grad = None
    adapter.save(os.path.join(folder, name))
    dist.barrier()
    for file in ("adapter.safetensors", "adapter.json"):
        one, other = ((Path(folder) / at / file).read_bytes() for at in ("one", name))
        assert one == other, f"save() under {name} wrote another {file}"


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for child in model.modules():
        if isinstance(child, nn.ModuleList) and type(child) is nn.ModuleList:
            for block in child:
                if block is not model:
                    fully_shard(block, mesh=mesh)
            break
    fully_shard(model, mesh=mesh)
    return model


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t
