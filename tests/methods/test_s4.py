"""S4's groups by depth, its numbers by layer, and its parts: what BitFit moves lies inside the adapter."""

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import deltatune as dt
from deltatune.contract.checks import perturb
from deltatune.core.compose import Leaf, Stack, tree_from_dict
from deltatune.core.method import METHODS
from deltatune.train.data import Collate, encode, predict
from deltatune.train.fit import Plan, fit

GROUPS = [
    {"sequential", "lora"},
    {"sequential", "prefix_tuning"},
    {"sequential", "prefix_tuning", "bitfit"},
    {"prefix_tuning", "bitfit", "lora"},
]
SPINDLE = {4: [1, 1, 1, 1], 6: [1, 2, 2, 1], 12: [2, 4, 4, 2], 24: [4, 8, 8, 4]}
Layer = tuple[str, int | None]  # stack, index


def bert(n_layers: int, d: int = 16) -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=32, hidden_size=d, num_hidden_layers=n_layers, num_attention_heads=4, intermediate_size=4 * d,
            max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip


def t5(n_encoder: int, n_decoder: int, d: int = 16) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32, d_model=d, d_kv=d // 4, num_heads=4, d_ff=4 * d, num_layers=n_encoder,
            num_decoder_layers=n_decoder,
        )
    ).eval()  # fmt: skip


def by_layer(adapter: dt.Adapter) -> tuple[dict[Layer, set[str]], dict[Layer, int]]:
    """The methods and the numbers of each layer."""
    methods: dict[Layer, set[str]] = defaultdict(set)
    counts: dict[Layer, int] = defaultdict(int)
    for delta in adapter.deltas.values():
        at = delta.site.stack, delta.site.layer
        methods[at].add(type(delta).name)
        counts[at] += sum(p.numel() for p in delta.parameters())
    return methods, counts


def sizes(methods: dict[Layer, set[str]], stack: str = "") -> list[int]:
    """How many layers of a stack each group has; its layers lie one behind the other."""
    order = [GROUPS.index(methods[at]) for at in sorted(at for at in methods if at[0] == stack)]
    assert order == sorted(order)
    return [order.count(i) for i in range(len(GROUPS))]


@pytest.mark.parametrize("n", SPINDLE)
def test_groups(n: int) -> None:
    with torch.device("meta"):
        model = bert(n)
    methods, _ = by_layer(dt.attach(model, "s4"))
    assert len(methods) == n
    assert sizes(methods) == SPINDLE[n]


def test_four_layers_at_least() -> None:
    model = bert(3)
    with pytest.raises(ValueError, match="layers='0-1/6' holds the middle of no layer: this backbone has 3 layers"):
        dt.attach(model, "s4")
    assert not dt.adapters(model)


@pytest.mark.parametrize("budget", [9, 30, 64])
def test_layers_have_equal_numbers(budget: int) -> None:
    """The docstring's sums: each layer has the budget, in units of 2 d, and one more at most; T5's decoder two."""
    d = 768
    with torch.device("meta"):
        models = [bert(12, d), t5(12, 12, d)]
    for model in models:
        _, counts = by_layer(dt.attach(model, "s4", budget=budget, head=None))
        for (stack, _), n in counts.items():
            own = n - budget  # an adapter's biases of its bottleneck are no multiple of d
            low, high = (budget - 0.75, budget + (2.0 if stack == "decoder" else 1.0))
            assert low <= own / (2 * d) <= high
    with pytest.raises(ValueError, match="s4: budget is 8; it must be at least 9"):
        dt.s4(budget=8)


def test_a_layers_numbers() -> None:
    """BERT-base's, group by group, from the paper's methods: 2 d r + r + d, 4 d k, 2 d n, 11 d."""
    d = 768
    with torch.device("meta"):
        model = bert(12, d)
    _, counts = by_layer(dt.attach(model, "s4"))
    assert [counts["", i] for i in (0, 2, 6, 10)] == [
        2 * d * 16 + 16 + d + 4 * d * 7,
        2 * d * 15 + 15 + d + 2 * d * 15,
        2 * d * 13 + 13 + d + 2 * d * 12 + 11 * d,
        2 * d * 13 + 11 * d + 4 * d * 6,
    ]


