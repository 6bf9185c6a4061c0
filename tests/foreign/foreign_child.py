"""What runs in a spawned process; it imports torch alone, so that the model's own pickle brings the rest."""

import pickle
import sys
from typing import Any

import torch


class Parcel:
    """Bytes that the child opens itself, after it has said what it had imported before."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def answer(queue: Any, parcel: Parcel, batch: dict[str, torch.Tensor], n_threads: int) -> None:
    """Put (packages that were loaded too early, the logits by model) on the queue."""
    torch.set_num_threads(n_threads)
    loaded = [name for name in ("deltatune", "transformers") if name in sys.modules]
    with torch.no_grad():
        found = {name: model.eval()(**batch).logits.tolist() for name, model in pickle.loads(parcel.data).items()}
    queue.put((loaded, found))
