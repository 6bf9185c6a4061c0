"""What ProPELT's reference computes for several tasks with one prototype, on one T5, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install 'numpy<2' 'huggingface_hub<0.20' filelock packaging pyyaml regex requests tqdm sacremoses
    /tmp/venv/bin/pip install --no-deps transformers==4.17.0
    /tmp/venv/bin/python tests/golden/make_propelt_tasks.py REFERENCE/propetl-t5

where REFERENCE is GitHub's ChaosCodes/ProPETL at COMMIT. Writes tests/golden/propelt_tasks.json:

    or, and, add   {logits, loss, grads}: a mask of the layer and one of the task, together in that way
    each           the same with a mask for each layer and task

of `backbone` with an adapter behind each block of both stacks. logits (6, 3, V) are those of `batch()`, rows 2 t and 2 t + 1
under task t, and loss is sum(fill("loss", (6, 3, V)) * logits). No weight is stored: each is `fill` of its name. Prototypes:
down.weight (R, D), down.bias, up.weight (D, R), up.bias. Scores: task.TASK.down (R, D), STACK.LAYER.down, or with "each"
STACK.LAYER.TASK.down, and so up. In the reference the first block's scores are the last task's own tensor; they are apart here.
What needs no reference is imported by the test on our side.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("propelt_tasks.json")
COMMIT = "1c08f19cea90cc3e39bba2b0f7c9c5587fa1da09"
D, LAYERS, R, TASKS, VOCAB, KEPT = 8, 2, 4, 3, 12, 0.3
WAYS = ("or", "and", "add", "each")


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name, even over (-size, size) and exact on every machine; a norm's weight lies around 1."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    values = ((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size
    return values.view(shape) + key.endswith("layer_norm.weight")


def sizes() -> dict[str, Any]:
    """T5 of two blocks a stack, without dropout."""
    return {
        "vocab_size": VOCAB, "d_model": D, "d_kv": 4, "d_ff": 10, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
        "num_heads": 2, "dropout_rate": 0.0, "relative_attention_num_buckets": 4, "decoder_start_token_id": 0,
        "feed_forward_proj": "relu",
    }  # fmt: skip


def filled(model: nn.Module) -> nn.Module:
    """Every tensor of the base `fill` of its name."""
    model = model.double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "adapter" not in key:
                p.copy_(fill(key, p.shape))
    return model


def batch() -> dict[str, Tensor]:
    """Two rows for each task."""
    ids = 2 + torch.arange(2 * TASKS * 5).view(2 * TASKS, 5) * 7 % (VOCAB - 2)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :3].flip(1)}


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def computed(way: str) -> dict[str, Any]:
    """The reference's model with masks put together in that way."""
    from adapters import AdapterConfig
    from third_party.models import T5Config, T5ForConditionalGeneration

    tasks = [str(t) for t in range(TASKS)]
    own = AdapterConfig()
    settings = {
        "input_dim": D, "tasks": tasks, "task_to_adapter": dict.fromkeys(tasks, "common_adapter"), "non_linearity": "relu",
        "reduction_factor": D // R, "sparsity": KEPT, "share_adapter": True, "share_encoder_decoder_single_adapter": True,
        "adapter_config_name": "preiffer", "mask_extreme_mode": way != "each", "mask_extreme_mode_combine_method": way,
    }  # fmt: skip
    for key, value in settings.items():
        setattr(own, key, value)
    model = filled(T5ForConditionalGeneration(T5Config(train_adapters=True, **sizes()), adapter_config=own))
    # 4.17's own knows no fp64; nothing here is padded
    model.decoder.invert_attention_mask = lambda mask: 0.0 * mask[:, None, None].double()
    tensors: dict[str, nn.Parameter] = {}
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).block):
            controller = block.layer[-1].adapter_controller
            shared = controller.adapters["common_adapter"]
            for word in ("down", "up"):
                linear = getattr(shared, f"{word}_sampler")
                tensors |= {f"{word}.weight": linear.weight, f"{word}.bias": linear.bias}
                scores = controller.mask_scores
                if way != "each":
                    layer = scores[f"layer_{word}_mask"]
                    layer.param = nn.Parameter(layer.param.detach().clone())  # it was a task's own tensor
                    tensors[f"{stack}.{i}.{word}"] = layer.param
                for t in tasks:
                    name = f"{stack}.{i}.{t}.{word}" if way == "each" else f"task.{t}.{word}"
                    tensors[name] = scores[f"{t}_{word}_mask"].param
    with torch.no_grad():
        for key, p in tensors.items():
            p.copy_(fill(key, p.shape))
    rows = batch()
    parts = [model(**{k: v[2 * t : 2 * t + 2] for k, v in rows.items()}, task=str(t)).logits for t in range(TASKS)]
    logits = torch.cat(parts)
    loss = (fill("loss", logits.shape) * logits).sum()
    loss.backward()
    grads = {key: listed(p.grad) for key, p in tensors.items()}
    return {"logits": listed(logits), "loss": float(f"{loss.item():.12g}"), "grads": grads}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    card = {
        "command": "python tests/golden/make_propelt_tasks.py REFERENCE/propetl-t5",
        "reference": {"repository": "ChaosCodes/ProPETL", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        **{way: computed(way) for way in WAYS},
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
