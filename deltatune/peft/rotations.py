"""OFT and BOFT of HF PEFT's: their blocks at each layer, in and out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base
from ..core.site import Site
from ..methods.orthogonal import BOFT, OFT, n_factors, nearest_divisor

_SERIES_SINCE = (0, 18)  # the version from which on a file's Cayley-Neumann series is the one that is read


def hyper_oft(fields: Mapping[str, Any], is_file: bool) -> dict[str, Any]:
    """The hyperparameters that are alike at every layer. Raises ValueError where HF PEFT's numbers have no meaning here."""
    terms = fields.get("num_cayley_neumann_terms", 5) if fields.get("use_cayley_neumann", True) else 0
    if terms in (1, 2):
        raise ValueError(
            f"OFT: num_cayley_neumann_terms = {terms} cannot be kept: so few terms are no series of a rotation"
        )
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("peft_version") or ""))
    if terms and is_file and (version is None or (int(version[1]), int(version[2])) < _SERIES_SINCE):
        raise ValueError(
            f"OFT: peft_version = {fields.get('peft_version')!r}: before 0.18 use_cayley_neumann was another series; the "
            f"file cannot be read as it was trained"
        )
    return {
        "share": bool(fields.get("block_share")), "terms": 4 if terms == 3 else terms,  # HF PEFT runs 3 as 4
        "eps": fields.get("eps", 6e-5) if fields.get("coft") else None,
    }  # fmt: skip


