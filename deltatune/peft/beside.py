"""What trains beside the method: saved modules, layers' own biases, rows of tables; and the whole plan of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core import base
from ..core.compose import Leaf, Sum, Tree
from ..core.errors import unknown
from ..core.record import HEAD
from ..core.site import Site
from ..methods.baseline import Copy
from ..methods.vectors import BitFit
from .names import AUTO_HEADS, Named, all_used
from .pieces import Key, Piece, Plan, made


def finished_plan(
    named: Named,
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
        leaves.append(made(Copy, where=named.where([s.name for s in copied], Copy.kinds)))
    tree: Tree = leaves[0] if len(leaves) == 1 else Sum(*leaves)
    paths = [path for path, _ in tree.leaves()]
    done = [piece for i, make in pieces for piece in make(paths[i])]
    at = HEAD if head else paths[-1]
    done += [piece for site in copied for piece in _copy_pieces(named, site, at, prefix)]
    keys = {piece.key for piece in done}
    twice = tuple(f"{prefix}{at}.{k}." for at in saved for k in ("original_module", "modules_to_save"))
    return Plan(tree, head, done, {k: t for k, t in allowed.items() if k not in keys}, twice)


def saved_sites(named: Named, fields: Mapping[str, Any], is_file: bool) -> dict[str, list[Site]]:
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
        unasked = AUTO_HEADS.get(fields.get("task_type") or "", ())  # HF PEFT notes them in the object itself
        all_used(named, "modules_to_save", [e for e in ends if e not in unasked and not named.ends([e])])
    return found


def _copy_pieces(named: Named, site: Site, path: str, prefix: str) -> Iterator[Piece]:
    module, at = named.modules[site.module], f"{prefix}{site.module}"

    def weight(t: Tensor) -> dict[Key, Tensor]:
        t = t.mT if base.transposed(module) else t.flatten(1) if site.kind == "conv2d" else t
        return {(path, site.name, "weight"): t}

    yield Piece(f"{at}.weight", tuple(base.stored(module, site).shape), weight)
    if site.bias:
        yield Piece(f"{at}.bias", (site.d_out,), lambda t: {(path, site.name, "bias"): t})


def biased_sites(
    named: Named, fields: Mapping[str, Any], chosen: Sequence[Site], saved: Mapping[str, list[Site]], is_file: bool
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


def own_bias(named: Named, site: Site, adapted: bool) -> tuple[str, Tensor]:
    """A layer's bias in the base, and its key in a file."""
    own = base.Base(named.modules[site.module], site).bias
    assert own is not None
    return f"base_model.model.{site.module}{'.base_layer' * adapted}.bias", own


def bias_piece(named: Named, site: Site, adapted: bool, path: str) -> Piece:
    key, own = own_bias(named, site, adapted)
    return Piece(key, (site.d_out,), lambda t: {(path, site.name, "d"): t.to(own.device) - own})


def token_rows(named: Named, fields: Mapping[str, Any]) -> list[tuple[str, list[int], list[Site]]]:
    """(key in the file, ids, sites): the table and what is tied to it."""
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
        found.append((rows_key(names[0]), list(ids), tied_sites(named, names[0])))
    return found


def tied_sites(named: Named, at: str) -> list[Site]:
    """The sites that run with the table of the module `at`: of the input table also those that are tied to it."""
    weight = named.modules[at]._parameters.get("weight")
    is_input = named.modules[at] is named.inputs
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


def rows_key(at: str) -> str:
    """The key of the trained rows of the table `at`."""
    return f"base_model.model.{at}.token_adapter.trainable_tokens_delta"


def rows_pieces(key: str, k: int, sites: Sequence[Site], path: str) -> list[Piece]:
    return [Piece(key, (k, sites[0].d_in), lambda t: {(path, sites[0].name, "rows"): t})]
