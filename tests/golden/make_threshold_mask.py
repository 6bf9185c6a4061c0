"""What the reference of binary masks on frozen weights computes, in fp64.

    python tests/golden/make_threshold_mask.py REFERENCE

where REFERENCE is GitHub's ptlmasking/maskbert at COMMIT, of which code/masking/maskers.py alone is run; it needs torch and
numpy. Writes tests/golden/threshold_mask.json:

    layers  [{mask, y, grads: {x, score}}] for each of CASES: y of a layer under the mask of `score_of(case)`, and the
            gradients of sum(fill("loss") * y)
    starts  [{scale, tau, masked, ends}]: between which numbers scores start
    sites   the modules of a BERT of twelve blocks that have a mask

A mask is a string of 0 and 1 in row-major order. The parts without the reference are imported by the test on our side.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("threshold_mask.json")
COMMIT = "8d6d8df807b6b019c86a8aaf5dc3e164573f25dd"
TAU = 0.01
CASES = [((3, 4), True), ((5, 2), False), ((4, 4), True)]  # (O, I), has a bias
STARTS = [(0.02, 0.01, 0.05), (0.02, 0.01, 0.5), (0.1, 0.02, 0.3)]
LAYERS = range(2, 12)


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name."""
    return spread(shape, zlib.crc32(key.encode()) % 10007, 0.8)


def score_of(case: int) -> Tensor:
    """That layer's scores; of the last one some lie on the threshold."""
    scores = fill(f"score.{case}", CASES[case][0]) / 10
    if case == len(CASES) - 1:
        scores[0, :2] = TAU
    return scores


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def layer(maskers: Any, weight: Tensor, bias: Tensor | None, scale: float, tau: float, masked: float) -> Any:
    """The reference's masked layer."""
    whole = {"structured_masking": None, "structured_masking_types": None, "force_masking": "all"}
    return maskers.MaskedLinear1(
        nn.Parameter(weight), None if bias is None else nn.Parameter(bias), False, name="bert", controlled_init=None,
        structured_masking_info=whole, init_scale=scale, init_sparsity=masked, threshold=torch.tensor(tau, dtype=torch.float64),
    )  # fmt: skip


def layers(maskers: Any) -> list[dict[str, Any]]:
    """Forward and backward of each case."""
    found = []
    for i, ((o, n), has_bias) in enumerate(CASES):
        bias = fill(f"bias.{i}", (o,)) if has_bias else None
        made = layer(maskers, fill(f"weight.{i}", (o, n)), bias, 0.02, TAU, 0.05)
        with torch.no_grad():
            made.weight_mask.copy_(score_of(i))
        x = fill("x", (2, n)).requires_grad_()
        y = made(x)
        (fill("loss", y.shape) * y).sum().backward()
        mask, _ = made.get_masks()
        grads = {"x": listed(x.grad), "score": listed(made.weight_mask.grad)}
        text = "".join(str(int(bit)) for bit in mask.flatten().tolist())
        found.append({"mask": text, "y": listed(y.detach()), "grads": grads})
    return found


def starts(maskers: Any) -> list[dict[str, Any]]:
    """The reference's own ends of the uniform start."""
    found = []
    for scale, tau, masked in STARTS:
        low, high = layer(maskers, fill("w", (2, 2)), None, scale, tau, masked).get_init_scales(
            "MaskedLinear1", masked, scale
        )
        found.append({"scale": scale, "tau": tau, "masked": masked, "ends": [low, float(high)]})
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]) / "code" / "masking"))
    import maskers  # type: ignore[import-not-found]

    card = {
        "command": "python tests/golden/make_threshold_mask.py REFERENCE",
        "reference": {"repository": "ptlmasking/maskbert", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "layers": layers(maskers),
        "starts": starts(maskers),
        "sites": sorted(maskers.chain_module_names("bert", LAYERS, ["K", "Q", "V", "AO", "I", "O", "P"])),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
