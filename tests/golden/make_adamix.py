"""What AdaMix's reference computes in training and in evaluation, in fp64, with adapters on RoBERTa and LoRA on GPT-2.

    python3.11 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch==2.13.0 'numpy<2' 'huggingface_hub<0.20' 'setuptools<80'
    /tmp/venv/bin/pip install filelock packaging pyyaml regex requests tqdm sacremoses
    /tmp/venv/bin/python -B tests/golden/make_adamix.py REFERENCE

where REFERENCE is GitHub's microsoft/AdaMix at COMMIT; its own transformers (4.4.2, without tokenizers) and loralib lie
there. Writes tests/golden/adamix.json:

    adapter   {share: {losses, draws, grads, eval}} on a RoBERTa with a head of three classes, share "none" and "up":
              the losses of `batch()` under the seeds SEEDS, each with its consistency term; which expert each half of each
              layer drew under the first seed, first pass and second; its gradients; the logits of evaluation
    lora      the same on a GPT-2: the loss without the term, the term's own value, draws of c_attn, and logits at `asked`

No weight is stored: each is `fill` of its name. Experts: LAYER.down.EXPERT.weight (R, D), .bias (R), LAYER.up.EXPERT.weight
(D, R), .bias (D); LAYER.a.EXPERT (2 R, D), the rows of q then those of v, LAYER.b.EXPERT (2 D, R). What needs no reference is
imported by the test on our side.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("adamix.json")
COMMIT = "d361e9d6a24cb44d6d6169337128a0cf6feb6e1d"
D, LAYERS, R, M, ALPHA = 16, 2, 4, 3, 6.0
SEEDS = (0, 1, 2)
WEIGHT = 100.0  # of the consistency term in the reference's GPT-2; 1 in its RoBERTa
REAL = (6, 4)  # real tokens of the two rows
ASKED = ((2, 6), (1, 4))  # of each row, from which of its next tokens to which a label is there


def fill(key: str, shape: Iterable[int], size: float = 0.4) -> Tensor:
    """The tensor of that name, even over (-size, size) and exact on every machine; a norm's weight lies around 1."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    values = ((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size
    is_norm = len(shape) == 1 and key.endswith("weight") and ("LayerNorm" in key or "ln_" in key)
    return values.view(shape) + is_norm


def filled(model: nn.Module) -> nn.Module:
    """In fp64, every tensor but the experts `fill` of its name."""
    model = model.double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "expert" not in key.lower():
                p.copy_(fill(key, p.shape))
    return model


def batch() -> dict[str, Tensor]:
    """Two rows of tokens and their classes; 1 is RoBERTa's padding."""
    mask = torch.tensor([[int(t < n) for t in range(max(REAL))] for n in REAL])
    tokens = 2 + torch.arange(mask.numel()).view(mask.shape) * 7 % 38
    return {
        "input_ids": torch.where(mask == 1, tokens, 1),
        "attention_mask": mask,
        "labels": torch.tensor([2, 0]),
    }


def text() -> tuple[Tensor, Tensor]:
    """(2, 7) tokens, and which of the (2, 6) next ones have a label."""
    ids = 2 + torch.arange(14).view(2, 7) * 11 % 38
    return ids, torch.tensor([[int(lo <= t < hi) for t in range(6)] for lo, hi in ASKED])


def roberta_sizes() -> dict[str, Any]:
    """RoBERTa of two layers without dropout, with a head of three classes."""
    return {
        "vocab_size": 40, "hidden_size": D, "intermediate_size": 24, "max_position_embeddings": 16, "num_labels": 3,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "type_vocab_size": 1, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


class Drawn:
    """`torch.randint` while it notes what it gave."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.true = torch.randint

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As torch's."""
        out = self.true(*args, **kwargs)
        self.seen.append(int(out))
        return out

    def __enter__(self) -> "Drawn":
        torch.randint = self  # type: ignore[assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.randint = self.true


def course(model: nn.Module, loss: Any, experts: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Losses under each seed; draws and gradients under the first; `loss()` gives numbers, the first of them for the backward."""
    card: dict[str, Any] = {"losses": []}
    model.train()
    for seed in SEEDS:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = None
        with Drawn() as drawn:
            values = loss()
        card["losses"].append([float(f"{v.item():.12g}") for v in values])
        if seed == SEEDS[0]:
            values[0].backward()
            card["draws"] = drawn.seen
            card["grads"] = {k: None if p.grad is None else listed(p.grad) for k, p in experts.items()}
    model.eval()
    return card


def adapter(share: str) -> dict[str, Any]:
    """The reference's RoBERTa."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**roberta_sizes())
    own = {
        "apply_adapter": False, "adapter_size": R, "apply_expert_soup": True, "num_experts": M, "inference_level": 3,
        "sharing_up": int(share == "up"), "sharing_down": 0, "use_consistency_loss": 1, "apply_lora": False,
        "finetuning_task": "mnli",
    }  # fmt: skip
    for key, value in own.items():
        setattr(config, key, value)
    model = filled(RobertaForSequenceClassification(config))
    experts: dict[str, nn.Parameter] = {}
    for i, layer in enumerate(model.roberta.encoder.layer):
        for half, mixture in {"down": layer.output.ExpertSoup.MoA_A, "up": layer.output.ExpertSoup.MoA_B}.items():
            for j, expert in enumerate(mixture.deepspeed_experts):
                experts |= {f"{i}.{half}.{j}.{k}": p for k, p in expert.named_parameters()}
    with torch.no_grad():
        for key, p in experts.items():
            p.copy_(fill(key, p.shape))
    rows = batch()
    card = course(model, lambda: [model(**rows).loss], experts)
    with torch.no_grad():
        return card | {"eval": listed(model(**rows).logits)}


def lora(share: str) -> dict[str, Any]:
    """The reference's GPT-2."""
    import model as reference

    sizes = {"n_positions": 16, "n_ctx": 16, "n_embd": D, "n_layer": LAYERS, "n_head": 2}
    own = {"lora_attn_dim": R, "lora_attn_alpha": ALPHA, "n_experts": M, "share_A": 0, "share_B": int(share == "up")}
    model = filled(reference.GPT2LMModel(reference.GPT2Config(40, **sizes, **own)))
    experts: dict[str, nn.Parameter] = {}
    for i, block in enumerate(model.transformer.h):
        for half, held in {"a": block.attn.c_attn.experts_lora_A, "b": block.attn.c_attn.experts_lora_B}.items():
            experts |= {f"{i}.{half}.{j}": p for j, p in enumerate(held)}
    with torch.no_grad():
        for key, p in experts.items():
            p.copy_(fill(key, p.shape))
    ids, asked = text()
    terms: list[Tensor] = []
    term = reference.symmetric_KL_loss

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        terms.append(term(*args, **kwargs))
        return terms[-1]

    def loss() -> list[Tensor]:
        reference.symmetric_KL_loss = noted
        whole = model(ids[:, :-1], lm_labels=ids[:, 1:].contiguous(), lm_mask=asked)[1]
        reference.symmetric_KL_loss = term
        return [whole, terms[-1]]

    card = course(model, loss, experts)
    with torch.no_grad():
        return card | {"eval": listed(model(ids[:, :-1])[0][asked == 1])}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    sys.path[:0] = [str(root / "src"), str(root / "NLG"), str(root / "NLG" / "src")]
    import transformers

    card = {
        "command": "python -B tests/golden/make_adamix.py REFERENCE",
        "reference": {"repository": "microsoft/AdaMix", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "adapter": {share: adapter(share) for share in ("none", "up")},
        "lora": {share: lora(share) for share in ("none", "up")},
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
