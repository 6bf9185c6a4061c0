"""What a run is said to cost: the count of saved tensors, which leaves nothing behind."""

import gc

import torch

import deltatune as dt
from deltatune.assess.measure import saved_bytes
from deltatune.train.backbone import load_classifier


def test_counting_activations_leaves_nothing_behind(backbone: str) -> None:
    """Each storage once, the same number again; and no graph stays alive, which a cell after cell would fill the memory."""
    model, _ = load_classifier(backbone, ("down", "up"))
    dt.attach(model, "lora", r=4)
    ids = torch.randint(5, 20, (8, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(8, dtype=torch.long)}

    def held() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    before = held()
    counted = {saved_bytes(model, batch) for _ in range(3)}
    assert len(counted) == 1 and counted.pop() > 8 * 16 * 32 * 4
    assert held() <= before
