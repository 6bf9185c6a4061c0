"""FISH masks against the reference code's, and what a mask over all layers promises."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import deltatune as dt
from deltatune.core.calibrate import Gradients, collect
from deltatune.methods.sparse import deltas_of, opened

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_fish_mask.py"))
classifier, collate, examples = (MAKE[k] for k in ("classifier", "collate", "examples"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SIZES = GOLDEN["sizes"]
KEPT = SIZES["kept"] / (SIZES["all"] - SIZES["classifier"])


def batches(size: int = 4) -> Iterator[dict[str, Any]]:
    """The golden's rows; a row is an example, however many are in a batch."""
    rows = examples()
    for i in range(0, len(rows), size):
        yield {k: v for k, v in collate(rows[i : i + size]).items() if k != "idx"}


def attached(method: str = "fish_mask", **hyper: Any) -> tuple[nn.Module, dt.Adapter]:
    """On all layers but the classifier, which is the head's."""
    model = classifier()
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm))]
    return model, dt.attach(model, method, where=[n for n in names if n != "classifier"], **hyper)


def masks_of(adapter: dt.Adapter) -> dict[str, str]:
    """The golden's form of our indices."""
    found = {}
    for (_, site), d in adapter.deltas.items():
        if not isinstance(d, dt.FishMask | dt.SAM):
            continue
        mask = torch.zeros(d.size, dtype=torch.bool)
        mask[d.index.long()] = True
        found[f"{site}.weight"] = MAKE["BASE"]["bits"](mask[: d.n_weight])
        if d.size > d.n_weight:
            found[f"{site}.bias"] = MAKE["BASE"]["bits"](mask[d.n_weight :])
    return found


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def looked(adapter: dt.Adapter, rows: Any, of: Any = loss) -> dict[str, Tensor]:
    """The scores that the mask is chosen by."""
    schedule: Any = adapter.schedule
    with opened(deltas_of(schedule)) as values:
        found: dict[str, Tensor] = schedule.look(values, rows, of)
    return found


@pytest.mark.parametrize("size", [1, 4])
def test_the_mask_is_the_references(size: int) -> None:
    """Bit for bit, embeddings, norms and pooler included, with the model in training mode before and after."""
    model, adapter = attached(keep=KEPT)
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "deltas" not in n}
    state = torch.get_rng_state()
    adapter.calibrate(batches(size))
    want = {n: m for n, m in GOLDEN["masks"]["label"].items() if "classifier" not in n}
    assert masks_of(adapter) == want
    assert adapter.params() == SIZES["kept"] == sum(m.count("1") for m in want.values())
    assert all(m.training for m in model.modules()) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
    assert not any(d.values.any() for d in adapter.deltas.values() if isinstance(d, dt.FishMask))


def test_fisher_is_the_references() -> None:
    """Its sums are our means, in fp32."""
    found = looked(attached()[1], batches())
    n_rows = len(examples())
    query = found["0|bert.encoder.layer.0.attention.self.query"]
    norm = found["0|bert.embeddings.LayerNorm"]
    shown = GOLDEN["fisher"]["label"]
    for got, name in (
        (query[:64], "bert.encoder.layer.0.attention.self.query.weight"),
        (norm[8:], "bert.embeddings.LayerNorm.bias"),
    ):
        want = torch.tensor(shown[name]).flatten() / n_rows
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-12)


def test_drawn_labels_tend_to_the_references_expectation() -> None:
    """The mean over many draws: within a few per cent of the reference's exact sum over labels, unlike the labels as given."""
    site, n_rows = "bert.encoder.layer.0.attention.self.query", len(examples())
    adapter = dt.attach(classifier(), "fish_mask", where=[site], labels="drawn", n_samples=360)
    got, name = looked(adapter, [b for _ in range(60) for b in batches()])[f"0|{site}"][:64], f"{site}.weight"
    exact, given = (torch.tensor(GOLDEN["fisher"][k][name]).flatten() / n_rows for k in ("expect", "label"))
    off = float((got - exact).norm() / exact.norm())
    assert off < 0.1 < float((given - exact).norm() / exact.norm())


