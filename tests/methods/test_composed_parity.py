"""Several adapters at once as AdapterHub's `adapters` computes them, on the same weights: states, and every gradient.

Its UniPELT gates are means over all positions, so the golden rows have no padding, and so is LoRA's gate there, where the
paper's repository and the preset have the token's own: the tree here has `by="sequence"` in that one place.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.core.compose import Node, Tree
from deltatune.core.method import Method
from deltatune.methods.mixers import AttentionMixer, GateMixer

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_adapters_composed.py"))
fill, backbone, batch, R, R_OTHER = (MAKE[k] for k in ("fill", "backbone", "batch", "R", "R_OTHER"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))

ATOL = 1e-9
PLACES = {"block": "mlp", "post_norm": "mlp"}
NAMES = {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias"}
NAMES |= {"inner": "inner.weight", "inner_bias": "inner.bias", "outer": "outer.weight", "outer_bias": "outer.bias"}
NAMES |= {"g": "gate.weight", "offset": "gate.bias"}
NAMES |= {"q": "query.weight", "q_bias": "query.bias", "k": "key.weight", "k_bias": "key.bias", "v": "value.weight"}


def bottleneck(r: int = R) -> Tree:
    return dt.pfeiffer(r=r)


def unipelt() -> Tree:
    """The preset, with adapters' mean over the row for LoRA's gate too."""
    tree = dt.unipelt(n=MAKE["P"], mid=MAKE["MID"], r=R, rank=R)
    assert isinstance(tree, Node)
    prefix, adapter, lora = tree.children
    assert isinstance(lora, dt.Gate) and lora.hyper()["by"] == "token"
    return dt.Sum(prefix, adapter, dt.Gate(*lora.children, by="sequence"))


def pair(node: Any, child: Tree, other: Tree | None = None) -> Tree:
    return node(child, child if other is None else other)  # type: ignore[no-any-return]


LORA, PREFIX = dt.LoRA(r=R, alpha=MAKE["ONE"]["ALPHA"]), dt.PrefixTuning(n=MAKE["P"])
SPLIT, PARALLEL = [0, 1, 1], [0, 0, 0, 1, 1, 1]
# case -> tree, which rows run which child, and whose tensors a leaf's are, by its path; of a fusion nothing else is trained
CASES: dict[str, tuple[Tree, list[int] | None, dict[str, str]]] = {
    "unipelt": (unipelt(), None, {f"{i}.{k}": "a" for i in range(3) for k in range(2)}),
    "fuse_2": (pair(dt.Fuse, bottleneck(), bottleneck(R_OTHER)), None, {"0": "a", "1": "b", "2": ""}),
    "fuse_3": (
        dt.Fuse(bottleneck(), bottleneck(R_OTHER), bottleneck()),
        None,
        {"0": "a", "1": "b", "2": "c", "3": ""},
    ),
    "stack": (pair(dt.Stack, bottleneck(), bottleneck(R_OTHER)), None, {"0": "a", "1": "b"}),
    "average": (pair(dt.Average, bottleneck(), bottleneck(R_OTHER)), None, {"0": "a", "1": "b"}),
    "average_lora": (pair(dt.Average, LORA), None, {"0": "a", "1": "b"}),
    "stack_prefix": (pair(dt.Stack, PREFIX), None, {"0": "a", "1": "b"}),
    "split": (pair(dt.Route, bottleneck()), SPLIT, {"0": "a", "1": "b"}),
    "split_other": (pair(dt.Route, bottleneck(), bottleneck(R_OTHER)), SPLIT, {"0": "a", "1": "b"}),
    "parallel": (pair(dt.Route, bottleneck()), PARALLEL, {"0": "a", "1": "b"}),
    "split_prefix": (pair(dt.Route, PREFIX), SPLIT, {"0": "a", "1": "b"}),
    "split_lora": (pair(dt.Route, LORA), SPLIT, {"0": "a", "1": "b"}),
    # adapters scales what the MLP's first matrix gives, before the activation
    "split_ia3": (pair(dt.Route, dt.IA3(where="k,v,mlp.up")), SPLIT, {"0": "a", "1": "b"}),
}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def key_of(delta: Method, slot: str, owner: str) -> str:
    """A tensor's key in the golden file: "a.0.mlp.down.weight", "a.1.attn.q.gate.bias", "a.inner.weight"."""
    role = delta.site.role or ""
    at = "" if slot in ("embedding", "inner", "inner_bias") else f"{delta.site.layer}.{PLACES.get(role, role)}"
    return ".".join(filter(None, (owner, at, NAMES.get(slot, slot))))


