"""HF PEFT's loss curve over 50 steps of LoRA training, written down so that it also holds where peft is absent.

    python tests/golden/make_lora_curve.py

trains a small fp32 Llama with the installed peft and writes tests/golden/lora_curve.json. Weights, starts and tokens
come from integer arithmetic, not from a random generator, so that every version of torch starts from the same numbers.
"""

import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().with_name("lora_curve.json")
R, ALPHA, LR, STEPS, VOCAB = 8, 12.0, 1e-2, 50, 64


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).float().view(shape)


def llama() -> LlamaForCausalLM:
    """The frozen start: two layers, grouped heads."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            p.copy_(spread(p.shape, i, 0.3) + ("norm" in name))
    return model


def batches() -> list[Tensor]:
    """Four batches of (4, 16) tokens that follow a rule: each is three times the one before, plus a step of its row."""
    rows = torch.arange(16)
    tokens = [(11 * rows + 5) % VOCAB]
    for _ in range(15):
        tokens.append((3 * tokens[-1] + 1 + rows % 3) % VOCAB)
    return list(torch.stack(tokens, 1).split(4))


def start(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The pairs A, B of every layer at their start: A spread, B = 0. Returns them."""
    found = list(parameters)
    with torch.no_grad():
        for i, p in enumerate(found):
            p.copy_(spread(p.shape, 100 + i, 0.2) if i % 2 == 0 else torch.zeros(p.shape))
    return found


def curve(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """The loss at each of the steps of AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    data, losses = batches(), []
    for step in range(STEPS):
        ids = data[step % len(data)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peft_curve() -> list[float]:
    """HF PEFT's."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])).eval()
    return curve(model, start(p for p in model.parameters() if p.requires_grad))


if __name__ == "__main__":
    versions = {name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")}
    card = {"command": "python tests/golden/make_lora_curve.py", "versions": versions, "loss": peft_curve()}
    GOLDEN.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
