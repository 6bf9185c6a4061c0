"""What ProPELT's reference computes with one prototype and many masks, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install 'numpy<2' 'huggingface_hub<0.20' filelock packaging pyyaml regex requests tqdm
    /tmp/venv/bin/python tests/golden/make_propelt.py REFERENCE/propetl-roberta/src

where REFERENCE is GitHub's ChaosCodes/ProPETL at COMMIT; its own transformers (4.21.3, without tokenizers) lies at that
path. The file writes tests/golden/propelt.json:

    masks     [{shape, kept, mask, score_grad, weight_grad}]: the mask of score_of(i, shape), and the gradients of
              sum(fill("loss", shape) * fill("weight", shape) * mask); the last case holds zeros among its scores
    bare      the last hidden states of the plain `backbone` at the real tokens of `batch`: (10, D)
    adapter, lora, prefix
              {kept, states, loss, masks: {score: mask}, grads: {tensor: gradient}} of the same backbone with that kind in
              every layer; loss is sum(fill("loss", (10, D)) * states)

A mask is a string of 0 and 1 in the row-major order of its weight. No weight is stored: each is `fill` of its name.
Prototypes: adapter down.weight (R, D), down.bias (R), up.weight (D, R), up.bias (D); lora q.a (R, D), q.b (D, R), v.a, v.b;
prefix wte.weight (P, D), first.weight (MID, D), first.bias, second.weight (2 D, MID), second.bias: keys then values.
Scores: LAYER.PROTOTYPE.score, as wide as its prototype (the adapter's lie transposed in the reference, not here); the
prefix's LAYER.score (P, 2 D) masks what the MLP gives. What needs no reference is imported by the test on our side.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("propelt.json")
COMMIT = "1c08f19cea90cc3e39bba2b0f7c9c5587fa1da09"
D, LAYERS, R, P, MID = 16, 2, 4, 5, 8  # R the bottleneck's and LoRA's rank, P the prefix, MID its MLP
ALPHA = 6.0
KEPT = {"adapter": 0.5, "lora": 0.3, "prefix": 0.1}
REAL = (6, 4)  # real tokens of the two rows, padded on the right
# 0.9 of ten keeps all ten: 1 - 0.9 is a little less than 0.1
CASES = [((2, 5), 0.9), ((2, 5), 0.1), ((3, 3), 0.5), ((4, 6), 0.3), ((4, 6), 1.0), ((3, 4), 0.5)]


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).float().view(shape)


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name. Vectors called weight lie around 1, as a norm's do."""
    shape = tuple(shape)
    return spread(shape, zlib.crc32(key.encode()) % 10007, 0.4) + (len(shape) == 1 and key.endswith("weight"))


def score_of(case: int, shape: Iterable[int]) -> Tensor:
    """The scores of that case; those of the last have zeros, where |s| has no slope, in the dropped half."""
    scores = fill(f"score.{case}", shape)
    if case == len(CASES) - 1:
        scores[0, :2] = 0.0
    return scores


def backbone() -> nn.Module:
    """RoBERTa of two layers, in fp64 and without dropout."""
    from transformers import RobertaConfig, RobertaModel

    sizes = {"vocab_size": 40, "hidden_size": D, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "type_vocab_size": 1}
    model = RobertaModel(RobertaConfig(**sizes, **heads), add_pooling_layer=False).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def batch() -> dict[str, Tensor]:
    """Two rows of tokens; 1 is RoBERTa's padding."""
    mask = torch.tensor([[int(t < n) for t in range(max(REAL))] for n in REAL])
    tokens = 2 + torch.arange(mask.numel()).view(mask.shape) * 7 % 38
    return {"input_ids": torch.where(mask == 1, tokens, 1), "attention_mask": mask}


def states(model: nn.Module) -> Tensor:
    """The last hidden states of the real tokens, (10, D)."""
    rows = batch()
    return model(**rows).last_hidden_state[rows["attention_mask"] == 1]


def bits(mask: Tensor) -> str:
    """Row by row; a mask holds 0 and 1 alone."""
    flat = mask.flatten().tolist()
    assert set(flat) <= {0.0, 1.0}
    return "".join(str(int(bit)) for bit in flat)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def masks() -> list[dict[str, Any]]:
    """The reference's mask and its straight-through gradients."""
    from transformers.adapters.modeling import GetSubnet

    cases = []
    for i, (shape, kept) in enumerate(CASES):
        scores = score_of(i, shape).double().requires_grad_()
        weight = fill("weight", shape).double().requires_grad_()
        mask = GetSubnet.apply(scores.abs(), kept)
        (fill("loss", shape).double() * weight * mask).sum().backward()
        cases.append(
            {
                "shape": list(shape),
                "kept": kept,
                "mask": bits(mask),
                "score_grad": listed(scores.grad),
                "weight_grad": listed(weight.grad),
            }
        )
    return cases


