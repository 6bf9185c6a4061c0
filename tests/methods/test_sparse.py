"""What all methods of values at indices promise: small files, entries that never move, steps that are alike however cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import deltatune as dt
from deltatune.core import files
from deltatune.methods.sparse import Sparse

FAMILY: dict[str, dict[str, Any]] = {"shira": {}, "fish_mask": {}, "sam": {}, "lt_sft": {}, "spt": {}}
N_STEPS = 4


def base(width: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=16, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.sum(1) % 2}


def trained(
    method: str, n_micro: int = 1, decay: float = 0.0, width: int = 64, **hyper: Any
) -> tuple[nn.Module, dt.Adapter]:
    """N_STEPS of AdamW, a batch of four rows in `n_micro` passes, decay on everything that there is to decay."""
    model = base(width)
    torch.manual_seed(1)
    adapter = dt.attach(model, method, **{"keep": 0.005, "where": "linear"} | hyper)
    schedules = dt.Schedules([adapter])
    schedules.calibrate(lambda: [batch(100), batch(101)], lambda m, b: m(**b).loss)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2, weight_decay=decay)
    schedules.begin(optimizer, N_STEPS, n_micro)
    for step in range(N_STEPS):
        rows = batch(step)
        for i in range(n_micro):
            part = {k: v.chunk(n_micro)[i] for k, v in rows.items()}
            (model(**part).loss / n_micro).backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
    schedules.end()
    return model, adapter


def sparse_of(adapter: dt.Adapter) -> dict[str, Any]:
    return {site: d for (_, site), d in adapter.deltas.items() if isinstance(d, Sparse)}


@pytest.mark.parametrize("method", ["shira", "fish_mask", "lt_sft"])
def test_a_file_is_as_large_as_its_mask(method: str, tmp_path: Path) -> None:
    """0.5 % of the entries take 0.5 % of the weights' bytes for values, as much for positions, and little else."""
    _, adapter = trained(method, width=384, head=None)
    adapter.save(tmp_path)
    n_entries = sum(d.size for d in sparse_of(adapter).values())
    want = sum(d.n_kept() for d in sparse_of(adapter).values()) if method == "shira" else round(0.005 * n_entries)
    tensors = load_file(tmp_path / "adapter.safetensors")
    values = [t for n, t in tensors.items() if n.endswith(".values")]
    places = [t for n, t in tensors.items() if n.endswith(".index")]
    assert sum(t.numel() for t in values) == sum(t.numel() for t in places) == want == adapter.params()
    assert abs(want / n_entries - 0.005) < 2e-4
    assert {t.dtype for t in values} == {torch.float32} and {t.dtype for t in places} == {torch.int32}
    data = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.endswith((".values", ".index")))
    assert data == 8 * want
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    weights = 4 * n_entries
    assert 0.0099 * weights < size < 0.0115 * weights, "0.5 % of values, 0.5 % of positions, names and a card"


@pytest.mark.parametrize("method", FAMILY)
def test_decay_never_moves_a_frozen_entry(method: str) -> None:
    """With a decay of the optimiser's own on everything, the base keeps every bit, and only the mask's entries differ."""
    model, adapter = trained(method, decay=0.5, **FAMILY[method])
    start = dict(base().named_parameters())
    for name, p in model.named_parameters():
        if "deltas" not in name:
            assert torch.equal(p, start[name]), name
    adapter.merge()
    moved = 0
    for site, d in sparse_of(adapter).items():
        module = model.get_submodule(site)
        now = torch.cat([module.weight.flatten(), module.bias]).detach()
        then = torch.cat([start[f"{site}.weight"].flatten(), start[f"{site}.bias"]]).detach()
        free = torch.zeros(d.size, dtype=torch.bool)
        free[d.index.long()] = True
        if isinstance(d, dt.SPT) and d.a.numel():
            free[: d.n_weight] = True
        assert torch.equal(now[~free], then[~free]), site
        moved += int((now != then).sum())
    assert moved


@pytest.mark.parametrize("method", FAMILY)
def test_accumulation_changes_no_decision(method: str) -> None:
    """A batch in four passes: the same entries, and values alike but for rounding."""
    (_, one), (_, four) = trained(method), trained(method, n_micro=4)
    for site, d in sparse_of(one).items():
        other = sparse_of(four)[site]
        assert torch.equal(d.index, other.index), site
        torch.testing.assert_close(other.values, d.values, rtol=0, atol=2e-3)


