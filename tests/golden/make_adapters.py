"""What AdapterHub's `adapters` computes, written down so that it also holds where it cannot be installed.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0                   # first, so that no other package chooses its build
    ENV/bin/pip install 'adapters==1.3.*' torch==2.13.0
    ENV/bin/python tests/golden/make_adapters.py

`adapters` pins an older transformers than ours, therefore the environment of its own. The script writes
tests/golden/adapters.json: the last hidden states of small backbones, bare and under each configuration. No weight is
stored: every tensor is a formula of its name and shape (`fill`), so that both sides start from the same numbers. The test
on our side runs what needs no `adapters`: `backbone`, `batch`, `states` and `fill`.

Attention is eager, because the prefixes of adapters 1.3.0 are wrong under sdpa on GPT-2 and Llama: padded batches do not
see them, and without padding the causal rule counts them as tokens.
"""

import datetime
import importlib.metadata
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("adapters.json")
VOCAB, D, LAYERS, R, P, MID = 32, 16, 2, 4, 3, 6  # R the bottleneck's and LoRA's rank, P the prefix, MID its MLP
ALPHA = 6.0
REAL = (6, 4)  # real tokens of the two rows, padded on the right
BACKBONES = ("bert", "gpt2", "llama", "t5", "t5_unbiased")


def spread(shape: Iterable[int], offset: int, size: float) -> Tensor:
    """Multiples of the golden ratio modulo 1: even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * offset
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).float().view(shape)


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name. Vectors called weight, and (IA)^3's scales, lie around 1."""
    shape = tuple(shape)
    around_one = (len(shape) == 1 and key.endswith("weight")) or key.endswith("scale")
    return spread(shape, zlib.crc32(key.encode()) % 10007, 0.4) + around_one


