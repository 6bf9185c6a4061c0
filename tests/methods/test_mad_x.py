"""MAD-X against AdapterHub's `adapters`: a language, a task on a language; the whole transfer to another one."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from soft import check_generate, check_padding, logits, model_of, moved, near, padded
from torch import Tensor

import deltatune as dt
from deltatune.methods.language import Invertible

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_mad_x.py"))
fill, backbone, batch, real = (MAKE[k] for k in ("fill", "backbone", "batch", "real"))
R, R_TASK = MAKE["R"], MAKE["R_TASK"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def named(adapter: dt.Adapter, word: str) -> dict[str, Tensor]:
    """Every tensor by its name in the golden file, with its values."""
    found: dict[str, Tensor] = {}
    for delta in adapter.deltas.values():
        for key, slot in delta.slots.items():
            at = "" if slot.shared else f"{word}.{delta.site.layer}."
            found[f"{at}{key}"] = delta.bank_parameter(key) if slot.shared else getattr(delta, key)
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return found


@pytest.mark.parametrize("name", MAKE["BACKBONES"])
def test_a_language_as_adapters_computes(name: str) -> None:
    """Logits, and the gradient of each tensor; the invertible adapter's comes from both of its places."""
    golden, model = GOLDEN[name], backbone(name)
    bare = exact(golden["bare"])
    torch.testing.assert_close(real(model(**batch()).logits), bare, rtol=0, atol=1e-9)
    found = named(dt.attach(model, "mad_x", r=R), "language")
    seen = real(model(**batch()).logits)
    torch.testing.assert_close(seen, exact(golden["language"]["logits"]), rtol=0, atol=1e-9)
    assert (seen - bare).abs().max() > 0.1
    loss = (fill("loss", seen.shape) * seen).sum()
    assert float(loss.detach()) == pytest.approx(golden["language"]["loss"], abs=1e-9)
    loss.backward()
    probes = golden["language"]["probes"]
    assert found.keys() == probes.keys()
    for key, p in found.items():
        assert p.grad is not None and p.grad.any()
        assert float((fill(f"probe of {key}", p.shape) * p.grad).sum()) == pytest.approx(probes[key], abs=1e-9), key


@pytest.mark.parametrize("name", MAKE["BACKBONES"])
def test_a_task_on_a_language_as_adapters_computes(name: str) -> None:
    """Two adapters of one model; at BERT's norm the second reads what the first gives and adds to what it added to."""
    model = backbone(name)
    language = dt.attach(model, "mad_x", r=R, name="language")
    named(language, "language")
    named(dt.attach(model, "pfeiffer", r=R_TASK, name="task"), "task")
    seen = real(model.base_model(**batch()).last_hidden_state)
    torch.testing.assert_close(seen, exact(GOLDEN[name]["task"]), rtol=0, atol=1e-9)
    with language.disabled():
        assert (real(model.base_model(**batch()).last_hidden_state) - seen).abs().max() > 0.1


def test_adapters_forgets_the_inverse_under_the_heads_of_transformers() -> None:
    """Which is why the golden file has its own heads: one call there, forwards."""
    assert GOLDEN["static"] == [False]


@pytest.mark.parametrize("width", [12, 15])
def test_the_inverse_is_one(width: int) -> None:
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24}
    model = t.BertForMaskedLM(t.BertConfig(hidden_size=width, **sizes)).double()
    adapter = moved(dt.attach(model, Invertible(), head=None))
    into, out = sorted((d for d in adapter.deltas.values()), key=lambda d: d.site.role == "lm_head")
    assert out.site.name == "cls.predictions.decoder" and into.site.role == "blocks"
    x = torch.randn(2, 5, width, dtype=torch.float64)
    assert (into.pre(x) - x).abs().max() > 0.1
    torch.testing.assert_close(out.pre(into.pre(x)), x, rtol=0, atol=1e-12)
    a, b = width // 2, width - width // 2
    inner = b // 2 * (b + 1 + a) + a + a // 2 * (a + 1 + b) + b  # F, which reads the longer half, and G
    assert adapter.params() == inner, "one pair of networks, at both places"


def test_the_count() -> None:
    """XLM-R base: the invertible adapter 384 -> 192 -> 384 twice, and 384 wide behind each of twelve blocks."""
    with torch.device("meta"):
        config = t.XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1)
        model = t.XLMRobertaForMaskedLM(config)
    inverted = 2 * (384 * 192 + 192 + 192 * 384 + 384)
    assert dt.attach(model, "mad_x").params() == inverted + 12 * (2 * 768 * 384 + 384 + 768) == 7_387_776


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding(kind: str) -> None:
    check_padding(kind, lambda model: dt.attach(model, "mad_x", r=8))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate(kind: str) -> None:
    check_generate(kind, lambda model: dt.attach(model, "mad_x", r=8))


