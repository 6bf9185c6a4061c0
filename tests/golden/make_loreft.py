"""What LoReFT's reference computes at a few positions, and how it trains: its intervention class and its rule of positions.

    .venv/bin/python tests/golden/make_loreft.py PYREFT PYVENE

where PYREFT is GitHub's stanfordnlp/pyreft at COMMIT, whose `interventions.py` is run, and PYVENE stanfordnlp/pyvene at
PYVENE_COMMIT, whose `models/interventions.py` it stands on. Of both the classes alone are read, their packages' other imports
(plots, data sets) are not needed. The file writes tests/golden/loreft.json:

    states     h' of `fill("h")` (N_ROWS, D), fp64, for R from the Householder vectors `fill("reflectors")`, W and b by name
    grads      of sum(fill("loss") * h'): of the vectors, W, b, h
    course     the vectors, W, b after N_STEPS of AdamW at LR without weight decay on the same loss
    decayed    the largest entry of R after one step of AdamW with weight decay 0.01
    positions  {n given: {"fA+lB": positions of A prefix and B suffix tokens}} by `get_intervention_locations`, shared weights
"""

import abc
import json
import sys
import types
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().with_name("loreft.json")
COMMIT = "dafd0995a366d7b47160a337dcc388eda7431821"
PYVENE_COMMIT = "9e333904dcf9e597ca76170010d17f4d4580de8d"
D, R, N_ROWS, N_STEPS, LR = 10, 3, 4, 6, 0.01
POSITIONS = ("f7+l7", "f1+l1", "f2", "l3", "f3+l1")


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.8, 0.8), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.8).view(shape)


def loss_of(states: Tensor) -> Tensor:
    """A scalar that tells every entry apart, and no linear one."""
    return (fill("loss", states.shape) * states.square()).sum()


def read(reference: Path, pyvene: Path) -> tuple[Any, Any]:
    """The intervention's class and the rule of positions, from the reference's own files."""
    bases = ("ConstantSource", "Sourceless", "Trainable", "DistributedRepresentation")
    base: dict[str, Any] = {"torch": torch, "abstractmethod": abc.abstractmethod}
    text = (pyvene / "pyvene/models/interventions.py").read_text(encoding="utf-8")
    exec(text[text.index("class Intervention(") : text.index("class BasisAgnosticIntervention")], base)
    stand_in: Any = types.ModuleType("pyvene")
    for name in bases:
        setattr(stand_in, f"{name}Intervention", base[f"{name}Intervention"])
    sys.modules["pyvene"] = stand_in
    own: dict[str, Any] = {"__name__": "reference"}
    exec((reference / "pyreft/interventions.py").read_text(encoding="utf-8"), own)
    rules: dict[str, Any] = {}
    text = (reference / "pyreft/dataset.py").read_text(encoding="utf-8")
    text = text[text.index("def parse_positions") :]
    exec(text[: text.index("@dataclass")], rules)
    return own["LoreftIntervention"], rules["get_intervention_locations"]


def made(cls: Any) -> tuple[Any, dict[str, Tensor]]:
    """An intervention with the values by name, and its trained tensors."""
    one = cls(embed_dim=D, low_rank_dimension=R, dtype=torch.float64).double()
    rotation = one.rotate_layer.parametrizations.weight
    with torch.no_grad():
        rotation[0].base = torch.eye(D, dtype=torch.float64)  # the reference's is random; R is H of the vectors then
        rotation.original.copy_(fill("reflectors", (D, R)).tril(-1) + torch.eye(D, R))
        one.learned_source.weight.copy_(fill("w", (R, D)))
        one.learned_source.bias.copy_(fill("b", (R,)))
    return one, {"reflectors": rotation.original, "w": one.learned_source.weight, "b": one.learned_source.bias}


def numbers(t: Tensor) -> Any:
    return t.detach().tolist()


def main(reference: Path, pyvene: Path) -> None:
    cls, rule = read(reference, pyvene)
    one, trained = made(cls)
    h = fill("h", (N_ROWS, D)).requires_grad_()
    states = one(h)
    grads = torch.autograd.grad(loss_of(states), [*trained.values(), h])
    found: dict[str, Any] = {"states": numbers(states)}
    found["grads"] = dict(zip((*trained, "h"), map(numbers, grads), strict=True))
    one, trained = made(cls)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        loss_of(one(h.detach())).backward()
        optimizer.step()
    found["course"] = {key: numbers(t) for key, t in trained.items()}
    one, trained = made(cls)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.01)
    loss_of(one(h.detach())).backward()
    optimizer.step()
    found["decayed"] = float(one.rotate_layer.weight.detach().abs().max())
    found["positions"] = {
        n: {
            at: sorted(
                i for i in rule(last_position=n, positions=at, num_interventions=1, share_weights=True)[0] if i >= 0
            )
            for at in POSITIONS
        }
        for n in (1, 2, 3, 5, 6, 14, 15, 20)
    }
    GOLDEN.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
