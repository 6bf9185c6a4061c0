"""Where: the places on a backbone that a delta can sit, found once and described by data.

One table of names gives every linear its role on every backbone; structure checks it: a block is an element of a list
of modules with an attention and something beside it, `up` reads the model's width, `down` writes it, a head lies
outside the backbone. A method says `attn.q` and never a module's name.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor, nn

from .errors import unknown

# Role -> last name components, in an attention and elsewhere in a block. A new backbone needs a word here, no code.
ATTN = {
    "q": "q q_proj q_lin q_attn query query_proj wq to_q",
    "k": "k k_proj k_lin key key_proj wk to_k",
    "v": "v v_proj v_lin value value_proj wv to_v",
    "qkv": "c_attn query_key_value qkv qkv_proj Wqkv wqkv in_proj",
    "o": "o o_proj out_proj out_lin wo Wo c_proj proj dense to_out.0",
}
MLP = {
    "mlp.gate": "gate_proj wi_0 w1",
    "mlp.up": "up_proj fc1 c_fc fc_in intermediate.dense intermediate_dense lin1 dense_h_to_4h wi wi_1 w3 layer_1 ffn",
    "mlp.gate_up": "gate_up_proj Wi weights_in",
    "mlp.down": "down_proj fc2 c_proj fc_out output.dense output_dense lin2 dense_4h_to_h wo Wo w2 layer_2 ffn_output "
    "weights_out",
    "router": "gate router router.classifier shared_expert_gate",
}
_ATTN = {name: role for role, names in ATTN.items() for name in names.split()}
_MLP = {name: role for role, names in MLP.items() for name in names.split()}
_EMBED = re.compile(r"(.*\.)?(word_embeddings?|embed_tokens|token_embeddings?|tok_embeddings|wte|embed_in|tokens_embed"
                    r"|embeddings|patch_embed\w*(\.proj\w*)?|conv_proj)")  # fmt: skip
_CROSS = re.compile(r"cross|enc_?dec|encoder_att|attn2", re.IGNORECASE)
# The norm behind the MLP's residual add, whose output is the block's: beside the MLP's exit, or in the block.
_POST_NORM = ("LayerNorm", "output_layer_norm", "full_layer_layer_norm")
# The norm behind the attention's residual add, where it does not stand beside the attention's exit (DistilBERT).
_MIDDLE_NORM = "sa_layer_norm"
# The norm in front of a block's MLP, where its name says on which side it stands; BART's and OPT's does not.
_PRE_NORM = (
    "pre_feedforward_layernorm", "layernorm_after", "post_attention_layernorm", "ln_2", "norm2", "layer_norm2", "mlp_norm",
)  # fmt: skip
# Text towers whose attention says that it is not causal, and is given a causal mask.
_CAUSAL_TEXT = re.compile("(CLIP|XCLIP|CLIPSeg|MetaClip2|GroupViT)Text")
_STACKS = {"vision": "visi|visual|image", "text": "text|language", "encoder": "encoder", "decoder": "decoder"}
_TASK_HEADS = {"classifier", "score", "qa_outputs", "classification_head", "multiple_choice_head", "sequence_summary"}
_LM_HEADS = {"lm_head", "embed_out", "generator_lm_head"}
_HEADS = _TASK_HEADS | _LM_HEADS | {"head", "heads", "fc", "pre_classifier"}
_D_HEAD = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head")
_N_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_PER_HEAD = {"query_key_value", "in_proj"}  # fused by head: q k v, q k v, ...; the others are all q, all k, all v

PLACES = ("span", "attention", "block", "input")
KINDS = ("linear", "conv2d", "embedding", "norm", "experts", "router", *PLACES)
HEADS = ("head", "lm_head")
GROUPS = ("attn", "cross", "mlp")  # a sub-layer, or for a method of its matrices all of them
ROLES = (*(f"attn.{r}" for r in ATTN), *(f"cross.{r}" for r in ATTN if r != "qkv"), *MLP, *GROUPS)
ROLES += ("mlp+norm", "attn_norm", "mlp_norm", "post_norm", "blocks")
ROLES += ("block", "input", "embed", "norm", "pooler", *HEADS)
SHORT = {r: (f"attn.{r}", f"cross.{r}") for r in ATTN} | {r: (f"mlp.{r}",) for r in ("gate", "up", "gate_up", "down")}


@dataclass(frozen=True, slots=True)
class Site:
    """One place on a backbone: `kind` says what can be done there, `role` what it is for. The matrix is (d_out, d_in).

    An embedding's matrix is (V, D): `d_out` = V, `d_in` = D. A convolution's `d_in` is in_channels/groups * h * w. A
    norm has its size twice; a span, block or attention the model's width, an input its embedding's width. Experts'
    sizes are those of one expert, whichever way their tensor is stored.
    """

    name: str  # unique: the module's path, + "[q]" for a slice, + ".param" for experts; "block:mlp" for a span
    module: str  # path of the module that carries the delta; of a span's exit
    kind: str  # one of KINDS
    role: str | None  # one of ROLES
    layer: int | None  # index of its block in its stack
    d_in: int
    d_out: int
    bias: bool
    stack: str = ""  # "encoder" or "decoder", "vision" or "text" on a backbone with several stacks
    param: str = "weight"  # the weight's name in the module
    rows: tuple[tuple[int, int], ...] | None = None  # a slice's ranges of output rows, in the order of its heads
    entry: str | None = None  # a span's module whose input is the sub-layer's input
    leave: str | None = None  # of the span of all blocks, the last: there `module` is the first
    n_experts: int = 0
    n_kv_heads: int = 0  # of an attention, and of a fused projection that can be sliced
    d_head: int = 0
    norm: str | None = None  # of an MLP's span, the norm in front of it inside the residual branch
    is_last: bool = False  # of a norm, whether its output is the block's
    is_middle: bool = False  # of a norm, whether it stands behind the attention's residual add
    is_causal: bool | None = (
        None  # of that norm, an attention, a block, an input: no token sees a later one; None: not known
    )
    patches: bool = False  # of a block: its stack reads an image's patches
    n_layers: int = 0  # how many blocks its stack has; 0 outside of stacks

    @property
    def n_weights(self) -> int:
        """Entries of the weight, of all experts together; 0 where the site is a place and not a weight."""
        if self.kind in PLACES:
            return 0
        return self.d_out if self.kind == "norm" else self.d_in * self.d_out * (self.n_experts or 1)


class _Stack(NamedTuple):
    """The blocks that a token passes one after the other."""

    name: str
    root: str  # the topmost module that belongs to this stack alone
    blocks: list[str]


def all_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of `model`'s backbone, in module order; deltas that are already attached do not show.

    Works on the meta device. Slices of fused projections are not in the table, `slices(site)` gives them.
    """
    modules: dict[str, nn.Module] = {}
    leaves: list[Site] = []
    _walk(model, "", modules, leaves, set())
    stacks = _stacks(modules, leaves)
    inside: dict[str, list[Site]] = {block: [] for stack in stacks for block in stack.blocks}
    outside: list[Site] = []
    for leaf in leaves:
        block = next((path for path in _prefixes(leaf.module) if path in inside), None)
        (outside if block is None else inside[block]).append(leaf)
    outside = _outside(modules, outside, stacks)
    found: dict[str, list[Site]] = {path: [] for path in modules}  # in module order
    for stack in stacks:
        embed = next((leaf for leaf in outside if leaf.role == "embed" and _under(leaf.name, stack.root)), None)
        owner = _common([_parent(path) for path in (embed.name if embed else _parent(stack.blocks[0]), *stack.blocks)])
        size = _width(inside[stack.blocks[0]])
        if embed:
            size = embed.d_in if embed.kind == "embedding" else embed.d_out
        patches = embed is not None and embed.kind == "conv2d" and _mixes_all(stack, modules, inside)
        causal: bool | None = None
        for i, block in enumerate(stack.blocks):
            here = list(_inside(block, i, stack.name, modules, inside[block]))
            causal = next((site.is_causal for site in here if site.role == "attn"), None)
            for site in here:
                site = replace(site, n_layers=len(stack.blocks))
                if site.kind == "block":
                    site = replace(site, patches=patches, is_causal=causal)
                found[block if site.kind == "span" else site.module].append(site)
        whole = Site(owner, owner, "input", "input", None, size, size, False, stack.name)
        found[owner].insert(0, replace(whole, is_causal=causal, n_layers=len(stack.blocks)))
    for leaf in outside:
        found[leaf.module].append(leaf)
    return tuple(site for here in found.values() for site in here)


