"""A span sees its sub-layer's input at the exit: beside an MLP that is not one module, on three backbones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import BEDS
from deltatune.core.method import Method


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


MODELS = {"bert": BEDS["attention-bert"].model, "llama": BEDS["attention"].model, "gpt2": gpt2}
MLP = {  # entry, exit: written out by hand, not read from the table of roles
    "bert": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    "llama": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.down_proj"),
    "gpt2": ("h.{}.mlp.c_fc", "h.{}.mlp.c_proj"),
}


@pytest.mark.parametrize("name", MODELS)
def test_parallel_beside_the_mlp(toys: dict[str, type[Method]], name: str) -> None:
    model, plain = MODELS[name](), MODELS[name]()
    batch = BEDS["attention"].batch()
    adapter = dt.attach(model, "toy_parallel", head=None)
    assert len(adapter.deltas) == 2
    for i, delta in enumerate(adapter.deltas.values()):
        entry, leave = (plain.get_submodule(path.format(i)) for path in MLP[name])
        seen: list[Tensor] = []

        def at_entry(module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])

        def at_exit(module: nn.Module, args: object, y: Tensor, seen: list[Tensor] = seen, d: Method = delta) -> Tensor:
            return y + F.linear(F.relu(F.linear(seen.pop(), d.down)), d.up)  # type: ignore[arg-type]

        entry.register_forward_pre_hook(at_entry)
        leave.register_forward_hook(at_exit)
    torch.testing.assert_close(model(**batch)[0], plain(**batch)[0], rtol=1e-5, atol=1e-5)
    assert not model.__dict__["_deltatune"].frame.stash
    with adapter.disabled():
        torch.testing.assert_close(model(**batch)[0], MODELS[name]()(**batch)[0], rtol=0, atol=0)
    adapter.detach()
    torch.testing.assert_close(model(**batch)[0], MODELS[name]()(**batch)[0], rtol=0, atol=0)


def test_two_spans_at_one_exit(toys: dict[str, type[Method]]) -> None:
    """Each pops its own input; removing one leaves the other."""
    model, alone = (BEDS["span"].model() for _ in range(2))
    batch = BEDS["span"].batch()
    for name in ("one", "two"):
        torch.manual_seed(3)
        dt.attach(model, "toy_parallel", head=None, name=name)
    torch.manual_seed(3)
    dt.attach(alone, "toy_parallel", head=None)
    assert not torch.allclose(model(**batch), alone(**batch))
    dt.adapters(model)["one"].detach()
    assert torch.equal(model(**batch), alone(**batch))
    assert not model.__dict__["_deltatune"].frame.stash


def test_an_exit_without_its_entry_is_an_error(toys: dict[str, type[Method]]) -> None:
    model = BEDS["span"].model()
    dt.attach(model, "toy_parallel", head=None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj did not run before layers\.0\.mlp\.down_proj"):
        model.layers[0].mlp.down_proj(torch.randn(1, 48))  # type: ignore[index, union-attr, operator]
