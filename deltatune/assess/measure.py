"""What a run costs in memory, split: weights, activations, gradients, optimiser, and the method's own state."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.storage import unregistered
from ..version import VERSION
from .cells import Machine, Memory


def machine() -> Machine:
    """The processor, the device and the cores of this process; no host name."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Machine(
        cpu=cpu, device=device, cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    )


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that one forward keeps for its backward, each storage once, without parameters and buffers.

    Counted where autograd saves tensors, so that it is the same number on every device; the generators are left as
    they were.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    alive: list[Any] = []  # until all is counted, so that no address comes twice

    def pack(t: Tensor) -> None:  # nothing runs backward; a pack that gave `t` back would tie a knot that nobody unties
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)

    was = model.training
    model.train()
    with torch.random.fork_rng(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
        assert loss.requires_grad
    model.train(was)
    return sum(seen.values())


def memory(model: nn.Module, adapter: Adapter, activations: int, optimizer: int) -> Memory:
    """The split. On CUDA `peak` is the allocator's own; elsewhere it is the parts' sum, which says so."""
    trained = adapter.parameters()
    mine = {id(p) for p in trained} - {id(p) for p in adapter.owned().values()}
    extra = [b for d in adapter.deltas.values() for b in d.buffers()]
    extra += [] if adapter.bank is None else list(adapter.bank.buffers())
    mine |= {id(b) for b in extra}
    method = sum(p.nbytes for p in trained if id(p) in mine) + sum(b.nbytes for b in extra)
    kept = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in mine]
    there = {t.data_ptr() for t in kept}
    more = {t.data_ptr(): t.nbytes for m in model.modules() for t in unregistered(m) if t.data_ptr() not in there}
    weights = sum(t.nbytes for t in kept) + sum(more.values())
    gradients = sum(p.nbytes for p in trained)
    total = weights + activations + gradients + optimizer + method
    cuda = next(model.parameters()).device.type == "cuda"
    return Memory(
        peak=torch.cuda.max_memory_allocated() if cuda else total,
        measured="cuda" if cuda else "accounted",
        weights=weights,
        activations=activations,
        gradients=gradients,
        optimizer=optimizer,
        method=method,
    )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version(), "deltatune": VERSION}
    return found | {p: version(p) for p in ("torch", "transformers", "accelerate")}