def slices(site: Site) -> tuple[Site, ...]:
    """The parts of a fused projection as sites of their own: q, k, v of `attn.qkv`, gate and up of `mlp.gate_up`.

    Row layouts: all q, then all k, then all v (GPT-2, ViT, Phi-3), or for each group of heads its q, its k, its v
    (`query_key_value` of GPT-NeoX, BLOOM, Falcon). Empty where the site is not fused or its layout is not known.
    """
    sizes: dict[str, int]
    if site.kind == "linear" and site.role == "mlp.gate_up":
        n_groups, sizes = 1, {"mlp.gate": site.d_out // 2, "mlp.up": site.d_out // 2}
    elif site.kind == "linear" and site.role == "attn.qkv" and site.d_head:
        per_head = site.module.rpartition(".")[2] in _PER_HEAD
        n_groups = site.n_kv_heads if per_head else 1
        kv = site.n_kv_heads * site.d_head // n_groups
        sizes = {"attn.q": site.d_out // n_groups - 2 * kv, "attn.k": kv, "attn.v": kv}
    else:
        return ()
    parts, start, step = [], 0, site.d_out // n_groups
    for role, size in sizes.items():
        rows = tuple((g * step + start, g * step + start + size) for g in range(n_groups))
        name = f"{site.name}[{role.partition('.')[2]}]"
        parts.append(replace(site, name=name, role=role, d_out=size * n_groups, rows=rows))
        start += size
    return tuple(parts)


def expanded(table: Sequence[Site]) -> list[Site]:
    """The table with what is made of its rows: slices of fused projections, an MLP with its norm, all blocks as one span.

    These have roles of their own, which no other role or kind selects.
    """
    found: list[Site] = []
    in_front = {site.norm for site in table if site.norm is not None}
    for site in table:
        found += [site, *slices(site)]
        for role, holds in (("attn_norm", site.is_middle), ("mlp_norm", site.kind == "norm" and site.name in in_front)):
            if holds:
                found.append(replace(site, name=f"{site.name}:{role}", role=role, is_last=False, is_middle=False))
        if site.is_last:
            found.append(replace(site, name=f"{site.name}:post_norm", role="post_norm", is_last=False, is_middle=False))
        if site.norm is not None:
            found.append(replace(site, name=f"{site.name}+norm", role="mlp+norm", entry=site.norm, norm=None))
    stacks: dict[str, list[Site]] = {}
    for site in table:
        if site.kind == "block":
            stacks.setdefault(re.sub(r"\d+$", "", site.name), []).append(site)
    for first, *rest in stacks.values():
        last = (rest or [first])[-1]
        whole = replace(first, name=f"{first.name}:blocks", kind="span", role="blocks", layer=None)
        found.append(replace(whole, leave=last.module if rest else None))
    return found


def sites(
    model: nn.Module,
    where: str | Sequence[str],
    layers: int | Iterable[int] | str | None = None,
    kinds: Iterable[str] | None = None,
) -> tuple[Site, ...]:
    """The sites that `where` names, in module order.

    `where` is one of: roles and kinds ("attn.q,mlp.down", "norm"; `q` is q of every attention, self and cross; `attn` and
    `mlp` are the sub-layers, or all of their matrices for a method of matrices; "post_norm|block" is the first of them that
    the backbone has);
    "all-linear" (every linear but the heads); a regular expression that matches whole names; a list of names, each
    whole or a suffix after a dot (HF PEFT's rules), or a role. A role of a fused projection selects slices of it.
    Heads are selected by their roles `head` and `lm_head` or by name alone. `layers` are indices into each stack,
    from its end where negative, or a share of its depth, "1/6-1/2" (`share`); `kinds` are those that the method supports.

    Raises ValueError where a name, a role, a layer or `kinds` leaves nothing, with the nearest names that would be
    right.
    """
    return select(all_sites(model), where, layers, kinds)


def select(
    table: Sequence[Site],
    where: str | Sequence[str],
    layers: int | Iterable[int] | str | None = None,
    kinds: Iterable[str] | None = None,
) -> tuple[Site, ...]:
    """`sites` on a table that is there already."""
    supported = None if kinds is None else frozenset(kinds)
    order = {site.name: i for i, site in enumerate(expanded(table))}
    hits: dict[str, Site] = {}
    for part, matched in _matches(table, where, supported):
        kept = [site for site in matched if supported is None or site.kind in supported]
        if supported is not None and not kept:
            have, want = (", ".join(sorted(names)) for names in ({site.kind for site in matched}, supported))
            raise ValueError(f"where={part!r} names sites of kind {have}, supported here: {want}")
        hits.update((site.name, site) for site in kept)
    chosen = sorted(hits.values(), key=lambda site: order[site.name])
    if layers is not None:
        wanted = _layers(table, layers)
        chosen = [site for site in chosen if (site.stack, site.layer) in wanted]
        if not chosen:
            raise ValueError(f"where={where!r} has no site in layers={layers!r}")
    return tuple(chosen)


def _matches(
    table: Sequence[Site], where: str | Sequence[str], supported: frozenset[str] | None
) -> Iterator[tuple[str, list[Site]]]:
    """Each part of `where` with the sites it names, never none."""
    if isinstance(where, str):
        parts = [part.strip() for part in where.split(",")]
        if any("|" in part for part in parts):
            have = _words_of(table)
            parts = [next((w for w in part.split("|") if w in have), part.rpartition("|")[2])
                     if "|" in part and all(map(_is_role, part.split("|"))) else part for part in parts]  # fmt: skip
        known = [part for part in parts if _is_role(part)]
        plain = not re.search(r"[\\*+?\[\](){}|^$]", where)
        if where == "all-linear":
            yield where, _by_role(table, "linear", supported)
        elif len(known) == len(parts):
            yield from ((part, _by_role(table, part, supported)) for part in parts)
        elif plain and (known or len(parts) > 1):
            raise unknown("role or kind", next(p for p in parts if p not in known), [*_roles_of(table), *KINDS])
        else:
            yield where, _by_regex(table, where)
        return
    if not where:
        raise ValueError("where is an empty list; it must name at least one target")
    named = expanded(table)
    for target in where:
        found = [site for site in named if site.name == target or site.name.endswith(f".{target}")]
        if not any(supported is None or site.kind in supported for site in found) and _is_role(target):
            found = _by_role(table, target, supported)
        if not found:
            leafs = [site.name.rpartition(".")[2] for site in named]
            raise unknown("target", target, [*leafs, *_roles_of(table), *(site.name for site in named)])
        yield target, found


def _is_role(word: str) -> bool:
    return word in ROLES or word in KINDS or word in SHORT


def _words_of(table: Sequence[Site]) -> set[str | None]:
    """The roles and kinds that select something here."""
    return {word for site in expanded(table) for word in (site.role, site.kind)}


def _roles_of(table: Sequence[Site]) -> list[str]:
    have = {site.role for site in expanded(table)}
    return [role for role in ROLES if role in have]


def _by_role(table: Sequence[Site], word: str, supported: frozenset[str] | None) -> list[Site]:
    roles = SHORT.get(word, (word,))
    found = [s for s in expanded(table) if s.role in roles]
    found += [s for s in table if s.kind == word and s.role not in HEADS and s.role not in roles]
    if word in GROUPS and supported is not None and not any(s.kind in supported for s in found):
        found += [s for s in table if (s.role or "").startswith(f"{word}.") and s.kind in supported]
    if not found:
        have = ", ".join([*_roles_of(table), *sorted({site.kind for site in table})])
        raise ValueError(f"this backbone has no {word!r}; it has {have or 'no site at all'}")
    return found


def _by_regex(table: Sequence[Site], where: str) -> list[Site]:
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"where={where!r} is no regular expression: {error}") from None
    whole = expanded(table) if r"\[" in where or ":" in where else table
    named = [site for site in whole if site.kind != "span" or ":" in where]
    found = [site for site in named if pattern.fullmatch(site.name)]
    if not found:
        names = [site.name for site in table]
        if any(name.endswith(f".{where}") for name in names):
            raise ValueError(f"where={where!r} matches no whole name; as a list, [{where!r}], it matches ends of names")
        raise unknown("site", where, [*_roles_of(table), *KINDS, *(n.rpartition(".")[2] for n in names), *names])
    return found


def share(layers: str) -> tuple[Fraction, Fraction]:
    """(a, b) of "a-b", a part of each stack's depth: layer i of n lies in it where a <= (i + 1/2) / n < b.

    a and b are 0, 1 or a fraction: "0-1/6", "1/6-1/2", "5/6-1". A layer's middle lies in one part alone of those that divide
    0-1, so that each layer does, at any depth. Raises ValueError where it is no share; "0-1", all layers, is none.
    """
    parts = re.fullmatch(r"(\d+(?:/[1-9]\d*)?)-(\d+(?:/[1-9]\d*)?)", layers.strip())
    low, high = map(Fraction, parts.groups()) if parts and "/" in layers else (Fraction(1), Fraction(0))
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"layers={layers!r} is no share of a stack's depth; write two fractions from 0 to 1, the smaller one first: "
            f"'0-1/6', '1/6-1/2', '5/6-1'"
        )
    return low, high


