"""WARP against its reference on one RoBERTa; the order of the words written a second time; every masked language model's head."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import soft
import torch
import transformers as t
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_warp.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
COUNTS, CLASSES, MASK, WORDS = MAKE["COUNTS"], MAKE["CLASSES"], MAKE["MASK"], MAKE["WORDS"]
N = sum(COUNTS.values())
CLS, SEP = 1, 2


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def named(adapter: dt.Adapter) -> dict[str, nn.Parameter]:
    return {name.rpartition(".")[2]: p for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("kind", ["pairs", "singles"])
def test_as_the_reference_computes(kind: str) -> None:
    """The model's own loss at the mask is the reference's over the classes; so are logits and all gradients."""
    golden, model = GOLDEN[kind], MAKE["backbone"]().double()
    found = named(dt.attach(model, "warp", **COUNTS, at=MASK, classes=CLASSES))
    assert found.keys() == golden["grads"].keys()
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(MAKE["fill"](key, p.shape))
    rows = MAKE["batch"](kind)
    out = model(**rows)
    at_mask = out.logits[rows["labels"] != -100]
    torch.testing.assert_close(at_mask[:, list(CLASSES)], exact(golden["logits"]), rtol=0, atol=1e-9)
    others = at_mask.softmax(-1).index_fill(-1, torch.tensor(CLASSES), 0.0)
    assert out.logits.shape[-1] == MAKE["VOCAB"] and float(others.detach().max()) < 1e-80
    assert float(out.loss.detach()) == pytest.approx(golden["loss"], abs=1e-9)
    out.loss.backward()
    for key, want in golden["grads"].items():
        assert exact(want).any(1 if exact(want).ndim > 1 else 0).all()
        torch.testing.assert_close(found[key].grad, exact(want), rtol=0, atol=1e-9)


def test_starts_as_the_reference() -> None:
    """From words and from the classes' words; from the table's spread; as a linear layer."""
    found = named(dt.attach(MAKE["backbone"](), "warp", **COUNTS, at=MASK, words=WORDS, classes=CLASSES))
    for key, p in found.items():
        assert torch.equal(p.detach().double(), exact(GOLDEN["start"][key]).float().double()), key
    one = named(dt.attach(MAKE["backbone"](), "warp", words=(MASK,)))["prompt"].detach()
    assert torch.equal(one, exact(GOLDEN["start"]["prompt"])[:1].float().expand(20, -1))
    wide = named(dt.attach(MAKE["backbone"](), "warp", front=2000, classes=CLASSES, start="random"))
    start = wide["prompt"].detach()
    assert float(start.mean()) == pytest.approx(GOLDEN["start"]["mean"], abs=5e-3)
    assert float(start.std()) == pytest.approx(GOLDEN["start"]["std"], rel=0.03)
    assert 0.1 < float(wide["v"].detach().abs().max()) <= 0.25 >= float(wide["b"].detach().abs().max())


def bert(**options: Any) -> Any:
    """A BERT with segments and a pooler."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = t.BertModel(t.BertConfig(**sizes | {"num_attention_heads": 4, "max_position_embeddings": 40} | options))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    return model.eval()


PAIRS = [[CLS, 5, 6, 7, SEP, 8, 9, SEP], [CLS, 10, SEP, 11, 12, SEP]]


def padded(left: bool) -> dict[str, Tensor]:
    """The pairs with masks, positions and segments, padded by two tokens and more."""
    given: dict[str, list[list[int]]] = {}
    for ids in PAIRS:
        cut = ids.index(SEP) + 1
        parts = {
            "input_ids": ids,
            "token_type_ids": [0] * cut + [1] * (len(ids) - cut),
            "attention_mask": [1] * len(ids),
        }
        for key, row in (parts | {"position_ids": list(range(len(ids)))}).items():
            pad = [0] * (10 - len(ids))
            given.setdefault(key, []).append(pad + row if left else row + pad)
    return {key: torch.tensor(rows) for key, rows in given.items()}


