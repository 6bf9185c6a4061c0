"""LT-SFT against composable-sft: the entries that it keeps, what they become, and what two of them add up to."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_lt_sft.py"))
classifier, collate, examples = (MAKE[k] for k in ("classifier", "collate", "examples"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SETTINGS, RUNS = GOLDEN["settings"], GOLDEN["runs"]
N_ALL = sum(p.numel() for p in classifier().parameters())


def rows(picked: list[int]) -> dict[str, Any]:
    every = examples()
    return {k: v for k, v in collate([every[i] for i in picked]).items() if k != "idx"}


def n_ours(frozen: list[str]) -> int:
    """How many entries there are to choose from."""
    named = classifier().named_parameters()
    return sum(p.numel() for n, p in named if not any(part in n for part in ["classifier", *frozen]))


def attached(model: nn.Module, name: str = "default", frozen: Any = (), **options: Any) -> dt.Adapter:
    """On all layers but the frozen ones and the classifier, which is the head's."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm))]
    names = [n for n in names if not any(part in n for part in ["classifier", *frozen])]
    return dt.attach(model, "lt_sft", name=name, where=names, **options)


def sites(adapter: dt.Adapter) -> dict[str, Any]:
    return {site: d for (_, site), d in adapter.deltas.items() if isinstance(d, dt.LTSFT)}


def options_of(run: dict[str, Any]) -> dict[str, Any]:
    """Its penalty is divided by all of the model's parameters, ours by those of the sites."""
    n = n_ours(run["frozen"])
    l1 = run["l1"] * n / N_ALL if run["detached"] else 0.0  # which has no gradient there, as it is
    return {
        "frozen": run["frozen"],
        "keep": run["k"] / n,
        "iterations": run["iterations"],
        "l1_dense": l1,
        "l1_sparse": l1,
    }


def trained(run: dict[str, Any], n_micro: int = 1, **changed: Any) -> tuple[nn.Module, dt.Adapter]:
    """As the golden's Trainer: a batch of two rows is `n_micro` passes."""
    model = classifier().train()
    adapter = attached(model, **options_of(run) | changed)
    options = {"betas": tuple(SETTINGS["betas"]), "eps": SETTINGS["eps"]}
    optimizer = torch.optim.AdamW(adapter.groups(SETTINGS["lr"]), weight_decay=0.0, **options)
    schedule = adapter.schedule
    schedule.begin(optimizer, len(run["batches"]), n_micro)
    for step, picked in enumerate(run["batches"]):
        for part in [picked] if n_micro == 1 else [[i] for i in picked]:
            loss = model(**rows(part)).loss / n_micro  # it stays alive until the next one, as in any loop
            loss.backward()
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
    schedule.end()
    return model, adapter


def diffs(adapter: dt.Adapter) -> dict[str, tuple[list[int], Tensor]]:
    """{parameter: (positions, values)} of what is kept, as the golden has it."""
    found = {}
    for site, d in sites(adapter).items():
        weight = d.index < d.n_weight
        for key, mine, start in (("weight", weight, 0), ("bias", ~weight, d.n_weight)):
            if mine.any():
                found[f"{site}.{key}"] = ((d.index[mine] - start).tolist(), d.values[mine].detach())
    return found


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_it_keeps_and_finds_what_composable_sft_does(name: str, n_micro: int) -> None:
    """Positions exactly; values, and the classifier that was taken back with them, to 1e-9 of fp64."""
    run = RUNS[name]
    _, adapter = trained(run, n_micro)
    got = diffs(adapter)
    assert {n: at for n, (at, _) in got.items()} == {n: at for n, (at, _) in run["diffs"].items()}
    assert sum(len(at) for at, _ in got.values()) == run["k"] == adapter.params()
    for n, (_, values) in got.items():
        torch.testing.assert_close(values, torch.tensor(run["diffs"][n][1], dtype=torch.float64), rtol=0, atol=1e-9)
    head = {n.rpartition(".")[2]: p for n, p in zip(("weight", "bias"), adapter.head_parameters(), strict=True)}
    for n, want in run["head"].items():
        torch.testing.assert_close(head[n].detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)


def fine_tuned(model: nn.Module, name: str, run: dict[str, Any], head: bool) -> dt.Adapter:
    """The golden's fine-tuning as an adapter."""
    adapter = attached(model, name, **({} if head else {"head": None}))
    with torch.no_grad():
        for site, d in sites(adapter).items():
            parts = [run["diffs"].get(f"{site}.{key}", [[], []]) for key in ("weight", "bias")]
            index = torch.tensor(parts[0][0] + [i + d.n_weight for i in parts[1][0]], dtype=torch.int32)
            d.take(index, torch.tensor(parts[0][1] + parts[1][1], dtype=torch.float64))
        for p, n in zip(adapter.head_parameters(), ("weight", "bias"), strict=True) if head else ():
            p.copy_(torch.tensor(run["head"][n], dtype=torch.float64))
    return adapter