def _layers(table: Sequence[Site], layers: int | Iterable[int] | str) -> set[tuple[str, int | None]]:
    """(stack, index) of every layer that is asked for; an index, or a share's layers, must lie in one stack at least."""
    n_layers: dict[str, int] = {}
    for site in table:
        if site.kind == "block":
            n_layers[site.stack] = n_layers.get(site.stack, 0) + 1
    sizes = ", ".join(f"{n} layers" + (f" in its {stack}" if stack else "") for stack, n in n_layers.items())
    if isinstance(layers, str):
        low, high = share(layers)
        found: set[tuple[str, int | None]] = {
            (stack, i) for stack, n in n_layers.items() for i in range(n) if low <= Fraction(2 * i + 1, 2 * n) < high
        }
        if not found:
            raise ValueError(
                f"layers={layers!r} holds the middle of no layer: this backbone has {sizes or 'no layers'}"
            )
        return found
    indices = [layers] if isinstance(layers, int) else list(layers)
    if not indices or not all(isinstance(i, int) for i in indices):
        raise ValueError(f"layers={layers!r} must be an index or several, negative from the end")
    for i in indices:
        if not any(-n <= i < n for n in n_layers.values()):
            raise ValueError(f"layer {i} is out of range: this backbone has {sizes or 'no layers'}")
    return {(stack, i % n) for stack, n in n_layers.items() for i in indices if -n <= i < n}


