"""The methods, one family a file. Importing this package fills the registry.

Letters in these files: B batch, T tokens, I inputs, O outputs, R rank, P prefix, D width.
"""

from . import (  # fmt: skip
    baseline,
    bias,
    bottleneck,
    context,
    hybrid,
    lora,
    mask,
    prefix,
    prompt,
    ranks,
    rescale,
    rows,
    special,
    unified,
    vision,
)

__all__ = ["baseline", "bias", "bottleneck", "context", "hybrid", "lora", "mask", "prefix", "prompt", "ranks", "rescale", "rows",
           "special", "unified", "vision"]  # fmt: skip
