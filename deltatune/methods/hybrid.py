"""Trees with a name: methods that a paper made of others, and well-known settings of one."""

from typing import Any

from ..core.compose import Stack, Sum, Tree, preset
from .baseline import Copy
from .bottleneck import Parallel, Sequential
from .mam_pruning import SParallel, SPrefix, UParallel, UPrefix
from .prefix import PrefixTuning
from .rescale import Hadamard


@preset(
    "mam",
    paper="2110.04366",
    category="hybrid",
    lr=(1e-4, 5e-3),
    exceptions={"identity": "a prefix takes a share of the attention from the start"},
)
def mam(
    n: int = 16,  # length of the prefix
    r: int = 16,  # width of the parallel adapters
    scale: float = 2.0,  # s
    mid: int = 0,  # width of the network that makes the prefix while training; 0: the prefix itself is trained
) -> Tree:
    """A prefix of n keys and values in every attention, and s A(x) of width r beside every MLP."""
    return Sum(PrefixTuning(n=n, mid=mid), Parallel(r=r, scale=scale))


@preset(
    "u_mam",
    paper="2305.16597",
    category="hybrid",
    lr=(1e-4, 5e-3),
    exceptions={"identity": "a prefix takes a share of the attention from the start"},
)
def u_mam(
    n: int = 16,  # length of the prefix
    r: int = 16,  # width of the parallel adapters before the pruning
    scale: float = 2.0,  # s
    keep: float = 0.1,  # share of the entries that is left, of prefixes and adapters together
    search: float = 0.5,  # steps that train and prune; below 1 a share of all
    rounds: int = 5,  # of pruning, each to the same share of what the last one left
) -> Tree:
    """MAM's prefix and adapters, of which single entries of largest |w dL/dw| stay: the rest is pruned while training."""
    course: dict[str, Any] = {"keep": keep, "search": search, "rounds": rounds}
    return Sum(UPrefix(n=n, **course), UParallel(r=r, scale=scale, **course))


@preset(
    "s_mam",
    paper="2305.16597",
    category="hybrid",
    lr=(1e-4, 5e-3),
    exceptions={"identity": "a prefix takes a share of the attention from the start"},
)
def s_mam(
    n: int = 16,  # length of the prefix before the pruning
    r: int = 16,  # width of the parallel adapters before the pruning
    scale: float = 2.0,  # s
    keep: float = 0.1,  # share of the entries that is left, of prefixes and adapters together
    search: float = 0.5,  # steps that train and prune; below 1 a share of all
    rounds: int = 5,  # of pruning, each to the same share of what the last one left
) -> Tree:
    """MAM's prefix and adapters, of which the rows and ranks of largest mean |w dL/dw| stay: the rest is pruned while training."""
    course: dict[str, Any] = {"keep": keep, "search": search, "rounds": rounds}
    return Sum(SPrefix(n=n, **course), SParallel(r=r, scale=scale, **course))


@preset(
    "pfeiffer",
    paper="2005.00247",
    category="additive",
    lr=(3e-4, 5e-3),
    exceptions={"identity": "the paper starts near the identity, not at it"},
)
def pfeiffer(
    r: int = 48,  # bottleneck width
) -> Tree:
    """One sequential adapter a block: N(z + A(N(z))) where a norm N ends the block, else y + A(y) behind it."""
    return Sequential(r=r, where="post_norm|block")


@preset("adaptformer", paper="2205.13535", category="additive", lr=(1e-3, 3e-2))
def adaptformer(
    r: int = 64,  # bottleneck width
    scale: float = 0.1,  # s
    dropout: float = 0.1,  # share of the bottleneck's units that is dropped while training
) -> Tree:
    """y' = y + s U relu(D x + c), x the residual stream beside the MLP and its norm; U = 0 at the start."""
    return Parallel(r=r, scale=scale, dropout=dropout, where="mlp+norm|mlp")


@preset(
    "p_tuning_v2",
    paper="2110.07602",
    category="additive",
    lr=(5e-3, 2e-2),
    exceptions={"identity": "a prefix takes a share of the attention from the start"},
)
def p_tuning_v2(
    n: int = 20,  # length of the prefix
    shift: bool = False,  # the real tokens start at position n, as behind a prefix that lies in the cache
) -> Tree:
    """n keys and values in front of every layer's own, trained themselves, without a network."""
    return PrefixTuning(n=n, shift=shift)


@preset("hadamard", paper="2407.11033", category="additive", lr=(1e-3, 2e-2))
def hadamard(
    head_first: float = 0.5,  # share of the steps that train the task head alone, at the start
) -> Tree:
    """A' = w * A + b on the attention's concatenated heads A, and the norm behind it trained; the task head alone first.

    Behind the attention's residual add where a norm stands there, else in front of the MLP.
    """
    return Stack(Hadamard(head_first=head_first), Copy(where="attn_norm|mlp_norm"))
