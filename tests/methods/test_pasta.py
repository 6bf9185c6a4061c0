"""PASTA against its reference repository on one BERT: states and gradients; what it does without ids, and refuses."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_pasta.py"))
fill, backbone, batch, states = (MAKE[k] for k in ("fill", "backbone", "batch", "states"))
D, LAYERS, N, IDS = MAKE["D"], MAKE["LAYERS"], MAKE["N"], (MAKE["CLS"], MAKE["SEP"])
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def attached(model: nn.Module, **hyper: Any) -> dict[str, Tensor]:
    """The vectors by the golden's names, with its values."""
    adapter = dt.attach(model, "pasta", head=None, **hyper)
    found = {f"{d.site.layer}.vectors": d.vectors for d in adapter.deltas.values() if isinstance(d, dt.PASTA)}
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, (N, D))[: len(p)])
    return found


@pytest.mark.parametrize("kind", ["pairs", "singles"])
def test_as_the_reference_computes(kind: str) -> None:
    golden, model = GOLDEN[kind], backbone()
    found = attached(model, n=N, ids=IDS)
    assert found.keys() == golden["grads"].keys() and len(found) == LAYERS
    seen = states(model, kind)
    torch.testing.assert_close(seen, exact(golden["states"]), rtol=0, atol=1e-9)
    if kind == "pairs":
        assert (seen - exact(GOLDEN["bare"])).abs().max() > 0.05
    loss = (fill("loss", seen.shape).double() * seen).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=1e-9)
    loss.backward()
    for key, want in golden["grads"].items():
        grad = found[key].grad
        assert grad is not None and exact(want)[:2].any()
        assert bool(exact(want)[2].any()) == (kind == "pairs")
        torch.testing.assert_close(grad, exact(want), rtol=0, atol=1e-9)


def test_without_ids_the_ends_of_a_row_are_special() -> None:
    """Single texts begin and end with the special tokens; padding on either side and soft tokens change nothing."""
    golden, model = GOLDEN["singles"], backbone()
    attached(model)
    torch.testing.assert_close(states(model, "singles"), exact(golden["states"]), rtol=0, atol=1e-9)
    rows = batch("singles")
    left = {k: nn.functional.pad(v, (2, 0)) for k, v in rows.items()}
    left["position_ids"] = nn.functional.pad(torch.arange(5), (2, 0)).expand(2, -1)
    seen = model(**left).last_hidden_state[left["attention_mask"] == 1]
    torch.testing.assert_close(seen, exact(golden["states"]), rtol=0, atol=1e-9)


def test_soft_tokens_in_front_are_not_special() -> None:
    """Prompts of another adapter make the rows longer; the vectors stay at their tokens."""
    model = backbone()
    dt.attach(model, "prompt_tuning", n=3, name="prompt", head=None)
    prompted = [m.register_forward_pre_hook(_keep(into := [])) for m in [model.get_submodule("encoder.layer.0")]]
    states(model, "singles")
    plain = into[0]
    found = attached(model)
    for handle in prompted:
        handle.remove()
    layer = model.get_submodule("encoder.layer.0.attention.self.query")
    layer.register_forward_pre_hook(_keep(into := []))
    states(model, "singles")
    want = plain.clone()
    for row, n_real in enumerate((5, 4)):
        want[row, 3] += found["0.vectors"][0]
        want[row, 3 + n_real - 1] += found["0.vectors"][1]
    torch.testing.assert_close(into[0], want)


def _keep(into: list[Tensor]) -> Any:
    def look(module: nn.Module, args: Any) -> None:
        into.append(args[0].detach())

    return look


def test_start_and_dropout() -> None:
    """The reference's start, and its dropout: entries of the vectors alone."""
    model = backbone()
    adapter = dt.attach(model, "pasta", head=None, n=600, dropout=0.5)
    every = torch.cat([p.detach().flatten() for p in adapter.parameters()])
    assert float(every.std()) == pytest.approx(GOLDEN["start"]["std"], rel=0.05)
    assert abs(float(every.mean())) < 5e-4 and abs(GOLDEN["start"]["mean"]) < 2e-3
    assert adapter.params() == LAYERS * 600 * D
    delta = next(iter(adapter.deltas.values()))
    delta.train()
    x = torch.zeros(2, 5, D, dtype=torch.float64)
    delta.order = lambda length: torch.tensor([[1, 0, 0, 0, 2]] * 2)  # type: ignore[attr-defined]
    seen = delta.pre(x).detach()
    assert not seen[:, 1:4].any()
    want = delta.vectors[:2].detach()  # type: ignore[index]
    for row in seen[:, [0, 4]]:
        assert torch.equal(row[row != 0], 2 * want[row != 0]) and 0 < int((row == 0).sum()) < row.numel()


def test_what_it_refuses() -> None:
    model = backbone()
    attached(model)
    rows = batch("singles")
    embedded = model.get_input_embeddings()(rows["input_ids"])
    with pytest.raises(ValueError, match="no input_ids"):
        model(inputs_embeds=embedded, attention_mask=rows["attention_mask"])
    with pytest.raises(ValueError, match="a part of them"):
        model(rows["input_ids"][:, -1:], attention_mask=rows["attention_mask"])


@pytest.mark.parametrize("ids_of", [(), tuple(range(2, 30, 2))])
@pytest.mark.parametrize("n_beams", [1, 3])
def test_a_decoder_generates_with_a_cache_as_without(ids_of: tuple[int, ...], n_beams: int) -> None:
    """What is generated has no special tokens, unless they are given by their ids; then earlier ones count."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    adapter = dt.attach(model, "pasta", head=None, ids=ids_of, n=30)
    with torch.no_grad():
        for p in (*adapter.parameters(), model.lm_head.weight):
            p.add_(torch.randn_like(p))
    ids = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 5, 5, 9]])
    options: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "num_beams": n_beams}
    said = model.generate(ids, use_cache=False, do_sample=False, **options)
    assert torch.equal(model.generate(ids, use_cache=True, do_sample=False, **options), said)
    with adapter.disabled():
        assert not torch.equal(model.generate(ids, use_cache=True, do_sample=False, **options), said)
    if ids_of:
        assert any(i in said[:, 5:] for i in ids_of), "no special token was generated: the test looks at nothing"