def _walk(module: nn.Module, path: str, modules: dict[str, nn.Module], leaves: list[Site], seen: set[int]) -> None:
    """`named_modules`, but blind to deltas, and a linear has no children (HF PEFT's hold the base as one)."""
    seen.add(id(module))
    modules[path] = module
    own = list(_leaves(path, module))
    leaves += own
    if own and own[0].kind == "linear":
        return
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen and name not in ("deltas", "banks"):
            _walk(child, f"{path}.{name}" if path else name, modules, leaves, seen)


def _leaves(path: str, module: nn.Module) -> Iterator[Site]:
    """The matrices and norm vectors that `module` itself holds, without their roles; reads sizes, never values."""
    params = {name: p for name, p in module._parameters.items() if p is not None}
    if not (params or module._buffers or {"base_layer", "parametrizations"} & module._modules.keys()):
        return
    last = path.rpartition(".")[2]
    bias = getattr(module, "bias", None) is not None
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    classes = " ".join(c.__name__ for c in type(module).__mro__)  # an attached module's class is a subclass of its own
    if isinstance(module, nn.Embedding):
        yield Site(path, path, "embedding", None, None, module.embedding_dim, module.num_embeddings, False)
    elif isinstance(module, nn.Conv2d):
        yield Site(path, path, "conv2d", None, None, math.prod(shape[1:]), shape[0], bias)
    elif isinstance(d_in, int) and isinstance(d_out, int):  # quantised linears have both, and another weight
        yield Site(path, path, "linear", None, None, d_in, d_out, bias)
    elif len(shape) == 2 and "Conv1D" in classes:
        yield Site(path, path, "linear", None, None, *shape, bias)
    elif len(shape) == 1 and ("norm" in classes.lower() or re.match("ln_|.*norm", last, re.IGNORECASE)):
        yield Site(path, path, "norm", "norm", None, *shape, *shape, bias)
    elif len(shape) == 2 and _MLP.get(last) == "router":
        yield Site(path, path, "router", None, None, *shape[::-1], bias)
    fused = {name: p.shape for name, p in params.items() if p.ndim == 3 and name in _MLP}
    flip = getattr(module, "is_transposed", None) if fused else None
    if flip is None and {"gate_up_proj", "down_proj"} <= fused.keys():
        flip = fused["gate_up_proj"][2] != fused["down_proj"][1]  # stored as (E, O, I), both are the model's width
    for name, (n, *sizes) in fused.items():
        o, i = reversed(sizes) if flip else sizes
        full = f"{path}.{name}".lstrip(".")
        yield Site(full, path, "experts", None, None, i, o, f"{name}_bias" in params, param=name, n_experts=n)


