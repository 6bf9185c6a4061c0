"""LQ-LoRA: its splits and its integer program beside the reference's, the Fisher information, and a size that is kept."""

import itertools
import json
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.contract.checks import State
from deltatune.core.groups import GroupLinear
from deltatune.methods.loftq import factors, maker, read
from deltatune.methods.lq_lora import allocated, descended, information, means_of, stored_bits, weighted

HERE = Path(__file__).resolve().parent.parent / "golden"
ONE = runpy.run_path(str(HERE / "make_lq_lora.py"))
GOLDEN = json.loads((HERE / "lq_lora.json").read_text(encoding="utf-8"))
matrix, found, fisher, RANK = ONE["matrix"], ONE["found"], ONE["fisher"], ONE["RANK"]
IDS = {"input_ids": torch.arange(12).view(2, 6) % 20}
SMALL: dict[str, Any] = {"r": 4, "groups": (16, 32, 64), "bits": 4.0, "steps": 3, "head": None}


def llama() -> Any:
    """Two small layers, the second's weights twice as large."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        p.data = p.data + 0.05 * torch.randn_like(p) * (2 if "layers.1" in name else 1)
    return model.eval()


def batches(n: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(0, 32, (3, 6), generator=generator) for _ in range(n)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def split(weight: Tensor, f: Tensor | None, to: str, group: int, steps: int) -> tuple[Any, float]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    low: Callable[..., Any] = partial(factors, r=RANK)
    norm: Callable[[Tensor], Tensor] = torch.linalg.norm
    if f is not None:
        rows, columns = means_of(f)
        low, norm = (
            partial(weighted, rows=rows, columns=columns, r=RANK),
            lambda rest: torch.linalg.norm(f.sqrt() * rest),
        )
    with torch.no_grad():
        made, b, a, error = descended(weight, maker(to, {"group": group}, layer), low, steps, norm)
        return (read(made), b, a), error


@pytest.mark.parametrize("key", ["plain", "fisher"])
@pytest.mark.parametrize("choice", GOLDEN["plain"])
def test_as_the_reference_splits(key: str, choice: str) -> None:
    """Its error falls until it grows once, where it stops and takes the worse one: here the best is taken."""
    theirs = GOLDEN[key][choice]
    errors = [t["error"] for t in theirs]
    to, group = choice.split()
    f = fisher("w") if key == "fisher" else None
    for steps in range(1, len(theirs) + 1):
        n = min(range(steps), key=errors.__getitem__)
        (q, b, a), error = split(matrix("w"), f, to, int(group), steps)
        got = found(matrix("w"), q, b, a) | {"error": error}
        assert got == pytest.approx(theirs[n], rel=2e-5, abs=2e-3)
    if to == "nf2":  # two bits: it grows, and theirs is what grew
        assert errors[-1] == errors[-2] > min(errors)


def test_the_weights_of_the_error_pay() -> None:
    """Measured with them, what was split with them is nearer than what was split without."""
    weight, f = matrix("w"), fisher("w")
    for to in ("nf2", "nf3", "nf4", "int8"):
        (q, b, a), error = split(weight, f, to, 64, 20)
        (p, d, c), _ = split(weight, None, to, 64, 20)
        assert error == pytest.approx(float((f.sqrt() * (weight - q - b @ a)).norm()), rel=1e-4)
        assert error < 0.95 * float((f.sqrt() * (weight - p - d @ c)).norm())


def test_means_without_information() -> None:
    f = torch.tensor([[4.0, 0.0], [0.0, 0.0], [16.0, 0.0]])
    rows, columns = means_of(f)
    assert rows.flatten().tolist() == pytest.approx(
        [2**0.5, 2**0.5, 8**0.5]
    )  # the second row takes the least of the others
    assert columns.flatten().tolist() == pytest.approx([(20 / 3) ** 0.5] * 2)
    with pytest.raises(ValueError, match="its Fisher information is zero"):
        means_of(torch.zeros(2, 2))


def test_as_the_reference_allocates() -> None:
    program = GOLDEN["program"]
    costs, sizes = (torch.tensor(program[key], dtype=torch.float64) for key in ("costs", "weights"))
    assert allocated(costs, sizes, program["budget"]) == program["assignment"]
    bits = [stored_bits(f"nf{b}", group) for b, group in program["choices"]]
    torch.testing.assert_close(sizes[0] / sizes[0, 0] * bits[0], torch.tensor(bits, dtype=torch.float64))


def test_nothing_is_better_than_what_is_allocated() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(8):
        costs, sizes = (torch.rand(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        costs[trial % 4, trial % 5] = torch.inf
        budget = float(sizes.mean(1).sum())
        tries = [
            (sum(float(costs[i, j]) for i, j in enumerate(js)), list(js))
            for js in itertools.product(range(5), repeat=4)
            if sum(float(sizes[i, j]) for i, j in enumerate(js)) <= budget
        ]
        assert allocated(costs, sizes, budget) == min(tries)[1]
        with pytest.raises(ValueError, match=r"the smallest choices take .* in all, allowed are 0\.01"):
            allocated(costs, sizes, 0.01)
    assert allocated(costs * 1e-20, sizes, budget) == min(tries)[1]


def bits_of(model: nn.Module) -> float:
    """Of a weight, by what the layers keep."""
    layers = [m for m in model.modules() if isinstance(m, GroupLinear)]
    kept = [t for m in layers for t in m.buffers(recurse=False)]
    return 8 * sum(t.numel() * t.element_size() for t in kept) / sum(m.in_features * m.out_features for m in layers)


def test_the_size_is_kept_and_more_is_better() -> None:
    plain = llama()
    before, errors, kinds = {n: p.detach().clone() for n, p in plain.named_parameters()}, [], set()
    for bits in (2.75, 3.5, 4.5, 20.0):
        model = llama()
        adapter = dt.attach(model, "lq_lora", **SMALL | {"bits": bits})
        assert 0.8 * bits < bits_of(model) <= bits * (1 + 1e-6) or bits == 20
        total = 0.0
        with torch.no_grad():
            for d in adapter.deltas.values():
                layer = model.get_submodule(d.site.module)
                rest = before[f"{d.site.module}.weight"] - read(layer) - d.scale * d.b @ d.a
                total += float(rest.square().sum())
                kinds.add((layer.code, layer.bits))
        errors.append(total)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]
    assert kinds == {("nf", 2), ("nf", 3), ("nf", 4), ("int", 8)}


def test_one_format_in_one_group_is_no_choice() -> None:
    model = llama()
    dt.attach(model, "lq_lora", r=4, formats=("nf3",), groups=(64,), bits=3.5, steps=2, head=None)
    assert bits_of(model) == 3.5


def test_what_the_loss_says_of_the_weights() -> None:
    """F is the mean of squared gradients of single rows; what it says moves bits to where it is large."""
    model = llama()
    seen: dict[str, Tensor] = {}
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches() for i in range(3)]
    for row in rows:
        model.zero_grad()
        model(**row).loss.backward()
        for name, p in model.named_parameters():
            seen[name] = seen.get(name, torch.zeros_like(p)) + p.grad.square() / len(rows)
    model.zero_grad()
    adapter = dt.attach(model, dt.LoRA(r=4, where="linear"), head=None)
    before = State(model)
    got = information(adapter, list(adapter.deltas.values()), batches(), None)
    before.restored(model)
    assert len(got) == 14
    for d in adapter.deltas.values():
        torch.testing.assert_close(got[d.site.name], seen[f"{d.site.module}.weight"], rtol=1e-4, atol=1e-10)


def test_batches_decide() -> None:
    """With a loss that sees the second layer hardly, that one gets fewer bits than without."""

    def first(model: Any, batch: Any) -> Tensor:
        states = model(**batch, output_hidden_states=True).hidden_states
        return states[1].square().mean() + 1e-6 * states[2].square().mean()

    def widths(model: Any) -> list[float]:
        return [bits_of(layer) for layer in model.model.layers]

    without, seen, twice = llama(), llama(), llama()
    dt.attach(without, "lq_lora", **SMALL)
    adapter = dt.attach(seen, "lq_lora", batches=batches(), loss=first, **SMALL)
    assert widths(seen)[0] > widths(seen)[1] and widths(without)[0] < widths(without)[1]
    again = dt.attach(twice, "lq_lora", batches=iter(batches()), loss=first, **SMALL)  # and each time alike
    assert [str(m) for m in twice.modules()] == [str(m) for m in seen.modules()]
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), again.parameters(), strict=True))


def test_base_and_adapter_come_back(tmp_path: Path) -> None:
    """Each layer in its own format."""
    model = llama()
    adapter = dt.attach(model, "lq_lora", batches=batches(), niter=2, **SMALL | {"bits": 3.7})
    assert len({(m.code, m.bits, m.group) for m in model.modules() if isinstance(m, GroupLinear)}) > 1
    optimizer = torch.optim.AdamW(adapter.groups(1e-3))
    losses = []
    for _ in range(3):
        loss = model(**IDS, labels=IDS["input_ids"]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model(**IDS).logits
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    dt.save_base(model, tmp_path / "base")
    other = dt.load_base(tmp_path / "base")
    dt.load(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(**IDS).logits, want)
    for base, why in ((llama(), "is a plain one"), (dt.quantise(llama(), "nf3"), "keeps other codes")):
        before = State(base)
        with pytest.raises(ValueError, match=f"lq_lora: its layer here {why}"):
            dt.load(base, tmp_path / "adapter")
        before.restored(base)


def labelled(*keys: str) -> list[dict[str, Tensor]]:
    return [{k: b[k] for k in keys} for b in batches()]


@pytest.mark.parametrize(
    ("hyper", "why"),
    [
        ({"bits": 2.0}, r"lq_lora: bits = 2\.0: the smallest choices take 2\.5 in all"),
        ({"groups": (48,)}, r"q_proj: none of groups = \(48,\) divides the layer's 64 inputs"),
        ({"groups": ()}, "groups is empty"),
        ({"groups": (12,)}, "groups holds 12; a group must be in eights"),
        ({"formats": ("nf9",)}, "unknown format 'nf9'"),
        ({"formats": ("bnb-nf4",)}, "formats holds 'bnb-nf4', of which no size is known; take int2, int3"),
        ({"batches": []}, "calibrate: no batch was given"),
        ({"batches": batches()[0]}, "batches are a list of the model's keywords, not one such mapping"),
        ({"batches": labelled("input_ids")}, "the batches hold input_ids, and the model has no loss without labels"),
        ({"loss": lambda model, batch: None}, "a loss without batches has nothing to look at"),
        (
            {"batches": batches(), "loss": lambda m, b: 0.0 * m(**b).loss},
            "q_proj: lq_lora: its Fisher information is zero: the loss does not depend on it",
        ),
        ({"where": {"q": {"bits": 3.0}, "v": {"bits": 4.0}}}, r"lq_lora has one bits for all its sites, not 3\.0 at"),
    ],
)
def test_what_fails_leaves_the_model_as_it_was(hyper: dict[str, Any], why: str) -> None:
    model = llama()
    before = State(model)
    with pytest.raises(ValueError, match=why):
        dt.attach(model, "lq_lora", **{"r": 4, "groups": (64,), "bits": 3.0, "steps": 2, "head": None} | hyper)
    before.restored(model)
