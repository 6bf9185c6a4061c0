"""The methods, one family a file. Importing this package fills the registry.

Letters in these files: B batch, T tokens, I inputs, O outputs, R rank, P prefix, D width.
"""

from . import (  # fmt: skip
    adaptive,
    baseline,
    bias,
    bottleneck,
    conditional,
    context,
    decomposed,
    drop,
    hybrid,
    hyper,
    instance,
    language,
    lora,
    mask,
    prefix,
    prompt,
    ranks,
    rescale,
    rows,
    side,
    sparse,
    special,
    transfer,
    unified,
    vision,
    words,
    xprompt,
)

__all__ = ["adaptive", "baseline", "bias", "bottleneck", "conditional", "context", "decomposed", "drop", "hybrid",
           "hyper", "instance", "language", "lora", "mask", "prefix", "prompt", "ranks", "rescale", "rows", "side",
           "special", "transfer", "unified", "vision", "words", "xprompt"]  # fmt: skip
