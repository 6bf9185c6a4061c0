"""KronA beside the MLP with a trained residual: the paper has no code, so its equation is written with torch.kron."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_adapters.py"))


def backbone(name: str) -> Any:
    return MAKE["backbone"](name).double()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_against_the_equation(name: str) -> None:
    """FFN(x) + s (A (x) B) x + s_res x on every block of encoder and decoder, and nothing at the start; all gradients."""
    plain, model = backbone(name), backbone(name)
    adapter = dt.attach(model, dt.KronARes(scale=1.5, s_res=0.0), head=None)
    want = plain(**MAKE["batch"](name))[0]
    assert torch.equal(model(**MAKE["batch"](name))[0], want)

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for delta in adapter.deltas.values():
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(0.3 * torch.randn_like(p))
        a, b, s = (t.detach().clone().requires_grad_() for t in (delta.a, delta.b, delta.residual))
        assert a.shape == b.shape == (4, 4) and s.shape == (1,)
        found.append((a, b, s))
        entry, leave = (plain.get_submodule(at) for at in (delta.site.entry, delta.site.module))
        seen: list[Tensor] = []
        entry.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        leave.register_forward_hook(
            lambda module, args, y, seen=seen, a=a, b=b, s=s: y + 1.5 * seen[-1] @ torch.kron(a, b).t() + s * seen.pop()
        )
    want, got = (m(**MAKE["batch"](name))[0] for m in (plain, model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    goal = MAKE["fill"]("loss", want.shape).double()
    (goal * want).sum().backward()
    (goal * got).sum().backward()
    for delta, (a, b, s) in zip(adapter.deltas.values(), found, strict=True):
        for ours, theirs in ((delta.a, a), (delta.b, b), (delta.residual, s)):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_it_is_not_merged() -> None:
    """A whole MLP has no weight that it could go into; the numbers are KronA's at a square matrix, and one."""
    adapter = dt.attach(backbone("bert"), "krona_res", s_res=1.0, head=None)
    assert adapter.params() == 2 * (16 + 16 + 1)
    assert all(bool((d.residual == 1.0).all()) for d in adapter.deltas.values())
    with pytest.raises(ValueError, match="krona_res cannot be merged: it defines no fold"):
        adapter.merge()


def test_under_autocast_the_mlp_s_output_keeps_its_dtype() -> None:
    """Its input comes from a norm, in fp32; what is added to a bf16 output is bf16."""
    model = backbone("bert").float()
    adapter = dt.attach(model, "krona_res", s_res=0.5, head=None)
    seen: list[torch.dtype] = []
    for delta in adapter.deltas.values():
        model.get_submodule(delta.site.module).register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**MAKE["batch"]("bert"))
    assert seen == [torch.bfloat16] * 2