def backbone(name: str) -> nn.Module:
    """A random model of two layers; "t5_unbiased" is T5 whose relative positions count for nothing."""
    import transformers as tf

    common: dict[str, Any] = {"vocab_size": VOCAB, "attn_implementation": "eager"}
    named: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": D, "intermediate_size": 24}
    model: nn.Module
    if name == "bert":
        model = tf.BertModel(
            tf.BertConfig(**common, **named, num_attention_heads=2, max_position_embeddings=16), add_pooling_layer=False
        )
    elif name == "gpt2":
        model = tf.GPT2Model(
            tf.GPT2Config(**common, n_positions=16, n_embd=D, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    elif name == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = tf.LlamaModel(tf.LlamaConfig(**common, **named, **heads, max_position_embeddings=16, use_cache=False))
    else:
        sizes = {"d_model": D, "d_kv": 6, "num_heads": 3, "d_ff": 24, "num_layers": LAYERS}
        sizes |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
        model = tf.T5Model(tf.T5Config(**common, **sizes, use_cache=False))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
            if name == "t5_unbiased" and "relative_attention_bias" in key:
                p.zero_()
    return model.eval()


def batch(name: str) -> dict[str, Tensor]:
    """Two rows, the second padded on the right; of T5 also the decoder's, of other lengths."""
    length = max(REAL)
    k = torch.arange(2 * length).view(2, length)
    mask = torch.stack([(torch.arange(length) < n).long() for n in REAL])
    out = {"input_ids": 1 + (5 * k + 3) % (VOCAB - 1), "attention_mask": mask}
    if name.startswith("t5"):
        out |= {"decoder_input_ids": 1 + (7 * k[:, :5] + 2) % (VOCAB - 1)}
        out |= {"decoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    return out


def states(model: nn.Module, name: str) -> Tensor:
    """The last hidden states (of T5 the decoder's) on the batch."""
    with torch.no_grad():
        out: Tensor = model(**batch(name))[0]
    return out


def configs(name: str) -> dict[str, Any]:
    """Each configuration under its name in the file."""
    import adapters as ah

    wide = {"reduction_factor": D / R}
    prefix = {"prefix_length": P, "bottleneck_size": MID}
    parallel = ah.ParBnConfig(**wide)
    # on Llama adapters calls up_proj "output" and down_proj "intermediate"; the paper scales what up_proj gives
    swapped = {"intermediate_lora": False, "output_lora": True} if name == "llama" else {}
    return {
        "double_seq_bn": ah.DoubleSeqBnConfig(**wide),
        "seq_bn": ah.SeqBnConfig(**wide),
        "residual": ah.BnConfig(
            mh_adapter=False, output_adapter=True, **wide, non_linearity="relu", ln_before=True,
            original_ln_before=True, original_ln_after=False, residual_before_ln=False,
        ),
        "par_bn_1": ah.ParBnConfig(**wide, scaling=1.0),
        "par_bn": parallel,
        "par_bn_attn": ah.ParBnConfig(**wide, mh_adapter=True, output_adapter=False),
        "lora": ah.LoRAConfig(r=R, alpha=ALPHA),
        "ia3": ah.IA3Config(**swapped),
        "prefix_flat": ah.PrefixTuningConfig(**prefix, flat=True),
        "prefix": ah.PrefixTuningConfig(**prefix),
        "mam": ah.MAMConfig(ah.PrefixTuningConfig(**prefix), parallel),
        "mam_flat": ah.MAMConfig(ah.PrefixTuningConfig(**prefix, flat=True), parallel),
    }  # fmt: skip


def place(path: str) -> str:
    """Where a module of adapters' sits, in words that hold for every backbone: "0.mlp", "decoder.1.cross"."""
    found = re.fullmatch(r"(?:(?P<stack>\w+)\.block|encoder\.layer|h|layers)\.(?P<layer>\d+)\.(?P<rest>.*)", path)
    assert found is not None, path
    last = "layer.2" if found["stack"] == "decoder" else "layer.1"
    if re.match(r"attention|attn|self_attn|layer\.0", found["rest"]):
        spot = "attn"
    else:
        spot = "mlp" if found["stack"] is None or found["rest"].startswith(last) else "cross"
    return ".".join(filter(None, (found["stack"], found["layer"], spot)))


def put(p: Tensor, *keys: str) -> None:
    """`fill` in place: of several keys one under the other."""
    p.copy_(torch.cat([fill(key, (len(p) // len(keys), *p.shape[1:])) for key in keys]))


def set_bottleneck(path: str, module: Any) -> None:
    """A bottleneck's own norm, where it has one, and its two layers."""
    layers = {"norm": getattr(module, "adapter_norm_before", None), "up": module.adapter_up}
    layers["down"] = next(m for m in module.adapter_down if isinstance(m, nn.Linear))
    for word, layer in layers.items():
        if layer is not None:
            put(layer.weight, f"{place(path)}.{word}.weight")
            put(layer.bias, f"{place(path)}.{word}.bias")


def set_in_layer(path: str, module: Any, scales: bool) -> None:
    """LoRA's two matrices or (IA)^3's scale in one linear layer; GPT-2's fused one holds two parts of them."""
    owner = path.partition(".loras.")[0].rpartition(".")[2]
    roles = [owner[0]] if owner[0] in "qkv" else ["up"]
    if owner == "c_attn":
        roles = ["k" if scales else "q", "v"]
    at = [f"{place(path)}.{role}" for role in roles]
    if scales:
        put(module.lora_B.view(-1), *(f"{a}.scale" for a in at))
    else:
        put(module.lora_A, *(f"{a}.a" for a in at))
        put(module.lora_B, *(f"{a}.b" for a in at))


def set_prefix(path: str, module: Any, flat: bool) -> None:
    """The keys and values of every layer of one kind of attention, or the MLP that makes all of them."""
    group = path.rpartition(".")[2].removesuffix("_prefix")
    stack = {"encoder": "encoder.", "cross": "decoder.", "self": "decoder." if "block." in path else ""}[group]
    kind = "cross" if group == "cross" else "attn"
    at = [f"{stack}{i}.{kind}.prefix" for i in range(module.n_layers)]
    if flat:
        shape = (module.n_heads, P, module.n_embd_per_head)
        every = torch.stack([fill(f"{a}.{word}", shape) for a in at for word in ("key", "value")])
        module.control_trans.copy_(
            every.permute(2, 0, 1, 3).flatten()
        )  # (2 L, H, P, d); theirs is (P, 2 L, H, d), flat
        return
    first, _, second = module.control_trans
    put(module.wte.weight, f"{stack}{kind}.prefix.embedding")
    put(first.weight, f"{stack}{kind}.prefix.inner.weight")
    put(first.bias, f"{stack}{kind}.prefix.inner.bias")
    put(second.weight, *(f"{a}.outer.weight" for a in at))  # of each layer first the keys, then the values
    put(second.bias, *(f"{a}.outer.bias" for a in at))


def set_adapter(model: nn.Module) -> None:
    """Write `fill` into every tensor of the model's one adapter."""
    from adapters.methods.lora import IA3, LoRA
    from adapters.methods.modeling import Adapter
    from adapters.methods.prefix_tuning import FlatPrefixTuning, PrefixTuning

    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            set_bottleneck(path, module)
        elif isinstance(module, LoRA | IA3):
            set_in_layer(path, module, isinstance(module, IA3))
        elif isinstance(module, FlatPrefixTuning | PrefixTuning):
            set_prefix(path, module, isinstance(module, FlatPrefixTuning))


def adapted(name: str, config: Any) -> Tensor:
    """The last hidden states under one configuration."""
    import adapters as ah

    model = backbone(name)
    ah.init(model)
    model.add_adapter("a", config=config)
    model.set_active_adapters("a")
    with torch.no_grad():
        set_adapter(model)
    return states(model.eval(), name)


def unmoved() -> Any:
    """A patch of T5's position bias: nothing for the prefix, and for the real keys what they have without one.

    adapters counts the prefix as keys 0 to P - 1, with their bias, and every real key as P further away than it is.
    """
    from transformers.models.t5.modeling_t5 import T5Attention

    original = T5Attention.compute_bias

    def compute_bias(self: Any, query_length: int, key_length: int, **options: Any) -> Tensor:
        return nn.functional.pad(original(self, query_length, key_length - P, **options), (P, 0))

    return patch.object(T5Attention, "compute_bias", compute_bias)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with the nine digits that tell any two fp32 apart."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.9g}")


if __name__ == "__main__":
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")}
    card: dict[str, Any] = {
        "command": "python tests/golden/make_adapters.py",
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "states": {},
    }
    for name in BACKBONES:
        every = {"bare": states(backbone(name), name)}
        every |= {key: adapted(name, config) for key, config in configs(name).items()}
        if name == "t5":
            with unmoved():
                every["prefix_flat_unmoved"] = adapted(name, configs(name)["prefix_flat"])
        card["states"][name] = {key: listed(value) for key, value in every.items()}
    text = json.dumps(card, separators=(",", ":")).replace(']]],"', ']]],\n"')  # a line for each configuration
    GOLDEN.write_text(text + "\n", encoding="utf-8")
