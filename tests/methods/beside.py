"""One delta of ours beside HF PEFT's on the same layer, with the same tensors: outputs, gradients, and a course of AdamW."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.core.base import Base

Names = dict[str, tuple[str, Callable[[Tensor], Tensor]]]  # slot here -> HF PEFT's name, and its tensor as it is here


def same(t: Tensor) -> Tensor:
    return t


def flat(t: Tensor) -> Tensor:
    """A tensor over the places of a kernel, which are one dimension here."""
    return t.flatten(-2)


def turned(t: Tensor) -> Tensor:
    return t.t()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def made(layer: Callable[[], nn.Module]) -> nn.Module:
    """The same each time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return layer()


class Beside:
    """The layer `at` of two equal models, ours and theirs, each with its delta."""

    def __init__(self, layer: Callable[[], nn.Module], tree: Any, config: Any, names: Names) -> None:
        self.base = made(layer)
        self.ours, self.theirs = (nn.ModuleDict({"at": made(layer)}) for _ in range(2))
        self.adapter = dt.attach(self.ours, tree, where="at", head=None)
        self.delta: Any = next(iter(self.adapter.deltas.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # HF PEFT's advice
            peft.get_peft_model(self.theirs, config)  # type: ignore[arg-type]
        self.names = names
        self.hf = {slot: self.theirs["at"].get_parameter(f"{name}.default") for slot, (name, _) in names.items()}
        assert {n for n, _ in self.delta.named_parameters()} == names.keys()
        assert {id(p) for p in self.theirs.parameters() if p.requires_grad} == {id(p) for p in self.hf.values()}

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]]:
        """(ours, theirs, theirs as it is here)"""
        return [(getattr(self.delta, slot), self.hf[slot], here) for slot, (_, here) in self.names.items()]

    def stir(self) -> "Beside":
        """Random values, the same on both sides."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, yours, _ in self.pairs():
                yours.copy_(0.7 * torch.randn(yours.shape, generator=generator))
            for mine, yours, here in self.pairs():
                mine.copy_(here(yours))
        return self

    def look(self, x: Tensor, but: tuple[str, ...] = ()) -> None:
        """The same outputs, far from the base's, and the same gradients of the input and of each tensor but those."""
        outs, inputs = [], [x.clone().requires_grad_() for _ in range(2)]
        for model, given in zip((self.ours, self.theirs), inputs, strict=True):
            outs.append(model["at"](given))
            (outs[-1] - 1).square().mean().backward()
        assert (outs[0] - self.base(x)).abs().max() > 0.1
        close(*outs)
        close(inputs[0].grad, inputs[1].grad)
        for slot, (mine, yours, here) in zip(self.names, self.pairs(), strict=True):
            if slot in but:
                continue
            assert mine.grad is not None and yours.grad is not None and bool(mine.grad.any())
            close(mine.grad, here(yours.grad))

    def starts_alike(self, n: int = 50) -> None:
        """Of many draws each tensor is 0 on both sides, or reaches as far."""
        site, most = self.delta.site, {}
        base = Base(self.base, site)
        for _ in range(n):
            self.theirs["at"].reset_adapter_parameters("default")  # type: ignore[operator]
            for slot, yours in self.hf.items():
                mine = self.delta.slots[slot].init(getattr(self.delta, slot).shape, base=base, delta=self.delta)
                a, b = most.get(slot, (0.0, 0.0))
                most[slot] = max(a, float(mine.abs().max())), max(b, float(yours.detach().abs().max()))
        for mine_most, yours_most in most.values():
            assert mine_most == yours_most == 0 or 0.95 < mine_most / yours_most < 1.05

    def learn(self, x: Tensor, n_steps: int = 12) -> None:
        """Both take the same course."""
        self.stir()
        for model in (self.ours, self.theirs):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            losses = []
            for _ in range(n_steps):
                loss = model["at"](x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            assert losses[-1] < losses[0]
        for mine, yours, here in self.pairs():
            close(mine.detach(), here(yours.detach()))
