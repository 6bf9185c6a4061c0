"""APT: attention with gated prefixes written a second time on BERT and ViT; padding, soft tokens in front, T5, generation."""

import math
from typing import Any

import pytest
import torch
from soft import D, logits, model_of, moved, near, padded, rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import deltatune as dt

HEADS, N = 4, 5


def apt(model: Any, **hyper: Any) -> dt.Adapter:
    """Away from the start, its gates apart."""
    adapter = moved(dt.attach(model, "apt", head=None, **{"n": N} | hyper))
    with torch.no_grad():
        for delta in adapter.deltas.values():
            delta.gate.mul_(3.0)  # type: ignore[operator]
    return adapter


def attend(delta: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D) from heads' q, k, v (B, T, D): the gates, the prefix and the softmax one head at a time."""
    gate = 1 / (1 + torch.exp(-(first @ delta.gate.T))) * delta.scale  # (B, n)
    heads = []
    for h, (qh, kh, vh) in enumerate(zip(*(t.chunk(HEADS, -1) for t in (q, k, v)), strict=True)):
        kh = torch.cat([gate[:, :, None] * delta.key[h], kh], 1)
        vh = torch.cat([gate[:, :, None] * delta.value[h], vh], 1)
        seen = torch.cat([torch.ones(len(q), N, dtype=torch.bool), mask], 1)[:, None]
        score = (qh @ kh.mT / math.sqrt(D // HEADS)).masked_fill(~seen, -math.inf)
        heads.append(score.softmax(-1) @ vh)
    return torch.cat(heads, -1)


def bert_by_hand(model: Any, deltas: list[Any], given: dict[str, Tensor]) -> Tensor:
    """The last hidden states."""
    mask = given["attention_mask"].bool()
    x = model.bert.embeddings(input_ids=given["input_ids"], position_ids=given["position_ids"])
    for layer, delta in zip(model.bert.encoder.layer, deltas, strict=True):
        own, dense = layer.attention.self, layer.attention.output
        first = torch.stack([row[m][0] for row, m in zip(x, mask, strict=True)])
        a = attend(delta, *(f(x) for f in (own.query, own.key, own.value)), first, mask)
        x = dense.LayerNorm(dense.dense(a) + x)
        x = layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x)
    return x


@pytest.mark.parametrize("how", ["sdpa", "eager", "checkpointed"])
def test_the_equation_on_bert(how: str) -> None:
    """States of rows padded on either side, and the gradient of every tensor."""
    model = model_of("bert")
    if how == "eager":
        model.set_attn_implementation("eager")
    adapter = apt(model)
    deltas: list[Any] = list(adapter.deltas.values())
    assert adapter.params() == 2 * (2 * N * D + N * D + 1)
    given = padded()
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    real = given["attention_mask"].bool()
    want = bert_by_hand(model_of("bert"), deltas, given)[real]
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.0
    got = model(**given, output_hidden_states=True).hidden_states[-1][real]
    near(got, want)
    assert (got - model_of("bert").bert(**given).last_hidden_state[real]).abs().max() > 0.05
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    grads = [torch.autograd.grad((out * weight).sum(), adapter.parameters()) for out in (got, want)]
    for one, other in zip(*grads, strict=True):
        near(one, other, 1e-4)
    assert not model.__dict__["_deltatune"].frame.stash


def test_vit() -> None:
    """The first token is [CLS]: an image has no mask and no ids."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_labels": 3,
    }
    sizes |= {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=HEADS)).eval()
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    attention = model.get_submodule(next(site.name for site in dt.sites(model, "attn") if site.kind == "attention"))
    states: dict[str, Tensor] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        states.update(x=args[0] if args else kwargs["hidden_states"], y=out[0])

    attention.register_forward_hook(look, with_kwargs=True)
    plain = logits(model, pixel_values=pixels)
    x = states["x"]
    adapter = apt(model)
    (delta,) = adapter.deltas.values()
    got = logits(model, pixel_values=pixels)
    projections = {n.rpartition(".")[2]: m for n, m in attention.named_modules() if isinstance(m, nn.Linear)}
    q, k, v = (next(m for n, m in projections.items() if n.startswith(w)) for w in ("q", "k", "v"))
    want = attend(delta, q(x), k(x), v(x), x[:, 0], torch.ones(x.shape[:2], dtype=torch.bool))
    if "o_proj" in projections:
        want = projections["o_proj"](want)
    near(states["y"], want)
    assert (got - plain).abs().max() > 1e-3


def test_soft_tokens_in_front() -> None:
    """The gates read the first real token behind another adapter's prompt, with a mask and without."""
    model = model_of("bert")
    dt.attach(model, "prompt_tuning", n=3, name="prompt", head=None)
    delta: Any = next(iter(apt(model).deltas.values()))
    states = torch.cat([torch.zeros(3, 3, D), model.get_input_embeddings()(rows())], 1)
    first = model.bert.embeddings(inputs_embeds=states)
    found: list[Tensor] = []
    query, stash = model.bert.encoder.layer[0].attention.self.query, delta.frame.stash
    query.register_forward_pre_hook(lambda *_: found.append(stash[delta.place()]))
    for given in ({"input_ids": rows()}, {"input_ids": rows(), "attention_mask": torch.ones_like(rows())}):
        logits(model, **given)
        near(found.pop(), first[:, 3])
    given = padded()
    logits(model, **given)
    (h,) = found
    near(h[0], first[0, 3])
    x = model.bert.embeddings(input_ids=given["input_ids"], position_ids=torch.arange(3, 10)[None])
    near(h[1], x[1, 2])


def test_t5() -> None:
    """Its encoder alone; padded rows as alone, and generation the same with and without cache and beams."""
    model = model_of("t5")
    adapter = apt(model)
    assert {d.site.stack for d in adapter.deltas.values()} == {"encoder"} and len(adapter.deltas) == 2
    given, start = padded("t5"), rows()[:, :4]
    got = logits(model, **given, decoder_input_ids=start)
    for i, mask in enumerate(given["attention_mask"].bool()):
        near(
            got[i : i + 1],
            logits(model, input_ids=given["input_ids"][i : i + 1, mask], decoder_input_ids=start[i : i + 1]),
            5e-5,
        )
    options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    bare = model_of("t5").generate(**given, **options)
    for n_beams in (1, 3):
        found = model.generate(**given, num_beams=n_beams, **options)
        assert torch.equal(found, model.generate(**given, num_beams=n_beams, use_cache=False, **options))
        assert n_beams > 1 or not torch.equal(found, bare)


def test_two_at_one_attention() -> None:
    """Each reads its own gate, and prefixes are no order."""

    def second(model: Any) -> dt.Adapter:
        torch.manual_seed(1)
        return moved(apt(model, name="two"))

    model = model_of("bert")
    one = apt(model, name="one")
    alone = logits(model, input_ids=rows())
    two = second(model)
    both = logits(model, input_ids=rows())
    assert (both - alone).abs().max() > 1e-3
    with two.disabled():
        near(logits(model, input_ids=rows()), alone)
    one.disable()
    other = model_of("bert")
    second(other)
    near(logits(model, input_ids=rows()), logits(other, input_ids=rows()))


def test_what_it_refuses() -> None:
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(ValueError, match="apt fits none of the 1 sites that 'attn' selects"):
        dt.attach(model, "apt", head=None)
    bert = model_of("bert")
    apt(bert)
    with pytest.raises(
        ValueError,
        match=r"bert.encoder.layer.0.attention.self: apt looks for the first real token under a \(B, T\) mask",
    ):
        bert(rows(), attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))