def test_a_language_and_a_task_add_up(tmp_path: Path) -> None:
    """Two adapters on one model, in either order, and from files, are what composable-sft's `apply` of both is."""
    want = torch.tensor(GOLDEN["both"], dtype=torch.float64)
    batch = {"input_ids": rows(list(range(len(examples()))))["input_ids"]}
    for order in (("one", "two"), ("two", "one")):
        model = classifier().eval()
        for name in order:
            fine_tuned(model, name, RUNS[name], head=name == "two").save(tmp_path / name)
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-9)
    model = classifier().eval()
    for name in ("one", "two"):
        dt.load(model, tmp_path / name, name=name)
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-9)
    for name in ("one", "two"):
        dt.adapters(model)[name].merge()
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-9)


def test_a_sum_of_two_leaves() -> None:
    """A tree adds them up too."""
    model = classifier().eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    adapter = dt.attach(model, dt.Sum(dt.LTSFT(where=names), dt.LTSFT(where=names)), head=None)
    plain = {n: p.detach().clone() for n, p in model.named_parameters() if "deltas" not in n}
    total: dict[str, Tensor] = {}
    for (path, site), d in adapter.deltas.items():
        assert isinstance(d, dt.LTSFT)
        index = torch.arange(int(path), d.n_weight, 7)
        values = torch.linspace(-1, 1, len(index), dtype=torch.float64)
        d.take(index, values)
        total.setdefault(site, torch.zeros(d.n_weight, dtype=torch.float64))[index] += values
    adapter.merge()
    for site, change in total.items():
        weight = model.get_parameter(f"{site}.weight")
        torch.testing.assert_close(weight.flatten(), plain[f"{site}.weight"].flatten() + change, rtol=0, atol=1e-12)


def test_phases() -> None:
    """All entries have moments and move, then the kept ones alone; a phase starts without any; the base never moves."""
    run = RUNS["two"]
    model = classifier().train()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = attached(model, **options_of(run))
    optimizer = torch.optim.AdamW(adapter.groups(SETTINGS["lr"]))
    schedule = adapter.schedule
    schedule.begin(optimizer, 16)
    seen = [adapter.params()]
    for step in range(16):
        model(**rows(run["batches"][step])).loss.backward()
        schedule.before_step(step)
        optimizer.step()
        fresh = {float(s["step"]) for s in optimizer.state.values()}
        assert fresh == {step % 4 + 1.0}, "moments of an earlier phase are there"
        schedule.after_step(step)
        optimizer.zero_grad()
        seen.append(adapter.params())
    half, k = run["k"] // 2, run["k"]
    assert seen == [n_ours([])] * 4 + [half] * 4 + [n_ours([])] * 4 + [k] * 5
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())


def test_a_finished_one_trains_on_under_its_mask(tmp_path: Path) -> None:
    _, adapter = trained(RUNS["one"])
    adapter.save(tmp_path)
    model = classifier().train()
    again = dt.load(model, tmp_path, trainable=True)
    before = {site: d.index.clone() for site, d in sites(again).items()}
    optimizer = torch.optim.AdamW(again.groups(1e-2))
    schedule = again.schedule
    schedule.begin(optimizer, 6)
    for step in range(6):
        model(**rows([0, 1])).loss.backward()
        schedule.before_step(step)
        optimizer.step()
        schedule.after_step(step)
        optimizer.zero_grad()
    for site, d in sites(again).items():
        assert torch.equal(d.index, before[site])


def test_too_few_steps_choose_nothing() -> None:
    adapter = attached(classifier(), iterations=2)
    schedule = adapter.schedule
    schedule.begin(torch.optim.SGD(adapter.groups(0.1)), 3)
    for step in range(3):
        schedule.after_step(step)
    assert adapter.params() == n_ours([])


def test_another_models_phases_are_refused() -> None:
    adapter = attached(classifier())
    schedule = adapter.schedule
    schedule.begin(torch.optim.SGD(adapter.groups(0.1)), 4)
    other = dt.attach(classifier(), "lt_sft", where="mlp.down")
    with pytest.raises(ValueError, match="the saved phases are of other sites"):
        other.schedule.load_state_dict(schedule.state_dict())


BAD = [
    ({"iterations": 0}, "iterations = 0"),
    ({"dense": 1.0}, r"dense = 1\.0"),
    ({"l1_sparse": -1.0}, "l1_sparse = -1"),
]


@pytest.mark.parametrize(("hyper", "said"), BAD)
def test_bad_hyperparameters(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attached(classifier(), **hyper)
