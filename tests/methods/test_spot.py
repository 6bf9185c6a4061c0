"""SPoT: its two similarities and its weights written a second time, what the files hold, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import deltatune as dt
from deltatune.methods.transfer import blended, ranked, similarity

D, N = 16, 3
SIZES = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, num_labels=3)
    return BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=D, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def prompts() -> list[Tensor]:
    """Three sources and the task's: all similar to the task, the second most, then the third."""
    draw = torch.Generator().manual_seed(4)
    task = torch.randn(N, D, generator=draw)
    return [task + far * torch.randn(N, D, generator=draw) + 0.3 for far in (2.0, 0.3, 1.0)] + [task]


def saved(folder: Path, values: list[Tensor], model: nn.Module, **hyper: Any) -> list[str]:
    """A prompt_tuning adapter for each."""
    found = []
    for i, value in enumerate(values):
        adapter = dt.attach(model, "prompt_tuning", n=len(value), **hyper)
        with torch.no_grad():
            next(d for d in adapter.deltas.values() if d.name == "prompt_tuning").prompt.copy_(value)
        adapter.save(folder / str(i))
        adapter.detach()
        found.append(str(folder / str(i)))
    return found


def started(model: nn.Module, **hyper: Any) -> Tensor:
    """The prompt at the start."""
    adapter = dt.attach(model, "spot", **hyper)
    return next(d for d in adapter.deltas.values() if d.name == "prompt_tuning").prompt.detach()


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def by_hand(a: Tensor, b: Tensor, metric: str) -> float:
    if metric == "average_tokens":
        return cosine(*([sum(row[d] for row in p) / len(p) for d in range(D)] for p in (a.tolist(), b.tolist())))
    return sum(cosine(x, y) for x in a.tolist() for y in b.tolist()) / (len(a) * len(b))


@pytest.mark.parametrize("metric", ["average_tokens", "per_token"])
def test_similarity_as_the_paper_says(metric: Any) -> None:
    *sources, task = prompts()
    want = [by_hand(p, task, metric) for p in sources]
    assert [similarity(p, task, metric) for p in sources] == pytest.approx(want, abs=1e-12)
    assert similarity(2 * task, task[:2], metric) == pytest.approx(by_hand(task, task[:2], metric), abs=1e-12)
    order = ranked(task, sources, metric)
    assert [i for i, _ in order] == [1, 2, 0] and [s for _, s in order] == pytest.approx([want[i] for i in (1, 2, 0)])
    assert similarity(sources[0], task, "average_tokens") != pytest.approx(similarity(sources[0], task, "per_token"))


@pytest.mark.parametrize("metric", ["average_tokens", "per_token"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_starts_from_the_k_nearest(tmp_path: Path, k: int, metric: Any) -> None:
    """sum_r a_r P_r, a_r = sim(s_r, t) / sum_l sim(s_l, t), over the k sources ranked first."""
    *sources, task = prompts()
    folders = saved(tmp_path, [*sources, task], model := llama())
    got = started(model, sources=folders[:3], task=folders[3], k=k, metric=metric)
    best = sorted(((by_hand(p, task, metric), i) for i, p in enumerate(sources)), reverse=True)[:k]
    want = sum(s * sources[i] for s, i in best) / sum(s for s, _ in best)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    if k == 1:
        assert torch.equal(got, sources[1])


def test_one_source_is_the_start_itself(tmp_path: Path) -> None:
    """And from then on it is prompt tuning: the same outputs, training, file, and loading without the sources."""
    source = prompts()[0]
    (folder,) = saved(tmp_path, [source], model := llama())
    want = llama()
    dt.load(want, folder)
    adapter = dt.attach(model, "spot", sources=[folder])
    ids = torch.randint(1, 30, (2, 7))
    assert torch.equal(model(ids).logits, want(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with torch.no_grad():
        adapter.parameters()[0].add_(0.1)
    adapter.save(tmp_path / "tuned")
    card = json.loads((tmp_path / "tuned" / "adapter.json").read_text(encoding="utf-8"))
    assert card["tree"]["method"] == "prompt_tuning" and card["tree"]["config"]["n"] == N
    assert str(folder) not in json.dumps(card)
    again = llama()
    dt.load(again, tmp_path / "tuned")
    assert torch.equal(model(ids).logits, again(ids).logits) and not torch.equal(model(ids).logits, want(ids).logits)


def test_classifier_keeps_its_own_head(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, [prompts()[0]], model := bert())
    head = model.classifier.weight.detach().clone()
    adapter = dt.attach(model, "spot", sources=[folder])
    assert adapter.n_head == 3 * D + 3 and torch.equal(adapter.head_parameters()[0], head)


def test_a_decoder_takes_its_prompt(tmp_path: Path) -> None:
    """The length and the side are the sources' own."""
    (folder,) = saved(tmp_path, [prompts()[0]], model := t5(), side="decoder")
    adapter = dt.attach(model, "spot", sources=[folder])
    ((_, delta),) = adapter.deltas.items()
    assert delta.site.stack == "decoder" and torch.equal(delta.prompt, prompts()[0])
    ids = torch.randint(1, 30, (2, 5))
    rows = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**rows, use_cache=True), model.generate(**rows, use_cache=False))


def test_refuses(tmp_path: Path) -> None:
    *sources, task = prompts()
    model = llama()
    folders = saved(tmp_path / "right", [*sources, task], model)
    (long,) = saved(tmp_path / "long", [torch.randn(5, D)], model)
    (apart,) = saved(tmp_path / "apart", [-sources[0]], model)
    (other,) = saved(tmp_path / "other", [sources[0]], llama(seed=1))
    dt.attach(model, "lora", name="other", r=2).save(tmp_path / "lora")
    for said, hyper in {
        "no source adapters for spot": {},
        "k = 4, but it must lie between 1 and the number of sources, 3": {"sources": folders[:3], "k": 4, "task": task},
        "k = 0": {"sources": folders[:3], "k": 0},
        "spot has 3 sources and no task": {"sources": folders[:3]},
        "a prompt of 5 tokens of width 16, .*right/0 one of 3 of width 16": {
            "sources": [folders[0], long],
            "task": folders[3],
        },
        "long/0 holds a prompt of 5 tokens": {"sources": folders[:2], "task": long},
        "lora holds Leaf.*spot starts from 'prompt_tuning'": {"sources": [str(tmp_path / "lora")]},
        "lora holds 'lora'": {"sources": [folders[0], str(tmp_path / "lora")], "task": folders[3]},
        "other/0 was made for llama with other weights": {"sources": [other]},
        "unknown metric 'per_tokens'; did you mean 'per_token'": {"sources": folders[:1], "metric": "per_tokens"},
        "must be a list of folders": {"sources": folders[0]},
        "one of the 2 has -0.*; take a smaller k": {"sources": [folders[1], apart], "task": folders[3], "k": 2},
        "nothing is no adapter": {"sources": [str(tmp_path / "nothing")]},
        "unknown hyperparameter of spot 'n'": {"sources": folders[:1], "n": 4},
    }.items():
        with pytest.raises(ValueError, match=said):
            dt.attach(model, "spot", **hyper)
    assert list(dt.adapters(model)) == ["other"]
    with pytest.raises(ValueError, match="one of the 2 has -1"):
        blended([task, task], [1.0, -1.0])
