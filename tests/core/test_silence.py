"""Silence is gone: each mistake is one error that names it, and the model is bit for bit as it was.

Every refusal is tried on a bare model and on one that carries another adapter already.
"""

import hashlib
import json
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "fixtures" / "make_format1.py"))
tiny, inputs, wave = MAKE["tiny"], MAKE["inputs"], MAKE["wave"]
WEIGHTS, CARD = "adapter.safetensors", "adapter.json"


def moved(adapter: dt.Adapter) -> dt.Adapter:
    """The adapter with every tensor off its start, so that it shows in the outputs."""
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(wave(p, i, 0.2))
    return adapter


def photograph(model: nn.Module) -> dict[str, Any]:
    """All that an error must leave alone."""
    with torch.no_grad():
        output = model(**inputs()).logits
    return {
        "output": output,
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "buffers": {n: t.clone() for n, t in model.named_buffers()},
        "objects": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
        "adapters": [(n, repr(a), a.enabled, a.mergeable) for n, a in dt.adapters(model).items()],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else bool(a == b)


@contextmanager
def refused(model: nn.Module, *words: str) -> Iterator[None]:
    """The body raises a ValueError whose text has all `words`, and the model stays as it was."""
    before = photograph(model)
    with pytest.raises(ValueError) as error:
        yield
    absent = [word for word in words if word not in str(error.value)]
    assert not absent, f"{absent} not in: {error.value}"
    after = photograph(model)
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.fixture(params=["bare", "with another adapter"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    built: nn.Module = tiny()
    if request.param != "bare":
        moved(dt.attach(built, dt.Sum(dt.LoRA(r=1), dt.IA3()), name="other"))
    return built


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved LoRA of `tiny()`."""
    moved(dt.attach(tiny(), "lora", r=2)).save(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None, **fields: Any) -> None:
    """Change the tensors and the card's fields of a saved adapter, with a hash that fits."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    data = save(tensors)
    (folder / WEIGHTS).write_bytes(data)
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    card |= {"sha256": hashlib.sha256(data).hexdigest(), **fields}
    (folder / CARD).write_text(json.dumps(card), encoding="utf-8")


A = "0.model.layers.0.self_attn.q_proj.a"


# where


def test_typo_in_a_list_of_targets(model: nn.Module) -> None:
    with refused(model, "target", "'v_prj'", "did you mean 'v_proj'"):
        dt.attach(model, "lora", where=["q_proj", "v_prj"])


def test_typo_in_a_list_of_roles(model: nn.Module) -> None:
    with refused(model, "role or kind", "'atn.v'", "'attn.v'"):
        dt.attach(model, "lora", where="attn.q,atn.v")


def test_regex_that_matches_nothing(model: nn.Module) -> None:
    with refused(model, r".*\\.qproj"):
        dt.attach(model, "lora", where=r".*\.qproj")


def test_empty_list_of_targets(model: nn.Module) -> None:
    with refused(model, "where is an empty list"):
        dt.attach(model, "lora", where=[])


def test_role_that_the_backbone_lacks(model: nn.Module) -> None:
    with refused(model, "no 'cross.q'", "it has attn.q, attn.k, attn.v"):
        dt.attach(model, "lora", where="attn.q,cross.q")


def test_kind_that_the_method_cannot_sit_on(model: nn.Module) -> None:
    with refused(model, "'norm'", "supported here: conv2d, embedding, experts, linear"):
        dt.attach(model, "lora", where="q,norm")


@pytest.mark.parametrize("layers", [2, -3, [0, 2], range(1, 3)])
def test_layer_out_of_range(model: nn.Module, layers: Any) -> None:
    with refused(model, f"layer {-3 if layers == -3 else 2} is out of range", "2 layers"):
        dt.attach(model, "lora", layers=layers)


# numbers and names


def test_r_is_zero(model: nn.Module) -> None:
    with refused(model, "model.layers.0.self_attn.q_proj", "lora", "r = 0", "between 1 and min(d_in,d_out) = 8"):
        dt.attach(model, "lora", r=0)


def test_r_is_larger_than_the_layer(model: nn.Module) -> None:
    with refused(model, "model.layers.0.self_attn.v_proj", "lora", "r = 5", "between 1 and min(d_in,d_out) = 4"):
        dt.attach(model, "lora", r=5)  # q is 8 x 8 and would take it: nothing of it may stay


@pytest.mark.parametrize(("method", "key"), [("sequential", "r"), ("prefix_tuning", "n"), ("prompt_tuning", "n")])
def test_size_is_zero(model: nn.Module, method: str, key: str) -> None:
    with refused(model, method, f"{key} = 0", "at least 1"):
        dt.attach(model, method, **{key: 0})


def test_more_soft_tokens_than_positions() -> None:
    config = BertConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                        max_position_embeddings=12)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with refused(model, "12 soft tokens", "12 positions"):
        dt.attach(model, "prompt_tuning", n=12)


def test_unknown_hyperparameter(model: nn.Module) -> None:
    with refused(model, "hyperparameter of lora", "'alhpa'", "did you mean 'alpha'"):
        dt.attach(model, "lora", alhpa=16)


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({"r": "8"}, "lora: r must be int, not '8'"),
        ({"r": 8.5}, "lora: r must be int, not 8.5"),
        ({"r": True}, "lora: r must be int, not True"),
        ({"r": None}, "lora: r must be int, not None"),
        ({"alpha": "big"}, "lora: alpha must be float, not 'big'"),
        ({"alpha": float("nan")}, "lora: alpha must be float, not nan"),
    ],
)
def test_hyperparameter_of_another_type(model: nn.Module, hyper: dict[str, Any], says: str) -> None:
    with refused(model, says):
        dt.attach(model, "lora", **hyper)


