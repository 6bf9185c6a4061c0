"""VeRA beside HF PEFT's: the same draw of the shared matrices, outputs, gradients and a course."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside import Beside, close, same
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt

NAMES = {"lambda_d": ("vera_lambda_d", same), "lambda_b": ("vera_lambda_b", same)}
X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    return nn.Linear(24, 60)


class Three(nn.Module):
    """Layers of unlike sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 20), nn.Linear(20, 12), nn.Linear(12, 30)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.three(self.two(self.one(x)))
        return y


ALL = ["one", "two", "three"]


def layers() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Three()


def matrices(adapter: dt.Adapter) -> dict[str, Tensor]:
    assert adapter.bank is not None
    return dict(adapter.bank.named_buffers())


@pytest.mark.parametrize("r", [4, 70])
def test_outputs_and_gradients(r: int) -> None:
    config = peft.VeraConfig(r=r, d_initial=0.3, projection_prng_key=7, target_modules=["at"])
    pair = Beside(linear, dt.VeRA(r=r, d_initial=0.3, key=7), config, NAMES)
    assert torch.equal(pair.delta.lambda_d, pair.hf["lambda_d"]) and torch.equal(
        pair.delta.lambda_d, torch.full((r,), 0.3)
    )
    assert torch.equal(pair.delta.lambda_b, pair.hf["lambda_b"])
    assert torch.equal(pair.ours["at"](X), pair.base(X))
    pair.learn(X)
    pair.stir().look(X)


@pytest.mark.parametrize("key", [0, 1, 12345])
def test_the_draw_is_hf_pefts(key: int) -> None:
    """Bit for bit, as wide as the widest and as tall as the tallest of the layers, whatever the adapter's seed."""
    hf: Any = peft.VeraModel(layers(), peft.VeraConfig(r=5, projection_prng_key=key, target_modules=ALL), "default")
    model = layers()
    adapter = dt.attach(model, dt.VeRA(r=5, key=key), where=ALL, head=None, seed=9)
    mine = matrices(adapter)
    assert {tuple(t.shape) for t in mine.values()} == {(5, 20), (30, 5)}
    for name, yours in (("a", hf.vera_A["default"]), ("b", hf.vera_B["default"])):
        assert torch.equal(next(t for k, t in mine.items() if k.startswith(f"{name}_")), yours)
    with torch.no_grad():
        for name in ALL:
            delta: Any = adapter.deltas["0", name]
            other = getattr(hf.model, name)
            delta.lambda_b.normal_()
            delta.lambda_d.normal_()
            other.vera_lambda_b["default"].copy_(delta.lambda_b)
            other.vera_lambda_d["default"].copy_(delta.lambda_d)
    x = torch.randn(3, 8)
    assert (model(x) - layers()(x)).abs().max() > 0.1
    close(model(x), hf(x))


def test_one_pair_of_matrices(tmp_path: Path) -> None:
    """A file holds two vectors a layer; A and B come back from the key, or with `saved` from the file."""
    for saved in (False, True):
        model = layers()
        adapter = dt.attach(model, dt.VeRA(r=5, key=3, saved=saved), where=ALL, head=None, name="one")
        assert adapter.params() == 3 * 5 + 20 + 12 + 30
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
            if saved:
                for t in matrices(adapter).values():
                    t.add_(0.1)
        x = torch.randn(3, 8)
        want = model(x)
        for resumable in (False, True):
            folder = tmp_path / f"{saved}{resumable}"
            adapter.save(folder, resumable=resumable)
            held = load_file(folder / "adapter.safetensors")
            assert sum(k.startswith("bank.") for k in held) == (2 if saved else 0)
            again = layers()
            read = dt.load(again, folder, trainable=True)
            assert torch.equal(again(x), want)
            assert read.params() == adapter.params()


def test_leaves_of_two_keys_have_their_own() -> None:
    model = layers()
    tree = dt.Sum(
        *(dt.VeRA(r=5, key=key, saved=saved, where=["two"]) for key, saved in ((1, False), (2, False), (2, True)))
    )
    assert len({t.data_ptr() for t in matrices(dt.attach(model, tree, head=None)).values()}) == 6
