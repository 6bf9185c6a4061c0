"""MerA: the reference of fusion by transport, the assignment of SciPy as the plan's second opinion, permuted copies, refusals."""

import builtins
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import deltatune as dt
from deltatune.methods.transfer import merged, transport

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_mera.py"))
source, CASES = MAKE["source"], MAKE["CASES"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
NEURONS = {"down": 0, "down_bias": 0, "up": 1}
D, R = 16, 6
SIZES = {"vocab_size": 30, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, num_labels=3)
    return BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=D, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def rows() -> dict[str, Tensor]:
    ids = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def trained(model: nn.Module, method: str, seed: int, **hyper: Any) -> dt.Adapter:
    """An adapter on the model that moved from its start."""
    adapter = dt.attach(model, method, **hyper)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=draw))
    return adapter


def saved(folder: Path, model: nn.Module, method: str, many: int = 3, **hyper: Any) -> list[str]:
    found = []
    for i in range(many):
        adapter = trained(model, method, i, **hyper)
        adapter.save(folder / str(i))
        adapter.detach()
        found.append(str(folder / str(i)))
    return found


@torch.no_grad()
def permuted(adapter: dt.Adapter, seed: int) -> None:
    """Another order of the neurons at every site: the same function."""
    draw = torch.Generator().manual_seed(seed)
    for (path, _), d in adapter.deltas.items():
        if path != "head":
            order = torch.randperm(len(d.down_bias), generator=draw)
            d.down.copy_(d.down[order])
            d.down_bias.copy_(d.down_bias[order])
            d.up.copy_(d.up[:, order])


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference_fuses(case: str) -> None:
    """The reference computes in fp32."""
    one, other = source(case, 0), source(case, 1)
    got = merged([one, other], NEURONS)
    assert not torch.allclose(got["down"], (one["down"] + other["down"]).double() / 2, atol=0.1)
    down = torch.cat([got["down"], got["down_bias"][:, None]], 1)
    torch.testing.assert_close(down, torch.tensor(GOLDEN[case]["down"], dtype=torch.double), rtol=0, atol=5e-7)
    torch.testing.assert_close(got["up"], torch.tensor(GOLDEN[case]["up"], dtype=torch.double), rtol=0, atol=5e-7)


def assignment(one: Tensor, other: Tensor) -> Tensor:
    """P (r, r): P[i, j] = 1 where neuron i of `one` goes to neuron j of `other`, by SciPy."""
    cost = [[float((a - b).double().norm()) for b in other] for a in one]
    plan = torch.zeros(len(one), len(other), dtype=torch.double)
    plan[linear_sum_assignment(cost)] = 1
    return plan


