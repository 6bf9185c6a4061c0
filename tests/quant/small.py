"""A small Llama, the same each time."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(18).reshape(2, 9) * 7 % 64


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def moved(adapter: Any) -> Any:
    """Off its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return adapter
