"""Made of saved adapters: started from them, averaged or merged, and from then on an ordinary adapter.

`sources` are folders that `adapter.save` wrote for this backbone. They are read at attach, and nothing of them is kept.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import files
from ..core.adapter import Adapter
from ..core.compose import Leaf, Tree, preset, tree_from_dict
from ..core.errors import unknown
from ..core.method import METHODS, Method
from ..core.record import HEAD
from ..core.sharded import assign
from ..core.sources import Saved, folders_of, read, targets_of
from .bottleneck import Sequential
from .prompt import PromptTuning

Metric = Literal["average_tokens", "per_token"]
How = Literal["average", "sum"]
TRAINED = "it starts from adapters that were trained"


# SPoT


def similarity(a: Tensor, b: Tensor, metric: Metric = "average_tokens") -> float:
    """cos(mean_i a_i, mean_j b_j) of two prompts (n, D); with "per_token" the mean of cos(a_i, b_j) over all pairs."""
    a, b = a.double(), b.double()
    if metric == "average_tokens":
        return float(F.cosine_similarity(a.mean(0), b.mean(0), dim=0))
    if metric == "per_token":  # the mean of all pairs' products is the product of the means
        return float(F.normalize(a, dim=-1).mean(0) @ F.normalize(b, dim=-1).mean(0))
    raise unknown("metric", metric, Metric.__args__)


def ranked(task: Tensor, prompts: Sequence[Tensor], metric: Metric = "average_tokens") -> list[tuple[int, float]]:
    """(number of the prompt, its similarity to the task's), the most similar first, equal ones in their own order."""
    found = [(i, similarity(prompt, task, metric)) for i, prompt in enumerate(prompts)]
    return sorted(found, key=lambda one: -one[1])


def blended(prompts: Sequence[Tensor], similarities: Sequence[float]) -> Tensor:
    """sum_i a_i P_i with a_i = s_i / sum_j s_j. Raises ValueError where a similarity is not above 0."""
    if min(similarities) <= 0:
        raise ValueError(
            f"prompts are weighted by their similarity to the task, and one of the {len(similarities)} has {min(similarities):.3g}; "
            f"take a smaller k"
        )
    return sum(s / sum(similarities) * prompt.double() for s, prompt in zip(similarities, prompts, strict=True))


@preset(
    "spot",
    paper="2110.07904",
    category="additive",
    lr=(1e-3, 0.3),
    exceptions={"identity": TRAINED},
    sources="prompt_tuning",
    n_sources=1,
)
def spot(
    sources: tuple[str, ...] = (),  # folders of trained prompts, all of one length
    task: str = "",  # folder of a prompt that was trained on the new task for a short while; one source needs none
    k: int = 1,  # how many of the most similar are averaged, each with the share of its similarity
    metric: Metric = "average_tokens",  # similarity: of the mean tokens, or the mean over all pairs of tokens
) -> Tree:
    """X' = [P; X], P at the start the source prompt nearest to the task's, or sum_i a_i P_i over the k nearest."""
    if metric not in Metric.__args__:
        raise unknown("metric", metric, Metric.__args__)
    if not sources:
        return replace(PromptTuning(), start=partial(without, "spot"))
    folders = folders_of("spot", sources)
    if not 1 <= k <= len(folders):
        raise ValueError(f"spot: k = {k}, but it must lie between 1 and the number of sources, {len(folders)}")
    if len(folders) > 1 and not task:
        raise ValueError(
            f"spot has {len(folders)} sources and no task: give it the folder of a prompt that was trained on the new task "
            f"for a short while, or one source alone"
        )
    tree = _tree_in(folders[0])
    if not isinstance(tree, Leaf) or tree.method is not PromptTuning:
        raise ValueError(f"{folders[0]} holds {tree!r}, and spot starts from 'prompt_tuning'")
    return replace(tree, start=partial(_from_prompts, folders, task, k, metric))


def _from_prompts(folders: tuple[str, ...], task: str, k: int, metric: Metric, adapter: Adapter, path: str) -> None:
    saved = read(adapter.model, (*folders, *([task] if task else [])), "prompt_tuning")
    for key, target in targets_of(adapter, path, "0").items():
        for one in saved:
            if key not in one.tensors:
                raise ValueError(f"{one.folder} holds no {key}; its prompt stands elsewhere than that of {folders[0]}")
            (n, d), (want, width) = one.tensors[key].shape, target.shape
            if (n, d) != (want, width):
                raise ValueError(
                    f"{one.folder} holds a prompt of {n} tokens of width {d}, {folders[0]} one of {want} of width {width}"
                )
        prompts = [one.tensors[key] for one in saved[: len(folders)]]
        best = ranked(saved[-1].tensors[key], prompts, metric)[:k]
        chosen = [prompts[i] for i, _ in best]
        with torch.no_grad():
            assign(target, blended(chosen, [s for _, s in best]) if k > 1 else chosen[0])


# AdapterSoup


def nearest(domains: Sequence[Any], target: Any, k: int, least: float = -1.0) -> list[int]:
    """The numbers of the up to k domains whose embedded texts are nearest to the target's, the nearest first.

    `domains` has an array (n, E) of embeddings for each, `target` is (m, E); nearness is the mean of the cosines of all
    pairs, and `least` leaves out what is below it.
    """
    embedded = _embeddings(domains, target)
    near = [similarity(one, embedded[-1], "per_token") for one in embedded[:-1]]
    return _most(near, k, least)


def clustered(
    domains: Sequence[Any], target: Any, k: int, least: float = 0.0, n_dims: int = 50, seed: int = 0
) -> list[int]:
    """The numbers of the up to k domains in whose clusters the most texts of the target lie, the fullest first.

    The domains' texts (arrays (n, E) of embeddings) are fitted by a mixture of as many Gaussians as there are domains, in
    their first `n_dims` principal components; a cluster is the domain's that has most texts in it. `least` leaves out
    domains with a smaller share of the target's texts, and one without any is always left out.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    *texts, new = (one.numpy() for one in _embeddings(domains, target))
    every, n = [row for one in texts for row in one], len(texts)
    if n_dims < len(every[0]):
        pca = PCA(min(n_dims, len(every)), random_state=seed).fit(every)
        texts, new, every = [pca.transform(one) for one in texts], pca.transform(new), pca.transform(every)
    mixture = GaussianMixture(n, random_state=seed).fit(every)
    *held, fresh = (torch.bincount(torch.as_tensor(mixture.predict(one)), minlength=n) for one in (*texts, new))
    owner = torch.stack(held).argmax(0)  # of each cluster
    shares = torch.zeros(n, dtype=torch.double).index_add(0, owner, fresh.double() / len(new))
    return [i for i in _most(shares.tolist(), k, least) if shares[i] > 0]


def averaged(sources: Sequence[Mapping[str, Tensor]], weights: Sequence[float] = ()) -> dict[str, Tensor]:
    """sum_i w_i theta_i of every tensor, the weights divided by their sum; 1 / k each where none are given.

    Raises ValueError where the sources hold other tensors, or whole numbers that differ.
    """
    shares = _shares(weights, len(sources))
    first, found = sources[0], {}
    for i, one in enumerate(sources[1:], 1):
        files.check_keys(f"source {i}", {key: tuple(t.shape) for key, t in first.items()}, one)
    for key, tensor in first.items():
        each = [one[key] for one in sources]
        if tensor.is_floating_point():
            found[key] = sum(w * t.double() for w, t in zip(shares, each, strict=True))
        elif all(torch.equal(t, tensor) for t in each):
            found[key] = tensor
        else:
            raise ValueError(f"{key} holds {tensor.dtype} values that differ from source to source; they have no mean")
    return found


@preset(
    "adapter_soup",
    paper="2302.07027",
    category="additive",
    lr=(3e-4, 5e-3),
    exceptions={"identity": TRAINED},
    sources="sequential",
)
def adapter_soup(
    sources: tuple[str, ...] = (),  # folders of trained adapters, all of one tree; `nearest` or `clustered` choose them
    weights: tuple[float, ...] = (),  # their shares, divided by their sum; equal where none are given
) -> Tree:
    """theta = 1/k sum_i theta_i over k saved adapters of one tree, whichever it is; a task head that all have as well."""
    if not sources:
        return replace(Sequential(), start=partial(without, "adapter_soup"))
    folders = folders_of("adapter_soup", sources)
    _shares(weights, len(folders))
    tree = _tree_in(folders[0])
    return tree.replaced(
        {
            path: replace(leaf, start=partial(_from_soup, folders, tuple(weights), path, i == 0))
            for i, (path, leaf) in enumerate(tree.leaves())
        }
    )


def _from_soup(
    folders: tuple[str, ...], weights: tuple[float, ...], own: str, first: bool, adapter: Adapter, path: str
) -> None:
    saved = read(adapter.model, folders)
    for one in saved[1:]:
        for key in ("tree", "head", "sites", "in_place"):
            if one.card[key] != saved[0].card[key]:
                raise ValueError(
                    f"{one.folder} and {saved[0].folder} have no mean: the {key} of the one is {one.card[key]!r}, "
                    f"of the other {saved[0].card[key]!r}"
                )
    targets = targets_of(adapter, path, own)
    if first and saved[0].card["head"]:
        targets |= targets_of(adapter, HEAD, HEAD)
    drawn = [s for d in adapter.deltas.values() for s in d.slots_of(d.config).values() if s.shared and not s.train]
    if drawn and (seeds := {one.card["seed"] for one in saved} - {adapter.bank.seed}):
        raise ValueError(
            f"its sites share tensors that were drawn from the seed, and sources have the seed {seeds.pop()}, "
            f"this one {adapter.bank.seed}"
        )
    moved = {f"0.{n}": p for n, p in adapter.owned().items()}  # a file has those that training moved
    each = []
    for one in saved:
        theirs = {key: t for key, t in one.tensors.items() if key in targets or key.startswith(f"{own}.")}
        theirs |= {key: one.tensors.get(key, p.detach().cpu()) for key, p in moved.items()}
        files.check_keys(one.folder, {key: tuple(t.shape) for key, t in {**targets, **moved}.items()}, theirs)
        each.append(theirs)
    with torch.no_grad():
        for key, value in averaged(each, weights).items():
            assign({**targets, **moved}[key], value)


# MerA


def transport(one: Tensor, other: Tensor, reg: float = 0.0) -> Tensor:
    """T (n, m), columns that sum to 1: of which neurons of `one` (n, F) each neuron of `other` (m, F) is made.

    The plan of optimal transport between uniform masses; its cost is the Euclidean distance of the neurons' rows, be they
    weights or activations. `reg` is the entropic regularisation, as a share of the largest cost; 0 is the exact plan, which
    for equally many neurons is a permutation.
    """
    try:
        import ot
    except ImportError:
        raise ValueError("merging by optimal transport needs the package POT: pip install 'deltatune[merge]'") from None
    cost = torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    n, m = cost.shape
    mass = torch.full((n,), 1 / n, dtype=torch.double).numpy(), torch.full((m,), 1 / m, dtype=torch.double).numpy()
    if reg:
        plan = ot.sinkhorn(*mass, cost / (cost.max() or 1.0), reg, method="sinkhorn_log", warn=False)
    else:
        plan = ot.emd(*mass, cost, numItermax=1_000_000)
    return torch.as_tensor(plan) / torch.as_tensor(plan).sum(0)


def merged(
    sources: Sequence[Mapping[str, Tensor]],
    neurons: Mapping[str, int],
    how: How = "average",
    reg: float = 0.0,
    activations: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """1/M sum_i T_i theta_i of one site, or their sum: bottlenecks as tensors by name, the first's neurons the reference.

    `neurons` says of each tensor that has them along which of its dimensions; they move there together. The cost is the
    distance of what `down` and its bias give, or of `activations`, one (n, r) for each source. What has no part in the two
    maps (the adapter's own norm) is averaged in either case.
    """
    if how not in How.__args__:
        raise unknown("way to merge", how, How.__args__)
    found = {key: torch.zeros_like(t, dtype=torch.double) for key, t in sources[0].items()}
    rows = [a.T for a in activations] or [_incoming(one, neurons) for one in sources]
    for i, one in enumerate(sources):
        plan = transport(rows[i], rows[0], reg) if i else None
        for key, t in one.items():
            moved = t.double()
            if plan is not None and key in neurons:
                moved = torch.tensordot(moved, plan, ([neurons[key]], [0])).movedim(-1, neurons[key])
            part = how == "sum" and key.startswith(("down", "up"))
            found[key] += moved if part else moved / len(sources)
    return found


def _incoming(one: Mapping[str, Tensor], neurons: Mapping[str, int]) -> Tensor:
    """(r, F): what each neuron weighs its input with, and its bias."""
    down = [one[key].movedim(at, 0) for key, at in neurons.items() if key.startswith("down")]
    return torch.cat([t.reshape(len(t), -1) for t in down], 1)


@preset(
    "mera",
    paper="2308.15982",
    category="additive",
    lr=(3e-4, 5e-3),
    exceptions={"identity": TRAINED},
    sources="sequential",
)
def mera(
    sources: tuple[str, ...] = (),  # folders of trained adapters of one bottleneck method and width
    how: How = "average",  # average or sum of what was aligned
    reg: float = 0.0,  # entropic regularisation, a share of the largest cost; 0: the exact plan
    batches: object = (),  # batches of the model's keywords: the cost is then the distance of activations on them
) -> Tree:
    """D = 1/M sum_i T_i' D_i, U = 1/M sum_i U_i T_i: bottlenecks, their neurons aligned to the first's by transport T_i."""
    if how not in How.__args__:
        raise unknown("way to merge", how, How.__args__)
    if reg < 0:
        raise ValueError(f"mera: reg = {reg}, but it must be 0 or above")
    if not sources:
        return replace(Sequential(), start=partial(without, "MerA"))
    folders = folders_of("mera", sources)
    tree = _tree_in(folders[0])
    if not isinstance(tree, Leaf):
        raise ValueError(f"{folders[0]} holds {tree!r}, and MerA merges adapters of one bottleneck method")
    _neurons(folders[0], tree.method, tree.config)
    if batches and not hasattr(tree.method, "mlp"):
        raise ValueError(
            f"{tree.method.name} does not say what its neurons get; MerA can align it by its weights alone"
        )
    return replace(tree, start=partial(_from_bottlenecks, folders, how, reg, tuple(batches)))


def _neurons(folder: str, method: type[Method], config: Any) -> dict[str, int]:
    """Along which dimension each tensor of a bottleneck method has its neurons."""
    slots = method.slots_of(config)
    dims = {key: slot.shape.split() for key, slot in slots.items()}
    plain = all(s.train and not s.shared for s in slots.values())
    odd = [d for each in dims.values() for d in each if d != "r" and re.search(r"\br\b", d)]
    if not plain or odd or any("r" not in dims.get(key, ()) for key in ("down", "up")):
        raise ValueError(
            f"{folder} holds {method.name!r}, and MerA merges bottlenecks: trained `down` and `up` of width r"
        )
    return {key: each.index("r") for key, each in dims.items() if "r" in each}


def _from_bottlenecks(
    folders: tuple[str, ...], how: How, reg: float, batches: tuple[Any, ...], adapter: Adapter, path: str
) -> None:
    saved = read(adapter.model, folders)
    deltas = {site: delta for (leaf, site), delta in adapter.deltas.items() if leaf == path}
    for one in saved:
        _check_bottlenecks(one, saved[0], deltas)
    theirs = {
        site: [{name: one.tensors[f"0.{site}.{name}"] for name in delta.state_dict()} for one in saved]
        for site, delta in deltas.items()
    }
    seen: list[dict[str, Tensor]] = []
    for i in range(len(saved) if batches else 0):
        for site, delta in deltas.items():
            _write(delta, theirs[site][i])
        seen.append(_activations(adapter, deltas, batches))
    for site, delta in deltas.items():
        neurons = _neurons(folders[0], type(delta), delta.config)
        _write(delta, merged(theirs[site], neurons, how, reg, [one[site] for one in seen]))


def _check_bottlenecks(one: Saved, first: Saved, deltas: Mapping[str, Method]) -> None:
    if one.tree.get("method") != first.tree["method"]:
        got = one.tree.get("method", one.tree.get("op"))
        raise ValueError(
            f"{one.folder} holds {got!r}, {first.folder} {first.tree['method']!r}; MerA merges one method's"
        )
    here, there = set(deltas), set(one.card["sites"]["0"])
    if here != there:
        raise ValueError(
            f"{one.folder} stands at {len(there)} sites, this adapter at {len(here)}; not at both: {min(here ^ there)!r}"
        )
    for site, delta in deltas.items():
        for name, target in delta.state_dict().items():
            t = one.tensors.get(f"0.{site}.{name}")
            if t is not None and t.shape != target.shape:
                at = _neurons(one.folder, type(delta), delta.config).get(name, 0)
                raise ValueError(
                    f"{site}: the bottleneck of {one.folder} has width {t.shape[at]}, that of {first.folder} {target.shape[at]}"
                )
    if one.tree != first.tree:
        other = [k for k, v in one.tree.items() if v != first.tree[k]]
        raise ValueError(
            f"{one.folder} is another tree than {first.folder}: its {other[0]} is {one.tree[other[0]]!r}, not {first.tree[other[0]]!r}"
        )


@torch.no_grad()
def _activations(adapter: Adapter, deltas: Mapping[str, Method], batches: Sequence[Any]) -> dict[str, Tensor]:
    """(n, r) of each site: what its neurons get, before their nonlinearity, at every real token of the batches."""
    heard: dict[str, list[Tensor]] = {site: [] for site in deltas}
    training = adapter.model.training
    with contextlib.ExitStack() as stack:
        for delta in deltas.values():
            stack.enter_context(_listening(delta, heard[delta.site.name]))
        adapter.model.eval()
        try:
            for batch in batches:
                adapter.model(**batch)
                for site, each in heard.items():
                    if not each:
                        raise ValueError(f"{site} does not run on the batches; there are no activations to align it by")
                    mask = batch.get(
                        "decoder_attention_mask" if deltas[site].site.stack == "decoder" else "attention_mask"
                    )
                    if mask is not None and mask.shape == each[-1].shape[:-1]:
                        each[-1] = each[-1][mask.bool()]
        finally:
            adapter.model.train(training)
    return {site: torch.cat([t.flatten(0, -2) for t in each]) for site, each in heard.items()}


@contextlib.contextmanager
def _listening(delta: Method, heard: list[Tensor]) -> Iterator[None]:
    """Let a bottleneck note what its neurons get. Its class is swapped, since casting views look there for functions."""
    plain: Any = type(delta)

    class Listening(plain):
        def mlp(self, h, *args):
            heard.append(F.linear(h, self.down, self.down_bias).double())
            return plain.mlp(self, h, *args)

    delta.__class__ = Listening
    try:
        yield
    finally:
        delta.__class__ = plain


# what they share


def without(name: str, adapter: Adapter, path: str) -> None:
    raise ValueError(f"no source adapters for {name}; give it sources=[folder, ...] of adapters that were saved")


def _tree_in(folder: str) -> Tree:
    """The tree of a saved adapter."""
    card, _ = files.read_adapter(folder)
    try:
        return tree_from_dict(card["tree"], METHODS)
    except ValueError as error:
        raise ValueError(f"{folder}: its tree cannot be read: {error}") from None


def _write(delta: Method, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in delta.state_dict(keep_vars=True).items():
            assign(target, values[name])


def _shares(weights: Sequence[float], n: int) -> list[float]:
    """Weights that sum to 1."""
    weights = list(weights) or [1.0] * n
    if len(weights) != n:
        raise ValueError(f"{len(weights)} weights for {n} sources")
    if sum(weights) <= 0:
        raise ValueError(f"the weights sum to {sum(weights):g}; their sum must be above 0")
    return [w / sum(weights) for w in weights]


def _embeddings(domains: Sequence[Any], target: Any) -> list[Tensor]:
    """All of them as (n, E) in fp64, the target last."""
    found = [torch.atleast_2d(torch.as_tensor(one, dtype=torch.double)) for one in (*domains, target)]
    for i, one in enumerate(found):
        if one.ndim != 2 or one.shape[1] != found[0].shape[1] or not len(one):
            name = "the target" if i == len(domains) else f"domain {i}"
            raise ValueError(f"{name} is {tuple(one.shape)}; embeddings are (texts, {found[0].shape[1]})")
    return found


def _most(values: Sequence[float], k: int, least: float) -> list[int]:
    """Where the up to k largest values are, none below `least`."""
    if not 1 <= k <= len(values):
        raise ValueError(f"k = {k}, but it must lie between 1 and the number of domains, {len(values)}")
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [i for i in order[:k] if values[i] >= least]
