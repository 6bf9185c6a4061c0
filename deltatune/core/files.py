"""Files that cannot lie: written whole or not at all, and checked against the backbone before anything is changed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

FORMAT = 1
WEIGHTS, CARD = "adapter.safetensors", "adapter.json"
FINGERPRINT = "base.fingerprint"

_FIELDS: dict[str, type] = {
    "format": int, "deltatune": str, "tree": dict, "head": bool, "sites": dict, "in_place": list, "backbone": str,
    "site_table": str, "n_params": int, "n_head": int, "seed": int, "sha256": str,
}  # fmt: skip


def write_atomic(path: Path, data: bytes) -> None:
    """Write through a temporary file beside `path`, fsync and rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_adapter(folder: str | os.PathLike[str], card: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter; the card holds the hash of the weights, so that a mixed pair is found out."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an adapter is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    data = save_bytes({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"format": "pt"})
    card = {**card, "sha256": hashlib.sha256(data).hexdigest()}
    write_atomic(folder / WEIGHTS, data)
    write_atomic(folder / CARD, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors. Raises ValueError naming the file and what is wrong with it."""
    folder = Path(folder)
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no adapter: it has no {name}")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CARD} is damaged: {error}") from None
    if not isinstance(card, dict) or "format" not in card:
        raise ValueError(f"{folder / CARD} is not an adapter's card: it has no 'format'")
    if card["format"] != FORMAT:
        raise ValueError(f"{folder / CARD} has format {card['format']}; this version reads format {FORMAT}")
    odd = sorted(card.keys() ^ _FIELDS.keys())
    if odd:
        raise ValueError(f"{folder / CARD}: {'unknown' if odd[0] in card else 'missing'} field {odd[0]!r}")
    for key, kind in _FIELDS.items():
        if type(card[key]) is not kind:
            raise ValueError(f"{folder / CARD}: field {key!r} must be {kind.__name__}, not {card[key]!r}")
    names = [
        ("in_place", card["in_place"]),
        *((f"sites of leaf {leaf}", found) for leaf, found in card["sites"].items()),
    ]
    for key, listed in names:
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{folder / CARD}: {key} must be a list of names, not {listed!r}")
    data = (folder / WEIGHTS).read_bytes()
    try:
        tensors = load_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({len(data)} bytes): {error}") from None
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is not the file that {CARD} describes: its hash differs")
    return card, tensors


def check_keys(where: str, want: Mapping[str, tuple[int, ...]], have: Mapping[str, Tensor]) -> None:
    """Raise one ValueError with every missing, unexpected and mis-sized tensor."""
    problems = [f"missing {k}" for k in want if k not in have]
    problems += [f"unexpected {k}" for k in have if k not in want]
    problems += [
        f"{k} is {tuple(have[k].shape)}, here it must be {shape}"
        for k, shape in want.items()
        if k in have and tuple(have[k].shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{where} does not fit this model: {shown}")
