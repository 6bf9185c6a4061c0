"""What a method can know of a row: its tokens' places, which of them are given and not asked for, and what it kept."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import deltatune as dt
from deltatune.core.inits import normal
from deltatune.core.method import METHODS, Method, param
from deltatune.core.runtime import Call
from deltatune.core.site import all_sites

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}


class Placed(Method, name="placed_toy"):
    """E'[i] = E[i] + p[i]"""

    where = "input"
    rate: float = 5.0  # multiple of the learning rate
    live = ("strength",)
    strength: float = 1.0  # of the addition
    p: Tensor = param("20 d_in", normal(1.0), lr="rate")

    def embed(self, batch: Tensor, places: Tensor) -> Tensor:
        return batch + self.strength * self.p[places]


class Mean(Method, name="mean_toy"):
    """One soft token, the mean of the tokens that are given."""

    where = "input"
    reads_call = True
    w: Tensor = param("d_in", normal(1.0))

    def tokens(self, batch: Tensor) -> Tensor:
        if self.call.n_past and self.site.stack != "encoder":
            return batch[:, :1]
        given = self.call.given(batch.shape[1], self.site, batch.device)[..., None]
        return ((batch * given).sum(1, keepdim=True) / given.sum(1, keepdim=True)) * self.w


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    yield
    del METHODS["placed_toy"], METHODS["mean_toy"]


def llama() -> Any:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, eos_token_id=39)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8.0)
    return model


IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
MASK = (IDS != 0).long()


def test_places_count_real_tokens_on_both_sides_and_through_the_cache() -> None:
    model = llama()
    adapter = dt.attach(model, "placed_toy")
    alone = model(IDS[:1, 2:]).logits
    at = (MASK.cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(model(IDS, attention_mask=MASK, position_ids=at).logits[:1, 2:], alone)
    right, kept = IDS.flip(1), MASK.flip(1)
    torch.testing.assert_close(model(right, attention_mask=kept).logits[:1, :4], model(right[:1, :4]).logits)
    given = model.get_input_embeddings()(IDS[:1, 2:])
    torch.testing.assert_close(model(inputs_embeds=given).logits, alone)
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    for n_beams in (1, 2):
        said = model.generate(IDS, use_cache=False, num_beams=n_beams, **options)
        assert torch.equal(model.generate(IDS, num_beams=n_beams, **options), said)
        with adapter.disabled():
            assert not torch.equal(model.generate(IDS, num_beams=n_beams, **options), said)
    dt.attach(model, "prompt_tuning", n=3, name="prompt")
    said = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, **options), said)


def test_roberta_keeps_its_positions_under_padding_on_the_left() -> None:
    torch.manual_seed(0)
    model = t.RobertaModel(t.RobertaConfig(**{**SIZES, "pad_token_id": 1}), add_pooling_layer=False).eval()
    ids = torch.tensor([[1, 1, 5, 6, 7], [1, 9, 8, 7, 6]])
    mask = (ids != 1).long()
    want = model(ids, attention_mask=mask).last_hidden_state
    adapter = dt.attach(model, "placed_toy", strength=0.0)
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, want)
    adapter.set(strength=1.0)
    assert adapter.tree.to_dict()["config"]["strength"] == 1.0
    assert (model(ids, attention_mask=mask).last_hidden_state - want).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"can change on a standing adapter.*'strenght'.*'strength'"):
        adapter.set(strenght=2.0)
    with pytest.raises(ValueError, match="rate"):
        adapter.set(rate=2.0)
    with pytest.raises(ValueError, match="strength must be"):
        adapter.set(strength="much")


def test_a_tensor_with_a_rate_of_its_own() -> None:
    adapter = dt.attach(llama(), "placed_toy")
    assert [g["lr"] for g in adapter.groups(1e-3)] == [pytest.approx(5e-3)]
    with pytest.raises(ValueError, match="parameter groups of its own"):
        adapter.schedule.begin(torch.optim.SGD(adapter.parameters(), 1e-3), 1)
    adapter.schedule.begin(torch.optim.SGD(adapter.groups(1e-3)), 1)


