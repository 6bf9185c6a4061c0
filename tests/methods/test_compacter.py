"""Compacter beside AdapterHub's `adapters` and beside the paper's own module: states, gradients, start; its file and errors."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.kronecker import phm

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_compacter.py"))
fill, backbone, states, D, R, N = (MAKE[k] for k in ("fill", "backbone", "states", "D", "R", "N"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
TOLERANCE = {"bert": 1e-9, "llama": 1e-6, "t5": 5e-6}  # Llama and T5 norm, and T5 takes its softmax, in fp32

TREES: dict[str, dict[str, Any]] = {
    "compacter": {"method": "compacter"},
    "compacter++": {"method": "compacter++", "where": "post_norm|block"},
    "compacter++ before the add": {"method": "compacter++"},
}
KEYS = [f"{word}_{part}" for word in ("down", "up") for part in ("left", "right", "bias")]


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def tensors(adapter: dt.Adapter) -> dict[str, Tensor]:
    """Everything that is trained, by the golden's names."""
    found: dict[str, Tensor] = {}
    for delta in adapter.deltas.values():
        role = "attn" if delta.site.role == "attn.o" else "mlp"
        at = ".".join(filter(None, (delta.site.stack, str(delta.site.layer), role)))
        found |= {f"{at}.{key}": getattr(delta, key) for key in KEYS} | {"rule": delta.bank_parameter("rule")}
    return found


def filled(found: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return found


def looked(out: Tensor, found: dict[str, Tensor], golden: dict[str, Any], atol: float) -> None:
    """Loss and gradients as the golden has them."""
    loss = (fill("loss", out.shape) * out).sum()
    torch.testing.assert_close(loss, exact(golden["loss"]), rtol=0, atol=4 * atol)
    assert found.keys() == golden["probes"].keys()
    for (key, p), grad in zip(found.items(), torch.autograd.grad(loss, list(found.values())), strict=True):
        got = (fill(f"probe of {key}", p.shape) * grad).sum()
        torch.testing.assert_close(
            got, exact(golden["probes"][key]), rtol=0, atol=4 * atol, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("config", MAKE["CONFIGS"])
@pytest.mark.parametrize("name", MAKE["BACKBONES"])
def test_as_adapters_computes(name: str, config: str) -> None:
    """One rule for all layers, encoder and decoder; adapters' activation is the exact gelu."""
    model = backbone(name)
    bare = states(model, name).detach()
    found = filled(tensors(dt.attach(model, **TREES[config], r=R, f="gelu", head=None)))
    out, golden = states(model, name), GOLDEN[name][config]
    assert (out - bare).abs().max() > 0.05, "an adapter without effect would compare nothing"
    torch.testing.assert_close(out, exact(golden["states"]), rtol=0, atol=TOLERANCE[name])
    looked(out, found, golden, TOLERANCE[name])


def test_as_the_papers_own_module_computes() -> None:
    """Its activation is the default; and it starts as ours does."""
    model = nn.ModuleDict({"at": nn.Linear(D, D, bias=False).double()})
    with torch.no_grad():
        model["at"].weight.copy_(torch.eye(D))
    adapter = dt.attach(model, "compacter", where="at", r=R, head=None)
    (delta,) = adapter.deltas.values()
    start, rule = {key: getattr(delta, key).detach().clone() for key in KEYS}, delta.bank_parameter("rule")
    for key, bound in GOLDEN["module"]["bounds"].items():
        m, n = start[key].shape[-2:]
        assert start[key].abs().max() <= math.sqrt(12 / (m + n))
        assert 0.99 < bound / math.sqrt(12 / (m + n)) <= 1  # of 2000 of theirs
    assert not start["down_bias"].any() and not start["up_bias"].any()
    assert rule.shape == (N, N, N) and 0.5e-4 < rule.std() < 2e-4
    found = filled({key: getattr(delta, key) for key in KEYS} | {"rule": rule})
    x = fill("x", (5, D)).requires_grad_()
    out = model["at"](x) - x
    torch.testing.assert_close(out, exact(GOLDEN["module"]["out"]), rtol=0, atol=1e-12)
    looked(out, found | {"x": x}, GOLDEN["module"], 1e-12)


def test_a_rank_above_one() -> None:
    rule, left, right = torch.randn(4, 4, 4), torch.randn(4, 6, 3), torch.randn(4, 3, 5)
    want = sum(torch.kron(a, s @ t) for a, s, t in zip(rule, left, right, strict=True))
    torch.testing.assert_close(phm(rule, left, right), want.t())


def test_counts_and_file(tmp_path: Path) -> None:
    """3 (d + r) numbers an adapter, and 64 for all of them, which the file holds once."""
    model = backbone("t5")
    adapter = dt.attach(model, "compacter", r=R, head=None)
    assert adapter.params() == 8 * 3 * (D + R) + N**3
    filled(tensors(adapter))
    want = states(model, "t5")
    adapter.save(tmp_path)
    kept = load_file(tmp_path / "adapter.safetensors")
    assert [n for n in kept if "rule" in n] == [f"bank.rule_{N}x{N}x{N}"]
    again = backbone("t5")
    dt.load(again, tmp_path)
    assert torch.equal(states(again, "t5"), want)


@pytest.mark.parametrize(("hyper", "message"), [
    ({"n": 3}, r"n = 3 must divide r = 8 and d_out = 16, as 2 does"),
    ({"r": 10, "n": 4}, r"n = 4 must divide r = 10 and d_out = 16, as 2 does"),
    ({"n": 0}, r"n = 0 must divide"),
])  # fmt: skip
def test_wrong_numbers(hyper: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"attention\.output\.dense: compacter: {message}"):
        dt.attach(backbone("bert"), "compacter", **{"r": R, **hyper})
