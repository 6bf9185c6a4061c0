"""What the reference of model fusion by optimal transport makes of two bottleneck adapters.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install POT==0.9.7.post1
    /tmp/venv/bin/python tests/golden/make_mera.py REFERENCE

where REFERENCE is GitHub's sidak/otfusion at COMMIT; MerA has no code of its own, and this is the fusion that its paper takes.
The reference aligns its first network to its second, layer by layer, and averages them; it knows no biases, so the first
layer is `down` with its bias as a further column, and the second is `up`. Only `wasserstein_ensemble.py` and
`ground_metric.py` run; what they import for training and data (OTHERS) stays empty. The file writes tests/golden/mera.json:

    CASE    {down, up}, the mean of `source(CASE, 1)` aligned to `source(CASE, 0)` and of the latter, for each of CASES

No input is stored: each is `source` of its case.
"""

import contextlib
import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("mera.json")
COMMIT = "eb73ad63905a8ac0b05e089e6ff8f7cbae803faf"
OTHERS = ("routines", "model", "utils", "compute_activations")
D, R = 12, 8
CASES = ("apart", "permuted")  # two adapters, and one and a permuted copy that moved a little
OPTIONS = {
    "ground_metric": "euclidean", "not_squared": True, "ground_metric_normalize": "none", "ground_metric_eff": False,
    "geom_ensemble_type": "wts", "normalize_wts": False, "activation_histograms": False, "dist_normalize": False,
    "clip_gm": False, "exact": True, "correction": True, "proper_marginals": False, "past_correction": True,
    "importance": None, "unbalanced": False, "skip_last_layer": True, "ensemble_step": 0.5, "eval_aligned": False,
    "gpu_id": -1, "reg": 0.01, "debug": False,
}  # fmt: skip


def source(case: str, i: int) -> dict[str, Tensor]:
    """Adapter `i` of a case: down (R, D), its bias (R), up (D, R)."""
    draw = torch.Generator().manual_seed(10 * CASES.index(case) + (i if case == "apart" else 0))
    found = {"down": (R, D), "down_bias": (R,), "up": (D, R)}
    one = {name: torch.randn(shape, generator=draw) for name, shape in found.items()}
    if case == "permuted" and i:
        order = torch.randperm(R, generator=draw)
        one = {"down": one["down"][order], "down_bias": one["down_bias"][order], "up": one["up"][:, order]}
        one = {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in one.items()}
    return one


def network(one: dict[str, Tensor]) -> nn.Module:
    """The two layers as the reference reads a network."""
    net = nn.Sequential(nn.Linear(D + 1, R, bias=False), nn.Linear(R, D, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.cat([one["down"], one["down_bias"][:, None]], 1))
        net[1].weight.copy_(one["up"])
    return net


def main(reference: str) -> None:
    """Run the reference and write the file."""
    sys.path.insert(0, reference)
    for name in OTHERS:
        sys.modules[name] = ModuleType(name)
    sys.modules["model"].get_model_from_name = None  # type: ignore[attr-defined]
    sys.modules["utils"].isnan = torch.isnan  # type: ignore[attr-defined]
    from wasserstein_ensemble import get_wassersteinized_layers_modularized

    golden = {}
    for case in CASES:
        networks = [network(source(case, i)) for i in (1, 0)]
        with contextlib.redirect_stdout(io.StringIO()):
            down, up = get_wassersteinized_layers_modularized(Namespace(**OPTIONS), networks, eps=0.0)
        golden[case] = {"down": down.tolist(), "up": up.tolist()}
    GOLDEN.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
