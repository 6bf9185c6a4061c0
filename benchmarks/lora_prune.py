"""LoRAPrune's masked Llama of 12 layers beside the smaller one that `shrink` leaves, at ratio 0.5: weights and forward time.

The masks are those of a course of one step. Three more rows say what it costs to go without shrinking: the model before
anything was attached, with the adapter, and with the adapter merged.
"""

import copy

import torch
from bench import Options, Row, agree, benchmark, in_turns, low
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core.shrink import shrink

WIDTH = {"cpu": 384, "cuda": 2048}
TOKENS = {"cpu": (4, 128), "cuda": (8, 1024)}


def llama(device: str) -> LlamaForCausalLM:
    """12 layers, grouped heads, bf16 on a GPU."""
    torch.manual_seed(0)
    width = WIDTH[device]
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64, num_hidden_layers=12,
        num_attention_heads=width // 32, num_key_value_heads=width // 64,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def in_blocks(model: nn.Module) -> int:
    """Numbers in the blocks, without what is attached."""
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and ".deltas." not in n)


@benchmark("lora_prune")
def lora_prune(options: Options) -> list[Row]:
    """The 10th percentile of a forward, in turns, and everything as a ratio to the masked model's."""
    base = llama(options.device)
    tokens = torch.randint(1, 1000, TOKENS[options.device], device=options.device)
    masked = copy.deepcopy(base)
    adapter = dt.attach(masked, "lora_prune", r=8, head=None)
    optimizer = torch.optim.SGD(adapter.groups(0.1))
    schedules = dt.Schedules([adapter])
    schedules.begin(optimizer, 1)
    masked(tokens, labels=tokens).loss.backward()
    schedules.before_step(0)
    optimizer.step()
    optimizer.zero_grad()
    schedules.end()
    small = shrink(adapter)
    merged = copy.deepcopy(masked)
    dt.adapters(merged)["default"].merge()

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(tokens)[0]
        return out

    tolerance = 3e-2 if options.device == "cuda" else 1e-4
    agree("the smaller model's logits", forward(small), forward(masked), tolerance)
    models = {"before": base, "masked": masked, "masked, merged": merged, "shrunk": small}
    runs = {name: lambda model=model: forward(model) for name, model in models.items()}
    in_turns(runs, 2, options.device)
    times = {name: low(ts) for name, ts in in_turns(runs, options.repeats or 15, options.device).items()}
    return [
        {
            "12 layers, ratio 0.5": name,
            "weights in blocks": in_blocks(model),
            "share": in_blocks(model) / in_blocks(masked),
            "forward ms": times[name] * 1e3,
            "ratio": times[name] / times["masked"],
        }
        for name, model in models.items()
    ]
