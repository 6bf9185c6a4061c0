"""AdapterSoup: HF PEFT's own average, the mean written a second time, the two ways to choose, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core.files import read_adapter
from deltatune.methods.transfer import adapter_soup, averaged, clustered, nearest

D = 16
SIZES = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0)).eval()


def bert(n_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, num_labels=n_labels)
    return BertForSequenceClassification(config).eval()


def ids() -> Tensor:
    return torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(2))


def saved(
    folder: Path, model: nn.Module, method: Any, many: int = 3, head: str | None = "auto", **hyper: Any
) -> list[str]:
    """`many` trained adapters: each moved from its start in its own way."""
    found = []
    for i in range(many):
        adapter = dt.attach(model, method, head=head, **hyper)
        draw = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
        adapter.save(folder / str(i))
        adapter.detach()
        found.append(str(folder / str(i)))
    return found


def by_hand(folders: list[str], weights: list[float]) -> dict[str, Tensor]:
    """sum_i w_i theta_i"""
    files = [read_adapter(f)[1] for f in folders]
    keys = files[0].keys() - {"base.fingerprint"}
    return {k: sum(w * f[k] for w, f in zip(weights, files, strict=True)) for k in keys}  # type: ignore[misc]


METHODS: dict[str, Any] = {
    "sequential": lambda: ("sequential", {"r": 4}),
    "pfeiffer": lambda: ("pfeiffer", {"r": 4}),
    "lora": lambda: ("lora", {"r": 2}),
    "prefix with its network": lambda: ("prefix_tuning", {"n": 2, "mid": 4}),
    "layers that share": lambda: (
        (dt.TokenRows(tokens=(3, 5)), {}) if hasattr(dt.TokenRows.Config, "tokens") else ("ia3", {})
    ),
    "tree": lambda: (dt.Sum(dt.LoRA(r=2), dt.Stack(dt.PrefixTuning(n=2), dt.IA3())), {}),
    "places of their own": lambda: ("lora", {"where": {"attn.q": {"r": 2}, "mlp.down": {"r": 3}}}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_of_any_tree(tmp_path: Path, name: str) -> None:
    """The task head that all files have is averaged as well."""
    method, hyper = METHODS[name]()
    folders = saved(tmp_path, model := bert(), method, **hyper)
    adapter = dt.attach(model, "adapter_soup", sources=folders)
    got, want = adapter.state_dict(), by_hand(folders, [1 / 3] * 3)
    assert got.keys() == want.keys() and any(k.startswith("head.") for k in got)
    for key, t in want.items():
        torch.testing.assert_close(got[key], t, rtol=0, atol=1e-6)
    model.train()
    model(ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.save(tmp_path / "soup")
    again = bert()
    dt.load(again, tmp_path / "soup")
    with torch.no_grad():  # to the last bit where nothing asks for a gradient
        assert torch.equal(again(ids()).logits, model.eval()(ids()).logits)


def test_weights_are_shares(tmp_path: Path) -> None:
    folders = saved(tmp_path, model := bert(), "lora", r=2)
    got = dt.attach(model, "adapter_soup", sources=folders, weights=(3, 1, 0)).state_dict()
    for key, t in by_hand(folders, [0.75, 0.25, 0.0]).items():
        torch.testing.assert_close(got[key], t, rtol=0, atol=1e-6)


def test_as_peft_averages(tmp_path: Path) -> None:
    """HF PEFT's `add_weighted_adapter` of (IA)^3, its vectors averaged, on the same model."""
    peft = get_peft_model(
        llama(), IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    peft.add_adapter(
        "second", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "ia3_l" in key:
                p.add_(0.4 * torch.randn(p.shape, generator=draw))
    peft.save_pretrained(tmp_path)
    peft.add_weighted_adapter(["default", "second"], [0.7, 0.3], "soup")
    peft.set_adapter("soup")
    want = peft.eval()(ids()).logits
    folders = []
    for i, at in enumerate((tmp_path, tmp_path / "second")):
        adapter = dt.load(model := llama(), at)
        adapter.save(tmp_path / f"ours{i}")
        folders.append(str(tmp_path / f"ours{i}"))
        assert (model(ids()).logits - want).abs().max() > 1e-3
    dt.attach(model := llama(), "adapter_soup", sources=folders, weights=(0.7, 0.3))
    torch.testing.assert_close(model(ids()).logits, want, rtol=0, atol=1e-6)


def test_inside_a_tree(tmp_path: Path) -> None:
    """Under another path, beside another method, the soup is the same."""
    tree = dt.Sum(dt.LoRA(r=2), dt.PrefixTuning(n=2, mid=4))
    folders = saved(tmp_path, model := llama(), tree, head=None)
    dt.attach(model, "adapter_soup", sources=folders)
    dt.attach(other := llama(), dt.Stack(dt.LoRA(r=3), adapter_soup(sources=folders)), head=None)
    with torch.no_grad():
        assert torch.equal(other(ids()).logits, model(ids()).logits)


def test_of_what_trains_in_place(tmp_path: Path) -> None:
    """A file holds what moved; what one did not move counts as the base's own."""
    base = bert()
    folders = saved(tmp_path, base, "full", many=2)
    adapter = dt.attach(base, "full")
    with torch.no_grad():
        base.classifier.bias.add_(1.0)
    adapter.save(tmp_path / "2")
    adapter.detach()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    soup = dt.attach(base, "adapter_soup", sources=[*folders, str(tmp_path / "2")])
    files = [read_adapter(f)[1] for f in (*folders, tmp_path / "2")]
    assert len(files[2]) == 2
    for key, p in base.named_parameters():
        mean = sum(f.get(f"0.{key}", before[key]) for f in files) / 3  # type: ignore[operator]
        torch.testing.assert_close(p.detach(), mean, rtol=0, atol=1e-6)
    soup.detach()
    assert all(torch.equal(t, before[k]) for k, t in base.state_dict().items())


def test_refuses(tmp_path: Path) -> None:
    model = bert()
    folders = saved(tmp_path / "a", model, "lora", r=2)
    (wide,) = saved(tmp_path / "r", model, "lora", many=1, r=3)
    (headless,) = saved(tmp_path / "h", model, "lora", many=1, head=None, r=2)
    masks = saved(tmp_path / "m", model, "propelt", many=2)
    for said, hyper in {
        "no source adapters for adapter_soup": {},
        "r/0 and .*a/0 have no mean: the tree of the one": {"sources": [folders[0], wide]},
        "the head of the one is False, of the other True": {"sources": [folders[0], headless]},
        "2 weights for 3 sources": {"sources": folders, "weights": (1, 1)},
        "the weights sum to 0": {"sources": folders, "weights": (1, -1, 0)},
        "torch.uint8 values that differ": {"sources": masks},
    }.items():
        with pytest.raises(ValueError, match=said):
            dt.attach(model, "adapter_soup", **hyper)
    assert not dt.adapters(model)
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 16\), here it must be \(2, 16\)"):
        dt.attach(bert(2), "adapter_soup", sources=folders)
    with pytest.raises(ValueError, match=r"missing 0\.bert.encoder\.layer\.0\.attention\.output\.dense"):
        dt.attach(bert(), "adapter_soup", sources=saved(tmp_path / "w", bert(), "lora", many=2, r=2), where="o")
    dt.attach(two := bert(2), "adapter_soup", sources=folders, head=None)
    assert two(ids()).logits.shape == (3, 2)
    with pytest.raises(ValueError, match=r"source 1 .*missing b"):
        averaged([{"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}])


def domains() -> list[np.ndarray[Any, Any]]:
    """Four domains of 40 texts each around their own direction, as NumPy arrays."""
    draw = np.random.default_rng(0)
    return [np.eye(8)[i] * 5 + draw.normal(size=(40, 8)) for i in range(4)]


def mixed(*parts: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Texts of a new domain: so many like those of each."""
    draw = np.random.default_rng(1)
    return np.concatenate([np.eye(8)[i] * 5 + draw.normal(size=(n, 8)) for i, n in parts])


def test_nearest_by_mean_cosine() -> None:
    known, new = domains(), mixed((2, 20), (0, 10))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (*known, new)]
    mean = [float(np.mean(x @ unit[-1].T)) for x in unit[:-1]]
    order = sorted(range(4), key=lambda i: -mean[i])
    assert order[:2] == [2, 0]
    for k in (1, 2, 4):
        assert nearest(known, new, k) == order[:k]
    assert nearest(known, new, 4, least=(mean[order[1]] + mean[order[2]]) / 2) == [2, 0]
    assert nearest([torch.from_numpy(x) for x in known], new[:1], 1) == [2]


def test_clusters_hold_the_texts() -> None:
    """Cluster numbers are the mixture's own; the domains that they belong to are found from their texts."""
    known, new = domains(), mixed((3, 24), (1, 12), (0, 4))
    assert clustered(known, new, 4) == [3, 1, 0]
    assert clustered(known, new, 4, least=0.2) == [3, 1] and clustered(known, new, 1) == [3]
    assert clustered(known, new, 4, n_dims=4, seed=5) == [3, 1, 0]
    assert clustered(known[::-1], new, 4) == [0, 2, 3]


def test_choosing_refuses() -> None:
    known = domains()
    for said, args in {
        "k = 5, but it must lie between 1 and the number of domains, 4": (known, known[0], 5),
        r"domain 1 is \(40, 3\); embeddings are \(texts, 8\)": ([known[0], known[1][:, :3]], known[0], 1),
        r"the target is \(0, 8\)": (known, known[0][:0], 1),
    }.items():
        for choose in (nearest, clustered):
            with pytest.raises(ValueError, match=said):
                choose(*args)
