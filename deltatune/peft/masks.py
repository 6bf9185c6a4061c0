"""SHiRA, both ways: HF PEFT holds rows and columns beside values, r (O + I) of them at each layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base
from ..core.site import Site
from .pieces import Piece


def hyper_shira(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of every layer. Without a seed HF PEFT draws from a generator that always starts alike."""
    seed = fields.get("random_seed")
    return {"r": fields.get("r", 32), "mask_seed": torch.Generator().initial_seed() if seed is None else seed}


def check_shira(module: nn.Module, site: Site) -> None:
    """Raise ValueError on a layer where HF PEFT has no SHiRA."""
    if site.kind != "linear" or site.rows or base.transposed(module):
        what = "a slice of a fused projection" if site.rows else f"a {base.own_class(module).__name__}"
        raise ValueError(f"{site.name}: HF PEFT has no SHiRA on {what}")


def mask_pieces(module: nn.Module, site: Site, hyper: Mapping[str, Any], path: str) -> Iterator[Piece]:
    """The tensors of one layer."""
    check_shira(module, site)
    at, k = f"base_model.model.{site.module}", hyper["r"] * (site.d_out + site.d_in)

    def places(t: Tensor) -> dict[tuple[str, str, str], Tensor]:
        rows, columns = t.to(torch.int64)
        return {(path, site.name, "index"): (rows * site.d_in + columns).to(torch.int32)}

    yield Piece(f"{at}.shira_indices", (2, k), places)
    yield Piece(f"{at}.shira_weight", (k,), lambda t: {(path, site.name, "values"): t})


def shira_fields(parts: Sequence[Any], modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One configuration for these layers, and their tensors.

    Where a layer has fewer entries than r (O + I), others of value 0 fill it up. Raises ValueError where they do not fit.
    """
    n_at = {part.site.name: part.tensors["values"].numel() for part in parts}
    r = max(-(-n_at[part.site.name] // (part.site.d_out + part.site.d_in)) for part in parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        site, index, values = part.site, part.tensors["index"].long(), part.tensors["values"]
        check_shira(modules[site.module], site)
        k, n = r * (site.d_out + site.d_in), site.d_out * site.d_in
        if k > n:
            raise ValueError(f"{site.name}: {len(index)} entries cannot be written as HF PEFT's r (O + I) = {k} of {n}")
        free = torch.ones(n, dtype=torch.bool, device=index.device)
        free[index] = False
        index = torch.cat([index, free.nonzero()[: k - len(index), 0]])
        order = index.argsort()
        values = torch.cat([values, values.new_zeros(k - len(values))])[order]
        index = index[order]
        at = f"base_model.model.{site.module}"
        tensors[f"{at}.shira_indices"] = torch.stack([index // site.d_in, index % site.d_in]).to(torch.int32)
        tensors[f"{at}.shira_weight"] = values
    return {"peft_type": "SHIRA", "r": r, "mask_type": "random", "random_seed": parts[0].hyper["mask_seed"]}, tensors