def _is_attn(component: str) -> bool:
    return "attn" in component or "ttention" in component


def _stacks(modules: dict[str, nn.Module], leaves: list[Site]) -> list[_Stack]:
    """Blocks are the elements of the innermost lists one of whose elements has an attention and something beside it.

    Innermost, not longest: T5's block holds a list of sub-layers, Swin's stage a list of blocks. Without any attention
    they are the elements of the longest list.
    """
    holds: dict[str, set[bool]] = {}
    for leaf in leaves:
        if leaf.kind in ("linear", "experts"):
            parts = leaf.module.split(".")
            for i, part in enumerate(parts[:-1], 1):
                if part.isdigit():
                    holds.setdefault(".".join(parts[:i]), set()).add(any(map(_is_attn, parts[i:])))
    both = {path for path, kinds in holds.items() if len(kinds) == 2}
    lists = {_parent(path) for path in both - {outer for path in both for outer in _prefixes(_parent(path))}}
    if not lists:
        used = {_parent(path) for leaf in leaves for path in _prefixes(_parent(leaf.module))}
        plain = [path for path, m in modules.items() if path in used and isinstance(m, nn.ModuleList)]
        lists = {max(plain, key=lambda path: len(modules[path]._modules))} if plain else set()
    groups: dict[str, list[str]] = {}
    for path in modules:
        if path.rpartition(".")[2].isdigit() and _parent(path) in lists:
            groups.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(path)
    stacks = []
    for key, blocks in groups.items():
        others = {path for other in groups if other != key for path in _prefixes(other)}
        root = next((path for path in reversed(list(_prefixes(key))) if path not in others), key) if others else ""
        name = next((name for name, words in _STACKS.items() if re.search(words, root)), root.rpartition(".")[2])
        stacks.append(_Stack(name if root else "", root, blocks))
    names = [stack.name for stack in stacks]
    return [stack._replace(name=stack.root) if names.count(stack.name) > 1 else stack for stack in stacks]


