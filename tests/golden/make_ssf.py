"""What SSF's reference computes on a small ViT, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0 'numpy<2'
    /tmp/venv/bin/python tests/golden/make_ssf.py REFERENCE/models/vision_transformer.py

where REFERENCE is GitHub's dongzelian/SSF at COMMIT. Of that file only the definitions in NEEDED run, its vision transformer
with SSF and what it is made of; its imports (timm and a debugger) are not needed for them. The file writes tests/golden/ssf.json:

    bare      the logits of the plain ViT on `images`: (2, CLASSES)
    logits    with SSF behind every linear layer, norm and the patch convolution
    loss      sum(fill("loss", (2, CLASSES)) * logits)
    grads     {OURS.gain, OURS.offset: gradient}, OURS the layer's name in `named`; of the fused q, k, v the rows of each
    start     {gain, offset: [mean, std]} of 4096 channels as `init_ssf_scale_shift` draws them

No weight is stored: each is `fill` of its name in `named`.
"""

import ast
import json
import sys
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("ssf.json")
COMMIT = "e94e0e704a4ece1986a537c97a95158b46838f71"
D, LAYERS, HEADS, MLP, CLASSES, SIZE, PATCH = 16, 2, 2, 32, 3, 8, 4
NEEDED = {
    "Mlp",
    "Attention",
    "LayerScale",
    "Block",
    "PatchEmbed",
    "init_ssf_scale_shift",
    "ssf_ada",
    "VisionTransformer",
}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight or gain lie around 1.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return spread + (len(shape) == 1 and key.endswith(("weight", "gain")))


def images() -> Tensor:
    """Two images."""
    return fill("images", (2, 3, SIZE, SIZE)).double() * 3


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def reference(path: str) -> dict[str, Any]:
    """The definitions in NEEDED of the reference's file, run as they stand."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in NEEDED]
    assert {node.name for node in tree.body} == NEEDED  # type: ignore[attr-defined]
    space: dict[str, Any] = {"torch": torch, "nn": nn, "partial": partial, "_assert": torch._assert}
    space["to_2tuple"] = lambda x: (x, x)  # timm's
    exec(compile(tree, path, "exec"), space)
    return space


def named(model: Any) -> dict[str, Tensor]:
    """The reference's tensors by names that do not depend on a library: LAYER.ROLE; of the fused q, k, v the rows of each."""
    found: dict[str, Tensor] = {
        "cls": model.cls_token,
        "positions": model.pos_embed,
    }

    def put(ours: str, layer: nn.Module, owner: nn.Module | None, pair: int, part: slice = slice(None)) -> None:
        found[f"{ours}.weight"], found[f"{ours}.bias"] = layer.weight[part], layer.bias[part]  # type: ignore[index]
        if owner is not None and hasattr(owner, f"ssf_scale_{pair}"):
            found[f"{ours}.gain"] = getattr(owner, f"ssf_scale_{pair}")[part]
            found[f"{ours}.offset"] = getattr(owner, f"ssf_shift_{pair}")[part]

    put("patches", model.patch_embed.proj, model.patch_embed, 1)
    for i, block in enumerate(model.blocks):
        at = f"{i}."
        put(f"{at}norm_attn", block.norm1, block, 1)
        put(f"{at}norm_mlp", block.norm2, block, 2)
        for n, role in enumerate("qkv"):
            put(f"{at}{role}", block.attn.qkv, block.attn, 1, slice(n * D, n * D + D))
        put(f"{at}o", block.attn.proj, block.attn, 2)
        put(f"{at}up", block.mlp.fc1, block.mlp, 1)
        put(f"{at}down", block.mlp.fc2, block.mlp, 2)
    put("norm", model.norm, model, 1)
    put("head", model.head, None, 0)
    return found


def built(space: dict[str, Any], mode: str | None) -> Any:
    """The reference's ViT in fp64, every tensor by its name."""
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": D, "depth": LAYERS, "num_heads": HEADS}
    options = {"mlp_ratio": MLP / D, "num_classes": CLASSES, "weight_init": "skip", "embed_layer": space["PatchEmbed"]}
    model = space["VisionTransformer"](**sizes, **options, block_fn=space["Block"], tuning_mode=mode).double().eval()
    with torch.no_grad():
        for key, p in named(model).items():
            p.copy_(fill(key, p.shape))
    return model


if __name__ == "__main__":
    space = reference(sys.argv[1])
    with torch.no_grad():
        bare = built(space, None)(images())
    model = built(space, "ssf")
    logits = model(images())
    loss = (fill("loss", logits.shape).double() * logits).sum()
    tensors = {k: p for k, p in model.named_parameters() if "ssf" in k}
    loss.backward()
    assert all(p.grad is not None for p in tensors.values())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)  # then `named` finds the gradients under our names
    grads = {k: listed(t) for k, t in named(model).items() if k.endswith(("gain", "offset"))}
    torch.manual_seed(0)
    start = dict(zip(("gain", "offset"), space["init_ssf_scale_shift"](4096), strict=True))
    card: dict[str, Any] = {
        "command": "python tests/golden/make_ssf.py REFERENCE/models/vision_transformer.py",
        "reference": {"repository": "dongzelian/SSF", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "bare": listed(bare),
        "logits": listed(logits),
        "loss": loss.item(),
        "grads": grads,
        "start": {k: [float(p.detach().mean()), float(p.detach().std())] for k, p in start.items()},
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
