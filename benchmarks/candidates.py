"""Eight LoRA candidates in one forward and backward beside one after another: the same model, rows, losses and optimisers.

Each has one row a step, 512 tokens on a GPU and 32 on a CPU, and LoRA of rank 16 on all linears. Alone a candidate runs as any
adapter does, the fused layers of kernels/lora included.
"""

from collections.abc import Callable
from typing import Any

import torch
from bench import SHAPES, Options, Row, agree, benchmark, in_turns, llama, median
from torch import Tensor

import deltatune as dt
from deltatune.train.candidates import Candidate, Together, mean_loss
from deltatune.train.candidates import candidates as attached

N, RANK = 8, 16
TOKENS = {"cpu": 32, "cuda": 512}


def set_up(options: Options) -> tuple[Together, dict[str, Tensor]]:
    """The candidates, B not 0 so that it shows, and one row for each."""
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    model = llama(options.shape, device, dtype)
    together = attached(model, [Candidate(dt.LoRA(r=RANK, where="all-linear"), seed=k) for k in range(N)])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in together.adapters:
            for p in adapter.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    size = (N, TOKENS[device])
    ids = torch.randint(SHAPES[options.shape].config["vocab_size"], size, generator=generator).to(device)
    model.train()
    return together, {"input_ids": ids, "labels": ids}


def at_once(together: Together, batch: dict[str, Tensor]) -> list[Tensor]:
    """Forward and backward of all."""
    ones = [1] * N
    with together.rows(ones):
        losses = together.losses(batch, ones)
        torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses]


def in_order(together: Together, batch: dict[str, Tensor], behind: Callable[[int], None]) -> list[Tensor]:
    """Forward and backward of one after another; `behind(k)` is called after each."""
    losses = []
    for k in range(N):
        own = {key: t[k : k + 1] for key, t in batch.items()}
        with together.alone(k):
            loss = mean_loss(together.model, together.model(input_ids=own["input_ids"]).logits, own)
            loss.backward()
        losses.append(loss.detach())
        behind(k)
    return losses


@benchmark("candidates")
def candidates(options: Options) -> list[Row]:
    """The median of each and their ratio; Red where losses or gradients differ."""
    device = options.device
    together, batch = set_up(options)
    each = [adapter.parameters() for adapter in together.adapters]
    found = []
    for run in (at_once, lambda *given: in_order(*given, lambda k: None)):
        losses = run(together, batch)
        found.append([torch.stack(losses), *(torch.cat([p.grad.float().flatten() for p in ps]) for ps in each)])
        for p in (p for ps in each for p in ps):
            p.grad = None
    most = 2e-2 if device == "cuda" else 1e-4
    for k, (one, other) in enumerate(zip(*found, strict=True)):
        agree(f"gradient of candidate {k - 1}" if k else "losses", one, other, most)

    fused: dict[str, Any] = {"fused": True} if device == "cuda" else {}
    optimizers = [torch.optim.AdamW(ps, lr=1e-5, **fused) for ps in each]

    def none(k: int) -> None:
        for p in each[k]:
            p.grad = None

    def step(k: int) -> None:
        torch.nn.utils.clip_grad_norm_(each[k], 1.0)
        optimizers[k].step()
        none(k)

    rows: list[Row] = []
    for name, behind in (("forward and backward", none), ("training step", step)):

        def once(behind: Callable[[int], None] = behind) -> None:
            at_once(together, batch)
            for k in range(N):
                behind(k)

        def one_by_one(behind: Callable[[int], None] = behind) -> None:
            in_order(together, batch, behind)

        both = {"at once": once, "one after another": one_by_one}
        in_turns(both, 3, device)
        took = {key: median(ts) * 1e3 for key, ts in in_turns(both, options.repeats or 10, device).items()}
        title = f"{N} candidates, {options.shape}, 1 x {TOKENS[device]} tokens each"
        rows.append(
            {title: name}
            | {f"{key} ms": t for key, t in took.items()}
            | {"ratio": took["at once"] / took["one after another"]}
        )
    return rows
