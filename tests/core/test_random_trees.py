"""Random trees of random methods keep what every method keeps, or are refused whole with one clear error.

Drawn from a seed, three levels deep at most; a few in the default suite, 300 in the slow one.
"""

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import BEDS, Bed
from deltatune.contract.checks import State, Trial, close, far, perturb
from deltatune.core.compose import Leaf, Node, Tree
from deltatune.core.method import METHODS, Method

BEDS_HERE = [BEDS["attention-bert"], BEDS["attention"]]  # a BERT and a Llama of two layers
NODES: list[Any] = [dt.Stack, dt.Sum, dt.Average, dt.Gate, dt.Mixture, dt.Fuse, dt.Route]
PLACES = ["q,v", "q,k,v,o", "mlp.down", "mlp", "norm", "block", "attn.o,mlp.up"]
N_FEW, N_MANY = 12, 300


def plain(method: type[Method]) -> bool:
    return bool(
        method.__module__.startswith("deltatune.")
        and not (method.in_place or method.sources and method.needs_sources or method.helper)
        and not method.kinds <= {"experts", "router", "conv2d"}
    )


CARDS = [m for n, m in sorted(METHODS.items()) if plain(m) and n != "lst"]  # beside it no gradient enters the backbone


def leaf(draw: random.Random, bed: Bed) -> Leaf:
    """A method with its defaults cut to the small layers; at a place of its own, or at one of the list where it can sit there."""
    method = draw.choice(CARDS)
    made = Trial(method, bed, torch.float32).leaf()
    if method.kinds & {"linear"} and draw.random() < 0.5:
        places = ["q,v", "q,k,v,o", "mlp.down", "attn.o,mlp.up"]
        return dt.core.compose.placed(made, draw.choice(places), None)  # type: ignore[return-value]
    return made


def tree_of(draw: random.Random, bed: Bed, depth: int = 3) -> Tree:
    if depth == 1 or depth < 3 and draw.random() < 0.4:
        return leaf(draw, bed)
    node = draw.choice(NODES)
    children = [tree_of(draw, bed, depth - 1) for _ in range(draw.choice((1, 2, 2, 3)))]
    hyper: dict[str, Any] = {}
    if node in (dt.Gate, dt.Mixture):
        hyper["by"] = draw.choice(("token", "sequence", "constant", "task"))
    if node is dt.Mixture and len(children) > 1 and draw.random() < 0.3:
        hyper["top_k"] = len(children) - 1
    return node(*children, **hyper)  # type: ignore[no-any-return]


def nodes(tree: Tree) -> list[Node]:
    return [] if isinstance(tree, Leaf) else [tree, *(n for c in tree.children for n in nodes(c))]


def own(model: nn.Module, tree: Tree, n_rows: int) -> dict[str, Tensor]:
    """Task 0 for each row, and its rows' children in turn where there is a Route."""
    wanted = model.__dict__["_deltatune"].frame.wanted
    found = {name: torch.zeros(n_rows, dtype=torch.long) for name in wanted}
    if "adapter_ids" in wanted:
        least = min(len(n.children) for n in nodes(tree) if isinstance(n, dt.Route))
        found["adapter_ids"] = torch.arange(n_rows) % least
    return found


def out(model: nn.Module, batch: dict[str, Tensor], **more: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(**batch, **more)[0]  # type: ignore[no-any-return]


def tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What it gave, or None and the text of its ValueError."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error)


class Counts(dict[str, int]):
    """How often each thing was seen."""

    def add(self, what: str) -> None:
        self[what] = self.get(what, 0) + 1


def holds(seed: int, counts: Counts, folder: Path, graph: bool) -> None:
    """One draw. Raises AssertionError where something does not hold."""
    draw = random.Random(seed)
    bed = draw.choice(BEDS_HERE)
    tree = tree_of(draw, bed)
    assert dt.core.compose.tree_from_dict(tree.to_dict(), METHODS) == tree
    model = bed.model()
    batch, before = bed.batch(), State(model)
    plain_out = out(model, batch)
    torch.manual_seed(seed)
    adapter, said = tried(lambda: dt.attach(model, tree, head=None))
    if adapter is None:
        sites = (s.name for s in dt.core.site.all_sites(model) if s.name)
        known = ["where", *sites, *(leaf.method.name for _, leaf in tree.leaves())]
        assert any(name in said for name in known) and len(said) > 20, f"{tree}: {said}"
        before.restored(model)
        counts.add("refused at attach")
        return
    more = own(model, tree, 4)
    got, said = tried(lambda: out(model, batch, **more))
    if got is None:  # what only a batch can say: rows whose adapters put different things in front
        assert re.search(r"rows of one batch|put no tokens in front|dropout needs|works on|inside works", said), (
            f"{tree}: {said}"
        )
        adapter.detach()
        before.restored(model)
        counts.add("refused at the batch")
        return
    counts.add("ran")
    methods = [leaf.method for _, leaf in tree.leaves() if leaf.method.name in METHODS]
    if not any("identity" in m.exceptions or m.has_tokens or m.has_kv or m.has_embed for m in methods):
        close(got, plain_out, 1e-4, f"{tree} at its start")
        counts.add("identity")
    perturb(adapter, 0.05)
    moved = out(model, batch, **more)
    model.train()
    out(model, batch, **more).square().mean().backward()
    model.eval()
    routed = any(isinstance(n, dt.Route) for n in nodes(tree)) or any("top_k" in repr(n) for n in nodes(tree))
    for name, p in adapter.named_parameters():
        assert routed or p.grad is not None or not p.numel(), f"{tree}: {name} has no gradient"
        assert p.grad is None or bool(torch.isfinite(p.grad).all()), f"{tree}: the gradient of {name} is not finite"
    if not any("rows" in m.exceptions for m in methods):
        each = [
            out(model, {k: v[i : i + 1] for k, v in batch.items()}, **{k: v[i : i + 1] for k, v in more.items()})
            for i in range(4)
        ]
        assert far(torch.cat(each), moved) < 1e-4, f"{tree}: rows depend on each other"
    adapter.save(folder, resumable=True)
    other = bed.model()
    dt.load(other, folder)
    assert torch.equal(out(other, batch, **more), moved), f"{tree}: another output after loading"
    if graph and not any("graph" in m.exceptions for m in methods):
        torch._dynamo.reset()
        compiled: Any = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        with torch.no_grad():
            close(compiled(**batch, **more)[0], moved, 1e-4, f"{tree} compiled")
        counts.add("one graph")
    if adapter.mergeable:
        adapter.merge()
        close(out(model, batch), moved, 1e-3, f"{tree} merged")
        adapter.unmerge()
        counts.add("merged")
    else:
        with pytest.raises(ValueError, match="merge"):
            adapter.merge()
    adapter.detach()
    before.restored(model)


def run(n: int, every: int, folder: Path) -> Counts:
    counts, wrong = Counts(), []
    for seed in range(n):
        try:
            holds(seed, counts, folder / str(seed), graph=seed % every == 0)
        except Exception as error:
            wrong.append(f"{seed}: {type(error).__name__}: {error}"[:600])
    assert not wrong, "\n".join(wrong)
    return counts


def test_a_few(tmp_path: Path) -> None:
    counts = run(N_FEW, 13, tmp_path)
    assert counts["ran"] > N_FEW / 4, counts


@pytest.mark.slow
def test_many(tmp_path: Path) -> None:
    counts = run(N_MANY, 1, tmp_path)
    print(counts)
    assert counts["ran"] > N_MANY / 4 and counts["identity"] > 10 and counts["merged"] > 10, counts
