"""HF PEFT's adapters, in and out: one row per method, and a word on every field of its configurations.

    adapter = dt.load(model, folder)                    a folder that HF PEFT wrote
    adapter.save(folder, format="peft")                 a folder that HF PEFT reads
    adapter = dt.attach(model, peft.LoraConfig(...))    its configuration object, its rules for names included

Its files are read as data and its package is never imported for them. `FIELDS` says what each field means here; a field
that has no word, or whose value cannot be kept, is an error, never ignored. `docs/peft.md` is made from it.
"""

import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from .core import base
from .core import files as own_files
from .core.adapter import Adapter, fill
from .core.attach import attach as attach_tree
from .core.compose import Average, Leaf, Sum, Tree, where_of
from .core.errors import unknown
from .core.identity import backbone_id
from .core.record import HEAD
from .core.runtime import walk
from .core.site import Site, all_sites, select
from .methods.baseline import Copy
from .methods.bias import BitFit
from .methods.lora import DoRA, LoRA
from .methods.prefix import PrefixTuning
from .methods.prompt import PromptTuning
from .methods.ranks import AdaLoRA
from .methods.rescale import IA3
from .methods.rows import TokenRows

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Field(NamedTuple):
    """What a field of HF PEFT's means here."""

    kind: str  # translated, training (a file is past it, a configuration object is refused), no effect, refused
    text: str  # to what, or why
    off: tuple[Any, ...] = (None,)  # the values of a refused one, or one for training alone, that say nothing


_COMMON = {
    "peft_type": Field("translated", "the method"),
    "task_type": Field("translated", "SEQ_CLS: `all-linear` leaves its head out, an encoder's prompts are `pooled`; prompts need one"),
    "auto_mapping": Field("no effect", "classes to build the base with; the model is here already"),
    "peft_version": Field("no effect", "named in the error of a field that is not known"),
    "base_model_name_or_path": Field("no effect", "a name, no fingerprint; written where it is a name of the hub, never a path"),
    "revision": Field("no effect", "of that name"),
    "inference_mode": Field("no effect", "`load(..., trainable=True)` says it here"),
    "modules_to_save": Field("translated", "leaves of `copy`; the task head is the head's leaf"),
}  # fmt: skip
_TARGETS = {
    "target_modules": Field("translated", "`where`, by HF PEFT's rules; an entry that matches nothing is an error in an object"),
    "exclude_modules": Field("translated", "left out of `where`"),
    "fan_in_fan_out": Field("no effect", "the layer itself says how its weight is stored"),
}  # fmt: skip
_START = "starts that leave the base as it is (True, False, gaussian, eva, orthogonal, mica): a file is past them, an object has True"
_LORA = _COMMON | _TARGETS | {
    "r": Field("translated", "`r`"),
    "lora_alpha": Field("translated", "`alpha`"),
    "lora_dropout": Field("translated", "`dropout`; none on embeddings and experts, as there"),
    "bias": Field("translated", "a `Sum` with `bitfit` at the biased sites, all or the adapted ones"),
    "use_rslora": Field("translated", "`power=0.5`"),
    "init_lora_weights": Field("training", _START, (True,)),
    "layers_to_transform": Field("translated", "`where`"),
    "layers_pattern": Field("translated", "`where`"),
    "rank_pattern": Field("translated", "`where` as a mapping: `r` by place"),
    "alpha_pattern": Field("translated", "`where` as a mapping: `alpha` by place"),
    "megatron_config": Field("refused", "layers of Megatron have no sites here"),
    "megatron_core": Field("no effect", "where to import Megatron from; without megatron_config nothing"),
    "trainable_token_indices": Field("translated", "a leaf of `token_rows`, on the tied output layer too"),
    "loftq_config": Field("refused", "it changes the base's weights", (None, {})),
    "eva_config": Field("training", "a start that needs data"),
    "corda_config": Field("refused", "it changes the base's weights"),
    "lora_ga_config": Field("refused", "it changes the base's weights"),
    "use_dora": Field("translated", "the method `dora`"),
    "velora_config": Field("training", "another backward pass, the same function"),
    "alora_invocation_tokens": Field("refused", "an adapter that begins in the middle of a sequence is no method here"),
    "use_qalora": Field("refused", "pooled inputs are no method here", (False, None)),
    "qalora_group_size": Field("no effect", "without use_qalora nothing"),
    "monteclora_config": Field("refused", "sampled factors are no method here"),
    "layer_replication": Field("refused", "it builds another backbone"),
    "runtime_config": Field("refused", "offloading while running is not done here", (None, {"ephemeral_gpu_offload": False})),
    "lora_bias": Field("translated", "`bias=True`, its bias times the scale"),
    "target_parameters": Field("translated", "fused experts in `where`; other parameters are refused by name"),
    "use_bdlora": Field("refused", "block-diagonal factors are no method here"),
    "arrow_config": Field("refused", "routing between adapters is no method here"),
    "kasa_config": Field("refused", "it changes the base's weights"),
    "ensure_weight_tying": Field("refused", "a delta on one layer is not tied to another's", (False, None)),
}  # fmt: skip
_PROMPT = _COMMON | {
    "num_virtual_tokens": Field("translated", "`n`"),
    "token_dim": Field("translated", "must be the backbone's"),
    "num_transformer_submodules": Field("translated", "of 2 n rows the first n; the others are in no forward of HF PEFT's"),
    "num_attention_heads": Field("no effect", "of prefixes alone"),
    "num_layers": Field("no effect", "of prefixes alone"),
}  # fmt: skip

FIELDS: dict[str, dict[str, Field]] = {
    "LORA": _LORA,
    "ADALORA": _LORA | {
        "init_r": Field("translated", "`r`"),
        "target_r": Field("translated", "`target`"),
        "tinit": Field("translated", "`warmup`"),
        "tfinal": Field("translated", "`final`"),
        "deltaT": Field("translated", "`interval`"),
        "beta1": Field("translated", "`beta1`"),
        "beta2": Field("translated", "`beta2`"),
        "orth_reg_weight": Field("translated", "`orth`"),
        "total_step": Field("no effect", "the trainer says how many steps there are"),
        "rank_pattern": Field("translated", "which triplets a file holds; the others are 0. An object must not have it"),
        "r": Field("refused", "HF PEFT ignores it; the rank is init_r", (8, None)),
        "use_rslora": Field("refused", "HF PEFT's AdaLoRA ignores it", (False, None)),
        "alpha_pattern": Field("refused", "HF PEFT's AdaLoRA ignores it", (None, {})),
        "use_dora": Field("refused", "HF PEFT's AdaLoRA does not know it", (False, None)),
        "lora_bias": Field("refused", "HF PEFT's AdaLoRA ignores it", (False, None)),
        "target_parameters": Field("refused", "HF PEFT's AdaLoRA does not know it"),
        "velora_config": Field("refused", "HF PEFT's AdaLoRA ignores it"),
    },
    "IA3": _COMMON | _TARGETS | {
        "feedforward_modules": Field("translated", "`side=\"input\"` there, `side=\"output\"` elsewhere"),
        "init_ia3_weights": Field("training", "1 at the start", (True,)),
    },
    "PROMPT_TUNING": _PROMPT | {
        "prompt_tuning_init": Field(
            "training", "here prompts start from rows of the vocabulary, RANDOM or SAMPLE_VOCAB", ("RANDOM", "SAMPLE_VOCAB")
        ),
        "prompt_tuning_init_text": Field("training", "a start from a text's tokens"),
        "tokenizer_name_or_path": Field("training", "of that text"),
        "tokenizer_kwargs": Field("training", "of that text"),
    },
    "P_TUNING": _PROMPT | {
        "encoder_reparameterization_type": Field("no effect", "files hold the prompts that the network made, not the network"),
        "encoder_hidden_size": Field("no effect", "of that network"),
        "encoder_num_layers": Field("no effect", "of that network"),
        "encoder_dropout": Field("no effect", "of that network"),
    },
    "PREFIX_TUNING": _PROMPT | {
        "task_type": Field("translated", "must be there, and SEQ_2_SEQ_LM on an encoder-decoder: HF PEFT runs no other"),
        "num_transformer_submodules": Field("translated", "2 on an encoder-decoder: the decoder's self-attentions, its layers paired"),
        "num_attention_heads": Field("translated", "must be the keys' heads"),
        "num_layers": Field("translated", "must be the backbone's"),
        "prefix_projection": Field("translated", "`mid`; files hold the keys and values that the network made"),
        "encoder_hidden_size": Field("translated", "`mid`, with prefix_projection"),
        "init_weights": Field("training", "a start at 0"),
    },
}  # fmt: skip