def named(model: nn.Module, kind: str) -> dict[str, tuple[nn.Parameter, bool]]:
    """Our name of each of the reference's trainable tensors, and whether it lies there transposed."""
    layers = model.encoder.layer
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    if kind == "adapter":
        shared = layers[0].output.adapters["task"]
        for word, layer in {"down": shared.adapter_down[0], "up": shared.adapter_up}.items():
            found |= {f"{word}.weight": (layer.weight, False), f"{word}.bias": (layer.bias, False)}
        for i, layer in enumerate(layers):
            scores = layer.output.adapters_mask["task"]
            found |= {
                f"{i}.down.weight.score": (scores.down_mask, True),
                f"{i}.up.weight.score": (scores.up_mask, True),
            }
    elif kind == "lora":
        for i, layer in enumerate(layers):
            for role, at in {"q": layer.attention.self.query, "v": layer.attention.self.value}.items():
                lora, scores = at.loras["task"], at.adapters_mask["task"]
                found |= {f"{role}.a": (lora.lora_A, False), f"{role}.b": (lora.lora_B, False)}
                found |= {f"{i}.{role}.a.score": (scores.lora_A_mask, False)}
                found |= {f"{i}.{role}.b.score": (scores.lora_B_mask, False)}
    else:
        prefix = layers[0].attention.self.prefix_tuning.pool.prefix_tunings["task"]["self_prefix"]
        first, _, second = prefix.control_trans
        found["wte.weight"] = (prefix.wte.weight, False)
        for word, layer in {"first": first, "second": second}.items():
            found |= {f"{word}.weight": (layer.weight, False), f"{word}.bias": (layer.bias, False)}
        found["score"] = (prefix.adapters_mask.adapters_mask, False)
    return found


def start(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name; the prefix's scores of all layers are one tensor in the reference."""
    shape = tuple(shape)
    return torch.stack([fill(f"{i}.score", shape[1:]) for i in range(shape[0])]) if key == "score" else fill(key, shape)


def adapted(kind: str) -> dict[str, Any]:
    """One kind in every layer of the reference."""
    from transformers.adapters import AdapterConfig
    from transformers.adapters.modeling import GetSubnet

    options: dict[str, dict[str, Any]] = {
        "adapter": {"config": "pfeiffer", "reduction_factor": D // R},
        "lora": {"config": "lora", "r": R, "alpha": ALPHA},
        "prefix": {"config": "prefix_tuning", "prefix_length": P, "bottleneck_size": MID},
    }
    kept = KEPT[kind]
    model = backbone()
    model.add_shared_adapter("task", config=AdapterConfig.load(**options[kind], share_adapter=True, sparsity=kept))
    if kind == "lora":  # the reference's training script ties them, not its library
        for layer in model.encoder.layer:
            for role in ("query", "value"):
                first = getattr(model.encoder.layer[0].attention.self, role).loras["task"]
                own = getattr(layer.attention.self, role).loras["task"]
                own.lora_A, own.lora_B = first.lora_A, first.lora_B
    model.train_adapter(["task"])
    model.set_active_adapters(["task"])
    model.double().eval()
    tensors = named(model, kind)
    assert {id(p) for p, _ in tensors.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for key, (p, transposed) in tensors.items():
            p.copy_(start(key, p.T.shape).T if transposed else start(key, p.shape))
    seen = states(model)
    loss = (fill("loss", seen.shape).double() * seen).sum()
    loss.backward()
    card: dict[str, Any] = {"kept": kept, "states": listed(seen), "loss": loss.item(), "masks": {}, "grads": {}}
    for key, (p, transposed) in tensors.items():
        grad = p.grad.T if transposed else p.grad
        if key == "score":
            card["grads"] |= {f"{i}.score": listed(part) for i, part in enumerate(grad)}
            card["masks"] |= {
                f"{i}.score": bits(GetSubnet.apply(part.detach().abs(), kept)) for i, part in enumerate(p)
            }
            continue
        card["grads"][key] = listed(grad)
        if key.endswith("score"):
            mask = GetSubnet.apply(p.detach().abs(), kept)
            card["masks"][key] = bits(mask.T if transposed else mask)
    return card


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    card: dict[str, Any] = {
        "command": "python tests/golden/make_propelt.py REFERENCE/propetl-roberta/src",
        "reference": {"repository": "ChaosCodes/ProPETL", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "masks": masks(),
    }
    with torch.no_grad():
        card["bare"] = listed(states(backbone()))
    card |= {kind: adapted(kind) for kind in KEPT}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
