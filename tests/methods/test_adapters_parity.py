"""The same states as AdapterHub's `adapters`, from the same weights: tests/golden/adapters.json says what it computes."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.core.compose import Tree
from deltatune.core.method import Method

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_adapters.py"))
fill, backbone, states = MAKE["fill"], MAKE["backbone"], MAKE["states"]
R, P, MID, ALPHA = MAKE["R"], MAKE["P"], MAKE["MID"], MAKE["ALPHA"]
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
TOLERANCE = 1e-5

TENSORS = {"gain": "norm.weight", "offset": "norm.bias"}
TENSORS |= {key: f"{key}.weight" for key in ("down", "up")} | {f"{key}_bias": f"{key}.bias" for key in ("down", "up")}
TENSORS |= {key: f"prefix.{key}" for key in ("key", "value", "embedding")}
TENSORS |= {key: f"prefix.{key}.weight" for key in ("inner", "outer")}
TENSORS |= {f"{key}_bias": f"prefix.{key}.bias" for key in ("inner", "outer")}
SHARED = ("embedding", "inner", "inner_bias")  # by the layers of a stack

FLAT = dt.PrefixTuning(n=P, where="attention")  # T5's cross-attention too


def parallel(scale: float = 4.0) -> Tree:
    """Beside the MLP: it reads the residual stream, which BERT's MLP reads too and the others' reads through a norm."""
    leaf: Tree = dt.Parallel(r=R, scale=scale, where="mlp+norm|mlp")
    return leaf


def cases() -> Iterator[tuple[str, str, Tree]]:
    """(backbone, configuration of adapters', ours)."""
    for name in ("bert", "gpt2", "llama", "t5"):
        # adapters has none behind T5's cross-attention
        yield name, "double_seq_bn", dt.Sequential(r=R, f="silu", where="attn.o,mlp.down")
        yield name, "seq_bn", dt.pfeiffer(r=R)
        yield name, "residual", dt.Residual(r=R)
        yield name, "par_bn_1", parallel(1.0)
        yield name, "par_bn", parallel()
        yield name, "lora", dt.LoRA(r=R, alpha=ALPHA)
        # adapters scales what the MLP's first matrix gives, before the activation; the paper what its last one reads,
        # behind it. On a gated MLP the two are one.
        yield name, "ia3", dt.IA3() if name == "llama" else dt.IA3(where="k,v,mlp.up")
    yield "bert", "par_bn_attn", dt.Parallel(r=R, where="attn")
    for name in ("bert", "gpt2", "llama", "t5_unbiased"):
        yield name, "prefix_flat", FLAT
        yield name, "prefix", dt.PrefixTuning(n=P, mid=MID, where="attention")
    yield "bert", "mam_flat", dt.mam(n=P, r=R, scale=4.0)
    yield "bert", "mam", dt.mam(n=P, r=R, scale=4.0, mid=MID)
    for name in ("gpt2", "llama", "t5_unbiased"):  # where the preset's adapter reads behind the norm, and skips cross
        yield name, "mam_flat", dt.Sum(FLAT, parallel())
        yield name, "mam", dt.Sum(dt.PrefixTuning(n=P, mid=MID, where="attention"), parallel())


def golden(name: str, config: str) -> Tensor:
    return torch.tensor(GOLDEN["states"][name][config])


def key_of(delta: Method, tensor: str) -> str:
    """The key of a delta's tensor in the golden file: "decoder.1.attn.q.a", "0.mlp.down.weight", "attn.prefix.embedding"."""
    site = delta.site
    sub, _, role = (site.role or "").partition(".")
    layer = "" if tensor in SHARED else str(site.layer)
    sub = {"block": "mlp", "post_norm": "mlp", "mlp+norm": "mlp"}.get(sub, sub)
    if not isinstance(delta, dt.LoRA | dt.IA3):
        role = ""
    role = {"down": "up"}.get(role, role)  # the input of the MLP's last matrix is what its first one gives
    return ".".join(filter(None, (site.stack, layer, sub, role, TENSORS.get(tensor, tensor))))


def filled(adapter: dt.Adapter) -> None:
    """Give every tensor of the adapter the golden file's numbers."""
    with torch.no_grad():
        for delta in adapter.deltas.values():
            for tensor in delta.slots_of(delta.config):
                p = getattr(delta, tensor)
                p.copy_(fill(key_of(delta, tensor), p.shape))


@pytest.mark.parametrize("name", MAKE["BACKBONES"])
def test_the_bases_agree(name: str) -> None:
    """Across transformers' major versions; else nothing below would mean anything."""
    torch.testing.assert_close(states(backbone(name), name), golden(name, "bare"), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "config", "tree"), [pytest.param(*case, id="-".join(case[:2])) for case in cases()])
def test_as_adapters_computes(name: str, config: str, tree: Tree) -> None:
    model = backbone(name)
    filled(dt.attach(model, tree, head=None))
    expected = golden(name, config)
    assert (expected - golden(name, "bare")).abs().max() > 0.1, "an adapter without effect would compare nothing"
    torch.testing.assert_close(states(model, name), expected, rtol=0, atol=TOLERANCE)


def test_a_prefix_leaves_relative_positions_alone() -> None:
    """Ours does, on T5; adapters does so once its position bias is patched, and moves every real key by P without that."""
    model = backbone("t5")
    filled(dt.attach(model, FLAT, head=None))
    ours = states(model, "t5")
    torch.testing.assert_close(ours, golden("t5", "prefix_flat_unmoved"), rtol=0, atol=TOLERANCE)
    assert (ours - golden("t5", "prefix_flat")).abs().max() > 0.1
