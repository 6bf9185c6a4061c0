"""What T-Few's reference computes with (IA)3 on a T5 with a gated MLP, in fp64.

    python tests/golden/make_ia3.py REFERENCE

where REFERENCE is GitHub's r-three/t-few at COMMIT. The file writes tests/golden/ia3.json: `logits` of `rows`, `loss`, the sum of
fill("loss") * logits, and `grads` of the scales by the name of their layer. The reference scales what k, v and wi_1 give.

No weight is stored: each is `fill` of its name.
"""

import importlib.util
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

GOLDEN = Path(__file__).resolve().with_name("ia3.json")
COMMIT = "114deced63ae722a368e06cb08ea956b20c393a6"
SIZES = {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine."""
    size = torch.Size(shape)
    at = torch.arange(1, size.numel() + 1, dtype=torch.float64) * 0.6180339887498949 + zlib.crc32(key.encode()) / 2**32
    return ((at % 1.0 - 0.5) * 0.8).view(size)


def backbone() -> Any:
    """A gated T5 whose weights are `fill` of their names."""
    config = T5Config(**SIZES, feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0)
    model = T5ForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(fill(name, p.shape) + (1.0 if "layer_norm" in name else 0.0))
    return model


def rows() -> dict[str, Tensor]:
    """Two rows, one of them padded."""
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "decoder_input_ids": torch.tensor([[0, 11, 12], [0, 13, 14]]),
    }


def main(reference: str) -> None:
    """Run the reference's own `modify_with_lora` with its configs/ia3.json."""
    path = Path(reference) / "src" / "models" / "lora.py"
    spec = importlib.util.spec_from_file_location("lora", path)
    assert spec is not None and spec.loader is not None
    lora: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lora)
    config = json.loads((Path(reference) / "configs" / "ia3.json").read_text(encoding="utf-8"))
    model: nn.Module = lora.modify_with_lora(backbone(), SimpleNamespace(**config))
    scales = {}
    for name, p in model.named_parameters():
        p.requires_grad_("lora_b" in name)
        if "lora_b" in name:
            layer = name.removesuffix(".multi_lora_b")
            p.data = 1 + fill(f"scale {layer}", p.shape)
            scales[layer] = p
    logits = model(**rows()).logits
    loss = (fill("loss", logits.shape) * logits).sum()
    loss.backward()
    found = {
        "reference": f"r-three/t-few at {COMMIT}",
        "logits": logits.detach().flatten().tolist(),
        "loss": loss.item(),
    }
    found["grads"] = {layer: p.grad.flatten().tolist() for layer, p in scales.items() if p.grad is not None}
    short = json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 12))
    GOLDEN.write_text(json.dumps(short) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