_WEIGHT_METHODS = {"LORA": LoRA, "ADALORA": AdaLoRA, "IA3": IA3}
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_AUTO_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip

Key = tuple[str, str, str]  # leaf path, site name, slot


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, and what it is here."""

    key: str
    shape: tuple[int, ...]
    here: Callable[[Tensor], dict[Key, Tensor]]


@dataclass
class Plan:
    """A configuration on this model: the tree that it means, and the tensors that its file must hold."""

    tree: Tree
    head: bool
    pieces: list[Piece]
    allowed: dict[str, Tensor]  # the base's own tensors that a file may hold too
    unused: tuple[str, ...] = ()  # starts of keys of biases that HF PEFT saves twice


def attach(
    model: nn.Module,
    config: Any,
    *,
    name: str = "default",
    head: str | None = "auto",
    seed: int = 0,
    probe: "Mapping[str, Any] | None" = None,
) -> Adapter:
    """`deltatune.attach` of HF PEFT's configuration object."""
    fields = dict(config.to_dict())
    runtime = getattr(config, "runtime_config", None)
    if runtime is not None:
        fields["runtime_config"] = dict(vars(runtime))
    if getattr(config, "_custom_modules", None):
        raise ValueError(f"{type(config).__name__}: layers that were registered with it are not known here")
    fields = _plain(fields)
    if head is not None:  # HF PEFT saves a task's head unasked, and then adapts nothing in it
        auto = [end for end in _AUTO_HEADS.get(fields.get("task_type") or "", ()) if _Named(model).ends([end])]
        fields["modules_to_save"] = [*(fields.get("modules_to_save") or ()), *auto]
    plan = _plan(model, fields, is_file=False)
    return attach_tree(model, plan.tree, name=name, head="auto" if plan.head else head, seed=seed, probe=probe)


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", trainable: bool = False) -> Adapter:
    """`deltatune.load` of a folder that HF PEFT wrote."""
    fields, tensors = _read(Path(path))
    try:
        plan = _plan(model, fields, is_file=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = _without_base(path, plan, tensors)
    own_files.check_keys(str(path), {p.key: p.shape for p in plan.pieces}, tensors)
    values: dict[Key, Tensor] = {}
    for piece in plan.pieces:
        value = tensors[piece.key]
        values |= piece.here(value if value.dtype == torch.float64 else value.float())
    adapter = attach_tree(model, plan.tree, name=name, head="auto" if plan.head else None)
    try:
        state, deltas = adapter.state_dict(), adapter.deltas
        for (leaf, site, slot), value in values.items():
            delta = deltas[leaf, site]
            shared = delta.__dict__["_bank"][1].get(slot)
            state[f"bank.{shared}" if shared else f"{leaf}.{site}.{slot}"] = value.contiguous()
        fill(adapter, path, state)
        adapter.trainable(trainable)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """`Adapter.save` in HF PEFT's format. Raises ValueError, and writes nothing, where it cannot hold the adapter."""
    fields, tensors = _written(adapter)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an adapter is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    data = save_bytes({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
    own_files.write_atomic(folder / WEIGHTS, data)
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    own_files.write_atomic(folder / CONFIG, f"{text}\n".encode())


# reading


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise ValueError(f"{folder / PICKLED} is a pickle, which could run code; save it with safetensors first")
        raise ValueError(f"{folder} is no adapter: it has no {WEIGHTS}")
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{folder / CONFIG} is not a configuration of HF PEFT's")
    data = (folder / WEIGHTS).read_bytes()
    try:
        return _plain(fields), load_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({len(data)} bytes): {error}") from None


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists, enumerations as their values."""

    def plain(value: Any) -> Any:
        value = getattr(value, "value", value) if isinstance(value, str) else value
        return sorted(value) if isinstance(value, (set, frozenset)) else value

    return {k: plain(v) for k, v in fields.items()}


def _plan(model: nn.Module, fields: dict[str, Any], *, is_file: bool) -> Plan:
    kind = fields.get("peft_type")
    if kind not in FIELDS:
        raise unknown("peft_type", str(kind), FIELDS)
    _check_fields(fields, kind, is_file)
    if kind in _WEIGHT_METHODS:
        return _plan_weights(model, fields, kind, is_file)
    if kind == "P_TUNING" and not is_file:
        raise ValueError(
            "P_TUNING: the network that makes the prompts is no method here; train it with HF PEFT, its file is read"
        )
    return (_plan_prefix if kind == "PREFIX_TUNING" else _plan_prompt)(model, fields, is_file)


def _check_fields(fields: Mapping[str, Any], kind: str, is_file: bool) -> None:
    for key, value in fields.items():
        field = FIELDS[kind].get(key)
        if field is None:
            version = fields.get("peft_version") or "of an unknown version"
            raise ValueError(
                f"{kind}: the field {key!r} is not known here; peft {version} wrote it" if is_file
                else f"{kind}: the field {key!r} of peft {version} is not known here"
            )  # fmt: skip
        if (
            any(value == off and type(value) is type(off) for off in field.off)
            or None in field.off
            and value in ([], {})
        ):
            continue
        if field.kind == "refused" or field.kind == "training" and not is_file:
            raise ValueError(f"{kind}: {key} = {value!r} cannot be kept: {field.text}")
        if key == "init_lora_weights" and str(value).startswith(_BASE_CHANGED):
            raise ValueError(f"{kind}: init_lora_weights = {value!r} cannot be kept: it changes the base's weights")


def _without_base(path: object, plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors without copies of what the base has already. Raises ValueError where such a copy differs."""
    left = {}
    for key, value in tensors.items():
        if key.endswith(".bias") and key.startswith(plan.unused):
            continue
        if key not in plan.allowed:
            left[key] = value
            continue
        own = plan.allowed[key]
        if tuple(own.shape) != tuple(value.shape):
            raise ValueError(
                f"{path}: {key} is {tuple(value.shape)}, the base's is {tuple(own.shape)}; resize the base's embeddings first"
            )
        if not own.is_meta and not torch.allclose(own.detach().cpu().float(), value.float(), rtol=2**-7, atol=1e-6):
            raise ValueError(f"{path}: {key} brings other values than the base has; it was saved from another base")
    return left


# names, by HF PEFT's rules


class _Named:
    """A model's modules and sites, for rules that go by names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: module for name, module in walk(model) if name}
        self.table = all_sites(model)
        self.sites = {site.name: site for site in self.table}

    def ends(self, ends: Iterable[str]) -> list[str]:
        """Modules whose name ends so, at a dot or not: HF PEFT's rule for modules_to_save."""
        return [name for name in self.modules if any(name.endswith(end) for end in ends)]

    def where(self, names: Sequence[str], kinds: frozenset[str], short: Any = None) -> Any:
        """A place that selects exactly the sites `names`: `short` if it does, a list of names, or an expression."""
        for where in (short, tuple(names)):
            try:
                found = select(self.table, where_of(where), None, kinds) if where else ()  # type: ignore[arg-type]
            except ValueError:
                continue
            if {s.name for s in found} == set(names):
                return where
        return exactly(names)


def exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these names alone."""
    return f"(?:{'|'.join(map(re.escape, names))})"


def matches(rule: str | Sequence[str], name: str) -> bool:
    """HF PEFT's rule for a module: an expression matches its whole name; an entry of a list is it, or its end at a dot."""
    if isinstance(rule, str):
        try:
            return re.fullmatch(rule, name) is not None
        except re.error as error:
            raise ValueError(f"{rule!r} is no regular expression: {error}") from None
    return any(name == entry or name.endswith(f".{entry}") for entry in rule)


def _layer_fits(fields: Mapping[str, Any], name: str) -> int | None:
    """The layer's index in `name`, by layers_pattern or the first number in it."""
    patterns = fields.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(
            rf".*?\.{pattern}\.(\d+)\." if pattern == r"[^.]*" else rf"(?:^|.*?\.){pattern}\.(\d+)\.", name
        )
        if match:
            return int(match[1])
    return None


def _targets(named: _Named, fields: Mapping[str, Any], kind: str, is_file: bool) -> list[str]:
    """The modules that HF PEFT would adapt. In a configuration object every entry must match something."""
    rule, kept_out = fields.get("target_modules"), fields.get("exclude_modules") or []
    saved = fields.get("modules_to_save") or []
    strict, given = not is_file, rule
    if rule is None:
        if fields.get("target_parameters"):
            return []
        if is_file:
            raise ValueError("target_modules is empty, where HF PEFT writes what it adapted")
        rule = _default(named.model, kind)
    if isinstance(rule, str) and rule.lower() == "all-linear":
        rule = _all_linear(named, fields)
    layers = fields.get("layers_to_transform")
    wanted = [layers] if isinstance(layers, int) else list(layers or ())
    if isinstance(rule, str) and (wanted or fields.get("layers_pattern")):
        raise ValueError(
            "layers_to_transform and layers_pattern go with a list of target_modules, not with an expression"
        )
    drops = [kept_out] if isinstance(kept_out, str) else [[entry] for entry in kept_out]
    found: list[str] = []
    used: set[int | None] = set()
    dropped: list[Any] = []
    for name in named.modules:
        hits = [drop for drop in drops if matches(drop, name)]
        dropped += hits
        if hits or any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in saved) or not matches(rule, name):
            continue
        if wanted and name not in rule:
            used.add(_layer_of(fields.get("layers_pattern"), name))
            if _layer_of(fields.get("layers_pattern"), name) not in wanted:
                continue
        found.append(name)
    if not found and not fields.get("target_parameters"):
        raise ValueError(f"target_modules = {rule!r} matches no layer of this {base.own_class(named.model).__name__}")
    if strict:
        idle = (
            []
            if isinstance(given, str) or given is None
            else [e for e in rule if not any(matches([e], name) for name in found)]
        )
        _all_used(named, "target_modules", idle)
        _all_used(named, "exclude_modules", [d if isinstance(d, str) else d[0] for d in drops if d not in dropped])
        _all_used(named, "layers_to_transform", [str(i) for i in wanted if i not in used])
    return found


def _all_used(named: _Named, what: str, idle: Sequence[str]) -> None:
    """Raise ValueError naming the first entry that matched nothing, which HF PEFT passes over."""
    if idle:
        known = [*named.modules, *{name.rpartition(".")[2] for name in named.modules}]
        raise unknown(f"entry of {what}, which matches nothing,", idle[0], known)


def _layer_of(pattern: str | Sequence[str] | None, name: str) -> int | None:
    """The layer's index in a module's name: the first number behind `pattern`, or the first number."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = (re.match(expression, name) for expression in expressions)
    return next((int(match[1]) for match in found if match), None)


def _default(model: nn.Module, kind: str, what: str = "TARGET") -> Any:
    """HF PEFT's own default for this architecture: an unresolved configuration object is there, so the package is."""
    tables = vars(importlib.import_module("peft.utils.constants"))
    table = tables[f"TRANSFORMERS_MODELS_TO_{kind}_{what}_MODULES_MAPPING"]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in table:
        raise ValueError(f"HF PEFT has no default of {what.lower()}_modules for {model_type!r}; name them")
    return table[model_type]


def _all_linear(named: _Named, fields: Mapping[str, Any]) -> list[str]:
    """Every linear layer but the output layer, and for classification of sequences the head."""
    output = getattr(named.model, "get_output_embeddings", lambda: None)()
    out = {name for name, module in named.modules.items() if module is output}
    if output is None and fields.get("task_type") == "SEQ_CLS":
        out |= set([name for name in ("score", "classifier") if name in named.modules][:1])
    return [s.name for s in named.table if s.kind == "linear" and s.name == s.module and s.name not in out]


def _parameters(named: _Named, fields: Mapping[str, Any], is_file: bool) -> list[Site]:
    """The fused experts that target_parameters names, in the order of their module's parameters."""
    wanted = fields.get("target_parameters") or []
    found, used = [], set()
    for at, module in named.modules.items():
        for key in module._parameters:
            name = f"{at}.{key}"
            hits = [entry for entry in wanted if matches([entry], name)]
            if not hits:
                continue
            used |= set(hits)
            site = named.sites.get(name)
            if site is None or site.kind != "experts" or site.n_experts < 2:
                raise ValueError(f"target_parameters names {name}, which is no stack of fused experts")
            found.append(site)
    if not is_file:
        _all_used(named, "target_parameters", [entry for entry in wanted if entry not in used])
    if wanted and not found:
        raise ValueError(f"target_parameters = {wanted} matches no parameter of this model")
    return found


# methods on weights


def _plan_weights(model: nn.Module, fields: dict[str, Any], kind: str, is_file: bool) -> Plan:
    named = _Named(model)
    method: Any = DoRA if fields.get("use_dora") else _WEIGHT_METHODS[kind]
    chosen = []
    for name in _targets(named, fields, kind, is_file):
        site = named.sites.get(name)
        if site is None or site.kind not in ("linear", "conv2d", "embedding") or name != site.module:
            cls = base.own_class(named.modules[name]).__name__
            raise ValueError(f"target_modules matches {name}, a {cls}, where {method.name} has no place")
        chosen.append(site)
    experts = _parameters(named, fields, is_file)
    chosen += experts
    hyper = {
        "LORA": lambda: _hyper_lora(fields), "ADALORA": lambda: _hyper_adalora(fields, is_file), "IA3": dict,
    }[kind]()  # fmt: skip
    own = {site.name: _hyper_of(named, site, fields, kind, hyper) for site in chosen}
    _patterns_used(fields, kind, own)
    short = fields.get("target_modules") if not experts and isinstance(fields.get("target_modules"), list) else None
    leaves: list[Leaf] = [_leaf(named, method, own, short)]
    pieces: list[tuple[int, Callable[[str], list[Piece]]]] = []

    def weights(path: str) -> list[Piece]:
        return [
            piece for site in chosen for piece in _pieces(named, method, site, own[site.name], path, fields, experts)
        ]

    pieces.append((0, weights))
    saved = _saved(named, fields, is_file)
    allowed: dict[str, Tensor] = {}
    biased = _biased(named, fields, [s for s in chosen if s.kind != "experts"], saved, is_file)
    if biased:
        leaves.append(_made(BitFit, where=named.where([s.name for s in biased], BitFit.kinds)))
        pieces.append((len(leaves) - 1, lambda path: [_bias_piece(named, s, s in chosen, path) for s in biased]))
    for key, ids, sites in _token_rows(named, fields):
        leaves.append(_made(TokenRows, ids=tuple(ids), where=tuple(s.name for s in sites)))
        pieces.append((len(leaves) - 1, functools.partial(_rows_pieces, key, len(ids), sites)))
    for site in chosen:  # what HF PEFT saves beside an adapted or resized embedding
        if site.kind == "embedding" or site.module.endswith("lm_head"):
            allowed[f"base_model.model.{site.module}.base_layer.weight"] = base.stored(named.modules[site.module], site)
    for site in named.table:
        if site.role in ("embed", "lm_head") and site.name == site.module and site not in chosen:
            allowed[f"base_model.model.{site.module}.weight"] = base.stored(named.modules[site.module], site)
    return _finished_plan(named, leaves, pieces, saved, allowed, "base_model.model.")


def _finished_plan(
    named: _Named,
    leaves: list[Leaf],
    pieces: list[tuple[int, Callable[[str], list[Piece]]]],
    saved: Mapping[str, list[Site]],
    allowed: dict[str, Tensor],
    prefix: str,
) -> Plan:
    """The leaf of the saved modules joins: the head's own where they are the task head, all of it and no more."""
    copied = [site for sites in saved.values() for site in sites]
    heads = [site for site in named.table if site.role == HEAD]
    head = bool(copied) and {s.name for s in copied} == {s.name for s in heads}
    if copied and not head:
        leaves.append(_made(Copy, where=named.where([s.name for s in copied], Copy.kinds)))
    tree: Tree = leaves[0] if len(leaves) == 1 else Sum(*leaves)
    paths = [path for path, _ in tree.leaves()]
    done = [piece for i, make in pieces for piece in make(paths[i])]
    at = HEAD if head else paths[-1]
    done += [piece for site in copied for piece in _copy_pieces(named, site, at, prefix)]
    keys = {piece.key for piece in done}
    twice = tuple(f"{prefix}{at}.{k}." for at in saved for k in ("original_module", "modules_to_save"))
    return Plan(tree, head, done, {k: t for k, t in allowed.items() if k not in keys}, twice)


def _hyper_lora(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "power": 0.5 if fields.get("use_rslora") else 1.0,
        "dropout": fields.get("lora_dropout", 0.0),
    } | ({} if fields.get("use_dora") else {"bias": bool(fields.get("lora_bias"))})


def _hyper_adalora(fields: Mapping[str, Any], is_file: bool) -> dict[str, Any]:
    if fields.get("rank_pattern") and not is_file:
        raise ValueError(
            "ADALORA: rank_pattern is found while training; a configuration to start from must not have it"
        )
    alpha = fields.get("lora_alpha", 8)
    if alpha <= 0:
        raise ValueError(f"ADALORA: lora_alpha = {alpha} cannot be kept: there it stands for the rank")
    return {
        "r": fields.get("init_r", 12), "target": fields.get("target_r", 8), "alpha": alpha,
        "warmup": fields.get("tinit", 0), "final": fields.get("tfinal", 0), "interval": fields.get("deltaT", 1),
        "beta1": fields.get("beta1", 0.85), "beta2": fields.get("beta2", 0.85),
        "orth": fields.get("orth_reg_weight", 0.5), "dropout": fields.get("lora_dropout", 0.0),
    }  # fmt: skip


def _hyper_of(
    named: _Named, site: Site, fields: Mapping[str, Any], kind: str, hyper: Mapping[str, Any]
) -> dict[str, Any]:
    """The hyperparameters at one site."""
    if kind == "IA3":
        rule = fields.get("feedforward_modules")
        if rule is None:
            rule = _default(named.model, kind, "FEEDFORWARD")
        inner = matches(rule, site.name) if isinstance(rule, str) else any(site.name.endswith(end) for end in rule)
        return {"side": "input" if inner else "output"}
    own = dict(hyper)
    if kind == "LORA":
        for field, key in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
            patterns = fields.get(field) or {}
            hit = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", site.name)), None)
            own[key] = own[key] if hit is None else patterns[hit]
        if site.kind in ("embedding", "experts"):
            own["dropout"] = 0.0
    return own


def _patterns_used(fields: Mapping[str, Any], kind: str, own: Mapping[str, Any]) -> None:
    """A pattern that matches no adapted layer is an error; HF PEFT warns."""
    for key in fields.get("rank_pattern") or () if kind == "ADALORA" else ():
        if key.removesuffix(".lora_E") not in own:
            raise unknown("key of rank_pattern, which matches no adapted layer,", key, own)
    for field in ("rank_pattern", "alpha_pattern") if kind == "LORA" else ():
        for pattern in fields.get(field) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in own):
                raise unknown(f"key of {field}, which matches no adapted layer,", pattern, own)


def _made(method: Any, **hyper: Any) -> Leaf:
    return method(**hyper)  # type: ignore[no-any-return]


def _leaf(named: _Named, method: Any, own: Mapping[str, dict[str, Any]], short: Any) -> Leaf:
    """One leaf; places with hyperparameters of their own where they differ."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, hyper in own.items():
        groups.setdefault(tuple(hyper.items()), []).append(name)
    most = dict(max(groups.items(), key=lambda group: len(group[1]))[0])
    if len(groups) == 1:
        return _made(method, **most, where=named.where(list(own), method.kinds, short))
    where = {exactly(names): {k: v for k, v in group if most[k] != v} for group, names in groups.items()}
    return _made(method, **most, where=where)


def _pieces(
    named: _Named,
    method: Any,
    site: Site,
    hyper: Mapping[str, Any],
    path: str,
    fields: Mapping[str, Any],
    experts: Sequence[Site],
) -> Iterator[Piece]:
    """The tensors of one adapted layer."""
    module, at = named.modules[site.module], f"base_model.model.{site.module}"

    def piece(suffix: str, slot: str, shape: tuple[int, ...], here: Callable[[Tensor], Tensor] = lambda t: t) -> Piece:
        return Piece(f"{at}.{suffix}", shape, lambda t: {(path, site.name, slot): here(t)})

    o, i = site.d_out, site.d_in
    if method is IA3:
        _no_groups(module, site, square=hyper["side"] == "input")
        ones = (1, 1) if site.kind == "conv2d" else ()
        if hyper["side"] == "input":
            yield piece("ia3_l", "scale", (1, i, *ones), torch.flatten)
        else:
            yield piece("ia3_l", "scale", (1, o, *ones) if ones else (o, 1), torch.flatten)
        return
    r = hyper["r"]
    if method is AdaLoRA:
        if site.kind != "linear":
            raise ValueError(f"{site.name}: AdaLoRA of HF PEFT's on a {site.kind} is not read")
        kept = (fields.get("rank_pattern") or {}).get(f"{site.module}.lora_E")
        if kept is not None and len(kept) != r:
            raise ValueError(f"rank_pattern of {site.module} has {len(kept)} entries, the rank is {r}")
        rows = torch.tensor([True] * r if kept is None else kept, dtype=torch.bool)
        k = int(rows.sum())

        def spread(t: Tensor) -> Tensor:
            return t.new_zeros(r, *t.shape[1:]).index_copy(0, rows.nonzero()[:, 0], t)

        yield piece("lora_A", "a", (k, i), spread)
        yield piece("lora_B", "b", (o, k), lambda t: spread(t.t()).t())
        yield piece("lora_E", "e", (k, 1), lambda t: spread(t.flatten()))
        return
    scale = hyper["alpha"] / r ** hyper["power"]
    if site.kind == "experts":
        if method is DoRA:
            raise ValueError(f"{site.name}: HF PEFT has no DoRA on fused experts")
        beside = [s for s in experts if s.module == site.module]
        at += ".base_layer" * (len(beside) - 1 - beside.index(site))
        n = site.n_experts
        yield piece("lora_A.weight", "a", (n * r, i), lambda t: t.view(n, r, i))
        yield piece("lora_B.weight", "b", (o, r * n), lambda t: t.view(o, r, n).permute(2, 0, 1))
    elif site.kind == "embedding":
        if method is DoRA:
            raise ValueError(
                f"{site.name}: DoRA of HF PEFT's normalises an embedding's columns, here it would be its rows"
            )
        yield piece("lora_embedding_A", "b", (r, o), torch.t)
        yield piece("lora_embedding_B", "a", (i, r), torch.t)
    elif site.kind == "conv2d":
        _no_groups(module, site)
        kernel = tuple(base.stored(module, site).shape[1:])
        yield piece("lora_A.weight", "a", (r, *kernel), lambda t: t.flatten(1))
        yield piece("lora_B.weight", "b", (o, r, 1, 1), lambda t: t.flatten(1))
    else:
        yield piece("lora_A.weight", "a", (r, i))
        yield piece("lora_B.weight", "b", (o, r))
    if method is DoRA:
        yield piece("lora_magnitude_vector", "m", (1, o, 1, 1) if site.kind == "conv2d" else (o,), torch.flatten)
    elif hyper["bias"]:
        if site.kind not in ("linear", "conv2d"):
            raise ValueError(f"{site.name}: lora_bias has no place on {site.kind}")
        yield piece("lora_B.bias", "d", (o,), lambda t: t * scale)


def _no_groups(module: Any, site: Site, square: bool = False) -> None:
    """Raise ValueError on a convolution whose factors HF PEFT makes with another stride, dilation or number of groups."""
    if site.kind != "conv2d":
        return
    if module.groups != 1 or tuple(module.dilation) != (1, 1) or module.padding_mode != "zeros" or square:
        raise ValueError(f"{site.name}: this convolution's adapter in HF PEFT is no update of its weight")


def _saved(named: _Named, fields: Mapping[str, Any], is_file: bool) -> dict[str, list[Site]]:
    """Module of modules_to_save -> the sites below it. Raises ValueError on a tensor below that no site holds."""
    ends = list(dict.fromkeys(fields.get("modules_to_save") or ()))
    found: dict[str, list[Site]] = {}
    for at in named.ends(ends):
        if any(at.startswith(f"{outer}.") for outer in found):
            continue
        sites = [
            s
            for s in named.table
            if s.kind in Copy.kinds and f"{s.module}.".startswith(f"{at}.") and s.name == s.module
        ]
        held = {f"{s.module}.{k}" for s in sites for k in ("weight", "bias")}
        below = [
            f"{at}.{k}" for k in (*dict(named.modules[at].named_parameters()), *dict(named.modules[at].named_buffers()))
        ]
        odd = [k for k in below if k not in held and ".deltas." not in k]
        if odd or not sites:
            raise ValueError(
                f"modules_to_save names {at}: its {odd[0] if odd else 'nothing'} has no place in a copy here"
            )
        found[at] = sites
    if not is_file:
        unasked = _AUTO_HEADS.get(fields.get("task_type") or "", ())  # HF PEFT notes them in the object itself
        _all_used(named, "modules_to_save", [e for e in ends if e not in unasked and not named.ends([e])])
    return found


def _copy_pieces(named: _Named, site: Site, path: str, prefix: str) -> Iterator[Piece]:
    module, at = named.modules[site.module], f"{prefix}{site.module}"

    def weight(t: Tensor) -> dict[Key, Tensor]:
        t = t.mT if base.transposed(module) else t.flatten(1) if site.kind == "conv2d" else t
        return {(path, site.name, "weight"): t}

    yield Piece(f"{at}.weight", tuple(base.stored(module, site).shape), weight)
    if site.bias:
        yield Piece(f"{at}.bias", (site.d_out,), lambda t: {(path, site.name, "bias"): t})


def _biased(
    named: _Named, fields: Mapping[str, Any], chosen: Sequence[Site], saved: Mapping[str, list[Site]], is_file: bool
) -> list[Site]:
    """The sites whose own bias HF PEFT trains."""
    mode = fields.get("bias") or "none"
    if mode not in ("none", "all", "lora_only"):
        raise unknown("value of bias", str(mode), ("none", "all", "lora_only"))
    if mode == "none":
        return []
    found = []
    for name, module in named.modules.items():
        if module._parameters.get("bias") is None or any(f"{name}.".startswith(f"{at}.") for at in saved):
            continue
        if mode == "lora_only" and not any(site.module == name for site in chosen):
            continue
        site = named.sites.get(name)
        if site is None or site.kind not in BitFit.kinds or not site.bias:
            raise ValueError(
                f"bias = {mode!r} trains the bias of {name}, a {base.own_class(module).__name__}, which has no site"
            )
        found.append(site)
    if not found and not is_file:
        raise ValueError(f"bias = {mode!r} finds no bias to train")
    return found


def _bias_piece(named: _Named, site: Site, adapted: bool, path: str) -> Piece:
    own = base.Base(named.modules[site.module], site).bias
    assert own is not None
    key = f"base_model.model.{site.module}{'.base_layer' * adapted}.bias"
    return Piece(key, (site.d_out,), lambda t: {(path, site.name, "d"): t.to(own.device) - own})


def _token_rows(named: _Named, fields: Mapping[str, Any]) -> list[tuple[str, list[int], list[Site]]]:
    """(table's module, ids, sites): the table and what is tied to it."""
    given = fields.get("trainable_token_indices")
    if not given:
        return []
    if not isinstance(given, Mapping):
        table = named.model.get_input_embeddings()  # type: ignore[operator]
        given = {next(name for name, module in named.modules.items() if module is table): given}
    found = []
    for end, ids in given.items():
        names = named.ends([end])
        if len(names) != 1:
            raise ValueError(
                f"trainable_token_indices names {end!r}, which is {', '.join(names) or 'nothing'} here; name one table"
            )
        found.append(
            (f"base_model.model.{names[0]}.token_adapter.trainable_tokens_delta", list(ids), _tied(named, names[0]))
        )
    return found


def _tied(named: _Named, at: str) -> list[Site]:
    """The sites that run with the table of the module `at`: of the input table also those that are tied to it."""
    weight = named.modules[at]._parameters.get("weight")
    is_input = named.modules[at] is getattr(named.model, "get_input_embeddings", lambda: None)()
    tied = is_input and bool(getattr(getattr(named.model, "config", None), "tie_word_embeddings", False))
    sites = [
        site
        for site in named.table
        if site.role in ("embed", "lm_head") and site.name == site.module
        and (site.module == at or tied and named.modules[site.module]._parameters.get("weight") is weight)
    ]  # fmt: skip
    if not sites:
        raise ValueError(f"trainable_token_indices names {at}, which is no table of tokens")
    return sites


def _rows_pieces(key: str, k: int, sites: Sequence[Site], path: str) -> list[Piece]:
    return [Piece(key, (k, sites[0].d_in), lambda t: {(path, sites[0].name, "rows"): t})]


# prompts and prefixes


def _stack(named: _Named, kind: str, side: str) -> list[Site]:
    """The sites of that kind on the backbone's only stack, or on that side of an encoder-decoder."""
    sites = [s for s in named.table if s.kind == kind and s.role in ("input", "attn")]
    return [s for s in sites if s.stack == side] or [s for s in sites if len({t.stack for t in sites}) == 1]


def _plan_prompt(model: nn.Module, fields: dict[str, Any], is_file: bool) -> Plan:
    named = _Named(model)
    _check_task(model, fields)
    sites = _stack(named, "input", "encoder")
    if len(sites) != 1:
        raise ValueError("prompts need a backbone with one input, or an encoder's")
    (site,) = sites
    n, width = _length(fields), fields.get("token_dim")
    if width not in (None, site.d_in):
        raise ValueError(f"token_dim = {width}, but the embeddings here have {site.d_in}")
    pooled = fields["task_type"] == "SEQ_CLS" and not _is_causal(named)
    rows = n * (fields.get("num_transformer_submodules") or (2 if fields["task_type"] == "SEQ_2_SEQ_LM" else 1))
    leaf = _made(PromptTuning, n=n, pooled=pooled)

    def here(path: str) -> list[Piece]:
        return [Piece("prompt_embeddings", (rows, site.d_in), lambda t: {(path, site.name, "prompt"): t[:n]})]

    return _finished_plan(named, [leaf], [(0, here)], _saved(named, fields, is_file), {}, "base_model.")


def _check_task(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Raise ValueError where HF PEFT itself fails."""
    task = fields.get("task_type")
    if task is None:
        raise ValueError(f"{fields['peft_type']} needs a task_type: without one HF PEFT itself fails")
    if _is_two(model) and task != "SEQ_2_SEQ_LM":
        raise ValueError(f"{fields['peft_type']}: task_type = {task!r} fails in HF PEFT itself on an encoder-decoder")


def _length(fields: Mapping[str, Any]) -> int:
    n = fields.get("num_virtual_tokens")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_virtual_tokens must be a number of tokens, not {n!r}")
    return n


def _is_causal(named: _Named) -> bool:
    return any(getattr(named.modules[s.module], "is_causal", False) for s in _stack(named, "attention", "decoder"))


def _plan_prefix(model: nn.Module, fields: dict[str, Any], is_file: bool) -> Plan:
    named = _Named(model)
    _check_task(model, fields)
    sites, order = _prefix_sites(named)
    heads, width = sites[0].n_kv_heads, sites[0].n_kv_heads * sites[0].d_head
    for key, own in (("num_layers", len(sites)), ("num_attention_heads", heads), ("token_dim", width)):
        if fields.get(key) not in (None, own):
            raise ValueError(f"{key} = {fields[key]}, but the attentions here have {own}")
    given = fields.get("num_transformer_submodules")
    if given not in (None, 2 if _is_two(model) else 1):
        raise ValueError(f"num_transformer_submodules = {given} does not fit this backbone")
    n = _length(fields)
    hyper: dict[str, Any] = {"n": n, "shift": True}
    if fields.get("prefix_projection") and not is_file:
        hyper["mid"] = fields.get("encoder_hidden_size")
        if not hyper["mid"]:
            raise ValueError("prefix_projection needs encoder_hidden_size")
    where = named.where([s.name for s in sites], PrefixTuning.kinds, None if _is_two(model) else "attn")
    leaf = _made(PrefixTuning, **hyper, where=where)

    def here(path: str) -> list[Piece]:
        def split(t: Tensor) -> dict[Key, Tensor]:
            t = t.view(n, 2 * len(sites), heads, sites[0].d_head).permute(1, 2, 0, 3)
            found = {}
            for site, pair in zip(sites, order, strict=True):
                found[path, site.name, "key"], found[path, site.name, "value"] = t[2 * pair], t[2 * pair + 1]
            return found

        return [Piece("prompt_embeddings", (n, 2 * len(sites) * width), split)]

    return _finished_plan(named, [leaf], [(0, here)], _saved(named, fields, is_file), {}, "base_model.")


def _is_two(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _prefix_sites(named: _Named) -> tuple[list[Site], list[int]]:
    """The attentions that HF PEFT gives a prefix, and which pair of the file's keys and values each reads.

    On an encoder-decoder it doubles the pairs and gives each of the decoder's layers four: its own and its
    cross-attention's, which it drops. So layer i reads pair 2 i of the doubled ones.
    """
    sites = _stack(named, "attention", "decoder")
    if not sites:
        raise ValueError("prefixes need attentions with keys and values of their own")
    if len({(s.n_kv_heads, s.d_head) for s in sites}) > 1:
        raise ValueError("HF PEFT has prefixes of one size; the attentions here differ")
    n = len(sites)
    return sites, [2 * i % n if _is_two(named.model) else i for i in range(n)]


# writing


@dataclass(frozen=True)
class _Part:
    """One delta of an adapter that is written: its site, hyperparameters and tensors."""

    path: str
    method: Any
    site: Site
    hyper: dict[str, Any]
    tensors: dict[str, Tensor]


def _written(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors. Raises ValueError naming the method that HF PEFT's format cannot hold."""
    named = _Named(adapter.model)
    parts = _parts(adapter)
    _check_tree(adapter.tree, parts)
    mains = [part for part in parts if part.method not in (Copy, BitFit, TokenRows)]
    kinds = {part.method for part in mains}
    if not mains:
        raise ValueError(f"format='peft' needs one of {', '.join(sorted(m.name for m in _WRITE))} beside what it holds")
    for method in kinds:
        if method not in _WRITE:
            raise ValueError(f"{method.name} cannot be written as HF PEFT's: its format has no such method")
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(sorted(m.name for m in kinds))} cannot be written as one adapter of HF PEFT's")
    (method,) = kinds
    prompts = method in (PromptTuning, PrefixTuning)
    name = backbone_id(adapter.model)
    fields: dict[str, Any] = {
        "base_model_name_or_path": name if "/" in name else None, "inference_mode": True,
        "task_type": _task(adapter.model),
    }  # fmt: skip
    own, tensors = _WRITE[method](named, mains)
    fields |= own
    others = [part for part in parts if part.method in (BitFit, TokenRows)]
    if others and prompts:
        raise ValueError(f"{others[0].method.name} beside {method.name} cannot be written as HF PEFT's")
    _write_biases(named, fields, tensors, [p for p in parts if p.method is BitFit], mains, parts)
    _write_rows(named, fields, tensors, [p for p in parts if p.method is TokenRows])
    _write_copies(named, fields, tensors, [p for p in parts if p.method is Copy], prompts)
    # by HF PEFT's own rules this configuration must mean these tensors, and no others
    plan = _plan(adapter.model, _plain(fields), is_file=True)
    own_files.check_keys("what HF PEFT would read", {p.key: p.shape for p in plan.pieces}, tensors)
    return fields, tensors


def _parts(adapter: Adapter) -> list[_Part]:
    tree, state = adapter.finished()
    leaves = dict(tree.leaves())
    for leaf in leaves.values():
        if leaf.method.in_place:
            raise ValueError(f"{leaf.method.name} trains the base itself, which HF PEFT's format cannot hold")
    bank = {k: t for k, t in state.items() if k.startswith("bank.")}
    found = []
    for (path, name), delta in adapter.deltas.items():
        start = f"{path}.{name}."
        tensors = {k.removeprefix(start): t.detach() for k, t in state.items() if k.startswith(start)}
        for slot, key in delta.__dict__["_bank"][1].items():
            if f"bank.{key}" in bank:
                tensors[slot] = bank[f"bank.{key}"].detach()
        hyper = {k: getattr(delta.config, k) for k in delta.config.__dataclass_fields__}
        found.append(_Part(path, type(delta), delta.site, hyper, tensors))
    return found


def _check_tree(tree: Tree, parts: Sequence[_Part]) -> None:
    """Deltas that meet at a layer: there an update of the weight and one of the bias add up, nothing else does."""
    at: dict[str, list[_Part]] = {}
    for part in parts:
        at.setdefault(part.site.name if part.site.kind == "experts" else part.site.module, []).append(part)
    for module, here in at.items():
        names = [part.method.name for part in here]
        slices = all(part.site.rows for part in here) and len({part.site.name for part in here}) == len(here)
        added = len(here) == 2 and {part.method for part in here} in ({LoRA, BitFit}, {DoRA, BitFit}, {AdaLoRA, BitFit})
        fine = len(here) == 1 or slices or added
        if not fine or len(here) > 1 and _has_average(tree):
            raise ValueError(f"{module}: {', '.join(names)} meet there, which HF PEFT's format cannot hold")


def _has_average(tree: Tree) -> bool:
    return not isinstance(tree, Leaf) and (isinstance(tree, Average) or any(map(_has_average, tree.children)))


def _task(model: nn.Module) -> str | None:
    name = base.own_class(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    return None if task == "SEQ_2_SEQ_LM" and not _is_two(model) else task


def _write_targets(named: _Named, parts: Sequence[_Part]) -> dict[str, Any]:
    """target_modules for these layers and no others: ends of names, whole names, or an expression."""
    names = [part.site.module for part in parts if part.site.kind != "experts"]
    wanted, fields = set(names), {"fan_in_fan_out": any(base.transposed(named.modules[name]) for name in names)}
    ends = sorted({name.rpartition(".")[2] for name in names})
    for rule in (ends, sorted(wanted), exactly(sorted(wanted))):
        if {name for name in named.modules if matches(rule, name)} == wanted:
            return fields | {"target_modules": rule}
    return fields | {"target_modules": []}


def _write_lora(named: _Named, parts: Sequence[_Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    root = all(part.hyper["power"] == 0.5 for part in parts) and not any(part.site.rows for part in parts)
    whole = [_whole_lora(named, group, root) for group in _by_module(parts)]
    experts: dict[str, list[Site]] = {}
    for part in whole:
        if part.site.kind == "experts":
            experts.setdefault(part.site.module, []).append(part.site)
    dropout = {part.hyper["dropout"] for part in whole if part.site.kind not in ("embedding", "experts")} or {0.0}
    if len(dropout) > 1:
        raise ValueError(
            f"{parts[0].method.name}: dropouts {sorted(dropout)} cannot be written as HF PEFT's, which has one"
        )
    biased = {part.hyper.get("bias", False) for part in whole}
    if len(biased) > 1:
        raise ValueError(
            "lora: bias at some layers alone cannot be written as HF PEFT's lora_bias, which is everywhere"
        )
    r, alpha = _most(whole, "r"), _most(whole, "alpha")
    fields = _write_targets(named, whole) | {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": dropout.pop(), "use_rslora": root,
        "use_dora": parts[0].method is DoRA, "lora_bias": biased.pop(), "bias": "none",
        "rank_pattern": {f"^{re.escape(p.site.name)}": p.hyper["r"] for p in whole if p.hyper["r"] != r},
        "alpha_pattern": {f"^{re.escape(p.site.name)}": p.hyper["alpha"] for p in whole if p.hyper["alpha"] != alpha},
    }  # fmt: skip
    if experts:
        fields["target_parameters"] = [site.name for sites in experts.values() for site in sites]
    tensors: dict[str, Tensor] = {}
    for part in whole:
        tensors |= _lora_tensors(named, part, experts)
    return fields, tensors


def _by_module(parts: Sequence[_Part]) -> list[list[_Part]]:
    """One group a layer; the slices of a fused projection together."""
    groups: dict[str, list[_Part]] = {}
    for part in parts:
        groups.setdefault(part.site.module if part.site.rows else part.site.name, []).append(part)
    return list(groups.values())


def _most(parts: Sequence[_Part], key: str) -> Any:
    values = [part.hyper[key] for part in parts]
    return max(dict.fromkeys(values), key=values.count)


def _whole_lora(named: _Named, group: Sequence[_Part], root: bool) -> _Part:
    """One layer's update in HF PEFT's scale alpha / r, or alpha / sqrt(r) with `root`; slices as one of the whole layer."""
    first = group[0]
    if not first.site.rows:
        r, power = first.hyper["r"], first.hyper["power"]
        alpha = first.hyper["alpha"] if root or power == 1 else first.hyper["alpha"] * r ** (1 - power)
        return replace(first, hyper=first.hyper | {"alpha": alpha})
    if first.method is DoRA or any(part.hyper["bias"] for part in group):
        raise ValueError(f"{first.site.name}: {first.method.name} on a slice cannot be written as HF PEFT's")
    site = named.sites[first.site.module]
    rank = sum(part.hyper["r"] for part in group)
    scale = [part.hyper["alpha"] / part.hyper["r"] ** part.hyper["power"] for part in group]
    blocks = []
    for part, own in zip(group, scale, strict=True):
        b = part.tensors["b"] if own == scale[0] else part.tensors["b"] * (own / scale[0])
        blocks.append(base.put_rows(b.new_zeros(site.d_out, b.shape[1]), b, part.site))
    tensors = {"a": torch.cat([part.tensors["a"] for part in group]), "b": torch.cat(blocks, 1)}
    return _Part(first.path, LoRA, site, first.hyper | {"r": rank, "alpha": scale[0] * rank}, tensors)


def _lora_tensors(named: _Named, part: _Part, experts: Mapping[str, Sequence[Site]]) -> dict[str, Tensor]:
    site, a, b = part.site, part.tensors["a"], part.tensors["b"]
    at = f"base_model.model.{site.module}"
    if site.kind == "experts":
        if part.method is DoRA:
            raise ValueError(f"{site.name}: dora on fused experts cannot be written as HF PEFT's")
        order = [f"{site.module}.{key}" for key in named.modules[site.module]._parameters]
        beside = sorted((s.name for s in experts[site.module]), key=order.index)
        at += ".base_layer" * (len(beside) - 1 - beside.index(site.name))
        return {f"{at}.lora_A.weight": a.flatten(0, 1), f"{at}.lora_B.weight": b.permute(1, 2, 0).flatten(1)}
    if site.kind == "embedding":
        if part.method is DoRA:
            raise ValueError(
                f"{site.name}: dora on an embedding cannot be written as HF PEFT's, which has columns' norms"
            )
        return {f"{at}.lora_embedding_A": b.t(), f"{at}.lora_embedding_B": a.t()}
    tensors = {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    if site.kind == "conv2d":
        kernel = base.stored(named.modules[site.module], site).shape[1:]
        tensors = {f"{at}.lora_A.weight": a.unflatten(1, tuple(kernel)), f"{at}.lora_B.weight": b[..., None, None]}
    if part.method is DoRA:
        m = part.tensors["m"]
        tensors[f"{at}.lora_magnitude_vector"] = m.view(1, -1, 1, 1) if site.kind == "conv2d" else m
    elif part.hyper["bias"]:
        scale = part.hyper["alpha"] / part.hyper["r"] ** part.hyper["power"]
        if not scale:
            raise ValueError(f"{site.name}: lora with alpha = 0 has a bias that HF PEFT would multiply by 0")
        tensors[f"{at}.lora_B.bias"] = part.tensors["d"] / scale
    return tensors


def _write_adalora(named: _Named, parts: Sequence[_Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    first = parts[0].hyper
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if part.site.kind != "linear" or part.site.rows or part.hyper != first:
            raise ValueError(f"{part.site.name}: adalora is written as HF PEFT's on whole linear layers, all alike")
        at = f"base_model.model.{part.site.module}"
        tensors |= {f"{at}.lora_A": part.tensors["a"], f"{at}.lora_B": part.tensors["b"]}
        tensors[f"{at}.lora_E"] = part.tensors["e"][:, None]
    total = 1000  # HF PEFT asks for a number of steps; a finished adapter has taken them
    init, end = (int(first[k] * total) if first[k] < 1 else int(first[k]) for k in ("warmup", "final"))
    return _write_targets(named, parts) | {
        "peft_type": "ADALORA", "init_r": first["r"], "target_r": first["target"], "lora_alpha": first["alpha"],
        "tinit": init, "tfinal": end, "total_step": max(total, init + end + 1), "deltaT": first["interval"],
        "beta1": first["beta1"], "beta2": first["beta2"], "orth_reg_weight": first["orth"],
        "lora_dropout": first["dropout"], "bias": "none",
    }, tensors  # fmt: skip


def _write_ia3(named: _Named, parts: Sequence[_Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    inner: list[str] = []
    outer: list[str] = []
    for group in _by_module(parts):
        site, scale = group[0].site, group[0].tensors["scale"]
        site = named.sites[site.module] if site.rows else site
        on_input = _side(group[0]) == "input"
        if site.kind not in ("linear", "conv2d") or any(p.site.rows and _side(p) == "input" for p in group):
            raise ValueError(f"{group[0].site.name}: ia3 on {site.kind} cannot be written as HF PEFT's")
        _no_groups(named.modules[site.module], site, square=on_input)
        if group[0].site.rows:
            scale = scale.new_ones(site.d_out)
            for part in group:
                scale = base.put_rows(scale, part.tensors["scale"], part.site)
        shape = (1, -1, 1, 1) if site.kind == "conv2d" else (1, -1) if on_input else (-1, 1)
        tensors[f"base_model.model.{site.module}.ia3_l"] = scale.view(shape)
        (inner if on_input else outer).append(site.module)
    fields = _write_targets(named, parts)
    ends = sorted({name.rpartition(".")[2] for name in inner})
    clear = not any(name.endswith(tuple(ends)) for name in outer) if ends else True
    if isinstance(fields["target_modules"], str) or not clear or not set(ends) <= set(fields["target_modules"]):
        fields["target_modules"] = exactly(sorted({*inner, *outer}))
        return fields | {"peft_type": "IA3", "feedforward_modules": exactly(sorted(inner)) if inner else []}, tensors
    return fields | {"peft_type": "IA3", "feedforward_modules": ends}, tensors


def _side(part: _Part) -> str:
    """Which side an IA3 delta scales."""
    side: str = part.hyper["side"]
    return side if side != "auto" else "input" if part.site.role == "mlp.down" else "output"


def _write_prompt(named: _Named, parts: Sequence[_Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    part = parts[0]
    two, task = _is_two(named.model), _task(named.model)
    if len(parts) > 1 or part.site.stack not in ("", "encoder") and two:
        raise ValueError("prompt_tuning: HF PEFT reads one prompt, in front of the (encoder's) input")
    pools = task == "SEQ_CLS" and not _is_causal(named)
    if pools is not part.hyper["pooled"]:
        raise ValueError(
            f"prompt_tuning: with HF PEFT the head of this model reads {'a soft' if pools else 'no soft'} token's state; "
            f"only pooled={pools} can be written as its format"
        )
    heads = [s for s in named.table if s.kind == "attention"]
    return {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": part.hyper["n"], "token_dim": part.site.d_in,
        "num_transformer_submodules": 1, "num_layers": len(heads) or 1, "num_attention_heads": 1,
        "task_type": task or "FEATURE_EXTRACTION",
    }, {"prompt_embeddings": part.tensors["prompt"]}  # fmt: skip


def _write_prefix(named: _Named, parts: Sequence[_Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sites, order = _prefix_sites(named)
    at = {part.site.name: part for part in parts}
    if at.keys() != {site.name for site in sites} or len(parts) > len(at):
        raise ValueError(
            "prefix_tuning: HF PEFT has one prefix in every layer, of an encoder-decoder in the decoder's own"
        )
    if not all(part.hyper["shift"] for part in parts):
        raise ValueError(
            "prefix_tuning: with HF PEFT the tokens start behind the prefix; only shift=True can be written as its format"
        )
    if len({part.hyper["n"] for part in parts}) > 1:
        raise ValueError("prefix_tuning: HF PEFT has prefixes of one length")
    n, heads, d_head = parts[0].hyper["n"], sites[0].n_kv_heads, sites[0].d_head
    table = parts[0].tensors["key"].new_zeros(2 * len(sites), heads, n, d_head)
    taken: dict[int, str] = {}
    for site, pair in zip(sites, order, strict=True):
        own = torch.stack([at[site.name].tensors["key"], at[site.name].tensors["value"]])
        if pair in taken and not torch.equal(table[2 * pair : 2 * pair + 2], own):
            raise ValueError(
                f"prefix_tuning: HF PEFT gives {taken[pair]} and {site.name} one prefix; here they have two"
            )
        table[2 * pair : 2 * pair + 2] = own
        taken.setdefault(pair, site.name)
    return {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": n, "token_dim": heads * d_head,
        "num_transformer_submodules": 2 if _is_two(named.model) else 1, "num_layers": len(sites),
        "num_attention_heads": heads, "task_type": _task(named.model) or "FEATURE_EXTRACTION",
    }, {"prompt_embeddings": table.permute(2, 0, 1, 3).flatten(1)}  # fmt: skip


_Write = Callable[[_Named, Sequence[_Part]], tuple[dict[str, Any], dict[str, Tensor]]]
_WRITE: dict[Any, _Write] = {
    LoRA: _write_lora, DoRA: _write_lora, AdaLoRA: _write_adalora, IA3: _write_ia3, PromptTuning: _write_prompt,
    PrefixTuning: _write_prefix,
}  # fmt: skip


def _write_biases(
    named: _Named,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    biases: Sequence[_Part],
    mains: Sequence[_Part],
    parts: Sequence[_Part],
) -> None:
    if not biases:
        return
    if "bias" not in fields:
        raise ValueError(f"bitfit beside {mains[0].method.name} cannot be written as HF PEFT's")
    adapted = {part.site.module for part in mains}
    copied = {part.site.module for part in parts if part.method is Copy}
    there = {name for name, m in named.modules.items() if m._parameters.get("bias") is not None and name not in copied}
    ours = {part.site.name for part in biases}
    if ours == there & adapted:
        fields["bias"] = "lora_only"
    elif ours == there:
        fields["bias"] = "all"
    else:
        odd = sorted(ours ^ there)
        raise ValueError(
            f"bitfit: HF PEFT trains the biases of all layers that have one, or of the adapted ones; {odd[0]} does not fit that"
        )
    for part in biases:
        own = base.Base(named.modules[part.site.module], part.site).bias
        assert own is not None
        key = f"base_model.model.{part.site.module}{'.base_layer' * (part.site.module in adapted)}.bias"
        tensors[key] = own + part.tensors["d"]


def _write_rows(named: _Named, fields: dict[str, Any], tensors: dict[str, Tensor], rows: Sequence[_Part]) -> None:
    by_path: dict[str, list[_Part]] = {}
    for part in rows:
        by_path.setdefault(part.path, []).append(part)
    table = getattr(named.model, "get_input_embeddings", lambda: None)()
    for group in by_path.values():
        ours = {part.site.module for part in group}
        weight = named.modules[group[0].site.module]._parameters.get("weight")
        tied = table is not None and table._parameters.get("weight") is weight
        at = next(n for n, m in named.modules.items() if m is table) if tied else group[0].site.module
        want = {site.module for site in _tied(named, at)}
        if ours != want:
            raise ValueError(
                f"token_rows: HF PEFT changes {', '.join(sorted(want))} together; here it is {', '.join(sorted(ours))}"
            )
        fields.setdefault("trainable_token_indices", {})[at] = list(group[0].hyper["ids"])
        tensors[f"base_model.model.{at}.token_adapter.trainable_tokens_delta"] = group[0].tensors["rows"]


def _write_copies(
    named: _Named, fields: dict[str, Any], tensors: dict[str, Tensor], copies: Sequence[_Part], prompts: bool
) -> None:
    """modules_to_save; HF PEFT adds the head of a task itself, so a task is named where the head is here, all of it."""
    prefix = "base_model." if prompts else "base_model.model."
    held = {part.site.module: part for part in copies}
    tops = []
    for name in held:
        top = name
        while (outer := top.rpartition(".")[0]) and all(
            f"{outer}.{k}".rpartition(".")[0] in held
            for k, _ in named.modules[outer].named_parameters()
            if "deltas." not in k
        ):
            top = outer
        tops.append(top)
    auto = named.ends(_AUTO_HEADS.get(fields["task_type"] or "", ()))
    missing = [name for name in auto if not any(f"{name}.".startswith(f"{top}.") for top in tops)]
    if missing and not prompts:
        fields["task_type"] = None
    elif missing:  # its forward needs the task: the file brings the base's own head
        for at in missing:
            for key, p in named.modules[at].named_parameters():
                if "deltas." not in key:
                    tensors[f"{prefix}{at}.{key}"] = p.detach()
        tops += missing
    for part in copies:
        module, site = named.modules[part.site.module], part.site
        if site.rows:
            raise ValueError(f"{site.name}: copy on a slice cannot be written as HF PEFT's")
        weight = base.restored(module, site, part.tensors["weight"])
        tensors[f"{prefix}{site.module}.weight"] = weight
        if "bias" in part.tensors:
            tensors[f"{prefix}{site.module}.bias"] = part.tensors["bias"]
    if tops:
        fields["modules_to_save"] = list(dict.fromkeys(tops))
