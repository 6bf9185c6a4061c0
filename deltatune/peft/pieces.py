"""What a configuration is on a model: a tree, and for each tensor of its file the slots that it fills."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.compose import Leaf, Tree

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

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


def made(method: Any, **hyper: Any) -> Leaf:
    return method(**hyper)  # type: ignore[no-any-return]
