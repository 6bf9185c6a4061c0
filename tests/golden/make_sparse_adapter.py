"""Which entries SparseAdapter's reference masks, by each of its scores, on one BERT with equal weights, in fp64.

    python tests/golden/make_sparse_adapter.py REFERENCE

where REFERENCE is GitHub's Shwai-He/SparseAdapter at COMMIT; needs torch and transformers beside it, of the reference its
`petl/petl_factory.py`, `src/transformers/pruning/pruners.py` and `generator.py`. Writes tests/golden/sparse_adapter.json:

    adapter, lora   {"score scope": {tensor: mask}} of the adapters behind both sub-layers (without their norm), and of LoRA on
                    query and value, with the share KEEP kept, scored on `batches()` without dropout

A mask is a string of 0 and 1 in the row-major order of its matrix. No weight is stored: each is `fill` of its name. Tensors:
LAYER.PLACE.down (R, D) and up (D, R), PLACE attn or mlp; LAYER.PLACE.a (R, D) and b (D, R), PLACE q or v; vectors
LAYER.PLACE.down_bias, up_bias. Random scores are torch's randn under seed 0, in the order of the masks. What needs no
reference is imported by the test on our side.
"""

import importlib.util
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

GOLDEN = Path(__file__).resolve().with_name("sparse_adapter.json")
COMMIT = "b19008432c5983ecae3f054e74aa8a1dac19f28a"
D, LAYERS, R, ALPHA, KEEP = 16, 2, 6, 9.0, 0.3
SCORES = {"random": "Rand", "magnitude": "Mag", "snip": "SNIP", "grasp": "GraSP", "synflow": "SynFlow"}


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name, even over (-size, size) and exact on every machine; a norm's weight lies around 1."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    values = ((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size
    return values.view(shape) + (key.endswith("LayerNorm.weight"))


def backbone() -> nn.Module:
    """BERT of two layers with a head of three classes; its attention has a second derivative."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": D,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "num_labels": 3,
    }
    config = BertConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=2, attn_implementation="eager")
    model = BertForSequenceClassification(config).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def batches() -> list[dict[str, Tensor]]:
    """Three of four rows each."""
    ids = torch.arange(72).view(3, 4, 6) * 7 % 40
    return [{"input_ids": rows, "labels": rows.sum(1) % 3} for rows in ids]


def loaded(path: Path) -> Any:
    """A file of the reference as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Wrapped(nn.Module):
    """The reference reads its model out of a DataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **given: Any) -> Any:
        """The model's own."""
        return self.module(**given)


def adapted(form: str) -> tuple[Wrapped, dict[str, nn.Parameter]]:
    """The backbone under the reference's layers, and their tensors by our names."""
    from petl.petl_factory import Adapter_Layer, Linear

    model, found = backbone(), {}
    for i, layer in enumerate(model.bert.encoder.layer):
        if form == "adapter":
            for place, part in {"attn": layer.attention.output, "mlp": layer.output}.items():
                part.adapter = Adapter_Layer(d_model=D, bottleneck=R, adapter_layernorm_option="none").double()
                part.dense.register_forward_hook(lambda m, args, out, a=part.adapter: a(out))
                for key, linear in {"down": part.adapter.down_proj, "up": part.adapter.up_proj}.items():
                    found |= {f"{i}.{place}.{key}": linear.weight, f"{i}.{place}.{key}_bias": linear.bias}
            continue
        for place, name in {"q": "query", "v": "value"}.items():
            old = getattr(layer.attention.self, name)
            new = Linear(D, D, r=R, lora_alpha=ALPHA, merge_weights=False).double()
            with torch.no_grad():
                new.weight.copy_(old.weight)
                new.bias.copy_(old.bias)
            setattr(layer.attention.self, name, new)
            found |= {f"{i}.{place}.a": new.ef_lora_A, f"{i}.{place}.b": new.ef_lora_B}
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    model.bert.n_embd = D
    return Wrapped(model).eval(), found


def masks(form: str, score: str, scope: str) -> dict[str, str]:
    """{tensor: mask}, by the reference's own pruner."""
    model, tensors = adapted(form)
    names = {id(p): key for key, p in tensors.items()}
    pairs = list(GENERATOR.masked_parameters(model))
    assert [names[id(p)] for _, p in pairs] == [key for key in tensors if not key.endswith("bias")]
    pruner = getattr(PRUNERS, SCORES[score])(pairs)
    torch.manual_seed(0)
    pruner.score(model, batches(), torch.device("cpu"), lambda m, rows, return_outputs=False: m(**rows).loss)
    pruner.mask(KEEP, scope)
    return {names[id(p)]: "".join(str(int(bit)) for bit in mask.flatten().tolist()) for mask, p in pairs}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)  # the reference makes tensors of ones
    root = Path(sys.argv[1])
    sys.path.insert(0, str(root))
    folder = root / "src" / "transformers" / "pruning"
    PRUNERS, GENERATOR = loaded(folder / "pruners.py"), loaded(folder / "generator.py")
    import transformers

    every = [(score, scope) for score in SCORES for scope in ("global", "local")]
    card = {
        "command": "python tests/golden/make_sparse_adapter.py REFERENCE",
        "reference": {"repository": "Shwai-He/SparseAdapter", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "adapter": {f"{score} {scope}": masks("adapter", score, scope) for score, scope in every},
        # its SynFlow runs adapters alone
        "lora": {f"{score} {scope}": masks("lora", score, scope) for score, scope in every if score != "synflow"},
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
