"""LoReFT against its reference's own classes: states, gradients, a course of AdamW, the rule of positions; in whole models."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_loreft.py"))
fill, loss_of = MAKE["fill"], MAKE["loss_of"]
D, R, N_ROWS, N_STEPS, LR = (MAKE[k] for k in ("D", "R", "N_ROWS", "N_STEPS", "LR"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class Block(nn.Module):
    """A block that passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(D, 12), nn.Linear(12, D)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.up_proj(x))


class Blocks(nn.Module):
    """Two of them, of which the second stands alone in what is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def attached() -> tuple[nn.Module, dict[str, Tensor]]:
    """LoReFT behind the second block with the golden's values, every position edited, and its tensors by name."""
    model = Blocks().double()
    adapter = dt.attach(model, "loreft", layers=1, r=R, first=N_ROWS // 2, last=N_ROWS // 2, head=None)
    (delta,) = adapter.deltas.values()
    found = {key: getattr(delta, key) for key in ("reflectors", "w", "b")}
    with torch.no_grad():
        found["reflectors"].copy_(fill("reflectors", (D, R)).tril(-1))
        found["w"].copy_(fill("w", (R, D)))
        found["b"].copy_(fill("b", (R,)))
    return model, found


def test_as_the_reference_computes() -> None:
    model, found = attached()
    h = fill("h", (N_ROWS, D)).requires_grad_()
    states = model(h[None])[0]
    torch.testing.assert_close(states, exact(GOLDEN["states"]), rtol=0, atol=1e-12)
    assert (states - h).abs().max() > 0.1
    grads = torch.autograd.grad(loss_of(states), [*found.values(), h])
    for key, grad in zip((*found, "h"), grads, strict=True):
        want = exact(GOLDEN["grads"][key])
        if key == "reflectors":  # theirs holds 1 on the diagonal, as a number without a gradient
            want = want.tril(-1)
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-11)


def test_as_the_reference_trains() -> None:
    model, found = attached()
    optimizer = torch.optim.AdamW(found.values(), lr=LR, weight_decay=0.0)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        loss_of(model(fill("h", (1, N_ROWS, D)))[0]).backward()
        optimizer.step()
    for key, p in found.items():
        want = exact(GOLDEN["course"][key])
        want = want.tril(-1) if key == "reflectors" else want
        assert (p - (fill(key, p.shape).tril(-1) if key == "reflectors" else fill(key, p.shape))).abs().max() > 0.01
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-9)


def test_weight_decay_leaves_a_basis() -> None:
    """One step of it sets the reference's R to 0: its diagonal of ones is decayed too, and read as an integer."""
    assert GOLDEN["decayed"] == 0
    model, found = attached()
    optimizer = torch.optim.AdamW(found.values(), lr=LR, weight_decay=0.01)
    loss_of(model(fill("h", (1, N_ROWS, D)))[0]).backward()
    optimizer.step()
    basis = basis_of(model)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-12)


def basis_of(model: nn.Module) -> Tensor:
    (adapter,) = dt.adapters(model).values()
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, dt.LoReFT)
    basis: Tensor = delta.basis().detach()  # type: ignore[no-untyped-call]
    return basis