def test_hyperparameter_that_is_no_option(model: nn.Module) -> None:
    with refused(model, "sequential: f must be", "'relu' | 'gelu' | 'silu' | 'tanh'", "not 'swish'"):
        dt.attach(model, "sequential", f="swish")


def test_unknown_method(model: nn.Module) -> None:
    with refused(model, "method", "'lorra'", "did you mean 'lora'"):
        dt.attach(model, "lorra")


def test_hyperparameter_beside_a_tree(model: nn.Module) -> None:
    with refused(model, "argument of attach", "'r'"):
        dt.attach(model, dt.LoRA(r=2), r=4)


def test_two_adapters_of_one_name(model: nn.Module) -> None:
    dt.attach(model, "lora", r=2, name="law")
    with refused(model, "an adapter named 'law' already", "adapters here:"):
        dt.attach(model, "ia3", name="law")


def test_name_that_is_no_name(model: nn.Module) -> None:
    with refused(model, "'../law'"):
        dt.attach(model, "lora", name="../law")


def test_one_bad_leaf_of_a_tree(model: nn.Module) -> None:
    with refused(model, "model.layers.0.self_attn.v_proj", "r = 6"):
        dt.attach(model, dt.Sum(dt.IA3(), dt.Stack(dt.BitFit(), dt.LoRA(r=6))))


def test_part_of_a_model_with_adapters(model: nn.Module) -> None:
    dt.attach(model, "lora", r=2, name="law")
    with refused(model, "part of a model with adapters"):
        dt.attach(model.model.layers[0], "ia3")
    with refused(model, "part of a model with adapters"):
        dt.attach(model.model.layers[0].self_attn.q_proj, "ia3")


def test_model_whose_part_has_adapters() -> None:
    model = tiny()
    dt.attach(model.model, "lora", r=2)
    with refused(model, "model has adapters of its own"):
        dt.attach(model, "ia3")


def test_module_with_deltas_of_its_own() -> None:
    model = tiny()
    moved(dt.attach(model, "lora", r=1, name="other"))
    model.model.layers[1].mlp.down_proj.deltas = 3
    with refused(model, "model.layers.1.mlp.down_proj", "an attribute 'deltas' of its own"):
        dt.attach(model, "ia3")
    with refused(model, "model.layers.1.mlp.down_proj", "an attribute 'deltas' of its own"):
        dt.attach(model, "sequential", r=2)


def test_layer_whose_forward_was_replaced(model: nn.Module) -> None:
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    with refused(model, "model.layers.1.self_attn.q_proj", "its forward was replaced", "attach before such patches"):
        dt.attach(model, "lora", r=2)


def test_two_in_place_adapters() -> None:
    model = tiny()
    dt.attach(model, "full", name="one")
    with refused(model, "trained in place by adapter 'one' already"):
        dt.attach(model, "full", name="two")


# files


