"""Arithmetic on trained adapters: beside HF PEFT's and AdapterHub's, by hand, on any mergeable method, and what it refuses."""

import copy
import json
import runpy
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import deltatune as dt
from deltatune.contract.beds import BEDS
from deltatune.contract.checks import State
from deltatune.core import files
from deltatune.core.method import METHODS
from deltatune.merging import WAYS

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
WEIGHTS = [0.7, 0.5, -0.3]


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3, initializer_range=0.3)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.3)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def out(model: nn.Module) -> Tensor:
    ids = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


def moved(adapter: dt.Adapter, seed: int) -> dt.Adapter:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return adapter


def saved(folder: Path, model: nn.Module, *methods: Any, head: str | None = None) -> list[str]:
    """The folder of a trained adapter of each method."""
    found = []
    for i, method in enumerate(methods):
        adapter = moved(dt.attach(model, method, head=head, name=f"a{i}"), i)
        adapter.save(folder / str(i))
        adapter.detach()
        found.append(str(folder / str(i)))
    return found


def changes(model: nn.Module, folder: str) -> dict[str, Tensor]:
    """W' - W of every parameter that a saved adapter changes, by merging it."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = dt.load(model, folder)
    adapter.merge()
    adapter.detach()
    found = {n: p.detach() - before.get(n, torch.zeros(())) for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n]) if n in before else p.zero_()
    return {n: t for n, t in found.items() if t.any()}


def total(model: nn.Module, every: list[dict[str, Tensor]], weights: list[float]) -> Tensor:
    """The outputs under W + sum_i w_i (W_i' - W)."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for w, found in zip(weights, every, strict=True):
            for name, t in found.items():
                model.get_parameter(name).add_(w * t)
    return out(model)


# HF PEFT


PEFT_WAYS = [way for way in WAYS if not way.endswith("values") and way not in ("average", "negate_b")]
PLACES = {"llama": (llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "wte"])}


