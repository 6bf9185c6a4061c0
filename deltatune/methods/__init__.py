"""The methods, one family a file. Importing this package fills the registry.

Letters in these files: B batch, T tokens, I inputs, O outputs, R rank, P prefix, D width.
"""

from . import baseline, bias, bottleneck, hybrid, lora, mask, prefix, prompt, ranks, rescale, rows, unified, vision

__all__ = ["baseline", "bias", "bottleneck", "hybrid", "lora", "mask", "prefix", "prompt", "ranks", "rescale", "rows", "unified",
           "vision"]  # fmt: skip