def test_file_with_missing_extra_and_mis_sized_tensors(model: nn.Module, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[A]
        tensors["0.model.layers.9.self_attn.q_proj.a"] = torch.zeros(2, 8)
        tensors[A.replace("layers.0", "layers.1")] = torch.zeros(3, 8)

    rewrite(folder, change)
    with refused(model, str(folder), f"missing {A}", "unexpected 0.model.layers.9.self_attn.q_proj.a",
                 "0.model.layers.1.self_attn.q_proj.a is (3, 8), here it must be (2, 8)"):  # fmt: skip
        dt.load(model, folder)


@pytest.mark.parametrize("which", ["missing", "unexpected", "is (3, 8), here it must be (2, 8)"])
def test_file_with_one_wrong_tensor(model: nn.Module, folder: Path, which: str) -> None:
    changes: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "missing": lambda tensors: tensors.pop(A),
        "unexpected": lambda tensors: tensors.update({A + "a": torch.zeros(1)}),
    }
    rewrite(folder, changes.get(which, lambda tensors: tensors.update({A: torch.zeros(3, 8)})))
    with refused(model, str(folder), which, A):
        dt.load(model, folder)


def test_file_for_another_backbone_of_the_same_shape(folder: Path) -> None:
    model = tiny(phase=1.0)
    with refused(model, str(folder), "llama", "other weights", "same shape"):
        dt.load(model, folder)


def test_file_for_another_architecture(folder: Path) -> None:
    config = BertConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = BertForSequenceClassification(config).eval()
    with refused(model, str(folder), "llama", "not those of this model", "model.layers.0.self_attn.q_proj"):
        dt.load(model, folder)


