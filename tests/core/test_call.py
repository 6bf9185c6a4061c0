"""The per-call record: read by a method, restored by gradient checkpointing, gone between calls."""

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import BEDS, checkpointed
from deltatune.core.method import Method

Toys = dict[str, type[Method]]


def masked(seed: int = 0) -> dict[str, Tensor]:
    batch = BEDS["biased"].batch(seed=seed)
    batch["attention_mask"][0, 4:] = 0
    batch["attention_mask"][2, 1 + seed :] = 0
    return batch


@pytest.mark.parametrize("positional", [False, True], ids=["keywords", "positions"])
def test_a_method_reads_the_mask(toys: Toys, positional: bool) -> None:
    model = BEDS["biased"].model()
    adapter = dt.attach(model, "mask_reader", where="q", head=None)
    batch = masked()
    got = model(*batch.values()) if positional else model(**batch)
    (delta,) = adapter.deltas.values()
    for row in range(len(got)):
        plain = BEDS["biased"].model()
        share = batch["attention_mask"][row].float().mean()
        plain.layers[0].self_attn.q_proj.bias.data += share * delta.d.detach()  # type: ignore[index, union-attr, operator]
        one = {k: v[row : row + 1] for k, v in batch.items()}
        torch.testing.assert_close(got[row], plain(**one)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bed", ["attention", "attention-bert", "biased"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_restores_the_call(toys: Toys, bed: str, reentrant: bool) -> None:
    """Two forwards with other masks before one backward: each recomputation sees its own."""
    model = BEDS[bed].model().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapter = dt.attach(model, "mask_reader", where="mlp.down", head=None)
    tensors = adapter.parameters()

    def grads() -> list[Tensor]:
        for p in tensors:
            p.grad = None
        outs = [model(**masked(seed)) for seed in (0, 1)]
        outs = [out if isinstance(out, Tensor) else out[0] for out in outs]
        (outs[0].square().mean() + 3 * outs[1].square().mean()).backward()
        return [p.grad for p in tensors if p.grad is not None]

    want = grads()
    assert len(want) == len(tensors)
    checkpointed(model, reentrant)
    got = grads()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert model.__dict__["_deltatune"].frame.call is None


def test_outside_the_model_s_forward_it_is_an_error(toys: Toys) -> None:
    model = BEDS["biased"].model()
    dt.attach(model, "mask_reader", where="q", head=None)
    with pytest.raises(
        ValueError, match=r"self_attn\.q_proj: mask_reader reads the call's masks.*own forward is not running"
    ):
        model.layers[0].self_attn.q_proj(torch.randn(1, 2, 32))  # type: ignore[index, union-attr, operator]


def test_a_failing_forward_leaves_no_call(toys: Toys) -> None:
    model = BEDS["biased"].model()
    dt.attach(model, "mask_reader", where="q", head=None)
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]), torch.ones(1, 1))
    frame = model.__dict__["_deltatune"].frame
    assert frame.call is None
    assert not frame.stash


def test_task_ids_reach_the_method_that_reads_them(toys: Toys) -> None:
    model = BEDS["biased"].model()
    adapter = dt.attach(model, "task_reader", where="q", head=None)
    batch = BEDS["biased"].batch(n_rows=3)
    got = model(**batch, task_ids=torch.tensor([2, 0, 2]))
    (delta,) = adapter.deltas.values()
    for row, task in enumerate((2, 0, 2)):
        plain = BEDS["biased"].model()
        plain.layers[0].self_attn.q_proj.bias.data += delta.d[task].detach()  # type: ignore[index, union-attr, operator]
        torch.testing.assert_close(got[row], plain(**batch)[row], rtol=1e-5, atol=1e-5)


def test_task_ids_that_nobody_reads_are_refused(toys: Toys) -> None:
    model = BEDS["biased"].model()
    dt.attach(model, "lora", where="q", head=None)
    batch = BEDS["biased"].batch(n_rows=2)
    with pytest.raises(ValueError, match="task_ids was given, but no attached method reads it"):
        model(**batch, task_ids=torch.zeros(2, dtype=torch.long))
    dt.attach(model, "mask_reader", where="q", head=None, name="two")
    with pytest.raises(ValueError, match="task_ids was given"):
        model(**batch, task_ids=torch.zeros(2, dtype=torch.long))
    dt.attach(model, "task_reader", where="q", head=None, name="three")
    model(**batch, task_ids=torch.zeros(2, dtype=torch.long))
    dt.adapters(model)["three"].detach()
    with pytest.raises(ValueError, match="task_ids was given"):
        model(**batch, task_ids=torch.zeros(2, dtype=torch.long))
