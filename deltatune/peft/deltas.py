"""The deltas of one method as HF PEFT's fields and tensors: a row per method that its format has."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base
from ..core.site import Site
from ..methods.lora import DoRA, LoRA
from ..methods.orthogonal import BOFT, OFT
from ..methods.prefix import PrefixTuning
from ..methods.products import LoHa, LoKr
from ..methods.prompt import PromptTuning
from ..methods.ranks import AdaLoRA
from ..methods.rescale import IA3
from ..methods.sparse import SHiRA
from ..methods.vectors import LNTuning
from ..methods.vera import VeRA
from .factors import factor_fields
from .masks import shira_fields
from .names import Named, exactly, matches
from .rotations import boft_fields, oft_fields
from .soft import is_causal, is_two, prefix_sites
from .vectors import norm_tensors
from .weights import no_groups

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One delta of an adapter that is written: its site, hyperparameters and tensors."""

    path: str
    method: Any
    site: Site
    hyper: dict[str, Any]
    tensors: dict[str, Tensor]


def task_of(model: nn.Module) -> str | None:
    name = base.own_class(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    return None if task == "SEQ_2_SEQ_LM" and not is_two(model) else task


def _write_targets(named: Named, parts: Sequence[Part]) -> dict[str, Any]:
    """target_modules for these layers and no others: ends of names, whole names, or an expression."""
    names = [part.site.module for part in parts if part.site.kind != "experts"]
    wanted, fields = set(names), {"fan_in_fan_out": any(base.transposed(named.modules[name]) for name in names)}
    ends = sorted({name.rpartition(".")[2] for name in names})
    for rule in (ends, sorted(wanted), exactly(sorted(wanted))):
        if {name for name in named.modules if matches(rule, name)} == wanted:
            return fields | {"target_modules": rule}
    return fields | {"target_modules": []}


def _write_lora(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _by_module(parts: Sequence[Part]) -> list[list[Part]]:
    """One group a layer; the slices of a fused projection together."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.site.module if part.site.rows else part.site.name, []).append(part)
    return list(groups.values())


def _most(parts: Sequence[Part], key: str) -> Any:
    values = [part.hyper[key] for part in parts]
    return max(dict.fromkeys(values), key=values.count)


def _whole_lora(named: Named, group: Sequence[Part], root: bool) -> Part:
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
    return Part(first.path, LoRA, site, first.hyper | {"r": rank, "alpha": scale[0] * rank}, tensors)


def _lora_tensors(named: Named, part: Part, experts: Mapping[str, Sequence[Site]]) -> dict[str, Tensor]:
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


def _write_adalora(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _write_ia3(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    inner: list[str] = []
    outer: list[str] = []
    for group in _by_module(parts):
        site, scale = group[0].site, group[0].tensors["scale"]
        site = named.sites[site.module] if site.rows else site
        on_input = _side(group[0]) == "input"
        if site.kind not in ("linear", "conv2d") or any(p.site.rows and _side(p) == "input" for p in group):
            raise ValueError(f"{group[0].site.name}: ia3 on {site.kind} cannot be written as HF PEFT's")
        no_groups(named.modules[site.module], site, square=on_input)
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


def _side(part: Part) -> str:
    """Which side an IA3 delta scales."""
    side: str = part.hyper["side"]
    return side if side != "auto" else "input" if part.site.role == "mlp.down" else "output"


def _write_prompt(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    part = parts[0]
    two, task = is_two(named.model), task_of(named.model)
    if len(parts) > 1 or part.site.stack not in ("", "encoder") and two:
        raise ValueError("prompt_tuning: HF PEFT reads one prompt, in front of the (encoder's) input")
    pools = task == "SEQ_CLS" and not is_causal(named)
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


def _write_prefix(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sites, order = prefix_sites(named)
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
        "num_transformer_submodules": 2 if is_two(named.model) else 1, "num_layers": len(sites),
        "num_attention_heads": heads, "task_type": task_of(named.model) or "FEATURE_EXTRACTION",
    }, {"prompt_embeddings": table.permute(2, 0, 1, 3).flatten(1)}  # fmt: skip


def _write_oft(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields, tensors = oft_fields(parts, named.modules)
    return _write_targets(named, parts) | fields, tensors


def _write_boft(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields, tensors = boft_fields(parts, named.modules)
    return _write_targets(named, parts) | fields, tensors


def _write_norms(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {"peft_type": "LN_TUNING", "target_modules": _write_targets(named, parts)["target_modules"]}
    return fields, norm_tensors(named, [(part.site, part.tensors) for part in parts])


def _write_shira(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields, tensors = shira_fields(parts, named.modules)
    return _write_targets(named, parts) | fields, tensors


def _write_factors(named: Named, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    targets, patterns = _write_targets(named, parts), {}
    if parts[0].method is not VeRA:
        del targets["fan_in_fan_out"]
        for key, field in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
            patterns[key] = most = _most(parts, key)
            patterns[field] = {f"^{re.escape(p.site.name)}": p.hyper[key] for p in parts if p.hyper[key] != most}
    fields, tensors = factor_fields(parts, named.modules, patterns)
    return targets | fields, tensors


_Write = Callable[[Named, Sequence[Part]], tuple[dict[str, Any], dict[str, Tensor]]]
WRITE: dict[Any, _Write] = {
    LoRA: _write_lora, DoRA: _write_lora, AdaLoRA: _write_adalora, IA3: _write_ia3, PromptTuning: _write_prompt,
    PrefixTuning: _write_prefix, LNTuning: _write_norms, OFT: _write_oft, BOFT: _write_boft,
    SHiRA: _write_shira, LoHa: _write_factors, LoKr: _write_factors, VeRA: _write_factors,
}  # fmt: skip