def _mixes_all(stack: _Stack, modules: dict[str, nn.Module], inside: dict[str, list[Site]]) -> bool:
    """Does each token of a block see all others, wherever they stand? Not in stages, nor by relative positions."""
    held = {
        key
        for path, module in modules.items()
        if any(_under(path, block) for block in stack.blocks)
        for key in (path.rpartition(".")[2], *module._parameters, *module._buffers)
    }
    staged = len({_width(inside[block]) for block in stack.blocks}) > 1 or len({_parent(b) for b in stack.blocks}) > 1
    return any(map(_is_attn, held)) and not staged and not any("relative_position" in key for key in held)


def _inside(block: str, layer: int, stack: str, modules: dict[str, nn.Module], leaves: list[Site]) -> Iterator[Site]:
    """A block's own site, its attentions and spans, then its leaves with their roles."""
    width = _width(leaves)
    attns, mlp = _sublayers(block, leaves, width)
    wide = (layer, width, width, False, stack)
    roles = {leaf.name: role for role, members in mlp.items() for leaf in members}
    heads: dict[str, tuple[int, int]] = {}
    spans: dict[str, Site] = {}
    behind: list[str] = []  # names that the norm behind the attention's residual add can have
    is_causal: dict[str, bool | None] = {}  # of an attention by its role

    def span(role: str, entry: str, leave: str, norm: str | None = None) -> None:
        name = f"{block}:{role}" if f"{block}:{role}" not in spans else f"{leave}:{role}"
        causal = is_causal.get(role)
        spans[name] = Site(name, leave, "span", role, *wide, entry=entry, norm=norm, is_causal=causal)

    yield Site(block, block, "block", "block", *wide)
    for path, own in attns.items():
        kind = "cross" if _CROSS.search(path[len(block) :]) else "attn"
        if "q" in own or kind == "cross":
            own.pop("qkv", None)  # beside a q (GPT-2's cross-attention) it fuses k and v alone
        first = own.get("q") or own.get("qkv")
        if first is None:  # an attention by name alone, for example torch's, whose projections are no modules
            continue
        flags = [getattr(modules[_parent(first.module)], flag, None) for flag in ("is_causal", "is_decoder")]
        is_causal[kind] = any(flags) if {True, False} & set(flags) else None
        if any(
            _CAUSAL_TEXT.match(type(modules[at]).__name__) for at in _prefixes(block)
        ):  # the mask is made above the attention
            is_causal[kind] = True
        if "o" in own:
            span(kind, first.module, own["o"].module)
            if kind == "attn":
                behind += [f"{_parent(own['o'].module)}.LayerNorm", f"{block}.{_MIDDLE_NORM}"]
        core = _parent(first.module)
        n_kv, d_head, is_ordered = _heads(modules[core], own)
        if "qkv" in own or {"k", "v"} <= own.keys():
            causal = is_causal[kind]
            yield Site(core, core, "attention", kind, *wide, n_kv_heads=n_kv, d_head=d_head, is_causal=causal)
        if "qkv" in own and is_ordered:
            heads[first.name] = (n_kv, d_head)
        roles |= {leaf.name: f"{kind}.{role}" for role, leaf in own.items()}
    ins = [leaf.module for role in ("mlp.gate", "mlp.gate_up", "mlp.up") for leaf in mlp.get(role, [])]
    outs = mlp.get("mlp.down", [])
    norm = _pre_norm(block, modules, ins[0]) if ins else None
    if ins and len(outs) == 1 and outs[0].kind == "linear" and "router" not in mlp:
        span("mlp", ins[0], outs[0].module, norm)
    elif ins and outs and (whole := _common([_parent(leaf.name) for group in mlp.values() for leaf in group])) != block:
        span("mlp", whole, whole, norm)  # a mixture of experts is one module with one input and one output
    yield from spans.values()
    for leaf in leaves:
        n_kv, d_head = heads.get(leaf.name, (0, 0))
        role = roles.get(leaf.name, leaf.role)
        is_last = leaf.kind == "norm" and len(outs) == 1 and leaf.name in _post_norms(block, outs[0].module)
        is_middle = leaf.kind == "norm" and leaf.name in behind
        if is_middle:
            leaf = replace(leaf, is_middle=True, is_causal=is_causal.get("attn"))
        yield replace(leaf, role=role, layer=layer, stack=stack, n_kv_heads=n_kv, d_head=d_head, is_last=is_last)