def test_an_encoder_decoder_with_stacks_of_unlike_depth() -> None:
    torch.manual_seed(0)
    model = t5(4, 7)
    model.config.decoder_start_token_id = 0  # type: ignore[union-attr]
    adapter = perturb(dt.attach(model, "s4"))
    methods, _ = by_layer(adapter)
    assert sizes(methods, "encoder") == [1, 1, 1, 1]
    assert sizes(methods, "decoder") == [1, 2, 3, 1]
    ids = torch.randint(1, 32, (3, 6))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0, name


def test_where_bitfit_and_the_adapter_meet() -> None:
    """BitFit's numbers as biases of the base, under the rest of the tree, give the same states.

    Where both stand on the norm that ends a block: N(z + A(N(z))) + d.
    """
    torch.manual_seed(0)
    model = bert(6).double()
    other = copy.deepcopy(model)
    adapter = perturb(dt.attach(model, "s4"))
    ids = torch.randint(1, 32, (3, 6))
    out: Tensor = model(ids)[0]
    with torch.no_grad():
        for delta in adapter.deltas.values():
            if type(delta).name == "bitfit":
                layer = other.get_submodule(delta.site.module)
                if delta.site.is_last:
                    layer.register_forward_hook(lambda _, __, out, d=delta.d: out + d)
                else:
                    layer.get_parameter("bias").add_(delta.get_parameter("d"))
    tree = dt.s4()
    assert isinstance(tree, Stack)
    kept = [(str(i), leaf) for i, leaf in enumerate(tree.children) if leaf.method.name != "bitfit"]  # type: ignore[union-attr]
    rest = dt.attach(other, Stack(*(leaf for _, leaf in kept)))
    with torch.no_grad():
        for (path, site), delta in rest.deltas.items():
            for name, p in delta.named_parameters():
                p.copy_(adapter.deltas[kept[int(path)][0], site].get_parameter(name))
    again: Tensor = other(ids)[0]
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)


def test_files(tmp_path: Path) -> None:
    """`adapter.json` and YAML hold shares, not the layers of one depth; what is loaded computes the same."""
    torch.manual_seed(0)
    model = bert(5)
    other = copy.deepcopy(model)
    perturb(dt.attach(model, "s4")).save(tmp_path)
    written = json.loads((tmp_path / "adapter.json").read_text())["tree"]
    assert [leaf["layers"] for leaf in written["children"][:3]] == ["0-1/6", "0-1/6", "1/6-1/2"]
    assert tree_from_dict(yaml.safe_load(yaml.safe_dump(written)), METHODS) == dt.s4()
    dt.load(other, tmp_path)
    ids = torch.randint(1, 32, (3, 6))
    with torch.no_grad():
        assert torch.equal(model(ids)[0], other(ids)[0])
    broken = written["children"][0] | {"layers": "1/2-1/6"}
    with pytest.raises(ValueError, match="layers='1/2-1/6' is no share"):
        tree_from_dict(broken, METHODS)


def test_it_learns(backbone: str) -> None:
    """The other methods do so in `tests/train/test_fit.py`, on a backbone of two layers."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    config: Any = BertConfig.from_pretrained(backbone, num_hidden_layers=4)
    model = BertForSequenceClassification(config)
    texts = [("good " * (1 + i % 5) if i % 2 else "bad " * (1 + i % 5),) for i in range(48)]
    rows, collate = encode(texts, [i % 2 for i in range(48)], tokenizer, 32), Collate(tokenizer, False)
    dt.attach(model, "s4")
    fitted = fit(model, rows, collate, Plan(n_steps=40, batch=16, lr=1e-2, head_lr=5e-2))
    assert fitted.curve[-1][1] < 0.8 * fitted.curve[0][1]
    outputs = predict(model, rows, collate, 16)
    assert (outputs.argmax(-1) == torch.tensor([r["labels"] for r in rows.rows])).float().mean() > 0.9


def test_its_leaves_say_the_paper() -> None:
    """Four groups in order, each with its methods."""
    groups: dict[Any, set[str]] = {}
    for _, leaf in dt.s4().leaves():
        assert isinstance(leaf, Leaf)
        groups.setdefault(leaf.layers, set()).add(leaf.method.name)
    assert groups == dict(zip(["0-1/6", "1/6-1/2", "1/2-5/6", "5/6-1"], GROUPS, strict=True))