@pytest.mark.parametrize("left", [False, True])
def test_the_order_a_second_time(left: bool) -> None:
    """Embeddings in order, the right neighbour's segment, positions one behind the other: each row by hand, without padding."""
    model = bert()
    adapter = soft.moved(dt.attach(model, "warp", front=2, before=1, behind=3, end=2, at=SEP, head=None))
    given = padded(left)
    with torch.no_grad():
        got = model(**given, output_hidden_states=True)
    a, b, c, d = named(adapter)["prompt"].detach().split([2, 1, 3, 2])
    for i, ids in enumerate(PAIRS):
        cut = ids.index(SEP)
        words = model.embeddings.word_embeddings.weight.detach()[ids]
        first, one, sep, two, last = words.split([1, cut - 1, 1, len(ids) - cut - 2, 1])
        whole = torch.cat([first, a, one, b, sep, c, two, d, last])
        own = [0, *range(3, 2 + cut), cut + 3, *range(cut + 7, cut + 7 + len(two)), len(whole) - 1]
        types = torch.tensor([[0] * (cut + 4) + [1] * (len(whole) - cut - 4)])
        with adapter.disabled(), torch.no_grad():
            alone = model(inputs_embeds=whole[None], token_type_ids=types, output_hidden_states=True)
        real = given["attention_mask"][i].bool()
        for mine, want in zip(got.hidden_states, alone.hidden_states, strict=True):
            soft.near(mine[i, real], want[0, own])
        soft.near(got.last_hidden_state[i, real], alone.last_hidden_state[0, own])
        if not left:
            soft.near(got.pooler_output[i : i + 1], alone.pooler_output)


@pytest.mark.parametrize("left", [False, True])
def test_behind_the_last_token(left: bool) -> None:
    """There a soft token has padding at its right, and the position behind the token at its left."""
    model, rows = bert(), [[CLS, 5, 6, SEP], [CLS, 7, SEP]]
    soft.moved(dt.attach(model, "warp", front=1, before=1, behind=2, end=1, at=SEP, head=None))
    given = padded(left)
    for i, ids in enumerate(rows):
        at = slice(10 - len(ids), 10) if left else slice(0, len(ids))
        for key, row in {"input_ids": ids, "position_ids": list(range(len(ids)))}.items():
            given[key][i] = 0
            given[key][i, at] = torch.tensor(row)
        given["attention_mask"][i] = (given["input_ids"][i] != 0).long()
    given["token_type_ids"].zero_()
    with torch.no_grad():
        got = model(**given).last_hidden_state
        for i, ids in enumerate(rows):
            soft.near(got[i, given["attention_mask"][i].bool()], model(torch.tensor([ids])).last_hidden_state[0])


def inserted(model: nn.Module) -> dt.Adapter:
    return dt.attach(model, "warp", front=2, before=1, behind=1, end=2, head=None)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding(kind: str) -> None:
    soft.check_padding(kind, inserted)


@pytest.mark.parametrize("given", ["nothing", "positions"])
def test_roberta_counts_real_tokens(given: str) -> None:
    """Padded on the left or the right, with or without positions, as its own forward does without soft tokens."""
    model = MAKE["backbone"]()
    soft.moved(dt.attach(model, "warp", **COUNTS, at=MASK))
    rows = MAKE["batch"]("pairs")
    n_pads = 2
    left = {k: nn.functional.pad(v, (n_pads, 0), value=1 if k == "input_ids" else 0) for k, v in rows.items()}
    if given == "positions":
        left["position_ids"] = (left["attention_mask"].cumsum(1) + 1).clamp_min(2)
    del rows["labels"], left["labels"]
    real = rows["attention_mask"].bool()
    soft.near(soft.logits(model, **left)[:, n_pads:][real], soft.logits(model, **rows)[real])


def test_a_decoder_runs_whole_rows() -> None:
    """Without a cache, beams too, as one forward after the other; with one the earlier tokens would have to move."""
    model = soft.model_of("llama")
    soft.moved(inserted(model))
    given = {k: v[:2] for k, v in soft.padded().items()}
    options: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    ids = given["input_ids"][1:2, given["attention_mask"][1].bool()]
    step = ids
    for _ in range(4):
        step = torch.cat([step, soft.logits(model, input_ids=step)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(**given, **options)[1, -4:], step[0, -4:])
    beams = model.generate(**given, **options, num_beams=3)
    assert torch.equal(beams[1, -4:], model.generate(input_ids=ids, **options, num_beams=3)[0, -4:])
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**given, **options | {"use_cache": True})


def test_an_encoder_keeps_its_length() -> None:
    """The decoder attends to the user's own tokens; with the cache and without it says the same."""
    soft.check_generate("t5", inserted)
    model = soft.model_of("t5")
    inserted(model)
    given = soft.padded("t5")
    assert model.get_encoder()(**given).last_hidden_state.shape[1] == soft.LENGTH
    dt.attach(model, "prompt_tuning", n=2, name="front", head=None)
    with pytest.raises(ValueError, match="the decoder sees one kind"):
        model(**given, decoder_input_ids=soft.rows()[:, :2])


