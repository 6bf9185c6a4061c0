"""Trees with a name whose nodes have tensors of their own: gates over three methods, attention over trained adapters."""

from dataclasses import replace
from functools import partial

from ..core.compose import Fuse, Gate, Sum, Tree, preset
from ..core.sources import folders_of, saved
from .bottleneck import Sequential
from .lora import LoRA
from .prefix import PrefixTuning
from .transfer import TRAINED, without


@preset(
    "unipelt",
    paper="2110.07577",
    category="hybrid",
    lr=(1e-4, 1e-3),
    exceptions={
        "identity": "prefixes take a share of the attention from the start, and its adapters start near the identity"
    },
)
def unipelt(
    n: int = 10,  # length of the prefix
    mid: int = 512,  # width of the network that makes the prefix while training; 0: the prefix itself is trained
    r: int = 48,  # bottleneck width of the adapters
    rank: int = 8,  # of LoRA
) -> Tree:
    """Prefix, Pfeiffer's adapter and LoRA, each times a gate sigmoid(g x + c): the mean over a row's tokens, of LoRA the token's own.

    The gate stands for LoRA's alpha / r, apart in each projection; a prefix's keys and values share one.
    """
    return Sum(
        Gate(PrefixTuning(n=n, mid=mid), by="sequence"),
        Gate(Sequential(r=r, where="post_norm|block"), by="sequence"),
        Gate(LoRA(r=rank, alpha=float(rank)), by="token"),
    )


@preset(
    "adapter_fusion",
    paper="2005.00247",
    category="multi-task",
    lr=(1e-5, 1e-3),
    exceptions={"identity": TRAINED},
    sources="sequential",
)
def adapter_fusion(
    sources: tuple[str, ...] = (),  # folders of trained adapters, of any methods that change a site's output
    penalty: float = 0.01,  # weight of |I - V|^2 in the loss
) -> Tree:
    """y' = y + sum_i p_i V c_i, c_i what the i-th frozen adapter changes, p = softmax_i((Q y)^T K c_i); V near the identity."""
    if not sources:
        return Fuse(replace(Sequential(), start=partial(without, "adapter_fusion")), penalty=penalty)
    return Fuse(*(saved(folder, frozen=True) for folder in folders_of("adapter_fusion", sources)), penalty=penalty)
