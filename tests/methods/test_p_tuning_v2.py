"""p_tuning_v2: HF PEFT's prefix without a projection, on equal weights."""

from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from soft import D, check_generate, check_padding, logits, model_of, moved, near, padded

import deltatune as dt

N = 5


def test_hf_peft(tmp_path: Path) -> None:
    """Their file and ours are one: outputs and the gradient of the whole table, (n, layers 2 H_kv D)."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=False)
    other = get_peft_model(model_of("llama"), config).eval()
    table = other.prompt_encoder["default"].embedding.weight
    model = model_of("llama")
    adapter = dt.attach(model, "p_tuning_v2", n=N, shift=True)
    keys, values = ([p for name, p in adapter.named_parameters() if name.endswith(f".{k}")] for k in ("key", "value"))
    with torch.no_grad():
        halves = table.view(N, 2, 2, 2, D // 4).permute(1, 2, 3, 0, 4)  # layer, key or value, head, place, size
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            key.copy_(halves[layer, 0])
            value.copy_(halves[layer, 1])
    given = padded()
    want, got = other(**given).logits, model(**given).logits
    real = given["attention_mask"].bool()
    near(got[real], want[real])
    assert (got - logits(model_of("llama"), **given)).abs().max() > 0.05
    for out in (want, got):
        out[real].square().mean().backward()
    mine = torch.stack([torch.stack([k.grad, v.grad]) for k, v in zip(keys, values, strict=True)])  # type: ignore[arg-type]
    near(mine.permute(3, 0, 1, 2, 4).flatten(1), table.grad, 1e-4)  # type: ignore[arg-type]
    other.save_pretrained(tmp_path)
    read = model_of("llama")
    dt.load(read, tmp_path)
    near(logits(read, **given)[real], got[real].detach())


def test_counts() -> None:
    """2 L n d of BERT: keys and values of every layer, and no network."""
    assert dt.attach(model_of("bert"), "p_tuning_v2", n=N, head=None).params() == 2 * 2 * N * D


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding(kind: str) -> None:
    check_padding(kind, lambda model: dt.attach(model, "p_tuning_v2", n=N, head=None))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate(kind: str) -> None:
    check_generate(kind, lambda model: dt.attach(model, "p_tuning_v2", n=N))


def test_it_is_prefix_tuning() -> None:
    """Outputs bit for bit, and the file names the method."""
    outs = []
    for method in ("p_tuning_v2", "prefix_tuning"):
        model = model_of("llama")
        torch.manual_seed(1)
        adapter = moved(dt.attach(model, method, n=N))
        outs.append(logits(model, **padded()))
        assert adapter.tree == dt.PrefixTuning(n=N)
    assert torch.equal(*outs)