def test_one_width() -> None:
    """ELECTRA's words are narrower than its blocks: its output embedding cannot invert what the blocks got."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = t.ElectraForMaskedLM(t.ElectraConfig(vocab_size=40, embedding_size=16, **sizes))
    with pytest.raises(ValueError, match="generator_lm_head: invertible: it is 16 wide, and other places are not"):
        dt.attach(model, "mad_x", r=4)
    assert not hasattr(model, "_deltatune")
    with pytest.raises(ValueError, match=r"decoder: invertible: dimension .* reduction = 17; it must be an integer"):
        dt.attach(model_of("bert"), "mad_x", reduction=17)


def story(kind: str) -> tuple[Any, Any]:
    """A masked language model and a classifier on the same backbone."""
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 0, "initializer_range": 0.3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    if kind == "bert":
        masked: Any = t.BertForMaskedLM(t.BertConfig(**sizes))
        classifier: Any = t.BertForSequenceClassification(masked.config)
    else:
        masked = t.XLMRobertaForMaskedLM(t.XLMRobertaConfig(**sizes))
        classifier = t.XLMRobertaForSequenceClassification(masked.config)
    missing, _ = classifier.base_model.load_state_dict(masked.base_model.state_dict(), strict=False)
    assert all("pooler" in key for key in missing)
    return masked.eval(), classifier.eval()


def text(first: int, n_rows: int = 16) -> tuple[Tensor, Tensor]:
    """Rows of a language whose ten words are first, first + 1, ..., each followed by the next; labels by the first."""
    start = torch.arange(n_rows) % 10
    return first + (start[:, None] + torch.arange(6)) % 10, (start < 5).long()


def fit(model: Any, adapter: dt.Adapter, rows: dict[str, Tensor]) -> float:
    """Train on one batch; by what share its loss fell."""
    optimizer = torch.optim.AdamW(adapter.groups(2e-2))
    losses = []
    for _ in range(20):
        loss = model(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0]


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
def test_a_task_goes_to_another_language(kind: str, tmp_path: Path) -> None:
    """Two languages under a masked LM, a task in the first, the second in its place; BERT's classifier has a pooler."""
    masked, classifier = story(kind)
    mask_token = 4
    for name, first in (("a", 10), ("b", 25)):
        torch.manual_seed(1)
        adapter = dt.attach(masked, "mad_x", r=8)
        labels, _ = text(first)
        hidden = torch.arange(6) == 2
        rows = {"input_ids": labels.masked_fill(hidden, mask_token), "labels": labels.masked_fill(~hidden, -100)}
        assert fit(masked, adapter, rows) < 0.8
        adapter.save(tmp_path / name)
        adapter.detach()

    language = dt.load(classifier, tmp_path / "a", name="language")
    task = dt.attach(classifier, "pfeiffer", r=4, name="task")
    assert not any(p.requires_grad for p in language.parameters()) and all(p.requires_grad for p in task.parameters())
    before = {k: v.clone() for k, v in language.state_dict().items()}
    ids, labels = text(10)
    assert fit(classifier, task, {"input_ids": ids, "labels": labels}) < 0.7
    assert all(torch.equal(v, before[k]) for k, v in language.state_dict().items())
    task.save(tmp_path / "task")

    other, _ = text(25)
    own, under_a = logits(classifier, input_ids=ids), logits(classifier, input_ids=other)
    language.restore(tmp_path / "b")
    under_b = logits(classifier, input_ids=other)
    assert (under_b - under_a).abs().max() > 1e-3
    language.restore(tmp_path / "a")
    assert torch.equal(logits(classifier, input_ids=ids), own)

    _, fresh = story(kind)
    dt.load(fresh, tmp_path / "b", name="language")
    dt.load(fresh, tmp_path / "task", name="task")
    assert torch.equal(logits(fresh, input_ids=other), under_b)


def test_a_language_of_a_classifier_is_the_inverse_too_under_a_language_model(tmp_path: Path) -> None:
    """The file names no head: loaded under a masked LM the inverse is there, loaded under a classifier it is not."""
    masked, classifier = story("xlm-roberta")
    moved(dt.attach(classifier, "mad_x", r=8, head=None)).save(tmp_path)
    adapter = dt.load(masked, tmp_path)
    assert {d.site.role for d in adapter.deltas.values() if d.name == "invertible"} == {"blocks", "lm_head"}
    card = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))
    assert not any("lm_head" in site for sites in card["sites"].values() for site in sites)


def test_bad_x_is_the_same_tree() -> None:
    model, twin = model_of("bert"), model_of("bert")
    trees = []
    for each, name in ((model, "mad_x"), (twin, "bad_x")):
        torch.manual_seed(1)
        trees.append(moved(dt.attach(each, name, r=8)).tree)
    assert trees[0] == trees[1]
    near(logits(model, **padded()), logits(twin, **padded()), 1e-6)