@pytest.mark.parametrize("n", [1, 6, 49])
def test_the_plan_is_the_best_assignment(n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    one, other = (torch.randn(n, 5, generator=draw) for _ in range(2))
    torch.testing.assert_close(transport(one, other), assignment(one, other), rtol=0, atol=1e-12)
    order = torch.randperm(n, generator=draw)
    torch.testing.assert_close(transport(one[order], one).T @ one[order].double(), one.double(), rtol=0, atol=1e-12)


def test_a_regularised_plan_is_soft() -> None:
    """Its columns sum to 1; of clear pairs it is nearly the exact one, with a large regularisation the mean of all."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 4, generator=draw) for _ in range(2))
    near = one[[2, 0, 1, 4, 3]] + 0.01 * other
    torch.testing.assert_close(transport(one, near, reg=0.05), transport(one, near), rtol=0, atol=1e-2)
    torch.testing.assert_close(transport(one, other, reg=1e3), torch.full((5, 5), 0.2).double(), rtol=0, atol=1e-3)
    soft = transport(one, other, reg=0.1)
    torch.testing.assert_close(soft.sum(0), torch.ones(5).double(), rtol=0, atol=1e-6)
    assert ((soft > 0.05) & (soft < 0.95)).any()
    assert (transport(one[:3], other).sum(0) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("how", ["average", "sum"])
@pytest.mark.parametrize("method", ["sequential", "pfeiffer", "parallel", "residual"])
def test_the_equation_a_second_time(tmp_path: Path, method: str, how: Any) -> None:
    """D = sum_i P_i' D_i / M, c = sum_i P_i' c_i / M, U = sum_i U_i P_i / M; the adapter's own norm is averaged."""
    folders = saved(tmp_path, model := bert(), method, r=R)
    sites = {}
    for folder in folders:
        adapter = dt.load(model, folder)
        for (path, site), d in adapter.deltas.items():
            if path != "head":
                sites.setdefault(site, []).append({k: t.clone() for k, t in d.state_dict().items()})
        adapter.detach()
    adapter = dt.attach(model, "mera", sources=folders, how=how)
    deltas = {site: d for (path, site), d in adapter.deltas.items() if path != "head"}
    assert deltas.keys() == sites.keys() and deltas
    for site, each in sites.items():
        first = torch.cat([each[0]["down"], each[0]["down_bias"][:, None]], 1)
        plans = [assignment(torch.cat([one["down"], one["down_bias"][:, None]], 1), first).float() for one in each]
        assert not all(torch.equal(p, torch.eye(R)) for p in plans)
        share = 1.0 if how == "sum" else 1 / 3
        want = {
            "down": share * sum(p.T @ one["down"] for p, one in zip(plans, each, strict=True)),
            "down_bias": share * sum(p.T @ one["down_bias"] for p, one in zip(plans, each, strict=True)),
            "up": share * sum(one["up"] @ p for p, one in zip(plans, each, strict=True)),
            "up_bias": share * sum(one["up_bias"] for one in each),
        }
        for key in ("gain", "offset") if method == "residual" else ():
            want[key] = sum(one[key] for one in each) / 3
        got = deltas[site].state_dict()
        assert got.keys() == want.keys()
        for key, t in want.items():
            torch.testing.assert_close(got[key], t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("make", [bert, t5])
def test_permuted_copies_are_one_adapter(tmp_path: Path, make: Any, by: str) -> None:
    """Merged with permuted copies of itself an adapter is itself, bit for bit."""
    where = {"where": "block"} if make is t5 else {}
    adapter = trained(model := make(), "sequential", 0, r=R, **where)
    batch = rows() if make is bert else {**rows(), "labels": rows()["input_ids"]}
    want, kept = model(**batch).logits, {k: t.clone() for k, t in adapter.state_dict().items()}
    for i in range(3):
        adapter.save(tmp_path / str(i))
        permuted(adapter, i)
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-5)
    adapter.detach()
    folders = [str(tmp_path / str(i)) for i in range(3)]
    adapter = dt.attach(model.train(), "mera", sources=folders, **({"batches": [batch]} if by == "activations" else {}))
    assert model.training and all(type(d).__name__ != "Listening" for d in adapter.deltas.values())
    model.eval()
    for key, t in adapter.state_dict().items():
        assert key.startswith("head.") or torch.equal(t, kept[key]), key
    if make is t5:
        assert torch.equal(model(**batch).logits, want)
        given = {"input_ids": rows()["input_ids"], "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))
    model(**batch, **({} if make is t5 else {"labels": torch.tensor([0, 1, 2])})).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_activations_decide_where_they_differ(tmp_path: Path) -> None:
    """The cost on activations: what the first matrix gives at the real tokens, under each source's own adapter."""
    folders = saved(tmp_path, model := bert(), "sequential", r=R, where="block")
    seen: list[dict[str, Tensor]] = []
    each: list[dict[str, dict[str, Tensor]]] = []
    real = rows()["attention_mask"].bool()
    for folder in folders:
        adapter = dt.load(model, folder)
        inputs: dict[str, Tensor] = {}
        deltas = {site: d for (path, site), d in adapter.deltas.items() if path != "head"}
        with adapter.disabled(), torch.no_grad():
            states = model(**rows(), output_hidden_states=True).hidden_states
        inputs["bert.encoder.layer.0"] = states[1][real]
        d = deltas["bert.encoder.layer.0"]
        seen.append({"bert.encoder.layer.0": F.linear(states[1][real], d.down, d.down_bias).detach()})
        each.append({site: {k: t.clone() for k, t in d.state_dict().items()} for site, d in deltas.items()})
        adapter.detach()
    by_acts = dt.attach(model, "mera", sources=folders, batches=[rows()]).deltas["0", "bert.encoder.layer.0"]
    site = "bert.encoder.layer.0"
    plans = [assignment(one[site].T, seen[0][site].T).float() for one in seen]
    want = sum(p.T @ one[site]["down"] for p, one in zip(plans, each, strict=True)) / 3
    torch.testing.assert_close(by_acts.down.detach(), want, rtol=0, atol=1e-6)
    by_weights = dt.attach(bert(), "mera", sources=folders).deltas["0", site]
    assert not torch.allclose(by_acts.down, by_weights.down, atol=1e-3)


def test_one_source_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And needs no POT; two do, and without it they say what to install."""
    folders = saved(tmp_path, model := bert(), "sequential", many=2, r=R)
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ot":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    dt.load(other := bert(), folders[0])
    dt.attach(model, "mera", sources=folders[:1])
    assert torch.equal(model.bert(**rows())[0], other.bert(**rows())[0])
    assert not torch.equal(model(**rows()).logits, other(**rows()).logits)  # the head is the new task's own
    with pytest.raises(ValueError, match=r"needs the package POT: pip install 'deltatune\[merge\]'"):
        dt.attach(model, "mera", sources=folders, name="two")
    assert list(dt.adapters(model)) == ["default"]


def test_refuses(tmp_path: Path) -> None:
    model = bert()
    made = {
        "six": ("sequential", {"r": R}),
        "four": ("sequential", {"r": 4}),
        "mixed": ("sequential", {"where": {"o": {"r": R}, "mlp.down": {"r": 4}}}),
        "gelu": ("sequential", {"r": R, "f": "gelu"}),
        "block": ("sequential", {"r": R, "where": "block"}),
        "residual": ("residual", {"r": R}),
        "lora": ("lora", {"r": 2}),
        "mam": ("mam", {"r": R, "n": 2}),
        "propelt": ("propelt", {"r": R}),
    }
    at = {name: saved(tmp_path / name, model, method, 1, **hyper)[0] for name, (method, hyper) in made.items()}
    site = r"bert\.encoder\.layer\.0\.(attention\.)?output\.dense"
    for said, hyper in {
        "no source adapters for MerA": {},
        rf"{site}: the bottleneck of .*four/0 has width 4, that of .*six/0 6": {"sources": [at["six"], at["four"]]},
        r"layer\.0\.output\.dense: the bottleneck of .*mixed/0 has width 4": {"sources": [at["six"], at["mixed"]]},
        r"gelu/0 is another tree than .*its config is .*'gelu'": {"sources": [at["six"], at["gelu"]]},
        r"block/0 stands at 2 sites, this adapter at 4": {"sources": [at["six"], at["block"]]},
        r"residual/0 holds 'residual', .*six/0 'sequential'": {"sources": [at["six"], at["residual"]]},
        r"mam/0 holds 'sum', .*six/0 'sequential'": {"sources": [at["six"], at["mam"]]},
        r"mam/0 holds Sum": {"sources": [at["mam"]]},
        r"lora/0 holds 'lora', and MerA merges bottlenecks": {"sources": [at["lora"]]},
        r"propelt/0 holds 'propelt', and MerA merges bottlenecks": {"sources": [at["propelt"]]},
        r"unknown way to merge 'mean'": {"sources": [at["six"]], "how": "mean"},
        r"reg = -1": {"sources": [at["six"]], "reg": -1},
    }.items():
        with pytest.raises(ValueError, match=said):
            dt.attach(model, "mera", **hyper)
    assert not dt.adapters(model)
