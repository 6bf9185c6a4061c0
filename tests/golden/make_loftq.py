"""What HF PEFT's LoftQ starts from, at 2 and at 4 bits, on the CPU.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0                   # first, so that no other package chooses its build
    ENV/bin/pip install 'peft==0.19.*' scipy torch==2.13.0
    ENV/bin/python tests/golden/make_loftq.py

Writes tests/golden/loftq.json. PEFT 0.19 is the last with quantisers of its own: later ones have bitsandbytes' alone, on a GPU.
Its `loftq_init` is run as it is, told that there is no bitsandbytes, which makes it take its `NFQuantizer`; that 2 bits are asked
for the quantiser is told, since the loop itself takes 4 and 8.

    nf2, nf4   for num_iter = 1 to 6: {error: |W - Q - B A| / |W|, q, ba: sum(probe * Q), sum(probe * B A)}

W is `matrix("w")`, the probe `matrix("probe")`, both (64, 128); blocks of 64, rank 8.
"""

import json
import math
import sys
import warnings
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().with_name("loftq.json")
SHAPE, RANK, STEPS = (64, 128), 8, 6


def matrix(name: str, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Numbers and a name, mixed, as quantiles of a normal distribution: alike on every machine, and without a pattern; fp32."""
    k = (torch.arange(math.prod(shape), dtype=torch.int64) + zlib.crc32(name.encode())) * 2654435761 % 2**32
    for shift in (15, 13):
        k = (k ^ (k >> shift)) * 2246822519 % 2**32
    return torch.special.ndtri(((k >> 8).double() + 0.5) / 2**24).float().view(shape)


def found(weight: Tensor, q: Tensor, b: Tensor, a: Tensor) -> dict[str, float]:
    """What the file holds of one start."""
    probe, low = matrix("probe", (weight.shape[0], weight.shape[1])).double(), (b @ a).double()
    return {
        "error": float((weight.double() - q.double() - low).norm() / weight.double().norm()),
        "q": float((probe * q.double()).sum()),
        "ba": float((probe * low).sum()),
    }


def main() -> None:
    """Run PEFT's own loop."""
    warnings.simplefilter("ignore")
    sys.modules["bitsandbytes"] = ModuleType("bitsandbytes")
    import peft
    import peft.utils.loftq_utils as theirs

    module: Any = theirs
    module.is_bnb_available, module.is_bnb_4bit_available = (lambda: True), (lambda: False)
    quantizer, weight = module.NFQuantizer, matrix("w")
    out: dict[str, Any] = {"peft": peft.__version__}
    for bits in (2, 4):
        module.NFQuantizer = lambda num_bits, bits=bits, **kwargs: quantizer(num_bits=bits, **kwargs)
        each = []
        for steps in range(1, STEPS + 1):
            q, a, b = module.loftq_init(weight, 4, RANK, steps)
            each.append(found(weight, q, b, a))
        out[f"nf{bits}"] = each
    GOLDEN.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
