"""Prompts and prefixes of a configuration: where HF PEFT puts them, and the one tensor of their file."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.site import Site
from ..methods.prefix import PrefixTuning
from ..methods.prompt import PromptTuning
from .beside import finished_plan, saved_sites
from .names import Named
from .pieces import Key, Piece, Plan, made


def plan_prompt(model: nn.Module, fields: dict[str, Any], is_file: bool) -> Plan:
    named = Named(model)
    _check_task(model, fields)
    sites = _stack(named, "input", "encoder")
    if len(sites) != 1:
        raise ValueError("prompts need a backbone with one input, or an encoder's")
    (site,) = sites
    n, width = _length(fields), fields.get("token_dim")
    if width not in (None, site.d_in):
        raise ValueError(f"token_dim = {width}, but the embeddings here have {site.d_in}")
    pooled = fields["task_type"] == "SEQ_CLS" and not is_causal(named)
    rows = n * (fields.get("num_transformer_submodules") or (2 if fields["task_type"] == "SEQ_2_SEQ_LM" else 1))
    leaf = made(PromptTuning, n=n, pooled=pooled)

    def here(path: str) -> list[Piece]:
        return [Piece("prompt_embeddings", (rows, site.d_in), lambda t: {(path, site.name, "prompt"): t[:n]})]

    return finished_plan(named, [leaf], [(0, here)], saved_sites(named, fields, is_file), {}, "base_model.")


def plan_prefix(model: nn.Module, fields: dict[str, Any], is_file: bool) -> Plan:
    named = Named(model)
    _check_task(model, fields)
    sites, order = prefix_sites(named)
    heads, width = sites[0].n_kv_heads, sites[0].n_kv_heads * sites[0].d_head
    for key, own in (("num_layers", len(sites)), ("num_attention_heads", heads), ("token_dim", width)):
        if fields.get(key) not in (None, own):
            raise ValueError(f"{key} = {fields[key]}, but the attentions here have {own}")
    given = fields.get("num_transformer_submodules")
    if given not in (None, 2 if is_two(model) else 1):
        raise ValueError(f"num_transformer_submodules = {given} does not fit this backbone")
    n = _length(fields)
    hyper: dict[str, Any] = {"n": n, "shift": True}
    if fields.get("prefix_projection") and not is_file:
        hyper["mid"] = fields.get("encoder_hidden_size")
        if not hyper["mid"]:
            raise ValueError("prefix_projection needs encoder_hidden_size")
    where = named.where([s.name for s in sites], PrefixTuning.kinds, None if is_two(model) else "attn")
    leaf = made(PrefixTuning, **hyper, where=where)

    def here(path: str) -> list[Piece]:
        def split(t: Tensor) -> dict[Key, Tensor]:
            t = t.view(n, 2 * len(sites), heads, sites[0].d_head).permute(1, 2, 0, 3)
            found = {}
            for site, pair in zip(sites, order, strict=True):
                found[path, site.name, "key"], found[path, site.name, "value"] = t[2 * pair], t[2 * pair + 1]
            return found

        return [Piece("prompt_embeddings", (n, 2 * len(sites) * width), split)]

    return finished_plan(named, [leaf], [(0, here)], saved_sites(named, fields, is_file), {}, "base_model.")


def prefix_sites(named: Named) -> tuple[list[Site], list[int]]:
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
    return sites, [2 * i % n if is_two(named.model) else i for i in range(n)]


def _stack(named: Named, kind: str, side: str) -> list[Site]:
    """The sites of that kind on the backbone's only stack, or on that side of an encoder-decoder."""
    sites = [s for s in named.table if s.kind == kind and s.role in ("input", "attn")]
    return [s for s in sites if s.stack == side] or [s for s in sites if len({t.stack for t in sites}) == 1]


def _check_task(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Raise ValueError where HF PEFT itself fails."""
    task = fields.get("task_type")
    if task is None:
        raise ValueError(f"{fields['peft_type']} needs a task_type: without one HF PEFT itself fails")
    if is_two(model) and task != "SEQ_2_SEQ_LM":
        raise ValueError(f"{fields['peft_type']}: task_type = {task!r} fails in HF PEFT itself on an encoder-decoder")


def _length(fields: Mapping[str, Any]) -> int:
    n = fields.get("num_virtual_tokens")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_virtual_tokens must be a number of tokens, not {n!r}")
    return n


def is_causal(named: Named) -> bool:
    return any(getattr(named.modules[s.module], "is_causal", False) for s in _stack(named, "attention", "decoder"))


def is_two(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