def filled(adapter: dt.Adapter, owners: dict[str, str]) -> dict[str, Tensor]:
    """Every tensor by its key, with the golden file's numbers."""
    found: dict[str, Tensor] = {}
    for (path, _), delta in adapter.deltas.items():
        for slot in delta.slots_of(delta.config):
            shared = delta.slots[slot].shared
            found[key_of(delta, slot, owners[path])] = delta.bank_parameter(slot) if shared else getattr(delta, slot)
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return found


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in MAKE["BACKBONES"] for case in CASES if case in GOLDEN[name]]
)
def test_as_adapters_computes(name: str, case: str) -> None:
    tree, ids, owners = CASES[case]
    golden, model = GOLDEN[name][case], backbone(name)
    bare = model(**batch())[0]
    torch.testing.assert_close(bare, exact(GOLDEN[name]["bare"]["states"]), rtol=0, atol=ATOL)
    adapter = dt.attach(model, tree, head=None)
    found = filled(adapter, owners)
    given = batch() if case != "parallel" else {key: torch.cat([rows, rows]) for key, rows in batch().items()}
    seen = model(**given, **({} if ids is None else {"adapter_ids": torch.tensor(ids)}))[0]
    torch.testing.assert_close(seen, exact(golden["states"]), rtol=0, atol=ATOL)
    assert (seen[:3] - bare).abs().amax((1, 2)).min() > 0.1, "a row that no adapter moves would compare nothing"
    loss = (fill("loss", seen.shape) * seen).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=ATOL)
    loss.backward()
    trained = {key: p for key, p in found.items() if not case.startswith("fuse") or not key[0].isalpha()}
    assert trained.keys() == golden["probes"].keys()
    for key, value in probes(trained).items():
        assert value == pytest.approx(golden["probes"][key], abs=ATOL), key
    if "pull" not in golden:
        return
    schedules = dt.Schedules([adapter])
    schedules.begin(torch.optim.AdamW(adapter.groups(1e-4)), 1)
    schedules.before_step(0)
    for key, value in probes(trained).items():
        assert value == pytest.approx(golden["probes"][key] + golden["pull"]["probes"].get(key, 0.0), abs=ATOL), key
    (penalty,) = {d.penalty for d in adapter.deltas.values() if isinstance(d, AttentionMixer)}
    values = [p for key, p in trained.items() if key.endswith("value.weight")]
    far = sum(float((v.detach() - torch.eye(len(v))).square().sum()) for v in values)
    assert penalty * far == pytest.approx(golden["pull"]["penalty"], rel=1e-12)


def probes(found: dict[str, Tensor]) -> dict[str, float]:
    out = {}
    for key, p in found.items():
        assert p.grad is not None, key
        out[key] = float((fill(f"probe of {key}", p.shape) * p.grad).sum())
    return out


