"""What Child-Tuning's reference optimiser and Fisher mask compute, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install 'numpy<2' 'setuptools<81' transformers==4.30.2 accelerate==0.20.3 torch==2.13.0
    /tmp/venv/bin/python tests/golden/make_child_tuning.py REFERENCE

where REFERENCE is GitHub's RunxinXu/ChildTuning at COMMIT. The Fisher mask hangs on an older Trainer, therefore the
environment of its own. Writes tests/golden/child_tuning.json:

    runs    {name: {options, masks, steps}} for each of RUNS; steps[t] is {w, b} after step t of `gradient(t, name)`. masks:
            null without a mode; {w: string} of D, whose b has no mask; [{w: string, b: string}] of F, one for each step,
            as the optimiser drew them
    fisher  {reserve_p, max_grad_norm, batches, threshold, masks: {parameter: string}}: the mask of the BERT of
            `classifier` over the rows of each batch of `examples`, in the order in which they came, without dropout;
            parameters without a mask are absent

A mask is a string of 0 and 1 in row-major order. w (3, 4) and b (5) start as `fill` of their names. The parts without
the reference are imported by the test on our side.
"""

import contextlib
import importlib.metadata
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("child_tuning.json")
COMMIT = "d0d86557ac5ba9769e008d78bfa957d4d700dae9"
SHAPES = {"w": (3, 4), "b": (5,)}
STEPS, SEED = 6, 0
PLAIN = {"lr": 0.05, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "plain": PLAIN | {"mode": None},
    "d": PLAIN | {"mode": "ChildTuning-D"},
    "d_decay": PLAIN | {"mode": "ChildTuning-D", "weight_decay": 0.1},
    "f": PLAIN | {"mode": "ChildTuning-F", "reserve_p": 0.3},
    "f_decay": PLAIN | {"mode": "ChildTuning-F", "reserve_p": 0.3, "weight_decay": 0.1},
    "f_all": PLAIN | {"mode": "ChildTuning-F", "reserve_p": 1.0},
    # an eps as large as the gradients shows where it enters
    "d_eps": PLAIN | {"mode": "ChildTuning-D", "eps": 0.1},
    "d_uncorrected": PLAIN | {"mode": "ChildTuning-D", "correct_bias": False},
}
EXAMPLES, TOKENS, BATCH, RESERVE_P = 6, 5, 2, 0.3
MAX_GRAD_NORM = 0.05  # below most tensors' norms, so that it matters that each is clipped alone


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).float().view(shape)


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name. Vectors called weight lie around 1, as a norm's do."""
    shape = tuple(shape)
    return spread(shape, zlib.crc32(key.encode()) % 10007, 0.4) + (len(shape) == 1 and key.endswith("weight"))


def gradient(step: int, key: str) -> Tensor:
    """The gradient of w or b at that step."""
    return fill(f"{key}.{step}", SHAPES[key])


def child() -> Tensor:
    """D's mask of w."""
    return fill("w.mask", SHAPES["w"]) > 0.1


def classifier() -> nn.Module:
    """A BERT of two layers and its head, in fp64 and without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**sizes, **heads, **dropout)).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def examples() -> list[dict[str, Any]]:
    """Rows of tokens and labels."""
    rows = torch.arange(EXAMPLES * TOKENS).view(EXAMPLES, TOKENS) * 7 % 24
    return [{"idx": i, "input_ids": row, "labels": i % 2} for i, row in enumerate(rows)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch."""
    ids, labels = torch.stack([row["input_ids"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    return {"idx": [row["idx"] for row in rows], "input_ids": ids, "labels": labels}


def bits(mask: Tensor) -> str:
    """Row by row."""
    return "".join(str(int(bit)) for bit in mask.flatten().tolist())


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def run(options: dict[str, Any]) -> dict[str, Any]:
    """The reference's optimiser over STEPS steps."""
    from ChildTuningOptimizer import ChildTuningAdamW

    torch.manual_seed(SEED)
    parameters = {key: nn.Parameter(fill(key, shape).double()) for key, shape in SHAPES.items()}
    optimizer = ChildTuningAdamW(list(parameters.values()), **options)
    steps: list[dict[str, Any]] = []
    masks: Any = None
    if options["mode"] == "ChildTuning-D":
        optimizer.set_gradient_mask({parameters["w"]: child()})
        masks = {"w": bits(child())}
    elif options["mode"] == "ChildTuning-F":
        masks = []
    for step in range(STEPS):
        for key, p in parameters.items():
            p.grad = gradient(step, key).double()
            assert p.grad.all()
        optimizer.step()
        if isinstance(masks, list):  # it masks the gradients in place, and none was 0
            masks.append({key: bits(p.grad != 0) for key, p in parameters.items()})
        steps.append({key: listed(p.detach()) for key, p in parameters.items()})
    return {"options": options, "masks": masks, "steps": steps}


def fisher() -> dict[str, Any]:
    """The reference's mask of the classifier."""
    from ChildTuningD import ChildTuningDtrainer
    from transformers import TrainingArguments

    batches: list[list[int]] = []

    def seen(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batches.append([row["idx"] for row in rows])
        return collate(rows)

    model, printed = classifier(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        args = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_grad_norm=MAX_GRAD_NORM, no_cuda=True, report_to=[]
        )
        trainer = ChildTuningDtrainer(
            model=model,
            args=args,
            train_dataset=examples(),
            data_collator=seen,
            reserve_p=RESERVE_P,
            mode="ChildTuning-D",
        )
        masks = trainer.calculate_fisher()
    return {
        "reserve_p": RESERVE_P,
        "max_grad_norm": MAX_GRAD_NORM,
        "batches": batches,
        "threshold": float(printed.getvalue().rpartition("=>")[2]),
        "masks": {name: bits(masks[p]) for name, p in model.named_parameters() if p in masks},
    }


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    card: dict[str, Any] = {
        "command": "python tests/golden/make_child_tuning.py REFERENCE",
        "reference": {"repository": "RunxinXu/ChildTuning", "commit": COMMIT},
        "versions": {
            "torch": torch.__version__.partition("+")[0],
            "transformers": importlib.metadata.version("transformers"),
        },
        "seed": SEED,
        "runs": {name: run(options) for name, options in RUNS.items()},
        "fisher": fisher(),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
