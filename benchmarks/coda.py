"""CoDA's floating-point operations and time over the dense frozen encoder's, with LoRA beside it: twelve layers, no padding.

Its saving is of the frozen layers: at one token in n they do 1 / n of the products, the attention 1 / n^2, and every token pays
for the adapter and its router.
"""

from collections.abc import Callable
from typing import Any

import torch
from bench import Options, Row, agree, benchmark, in_turns, low
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

import deltatune as dt

SIZES = {"cpu": (256, 4, 4, 128), "cuda": (768, 12, 32, 512)}  # width, heads, rows, tokens
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"LoRA r 8 on q, v": ("lora", {"r": 8})} | {
    f"CoDA, one token in {n}": ("coda", {"r": 64, "reduction": n}) for n in (1, 3, 5)
}


def encoder(device: str) -> nn.Module:
    """The same random BERT of twelve layers at every call."""
    width, heads, _, _ = SIZES[device]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": 12,
    }
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.device(device):
        model = BertModel(BertConfig(vocab_size=2000, **sizes), add_pooling_layer=False)
    return model.requires_grad_(False).eval()


def ids(device: str) -> Tensor:
    """The same random tokens at every call."""
    _, _, rows, tokens = SIZES[device]
    return torch.randint(5, 2000, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device)


@torch.no_grad()
def flops(model: nn.Module, tokens: Tensor) -> int:
    """Floating-point operations of one forward, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens)
    return counter.get_total_flops()


def step_of(model: nn.Module, adapter: dt.Adapter, tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(adapter.groups(1e-4))

    def step() -> None:
        model(tokens).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@benchmark("coda")
def coda(options: Options) -> list[Row]:
    """The 10th percentile of a forward over the dense one's, and of a step over LoRA's."""
    tokens, dense = ids(options.device), encoder(options.device)
    models, adapters = {"dense, frozen": dense}, {}
    for name, (method, hyper) in VARIANTS.items():
        models[name] = encoder(options.device)
        adapters[name] = dt.attach(models[name], method, head=None, **hyper)
    with torch.no_grad():
        want = dense(tokens).last_hidden_state
        agree("all tokens through the block", models["CoDA, one token in 1"](tokens).last_hidden_state, want, 1e-6)
        runs = {name: lambda model=model: model(tokens) for name, model in models.items()}
        in_turns(runs, 2, options.device)
        forward = {n: low(ts) for n, ts in in_turns(runs, options.repeats or 12, options.device).items()}
    steps = {name: step_of(models[name], adapters[name], tokens) for name in adapters}
    in_turns(steps, 2, options.device)
    trained = {n: low(ts) for n, ts in in_turns(steps, options.repeats or 12, options.device).items()}
    base, lora = flops(dense, tokens), trained["LoRA r 8 on q, v"]
    return [
        {
            "12 layers": name,
            "FLOPs x dense": flops(model, tokens) / base,
            "forward ms": forward[name] * 1e3,
            "forward x dense": forward[name] / forward["dense, frozen"],
            "step ms": trained[name] * 1e3 if name in trained else "",
            "step x LoRA": trained[name] / lora if name in trained else "",
        }
        for name, model in models.items()
    ]