@pytest.mark.parametrize("name", MAKE["BACKBONES"])
@pytest.mark.parametrize(("case", "node"), [("stack", dt.Stack), ("average", dt.Average)])
def test_a_node_in_a_split_is_the_node(name: str, case: str, node: Any) -> None:
    """adapters adds the residual stream twice there: its first row is not what its own Stack, or Average, gives alone."""
    model, golden = backbone(name), exact(GOLDEN[name][f"split_{case}"]["states"])
    tree = dt.Route(pair(node, bottleneck(), bottleneck(R_OTHER)), bottleneck())
    filled(dt.attach(model, tree, head=None), {"0.0": "a", "0.1": "b", "1": "c"})
    seen = model(**batch(), adapter_ids=torch.tensor(SPLIT))[0]
    alone = exact(GOLDEN[name][case]["states"])
    torch.testing.assert_close(seen, torch.cat([alone[:1], golden[1:]]), rtol=0, atol=ATOL)
    assert (golden[0] - alone[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", MAKE["BACKBONES"])
def test_adapters_divides_its_average_twice(name: str) -> None:
    """Which is why the golden file has weights of 1 for what a mean is."""
    both = [exact(GOLDEN[name][case]["states"]) for case in ("average", "average_default")]
    assert (both[0] - both[1]).abs().max() > 0.1


def test_adapters_chains_a_stack_of_loras() -> None:
    """The second reads what the first one adds, y + s B2 A2 s B1 A1 x; ours is the chain of folds, y + s B1 A1 x + s B2 A2 x."""
    golden, model = exact(GOLDEN["bert"]["stack_lora"]["states"]), backbone("bert")
    adapter = dt.attach(model, pair(dt.Stack, LORA), head=None)
    filled(adapter, {"0": "a", "1": "b"})
    assert (model(**batch())[0] - golden).abs().max() > 0.1
    chain = backbone("bert")
    with torch.no_grad():
        for (path, site), second in adapter.deltas.items():
            if path == "1":
                first: Any = adapter.deltas["0", site]
                scale = first.alpha / first.r
                chain.get_submodule(site).weight += scale**2 * second.b @ second.a @ first.b @ first.a
        torch.testing.assert_close(chain(**batch())[0], golden, rtol=0, atol=ATOL)


@pytest.mark.parametrize("by", ["sequence", "token"])
def test_a_gate_of_unipelt(by: str) -> None:
    """The mean over a row's real tokens of sigmoid(g x + c), or each token's own; padding counts for nothing."""
    model = backbone("bert")
    adapter = dt.attach(model, dt.Gate(LORA, by=by), layers=1, where="q", head=None)
    filled(adapter, {"0": "a", "1": "a"})
    (gate,) = [d for d in adapter.deltas.values() if isinstance(d, GateMixer)]
    (lora,) = [d for d in adapter.deltas.values() if isinstance(d, dt.LoRA)]
    layer, rows, seen = model.encoder.layer[1].attention.self.query, batch(), []
    rows["attention_mask"][1, 4:] = 0
    layer.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    model(**rows)
    x, y = seen
    each = torch.sigmoid(x @ gate.g[0] + gate.offset)[..., None]
    real = rows["attention_mask"][..., None]
    weight = each if by == "token" else (each * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    change = (x @ lora.a.t() @ lora.b.t()) * lora.alpha / lora.r
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias) + weight * change
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("node", [dt.Route, dt.Fuse])
@pytest.mark.parametrize("child", [dt.IA3(where="k,v"), dt.DoRA(r=R, where="q,v")])
def test_slices_of_a_fused_projection_are_apart(node: Any, child: Tree) -> None:
    """GPT-2's q, k and v, each under a node of its own, whose children work on the weight there."""
    model = backbone("gpt2")
    adapter = dt.attach(model, node(child) if node is dt.Fuse else node(child, child), head=None)
    with torch.no_grad():
        for (path, site), delta in adapter.deltas.items():
            for key, p in delta.named_parameters():
                p.add_(fill(f"{path} {site} {key}", p.shape) / 2)
            if isinstance(delta, AttentionMixer):
                delta.v.copy_(torch.eye(len(delta.v)))  # all of its one child's change
    ids = [0, 0, 0] if node is dt.Fuse else SPLIT
    seen = model(**batch(), **({} if node is dt.Fuse else {"adapter_ids": torch.tensor(ids)}))[0]
    for i in sorted({*ids}):
        alone = backbone("gpt2")
        for (_, site), delta in dt.attach(alone, child, head=None).deltas.items():
            delta.load_state_dict(adapter.deltas[str(i), site].state_dict())
        mine = torch.tensor(ids) == i
        torch.testing.assert_close(seen[mine], alone(**batch())[0][mine], rtol=0, atol=1e-9)
