"""Trees with a name: methods that a paper made of others, and well-known settings of one."""

from typing import Any

from ..core.compose import Stack, Sum, Tree, preset
from .baseline import Copy
from .bottleneck import Parallel, Sequential
from .lora import LoRA
from .mam_pruning import SParallel, SPrefix, UParallel, UPrefix
from .prefix import PrefixTuning
from .rescale import Hadamard
from .vectors import BitFit


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


@preset(
    "s4",
    paper="2301.01821",
    category="hybrid",
    lr=(3e-4, 5e-3),
    exceptions={
        "identity": "prefixes take a share of the attention from the start, and its adapters start near the identity"
    },
)
def s4(
    budget: int = 30,  # numbers trained in each layer, in units of twice the model's width d
) -> Tree:
    """Layers in four groups, few at both ends: adapter, LoRA | adapter, prefix | adapter, prefix, BitFit | prefix, BitFit, LoRA.

    The groups found by search on T5-base, bottom up: 1/6, 1/3, 1/3 and 1/6 of each stack's depth, 2, 4, 4 and 2 of 12 layers.
    A backbone needs a stack of four layers or more.

    All layers train about as many numbers. Where attention is as wide as the model, d, and the MLP 4 d, in units of 2 d: an
    adapter of width r has r + 0.5, and r numbers more; LoRA of rank k on q and v 2 k; a prefix of length n has n; BitFit 5.5,
    or 4.5 where norms have no bias (T5), and with cross-attention 2 to 2.5 more. A group divides the budget evenly, after 5
    for BitFit. Of 30 a layer of the four groups has 30.5, 30.5, 31, 30.5 on BERT; 30.5, 30.5, 30, 29.5 in T5's encoder and
    30.5, 30.5, 32, 31.5 in its decoder: 0.5 % of T5-base, the paper's budget.

    How a group divides its numbers, one adapter a layer, at Pfeiffer's place, and LoRA and prefixes on self-attention alone, so
    that both stacks' layers are alike, are ours: the paper's code has no groups. On the norm N that ends a block BitFit's d
    comes last: N(z + A(N(z))) + d.
    """
    if budget < 9:
        raise ValueError(
            f"s4: budget is {budget}; it must be at least 9: 5 for BitFit, 2 for LoRA of rank 1, 2 beside it"
        )

    def adapter(r: int, layers: str) -> Tree:
        return Sequential(r=r, where="post_norm|block", layers=layers)

    def lora(r: int, layers: str) -> Tree:
        return LoRA(r=r, alpha=2.0 * r, where="attn.q,attn.v", layers=layers)

    first, second, third, fourth = "0-1/6", "1/6-1/2", "1/2-5/6", "5/6-1"
    rest = budget - 5
    return Stack(
        adapter(budget - 2 * (budget // 4), first),
        lora(budget // 4, first),
        adapter(budget - budget // 2, second),
        PrefixTuning(n=budget // 2, layers=second),
        BitFit(layers=third),
        adapter(rest - rest // 2, third),
        PrefixTuning(n=rest // 2, layers=third),
        PrefixTuning(n=rest - 2 * (rest // 4), layers=fourth),
        BitFit(layers=fourth),
        lora(rest // 4, fourth),
    )
