"""SHiRA beside HF PEFT's: the masks of its seeds, the outputs, the gradients and a training."""

import json
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from torch import Tensor, nn

import deltatune as dt

torch.sparse.check_sparse_tensor_invariants.disable()  # HF PEFT leaves it open, and torch would warn
R = 3
IDS = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def base() -> nn.Module:
    torch.manual_seed(0)
    config = tr.LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, initializer_range=0.2
    )
    return tr.LlamaForCausalLM(config).eval()


def theirs(seed: int | None, targets: list[str]) -> nn.Module:
    cfg = peft.ShiraConfig(r=R, random_seed=seed, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(base(), cfg).eval()


def layers(model: nn.Module) -> dict[str, Any]:
    """HF PEFT's adapted layers by our names."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "shira_indices")}
    return {n.removeprefix("base_model.model."): m for n, m in found.items()}


def sites(adapter: dt.Adapter) -> dict[str, Any]:
    return {site: d for (_, site), d in adapter.deltas.items()}


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("from_config", [True, False])
def test_masks_of_its_seeds(seed: int | None, from_config: bool) -> None:
    """From its configuration, or as ours: the same positions, in the same order."""
    targets = ["q_proj", "v_proj", "down_proj"]
    other, model = theirs(seed, targets), base()
    if from_config:
        cfg = peft.ShiraConfig(r=R, random_seed=seed, target_modules=targets, task_type="CAUSAL_LM")
        adapter = dt.attach(model, cfg)
    else:
        own = torch.Generator().initial_seed() if seed is None else seed
        adapter = dt.attach(model, "shira", r=R, mask_seed=own, where="q,v,mlp.down")
    want = layers(other)
    assert want.keys() == sites(adapter).keys()
    for name, d in sites(adapter).items():
        rows, columns = want[name].shira_indices["default"].long()
        assert torch.equal(d.index.long(), rows * d.site.d_in + columns), name
        assert len(d.index) == R * (d.site.d_in + d.site.d_out)


def test_without_a_seed_each_layer_has_its_own_mask() -> None:
    """Drawn from torch's generator, in the weight alone."""
    torch.manual_seed(1)
    one = sites(dt.attach(base(), "shira", keep=0.05))
    torch.manual_seed(1)
    two = sites(dt.attach(base(), "shira", keep=0.05))
    first, *rest = (d.index for n, d in one.items() if n.endswith("q_proj"))
    assert all(torch.equal(d.index, two[n].index) for n, d in one.items())
    assert not any(torch.equal(first, other) for other in rest)
    assert {len(d.index) for n, d in one.items() if n.endswith("q_proj")} == {round(0.05 * 1024)}


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss  # type: ignore[no-any-return]


def test_outputs_gradients_and_training() -> None:
    """Ten steps of AdamW on both: logits, each gradient and each value within 1e-5."""
    targets = ["q_proj", "v_proj", "down_proj"]
    other, model = theirs(4, targets), base()
    adapter = dt.attach(model, "shira", r=R, mask_seed=4, where="q,v,mlp.down")
    want = {name: layer.shira_weight["default"] for name, layer in layers(other).items()}
    with torch.no_grad():
        for i, (name, d) in enumerate(sites(adapter).items()):
            d.values.copy_(0.3 * torch.randn(len(d.values), generator=torch.Generator().manual_seed(i)))
            want[name].copy_(d.values)
    mine = torch.optim.AdamW(adapter.groups(1e-2), weight_decay=0.1)
    yours = torch.optim.AdamW(list(want.values()), 1e-2, weight_decay=0.0)
    for _ in range(10):
        a, b = loss(model), loss(other)
        a.backward()
        b.backward()
        for name, d in sites(adapter).items():
            torch.testing.assert_close(d.values.grad, want[name].grad, rtol=1e-4, atol=1e-6)
        mine.step()
        yours.step()
        mine.zero_grad()
        yours.zero_grad()
    for name, d in sites(adapter).items():
        torch.testing.assert_close(d.values, want[name], rtol=0, atol=1e-5)
    with torch.no_grad():
        got = model(IDS).logits
        torch.testing.assert_close(got, other(input_ids=IDS).logits, rtol=0, atol=1e-5)
        assert float((got - base()(IDS).logits).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("hyper", "said"), [({"r": 0}, "r = 0 trains 0"), ({"r": 30}, "r = 30 trains"), ({"keep": 2.0}, r"keep = 2\.0")]
)
def test_bad_hyperparameters(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dt.attach(base(), "shira", **hyper)


def test_its_card_names_rank_and_seed() -> None:
    adapter = dt.attach(base(), "shira", r=R, mask_seed=4)
    assert json.loads(json.dumps(adapter.tree.to_dict()))["config"] == {"keep": 0.01, "r": R, "mask_seed": 4}
