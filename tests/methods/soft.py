"""Small backbones and inputs for soft prompts, and what holds for each of them: padding, and generation with the cache."""

from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

import deltatune as dt

D, VOCAB, LENGTH = 32, 64, 7


def model_of(kind: str) -> Any:
    """A backbone of two layers and width 32, the same weights at every call."""
    torch.manual_seed(0)
    if kind == "t5":
        model: Any = t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip
    else:
        sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 48, "pad_token_id": 0}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        if kind == "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))
        else:
            assert kind == "bert", kind
            model = t.BertForMaskedLM(t.BertConfig(**sizes))
    with torch.no_grad():  # transformers' N(0, 0.02) makes every output alike
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.eval()


def rows(n_rows: int = 3) -> Tensor:
    """(B, T) ids without padding."""
    return torch.randint(3, VOCAB, (n_rows, LENGTH), generator=torch.Generator().manual_seed(3))


def padded(kind: str = "") -> dict[str, Tensor]:
    """Three rows, one of them padded on the left and one on the right.

    T5's are padded on the right: its positions are distances, and padding on the left stands between prompt and text.
    """
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, slice(-2, None) if kind == "t5" else slice(2)] = 0
    mask[2, -3:] = 0
    return {"input_ids": rows() * mask, "attention_mask": mask}


def moved(adapter: dt.Adapter) -> dt.Adapter:
    """Away from the start, as training would bring it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return adapter


def logits(model: nn.Module, **given: Any) -> Tensor:
    """Of one forward, without gradients."""
    with torch.no_grad():
        out = model(**given).logits
    assert isinstance(out, Tensor)
    return out


def near(a: Tensor, b: Tensor, limit: float = 1e-5) -> None:
    """Raise where the relative distance of two tensors is above `limit`."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert b.norm() > 0
    assert (a - b).norm() <= limit * b.norm(), f"{float((a - b).norm() / b.norm()):.1e} apart"


def check_padding(kind: str, attach: Any, **own: Tensor) -> None:
    """Padded on the left or the right, every row's real tokens give what the row gives alone."""
    model = model_of(kind)
    moved(attach(model))
    given = padded(kind)
    extra: dict[str, Tensor] = {}
    if kind == "t5":
        extra = {"decoder_input_ids": rows()[:, :4]}
    else:
        extra = {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    got = logits(model, **given, **extra, **own)
    for i, mask in enumerate(given["attention_mask"].bool()):
        mine = {k: v[i : i + 1] for k, v in own.items()}
        if kind == "t5":
            mine["decoder_input_ids"] = extra["decoder_input_ids"][i : i + 1]
        alone = logits(model, input_ids=given["input_ids"][i : i + 1, mask], **mine)
        near(got[i : i + 1] if kind == "t5" else got[i : i + 1, mask], alone, 5e-5)


def check_generate(kind: str, attach: Any, **own: Tensor) -> None:
    """Greedy and with three beams, with the cache and without, each prompt alone: the same tokens, and not the base's."""
    model = model_of(kind)
    options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given = {k: v[:2] for k, v in padded(kind).items()}
    own = {k: v[:2] for k, v in own.items()}
    bare = model.generate(**given, **options)
    moved(attach(model))
    for n_beams in (1, 3):
        found = model.generate(**given, num_beams=n_beams, **options, **own)
        again = model.generate(**given, num_beams=n_beams, use_cache=False, **options, **own)
        assert torch.equal(found, again)
        assert not torch.equal(found, bare)
        mine = {k: v[1:2] for k, v in own.items()}
        ids = given["input_ids"][1:2, given["attention_mask"][1].bool()]
        alone = model.generate(input_ids=ids, num_beams=n_beams, **options, **mine)
        assert torch.equal(alone[0, -6:], found[1, -6:])
