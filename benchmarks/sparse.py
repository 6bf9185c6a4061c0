"""A mask of 0.5 % of all linear layers' entries beside full fine-tuning and LoRA, and its backward in two ways.

On a CPU BERT-base with 12 layers and a head for two classes, on a GPU the Llama of 1.1 billion parameters in bf16, both random;
one step is forward, backward and AdamW. On a GPU memory is the allocator's peak of a step above the base's weights; on a CPU
what autograd saves, each storage once, and the gradients, moments and the adapter's own.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from bench import Options, Row, agree, batch, benchmark, in_turns, llama, low
from lst import batch as sentences
from lst import bert
from torch import Tensor, nn

import deltatune as dt
from deltatune.assess.measure import saved_bytes
from deltatune.kernels.sparse import tiled

KEEP = 0.005
SHARES = (0.001, 0.005, 0.02, 0.1)


def model_of(device: str) -> nn.Module:
    """The base, the same at every call."""
    if device == "cuda":
        return llama("1b", device, torch.bfloat16).train()
    return bert(device).train()


def rows_of(device: str) -> dict[str, Tensor]:
    """One batch of it."""
    if device == "cuda":
        ids = batch("1b", device)
        return {"input_ids": ids, "labels": ids}
    return sentences(4, device)


def full(model: nn.Module) -> list[nn.Parameter]:
    """Everything trains."""
    return list(model.parameters())


def lora(model: nn.Module) -> list[nn.Parameter]:
    """LoRA on all linear layers."""
    return dt.attach(model, "lora", r=8, where="all-linear").parameters()


def mask(model: nn.Module) -> list[nn.Parameter]:
    """Values at 0.5 % of the entries of all linear layers."""
    return dt.attach(model, "shira", keep=KEEP, where="linear").parameters()


VARIANTS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {"full": full, "lora": lora, "mask": mask}


def alike(device: str) -> None:
    """The mask's gradients are those of the trained weights at its indices."""
    rows = rows_of(device)
    model = model_of(device)
    mask(model)
    model(**rows).loss.backward()
    deltas = [d for d in dt.adapters(model)["default"].deltas.values() if isinstance(d, dt.SHiRA)]
    found = {d.site.name: (d.index.long(), d.values.grad) for d in deltas}
    dt.adapters(model)["default"].detach()
    names = list(found)[:: max(1, len(found) // 8)]
    weights = [model.get_parameter(f"{name}.weight").requires_grad_(True) for name in names]
    grads = torch.autograd.grad(model(**rows).loss, weights)
    for name, grad in zip(names, grads, strict=True):
        index, mine = found[name]
        assert mine is not None
        agree(
            f"the gradient at {name}", mine.float(), grad.flatten()[index].float(), 5e-2 if device == "cuda" else 1e-4
        )


class Stepped:
    """One variant with its optimiser."""

    def __init__(self, name: str, device: str) -> None:
        self.model, self.device, self.rows = model_of(device), device, rows_of(device)
        self.base = sum(p.nbytes for p in self.model.parameters())
        self.trained = VARIANTS[name](self.model)
        self.optimizer = torch.optim.AdamW(self.trained, 1e-5)
        self.step()

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.model(**self.rows).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> int:
        """Bytes of the moments."""
        states = self.optimizer.state.values()
        return sum(t.nbytes for s in states for t in s.values() if isinstance(t, Tensor) and t.ndim)

    def memory(self) -> float:
        """Bytes of a step without the base's weights."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.base
        own = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers())) - self.base
        return saved_bytes(self.model, self.rows) + sum(p.nbytes for p in self.trained) + self.state() + own


@benchmark("sparse")
def sparse(options: Options) -> list[Row]:
    """Bytes and the 10th percentile of a step; every number as a ratio to full fine-tuning's too.

    On a CPU the variants step in turns; on a GPU one after the other, since all do not fit beside each other.
    """
    alike(options.device)
    gc.collect()
    found: dict[str, dict[str, Any]] = {}
    n = options.repeats or (10 if options.device == "cuda" else 7)
    standing: dict[str, Stepped] = {}
    for name in VARIANTS:
        one = Stepped(name, options.device)
        found[name] = {
            "trained": sum(p.numel() for p in one.trained), "state": one.state(), "memory": one.memory(), "base": one.base,
        }  # fmt: skip
        if options.device == "cuda":
            in_turns({name: one.step}, 2, "cuda")
            found[name]["time"] = low(in_turns({name: one.step}, n, "cuda")[name])
            del one
            gc.collect()
            torch.cuda.empty_cache()
        else:
            standing[name] = one
    if standing:
        times = in_turns({name: one.step for name, one in standing.items()}, n)
        for name in standing:
            found[name]["time"] = low(times[name])
    first = found["full"]
    what = "Llama of 1.1 billion, bf16, 8 x 1024" if options.device == "cuda" else "BERT-base, 4 x 128"
    return [
        {
            what: name,
            "trained": int(cost["trained"]),
            "state MiB": cost["state"] / 2**20,
            "x full": cost["state"] / first["state"],
            "step memory MiB": cost["memory"] / 2**20,
            "memory x full": cost["memory"] / first["memory"],
            "step ms": cost["time"] * 1e3,
            "time x full": cost["time"] / first["time"],
            "time x lora": cost["time"] / found["lora"]["time"],
        }
        for name, cost in found.items()
    ]


@benchmark("sparse_backward")
def backward(options: Options) -> list[Row]:
    """The values' gradient of one layer by two forms, by share of the entries: from dL/dW, or torch's sampled product.

    Where both operands are in bf16 torch has no sampled product, so that it runs in fp32, with TF32 in the tile.
    """
    width, n_rows = (2048, 8192) if options.device == "cuda" else (768, 512)
    generator = torch.Generator().manual_seed(0)
    torch.set_float32_matmul_precision("high")
    grad, x = (torch.randn(n_rows, width, generator=generator).to(options.device) for _ in range(2))
    rows = []
    for share in SHARES:
        picked = torch.randperm(width * width, generator=generator)[: int(share * width * width)].sort().values
        index = picked.to(options.device, torch.int32)

        def tile(index: Tensor = index) -> Tensor:
            return (grad.t() @ x).view(-1)[index]

        def product(index: Tensor = index) -> Tensor:
            return tiled.sampled(grad, x, index)

        agree(f"the product at {share}", product().float(), tile().float(), 2e-2 if options.device == "cuda" else 1e-4)
        forms = {"tile": tile, "sampled": product}
        in_turns(forms, 3, options.device)
        times = {name: low(ts) for name, ts in in_turns(forms, options.repeats or 20, options.device).items()}
        rows.append(
            {f"{width} x {width}, {n_rows} tokens": f"{share:.1%}"}
            | {
                "dL/dW ms": times["tile"] * 1e3,
                "sampled ms": times["sampled"] * 1e3,
                "ratio": times["sampled"] / times["tile"],
            }
        )
    return rows
