"""Random trees of random methods keep what every method keeps, or are refused whole with one clear error.

Drawn from a seed, three levels deep at most, of every method and preset of the registry, every node and saved parts; a few
in the default suite, 300 in the slow one, where each method has to run.
"""

import copy
import functools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.contract.beds import VOCAB, WIDE, WIDTH, Bed
from deltatune.contract.checks import State, Trial, close, far, perturb, same
from deltatune.core.adapter import Adapter
from deltatune.core.compose import NODES, PRESETS, Leaf, Mixing, Per, Preset, Tree, below, tree_from_dict
from deltatune.core.method import METHODS, Method
from deltatune.core.mixed import MIXERS, Mixer
from deltatune.core.site import Site, all_sites, sites
from deltatune.methods.side import Side
from deltatune.methods.vectors import Vectors

N_FEW, N_MANY, N_ROWS = 12, 300, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": 2, "pad_token_id": None,
    "num_attention_heads": 4, "max_position_embeddings": 256, "use_cache": False,
}  # fmt: skip


def bert() -> nn.Module:
    """An encoder with a task head: its norms end its blocks, its matrices have biases."""
    return BertForTokenClassification(BertConfig(num_labels=5, **SIZES))


def llama() -> nn.Module:
    """A decoder with an output layer: grouped heads, no bias."""
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