def oft_at(module: nn.Module, site: Site, fields: Mapping[str, Any], hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters at one layer: HF PEFT takes the nearest number of blocks, or the nearest size, that divides it."""
    check_oft(module, site)
    r, size = fields.get("r", 0), fields.get("oft_block_size", 32)
    if (r > 0) == (size > 0):
        raise ValueError(f"OFT: of r = {r} and oft_block_size = {size} one must be 0")
    block = site.d_in // nearest_divisor(site.d_in, r) if r else nearest_divisor(site.d_in, size)
    return {"block": block, **hyper}


def check_oft(module: Any, site: Site) -> None:
    """Raise ValueError on a layer where HF PEFT's OFT does not stand, or is no change of the weight."""
    if site.kind == "conv2d" and (module.kernel_size != (1, 1) or module.groups != 1):
        raise ValueError(
            f"{site.name}: OFT of HF PEFT's rotates a convolution's patches and adds them up where they overlap, which is no "
            f"change of its weight"
        )
    if base.transposed(module):
        raise ValueError(f"{site.name}: HF PEFT has no OFT on a {base.own_class(module).__name__}")


def boft_at(module: nn.Module, site: Site, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters at one layer. Raises ValueError where HF PEFT would not build it."""
    check_boft(module, site)
    size, number = fields.get("boft_block_size", 4), fields.get("boft_block_num", 0)
    factors = fields.get("boft_n_butterfly_factor", 1)
    if (size > 0) == (number > 0):
        raise ValueError(f"BOFT: of boft_block_size = {size} and boft_block_num = {number} one must be 0")
    if site.d_in % (size or number):
        what = f"boft_block_size = {size}" if size else f"boft_block_num = {number}"
        raise ValueError(f"{site.name}: {what} does not divide its width {site.d_in}")
    size = size or site.d_in // number
    if factors != n_factors(factors, size, site.d_in // size):
        raise ValueError(
            f"{site.name}: boft_n_butterfly_factor = {factors} does not fit {site.d_in // size} blocks of {size}"
        )
    return {"block": size, "factors": factors}


def check_boft(module: Any, site: Site) -> None:
    """Raise ValueError on a layer where HF PEFT has no BOFT, or runs another convolution than the layer's."""
    plain = site.kind != "conv2d" or (
        module.groups == 1 and module.padding_mode == "zeros" and module.dilation == (1, 1)
        and not isinstance(module.padding, str)
        and all(pair[0] == pair[1] for pair in (module.kernel_size, module.stride, module.padding))
    )  # fmt: skip
    if site.kind == "embedding" or base.transposed(module) or not plain:
        raise ValueError(f"{site.name}: HF PEFT has no BOFT on this {base.own_class(module).__name__}")


def oft_tensors(site: Site, hyper: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int]:
    """The name in a file of a layer's blocks, their shape, and the sign of their entries here.

    With the exact inverse HF PEFT's blocks are (I - Q)(I + Q)^-1, with the series (I + Q)(I - Q)^-1. A table's rows are
    rotated from the other side than a layer's inputs.
    """
    size = hyper["block"]
    key = "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"
    n = 1 if hyper["share"] else site.d_in // size
    return key, (n, size * (size - 1) // 2), (1 if hyper["terms"] else -1) * (-1 if site.kind == "embedding" else 1)


def boft_tensors(site: Site, hyper: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in a file, slot here, shape in a file)"""
    size = hyper["block"]
    yield "boft_R", "q", (hyper["factors"], site.d_in // size, size, size)
    yield "boft_s", "s", (1, site.d_out) if site.kind == "conv2d" else (site.d_out, 1)


def upper(t: Tensor) -> Tensor:
    """HF PEFT's square blocks as what is trained here: it rotates by (I - S)(I + S)^-1, S their skew part."""
    rows, cols = torch.triu_indices(t.shape[-1], t.shape[-1], 1, device=t.device)
    return (0.5 * (t.mT - t))[..., rows, cols]


def square(q: Tensor, size: int) -> Tensor:
    """The skew blocks whose `upper` is `q`."""
    rows, cols = torch.triu_indices(size, size, 1, device=q.device)
    half = q.new_zeros(*q.shape[:-1], size, size)
    half[..., rows, cols] = q
    return half.mT - half


def oft_fields(parts: Sequence[Any], modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One configuration for these layers, and their tensors. Raises ValueError where HF PEFT's format has none."""
    common = {tuple(part.hyper[key] for key in ("share", "terms", "eps")) for part in parts}
    if len(common) > 1:
        raise ValueError("oft: share, terms and eps by place cannot be written as HF PEFT's, which has one of each")
    ((share, terms, eps),) = common
    if terms == 3:
        raise ValueError("oft: terms = 3 cannot be written as HF PEFT's, whose 3 terms are 4")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        _whole(part)
        check_oft(modules[part.site.module], part.site)
        size = nearest_divisor(part.site.d_in, part.hyper["block"])
        key, _, sign = oft_tensors(part.site, part.hyper | {"block": size})
        tensors[f"base_model.model.{part.site.module}.{key}"] = sign * part.tensors["q"]
    return {
        "peft_type": "OFT", **_one_number(parts), "block_share": share, "coft": eps is not None,
        "use_cayley_neumann": terms > 0, "num_cayley_neumann_terms": terms or 5, "bias": "none", "peft_version": "0.18.0",
    } | ({} if eps is None else {"eps": eps}), tensors  # fmt: skip


def _one_number(parts: Sequence[Any]) -> dict[str, int]:
    """The size, or the number, of blocks that comes to each layer's own by HF PEFT's rule."""
    own = {(part.site.d_in, nearest_divisor(part.site.d_in, part.hyper["block"])) for part in parts}
    sizes = sorted({size for _, size in own})
    for block in range(sizes[0], sizes[-1] + 1):  # the nearest size grows with what is asked for: none outside can do
        if all(nearest_divisor(width, block) == size for width, size in own):
            return {"r": 0, "oft_block_size": block}
    numbers = {width // size for width, size in own}
    if len(numbers) == 1:
        return {"r": numbers.pop(), "oft_block_size": 0}
    raise ValueError(f"oft: blocks of {', '.join(map(str, sizes))} cannot be written as HF PEFT's, which has one size")


def boft_fields(parts: Sequence[Any], modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One configuration for these layers, and their tensors. Raises ValueError where HF PEFT's format has none."""
    sizes, tensors = set(), {}
    for part in parts:
        _whole(part)
        check_boft(modules[part.site.module], part.site)
        size, factors = nearest_divisor(part.site.d_in, part.hyper["block"]), len(part.tensors["q"])
        sizes.add((size, factors))
        shapes = {
            slot: (key, shape) for key, slot, shape in boft_tensors(part.site, {"block": size, "factors": factors})
        }
        at = f"base_model.model.{part.site.module}"
        tensors[f"{at}.{shapes['q'][0]}"] = square(part.tensors["q"], size)
        tensors[f"{at}.{shapes['s'][0]}"] = part.tensors["s"].view(shapes["s"][1])
    if len(sizes) > 1:
        found = ", ".join(f"{m} of blocks of {size}" for size, m in sorted(sizes))
        raise ValueError(f"boft: factors {found} cannot be written as HF PEFT's, which has one number and one size")
    ((size, factors),) = sizes
    return {
        "peft_type": "BOFT", "boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": factors,
        "bias": "none",
    }, tensors  # fmt: skip


def _whole(part: Any) -> None:
    if part.site.rows or part.site.kind == "experts":
        what = "a slice of a fused projection" if part.site.rows else "fused experts"
        raise ValueError(f"{part.site.name}: {part.method.name} on {what} cannot be written as HF PEFT's")


ROTATIONS: dict[str, Any] = {"OFT": OFT, "BOFT": BOFT}