def _pre_norm(block: str, modules: dict[str, nn.Module], entry: str) -> str | None:
    """The norm whose input is the residual stream and whose output the block's MLP reads; None where no name says so."""
    beside = f"{_parent(_parent(entry))}.layer_norm"  # T5's list of sub-layers
    if _parent(_parent(entry)) != block and beside in modules:
        return beside
    names = modules[block]._modules
    if (
        "post_feedforward_layernorm" in names and "pre_feedforward_layernorm" not in names
    ):  # OLMo 2 norms what comes out
        return None
    return next((f"{block}.{name}" for name in _PRE_NORM if name in names), None)


def _post_norms(block: str, leave: str) -> list[str]:
    """Names that the norm behind the MLP's residual add can have."""
    return [f"{_parent(leave)}.LayerNorm"] * (_parent(leave) != block) + [f"{block}.{n}" for n in _POST_NORM]


def _sublayers(block: str, leaves: list[Site], width: int) -> tuple[dict[str, dict[str, Site]], dict[str, list[Site]]]:
    """A block's attentions, {path: {"q": leaf}}, and the rest, {"mlp.up": leaves}: by name, checked by the width."""
    attns: dict[str, dict[str, Site]] = {}
    mlp: dict[str, list[Site]] = {}
    for leaf in leaves:
        parts = leaf.name.removeprefix(f"{block}.").split(".")
        depth = next((i for i, part in enumerate(parts[:-1], 1) if _is_attn(part)), 0)
        table = _ATTN if depth else _MLP
        role = table.get(".".join(parts[-2:])) or table.get(parts[-1])
        if role is None or leaf.kind not in ("linear", "experts", "router"):
            continue
        if depth:
            attns.setdefault(".".join([block, *parts[:depth]]), {}).setdefault(role, leaf)
            continue
        if role != "router" and width != (leaf.d_out if role == "mlp.down" else leaf.d_in):
            if width not in (leaf.d_in, leaf.d_out):
                continue
            role = "mlp.up" if leaf.d_in == width else "mlp.down"  # a name may lie (lin1, w2), the model's width not
        mlp.setdefault(role, []).append(leaf)
    if "mlp.gate" in mlp and not {"mlp.up", "router"} & mlp.keys():  # a w1 without a w3 gates nothing
        mlp["mlp.up"] = mlp.pop("mlp.gate")
    return attns, mlp