class Layer(nn.Module):
    """A layer with a bias of a weight that is no multiple of anything."""

    def __init__(self, kind: type[nn.Module], *sizes: int) -> None:
        super().__init__()
        self.it = kind(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.it(x)
        return out


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_sparse_are_the_same_function(dense: bool, dtype: torch.dtype) -> None:
    """The layer, its input's gradient and each entry's equal those of a layer whose weight and bias are trained."""
    torch.manual_seed(0)
    model = Layer(nn.Linear, 7, 5).to(dtype)
    x = torch.randn(3, 7, dtype=dtype, requires_grad=True)
    twin = Layer(nn.Linear, 7, 5)
    adapter = dt.attach(model, "fish_mask", where=["it"], keep=0.3)
    d: Any = adapter.deltas["0", "it"]
    full = torch.randn(d.size) * 0.1
    index = torch.arange(d.size) if dense else d.index.long()
    with torch.no_grad():
        twin.it.weight.copy_(model.it.weight)
        twin.it.bias.copy_(model.it.bias)
        change = torch.zeros(d.size)
        change[index] = full[index]
        twin.it.weight.add_(change[: d.n_weight].view(5, 7))
        twin.it.bias.add_(change[d.n_weight :])
    d.take(d.index[:0] if dense else d.index, full if dense else full[index])
    assert d.is_dense is dense
    y = x.detach().float().requires_grad_(True)
    (got, want) = (model(x).float().square().sum(), twin(y).square().sum())
    mine = torch.autograd.grad(got, [x, d.values])
    gx, gw, gb = torch.autograd.grad(want, [y, twin.it.weight, twin.it.bias])
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    for a, b in ((got, want), (mine[0].float(), gx), (mine[1], torch.cat([gw.flatten(), gb])[index])):
        assert float(((a - b).norm() / b.norm()).detach()) < tolerance


def test_a_layer_too_large_for_its_index() -> None:
    with torch.device("meta"):
        model = Layer(nn.Linear, 2**16, 2**15)
    with pytest.raises(
        ValueError, match="it: fish_mask: 2147516416 entries are more than an index of 32 bits can name"
    ):
        dt.attach(model, "fish_mask", where=["it"])


WRONG = {
    "order": "index must ascend within the 4160", "range": "index must ascend within the 4160",
    "length": r"index \(20,\) and values \(21,\) are no list", "dtype": r"index \(21,\) and values \(21,\) are no list",
    "factors": r"a \(2, 64\) and b \(64, 0\) are no factors of \(64, 64\)",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_fit_is_refused(wrong: str, tmp_path: Path) -> None:
    """By what is in it: its hash is right."""
    dt.attach(base(), "spt", where="q", head=None).save(tmp_path)
    card, tensors = files.read_adapter(tmp_path)
    index = next(n for n in tensors if n.endswith(".index"))
    if wrong == "order":
        tensors[index] = tensors[index].flip(0)
    elif wrong == "range":
        tensors[index] = tensors[index] + 10**6
    elif wrong == "length":
        tensors[index] = tensors[index][1:].clone()
    elif wrong == "dtype":
        tensors[index] = tensors[index].long()
    else:
        tensors[index.replace(".index", ".a")] = torch.zeros(2, 64)
    files.write_adapter(tmp_path, card, tensors)
    model = base()
    with pytest.raises(ValueError, match=WRONG[wrong]):
        dt.load(model, tmp_path)
    assert not dt.adapters(model)


MIXED: dict[str, tuple[Any, Any]] = {
    "fish_mask n_samples": (1, 2), "fish_mask labels": ("true", "drawn"), "sam burn_in": (1, 2), "sam clip": (0.0, 1.0),
    "spt n_batches": (1, 2), "lt_sft iterations": (1, 2), "lt_sft dense": (0.4, 0.5), "lt_sft l1_sparse": (0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("what", MIXED)
def test_one_course_for_all_sites(what: str) -> None:
    """What is one number for the whole adapter cannot be two; the share is each layer's own."""
    method, key = what.split()
    where = {
        place: {key: value, "keep": 0.1 * i} for i, (place, value) in enumerate(zip("qv", MIXED[what], strict=True), 1)
    }
    adapter = dt.attach(base(), method, where=where)
    schedules, optimizer = dt.Schedules([adapter]), torch.optim.SGD(adapter.parameters())
    begin = schedules.begin if method == "lt_sft" else lambda *_: adapter.calibrate([batch(0)])
    with pytest.raises(ValueError, match=f"adapter 'default': {method} has one {key} for all its sites, not"):
        begin(optimizer, 9)


@pytest.mark.parametrize("method", ["fish_mask", "sam", "spt"])
def test_no_mask_of_what_is_no_number(method: str) -> None:
    adapter = dt.attach(base(), method)
    with pytest.raises(ValueError, match=r"calibrate: the gradients of 0\|bert.* are not finite"):
        adapter.calibrate([batch(0)], lambda m, b: m(**b).loss * float("inf"))
    adapter.disable()
    with pytest.raises(ValueError, match=r"calibrate: the loss does not depend on 0\|bert"):
        adapter.calibrate([batch(0)])


@pytest.mark.parametrize("method", ["fish_mask", "sam"])
def test_batch_norms_stay(method: str) -> None:
    """A burn-in is a forward in training mode, which counts no batch."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).train()
    adapter = dt.attach(model, method, where=["0", "3"], keep=0.2)
    before = {n: t.clone() for n, t in model.named_buffers() if "deltas" not in n}
    x = torch.randn(8, 3, 4, 4)
    adapter.calibrate([{"x": x}], lambda m, b: m(b["x"].expand(max(2, len(b["x"])), -1, -1, -1)).square().mean())
    assert len(before) == 3 and all(torch.equal(model.get_buffer(n), t) for n, t in before.items())
