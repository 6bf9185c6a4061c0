"""What DePT's reference computes in front of a T5 and of a GPT-2, in fp64.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0
    /tmp/venv/bin/pip install --no-deps transformers==4.30.2 accelerate==0.21.0
    /tmp/venv/bin/pip install 'numpy<2' 'huggingface_hub<0.20' filelock packaging pyyaml regex requests tqdm safetensors psutil
    /tmp/venv/bin/python tests/golden/make_dept.py REFERENCE

where REFERENCE is GitHub's ZhengxiangShi/DePT at COMMIT. The file writes tests/golden/dept.json:

    t5, gpt2   {bare, logits, loss, grads}: the plain backbone's logits of `rows`, the adapted one's at the real tokens, and the
               gradients of `start`'s tensors where loss is sum(fill("loss") * logits)
    defaults   the reference's numbers for T5-base, read from a checkpoint's configuration and training's output
    start      {zero, spread}: is B zero, and the largest entry of A times the root of r

Rows are padded on the right, to the length that the table has: the reference adds the whole table to every row. No weight is
stored: each is `fill` of its name.
"""

import json
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("dept.json")
COMMIT = "f0266a774a45c62ce32f159e2182583f1878546c"
D, N, R, LENGTH, VOCAB = 16, 3, 2, 7, 24
T5 = {"vocab_size": VOCAB, "d_model": D, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32}
SHAPES = {"prompt": (N, D), "a": (LENGTH, R), "b": (R, D)}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight lie around 1, as a norm's do.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return spread + (len(shape) == 1 and key.endswith("weight"))


def start() -> dict[str, Tensor]:
    """The method's tensors by name."""
    return {key: fill(key, shape) for key, shape in SHAPES.items()}


def backbone(kind: str) -> nn.Module:
    """Two layers, in fp64 and eval mode, every tensor by its name."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    if kind == "t5":
        model: Any = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, pad_token_id=0))
    else:
        model = GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2))
    model = model.double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model  # type: ignore[no-any-return]


def rows(kind: str) -> dict[str, Tensor]:
    """Two rows, one of them padded on the right."""
    ids = torch.tensor([[3, 17, 5, 9, 20, 7, 1], [4, 8, 8, 21, 1, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if kind == "t5":
        given["labels"] = torch.tensor([[7, 6, 11, 3], [12, 13, 2, 1]])  # the reference hands no decoder_input_ids on
    return given


def real(kind: str, logits: Tensor) -> Tensor:
    """(tokens, V), the logits at the real tokens; the reference leaves those of its soft tokens in front."""
    if kind == "t5":
        return logits.flatten(0, 1)
    return logits[:, -LENGTH:][rows(kind)["attention_mask"] == 1]


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with ten digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.10g}")


def reference(kind: str, n: int = N, r: int = R) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The reference's model and its tensors by the method's names."""
    from peft import PromptTuningLoRAConfig, TaskType, get_peft_model  # type: ignore[attr-defined]

    task = TaskType.SEQ_2_SEQ_LM if kind == "t5" else TaskType.CAUSAL_LM
    sizes = {"num_virtual_tokens": n, "r": r, "max_length": LENGTH, "token_dim": D, "num_transformer_submodules": 1}
    model = get_peft_model(backbone(kind), PromptTuningLoRAConfig(task_type=task, **sizes))
    own: Any = model.prompt_encoder["default"]
    return model, {"prompt": own.embedding.weight, "a": own.lora_embedding_A, "b": own.lora_embedding_B}


def adapted(kind: str) -> dict[str, Any]:
    """The reference's logits and gradients."""
    with torch.no_grad():
        bare = listed(real(kind, backbone(kind)(**rows(kind)).logits))
    model, own = reference(kind)
    with torch.no_grad():
        for key, p in own.items():
            p.data = start()[key].double()
    logits = real(kind, model.eval()(**rows(kind)).logits)
    loss = (fill("loss", logits.shape).double() * logits).sum()
    loss.backward()
    grads = {key: listed(p.grad) for key, p in own.items() if p.grad is not None}
    return {"bare": bare, "logits": listed(logits), "loss": loss.item(), "grads": grads}


def defaults(reference: Path) -> dict[str, Any]:
    """What the reference trained a checkpoint with."""
    config = json.loads((reference / "checkpoints/mrpc/adapter_config.json").read_text(encoding="utf-8"))
    said = (reference / "checkpoints/mrpc/output.log").read_text(encoding="utf-8")
    rates = {k: float(re.findall(rf"^{k}=([\d.e-]+)", said, re.M)[0]) for k in ("learning_rate", "lora_embedding_lr")}
    return {k: config[k] for k in ("num_virtual_tokens", "r", "max_length", "lora_alpha")} | rates


def starts() -> dict[str, Any]:
    """How the reference's A and B start."""
    torch.manual_seed(0)
    own = reference("t5", r=400)[1]
    return {"zero": not own["b"].any().item(), "spread": own["a"].abs().max().item() * 400**0.5}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    card: dict[str, Any] = {
        "command": "python tests/golden/make_dept.py REFERENCE",
        "reference": {"repository": "ZhengxiangShi/DePT", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "defaults": defaults(Path(sys.argv[1])),
        "start": starts(),
    }
    card |= {kind: adapted(kind) for kind in ("t5", "gpt2")}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
