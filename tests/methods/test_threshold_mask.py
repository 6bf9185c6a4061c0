"""Binary masks on frozen weights against their reference repository's layer, start and places."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_threshold_mask.py"))
fill, score_of, CASES, TAU = (MAKE[k] for k in ("fill", "score_of", "CASES", "TAU"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class One(nn.Module):
    """One of the golden's layers."""

    def __init__(self, case: int) -> None:
        super().__init__()
        (o, n), has_bias = CASES[case]
        self.layer = nn.Linear(n, o, bias=has_bias).double()
        with torch.no_grad():
            self.layer.weight.copy_(fill(f"weight.{case}", (o, n)))
            if has_bias:
                self.layer.bias.copy_(fill(f"bias.{case}", (o,)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("case", range(len(CASES)))
def test_layer_is_the_references(case: int) -> None:
    """Output, mask and gradients, in fp64; scores on the threshold are masked."""
    golden = GOLDEN["layers"][case]
    model = One(case)
    adapter = dt.attach(model, "threshold_mask", where=["layer"], head=None)
    (delta,) = adapter.deltas.values()
    with torch.no_grad():
        delta.score.copy_(score_of(case))
    x = fill("x", (2, model.layer.in_features)).requires_grad_()
    y = model(x)
    (fill("loss", y.shape) * y).sum().backward()
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(y.detach(), numbers(golden["y"]), **close)
    for got, name in ((x.grad, "x"), (delta.score.grad, "score")):
        torch.testing.assert_close(got, numbers(golden["grads"][name]), **close)
    mask = delta.mask(model.layer.weight).detach()
    assert "".join(str(int(bit)) for bit in mask.flatten().tolist()) == golden["mask"]
    assert case != len(CASES) - 1 or golden["mask"].startswith("00")


@pytest.mark.parametrize("start", GOLDEN["starts"], ids=str)
def test_start_is_the_references(start: dict[str, Any]) -> None:
    """Uniform between the reference's ends, of which the named share lies at or below the threshold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300))
    hyper = {k: start[k] for k in ("scale", "tau", "masked")}
    (delta,) = dt.attach(model, "threshold_mask", where=["0"], **hyper).deltas.values()
    low, high = start["ends"]
    score = delta.score.detach()
    assert low <= float(score.min()) < low + 1e-3 and high - 1e-3 < float(score.max()) <= high
    masked = 1 - float(delta.mask(model[0].weight).detach().mean())
    assert masked == pytest.approx(start["masked"], abs=0.01)


def bert(n_layers: int = 12, **options: Any) -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=n_layers, **options)).eval()


def test_places_are_the_references() -> None:
    """Of twelve blocks the upper ten, attention and MLP, and the pooler."""
    adapter = dt.attach(bert(), "threshold_mask")
    assert sorted(site for path, site in adapter.deltas if path == "0") == GOLDEN["sites"]
    weights = [delta.site.n_weights for (path, _), delta in adapter.deltas.items() if path == "0"]
    assert adapter.params() == sum(weights)


def test_one_bit_a_weight(tmp_path: Path) -> None:
    """The file holds the mask alone, gives the same outputs, and stays what it is when it is trained on and saved again."""
    torch.manual_seed(0)
    model = bert(3)
    torch.manual_seed(1)
    adapter = dt.attach(model, "threshold_mask", head=None)
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        for p in adapter.parameters():
            p.sub_(0.3 * p.grad.sign())
    want = model(input_ids=ids).logits
    adapter.save(tmp_path)
    kept = {n: t for n, t in load_file(tmp_path / "adapter.safetensors").items() if n.startswith("0.")}
    sizes = {n.removesuffix(".bits"): t.numel() for n, t in kept.items()}
    assert sizes == {f"0.{site}": -(-d.site.n_weights // 8) for (_, site), d in adapter.deltas.items()}
    assert all(t.dtype == torch.uint8 for t in kept.values())
    torch.manual_seed(0)
    again = bert(3)
    loaded = dt.load(again, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, want)
    assert loaded.tree.to_dict()["config"]["masks"] == "fixed" and loaded.params() == 0
    loaded.merge()
    torch.testing.assert_close(again(input_ids=ids).logits, want, rtol=0, atol=1e-6)


WRONG = {"masked": (0.0, 1.5), "skip": (-0.1, 1.0), "scale": (-0.01,)}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_wrong_numbers(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"threshold_mask: {key} = {value}, but"):
        dt.ThresholdMask(**{key: value})
