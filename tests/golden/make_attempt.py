"""What ATTEMPT's reference computes with three source prompts in front of a T5, in fp64, for one task and for two.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install --no-deps transformers==4.30.2
    /tmp/venv/bin/pip install 'numpy<2' 'huggingface_hub<0.20' filelock packaging pyyaml regex requests tqdm safetensors
    /tmp/venv/bin/python tests/golden/make_attempt.py REFERENCE

where REFERENCE is GitHub's AkariAsai/ATTEMPT at COMMIT. The file writes tests/golden/attempt.json:

    bare     the plain backbone's logits for `rows`, (B, T, V)
    single   {prompts, logits, loss, grads} with one target prompt: the prompts in front of the encoder's first block,
             loss is sum(fill("loss") * logits), grads by the names of `start`
    multi    the same with two tasks, whose numbers are `TASKS`
    config   {temperature, n, n_sources} of the reference's configuration for one task; the temperature over T5-base's width

The rows have no padding: the reference takes its maximum over padded tokens too. No weight is stored: each is `fill` of its
name. The reference reads its norm's gain and offset and does not train them; the paper counts them, d (n + 2 r + 2).
"""

import json
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("attempt.json")
COMMIT = "b5121e53a4e3c67405c979b2e3585f0810b855c7"
D, N, SOURCES, R, VOCAB, TASKS = 16, 3, 3, 100, 24, (1, 0)
TEMPERATURE = 0.05  # over the width; the reference has 2087, which is 768 e
SIZES = {"vocab_size": VOCAB, "d_model": D, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
STARTS = {"frozen": (SOURCES, N, D), "down": (R, D), "up": (D, R), "gain": (D,), "offset": (D,)}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight or gain lie around 1, as a norm's do.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return spread + (len(shape) == 1 and key.endswith(("weight", "gain")))


def start(n_tasks: int) -> dict[str, Tensor]:
    """The method's tensors by name; D and U over a larger range, so that the softmax is not even."""
    found = {key: fill(key, shape) for key, shape in STARTS.items()}
    found["up"] = 3 * found["up"]
    return found | {"prompt": 3 * fill("prompt", (n_tasks, N, D))}


def filled(model: nn.Module) -> nn.Module:
    """`model` in fp64 and eval mode, every tensor by its name."""
    model = model.double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def backbone() -> nn.Module:
    """T5 of two layers, in fp64."""
    from transformers import T5Config, T5ForConditionalGeneration

    return filled(T5ForConditionalGeneration(T5Config(**SIZES, decoder_start_token_id=0, pad_token_id=0)))


def rows() -> dict[str, Tensor]:
    """Two rows for the encoder and the decoder."""
    ids = torch.tensor([[3, 17, 5, 9, 20, 1], [4, 8, 8, 21, 2, 1]])
    return {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 7, 6, 11], [0, 12, 13, 2]])}


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with ten digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.10g}")


def reference(n_tasks: int) -> nn.Module:
    """The reference's T5 with its attention over prompts."""
    from third_party.models import T5Config, T5ForConditionalGeneration  # type: ignore[import-not-found]

    own = {"prefix_tuning": True, "attn_prefix_tuning": True, "attn_method": "sub", "ignore_target": False}
    own |= {"shared_attn": n_tasks > 1, "num_target": n_tasks, "prefix_num": SOURCES, "learned_temperature": False}
    own |= {"temperature": TEMPERATURE * D, "train_task_adapters": False, "fix_attention": False}
    config = T5Config(**SIZES, decoder_start_token_id=0, pad_token_id=0)
    for key, value in own.items():
        setattr(config, key, value)
    layers = dict.fromkeys(("task_adapter_layers_encoder", "task_adapter_layers_decoder"))
    adapter = SimpleNamespace(prefix_dim=N, init_prefix_from_vocab=False, bitfit=False, task_adapter_in_decoder=False)
    adapter.__dict__.update(layers)
    return filled(T5ForConditionalGeneration(config, adapter_config=adapter))


def tensors(model: Any) -> dict[str, nn.Parameter]:
    """The reference's tensors by the method's names."""
    stack = model.encoder
    found = {"frozen": model.mul_prefix_emb, "prompt": model.prefix_shared, "gain": stack.layer_norm.weight}
    return found | {
        "offset": stack.layer_norm.bias, "down": stack.attn_W_down.weight, "up": stack.attn_W_up.weight,
    }  # fmt: skip


def looked_at(model: Any) -> list[Tensor]:
    """Filled by the next forward: the soft tokens that the encoder's first block reads."""
    found: list[Tensor] = []
    model.encoder.block[0].register_forward_pre_hook(lambda block, args: found.append(args[0][:, :N].detach()))
    return found


def adapted(n_tasks: int) -> dict[str, Any]:
    """The reference's logits and gradients."""
    model: Any = reference(n_tasks)
    own = tensors(model)
    values = start(n_tasks)
    model.store_prefix_weights(list(values["frozen"].double()))  # as its runs load the sources
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(values[key].view_as(p))
    given: dict[str, Any] = {"task_ids": torch.tensor(TASKS)} if n_tasks > 1 else {}
    prompts = looked_at(model)
    logits = model(**rows(), **given).logits
    loss = (fill("loss", logits.shape).double() * logits).sum()
    loss.backward()
    grads = {k: listed(p.grad.view(values[k].shape)) for k, p in own.items() if k != "frozen"}
    grads["down"], grads["up"] = (grads["down"][:8], [row[:8] for row in grads["up"]])  # a part says as much
    return {"prompts": listed(prompts[0]), "logits": listed(logits), "loss": loss.item(), "grads": grads}


def config() -> dict[str, Any]:
    """The configuration for one task: its temperature over T5-base's width."""
    found = json.loads(Path(sys.argv[1], "attempt/configs/attempt/sinlge_task.json").read_text(encoding="utf-8"))
    return {"temperature": found["temperature"] / 768, "n": found["prefix_dim"], "n_sources": found["prefix_num"]}


if __name__ == "__main__":
    sys.path.insert(0, os.path.join(sys.argv[1], "attempt"))
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign, assignment]  # the reference loads onto a GPU
    import transformers

    card: dict[str, Any] = {
        "command": "python tests/golden/make_attempt.py REFERENCE",
        "reference": {"repository": "AkariAsai/ATTEMPT", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "config": config(),
    }
    with torch.no_grad():
        card["bare"] = listed(backbone()(**rows()).logits)
    card |= {"single": adapted(1), "multi": adapted(2)}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
