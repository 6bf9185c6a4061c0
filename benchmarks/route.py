"""A batch of 64 rows over 32 LoRA adapters beside the same batch on one: `dt.Route`, and HF PEFT's mixed batch.

On a CPU a BERT of MiniLM's shape (hidden 384, 6 layers) in fp32, on a GPU the Llama of 1.1 billion parameters in bf16, both
random. HF PEFT refuses `adapter_names` in training mode, so that a training step is ours alone.
"""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from bench import Options, Row, agree, benchmark, in_turns, llama, low
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import deltatune as dt

ROWS, ADAPTERS, RANK = 64, 32, 8
TOKENS = {
    "cpu": (32, 128),
    "cuda": (1, 128),
}  # a row; with 1 there is next to no arithmetic, as in a step of `generate`
AT = {"cpu": ["query", "value"], "cuda": ["q_proj", "v_proj"]}


def backbone(device: str) -> Any:
    """The same random model at every call."""
    if device == "cuda":
        return llama("1b", device, torch.bfloat16)
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(**shape, vocab_size=2000), add_pooling_layer=False).eval()


def theirs(device: str) -> tuple[nn.Module, dict[str, dict[str, tuple[Tensor, Tensor]]]]:
    """HF PEFT's model with all adapters, and the pairs (A, B) of each by the layer's name."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=AT[device])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(backbone(device), config, adapter_name="0")
        for i in range(1, ADAPTERS):
            model.add_adapter(str(i), config)
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {str(i): {} for i in range(ADAPTERS)}
    generator = torch.Generator().manual_seed(2)
    for name, module in model.named_modules():
        for i in getattr(module, "lora_A", ()):
            pair = module.lora_A[i].weight, module.lora_B[i].weight
            with torch.no_grad():
                for p in pair:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
            found[i][name.removeprefix("base_model.model.")] = pair
    return model.eval(), found


def filled(adapter: dt.Adapter, pairs: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> None:
    """The same numbers into ours."""
    with torch.no_grad():
        for (path, site), delta in adapter.deltas.items():
            if isinstance(delta, dt.LoRA):
                for mine, other in zip((delta.a, delta.b), pairs[path][site], strict=True):
                    mine.copy_(other)


def step_of(model: nn.Module, adapter: dt.Adapter, given: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward."""
    model = model.train()

    def step() -> None:
        for p in adapter.parameters():
            p.grad = None
        model(**given)[0].float().square().mean().backward()

    return step


@benchmark("route")
def route(options: Options) -> list[Row]:
    """The 10th percentile of each, and ratios; Red where ours differs from HF PEFT's."""
    device, repeats = options.device, options.repeats or (15 if options.device == "cpu" else 30)
    leaf = dt.LoRA(r=RANK, alpha=2.0 * RANK, where="q,v")
    hf, pairs = theirs(device)
    one, many = backbone(device), backbone(device)
    own = dt.attach(one, leaf, head=None), dt.attach(many, dt.Route(*[leaf] * ADAPTERS), head=None)
    for adapter in own:
        filled(adapter, pairs)
    where = torch.arange(ROWS) % ADAPTERS
    names, same = [str(i) for i in where.tolist()], ["0"] * ROWS
    rows: list[Row] = []
    for tokens in TOKENS[device]:
        ids = torch.randint(2000, (ROWS, tokens), generator=torch.Generator().manual_seed(1)).to(device)
        given, routed = {"input_ids": ids}, {"input_ids": ids, "adapter_ids": where.to(device)}
        runs: dict[str, Callable[[], Any]] = {
            "one": lambda given=given: one(**given),
            "routed": lambda routed=routed: many(**routed),
            "hf one": lambda given=given: hf(**given),
            "hf mixed": lambda given=given: hf(**given, adapter_names=names),
        }
        most = 1e-5 if device == "cpu" else 2e-2
        with torch.no_grad():
            for name, other in (("one", "hf one"), ("routed", "hf mixed")):
                agree(f"{name}, {tokens} tokens", runs[name]()[0], runs[other]()[0], most)
            agree("all rows on adapter 0", hf(**given, adapter_names=same)[0], runs["one"]()[0], most)
            in_turns(runs, 2, device)
            took = {name: low(ts) for name, ts in in_turns(runs, repeats, device).items()}
        rows.append(row(f"{ROWS} x {tokens}, forward", took))
        steps = {"one": step_of(one, own[0], given), "routed": step_of(many, own[1], routed)}
        in_turns(steps, 2, device)
        took = {name: low(ts) for name, ts in in_turns(steps, max(repeats // 2, 3), device).items()}
        rows.append(row(f"{ROWS} x {tokens}, training step", took))
        one.eval(), many.eval()
    return rows


def row(name: str, took: dict[str, float]) -> Row:
    """Milliseconds, and each mixed batch over its one adapter."""
    found: Row = {f"{ADAPTERS} LoRA adapters": name, "one ms": took["one"] * 1e3, "routed ms": took["routed"] * 1e3}
    found["ratio"] = took["routed"] / took["one"]
    if "hf one" in took:
        found |= {"HF one ms": took["hf one"] * 1e3, "HF mixed ms": took["hf mixed"] * 1e3}
        found |= {"HF ratio": took["hf mixed"] / took["hf one"], "routed / HF mixed": took["routed"] / took["hf mixed"]}
    return found