def test_drawn_labels_of_a_decoder_are_its_next_tokens() -> None:
    """Those of the labels that count, one place further; where an answer is certain the draw is it."""
    model = GPT2LMHeadModel(
        GPT2Config(bos_token_id=0, eos_token_id=0, vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(200.0)
    adapter = dt.attach(model, "fish_mask", where="q", labels="drawn", keep=0.1)
    ids = torch.arange(6)[None]
    labels = ids.clone()
    labels[:, :2] = -100
    seen = []

    def kept(m: nn.Module, batch: Any) -> Tensor:
        seen.append(batch["labels"])
        return loss(m, batch)

    adapter.calibrate([{"input_ids": ids, "labels": labels}], kept)
    with torch.no_grad():
        says = model(input_ids=ids).logits.argmax(-1)
    assert torch.equal(seen[0][:, 2:], says[:, 1:-1]) and (seen[0][:, :2] == -100).all()
    config = T5Config(vocab_size=12, d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=8, decoder_start_token_id=0)
    two = T5ForConditionalGeneration(config)
    other = dt.attach(two, "fish_mask", where="q", labels="drawn", keep=0.1)
    with pytest.raises(ValueError, match='labels="drawn" needs labels that are classes, one for each answer; T5'):
        other.calibrate([{"input_ids": ids, "labels": labels[:, :3]}])


def test_a_value_has_no_other_label_to_draw() -> None:
    """Not even where it is a whole number: one logit is always the answer."""
    model = BertForSequenceClassification(BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1,
    ))  # fmt: skip
    adapter = dt.attach(model, "fish_mask", where="q", labels="drawn")
    with pytest.raises(ValueError, match="needs labels that are classes"):
        adapter.calibrate([{"input_ids": torch.arange(6)[None], "labels": torch.tensor([3])}])


def test_examples_are_counted_and_come_one_by_one() -> None:
    """The mask of the first three rows, whatever the batches; and that of a batch's gradient would be another."""
    first = [{k: v[:3] for k, v in b.items()} for b in batches(6)]
    one, two = attached(keep=0.05, n_samples=3)[1], attached(keep=0.05)[1]
    one.calibrate(batches(2))
    two.calibrate(first)
    assert masks_of(one) == masks_of(two)
    model, three = attached(keep=0.05)
    schedule: Any = three.schedule
    with opened(deltas_of(schedule)) as values:
        found = collect(model, first, loss, {"": Gradients(values)})[""]
    for name, index in schedule.choose(found).items():
        deltas_of(schedule)[name].take(index)
    assert masks_of(three) != masks_of(two)


def test_a_mask_that_trained_stays(tmp_path: Path) -> None:
    """A file is trained on under its own mask; looking at data again would throw its values away."""
    _, adapter = attached(keep=KEPT)
    with pytest.raises(ValueError, match=r"Fisher looks at data first; call adapter\.calibrate"):
        adapter.schedule.begin(torch.optim.SGD(adapter.groups(0.1)), 2)
    adapter.calibrate(batches())
    for p in adapter.parameters():
        with torch.no_grad():
            p.add_(0.1)
    adapter.save(tmp_path)
    again = dt.load(classifier(), tmp_path, trainable=True)
    assert masks_of(again) == masks_of(adapter) and not again.schedule.needs_data
    dt.Schedules([again]).calibrate(list, loss)
    again.schedule.begin(torch.optim.SGD(again.groups(0.1)), 2)
    with pytest.raises(ValueError, match="its values have moved already; a mask stays as it is"):
        again.calibrate(batches())


def test_an_error_leaves_all_as_it_was() -> None:
    _, adapter = attached(keep=KEPT)
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    with pytest.raises(ValueError, match="no batch was given"):
        adapter.calibrate([])
    with pytest.raises(RuntimeError, match="on purpose"):
        adapter.calibrate(batches(), lambda m, b: (_ for _ in ()).throw(RuntimeError("on purpose")))
    after = adapter.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert all(p.requires_grad for p in adapter.parameters())


BAD = [({"n_samples": 0}, "n_samples = 0"), ({"keep": 0.0}, "keep = 0.0"), ({"labels": "x"}, "labels")]


@pytest.mark.parametrize(("hyper", "said"), BAD)
def test_bad_hyperparameters(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attached(**hyper)
