"""What an attention under Kernel-mix's reference code computes, in fp64.

    python tests/golden/make_kernel_mix.py REFERENCE

where REFERENCE is GitHub's ychen-stat-ml/kernel-adapters at COMMIT; needs torch, and transformers for its imports. Its
RoBERTa is a file of an old transformers, of which two classes are run as they are. Writes tests/golden/kernel_mix.json:

    settings   {r_q, r_v, r_shared_q, r_shared_v, heads, shape: [rows, tokens, width]}
    attention  {out, x, and each tensor by `part.slot`}: the output of x = fill("x", shape), and the gradients under the loss
               sum(out * fill("y", shape))
    starts     {"houlsby", "he"}: A of a head's own update of q, drawn after torch.manual_seed(0)
    params     what one layer of width 768 and 12 heads trains under the ranks of the reference's script

The attention ends with its residual add and a norm with weight 1 and bias 0. Its layers are `fill` of "q.weight", "q.bias" and so
on, the update's tensors `fill` of their names here.
"""

import ast
import json
import math
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("kernel_mix.json")
COMMIT = "d22e53f588ddf5d84fcd7d980f8971f8155e675f"
RANKS = {"r_q": 2, "r_v": 3, "r_shared_q": 4, "r_shared_v": 5}
SCRIPT = {"r_q": 1, "r_v": 2, "r_shared_q": 2, "r_shared_v": 4}
HEADS, SHAPE = 3, (2, 5, 12)
SLOTS = ("a", "b", "bias", "c", "d")


def fill(key: str, shape: Iterable[int], size: float = 0.6) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with sixteen digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.16g}")


def config(width: int, heads: int, ranks: dict[str, int]) -> SimpleNamespace:
    """The settings of the reference's script, without dropout."""
    options: dict[str, Any] = {"attn_mode": "kernel", "attn_composition": "add", "prefix_value_extension": False}
    options |= {
        "is_decoder": False,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
    }
    options |= {"attn_option": "QVO", "kerfit_variant_type": "", "lora_init": "Houlsby"}
    options |= {"lora_alpha": -1, "lora_dropout": 0.0, "lora_tanh": False, "lora_head": True, "lora_head_base": "XKA"}
    options |= {"lora_Q_rank": ranks["r_q"], "lora_V_rank": ranks["r_v"]}
    options |= {"lora_Q_share_rank": ranks["r_shared_q"], "lora_V_share_rank": ranks["r_shared_v"]}
    return SimpleNamespace(hidden_size=width, num_attention_heads=heads, **options)


def reference(*sizes: Any) -> Any:
    """The reference's module of one layer."""
    from petl.petl_factory import LoRA

    return LoRA(config(*sizes))


def roberta(*names: str) -> list[Any]:
    """Classes of the reference's RoBERTa."""
    file = Path(sys.argv[1]) / "nlu" / "models" / "roberta" / "modeling_roberta.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    space: dict[str, Any] = {"torch": torch, "nn": nn, "math": math}
    exec(compile(tree, str(file), "exec"), space)
    return [space[name] for name in names]


def attention() -> dict[str, Any]:
    """Forward and backward."""
    width = SHAPE[-1]
    own, sizes = reference(width, HEADS, RANKS).double(), config(width, HEADS, RANKS)
    mixes, ends = roberta("RobertaSelfAttention", "RobertaSelfOutput")
    attend, leave = mixes(sizes, "self", own).double(), ends(sizes, own).double()
    tensors: dict[str, Tensor] = {}
    for part, name in (("q", "WQ"), ("v", "WV"), ("o", "WO")):
        head, shared = getattr(own, f"{name}_LoRA"), getattr(own, f"{name}_share_LoRA")
        theirs = (head.lora_A, head.lora_B, head.b, shared.lora_A, shared.lora_B)
        tensors |= {f"{part}.{slot}": t for slot, t in zip(SLOTS, theirs, strict=True)}
    with torch.no_grad():
        for key, p in tensors.items():
            p.copy_(fill(key, p.shape))
        for part, layer in zip("qkvo", (attend.query, attend.key, attend.value, leave.dense), strict=True):
            layer.weight.copy_(fill(f"{part}.weight", layer.weight.shape))
            layer.bias.copy_(fill(f"{part}.bias", layer.bias.shape))
    x = fill("x", SHAPE).requires_grad_()
    (mix,) = attend(x)
    out = leave(mix, x)
    grads = torch.autograd.grad((out * fill("y", SHAPE)).sum(), [x, *tensors.values()])
    named = zip(("x", *tensors), grads, strict=True)
    return {"out": listed(out.detach())} | {key: listed(grad.flatten()) for key, grad in named}


def start(name: str) -> Any:
    """A of the heads' own updates of q, the first tensor drawn without a bias."""
    from petl.petl_factory import LoRALinear

    torch.manual_seed(0)
    own = LoRALinear(12, 4, 2, lora_ini=name, lora_head=True, lora_head_base="X", bias=False)
    return listed(own.lora_A.detach())


if __name__ == "__main__":
    sys.path.insert(0, f"{sys.argv[1]}/nlu")
    card: dict[str, Any] = {
        "command": "python tests/golden/make_kernel_mix.py REFERENCE",
        "reference": {"repository": "ychen-stat-ml/kernel-adapters", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "settings": RANKS | {"heads": HEADS, "shape": SHAPE},
        "attention": attention(),
        "starts": {"houlsby": start("Houlsby"), "he": start("He")},
        "params": sum(p.numel() for p in reference(768, 12, SCRIPT).parameters()),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
