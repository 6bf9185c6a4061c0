"""Tensors shared between sites: kept once, at the model's root, so that `model.to(...)` cannot split them.

A bank declared without `train` is random, drawn from the adapter's seed and never saved; with `train=True` it is a
parameter, trained and saved once.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .inits import Init, seeded


class Bank(nn.Module):
    """The shared tensors of one adapter, by slot name and shape."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def claim(
        self,
        key: str,
        shape: tuple[int, ...],
        init: Init,
        train: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        delta: Any = None,
    ) -> None:
        """Keep a tensor of `shape` under `key`; the first claim draws it."""
        if key not in self._parameters and key not in self._buffers:
            # drawn on the CPU, in fp32 and away from the global generator: equal on every device and in every order
            with seeded(key, self.seed):
                value = init(shape, delta=delta)
            value = value.to(device, dtype)
            if train:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value, persistent=False)

    def tensor(self, key: str) -> Tensor:
        """The shared tensor itself."""
        value: Tensor | None = self._parameters.get(key)
        if value is None:
            value = self._buffers.get(key)
        assert value is not None, key
        return value