def test_what_is_given_is_no_answer() -> None:
    """On a causal stack the labels mark the answers, and `generate` its prompt; the prefill's prompt stays."""
    model = llama()
    dt.attach(model, "mean_toy")
    labels = IDS.masked_fill(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]).bool(), -100)
    other = torch.where(labels == -100, IDS, (IDS + 9) % 40)
    one, two = (model(i, attention_mask=MASK, labels=labels).logits for i in (IDS, other))
    torch.testing.assert_close(one[0, 2:4], two[0, 2:4])
    torch.testing.assert_close(one[1, :3], two[1, :3])
    assert (model(IDS, attention_mask=MASK).logits[1, :3] - one[1, :3]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="row 1 has no token that is given"):
        model(IDS, attention_mask=MASK, labels=torch.where(torch.tensor([[True], [False]]), labels, IDS))
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    for n_beams in (1, 3):
        said = model.generate(IDS, use_cache=False, num_beams=n_beams, **options)
        assert torch.equal(model.generate(IDS, num_beams=n_beams, **options), said)
    with torch.no_grad():  # the training's forward over prompt and answer says what generation says
        full = torch.cat([IDS, said[:, 6:]], 1)
        asked = full.masked_fill(torch.arange(full.shape[1]) < 6, -100)
        mask = torch.cat([MASK, torch.ones_like(said[:, 6:])], 1)
        at = (mask.cumsum(1) - 1).clamp_min(0)
        greedy = model(full, attention_mask=mask, labels=asked, position_ids=at).logits[:, 5:-1].argmax(-1)
        assert torch.equal(greedy, model.generate(IDS, **options)[:, 6:]) or not torch.equal(
            said, model.generate(IDS, **options)
        )


def test_an_encoder_sees_whole_rows_whatever_the_labels() -> None:
    torch.manual_seed(0)
    model = t.BertForMaskedLM(t.BertConfig(**SIZES)).eval()
    dt.attach(model, "mean_toy")
    out = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(model(IDS, attention_mask=MASK, labels=IDS).logits, out)


def test_an_encoder_that_generate_runs_by_itself_has_its_call() -> None:
    """A block of an encoder may read the call though the model's own forward is not running."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    for method in ("pasta", "tiny_attention"):
        adapter = dt.attach(model, method)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p))
        options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False}
        said = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, use_cache=False, **options), said)
        encoded = model.get_encoder()(IDS, attention_mask=MASK)
        start = torch.zeros(2, 1, dtype=torch.long)
        a = model(encoder_outputs=encoded, attention_mask=MASK, decoder_input_ids=start).logits
        torch.testing.assert_close(a, model(IDS, attention_mask=MASK, decoder_input_ids=start).logits)
        adapter.detach()
    assert not [m for m in model.modules() if "_deltatune_encoder" in vars(m)]


def test_without_a_cache_nothing_is_kept() -> None:
    a, b = torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3)
    site = next(s for s in all_sites(llama()) if s.kind == "block")
    assert Call().keep(site, "x", a, b) == (a, b)
    assert (site.n_layers, site.is_causal) == (2, True)
    cache = t.DynamicCache()
    call = Call(cache=cache)
    call.keep(site, "x", a, b)
    keys, values = call.keep(site, "x", a + 1, b + 1)
    assert keys.tolist() == torch.cat([a, a + 1], 2).tolist() and values.tolist() == torch.cat([b, b + 1], 2).tolist()
    assert len(cache.layers) == 3 and cache.get_seq_length() == 0


def test_a_text_tower_whose_mask_is_made_above_its_attention_is_causal() -> None:
    """CLIP's attention says that it is not causal, and gets a causal mask."""
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {k: v for k, v in text.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision))
    found = {s.stack: s.is_causal for s in all_sites(model) if s.kind in ("block", "input")}
    assert found == {"text": True, "vision": False}


@pytest.mark.parametrize("method", ["prompt_tuning", "placed_toy"])
def test_roberta_counts_real_tokens_behind_soft_ones_too(method: str) -> None:
    torch.manual_seed(0)
    model = t.RobertaModel(t.RobertaConfig(**{**SIZES, "pad_token_id": 1}), add_pooling_layer=False).eval()
    dt.attach(model, method)
    left, right = torch.tensor([[1, 1, 5, 6, 7]]), torch.tensor([[5, 6, 7, 1, 1]])
    one = model(left, attention_mask=(left != 1).long()).last_hidden_state[:, 2:]
    other = model(right, attention_mask=(right != 1).long()).last_hidden_state[:, :3]
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, model(left[:, 2:]).last_hidden_state)


def test_a_base_trained_in_place_is_known_under_each_name_of_a_tied_tensor(tmp_path: Path) -> None:
    """T5's token embeddings have three names; what is trained is saved with the values from before as the base's mark."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    fresh = copy.deepcopy(model)
    adapter = dt.attach(model, "full")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    adapter.save(tmp_path)
    dt.load(fresh, tmp_path)
    theirs = dict(fresh.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in model.named_parameters())
