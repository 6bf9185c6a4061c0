"""LoRAHub: its own code's objective and search on fixed modules, the mixing written a second time, and what it refuses."""

import json
import math
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.files import read_adapter
from deltatune.methods.hub import objective, own_loss, searched

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_lora_hub.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The golden file's modules."""
    found = []
    for i in range(MAKE["N"]):
        adapter = dt.attach(MAKE["backbone"](), dt.LoRA(r=MAKE["R"], alpha=MAKE["ALPHA"], where=["q", "v"]), head=None)
        with torch.no_grad():
            for (_, site), d in adapter.deltas.items():
                for key, p in d.named_parameters():
                    p.copy_(MAKE["module"](i, site, key, p.shape))
        found.append(str(tmp_path_factory.mktemp(f"module{i}")))
        adapter.save(found[-1])
    return found


def hub(folders: list[str], **hyper: Any) -> tuple[nn.Module, dt.Adapter]:
    model = MAKE["backbone"]()
    return model, dt.attach(model, "lora_hub", sources=folders, head=None, **hyper)


def batches(n: int) -> list[dict[str, torch.Tensor]]:
    rows = MAKE["rows"]()
    return [{k: t[i : i + n] for k, t in rows.items()} for i in range(0, MAKE["ROWS"], n)]


@pytest.mark.parametrize("n", [5, 2])
def test_the_objective_of_the_papers_code(folders: list[str], n: int) -> None:
    """Also with several batches, over whose number it sums."""
    for weights, want in zip(MAKE["WEIGHTS"], GOLDEN["scores"][str(n)], strict=True):
        model, _ = hub(folders, weights=weights)
        assert objective(model, batches(n), weights, own_loss, 0.05) == pytest.approx(want, abs=1e-5)


def test_the_search_of_the_papers_code(folders: list[str]) -> None:
    """The same coefficients from the same seed; the model's mode, and what Python, numpy and torch draw, are left alone."""
    state = random.getstate(), numpy.random.get_state()[1].tolist()
    model, adapter = hub(folders, batches=batches(5))
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == state and not model.training
    found = adapter.calibrated["weights"]
    assert max(map(abs, GOLDEN["weights"])) > 0.5
    torch.testing.assert_close(found, torch.tensor(GOLDEN["weights"]), rtol=0, atol=5e-3)
    with torch.no_grad():
        assert float(own_loss(model, batches(5)[0])) == pytest.approx(GOLDEN["loss"], abs=1e-3)
    again, _ = hub(folders, batches=batches(5))
    assert torch.equal(dt.adapters(again)["default"].calibrated["weights"], found)
    files = [read_adapter(f)[1] for f in folders]
    for key, t in adapter.state_dict().items():  # A's and B's apart
        torch.testing.assert_close(t, sum(w * f[key] for w, f in zip(found, files, strict=True)), rtol=0, atol=1e-6)
    model.train()
    own_loss(model, batches(5)[0]).backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_the_search_is_that_of_its_seed() -> None:
    """Of 1000 evaluations of two coefficients, where NGOpt draws; within the bound and the budget."""

    def found(seed: int) -> tuple[list[float], list[list[float]]]:
        seen: list[list[float]] = []

        def of(w: list[float]) -> float:
            seen.append(w)
            return (w[0] - 0.4) ** 2 + (w[1] - 2.0) ** 2 + 0.1 * math.sin(9 * w[0])

        return searched(of, 2, 1000, 1.5, seed), seen

    (best, seen), (again, same), (_, other) = found(0), found(0), found(1)
    assert best == again and seen == same != other
    assert len(seen) == 1000 and all(abs(x) <= 1.5 for w in seen for x in w)
    assert best[1] == pytest.approx(1.5, abs=1e-2)


def test_known_weights_and_a_loss_of_ones_own(folders: list[str]) -> None:
    _, adapter = hub(folders)
    assert adapter.calibrated["weights"].tolist() == pytest.approx([1 / 3] * 3)
    seen = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((model.training, torch.is_grad_enabled(), len(batch["labels"])))
        return model(**batch).logits.square().mean()

    hub(folders, batches=batches(2), loss=loss, budget=3)
    assert seen == [(False, False, n) for n in (2, 2, 1)] * 3


def test_errors(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels = {**batches(5)[0], "decoder_input_ids": torch.ones(5, 2, dtype=torch.long)}
    del without_labels["labels"]
    for hyper, text in (
        ({"weights": (1.0,)}, "1 weights for 3 sources"),
        ({"budget": 0}, "budget = 0"),
        ({"bound": 0.0}, "bound = 0.0"),
        ({"l1": -1.0}, "l1 = -1.0"),
        ({"weights": (1.0, math.nan, 0.0)}, "are not all finite"),
        ({"weights": (1.0, 0.0, 0.0), "batches": batches(5)}, "not both"),
        ({"batches": batches(5)[0]}, "batches are a list .* not {'input_ids'"),
        ({"batches": iter(())}, "batches are a list .* at least one"),
        (
            {"batches": [without_labels]},
            "the batches hold .*decoder_input_ids, and the model has no loss without labels",
        ),
        (
            {"batches": batches(5), "loss": lambda model, batch: torch.tensor(math.nan)},
            r"the loss is nan at the .* \[0\.0",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            hub(folders, **hyper)
    with pytest.raises(ValueError, match="lora_hub is made of"):
        dt.attach(MAKE["backbone"](), "lora_hub", head=None)
    for method, text in ((dt.IA3(), "holds 'ia3'"), (dt.LoRA(r=3, where=["q", "v"]), "alpha of the one is 16.0")):
        adapter = dt.attach(MAKE["backbone"](), method, head=None)
        adapter.save(tmp_path)
        with pytest.raises(ValueError, match=text):
            hub([*folders, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"needs the package nevergrad: pip install 'deltatune\[merge\]'"):
        hub(folders, batches=batches(5))
