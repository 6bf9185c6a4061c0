"""What LoRAPrune's reference scores and masks, step by step on given gradients, in fp64.

    python tests/golden/make_lora_prune.py REFERENCE

where REFERENCE is GitHub's aim-uofa/LoRAPrune at COMMIT; needs torch, transformers and peft (0.21) beside it. Writes
tests/golden/lora_prune.json:

    ratios  the share to be masked at each of STEPS steps
    scores  [{part: smoothed importance}] after the update of each step; a part is LAYER.self_attn or LAYER.mlp
    masks   [{part: one bit a head or channel, as text}] after each step

The layers are a Llama's without grouped keys, their tensors and gradients `fill` of their names. The reference updates its
scores, masks on every FREQ-th step of those whose ratio lies between the ends, and then steps; nothing here steps, so that
A and B stay. Its number of heads is a constant of its file, set to ours; its 8-bit layer, which its file has with
bitsandbytes alone, is a class without instances.
"""

import importlib
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("lora_prune.json")
COMMIT = "4da52721b00cd80ef9ec2071d338d60efc7024e7"
STEPS, FREQ, WARMUP, FINAL, RATIO = 30, 3, 0.1, 0.2, 0.6
N_LAYERS, WIDTH, WIDE, N_HEADS, R, ALPHA = 2, 20, 24, 5, 3, 6.0
SHAPES = {
    **{f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qkvo"},
    "mlp.gate_proj": (WIDE, WIDTH), "mlp.up_proj": (WIDE, WIDTH), "mlp.down_proj": (WIDTH, WIDE),
}  # fmt: skip


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def gradient(step: int, key: str, shape: Iterable[int]) -> Tensor:
    """The gradient of that tensor at that step; its rows are loud in turn, so that what is least important changes."""
    full = fill(f"{key}.{step}", shape)
    loud = 1 + torch.arange(full.numel()).view(full.shape) // 4 % 5 * (step % 7)
    return full * loud


class Layer(nn.Module):
    """One block's projections."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        for group in ("self_attn", "mlp"):
            self.add_module(group, nn.Module())
        for name, (d_out, d_in) in SHAPES.items():
            group, _, own = name.partition(".")
            layer = linear(d_in, d_out, r=R, lora_alpha=ALPHA, bias=False).double()
            self.get_submodule(group).add_module(own, layer)


def reference(folder: str) -> dict[str, Any]:
    """The reference's own functions on the layers above."""
    sys.path.insert(0, folder)
    lora = importlib.import_module("loraprune.lora")
    lora.Linear8bitLt = getattr(lora, "Linear8bitLt", type("Linear8bitLt", (), {}))  # type: ignore[attr-defined]
    utils: Any = importlib.import_module("loraprune.utils")
    utils.NUM_ATTENTION_HEADS = N_HEADS
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(lora.Linear) for _ in range(N_LAYERS))  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("lora_mask"):
                p.copy_(fill(name, p.shape))
    found: dict[str, Any] = {"ratios": [], "scores": [], "masks": []}
    scores = utils.init_sensitivity_dict(model)
    for step in range(STEPS):
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.grad = gradient(step, name, p.shape)
        scores = utils.update_sensitivity_dict(model, scores, "lora")
        ratio = utils.schedule_sparsity_ratio(step, STEPS, WARMUP, FINAL, 0, RATIO)
        if step % FREQ == 0 and 0 < ratio < RATIO:
            utils.local_prune(model, scores, ratio, RATIO)
        found["ratios"].append(ratio)
        found["scores"].append({k.removeprefix("layers."): v.tolist() for k, v in scores.items()})
        masks = {}
        for i, layer in enumerate(model.layers):  # type: ignore[arg-type, var-annotated]
            masks[f"{i}.self_attn"] = layer.self_attn.q_proj.lora_mask.view(N_HEADS, -1)[:, 0]
            masks[f"{i}.mlp"] = layer.mlp.up_proj.lora_mask
        found["masks"].append({k: "".join(str(int(b)) for b in m) for k, m in masks.items()})
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(reference(sys.argv[1])) + "\n", encoding="utf-8")
