"""What AdapterHub's `adapters` computes for several adapters at once: UniPELT, Fuse, Stack, Average, BatchSplit, Parallel.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0                   # first, so that no other package chooses its build
    ENV/bin/pip install 'adapters==1.3.*' torch==2.13.0
    ENV/bin/python tests/golden/make_adapters_composed.py

The script writes tests/golden/adapters_composed.json, in fp64: for each case of each backbone (make_adapters.py has them)

    states  the last hidden states of three rows without padding
    loss    sum(fill("loss") * states)
    probes  for the gradient g of the loss by each tensor of the case, sum(fill("probe of " + key) * g)
    pull    under Fuse: the penalty on its V, and sum(fill("probe of " + key) * g) of the penalty's gradient by each V

No weight is stored: each is `fill` of its key, ADAPTER.PLACE.TENSOR, "a.0.mlp.down.weight".

Without padding, because the gates of UniPELT average over all positions there, padding too. `Average` has the weights 1 and 1
as they are; those that adapters makes of itself, 1/2 and 1/2, are averaged once more (`Average` at its default gives a
quarter of the sum, residual stream included), which is `average_default`. A block inside a block (`split_stack`,
`split_average`) adds the residual stream a second time, and a `Stack` of LoRAs (`stack_lora`) feeds the second with what the
first one adds: y + s2 B2 A2 s1 B1 A1 x.
"""

import importlib.metadata
import json
import logging
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("adapters_composed.json")
ONE = runpy.run_path(str(GOLDEN.with_name("make_adapters.py")))
VOCAB, D, LAYERS, R, P, MID = (ONE[k] for k in ("VOCAB", "D", "LAYERS", "R", "P", "MID"))
R_OTHER, ROWS, LENGTH = 2, 3, 6  # R_OTHER the bottleneck of the second adapter where the two may differ
BACKBONES = ("bert", "gpt2")
View = Callable[[Tensor], Tensor]
Found = dict[str, tuple[nn.Parameter, View]]  # key -> the tensor of adapters', and which part of it has that key


def fill(key: str, shape: Any) -> Tensor:
    """The tensor of that name, in fp64."""
    out: Tensor = ONE["fill"](key, shape)
    return out.double()


def backbone(name: str) -> Any:
    """The random model of two layers, in fp64."""
    return ONE["backbone"](name).double()


def batch() -> dict[str, Tensor]:
    """Three rows without padding."""
    k = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    return {"input_ids": 1 + (5 * k + 3) % (VOCAB - 1), "attention_mask": torch.ones_like(k)}


def whole(t: Tensor) -> Tensor:
    """All of it."""
    return t


