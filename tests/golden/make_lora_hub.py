"""What LoRAHub's own code scores and finds over three LoRA modules on a small T5.

    python tests/golden/make_lora_hub.py REFERENCE

where REFERENCE is GitHub's sail-sg/lorahub at COMMIT; needs peft, nevergrad, datasets, pandas and tqdm beside it (this
repository's own environment has them). Its `lorahub_learning` runs whole; what it would load from the hub and read with a tokenizer is
handed to it. Writes tests/golden/lora_hub.json:

    scores   {batch: [score of each of WEIGHTS]}, its objective with `batch` rows at a time
    weights  the coefficients that it finds in BUDGET evaluations
    loss     the model's loss on all rows under them

No weight is stored: every tensor is `fill` of its name and shape.
"""

import importlib
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("lora_hub.json")
COMMIT = "df73afe5f38d9ff0fd1cd43774be51c79c581cc3"
N, R, ALPHA, BUDGET, ROWS = 3, 2, 6.0, 40, 5
WEIGHTS = ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.5, -0.3, 1.2), (-1.5, 1.5, 0.7))


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).float().view(shape)


def backbone() -> nn.Module:
    """A T5 of two layers without dropout."""
    config = tf.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape) + (p.ndim == 1))
    return model.eval()


def module(i: int, site: str, tensor: str, shape: Iterable[int]) -> Tensor:
    """A or B of module `i`; the first number is one of those with which something else than 0 is best."""
    return fill(f"5 {i} {site} {tensor}", shape, 1.5)


def rows() -> dict[str, Tensor]:
    """The few shots."""
    k = torch.arange(ROWS * 6).view(ROWS, 6)
    return {
        "input_ids": 1 + (5 * k + 3) % 31,
        "attention_mask": (torch.arange(6) < torch.tensor([6, 4, 5, 6, 3])[:, None]).long(),
        "labels": torch.full((ROWS, 4), 7),
    }


if __name__ == "__main__":
    import datasets
    import peft

    sys.path.insert(0, sys.argv[1])
    reference = importlib.import_module("lorahub.algorithm")
    model: Any = peft.get_peft_model(
        backbone(), peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    ).eval()
    cache = {}
    for i in range(N):
        state = peft.get_peft_model_state_dict(model)
        names = {key: key.removeprefix("base_model.model.").rsplit(".", 2)[:2] for key in state}
        cache[str(i)] = {k: module(i, site, ab[-1].lower(), state[k].shape) for k, (site, ab) in names.items()}
    shots = datasets.Dataset.from_dict({"input": [""] * ROWS, **{k: t.tolist() for k, t in rows().items()}})
    fixed = (shots, reference.default_get_loss, reference.default_l1_regularization)
    scores = {
        str(batch): [reference.get_score(w, model, cache, fixed[0], batch, *fixed[1:]) for w in WEIGHTS]
        for batch in (ROWS, 2)
    }
    reference.load_base_model_and_lora_modules = lambda *_: (model, None, cache)
    reference.load_dataset = lambda *_: shots
    found, merged, _ = reference.lorahub_learning(list(cache), [], [], BUDGET)
    with torch.no_grad():
        loss = float(merged(**rows()).loss)
    card = {"reference": f"sail-sg/lorahub {COMMIT}", "command": "python tests/golden/make_lora_hub.py REFERENCE"}
    card |= {"scores": scores, "weights": [float(w) for w in found], "loss": loss}
    GOLDEN.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
