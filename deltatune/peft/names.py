"""Names by HF PEFT's rules: which modules and parameters of a model a configuration means."""

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..core import base
from ..core.compose import where_of
from ..core.errors import unknown
from ..core.runtime import walk
from ..core.site import Site, all_sites, select

AUTO_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Named:
    """A model's modules and sites, for rules that go by names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: module for name, module in walk(model) if name}
        self.table = all_sites(model)
        self.sites = {site.name: site for site in self.table}

    @property
    def inputs(self) -> nn.Module | None:
        """The table of the input embeddings."""
        return getattr(self.model, "get_input_embeddings", lambda: None)()

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


def targets(named: Named, fields: Mapping[str, Any], kind: str, is_file: bool) -> list[str]:
    """The modules that HF PEFT would adapt. In a configuration object every entry must match something."""
    rule = given = fields.get("target_modules")
    kept_out = fields.get("exclude_modules") or []
    saved = fields.get("modules_to_save") or []
    if rule is None:
        if fields.get("target_parameters"):
            return []
        if is_file:
            raise ValueError("target_modules is empty, where HF PEFT writes what it adapted")
        rule = default_of(named.model, kind)
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
            layer = _layer_of(fields.get("layers_pattern"), name)
            used.add(layer)
            if layer not in wanted:
                continue
        found.append(name)
    if not found and not fields.get("target_parameters"):
        raise ValueError(f"target_modules = {rule!r} matches no layer of this {base.own_class(named.model).__name__}")
    if not is_file:
        idle = (
            []
            if isinstance(given, str) or given is None
            else [e for e in rule if not any(matches([e], name) for name in found)]
        )
        all_used(named, "target_modules", idle)
        all_used(named, "exclude_modules", [d if isinstance(d, str) else d[0] for d in drops if d not in dropped])
        all_used(named, "layers_to_transform", [str(i) for i in wanted if i not in used])
    return found


def all_used(named: Named, what: str, idle: Sequence[str]) -> None:
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


def default_of(model: nn.Module, kind: str, what: str = "TARGET") -> Any:
    """HF PEFT's own default for this architecture: an unresolved configuration object is there, so the package is."""
    tables = vars(importlib.import_module("peft.utils.constants"))
    table = tables[f"TRANSFORMERS_MODELS_TO_{kind}_{what}_MODULES_MAPPING"]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in table:
        raise ValueError(f"HF PEFT has no default of {what.lower()}_modules for {model_type!r}; name them")
    return table[model_type]


def _all_linear(named: Named, fields: Mapping[str, Any]) -> list[str]:
    """Every linear layer but the output layer, and for classification of sequences the head."""
    output = getattr(named.model, "get_output_embeddings", lambda: None)()
    out = {name for name, module in named.modules.items() if module is output}
    if output is None and fields.get("task_type") == "SEQ_CLS":
        out |= set([name for name in ("score", "classifier") if name in named.modules][:1])
    return [s.name for s in named.table if s.kind == "linear" and s.name == s.module and s.name not in out]


def target_parameters(named: Named, fields: Mapping[str, Any], is_file: bool) -> list[Site]:
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
        all_used(named, "target_parameters", [entry for entry in wanted if entry not in used])
    if wanted and not found:
        raise ValueError(f"target_parameters = {wanted} matches no parameter of this model")
    return found
