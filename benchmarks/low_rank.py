"""The fused low-rank layers beside plain PyTorch, over the frozen layers alone: forward and backward of one block's groups.

`--shape` gives the sizes. A group is the layers of one input: q k v, o, gate up, down. The floor is the frozen group. "at least" is
what bytes alone cost: h and x read, each y written a second time on the way in, dy read twice, x read, dx written and read on the way
back, over the rate of a copy in the same run. "launching" is the time until the CPU has handed over everything: where that is what a
group takes, no kernel can be seen.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench import SHAPES, Options, Row, agree, benchmark, in_turns, median, wait
from torch import Tensor

from deltatune.kernels.lora.fused import Part, together

RANK = 16


def groups(shape: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By name, inputs and outputs of a block's groups."""
    c = SHAPES[shape].config
    d, inner = c["hidden_size"], c["intermediate_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    return {"q k v": (d, (d, kv, kv)), "o": (d, (d,)), "gate up": (d, (inner, inner)), "down": (inner, (d,))}


def made(d_in: int, d_outs: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Part]:
    """Random layers, factors in fp32."""
    parts = []
    for d_out in d_outs:
        a, b = (torch.randn(s, device=device) * 0.02 for s in ((RANK, d_in), (d_out, RANK)))
        weight = torch.randn(d_out, d_in, device=device, dtype=dtype) * d_in**-0.5
        low = a.to(dtype), b.to(dtype)
        parts.append(Part(weight, None, None, a.requires_grad_(), b.requires_grad_(), low, 1.0))
    return parts


def plain(x: Tensor, parts: list[Part]) -> list[Tensor]:
    """Operation by operation, as autograd does it."""
    return [F.linear(x, p.weight) + F.linear(F.linear(x, p.a.to(x.dtype)), p.b.to(x.dtype)) for p in parts]  # type: ignore[arg-type]


def frozen(x: Tensor, parts: list[Part]) -> list[Tensor]:
    """The layers alone."""
    return [F.linear(x, p.weight) for p in parts]  # type: ignore[arg-type]


def rate(device: str) -> float:
    """Bytes a second of a copy, read and written."""
    a = torch.randn(2**28 if device == "cuda" else 2**22, device=device)
    b = torch.empty_like(a)
    times = in_turns({"copy": lambda: b.copy_(a)}, 8, device)["copy"]
    return 2 * a.nbytes / median(times)


@benchmark("low_rank")
def low_rank(options: Options) -> list[Row]:
    """Milliseconds of forward and backward, each group."""
    torch.manual_seed(0)
    copied = rate(options.device)
    return [group(name, *sizes, options, copied) for name, sizes in groups(options.shape).items()]


def group(name: str, d_in: int, d_outs: tuple[int, ...], options: Options, copied: float) -> Row:
    """One group's row. Raises Red where the fused gradients are not the plain ones."""
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    n = SHAPES[options.shape].rows * SHAPES[options.shape].tokens
    parts = made(d_in, d_outs, device, dtype)
    x = torch.randn(n, d_in, device=device, dtype=dtype, requires_grad=True)
    given = [torch.randn(n, o, device=device, dtype=dtype) for o in d_outs]
    every = [x, *(t for p in parts for t in (p.a, p.b))]

    def run(forward: Callable[[Tensor, list[Part]], Any], ends: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x, parts), ends, given)

    for i, (a, b) in enumerate(zip(run(together, every), run(plain, every), strict=True)):
        agree(f"{name}, gradient {i}", a, b, 2e-2 if dtype == torch.bfloat16 else 1e-4)
    functions = {
        "floor": lambda: run(frozen, [x]), "plain": lambda: run(plain, every), "ours": lambda: run(together, every)
    }  # fmt: skip
    in_turns(functions, 5, device)
    times = {key: median(ts) * 1e3 for key, ts in in_turns(functions, options.repeats or 30, device).items()}
    bytes_more = n * x.element_size() * (5 * d_in + 4 * sum(d_outs))
    return (
        {f"{options.shape}, {n} tokens": name}
        | {f"{key} ms": t for key, t in times.items()}
        | {f"{key} x floor": times[key] / times["floor"] for key in ("plain", "ours")}
        | {"extra at least ms": bytes_more / copied * 1e3}
        | {f"{key} launching ms": launching(functions[key], device) for key in ("floor", "ours")}
    )


def launching(function: Callable[[], object], device: str) -> float:
    """Milliseconds until the CPU has handed one over, with nothing to wait for."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(10):
        function()
    taken = time.perf_counter() - begun
    wait(device)
    return taken * 100