def _heads(core: nn.Module, own: dict[str, Site]) -> tuple[int, int, bool]:
    """(n_kv_heads, d_head, whether a fused projection's rows lie in a known order) of an attention."""
    owners = (core, getattr(core, "config", None))

    def size(names: Iterable[str]) -> int:
        values = (getattr(owner, name, None) for owner in owners for name in names)
        return next((value for value in values if isinstance(value, int)), 0)

    fused = own.get("qkv")
    d_q = own["q"].d_out if fused is None else own["o"].d_in if "o" in own else fused.d_out // 3
    d_head = size(_D_HEAD) or d_q // (size(_N_HEADS) or d_q + 1)
    d_kv = (own["k"].d_out if "k" in own else 0) if fused is None else (fused.d_out - d_q) // 2
    n_kv = d_kv // d_head if d_head else 0
    names = {cls.__name__ for cls in type(core).__mro__}  # these two fuse by device and by head under others' names
    return n_kv, d_head, "CodeGenAttention" not in names and ("GPTBigCodeAttention" not in names or n_kv == 1)


def _outside(modules: dict[str, nn.Module], leaves: list[Site], stacks: list[_Stack]) -> list[Site]:
    """The leaves beside the blocks with role and stack: embed, norm, pooler, and the heads after the backbone."""
    backbone = _backbone(modules, [block for stack in stacks for block in stack.blocks])
    scope = backbone.rfind(".") + 1 if backbone else 0  # heads are siblings of the backbone
    embeds = [leaf for leaf in leaves if leaf.kind in ("embedding", "conv2d") and _EMBED.fullmatch(leaf.name)]
    vocab = {leaf.d_out for leaf in embeds if leaf.kind == "embedding"}
    roles: dict[str, str | None] = {}
    owners = {leaf.name: next((s.name for s in stacks if s.root and _under(leaf.name, s.root)), "") for leaf in leaves}
    for leaf in leaves:
        parts = leaf.name[scope:].split(".")
        fits = parts[0] in _HEADS or (len(parts) == 1 and leaf.kind == "linear" and leaf.d_out in vocab)
        if _LM_HEADS & {*parts}:
            roles[leaf.name] = "lm_head"
        elif not owners[leaf.name] and (not _under(leaf.name, backbone) if backbone else fits):
            roles[leaf.name] = "head"
        elif "pooler" in parts:
            roles[leaf.name] = "pooler"
        else:
            roles[leaf.name] = "embed" if leaf in embeds else leaf.role
    if any(roles[leaf.name] in HEADS and leaf.kind == "linear" and leaf.d_out in vocab for leaf in leaves):
        for name, role in roles.items():  # a language model: its decoder, and what comes before it (dense, norm)
            if role == "head" and name[scope:].partition(".")[0] not in _TASK_HEADS:
                roles[name] = "lm_head"
    return [replace(leaf, role=roles[leaf.name], stack=owners[leaf.name]) for leaf in leaves]


def _backbone(modules: dict[str, nn.Module], blocks: list[str]) -> str | None:
    """The child that a transformers model calls its base model, if it has one beside its heads."""
    for path, module in modules.items():
        prefix = getattr(type(module), "base_model_prefix", "")
        inner = f"{path}.{prefix}" if path else prefix
        if prefix and inner in modules and all(_under(block, inner) for block in blocks):
            return inner
    return None


def _width(leaves: list[Site]) -> int:
    """The model's width in a block: what its first linear reads, else the size of its first leaf."""
    return next((leaf.d_in for leaf in leaves if leaf.kind == "linear"), leaves[0].d_in if leaves else 0)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _prefixes(path: str) -> Iterator[str]:
    """`path` and the modules around it, from the inside out, without the root."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _common(paths: Sequence[str]) -> str:
    """The innermost module around all of `paths`."""
    return next((p for p in _prefixes(paths[0]) if all(_under(path, p) for path in paths)), "")
