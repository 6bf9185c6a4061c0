"""What PASTA's reference computes with vectors on the special tokens of a BERT, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install --no-deps transformers==4.20.1
    /tmp/venv/bin/pip install 'numpy<2' 'huggingface_hub<0.20' filelock packaging pyyaml regex requests tqdm
    /tmp/venv/bin/python tests/golden/make_pasta.py REFERENCE

where REFERENCE is GitHub's luka-group/PASTA at COMMIT. The file writes tests/golden/pasta.json:

    bare     the last hidden states of the plain `backbone` at the real tokens of `pairs`: (13, D)
    pairs    {states, loss, grads} of rows with three special tokens, [CLS] and two [SEP]; loss is sum(fill("loss") * states),
             grads holds the gradient of LAYER.vectors (3, D)
    singles  the same of rows with two, [CLS] at the start and [SEP] at the end; of three vectors the last has no gradient
    start    {mean, std} of the reference's vectors as its model is built, over all layers of a BERT of width 512

No weight is stored: each is `fill` of its name.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("pasta.json")
COMMIT = "7f07d551ae026d2f1d966259757e868d4062762d"
D, LAYERS, N = 16, 2, 3
CLS, SEP = 101, 102  # the reference's own
SIZES = {"vocab_size": 104, "hidden_size": D, "intermediate_size": 24, "max_position_embeddings": 16}
SIZES |= {"num_hidden_layers": LAYERS, "num_attention_heads": 2}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight lie around 1, as a norm's do.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return spread + (len(shape) == 1 and key.endswith("weight"))


def backbone() -> nn.Module:
    """BERT of two layers, in fp64 and without dropout."""
    from transformers import BertConfig, BertModel

    return filled(BertModel(BertConfig(**SIZES), add_pooling_layer=False))


def filled(model: nn.Module) -> nn.Module:
    """`model` in fp64 and eval mode, every tensor by its name."""
    model = model.double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def batch(kind: str) -> dict[str, Tensor]:
    """Two rows of tokens, padded on the right: text pairs or single texts."""
    rows = {
        "pairs": [[CLS, 7, 8, SEP, 9, 10, SEP], [CLS, 11, SEP, 12, 13, SEP]],
        "singles": [[CLS, 7, 8, 9, SEP], [CLS, 11, 12, SEP]],
    }[kind]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def states(model: nn.Module, kind: str) -> Tensor:
    """The last hidden states of the real tokens."""
    rows = batch(kind)
    return model(**rows).last_hidden_state[rows["attention_mask"] == 1]


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def adapted(kind: str) -> dict[str, Any]:
    """The reference's model on one batch."""
    from PASTA_modeling import BertPastaModel
    from transformers import BertConfig

    model = filled(BertPastaModel(BertConfig(**SIZES), N, add_pooling_layer=False))
    vectors = [layer.special_token_embedding.weight for layer in model.encoder.layer]
    with torch.no_grad():
        for i, p in enumerate(vectors):
            p.copy_(fill(f"{i}.vectors", p.shape))
    seen = states(model, kind)
    loss = (fill("loss", seen.shape).double() * seen).sum()
    loss.backward()
    grads = {f"{i}.vectors": listed(torch.zeros_like(p) if p.grad is None else p.grad) for i, p in enumerate(vectors)}
    return {"states": listed(seen), "loss": loss.item(), "grads": grads}


def start() -> dict[str, float]:
    """How the reference's vectors start."""
    from PASTA_modeling import BertPastaModel
    from transformers import BertConfig

    torch.manual_seed(0)
    model = BertPastaModel(BertConfig(**SIZES | {"hidden_size": 512}), N, add_pooling_layer=False)
    every = torch.cat([layer.special_token_embedding.weight.flatten() for layer in model.encoder.layer])
    return {"mean": every.mean().item(), "std": every.std().item()}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    card: dict[str, Any] = {
        "command": "python tests/golden/make_pasta.py REFERENCE",
        "reference": {"repository": "luka-group/PASTA", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "start": start(),
    }
    with torch.no_grad():
        card["bare"] = listed(states(backbone(), "pairs"))
    card |= {kind: adapted(kind) for kind in ("pairs", "singles")}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