def test_beside_prompts_in_front() -> None:
    """Two adapters and one tree are the same row: the prompt, then the words with those among them."""
    model, ids = bert(), torch.tensor(PAIRS[:1])
    two = dt.attach(model, "warp", front=1, before=0, behind=0, end=1, head=None)
    one = dt.attach(model, "prompt_tuning", n=2, name="front", head=None)
    with torch.no_grad():
        got = model(ids).last_hidden_state
    soft_words, front = named(two)["prompt"].detach(), named(one)["prompt"].detach()
    words = model.embeddings.word_embeddings.weight.detach()[ids[0]]
    whole = torch.cat([front, words[:1], soft_words[:1], words[1:-1], soft_words[1:], words[-1:]])
    with one.disabled(), two.disabled(), torch.no_grad():
        want = model(inputs_embeds=whole[None]).last_hidden_state
    soft.near(got[0], want[0, [2, *range(4, 10), 11]])


HEADS: dict[str, Any] = {
    "bert": lambda s: t.BertForMaskedLM(t.BertConfig(**s)),
    "roberta": lambda s: t.RobertaForMaskedLM(t.RobertaConfig(**s)),
    "distilbert": lambda s: t.DistilBertForMaskedLM(
        t.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    ),
    "albert": lambda s: t.AlbertForMaskedLM(t.AlbertConfig(**s, embedding_size=8)),
    "electra": lambda s: t.ElectraForMaskedLM(t.ElectraConfig(**s, embedding_size=8)),
    "deberta": lambda s: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**s)),
    "mpnet": lambda s: t.MPNetForMaskedLM(t.MPNetConfig(**s)),
    "modernbert": lambda s: t.ModernBertForMaskedLM(t.ModernBertConfig(**s, pad_token_id=0)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_of_a_masked_language_model(kind: str) -> None:
    """The output layer is found, its transform left alone, and the model's loss is that of softmax(V h + b)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = HEADS[kind](sizes | {"num_attention_heads": 2}).eval()
    adapter = soft.moved(dt.attach(model, "warp", at=3, words=(3,), classes=(7, 9)))
    (site,) = (d.site for d in adapter.deltas.values() if isinstance(d, dt.Method) and d.name == "verbaliser")
    assert site.d_out == 40 and adapter.n_head == 0
    read: list[Tensor] = []
    model.get_submodule(site.module).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    ids = torch.tensor([[1, 5, 3, 6, 2], [1, 3, 8, 9, 2]])
    labels = torch.where(ids == 3, torch.tensor([[7], [9]]), -100)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    tensors = named(adapter)
    states = read[0].reshape(-1, read[0].shape[-1])
    states = states[(ids == 3).flatten()] if len(states) == ids.numel() else states
    want = nn.functional.cross_entropy(states @ tensors["v"].T + tensors["b"], torch.tensor([0, 1]))
    soft.near(loss, want)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tensors.values())


def test_without_classes_the_task_head_tells() -> None:
    """The sentence encoder's way: no output layer over words, a head over [CLS]."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = t.BertForSequenceClassification(t.BertConfig(**sizes, num_attention_heads=2))
    adapter = dt.attach(model, "warp")
    assert adapter.params() == 20 * 16 and adapter.n_head == 2 * 16 + 2
    given = padded(left=False)
    model(**given, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with pytest.raises(ValueError, match="lm_head"):
        dt.attach(model, "warp", name="two", classes=(7, 9))


def test_what_it_refuses() -> None:
    def refused(says: str, **hyper: Any) -> None:
        with pytest.raises(ValueError, match=says):
            dt.attach(MAKE["backbone"](), "warp", **hyper)

    refused("roberta: inserted_prompt: front = before = behind = end = 0", front=0, before=0, behind=0, end=0)
    refused("behind = -1", behind=-1)
    refused("3 words to start 20 soft tokens", words=(1, 2, 3))
    refused("token 48 is not one of the table's 48", words=(48,))
    refused("lm_head.decoder: verbaliser: token 50 is not one of the table's 48", classes=(3, 50))
    refused("two tokens or more, each once", classes=(3, 3))
    model = MAKE["backbone"]()
    dt.attach(model, "warp", at=MASK)
    rows = MAKE["batch"]("pairs")
    rows["input_ids"][1, rows["input_ids"][1] == MASK] = 9
    with pytest.raises(ValueError, match="roberta: row 1 has no token 4 to stand around"):
        model(**rows)
    embedded = model.get_input_embeddings()(rows["input_ids"])
    with pytest.raises(ValueError, match="looks for token 4, and the call has no input_ids"):
        model(inputs_embeds=embedded, attention_mask=rows["attention_mask"])
    with pytest.raises(ValueError, match="20 soft tokens and 37 tokens exceed the 38 positions"):
        model(torch.full((1, 37), MASK))
    images = t.ViTModel(t.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
    with pytest.raises(ValueError, match="not made of words"):
        dt.attach(images, "warp", head=None)
