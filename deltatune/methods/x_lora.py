"""X-LoRA: saved LoRAs, scaled at each token by its state in a model without them. A forward runs the model twice."""

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.base import own_class
from ..core.compose import parts_of
from ..core.files import read_adapter
from ..core.inits import uniform, zeros
from ..core.method import Method, bank, fixed, param
from ..core.runtime import ATTACHED, OWN_FIELDS, ROOT_LAYERS, Call, call_of, layer, original, swap
from ..core.sharded import assign
from ..core.site import HEADS, all_sites
from ..core.sources import folders_of
from .task_gates import add_product

LAYER = "x_lora"
# the parts of a model whose input is as wide as its states, and those whose output is
READS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "head", "lm_head", "pooler")
WRITES = ("o", "down")


class XLoRA(Method, name="x_lora"):
    """y' = y + scale sum_e w_e s_e B_e A_e x of saved LoRAs, w = softmax(C(h) / t), h a token's state without them.

    h is the model's last one. C has `depth` layers, one network for the whole model; under `per="layer"` each matrix has a
    last layer of its own. The sources may have other ranks, scales and places; `where` narrows them. Not for an encoder with a
    decoder.
    """

    paper = "2402.07148"
    category = "multi-task"
    where = "linear"
    kinds = frozenset({"linear"})
    limits = {"r": "min(d_in,d_out)"}
    lr = (1e-4, 1e-2)
    reads_call = True
    sources = "lora"
    live = ("top_k", "scale")
    exceptions = {
        "identity": "it starts from adapters that were trained",
        "composed": "its layers run twice in a forward, and this looks at what they give the first time",
        "graph": "a model that gives no hidden states is watched by a hook, which dynamo does not follow",
    }
    last_block = ""  # where the model is none of transformers', its last block
    n_sources: int = 2  # how many saved LoRAs
    r: int = 8  # the largest of their ranks
    depth: int = 1  # layers of C
    hidden: int = 2048  # width between them
    dropout: float = 0.2  # share of the units between them that is dropped while training
    per: Literal["model", "layer"] = "model"  # one w for all matrices, or one for each
    softmax: Literal["all", "top", "none"] = "all"  # over all LoRAs, over the top_k alone, or w = C(h)
    temperature: float = 1.0  # t
    top_k: int | None = None  # how many LoRAs a token keeps, those of the largest w, as large as before; None: all
    scale: float = 1.0  # of all LoRAs, beside their own s = alpha / r^power
    loras: Literal["frozen", "trained"] = "frozen"  # whether they go on training
    at: tuple[str, ...] = ()  # names of the sources' places, which they themselves say
    a: Tensor = fixed("n_sources r d_in", zeros)  # attach fills both from the sources
    b: Tensor = fixed("d_out n_sources r", zeros)  # s B
    first: Tensor = bank("hidden width", uniform("width"), train=True)
    first_bias: Tensor = bank("hidden", uniform("width"), train=True)
    inner: Tensor = bank("depth-2 hidden hidden", uniform("hidden"), train=True)
    inner_bias: Tensor = bank("depth-2 hidden", uniform("hidden"), train=True)
    last: Tensor = bank("n_sources fan", uniform("fan"), train=True)
    last_bias: Tensor = bank("n_sources", uniform("fan"), train=True)
    own: Tensor = param("n_sources fan", uniform("fan"))  # the last, of one matrix
    own_bias: Tensor = param("n_sources", uniform("fan"))

    def __new__(cls, *, where=None, layers=None, sources=None, **hyper):
        """The leaf, as wide as the widest of the sources, and with the places of all."""
        if sources is not None:
            read = [read_adapter(folder) for folder in folders_of(cls.name, sources)]
            names = dict.fromkeys(name for card, _ in read for name in card["sites"].get("0", ()))
            ranks = [len(t) for _, tensors in read for key, t in tensors.items() if key.endswith(".a")]
            hyper = {"r": max(ranks, default=1), "at": list(names)} | hyper
        return super().__new__(cls, where=where, layers=layers, sources=sources, **hyper)

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.depth < 1:
            raise ValueError(f"{cls.name}: depth = {config.depth}, but it has one layer at least")
        if config.temperature <= 0:
            raise ValueError(f"{cls.name}: temperature = {config.temperature}, but it must lie above 0")
        if config.top_k is not None and not 1 <= config.top_k <= config.n_sources:
            raise ValueError(
                f"{cls.name}: top_k = {config.top_k}, but a token keeps between 1 and all {config.n_sources} LoRAs"
            )
        if config.softmax == "top" and config.top_k is None:
            raise ValueError(f"{cls.name}: softmax = 'top' is over the top_k LoRAs, and top_k is None")
        return config

    @classmethod
    def slots_of(cls, config):
        kept = ["a", "b", *("first", "first_bias") * (config.depth > 1), *("inner", "inner_bias") * (config.depth > 2)]
        kept += ["own", "own_bias"] if config.per == "layer" else ["last", "last_bias"]
        found = {key: cls.slots[key] for key in kept}
        if config.loras == "trained":
            found |= {key: param(found[key].shape, found[key].init) for key in ("a", "b")}
        return found

    @classmethod
    def fits(cls, config, site):
        return site.stack not in ("encoder", "decoder") and (not config.at or site.name in config.at)

    @classmethod
    def numbers(cls, config, sites):
        found: dict[int, str] = {}
        for site in sites:
            part = (site.role or "").rpartition(".")[2]
            if part in READS or part in WRITES:
                found.setdefault(site.d_in if part in READS else site.d_out, site.name)
        if len(found) != 1:
            says = ", ".join(f"{width} at {name}" for width, name in found.items()) or "none of its sites says it"
            raise ValueError(f"{cls.name} reads the model's states, and cannot tell how wide they are: {says}")
        (width,) = found
        return {site.name: {"width": width, "fan": width if config.depth == 1 else config.hidden} for site in sites}

    @classmethod
    @torch.no_grad()
    def start(cls, adapter, path, sources):
        deltas = {site: delta for (own, site), delta in adapter.deltas.items() if own == path}
        table = {site.name: site for site in all_sites(adapter.model)}
        for i, one in enumerate(sources):
            config, where = one.tree["config"], one.tree["where"]
            if isinstance(where, dict) or config["bias"]:
                what = "places with hyperparameters of their own" if isinstance(where, dict) else "biases too"
                raise ValueError(f"{one.folder} has {what}, and {cls.name} takes LoRAs of one scale and without biases")
            for name in one.card["sites"]["0"]:
                a, b = one.tensors[f"0.{name}.a"], one.tensors[f"0.{name}.b"]
                if name not in deltas:
                    site = table.get(name)  # None: a slice, which `where` can leave out as any other linear layer
                    if site is not None and (site.kind != "linear" or site.role in HEADS):
                        says = "name it in `where`" if site.kind == "linear" else f"{cls.name} stands on linear layers"
                        raise ValueError(f"{one.folder} has a LoRA at {name} of kind {site.kind}; {says}")
                    continue
                delta, r = deltas[name], len(a)
                if r > delta.r:
                    raise ValueError(f"{one.folder}: its rank at {name} is {r}, and this {cls.name} has r = {delta.r}")
                whole_a, whole_b = delta.a.new_zeros(delta.r, a.shape[1]), delta.b.new_zeros(len(b), delta.r)
                whole_a[:r], whole_b[:, :r] = a, b * (config["alpha"] / config["r"] ** config["power"])
                assign(delta.a, torch.cat([delta.a[:i], whole_a[None].to(delta.a), delta.a[i + 1 :]]))
                assign(delta.b, torch.cat([delta.b[:, :i], whole_b[:, None].to(delta.b), delta.b[:, i + 1 :]], 1))

    @property
    def key(self):
        """Under which name the features of its leaf are in the call."""
        return f"{id(self.switch)}.{self.path}"

    def features(self, states):
        """(B, T, D) -> (B, T, F), what C's last layer reads."""
        x = states.to(self.a.dtype)
        for i in range(self.depth - 1):
            weight, bias = (self.inner[i - 1], self.inner_bias[i - 1]) if i else (self.first, self.first_bias)
            x = F.dropout(F.relu(F.linear(x, weight, bias)), self.dropout, self.training)
        return x

    def shares(self, x):
        """(B, T, F) -> (B, T, E), w."""
        w = F.linear(x, *((self.own, self.own_bias) if self.per == "layer" else (self.last, self.last_bias)))
        if self.softmax == "all":
            w = (w / self.temperature).softmax(-1)
        if self.top_k is None:
            return w
        kept = torch.zeros_like(w, dtype=torch.bool).scatter(-1, w.topk(self.top_k, -1).indices, True)
        if self.softmax == "top":
            return (w / self.temperature).masked_fill(~kept, float("-inf")).softmax(-1)
        return w * kept

    def post(self, y, x):
        found = self.call.features[self.key]
        if found.requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                f"{self.site.name}: {self.name} with depth = {self.depth} runs no backward through reentrant "
                f'checkpoints; use gradient_checkpointing_enable({{"use_reentrant": False}})'
            )
        w = self.exact.shares(found).to(y.dtype)
        if w.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"{self.site.name}: {self.name} has scalings for the model's {tuple(w.shape[:-1])} tokens, and here "
                f"{tuple(y.shape[:-1])} come in; soft tokens and pooled states have none"
            )
        h = w[..., None] * F.linear(x, self.a.flatten(0, 1)).unflatten(-1, (self.n_sources, self.r))
        return add_product(y, h.flatten(-2), self.b.flatten(1), self.scale)


