"""Methods on images: a small pretrained ViT adapted to CIFAR-10, every method under the same steps and rows.

    DELTATUNE_DATA=DATA python benchmarks/images.py --model DATA/../models/vit-5m [--device cuda] [--steps 400]

prints a table and writes results/bench/images-DEVICE.json. `DATA/cifar10/{train,test}.parquet` hold PNGs and labels.
The learning rate of each is the middle of its own range, the head's is the same for all; nothing was tuned here.
"""

import argparse
import io
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.utils import logging

import deltatune as dt
from deltatune.assess.measure import machine, versions
from deltatune.assess.run import learning_rates
from deltatune.core.method import named

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("head", {}),
    "full": ("full", {}),
    "bitfit": ("bitfit", {}),
    "lora": ("lora", {}),
    "adaptformer": ("adaptformer", {}),
    "vpt, shallow": ("vpt", {"where": "blocks"}),
    "vpt, deep": ("vpt", {}),
}
HEAD_LR = 3e-3


def images(path: Path, n: int) -> tuple[Tensor, Tensor]:
    """The first `n` pictures of a parquet file as (n, 3, 32, 32) in -1 ... 1, and their classes."""
    import numpy as np
    from PIL import Image

    rows = pq.read_table(path).slice(0, n).to_pylist()
    names = sorted({row["label"] for row in rows})
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows])
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(
        [names.index(row["label"]) for row in rows]
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of the test pictures that is right."""
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(pixel_values=a).logits.argmax(-1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    return right / len(y)


def run(name: str, path: str, data: tuple[Tensor, ...], steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Train one method; what it reached and what it cost."""
    method, options = RUNS[name]
    train_x, train_y, test_x, test_y = data
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(
        path, num_labels=10, ignore_mismatched_sizes=True, dtype="float32"
    )
    model.to(train_x.device)
    adapter = dt.attach(model, method, **options)
    lr = learning_rates(*named(method).lr, 1)[0]
    optimizer = torch.optim.AdamW(adapter.groups(lr, 0.01, HEAD_LR))
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps)
    order, times = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in range(steps):
        at = torch.randint(len(train_y), (batch,), generator=order).to(train_x.device)
        begun = time.perf_counter()
        F.cross_entropy(model(pixel_values=train_x[at]).logits, train_y[at]).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        course.step()
        optimizer.zero_grad()
        if train_x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return {"method": name, "seed": seed, "parameters": adapter.params(), "lr": lr, "step_ms": 1e3 * statistics.median(times),
            "accuracy": accuracy(model, test_x, test_y)}  # fmt: skip


def main() -> None:
    """Run every method over the seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="the folder of a ViT for images of 32 x 32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n_train", type=int, default=10000)
    parser.add_argument("--n_test", type=int, default=5000)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(os.environ["DELTATUNE_DATA"]) / "cifar10"
    data = (*images(folder / "train.parquet", given.n_train), *images(folder / "test.parquet", given.n_test))
    data = tuple(t.to(given.device) for t in data)
    rows = []
    for name in RUNS:
        rows += [run(name, given.model, data, given.steps, given.batch, seed) for seed in range(given.seeds)]
        own = [r for r in rows if r["method"] == name]
        scores = [r["accuracy"] for r in own]
        print(f"{name:14s} {own[0]['parameters']:>10,} parameters  {statistics.mean(scores):.3f} "
              f"({min(scores):.3f} to {max(scores):.3f})  {own[0]['step_ms']:.1f} ms a step", flush=True)  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    options = {k: v for k, v in vars(given).items() if k != "model"} | {
        "model": Path(given.model).name,
        "head_lr": HEAD_LR,
    }
    found = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "machine": vars(machine()), "versions": versions(),
             "options": options, "rows": rows}  # fmt: skip
    (RESULTS / f"images-{given.device}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