def test_the_start_is_uniform() -> None:
    """Over many draws every entry of the orthonormal basis has the mean square 1 / D, and the subspace no direction."""
    torch.manual_seed(0)
    found = []
    for _ in range(300):
        model = Blocks()
        dt.attach(model, "loreft", layers=1, r=R, head=None)
        found.append(basis_of(model))
    bases = torch.stack(found)
    eye = torch.eye(R).expand(300, R, R)
    torch.testing.assert_close(bases.mT @ bases, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close((bases @ bases.mT).mean(0), R / D * torch.eye(D), rtol=0, atol=0.06)
    torch.testing.assert_close(bases.square().mean(0), torch.full((D, R), 1 / D), rtol=0, atol=0.04)


CASES = [(int(n), at) for n, rules in GOLDEN["positions"].items() for at in rules if int(n) > 1]


def edited(model: nn.Module, **batch: Tensor) -> Tensor:
    """(B, T), which positions' states the first block's edit moves."""
    kept: list[Tensor] = []
    layer = model.get_submodule(
        "encoder.layer.1" if "encoder.layer.1" in dict(model.named_modules()) else "model.layers.1"
    )
    (adapter,) = dt.adapters(model).values()
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        with adapter.disabled():
            model(**batch)
    handle.remove()
    return (kept[0] != kept[1]).any(-1)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(**SIZES, max_position_embeddings=64, initializer_range=0.3), add_pooling_layer=False
    ).eval()


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("n", "rule"), CASES)
def test_positions_of_the_reference(n: int, rule: str) -> None:
    """Rows of n tokens, one longer and padded beside it, are edited where the reference's rule says, on either side."""
    parts = dict.fromkeys("fl", 0) | {part[0]: int(part[1:]) for part in rule.split("+")}
    model = bert()
    dt.attach(model, "loreft", layers=0, r=2, first=parts["f"], last=parts["l"], head=None)
    ids = torch.arange(2, 2 + n + 3)[None] % 40
    for side in ("right", "left"):
        mask = torch.ones_like(ids)
        mask[0, slice(n, None) if side == "right" else slice(0, 3)] = 0
        found = edited(model, input_ids=ids, attention_mask=mask)[0].nonzero().flatten().tolist()
        assert found == [i + (3 if side == "left" else 0) for i in GOLDEN["positions"][str(n)][rule]]


def test_a_decoder_edits_the_prompt_alone() -> None:
    """The tokens with a label are no part of what is given; prompts of other adapters in front are none of the row's."""
    model = llama()
    adapter = dt.attach(model, "loreft", layers=0, r=2, first=2, last=1, head=None)
    ids = torch.arange(2, 11)[None]
    labels = ids.clone()
    labels[0, :6] = -100
    assert edited(model, input_ids=ids, labels=labels)[0].nonzero().flatten().tolist() == [0, 1, 5]
    assert edited(model, input_ids=ids)[0].nonzero().flatten().tolist() == [0, 1, 8]
    adapter.detach()
    soft = dt.attach(model, "prompt_tuning", n=3, name="soft", head=None)
    adapter = dt.attach(model, "loreft", layers=0, r=2, first=2, last=1, head=None)
    kept: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, labels=labels)
        with adapter.disabled():
            model(ids, labels=labels)
    assert soft.name == "soft" and (kept[0] != kept[1]).any(-1)[0].nonzero().flatten().tolist() == [3, 4, 8]


def test_generate_sees_the_prompt_it_began_with() -> None:
    """With the cache, without it, and left-padded beside a longer row: the same tokens, others than the base's."""
    model = llama()
    dt.attach(model, "loreft", r=4, first=2, last=2, head=None)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), want)
    (adapter,) = dt.adapters(model).values()
    with adapter.disabled():
        assert not torch.equal(model.generate(ids, **options), want)
    rows = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]])
    both = model.generate(rows, attention_mask=(rows != 0).long(), **options)
    assert torch.equal(both[0, 7:], want[0, 5:])
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(model.generate(ids, num_beams=3, use_cache=False, **options), beams)


def test_an_encoder_decoder_edits_the_encoder() -> None:
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        d_ff=24,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    adapter = dt.attach(model, "loreft", head=None)
    assert [site for _, site in adapter.deltas] == ["encoder.block.0", "encoder.block.1"]
    assert adapter.params() == 2 * (2 * 8 * 16 + 8)
    out = model.generate(torch.arange(2, 9)[None], max_new_tokens=3)
    assert out.shape[1] <= 4


def test_dropout_falls_on_the_edited_states() -> None:
    model = bert().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dt.attach(model, "loreft", layers=0, r=2, first=1, last=1, dropout=0.5, head=None)
    kept: list[Tensor] = []
    model.get_submodule("encoder.layer.1").register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    model(torch.arange(2, 9)[None])
    zeros = (kept[0][0] == 0).float().mean(1)
    assert bool((zeros[[0, -1]] > 0.1).all()) and not zeros[1:-1].any()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "first": ({"first": -1}, "first = -1, but it must be at least 0"),
    "none": ({"first": 0, "last": 0}, "leave no position to edit"),
    "r": ({"r": 17}, "r = 17, but it must lie between 1 and d_in = 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    hyper, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dt.attach(bert(), "loreft", head=None, **hyper)