@functools.cache
def built(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, equal each time; its norms and biases are no ones and zeros, its blocks move what goes in."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        model = build().eval()
        for key, p in model.named_parameters():
            p.data.mul_(3.0 if p.ndim > 1 and "embed" not in key else 1.0)
            p.data.add_(0.1 * torch.randn_like(p) if p.ndim == 1 else 0.0)
        model(input_ids=torch.tensor([[1]]), output_hidden_states=True)  # transformers notes it on the model for good
    return model


@dataclass(frozen=True)
class Place(Bed):
    """One of the two models, and where on it a method is drawn: its default place, or another one."""

    kinds: frozenset[str] = frozenset()

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(built(self.build))

    def sites(self) -> tuple[Site, ...]:
        return sites(built(self.build), self.where, None, self.kinds)

    def takes(self, method: type[Method], layers: Any = None) -> bool:
        """Does the method find a site here?"""
        found, _ = tried(lambda: sites(built(self.build), self.where, layers, self.kinds))
        return any(method.fits(method.configure(), site) for site in found or ())

    def batch(self, dtype: torch.dtype = torch.float32, n_rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
        """Every token occurs once: none of a table's rows is left out."""
        ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed)).view(n_rows, -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


HERE = [Place("bert", "linear", bert), Place("llama", "linear", llama)]
PLACES = {
    "linear": ("q,v", "q,k,v,o", "mlp.down", "attn.o,mlp.up", "all-linear"),
    "span": ("mlp", "attn", "mlp+norm"),
    "norm": ("norm", "mlp_norm|attn_norm"),
    "block": ("block",),
    "embedding": ("embed",),
    "attention": ("attn",),
}
LEFT_OUT = {n: "it trains the base itself, and is no part of a tree" for n, m in METHODS.items() if m.in_place}
DRAWN: list[type[Method] | Preset] = [
    m
    for n, m in sorted({**METHODS, **PRESETS}.items())
    if n not in LEFT_OUT and (isinstance(m, Preset) or m.__module__.startswith("deltatune."))
    if not (m.quantised or m.rebases)  # on codes alone, and these homes are plain
]
REASONS = {  # why a tree is refused, each in words that say what to do
    "no mean": r"cannot meet in average: keys, values and tokens that were learned have no mean",
    "no common word": r"cannot meet in (sum|stack|average): .* has no fold, and not all work on the output alone; put them",
    "one weight a row": r"weighs each token, and what stands in front of a row has one weight; use by=",
    "no gradient beside": r"would not be trained, since beside .* no gradient enters the backbone; attach them as two",
    "on the weight around activations": r"works on the weight, and cannot stand around .* put it in front of",
    "input of a sub-layer": r"cannot be mixed here: one changes the input of a sub-layer",
    "not in front": r"soft tokens among the input cannot be mixed by",
    "a method's own place": r"kernel_mix updates each head's values by its keys: with attn.v, where must name attn.k too",
    "too few layers for a share": r"layers='.*' holds the middle of no layer: this backbone has 2 layers",
    "shared and frozen": r"for all of its sites at once; it cannot be frozen",
    "a side network without its end": r"what .* reads here would reach no output, since it does not stand at the last block",
    "inside a layer of its own": r"would have no effect, since .* around it has a weight of its own in the place of the layer's",
    "a width that does not divide": r"n = \d+ must divide r = \d+ and d_out = \d+, as \d+ does",
}
IN_TRAINING = {
    "dropout on the weight": r"its dropout needs the activations, but .* works on the weight; set dropout to 0 in .*, or",
    "skills on the weight": r"draws each row's skills while it trains, but .* works on the weight; attach the other at",
}
AT_THE_BATCH = {  # what only a call can say
    "x_lora beside soft tokens": r"x_lora has scalings for the model's .* tokens, and here .* come in; soft tokens .* have none",
    "other lengths in front": r"rows of one batch cannot have \[.*\] learned tokens in front; their adapters need one length",
    "none in front": r"the rows of adapter_ids .* put no tokens in front here and others of this batch do; run them apart",
}


class Draw(random.Random):
    """What is drawn, and the names of the methods and presets in it; `first` is the first of them where it is given."""

    def __init__(self, seed: int, folder: Path, first: type[Method] | Preset | None) -> None:
        super().__init__(seed)
        self.seed_drawn, self.folder, self.first = seed, folder, first
        self.names: list[str] = []
        self.folds = self.random() < 0.25 and first is None  # of what merges alone, which else hardly a tree would be


def leaf(draw: Draw, home: Place) -> Tree:
    """A method with its defaults cut to the small layers, at its own place or another; or a preset with its own places."""
    method = draw.first or draw.choice([m for m in DRAWN if m.mergeable()] if draw.folds else DRAWN)
    draw.first = None
    if isinstance(method, Preset):
        own = METHODS.get(method.sources)
        draw.names.append(method.name)
        return Trial(method, replace(home, where=own.where, kinds=own.kinds) if own else home, torch.float32).leaf()
    source = METHODS[method.sources] if method.sources and method.needs_sources else None
    others = [p for k in sorted(method.kinds) if source is None for p in PLACES.get(k, ())]
    spots = [replace(home, where=w, kinds=method.kinds) for w in (method.where, *others)]
    spots = [spot for spot in spots if spot.takes(method)]
    if not spots:  # no head, no output layer
        return leaf(draw, home)
    draw.names.append(method.name)
    spot = spots[0] if draw.random() < 0.5 else draw.choice(spots)
    made = Trial(
        method, replace(home, where=source.where, kinds=source.kinds) if source else spot, torch.float32
    ).leaf()
    where: Any = spot.where if spot.where != method.where else None
    if where == "q,v" and "r" in method.Config.__dataclass_fields__ and draw.random() < 0.3:
        where = Per((("q", (("r", 2),)), ("v", ())))
    layers = draw.choice((0, -1, (1,), "1/2-1")) if draw.random() < 0.2 else None
    return replace(made, where=where, layers=layers if spot.takes(method, layers) else None)


def tree_of(draw: Draw, home: Place, depth: int = 3) -> Tree:
    if depth < 3 and draw.random() < 0.1:
        return kept(draw, home, tree_of(draw, home, depth - 1) if depth > 1 else leaf(draw, home))
    if depth == 1 or depth < 3 and draw.random() < 0.4:
        return leaf(draw, home)
    node: Any = draw.choice([n for n in NODES.values() if not (draw.folds and n in (dt.Fuse, dt.Route))])
    children = [tree_of(draw, home, depth - 1) for _ in range(draw.choice((1, 2, 2, 3)))]
    hyper: dict[str, Any] = {}
    known = MIXERS[node.by].Config.__dataclass_fields__ if issubclass(node, Mixing) else {}
    if "by" in known:
        hyper["by"] = "constant" if draw.folds else draw.choice(("token", "sequence", "constant", "task"))
    if "top_k" in known and len(children) > 1 and draw.random() < 0.3:
        hyper["top_k"] = len(children) - 1
    return node(*children, **hyper)  # type: ignore[no-any-return]


def kept(draw: Draw, home: Place, tree: Tree) -> Tree:
    """The tree as a part that was saved, its values moved, or itself where it cannot stand alone."""
    model, folder = home.model(), draw.folder / f"part {len(list(draw.folder.glob('part*')))}"
    torch.manual_seed(draw.seed_drawn)
    adapter, _ = tried(lambda: dt.attach(model, tree, head=None))
    if adapter is None:
        return tree
    perturb(adapter, 0.05).save(folder)
    part = dt.saved(folder, frozen=draw.random() < 0.5)
    other = home.model()
    again, said = tried(lambda: dt.attach(other, part, head=None))
    assert again is not None or "it cannot be frozen" in said, f"{tree}, saved: {said}"
    if again is not None:
        same_values(again, adapter, f"{tree}, saved")
    return part  # type: ignore[no-any-return]


def same_values(got: Adapter, want: Adapter, what: str) -> None:
    """The tensors of a part from a file are those of its file, as they are once training is over."""
    kept = want.finished()[1]
    held = got.state_dict()
    assert held.keys() == kept.keys(), f"{what}: {held.keys() ^ kept.keys()}"
    for name, tensor in held.items():
        same(tensor, kept[name], f"{what}: {name}")


def tried(make: Callable[[], Any], kind: type[Exception] = ValueError) -> tuple[Any, str]:
    """What it gave, or None and the text of its error."""
    try:
        return make(), ""
    except kind as error:
        return None, str(error)


def runs(tree: Tree, ids: frozenset[int], path: str = "") -> dict[str, frozenset[int]]:
    """Of each leaf, under which of the rows' `adapter_ids` it runs."""
    if isinstance(tree, Leaf):
        return {path or "0": ids}
    found: dict[str, frozenset[int]] = {}
    for i, child in enumerate(tree.children):
        found |= runs(child, ids & {i} if isinstance(tree, dt.Route) else ids, below(path, i))
    return found | ({below(path, len(tree.children)): ids} if isinstance(tree, Mixing) else {})


def nodes(tree: Tree, path: str = "") -> dict[str, Any]:
    """The nodes of the tree by path."""
    found: dict[str, Any] = {} if isinstance(tree, Leaf) else {path: tree}
    for i, child in enumerate(() if isinstance(tree, Leaf) else tree.children):
        found |= nodes(child, below(path, i))
    return found


def why(said: str, reasons: dict[str, str], names: set[str], places: set[str], tree: Tree) -> str:
    """The one reason that an error gives; it names the place and a method of the tree."""
    found = next((reason for reason, words in reasons.items() if re.search(words, said)), None)
    assert found is not None, f"{tree}: no reason that is known: {said}"
    if "layers=" not in said:  # which is the place that is wrong
        assert any(name in said for name in names), f"{tree}: no method is named: {said}"
        assert any(place in said for place in places), f"{tree}: no place is named: {said}"
    return found


def out(model: nn.Module, batch: dict[str, Tensor], **more: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(**batch, **more)[0]  # type: ignore[no-any-return]


def may_stand_still(delta: Method, name: str, tree: Tree, n_children: int) -> bool:
    """May the gradient of this tensor be zero? What the method says, and what no mixer of so many children can do otherwise."""
    side = [path for path, leaf in tree.leaves() if issubclass(leaf.method, Side)]
    rare = [path for path, node in nodes(tree).items() if isinstance(node, Mixing) and node.hyper().get("top_k")]
    if any(not path or f"{delta.path}.".startswith(f"{path}.") for path in rare) or rare and isinstance(delta, Mixer):
        return True  # a child that is never among the k, and what weighs it
    routed = [path for path, node in nodes(tree).items() if isinstance(node, dt.Route)]
    under = [any(not r or f"{p}.".startswith(f"{r}.") for r in routed) for p in (delta.path, *side)]
    if under[0] and any(under[1:]):
        return True  # its rows may be those that run a side network, beside which nothing trains
    if not isinstance(delta, Mixer):
        return name.rpartition(".")[2] in delta.still
    if delta.name == "attention":  # one score has a share of 1, and a shift of all moves no share
        return n_children < 2 and name != "v" or n_children < 1 or name == "k_bias"
    return n_children < 1 or delta.name == "softmax" and delta.n == 1


def changes_output(delta: Method) -> bool:
    """Or does it only look at it: a side network before the last block, a kernel mix at the keys, BitDelta where nothing moved?

    A bias of the keys moves no softmax.
    """
    has_tensors = any(t.numel() for t in (*delta.parameters(), *delta.buffers())) or bool(delta.__dict__["_bank"][1])
    if isinstance(delta, Vectors) and delta.site.role == "attn.k":
        return False
    return has_tensors and (not isinstance(delta, Side) or delta.seals)


def check_gradients(model: nn.Module, tree: Tree, batch: dict[str, Tensor], more: dict[str, Tensor], least: int) -> str:
    """Every tensor of a leaf that some row runs has a finite gradient, not zero; one of a leaf that none runs has none.

    Or the error that training was refused with.
    """
    (adapter,) = dt.adapters(model).values()
    model.train()
    for i in range(least):
        own = {k: torch.full_like(v, i) if k == "adapter_ids" else v for k, v in more.items()}
        got, said = tried(functools.partial(out, model, batch, **own))
        if got is None:
            model.eval()
            return said
        loss = (got - torch.randn(got.shape, generator=torch.Generator().manual_seed(1))).square().mean()
        if loss.requires_grad:  # else all that runs is frozen
            loss.backward()
    model.eval()
    running = runs(tree, frozenset(range(least)))
    shared: dict[str, bool] = {}
    for (path, site), delta in adapter.deltas.items():
        does_run = bool(running.get(path, True))
        for key, slot in delta.slots_of(delta.config).items():
            if slot.shared and slot.train:
                name = delta.__dict__["_bank"][1][key]
                moves = does_run and not may_stand_still(delta, key, tree, 1)
                shared[name] = shared.get(name, False) or moves
        node = path.rpartition(".")[0]
        children = {
            p.removeprefix(f"{node}.").partition(".")[0]
            for (p, s), d in adapter.deltas.items()
            if s == site
            and p.startswith(f"{node}." if node else "")
            and not isinstance(d, Mixer)
            and running.get(p)
            and changes_output(d)
        }
        for name, p in delta.named_parameters():
            what = f"{tree}: the gradient of {path} {site} {name}"
            if p.grad is None or not p.numel():
                assert not does_run or not p.numel(), f"{what} is missing"
                continue
            assert bool(torch.isfinite(p.grad).all()), f"{what} is not finite"
            moves = bool(p.grad.any())
            assert moves or not does_run or may_stand_still(delta, name, tree, len(children)), f"{what} is zero"
            assert does_run or not moves, f"{what} is not zero, and no row runs it"
    for name, p in adapter.bank.named_parameters() if adapter.bank is not None else ():
        assert p.grad is not None and bool(p.grad.any()) or not shared[name], (
            f"{tree}: the shared {name} has no gradient"
        )
    odd = [
        n for n, p in model.named_parameters() if p.grad is not None and all(p is not q for q in adapter.parameters())
    ]
    assert not odd, f"{tree}: {odd} have gradients"
    return ""


def holds(
    seed: int, counts: Counter[str], folder: Path, graph: bool, first: type[Method] | Preset | None = None
) -> None:
    """One draw. Raises AssertionError where something does not hold."""
    folder.mkdir()
    draw = Draw(seed, folder, first)
    home = draw.choice(HERE)
    tree = tree_of(draw, home)
    assert tree_from_dict(tree.to_dict(), METHODS) == tree
    model, batch = home.model(), home.batch()
    before, plain_out = State(model), out(model, batch)
    leaves = dict(tree.leaves())
    names = {leaf.method.name for leaf in leaves.values()}
    places = {"the model", *(s.name for s in all_sites(model) if s.name)}
    torch.manual_seed(seed)
    adapter, said = tried(lambda: dt.attach(model, tree, head=draw.choice((None, "auto"))))
    if adapter is None:
        counts[f"refused at attach: {why(said, REASONS, names, places, tree)}"] += 1
        before.restored(model)
        same(out(model, batch), plain_out, "the output after a refusal")
        return
    routes = [n for n in nodes(tree).values() if isinstance(n, dt.Route)]
    least = min((len(n.children) for n in routes), default=1)
    wanted = model.__dict__["_deltatune"].frame.wanted
    assert ("adapter_ids" in wanted) == bool(routes)
    more = {name: torch.zeros(N_ROWS, dtype=torch.long) for name in sorted(wanted)}
    if routes:
        more["adapter_ids"] = torch.arange(N_ROWS) % least
        more["adapter_ids"][-1] = draw.choice((-1, 0))
    got, said = tried(lambda: out(model, batch, **more))
    if got is None:
        counts[f"refused at the batch: {why(said, AT_THE_BATCH, names, places, tree)}"] += 1
        if not routes:
            adapter.detach()
            before.restored(model)
            return
        more["adapter_ids"] = torch.zeros(N_ROWS, dtype=torch.long)
        got = out(model, batch, **more)
    counts["ran"] += 1
    counts.update({f"with {name}": 1 for name in draw.names})
    starts_there = not any("identity" in n.method.exceptions or n.start is not None for n in leaves.values())
    if starts_there and not any(d.has_kv or d.has_tokens for d in adapter.deltas.values()):
        close(got, plain_out, 1e-4, f"{tree} at its start")
        counts["identity"] += 1
    perturb(adapter, 0.05)
    moved = out(model, batch, **more)
    now = runs(tree, frozenset(more["adapter_ids"].tolist()) if routes else frozenset({0}))
    if any(now.get(path, True) and list(d.parameters()) for (path, _), d in adapter.deltas.items()):
        assert far(moved, got) > 1e-7, f"{tree}: its values move no output"
    if adapter.parameters():
        said = check_gradients(model, tree, batch, more, least)
        if said:
            counts[f"refused in training: {why(said, IN_TRAINING, names, places, tree)}"] += 1
        else:
            counts["gradients"] += 1
    same(out(model, batch, **more), moved, f"{tree}: the output after a backward")
    each = []
    for i in range(N_ROWS):
        row, own = ({k: v[i : i + 1] for k, v in given.items()} for given in (batch, more))
        each.append(out(model, row, **own))
    assert far(torch.cat(each), moved) < 1e-4, f"{tree}: rows depend on each other"
    with torch.no_grad():  # torch has another kernel for some products where no factor needs a gradient
        quiet = out(model, batch, **more)
        for resumable in (True, False):
            adapter.save(folder / f"saved {resumable}", resumable=resumable)
            other = home.model()
            loaded = dt.load(other, folder / f"saved {resumable}")
            same(out(other, batch, **more), quiet, f"{tree}: the output after loading, resumable={resumable}")
    want = adapter.finished()[1]
    assert loaded.state_dict().keys() == want.keys()
    for name, tensor in loaded.state_dict().items():
        same(tensor, want[name], f"{tree}: {name} after loading")
    if graph and not any("graph" in leaf.method.exceptions for leaf in leaves.values()):
        torch._dynamo.reset()
        compiled: Any = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        with torch.no_grad():
            got, said = tried(lambda: out(compiled, batch, **more), RuntimeError)
        if got is None:
            words = "rows without learned tokens in front cannot run in a graph where another row's child has some"
            assert words in said, f"{tree} compiled: {said}"
            counts["one graph: refused, since other rows have tokens in front"] += 1
        else:
            close(got, moved, 1e-4, f"{tree} compiled")
            counts["one graph"] += 1
    folds = [d.is_constant if isinstance(d, Mixer) else d.has_fold for d in adapter.deltas.values()]
    assert adapter.mergeable == all(folds), f"{tree}: mergeable is {adapter.mergeable}"
    if adapter.mergeable:
        adapter.merge()
        close(out(model, batch), moved, 1e-3, f"{tree} merged")
        adapter.unmerge()
        counts["merged"] += 1
    else:
        with pytest.raises(ValueError, match="cannot be merged: it defines no fold"):
            adapter.merge()
    same(out(model, batch, **more), moved, f"{tree}: the output after merge and unmerge")
    adapter.detach()
    for p in model.parameters():
        p.grad = None
    before.restored(model)


def run(n: int, every: int, folder: Path) -> Counter[str]:
    counts, wrong = Counter[str](), []
    for seed in range(n):
        try:
            holds(seed, counts, folder / str(seed), graph=seed % every == 0)
        except Exception as error:
            wrong.append(f"{seed}: {type(error).__name__}: {error}"[:600])
    assert not wrong, "\n".join(wrong)
    return counts


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_what_trains_the_base_is_no_part_of_a_tree(name: str) -> None:
    model = HERE[0].model()
    before = State(model)
    with pytest.raises(ValueError, match=f"{name} trains the base itself; it cannot be part of a tree"):
        dt.attach(model, dt.Sum(dt.LoRA(), METHODS[name]()))
    before.restored(model)


def alone(method: type[Method] | Preset, home: Place) -> bool:
    """Can it stand on this model at all?"""
    if method.sources and method.needs_sources:
        return True
    spot = home if isinstance(method, Preset) else replace(home, where=method.where, kinds=method.kinds)
    adapter, _ = tried(lambda: dt.attach(home.model(), Trial(method, spot, torch.float32).leaf(), head=None))
    return adapter is not None


def test_a_few(tmp_path: Path) -> None:
    counts = run(N_FEW, 13, tmp_path)
    assert counts["ran"] > N_FEW / 4, counts


@pytest.mark.slow
def test_many(tmp_path: Path) -> None:
    counts = run(N_MANY, 1, tmp_path)
    print("\n".join(f"{n:4} {what}" for what, n in sorted(counts.items())))
    assert counts["ran"] > N_MANY / 4 and counts["identity"] > 10 and counts["merged"] > 10, counts
    for n, method in enumerate(DRAWN):
        if not any(alone(method, home) for home in HERE):  # images' alone, or deeper models'
            continue
        for k in range(20):  # until it ran, where chance did not bring it or each of its trees was refused
            if not counts[f"with {method.name}"]:
                seed = N_MANY + 20 * n + k
                holds(seed, counts, tmp_path / str(seed), True, method)
        assert counts[f"with {method.name}"], f"{method.name} ran in no tree"
