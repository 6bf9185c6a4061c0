"""What the reference of LST computes with a side network on a T5, in fp64, and how it prunes a start out of that T5.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install --no-deps transformers==4.6.0 sacremoses joblib click
    /tmp/venv/bin/pip install 'numpy<2' 'huggingface_hub<0.20' filelock packaging pyyaml regex requests tqdm
    /tmp/venv/bin/python tests/golden/make_lst.py REFERENCE

where REFERENCE is GitHub's ylsung/Ladder-Side-Tuning at COMMIT. The file writes tests/golden/lst.json:

    states  what goes to the head at the decoder's tokens (B, T, D); the side network has no position bias (it is 0)
    loss    sum(fill("loss") * states)
    grads   of each of the side network's tensors, sum(fill(NAME) * gradient)
    pruned  by the reference's fisher-v2 from the squared gradients of `rows`, one at a time: sum(fill(NAME) * tensor)

A NAME is `encoder.1.q`: stack, block and the slot of our LST. No weight is stored: each is `fill` of its name.
"""

import importlib.metadata
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("lst.json")
COMMIT = "1798e82e52f2f071084e6a10126c3da359176238"
LAYERS, R, SIDE = 3, 4, (1, 2)  # blocks, the divisor, the blocks with a side block
SIZES = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": LAYERS, "num_heads": 2}
SIZES |= {"pad_token_id": 0, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    A norm's lie around 1.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return spread + ("norm" in key)


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded in the encoder, and what the decoder reads."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 1], [10, 11, 12, 1, 0, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "decoder_input_ids": torch.tensor([[0, 13, 14, 15], [0, 16, 17, 18]]),
    }


def rows() -> list[dict[str, Tensor]]:
    """One row a batch, with labels: what the start is pruned on."""
    texts = [([5, 6, 7, 1], [13, 14, 1]), ([8, 9, 10, 11, 1], [15, 1]), ([12, 20, 21, 1], [22, 23, 24, 1])]
    return [{"input_ids": torch.tensor([a]), "labels": torch.tensor([b])} for a, b in texts]


def filled(model: nn.Module) -> nn.Module:
    """`model` in fp64 and eval mode, every tensor by its name; the side network's by the names that the file has."""
    model = model.double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(named(key), p.shape))
            if "side_block" in key and "relative_attention_bias" in key:
                p.zero_()
    return model


def named(key: str) -> str:
    """The golden's name of one of the reference's tensors; of the backbone's its own."""
    stack, _, rest = key.removesuffix(".weight").partition(".")
    kind, _, rest = rest.partition(".")
    bias = "_bias" * key.endswith("bias")
    if stack == "side_final_upsample":
        return f"decoder.{LAYERS - 1}.lift{bias}"
    if kind == "side_first_downsample":
        return f"{stack}.0.first{bias}"
    if kind == "final_side_layer_norm":
        return f"{stack}.{LAYERS - 1}.norm_last"
    layer, _, own = rest.partition(".")
    if kind == "side_downsamples":
        return f"{stack}.{layer}.ladder{bias}"
    if kind == "side_gate_params":
        return f"{stack}.{layer}.alpha"
    return f"{stack}.{layer}.{slot(stack, own)}" if kind == "side_block" else key


def slot(stack: str, own: str) -> str:
    """Our slot of a tensor inside one of the reference's blocks."""
    if own.endswith("layer_norm"):
        return ["norm_attn", "norm_cross" if stack == "decoder" else "norm_mlp", "norm_mlp"][int(own.split(".")[1])]
    last = own.rpartition(".")[2]
    return {"wi": "up", "wo": "down"}.get(last, f"cross_{last}" if "EncDec" in own else last)


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def side() -> nn.Module:
    """The reference's model."""
    from seq2seq.third_party.models.t5.configuration_t5 import T5Config
    from seq2seq.third_party.models.t5.modeling_side_t5 import T5ForConditionalGeneration

    config = T5Config(**SIZES)
    own = {
        "use_gate": "learnable",
        "gate_T": 0.1,
        "gate_alpha": 0.0,
        "add_bias_sampling": True,
        "add_residual_after": False,
    }
    own |= {
        "encoder_side_layers": list(SIDE),
        "decoder_side_layers": list(SIDE),
        "merge_last": False,
        "lambda_distill": 0,
    }
    own |= {"train_task_adapters": False, "prefix_tuning": False, "lambda_label": 1}
    for key, value in own.items():
        setattr(config, key, value)
    adapters = {"task_reduction_factor": R, "bitfit": False, "task_adapter_in_decoder": False}
    adapters |= {"task_adapter_layers_encoder": None, "task_adapter_layers_decoder": None}
    model = T5ForConditionalGeneration(config, adapter_config=SimpleNamespace(**adapters))
    assert isinstance(model, nn.Module)
    return model


def adapted() -> dict[str, Any]:
    """States, loss and gradients of the reference's model."""
    model, seen = filled(side()), []
    model.side_final_upsample.register_forward_hook(lambda module, args, out: seen.append(out))  # type: ignore[union-attr]
    model(**batch())
    (states,) = seen
    loss = (fill("loss", states.shape).double() * states).sum()
    loss.backward()
    grads = {named(n): p.grad for n, p in model.named_parameters() if p.grad is not None and "side" in n}
    grads = {n: g for n, g in grads.items() if "relative" not in n}
    sums = {n: listed((fill(n, g.shape).double() * g).sum()) for n, g in grads.items()}
    return {"states": listed(states), "loss": listed(loss), "grads": sums}


def pruned() -> dict[str, float]:
    """The start that the reference copies into its side blocks."""
    from seq2seq.pruning import pruning_methods
    from seq2seq.pruning.fisher import calculate_the_importance_label
    from transformers.models.t5.modeling_t5 import T5Config, T5ForConditionalGeneration

    model = filled(T5ForConditionalGeneration(T5Config(**SIZES)))
    # what is kept lies there in the order in which Python's sets give it, which also says what forms a head; here in its own
    pruning_methods.select_weights = lambda w, gone: w[sorted(set(range(len(w))) - set(gone))]
    importance = calculate_the_importance_label(model, rows(), 1024, "cpu", "square")
    state = pruning_methods.pruning_v2(model, R, importance_measure=model.state_dict() | importance)
    found = {}
    for key, value in state.items():
        name = named(key.replace(".block.", ".side_block.").replace("final_layer_norm", "final_side_layer_norm"))
        if name != key and "relative" not in key and int(name.split(".")[1]) in SIDE:
            found[name] = listed((fill(name, value.shape).double() * value).sum())
    return found


if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/Torch-Pruning"]
    pins = {"tokenizers": "0.10.3", "huggingface-hub": "0.0.8"}  # what that transformers asks for and no model needs
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: pins.get(name) or version(name)
    import transformers

    sys.modules["datasets"] = ModuleType("datasets")  # imported beside the functions used here, by none of them
    inverted = transformers.modeling_utils.ModuleUtilsMixin
    inverted.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None]) * -1e9  # its own refuses fp64

    card: dict[str, Any] = {
        "command": "python tests/golden/make_lst.py REFERENCE",
        "reference": {"repository": "ylsung/Ladder-Side-Tuning", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
    }
    card |= adapted() | {"pruned": pruned()}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