def theirs(name: str, folder: Path, ranks: tuple[int, ...]) -> Any:
    """Their model with adapters a0, a1, ... of scales of their own, and these in folders."""
    make, targets = PLACES[name]
    model: Any = None
    for i, r in enumerate(ranks):
        config = peft.LoraConfig(
            r=r, lora_alpha=4 + 3 * i, target_modules=targets, fan_in_fan_out=name == "gpt2", use_rslora=i == 1
        )
        if model is None:
            model = peft.get_peft_model(make(), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(0.4 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(folder)
    return model.eval()


def added(model: Any, ranks: tuple[int, ...], way: str, seed: int = 0, **options: Any) -> None:
    """Their `add_weighted_adapter`, whose draws begin once its tensors are there."""
    inject = model.base_model.inject_adapter

    def seeded(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    names = [f"a{i}" for i in range(len(ranks))]
    with patch.object(model.base_model, "inject_adapter", seeded):
        model.add_weighted_adapter(names, WEIGHTS, "new", way, **options)
    model.set_adapter("new")


@pytest.mark.parametrize("name", PLACES)
def test_as_hf_peft_combines(tmp_path: Path, name: str) -> None:
    """Every way of theirs, from their own files, a negative weight among them; DARE with their draws."""
    ranks = (4, 4, 4)
    model = theirs(name, tmp_path, ranks)
    ours = PLACES[name][0]()
    bare = out(ours)
    folders = [tmp_path / f"a{i}" for i in range(3)]
    files_of_ours = [tmp_path / f"ours{i}" for i in range(3)]
    for theirs_, mine in zip(folders, files_of_ours, strict=True):
        adapter = dt.load(ours, theirs_)
        adapter.save(mine)
        adapter.detach()
    for way in PEFT_WAYS:
        if name == "gpt2" and WAYS[way] in (
            ("dare_linear", "svd"),
            ("dare_ties", "svd"),
        ):  # of (I, O) they draw another mask
            continue
        pruned = {} if WAYS[way][0] == "linear" else {"density": 0.4}
        elects = {} if "ties" not in way else {"majority_sign_method": "frequency"}
        added(model, ranks, way, seed=5, **pruned, **elects)
        want = out(model)
        model.set_adapter("a0")
        model.delete_adapter("new")
        sign = {"sign": "frequency"} if elects else {}
        each = folders if way == "linear" else files_of_ours
        new = dt.combine(ours, each, WEIGHTS, way, seed=5, **pruned, **sign)
        assert (want - bare).abs().max() > 0.05
        torch.testing.assert_close(out(ours), want, rtol=0, atol=2e-5, msg=lambda m, way=way: f"{way}: {m}")
        new.detach()


def test_as_hf_peft_adds_up_ia3(tmp_path: Path) -> None:
    """Its (IA)3 has a way of its own, the weighted sum of the vectors."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model: Any = peft.get_peft_model(llama(), config, adapter_name="a0")
    for i in (1, 2):
        model.add_adapter(f"a{i}", config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "ia3_l" in n:
                p.copy_(1 + 0.4 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter([f"a{i}" for i in range(3)], WEIGHTS, "new")
    model.set_adapter("new")
    ours = llama()
    bare = out(ours)
    dt.combine(ours, [tmp_path / f"a{i}" for i in range(3)], WEIGHTS, "average")
    want = out(model.eval())
    assert (want - bare).abs().max() > 0.05
    torch.testing.assert_close(out(ours), want, rtol=0, atol=2e-5)


# AdapterHub


MAKE = runpy.run_path(str(Path(__file__).parent / "golden" / "make_merging.py"))
PARITY = runpy.run_path(str(Path(__file__).parent / "methods" / "test_adapters_parity.py"))
TREES = {(name, config): tree for name, config, tree in PARITY["cases"]()}
STRATEGIES = {"linear": "average", "lora_linear_only_negate_b": "negate_b", "lora_delta_w_svd": "svd"}


@pytest.mark.parametrize("case", MAKE["CASES"], ids=MAKE["key"])
def test_as_adapterhub_averages(tmp_path: Path, case: tuple[Any, ...]) -> None:
    """`average_adapter` of adapters 1.3: linear for any method, and LoRA's two other ways."""
    name, config, strategy, weights, rank = case
    model = MAKE["MAKE"]["backbone"](name)
    for i in range(3):
        adapter = dt.attach(model, TREES[name, config], head=None, name=f"a{i}")
        PARITY["filled"](adapter)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(MAKE["of"](i, p))
        adapter.save(tmp_path / str(i), resumable=True)  # they average what makes a prefix, not the prefix
        adapter.detach()
    if rank is not None:  # their scale is alpha / svd_rank, which is not that of the adapters where the rank is another
        weights = [w * MAKE["R"] / rank for w in weights]
    bare = MAKE["MAKE"]["states"](model, name)
    folders = [tmp_path / str(i) for i in range(3)]
    dt.combine(model, folders, weights, STRATEGIES[strategy], **({} if rank is None else {"rank": rank}))
    golden = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))["states"][MAKE["key"](case)]
    states = MAKE["MAKE"]["states"](model, name)
    assert (states - bare).abs().max() > 0.05
    torch.testing.assert_close(states, torch.tensor(golden), rtol=0, atol=2e-5)


# Any method


MERGEABLE: dict[str, Any] = {
    "dora": lambda: dt.DoRA(r=3, where="attn.q,mlp.down"),
    "ia3": dt.IA3,
    "ssf": dt.SSF,
    "bitfit": dt.BitFit,
    "ln_tuning": dt.LNTuning,
    "loha": lambda: dt.LoHa(r=2),
    "pissa": lambda: dt.PiSSA(r=3),
    "boft": dt.BOFT,
    "vera": dt.VeRA,
    "token_rows": lambda: dt.TokenRows(ids=(3, 5)),
    "values": lambda: dt.Values(where="q,norm"),
    "lora with biases": lambda: dt.LoRA(r=2, bias=True),
    "tree": lambda: dt.Sum(dt.LoRA(r=2), dt.Stack(dt.IA3(), dt.LoRA(r=3, where="attn.k,mlp.up"))),
}


@pytest.mark.parametrize("name", MERGEABLE)
def test_the_sum_of_what_any_method_changes(tmp_path: Path, name: str) -> None:
    """W + 0.6 (W_1' - W) - 1.1 (W_2' - W), both by merging; as values, and at full rank, after saving and loading."""
    model, method = bert(), MERGEABLE[name]()
    folders = saved(tmp_path, model, method, method)
    want = total(model, [changes(model, f) for f in folders], [0.6, -1.1])
    assert (want - out(model)).abs().max() > 1e-3
    for way in ("values", "svd"):
        new = dt.combine(model, folders, [0.6, -1.1], way, **({"rank": 16} if way == "svd" else {}))
        assert new.residual < 1e-7 and new.mergeable
        torch.testing.assert_close(out(model), want, rtol=0, atol=2e-5)
        new.save(tmp_path / "new")
        kept = out(model)
        new.detach()
        again = dt.load(model, tmp_path / "new")
        assert torch.equal(out(model), kept)
        again.detach()


@pytest.mark.slow
def test_every_method_that_folds(tmp_path: Path) -> None:
    """Of one source, the values and a LoRA of full rank are what merging it gives."""
    model = bert()
    numbers = {"r": 4, "n_experts": 2, "block": 4, "d": 50}
    for name, method in sorted(METHODS.items()):
        if not method.has_fold or method.in_place or method.sources or name == "copy":
            continue
        if method.quantised or method.rebases:  # on codes alone, and this base is plain
            continue
        hyper = {k: v for k, v in numbers.items() if k in method.Config.__dataclass_fields__}
        adapter = moved(dt.attach(model, name, head=None, **(hyper if name != "increlora" else {})), 1)
        adapter.save(tmp_path / name)
        adapter.merge()
        want = out(model)
        adapter.unmerge()
        adapter.detach()
        for way, options in (("values", {}), ("svd", {"rank": 16})):
            new = dt.combine(model, [tmp_path / name], [1], way, **options)
            torch.testing.assert_close(
                out(model), want, rtol=0, atol=2e-4, msg=lambda m, at=f"{name}, {way}": f"{at}: {m}"
            )
            new.detach()


def test_the_rules_on_what_other_methods_change(tmp_path: Path) -> None:
    """TIES over two methods, tensor by tensor beside HF PEFT's function, on changes that merging gives."""
    model = bert()
    folders = saved(tmp_path, model, dt.LoHa(r=2, where="attn.q"), dt.DoRA(r=2, where="attn.q,attn.k"))
    every = [changes(model, f) for f in folders]
    dt.combine(model, folders, [1.0, 0.7], "ties_values", density=0.3).save(tmp_path / "new")
    dt.adapters(model)["combined"].detach()
    got = changes(model, str(tmp_path / "new"))
    assert got.keys() == every[1].keys() and len(got) == 4
    for name, t in got.items():
        there = [(one[name], w) for one, w in zip(every, [1.0, 0.7], strict=True) if name in one]
        want = merge_utils.ties([t for t, _ in there], torch.tensor([w for _, w in there]), 0.3)
        torch.testing.assert_close(t, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["experts", "slices", "slices and all", "convolution"])
def test_other_layers(tmp_path: Path, where: str) -> None:
    """Fused experts, slices of a fused matrix, these under an adapter on all of it, and a convolution."""
    torch.manual_seed(0)
    if where == "experts":
        model: nn.Module = BEDS["experts"].model(torch.float32)
        methods = [dt.LoRA(r=2, where="experts"), dt.LoRA(r=3, where="experts")]
    elif where == "convolution":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
        methods = [dt.LoRA(r=2, where="embed"), dt.LoRA(r=2, where="embed")]
    else:
        model = gpt2()
        methods = [
            dt.LoRA(r=2, where="attn.q,attn.v"),
            dt.LoRA(r=2, where="attn.q" if where == "slices" else ["c_attn"]),
        ]
    folders = saved(tmp_path, model, *methods)
    every = [changes(model, f) for f in folders]
    for way, options in (("svd", {"rank": 6}), ("values", {}), ("cat", {})):
        if (where, way) == ("experts", "values"):
            with pytest.raises(ValueError, match="values cannot sit on experts"):
                dt.combine(model, folders, [0.5, -2.0], way)
            continue
        new = dt.combine(model, folders, [0.5, -2.0], way, **options)
        new.save(tmp_path / "new")
        new.detach()
        got = changes(model, str(tmp_path / "new"))
        assert got.keys() == {*every[0], *every[1]} and new.residual < 1e-6
        for name, t in got.items():
            want = 0.5 * every[0].get(name, 0) - 2.0 * every[1].get(name, 0)
            torch.testing.assert_close(t, want, rtol=0, atol=1e-5)


def test_what_is_left_out(tmp_path: Path) -> None:
    """By the singular values of what is wanted, whether it is decomposed itself or by LoRA's factors; and by its entries."""
    model = bert()
    for method in (dt.LoHa(r=2), dt.LoRA(r=3)):
        folders = saved(tmp_path, model, method, method)
        every = [changes(model, f) for f in folders]
        wanted = {n: (every[0][n] - every[1][n]).double() for n in every[0]}
        new = dt.combine(model, folders, [1, -1], "svd", rank=2)
        spectra = [torch.linalg.svdvals(t) for t in wanted.values()]
        shares = [float(s[2:].norm() / s.norm()) for s in spectra]
        assert [*new.residuals.values()] == pytest.approx(shares, rel=1e-4) and min(shares) > 0.1
        lost, whole = (sum(float(s[k:].square().sum()) for s in spectra) for k in (2, 0))
        assert new.residual == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
        new.detach()
        new = dt.combine(model, folders, [1, -1], "values", keep=0.1)
        sizes = [t.numel() for t in wanted.values()]
        assert new.params() == sum(int(0.1 * (n + 16)) for n in sizes)  # of a weight and its bias
        best = [t.flatten().abs().sort(descending=True).values for t in wanted.values()]
        shares = [float(t[int(0.1 * (len(t) + 16)) :].norm() / t.norm()) for t in best]
        assert [*new.residuals.values()] == pytest.approx(shares, rel=1e-4)
        new.detach()
        shutil.rmtree(tmp_path)


def test_negation_and_analogy(tmp_path: Path) -> None:
    """A LoRA that is forgotten, "c as b is to a", and the same of a vector that multiplies, by what each changes."""
    model = bert()
    folders = saved(tmp_path, model, *[dt.LoRA(r=2)] * 3)
    every = [changes(model, f) for f in folders]
    ways = {"linear": {}, "cat": {}, "svd": {"rank": 2}, "values": {}}
    for way, options in ways.items():
        new = dt.combine(model, folders[:1], [-1], way, **options)
        torch.testing.assert_close(out(model), total(model_without(model), every[:1], [-1.0]), rtol=0, atol=2e-5)
        new.detach()
    want = total(model, every[::-1], [1.0, 1.0, -1.0])
    for way, options in {"cat": {}, "svd": {"rank": 6}, "values": {}}.items():
        new = dt.combine(model, folders[::-1], [1, 1, -1], way, **options)
        torch.testing.assert_close(out(model), want, rtol=0, atol=2e-5)
        new.detach()
    both = dt.combine(model, [*folders[:1], *folders[:1]], [1.0, -1.0], "cat")
    assert all(torch.allclose(d.b @ d.a, torch.zeros(()), atol=1e-6) for d in both.deltas.values())
    both.detach()
    with pytest.raises(ValueError, match="nothing is left"):
        dt.combine(model, [*folders[:1], *folders[:1]], [1.0, -1.0], "svd")


def model_without(model: nn.Module) -> nn.Module:
    """A copy without its adapters."""
    twin = copy.deepcopy(model)
    for adapter in dt.adapters(twin).values():
        adapter.detach()
    return twin


def test_places_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    """Sites that only some have, ranks and scales by place, kinds of LoRA; the words of a place that all have stay."""
    model = bert()
    one = dt.LoRA(r=2, alpha=5.0, where={"attn.q": {}, "mlp.down": {"r": 3}})
    other = dt.LoRAFA(r=2, power=0.5, where="attn.q,attn.k")
    folders = saved(tmp_path, model, one, other)
    want = total(model, [changes(model, f) for f in folders], [0.5, 2.0])
    new = dt.combine(model, folders, [0.5, 2.0], "cat")
    torch.testing.assert_close(out(model), want, rtol=0, atol=2e-5)
    assert {d.r for d in new.deltas.values()} == {2, 3, 4}
    new.detach()
    folders = saved(tmp_path, model, dt.LoRA(r=2, where="k,v", layers=1), dt.LoRAPlus(r=4, where="k,v", layers=1))
    new = dt.combine(model, folders, [1, 1], "cat")
    (leaf,) = (leaf for _, leaf in new.tree.leaves())
    assert (leaf.method, leaf.config.r, leaf.where, leaf.layers) == (dt.LoRA, 6, "k,v", 1)
    assert not any(p.requires_grad for p in model.parameters())
    new.detach()
    new = dt.combine(model, folders, None, "svd", trainable=True)
    assert {d.r for d in new.deltas.values()} == {4} and all(p.requires_grad for p in new.parameters())


def test_trees_keep_their_shape(tmp_path: Path) -> None:
    """LoRAs under a node each on its own; and every tensor of a tree whose parts are no LoRA."""
    model, tree = bert(), dt.Average(dt.LoRA(r=2), dt.Stack(dt.LoRA(r=3, where="attn.q,mlp.up")))
    folders = saved(tmp_path, model, tree, tree)
    every = [changes(model, f) for f in folders]
    new = dt.combine(model, folders, [0.5, -1.0], "cat")
    assert isinstance(new.tree, dt.Average)
    torch.testing.assert_close(out(model), total(model_without(model), every, [0.5, -1.0]), rtol=0, atol=2e-5)
    new.detach()
    tree = dt.Sum(dt.LoRA(r=2), dt.Stack(dt.PrefixTuning(n=2), dt.Sequential(r=2)))
    folders = saved(tmp_path, model, tree, tree)
    new = dt.combine(model, folders, [0.5, -1.0], "average")
    assert new.tree == tree
    for key, t in new.state_dict().items():
        one, other = (files.read_adapter(f)[1][key] for f in folders)
        torch.testing.assert_close(t, 0.5 * one - other, rtol=0, atol=1e-6)


def test_adapters_of_the_whole_model(tmp_path: Path) -> None:
    """Task arithmetic on full fine-tuning: by parameter, and as a LoRA of its matrices; the head is a source's or the model's."""
    model = bert()
    folders = saved(tmp_path, model, "full", "full")
    every = [changes(model, f) for f in folders]
    body = [{n: t for n, t in one.items() if "classifier" not in n} for one in every]
    want = total(model, body, [0.4, -0.7])
    state = State(model)
    for way, options in (("linear", {}), ("svd", {"rank": 16}), ("values", {})):
        new = dt.combine(model, folders, [0.4, -0.7], way, **options)
        torch.testing.assert_close(out(model), want, rtol=0, atol=2e-5)
        new.detach()
        state.restored(model)
    head = {n: t for n, t in every[1].items() if "classifier" in n}
    want = total(model, [*body, head], [0.4, -0.7, 1.0])
    for way, options in (("linear", {}), ("svd", {"rank": 16})):
        new = dt.combine(model, folders, [0.4, -0.7], way, head=1, **options)
        torch.testing.assert_close(out(model), want, rtol=0, atol=2e-5)
        new.detach()
    trimmed = dt.combine(model, folders, [1, 1], "ties", density=0.2)
    name = "bert.encoder.layer.1.output.dense.weight"
    want = merge_utils.ties([one[name] for one in every], torch.tensor([1.0, 1.0]), 0.2)
    got = trimmed.state_dict()[f"0.{name}"] - bert().get_parameter(name)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_delta_beside_a_whole_model(tmp_path: Path) -> None:
    """A LoRA and a full fine-tuning meet in the weights, at sites that both change and at those of the second alone."""
    model = bert()
    folders = saved(tmp_path, model, dt.LoRA(r=2), "full")
    body = [{n: t for n, t in changes(model, f).items() if "classifier" not in n} for f in folders]
    want = total(model, body, [0.5, 0.7])
    for way, options in (("svd", {"rank": 16}), ("values", {})):
        new = dt.combine(model, folders, [0.5, 0.7], way, **options)
        torch.testing.assert_close(out(model), want, rtol=0, atol=2e-5)
        new.detach()


def test_heads_of_other_widths(tmp_path: Path) -> None:
    """Adapters of tasks with other numbers of classes: no head is looked at but the one that is asked for."""

    def classes(n: int) -> Any:
        model: Any = bert()
        model.classifier, model.config.num_labels, model.num_labels = nn.Linear(16, n), n, n
        return model

    for method in ("lora", "full"):
        each = [saved(tmp_path / f"{method}{n}", classes(n), method, head="auto")[0] for n in (2, 4)]
        model = classes(4)
        for way, options in (("linear", {}), ("svd", {"rank": 16}), ("values", {}), ("ties", {"density": 0.5})):
            dt.combine(model, each, [1, 1], way, **options).detach()
        new = dt.combine(model, each, [1, 1], head=1)
        assert new.n_head == 4 * 17
        state = State(model)
        with pytest.raises(ValueError, match=r"classifier\.weight is \(2, 16\), here it (must be|is) \(4, 16\)"):
            dt.combine(model if method == "lora" else classes(4), each, [1, 1], head=0, name="other")
        state.restored(model)


def test_ties_of_weights_that_are_not_given(tmp_path: Path) -> None:
    """Its mean over those that agree is the paper's, and not a second time divided by their number."""
    model = bert()
    folders = saved(tmp_path, model, *[dt.LoRA(r=2)] * 3)
    for way in ("ties", "dare_ties_values"):
        values = []
        for weights in (None, [1, 1, 1]):
            new = dt.combine(model, folders, weights, way, density=0.5)
            values.append(new.state_dict())
            new.detach()
        assert all(torch.equal(t, values[1][key]) for key, t in values[0].items()), way


def test_pruning_keeps_an_entry(tmp_path: Path) -> None:
    """A share of a small tensor that is less than one entry is one, not silently none."""
    model = bert()
    (folder,) = saved(tmp_path, model, dt.LNTuning())
    (one,) = (changes(model, folder),)
    dt.combine(model, [folder], [1], "magnitude_prune_values", density=0.05).save(tmp_path / "new")
    dt.adapters(model)["combined"].detach()
    got = changes(model, str(tmp_path / "new"))
    assert got.keys() == one.keys()
    for name, t in got.items():
        assert int((t != 0).sum()) == 1 and float(t.abs().max()) == pytest.approx(float(one[name].abs().max()))


def test_the_task_head(tmp_path: Path) -> None:
    model = bert()
    folders = saved(tmp_path, model, *[dt.LoRA(r=2)] * 2, head="auto")
    assert not dt.combine(model, folders, [1, 1]).n_head
    dt.adapters(model)["combined"].detach()
    new = dt.combine(model, folders, [1, 1], head=1)
    theirs = files.read_adapter(folders[1])[1]
    heads = {key: t for key, t in new.state_dict().items() if key.startswith("head.")}
    assert len(heads) == 2 and all(torch.equal(t, theirs[key]) for key, t in heads.items())


def test_standing_adapters_and_what_is_left_alone(tmp_path: Path) -> None:
    """Adapters are sources too, also another model's; they, the generator and the model stay as they were."""
    model = bert()
    one = moved(dt.attach(model, "lora", r=2, head=None, name="one"), 0)
    other = moved(dt.attach(bert(), "lora", r=2, head=None), 1)
    one.save(tmp_path / "0")
    other.save(tmp_path / "1")
    before, drawn = out(model), torch.random.get_rng_state()
    state = State(model)
    new = dt.combine(model, [one, other], [1, 2], "dare_linear", density=0.5, seed=3)
    values = new.state_dict()
    assert torch.equal(torch.random.get_rng_state(), drawn) and one.enabled
    new.detach()
    state.restored(model)
    assert torch.equal(out(model), before)
    one.detach()
    again = dt.combine(model, [tmp_path / "0", tmp_path / "1"], [1, 2], "dare_linear", density=0.5, seed=3)
    assert all(torch.equal(t, values[key]) for key, t in again.state_dict().items())


def wrong() -> dict[str, tuple[Any, ...]]:
    """Arguments, and what the error says of them; 0 to 5 are the sources below."""
    return {
        "way": ([0, 1], [1, 1], "tie", {}, "did you mean 'ties'"),
        "weights": ([0, 1], [1, 1, 1], "linear", {}, "3 weights for 2 adapters"),
        "infinite": ([0, 1], [1, float("inf")], "linear", {}, "not all finite"),
        "no density": ([0, 1], [1, 1], "ties", {}, "ties needs a density"),
        "density 0": ([0, 1], [1, 1], "ties", {"density": 0.0}, "density = 0.0, but a share lies above 0"),
        "density 2": ([0, 1], [1, 1], "dare_ties_svd", {"density": 2}, "density = 2, but a share lies above 0"),
        "density of linear": ([0, 1], [1, 1], "linear", {"density": 0.5}, "linear takes no density; .*magnitude_prune"),
        "keep of svd": ([0, 1], [1, 1], "svd", {"keep": 0.5}, "svd takes no keep; .*ties_values"),
        "rank": ([0, 1], [1, 1], "svd", {"rank": 0}, "rank = 0"),
        "half a rank": ([0, 1], [1, 1], "svd", {"rank": 1.5}, "rank = 1.5, but it must be a whole number"),
        "one weight": ([0, 1], 0.5, "linear", {}, "weights are numbers, one for each of the 2 adapters, not 0.5"),
        "sign of linear": ([0, 1], [1, 1], "linear", {"sign": "frequency"}, "linear takes no sign; .*dare_ties"),
        "sign": ([0, 1], [1, 1], "ties", {"density": 0.5, "sign": "most"}, "total"),
        "head": ([0, 1], [1, 1], "linear", {"head": 2}, "head = 2, .*0 to 1"),
        "no head": ([0, 1], [1, 1], "linear", {"head": 1}, "no task head of its own"),
        "ranks": ([0, 2], [1, 1], "linear", {}, "ranks 2 and 3, and linear adds factor to factor"),
        "trees": ([0, 3], [1, 1], "average", {}, "are of other trees: .*LoRA.*IA3"),
        "structure": ([0, 5], [1, 1], "cat", {}, "are of other trees: .*LoRA.*Sum"),
        "no factors": ([3, 3], [1, 1], "ties", {"density": 0.5}, "ia3 is not W \\+ s B A, whose factors ties works on"),
        "no fold": ([4, 4], [1, 1], "values", {}, "prefix_tuning defines no fold"),
        "no rank": ([3, 3], [1, 1], "svd", {}, "needs a rank"),
        "other base": ([0, 6], [1, 1], "linear", {}, "with other weights"),
        "too high": ([0] * 9, [1] * 9, "cat", {}, "r = 18, but it must lie between 1 and"),
        "name": ([0, 1], [1, 1], "linear", {"name": "there"}, "has an adapter named 'there' already"),
    }


@pytest.mark.parametrize("what", wrong())
def test_errors_leave_the_model_as_it_was(tmp_path: Path, what: str) -> None:
    numbers, weights, way, options, text = wrong()[what]
    model = bert()
    methods = [dt.LoRA(r=2), dt.LoRA(r=2), dt.LoRA(r=3), dt.IA3(), dt.PrefixTuning(n=2), dt.Sum(dt.LoRA(r=2), dt.IA3())]
    wanted = {n: m for n, m in enumerate(methods) if n in numbers}
    folders = dict(zip(wanted, saved(tmp_path / "mine", model, *wanted.values()), strict=True))
    folders |= dict(zip([6], saved(tmp_path / "theirs", bert(1), dt.LoRA(r=2)), strict=True)) if 6 in numbers else {}
    dt.attach(model, "lora", name="there", head=None)
    state = State(model)
    with pytest.raises(ValueError, match=text):
        dt.combine(model, [folders[n] for n in numbers], weights, way, **options)
    state.restored(model)


def test_more_that_is_refused(tmp_path: Path) -> None:
    model = bert()
    one, full = saved(tmp_path, model, dt.LoRA(r=2), "full")
    with pytest.raises(ValueError, match="takes a list of folders"):
        dt.combine(model, one, [1])
    with pytest.raises(ValueError, match="trains the base itself, others do not"):
        dt.combine(model, [one, full], [1, 1])
    with pytest.raises(ValueError, match="is no adapter"):
        dt.combine(model, [tmp_path], [1])
    there = dt.load(model, one, name="there")
    there.merge()
    with pytest.raises(ValueError, match="'there' is merged into the base"):
        dt.combine(model, [one], [1])
    tied = gpt2()
    (full,) = saved(tmp_path, tied, "full")
    with pytest.raises(ValueError, match=r"moved transformer\.wte\.weight, which is tied"):
        dt.combine(tied, [full], [1], "svd", rank=2)
    a, b = (dt.attach(model_of, "vera", name="v", head=None, seed=i) for i, model_of in enumerate((bert(), bert())))
    with pytest.raises(ValueError, match="drawn from the seed: 0 in adapter 'v', 1 in adapter 'v'"):
        dt.combine(bert(), [a, b], [1, 1], "average")
    a, b = (moved(dt.attach(bert(), "lora_fa", name="v", head=None), i) for i in range(2))
    b.deltas[next(iter(b.deltas))].a.add_(1)
    with pytest.raises(ValueError, match="is not trained and differs from source to source"):
        dt.combine(bert(), [a, b], [1, 1], "average")
