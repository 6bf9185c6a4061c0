"""What AdapterHub's `adapters` computes for MAD-X: a language under a language model's head, a task on a language.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0                   # first, so that no other package chooses its build
    ENV/bin/pip install 'adapters==1.3.*' torch==2.13.0
    ENV/bin/python tests/golden/make_mad_x.py

The script writes tests/golden/mad_x.json, in fp64, for each of BACKBONES at the real tokens of `batch`:

    bare      logits of the plain backbone with its language model's head
    language  {logits, loss, probes} under SeqBnInvConfig: invertible adapter, its inverse at the output, Pfeiffer's
    task      last hidden states under Stack("language", "task"), the task's adapter a SeqBnConfig

loss is sum(fill("loss") * logits); probes holds, for the gradient g of each tensor, sum(fill("probe of " + key) * g).
No weight is stored: each is `fill` of its name. The heads are adapters' own: beneath transformers' heads adapters 1.3.0
never runs the inverse (`static` has the calls of one forward there, True for an inverse).
"""

import importlib.metadata
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("mad_x.json")
VOCAB, D, LAYERS, R, R_TASK = 32, 16, 2, 4, 2  # R the language's bottleneck, R_TASK the task's
REAL = (6, 4)  # real tokens of the two rows, padded on the right
BACKBONES = ("bert", "xlm-roberta", "llama")


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight lie around 1, as a norm's do.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return (spread + (len(shape) == 1 and key.endswith("weight"))).double()


def config(name: str) -> Any:
    """Two layers; the output embedding is the input's, as in the paper."""
    import transformers as tf

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 24, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": 16}
    sizes |= {"tie_word_embeddings": True, "attn_implementation": "eager", "use_cache": False}
    kinds = {"bert": tf.BertConfig, "xlm-roberta": tf.XLMRobertaConfig, "llama": tf.LlamaConfig}
    return kinds[name](**sizes)


def filled(base: nn.Module, head: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Every tensor of the backbone by its own name, the head's by "head." and its name there; tied ones stay so."""
    seen: set[int] = set()
    with torch.no_grad():
        for key, p in (*base.named_parameters(), *((f"head.{key}", p) for key, p in head)):
            if id(p) not in seen:
                seen.add(id(p))
                p.data = fill(key, p.shape)


def backbone(name: str) -> Any:
    """transformers' language model, in fp64 and eval mode."""
    import transformers as tf

    kinds = {"bert": tf.BertForMaskedLM, "xlm-roberta": tf.XLMRobertaForMaskedLM, "llama": tf.LlamaForCausalLM}
    model = kinds[name](config(name)).double().eval()
    model.tie_weights()
    head: dict[str, nn.Parameter] = {}
    if name != "llama":
        parts = model.cls.predictions if name == "bert" else model.lm_head
        dense, norm = (
            (parts.transform.dense, parts.transform.LayerNorm) if name == "bert" else (parts.dense, parts.layer_norm)
        )
        head = {"dense.weight": dense.weight, "dense.bias": dense.bias, "norm.weight": norm.weight}
        head |= {"norm.bias": norm.bias, "decoder.bias": parts.decoder.bias}
    filled(model.base_model, head.items())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise AssertionError("the embeddings are not tied")
    return model


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded on the right."""
    length = max(REAL)
    k = torch.arange(2 * length).view(2, length)
    mask = torch.stack([(torch.arange(length) < n).long() for n in REAL])
    return {"input_ids": (1 + (5 * k + 3) % (VOCAB - 1)) * mask, "attention_mask": mask}


def real(t: Tensor) -> Tensor:
    """(10, ...), the real tokens'."""
    return t[batch()["attention_mask"] == 1]


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def theirs(name: str) -> Any:
    """adapters' model of the same weights, with its own head."""
    import adapters as ah

    kinds = {"bert": ah.BertAdapterModel, "xlm-roberta": ah.XLMRobertaAdapterModel, "llama": ah.LlamaAdapterModel}
    model: Any = kinds[name](config(name))
    if name == "llama":
        model.add_causal_lm_head("lm", layers=1)  # of itself it would put a layer and a norm before the last matrix
    else:
        model.add_masked_lm_head("lm")
    model = model.double().eval()
    head, found = model.heads["lm"], {}
    if name != "llama":
        dense, _, norm, decoder = head
        found = {"dense.weight": dense.weight, "dense.bias": dense.bias, "norm.weight": norm.weight}
        found |= {"norm.bias": norm.bias, "decoder.bias": decoder.bias}
    filled(model.base_model, found.items())
    last = head.get_output_embeddings()
    with torch.no_grad():
        last.weight.copy_(model.get_input_embeddings().weight)
        if name == "llama":
            last.bias.zero_()
    return model


def add(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """A language's or a task's adapter, filled: its parameters by our names."""
    import adapters as ah

    language = adapter == "language"
    kind = ah.SeqBnInvConfig if language else ah.SeqBnConfig
    model.add_adapter(adapter, config=kind(reduction_factor=D / (R if language else R_TASK)))
    model.double()
    found: dict[str, nn.Parameter] = {}
    for path, module in model.base_model.named_modules():
        if path.endswith(f"adapters.{adapter}") and hasattr(module, "adapter_up"):
            layer = next(part for part in path.split(".") if part.isdigit())
            for word, linear in (("down", module.adapter_down[0]), ("up", module.adapter_up)):
                found[f"{adapter}.{layer}.{word}"] = linear.weight
                found[f"{adapter}.{layer}.{word}_bias"] = linear.bias
    if language:
        coupling = model.base_model.invertible_adapters[adapter]
        for letter, net in (("f", coupling.F), ("g", coupling.G)):
            for word, linear in (("down", net[0]), ("up", net[2])):
                found |= {f"{letter}_{word}": linear.weight, f"{letter}_{word}_bias": linear.bias}
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return found


def language(name: str) -> dict[str, Any]:
    """The language stage: its logits, and the gradients of what is trained."""
    model = theirs(name)
    found = add(model, "language")
    model.train_adapter("language")
    model.eval()
    seen = real(model(**batch(), head="lm").logits)
    loss = (fill("loss", seen.shape) * seen).sum()
    grads = torch.autograd.grad(loss, list(found.values()))
    probes = {k: (fill(f"probe of {k}", g.shape) * g).sum().item() for k, g in zip(found, grads, strict=True)}
    return {"logits": listed(seen), "loss": loss.item(), "probes": probes}


def task(name: str) -> Any:
    """A task's adapter on a language's."""
    import adapters.composition as ac

    model = theirs(name)
    add(model, "language")
    add(model, "task")
    model.set_active_adapters(ac.Stack("language", "task"))
    with torch.no_grad():
        return listed(real(model.eval().base_model(**batch()).last_hidden_state))


def static() -> list[bool]:
    """Which ways the invertible adapter ran in one forward of transformers' BertForMaskedLM."""
    import adapters as ah

    model = backbone("bert")
    ah.init(model)
    add(model, "language")
    model.set_active_adapters("language")
    calls: list[bool] = []
    model.base_model.invertible_adapters["language"].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["rev"]), with_kwargs=True
    )
    model(**batch())
    return calls


if __name__ == "__main__":
    versions = {n: importlib.metadata.version(n).partition("+")[0] for n in ("adapters", "transformers", "torch")}
    card: dict[str, Any] = {"command": "python tests/golden/make_mad_x.py", "versions": versions, "static": static()}
    for name in BACKBONES:
        with torch.no_grad():
            bare = listed(real(theirs(name)(**batch(), head="lm").logits))
        card[name] = {"bare": bare, "language": language(name), "task": task(name)}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
