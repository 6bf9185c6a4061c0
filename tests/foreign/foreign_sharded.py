"""What two gloo processes do: every method under FSDP2, a shard per block and a shard per linear layer; on quantised bases DDP too."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from foreign import COLUMNS, Case, base, batch, gradients, labels, outputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deltatune as dt
from deltatune.core.sharded import whole

WAYS = ("block", "linear")
CODES: dict[str, dict[str, Any]] = {"bnb-nf4": {}, "int4": {"group": 16}, "bnb-int8": {}}


def sgd(model: Any) -> torch.optim.Optimizer:
    """The optimiser, made before any forward: FSDP2 leaves the root's parameters gathered after one."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def trained(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses of two steps."""
    found = []
    for _ in range(2):
        loss = model(**batch(), labels=labels()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def shard(model: Any, way: str) -> None:
    """`fully_shard` on every block or on every linear layer, then on the model."""
    mesh = init_device_mesh("cpu", (2,))
    modules = list(model.model.layers) if way == "block" else [m for m in model.modules() if isinstance(m, nn.Linear)]
    for module in (*modules, model):
        fully_shard(module, mesh=mesh)


def one(column: str, way: str, folder: Path) -> dict[str, Any]:
    """What one method does under one sharding, beside the same method without any."""
    case = Case(column, folder)
    alone, model = case.attached(), case.attached()
    shard(model, way)
    optimizers = sgd(model), sgd(alone)
    found: dict[str, Any] = {"outputs": (outputs(model), outputs(alone))}
    found["losses"] = (trained(model, optimizers[0]), trained(alone, optimizers[1]))
    found["trained"] = (outputs(model), outputs(alone))
    adapter = dt.adapters(model)["default"]
    found["params"] = (adapter.params(), dt.adapters(alone)["default"].params())
    adapter.save(folder)
    with adapter.disabled():
        found["disabled"] = (outputs(model), outputs(base()))
    dist.barrier()
    other = case.attached(seed=7)
    shard(other, way)
    outputs(other)
    dt.adapters(other)["default"].restore(folder)
    found["restored"] = (outputs(other), found["trained"][0])
    found["errors"] = {}
    bare = base()
    shard(bare, way)
    try:
        case.attach(bare)
    except ValueError as error:
        found["errors"]["attach"] = str(error)
    for verb in ("detach", "merge"):
        try:
            getattr(adapter, verb)()
        except ValueError as error:
            found["errors"][verb] = str(error)
    return found


def coded(case: Case, to: str) -> Any:
    """The method on a quantised base."""
    model = dt.quantise(base(), to, **CODES[to])
    case.attach(model)
    return model


def one_coded(column: str, to: str, how: str, folder: Path) -> dict[str, Any]:
    """The gradients of each process's half of the rows, and the file, beside one process with all rows."""
    case = Case(column, folder)
    alone, model = coded(case, to), coded(case, to)
    adapter, rank = dt.adapters(model)["default"], dist.get_rank()
    names = [n for n, p in alone.named_parameters() if p.requires_grad]
    if how == "fsdp2":
        shard(model, "block")
    wrapped = nn.parallel.DistributedDataParallel(model) if how == "ddp" else model
    half = slice(2 * rank, 2 * rank + 2)
    wrapped(**{k: t[half] for k, t in batch().items()}, labels=labels()[half]).loss.backward()
    got = {n: whole(model.get_parameter(n).grad) for n in names}
    adapter.save(folder / f"{to}-{how}")
    dist.barrier()
    return {"got": got, "want": gradients(alone)}


def run(rank: int, folder: str, n_threads: int) -> None:
    """One of the two processes; the first writes what it found."""
    torch.set_num_threads(n_threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[tuple[str, ...], Any] = {}
    for column in COLUMNS:
        for way in WAYS:
            found[column, way] = settled(one, column, way, Path(folder) / column / way)
        for to in CODES if column != "full" else ():
            for how in ("ddp", "fsdp2"):
                found[column, to, how] = settled(one_coded, column, to, how, Path(folder) / column)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def settled(what: Any, *args: Any) -> Any:
    """What came of it, or the error's text."""
    try:
        return what(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def saved(folder: Path, column: str, way: str) -> Tensor:
    """The outputs of a fresh base with the adapter that the two processes saved."""
    model = base()
    dt.load(model, folder / column / way)
    return outputs(model)