def test_truncated_file(model: nn.Module, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for kept in (len(data) - 1, len(data) // 2, 20, 7, 0):
        (folder / WEIGHTS).write_bytes(data[:kept])
        with refused(model, str(folder / WEIGHTS), "damaged", f"{kept} bytes"):
            dt.load(model, folder)


def test_corrupted_file(model: nn.Module, folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with refused(model, str(folder / WEIGHTS), "hash differs"):
        dt.load(model, folder)
    data[7] ^= 0xFF  # the length of its header
    (folder / WEIGHTS).write_bytes(data)
    with refused(model, str(folder / WEIGHTS), "damaged"):
        dt.load(model, folder)


def test_swapped_pair_of_files(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    dt.attach(tiny(), "lora", r=2).save(tmp_path / "second")
    (tmp_path / "second" / WEIGHTS).replace(folder / WEIGHTS)
    with refused(model, str(folder / WEIGHTS), "hash differs"):
        dt.load(model, folder)


def test_unknown_method_in_the_file(model: nn.Module, folder: Path) -> None:
    rewrite(folder, tree={"method": "lorra", "config": {"r": 2}, "where": None, "layers": None})
    with refused(model, "method", "'lorra'", "did you mean 'lora'"):
        dt.load(model, folder)


def test_unknown_hyperparameter_in_the_file(model: nn.Module, folder: Path) -> None:
    rewrite(folder, tree={"method": "lora", "config": {"rank": 2}, "where": None, "layers": None})
    with refused(model, "hyperparameter of lora", "'rank'"):
        dt.load(model, folder)


@pytest.mark.parametrize("tree", [
    {"op": "sum"},
    {"op": "sum", "children": 3},
    {"op": "sum", "children": ["lora"]},
    {"op": "sum", "children": [], "weights": [1]},
    {"op": ["sum"], "children": []},
    {"method": ["lora"]},
    {"method": "lora", "config": [8]},
    {"method": "lora", "config": {"r": "8"}},
    {"method": "lora", "rank": 8},
])  # fmt: skip
def test_odd_tree_in_the_file(folder: Path, tree: dict[str, Any]) -> None:
    rewrite(folder, tree=tree)
    model = tiny()
    with refused(model, str(folder), "its tree cannot be read"):
        dt.load(model, folder)


def test_unknown_node_in_the_file(model: nn.Module, folder: Path) -> None:
    rewrite(folder, tree={"op": "sun", "children": []})
    with refused(model, "node", "'sun'", "did you mean 'sum'"):
        dt.load(model, folder)


def test_unknown_format(model: nn.Module, folder: Path) -> None:
    rewrite(folder, format=2)
    with refused(model, str(folder / CARD), "format 2", "reads format 1"):
        dt.load(model, folder)


@pytest.mark.parametrize("field", ["tree", "head", "sites", "in_place", "backbone", "site_table", "seed", "n_head"])
def test_card_with_a_field_of_another_type(model: nn.Module, folder: Path, field: str) -> None:
    for value in (None, [3], {"x": {}}, 0.5, *(() if field in ("backbone", "site_table") else ("?",))):
        rewrite(folder, **{field: value})
        with refused(model, str(folder), field):
            dt.load(model, folder)


def test_card_that_is_damaged(model: nn.Module, folder: Path) -> None:
    rewrite(folder, colour="red")
    with refused(model, str(folder / CARD), "unknown field 'colour'"):
        dt.load(model, folder)
    for text in ("{", "[]", "\x00"):
        (folder / CARD).write_text(text, encoding="utf-8")
        with refused(model, str(folder / CARD)):
            dt.load(model, folder)


def test_folder_without_an_adapter(model: nn.Module, folder: Path) -> None:
    with refused(model, str(folder.parent), "no adapter", CARD):
        dt.load(model, folder.parent)
    (folder / WEIGHTS).unlink()
    with refused(model, str(folder), "no adapter", WEIGHTS):
        dt.load(model, folder)


def test_load_under_a_name_that_is_there(model: nn.Module, folder: Path) -> None:
    dt.attach(model, "ia3", name="law")
    with refused(model, "an adapter named 'law' already"):
        dt.load(model, folder, name="law")


def test_saving_over_a_file(model: nn.Module, tmp_path: Path) -> None:
    adapter = dt.attach(model, "lora", r=2)
    path = tmp_path / "law"
    path.write_text("mine", encoding="utf-8")
    with refused(model, str(path), "is a file"):
        adapter.save(path)
    assert path.read_text(encoding="utf-8") == "mine"


# merging


@pytest.mark.parametrize(("method", "site"), [
    ("sequential", "model.layers.0.self_attn.o_proj"),
    ("prefix_tuning", "model.layers.0.self_attn"),
    ("prompt_tuning", "model"),
])  # fmt: skip
def test_merging_a_method_without_fold(method: str, site: str) -> None:
    model = tiny()
    adapter = moved(dt.attach(model, method))
    assert not adapter.mergeable
    with refused(model, site, method, "no fold"):
        adapter.merge()


def test_merging_a_tree_with_one_leaf_without_fold() -> None:
    model = tiny()
    adapter = moved(dt.attach(model, dt.Sum(dt.LoRA(r=2), dt.PrefixTuning(n=2))))
    with refused(model, "model.layers.0.self_attn", "prefix_tuning", "no fold"):
        adapter.merge()


def test_merging_into_tied_embeddings() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True, use_cache=False)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    adapter = moved(dt.attach(model, "lora", where="embed,q", r=2))
    with refused(model, "model.embed_tokens", "tied", "lm_head.weight"):
        adapter.merge()


def test_merging_twice(model: nn.Module) -> None:
    for other in dt.adapters(model).values():
        other.disable()
    adapter = moved(dt.attach(model, "lora", r=2, name="law"))
    adapter.merge()
    with refused(model, "'law' is merged already"):
        adapter.merge()
    with refused(model, "'law' is merged", "unmerge it first"):
        adapter.enable()


def test_merging_what_is_disabled(model: nn.Module) -> None:
    adapter = moved(dt.attach(model, "lora", r=2, name="law"))
    adapter.disable()
    with refused(model, "'law' is disabled"):
        adapter.merge()


def test_merging_around_another_adapter() -> None:
    model = tiny()
    moved(dt.attach(model, "ia3", name="inner", head=None))
    outer = moved(dt.attach(model, "lora", r=2, name="outer", head=None))
    with refused(model, "model.layers.0.self_attn.v_proj", "'inner'", "'outer'", "merge it first"):
        outer.merge()


def test_unmerging_what_is_not_merged(model: nn.Module) -> None:
    adapter = dt.attach(model, "lora", r=2, name="law")
    with refused(model, "'law' is not merged"):
        adapter.unmerge()


def test_handle_of_an_adapter_that_is_gone(model: nn.Module) -> None:
    adapter = dt.attach(model, "lora", r=2, name="law")
    adapter.detach()
    with refused(model, "'law' is no longer on this model"):
        adapter.params()