@dataclass(frozen=True, slots=True)
class Passed(Call):
    """A call that comes second, with what the deltas make of the first one's states, by their key."""

    features: dict[str, Tensor] = field(default_factory=dict)


def asking(model: nn.Module) -> list[XLoRA]:
    """A delta of each leaf that wants a first pass."""
    record = model.__dict__.get("_deltatune")
    found = []
    for info in record.infos.values() if record is not None else ():
        leaves = [path for path, leaf in info.tree.leaves() if issubclass(leaf.method, XLoRA)] if info.switch.on else ()
        for path in leaves:
            entry = next(entry for entry in info.entries if path in entry.sites)
            parts = parts_of(model.get_submodule(entry.module).deltas[entry.key])
            found.append(next(part for part in parts if part.path == path))
    return found


@layer(LAYER)
def two_passes(cls: type, forward: Any, namespace: dict[str, Any]) -> Any:
    """The attached model itself: first without any adapter, then with what its states say."""
    names = list(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        deltas = asking(self)
        if not deltas:
            return forward(self, *args, **kwargs)
        frame = self.__dict__["_deltatune"].frame
        known = {**dict(zip(names, args, strict=False)), **kwargs}
        call = call_of(known, frame)
        first = {k: v for k, v in known.items() if k != "labels" and (k in names or k not in OWN_FIELDS)}
        states = last_states(self, forward, first, names, call.n_past, deltas[0])
        given = {key: getattr(call, key) for key in Call.__dataclass_fields__}
        frame.call = Passed(**given, features={delta.key: delta.features(states) for delta in deltas})
        try:
            return forward(self, *args, **kwargs)
        finally:
            frame.call = None

    return run


@torch.no_grad()
def last_states(
    model: nn.Module, forward: Any, known: dict[str, Any], names: list[str], n_past: Any, delta: XLoRA
) -> Tensor:
    """(B, T, D), the model's last hidden states without adapters; where it gives none, what its last block gives.

    In the mode that the model is in, with its dropout, as the paper's code has it. While generating, the keys and values of
    this pass lie in layers of the cache behind the backbone's.
    """
    switches = [info.switch for info in model.__dict__["_deltatune"].infos.values() if info.switch.on]
    kept: list[Tensor] = []
    handle = None
    if delta.last_block:
        block = model.get_submodule(delta.last_block)
        handle = block.register_forward_hook(
            lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
    else:
        known = known | {"output_hidden_states": True, "return_dict": True}
        known |= {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        if known.get("past_key_values") is not None:
            n_layers = delta.site.n_layers or model.config.num_hidden_layers
            known["past_key_values"] = beside(known["past_key_values"], n_layers, n_past)
        elif "use_cache" in names:
            known["use_cache"] = False
    try:
        for switch in switches:
            switch.on = False
        quiet = model.training and not torch.compiler.is_compiling()
        with _no_word_of_checkpoints() if quiet else contextlib.nullcontext():
            out = forward(model, **known)
    finally:
        for switch in switches:
            switch.on = True
        if handle is not None:
            handle.remove()
    if kept:
        return kept[0]
    if getattr(out, "hidden_states", None) is None:
        raise ValueError(
            f"x_lora reads hidden states, and {own_class(model).__name__} neither gives them nor has blocks"
        )
    return out.hidden_states[-1]


@contextlib.contextmanager
def _no_word_of_checkpoints() -> Iterator[None]:
    """Reentrant ones warn where nothing asks for a gradient, and in a first pass nothing does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True", UserWarning)
        yield


def beside(cache: Any, n_layers: int, n_past: int) -> Any:
    """The cache of the first pass: as many layers as the backbone has, behind those of the second in the same cache."""
    own = cache.__dict__.setdefault("_deltatune", {})
    if LAYER not in own:
        if n_past:
            raise ValueError(
                f"x_lora: the cache has {n_past} tokens, none of a pass without adapters; start from an empty one"
            )
        while len(cache.layers) < n_layers:  # a cache that grows with the blocks would give ours to one of them
            cache.layers.append(cache.layer_class_to_replicate())
        own[LAYER] = len(cache.layers)
        cache.layers.extend(copy.deepcopy(cache.layers[:n_layers]))
    twin = copy.copy(cache)
    twin.layers = cache.layers[own[LAYER] : own[LAYER] + n_layers]
    return twin


def _ready(model: nn.Module) -> None:
    """The model's class runs twice; where it is none of transformers', its last block is the one to look at."""
    deltas = asking(model)
    if deltas:
        blocks = [] if hasattr(model, "config") else [s.module for s in all_sites(model) if s.kind == "block"]
        for delta in deltas:
            delta.__dict__["last_block"] = blocks[-1] if blocks else ""
        swap(model, "", add=(LAYER,))


ATTACHED.append(_ready)
ROOT_LAYERS[LAYER] = lambda model: (
    LAYER in original(model, "")[1]
)  # not at attach: `_ready` adds it, the last adapter takes it off