def part(i: int, n: int) -> View:
    """The i-th of n parts along the first dimension."""
    return lambda t: t[i * len(t) // n : (i + 1) * len(t) // n]


def linear(at: str, layer: nn.Linear) -> Found:
    """A layer's weight and bias."""
    return {f"{at}.weight": (layer.weight, whole), f"{at}.bias": (layer.bias, whole)}


def in_layer(at: str, owner: str, module: Any) -> Found:
    """LoRA's matrices and gate, or (IA)^3's scale, of one linear layer; GPT-2's fused one holds two parts of each."""
    roles = {"query": "q", "key": "k", "value": "v", "c_attn": "qv"}.get(owner, ("up",))
    found: Found = {}
    for i, role in enumerate(roles):
        mine = part(i, len(roles))
        if hasattr(module, "lora_A"):
            found |= {f"{at}.{role}.a": (module.lora_A, mine), f"{at}.{role}.b": (module.lora_B, mine)}
        else:
            found[f"{at}.{role}.scale"] = (module.lora_B, lambda t: t.view(-1))
        if module.use_gating:
            found[f"{at}.{role}.gate.weight"] = (module.gate.weight, mine)
            found[f"{at}.{role}.gate.bias"] = (module.gate.bias, mine)
    return found


def prefix(own: str, module: Any) -> Found:
    """The keys and values of every layer, or the network that makes them."""
    if isinstance(module.control_trans, nn.Parameter):
        shape = (P, 2 * LAYERS, module.n_heads, module.n_embd_per_head)

        def flat(k: int) -> View:
            return lambda t: t.view(shape)[:, k].transpose(0, 1)  # (H, P, d)

        at = [(f"{own}.{i}.attn.{word}", 2 * i + k) for i in range(LAYERS) for k, word in enumerate(("key", "value"))]
        return {key: (module.control_trans, flat(k)) for key, k in at}
    first, _, second = module.control_trans
    found: Found = {f"{own}.embedding": (module.wte.weight, whole)} | linear(f"{own}.inner", first)
    for i in range(LAYERS):
        found |= {f"{own}.{i}.attn.outer.{k}": (getattr(second, k), part(i, LAYERS)) for k in ("weight", "bias")}
    return found


def tensors(model: nn.Module, fusions_alone: bool) -> Found:
    """Every tensor of the model's adapters by its key, or those of its fusions."""
    from adapters.methods.lora import IA3, LoRA
    from adapters.methods.modeling import Adapter, BertFusion
    from adapters.methods.prefix_tuning import FlatPrefixTuning, PrefixTuning, PrefixTuningLayer

    found: Found = {}
    for path, module in model.named_modules():
        if isinstance(module, BertFusion):
            at = ONE["place"](path)
            found |= linear(f"{at}.query", module.query) | linear(f"{at}.key", module.key)
            found[f"{at}.value.weight"] = (module.value.weight, whole)
        elif fusions_alone:
            continue
        elif isinstance(module, Adapter):
            at = f"{module.name}.{ONE['place'](path)}"
            found |= linear(f"{at}.down", module.adapter_down[0]) | linear(f"{at}.up", module.adapter_up)
            if module.use_gating:
                found |= linear(f"{at}.gate", module.gate)
        elif isinstance(module, LoRA | IA3):
            owner, _, name = path.partition(".loras.")
            found |= in_layer(f"{name}.{ONE['place'](path)}", owner.rpartition(".")[2], module)
        elif isinstance(module, PrefixTuningLayer):
            for name, gate in module.prefix_gates.items():
                found |= linear(f"{name}.{ONE['place'](path)}.gate", gate)
        elif isinstance(module, FlatPrefixTuning | PrefixTuning):
            found |= prefix(path.split(".")[-2], module)
    return found


def cases(name: str) -> dict[str, tuple[dict[str, Any], Any]]:
    """What is made of which adapters."""
    import adapters as ah
    import adapters.composition as ac

    bottleneck, other = (ah.SeqBnConfig(reduction_factor=D / r) for r in (R, R_OTHER))
    lora, flat = ah.LoRAConfig(r=R, alpha=ONE["ALPHA"]), ah.PrefixTuningConfig(prefix_length=P, flat=True)
    made = ah.PrefixTuningConfig(prefix_length=P, bottleneck_size=MID)
    three = {"a": bottleneck, "b": other, "c": bottleneck}
    split = ac.BatchSplit("a", "b", batch_sizes=[1, 2])

    def mean(*children: Any) -> Any:
        return ac.Average(*children, weights=[1.0] * len(children), normalize_weights=False)

    found: dict[str, tuple[dict[str, Any], Any]] = {
        "unipelt": ({"a": ah.UniPELTConfig(made, bottleneck, ah.LoRAConfig(r=R, alpha=2.0))}, "a"),
        "fuse_2": ({"a": bottleneck, "b": other}, ac.Fuse("a", "b")),
        "fuse_3": (three, ac.Fuse("a", "b", "c")),
        "stack": ({"a": bottleneck, "b": other}, ac.Stack("a", "b")),
        "average": ({"a": bottleneck, "b": other}, mean("a", "b")),
        "average_default": ({"a": bottleneck, "b": other}, ac.Average("a", "b")),
        "split": ({"a": bottleneck, "b": bottleneck}, split),
        "split_other": ({"a": bottleneck, "b": other}, split),
        "split_stack": (three, ac.BatchSplit(ac.Stack("a", "b"), "c", batch_sizes=[1, 2])),
        "split_average": (three, ac.BatchSplit(mean("a", "b"), "c", batch_sizes=[1, 2])),
        "parallel": ({"a": bottleneck, "b": bottleneck}, ac.Parallel("a", "b")),
        "split_prefix": ({"a": flat, "b": flat}, split),
        "stack_prefix": ({"a": flat, "b": flat}, ac.Stack("a", "b")),
    }
    if name == "bert":  # adapters composes nothing on GPT-2's fused projection
        loras = {"a": lora, "b": lora}
        found |= {"split_lora": (loras, split), "average_lora": (loras, mean("a", "b"))}
        found |= {"stack_lora": (loras, ac.Stack("a", "b"))}
        found |= {"split_ia3": ({"a": ah.IA3Config(), "b": ah.IA3Config()}, split)}
    return found


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def probed(found: Found, value: Tensor) -> dict[str, float]:
    """sum(fill("probe of " + key) * gradient) of each."""
    own = list({id(p): p for p, _ in found.values()}.values())
    grads = dict(zip(map(id, own), torch.autograd.grad(value, own), strict=True))
    out = {}
    for key, (p, view) in found.items():
        g = view(grads[id(p)])
        out[key] = (fill(f"probe of {key}", g.shape) * g).sum().item()
    return out


def composed(name: str, configs: dict[str, Any], setup: Any) -> dict[str, Any]:
    """One case."""
    import adapters as ah
    import adapters.composition as ac

    model = backbone(name)
    ah.init(model)
    for key, config in configs.items():
        model.add_adapter(key, config=config)
    fused = isinstance(setup, ac.Fuse)
    if fused:
        model.add_adapter_fusion(setup)
    model.set_active_adapters(setup)
    model.double().eval().requires_grad_(False)
    with torch.no_grad():
        for key, (p, view) in tensors(model, False).items():
            mine = view(p.data)
            mine.copy_(fill(key, mine.shape))
    found = tensors(model, fused)
    for p, _ in found.values():
        p.requires_grad_()
    states = model(**batch())[0]
    loss = (fill("loss", states.shape) * states).sum()
    out = {"states": listed(states), "loss": loss.item(), "probes": probed(found, loss)}
    if fused:
        penalty = model.get_fusion_regularization_loss()
        values = {key: mine for key, mine in found.items() if ".value." in key}
        out["pull"] = {"penalty": penalty.item(), "probes": probed(values, penalty)}
    return out


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # adapters' about models on which nothing is active yet
    versions = {n: importlib.metadata.version(n).partition("+")[0] for n in ("adapters", "transformers", "torch")}
    card: dict[str, Any] = {"command": "python tests/golden/make_adapters_composed.py", "versions": versions}
    for name in BACKBONES:
        with torch.no_grad():
            card[name] = {"bare": {"states": listed(backbone(name)(**batch())[0])}}
        card[name] |= {key: composed(name, *case) for key, case in cases(name).items()}
    text = json.dumps(card, separators=(",", ":")).replace('},"', '},\n"')
    GOLDEN.write_text(text + "\n", encoding="utf-8")
