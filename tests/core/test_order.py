"""What stands inside what: the weight path, spans and their layers, and what no gradient comes through."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import BEDS
from deltatune.contract.checks import State, close, far, perturb, same
from deltatune.core.mixed import Mixer

BED = BEDS["attention"]  # a Llama of two layers
BERT = BEDS["attention-bert"]


def out(model: nn.Module, **own: Tensor) -> Tensor:
    return model(**BED.batch(), **own)[0]  # type: ignore[no-any-return]


def refused(model: nn.Module, tree: Any, words: str) -> None:
    """Attach says so and changes nothing."""
    before = State(model)
    with pytest.raises(ValueError, match=words):
        dt.attach(model, tree)
    before.restored(model)


def test_a_weight_around_activations() -> None:
    """BOFT multiplies a weight, and HydraLoRA has none: one inside the other is refused, as one tree or as two adapters."""
    words = r"q_proj: boft works on the weight, and cannot stand around hydra_lora, which works on activations alone; put it"
    hydra, boft = dt.HydraLoRA(where="q"), dt.BOFT(where="q")
    refused(BED.model(), dt.Stack(hydra, boft), words)
    refused(
        BED.model(),
        dt.Stack(hydra, dt.Mixture(boft, dt.LoRA(where="q"))),
        words.replace("boft", r"boft\+lora\+softmax"),
    )
    model = BED.model()
    dt.attach(model, hydra, name="inner")
    outer = dt.attach(model, boft, name="outer")
    with pytest.raises(ValueError, match=words):
        out(model)
    with outer.disabled():
        out(model)
    other = BED.model()
    dt.attach(other, dt.Stack(boft, hydra))
    out(other)


def test_a_layer_lies_in_its_span() -> None:
    """(IA)3 scales what the MLP's last matrix gives, not the parallel adapter's, whichever was attached first."""
    found = []
    for order in ((0, 1), (1, 0)):
        model = BED.model()
        for i in order:
            torch.manual_seed(i)
            perturb(dt.attach(model, (dt.Parallel(r=4), dt.IA3(where="mlp.down", side="output"))[i], name=f"a{i}"))
        found.append(out(model))
        dt.adapters(model)["a1"].merge()
        close(out(model), found[-1], 1e-5, "with (IA)3 merged")
    close(found[1], found[0], 1e-6, "the other order")


@pytest.mark.parametrize("outer", [dt.DoRA(r=2, where="q"), dt.BOFT(where="q")])
def test_a_mixed_weight_around_another(outer: Any) -> None:
    """One child with a share of 1, around LoRA, is LoRA's weight folded by it."""
    found = []
    for tree in (dt.Stack(dt.LoRA(r=2, where="q"), outer), dt.Stack(dt.LoRA(r=2, where="q"), dt.Mixture(outer))):
        model = BED.model()
        torch.manual_seed(0)
        adapter = dt.attach(model, tree)
        for (path, _), delta in adapter.deltas.items():
            for name, p in delta.named_parameters() if not path.endswith(".1") else ():
                with torch.no_grad():
                    p.add_(
                        torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name) + p.numel())), alpha=0.3
                    )
        found.append(out(model))
    assert far(found[0], out(BED.model())) > 1e-2
    close(found[1], found[0], 1e-5, "in a mixture")


@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize("node", [dt.Gate, dt.Mixture, dt.Fuse])
def test_weights_at_an_embedding(node: Any, by: str) -> None:
    """Ids are no vectors: a mixer weighs by what the table gives."""
    if node is dt.Fuse and by == "sequence":
        pytest.skip("it weighs tokens alone")
    model = BED.model()
    tree = node(
        dt.LoRA(r=2, where="embed"), dt.SHiRA(keep=0.2, where="embed"), **({} if node is dt.Fuse else {"by": by})
    )
    adapter = perturb(dt.attach(model, tree))
    assert far(out(model), out(BED.model())) > 1e-3
    out(model).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in adapter.parameters())


@pytest.mark.parametrize(
    "node", [dt.Average, lambda *parts: dt.Stack(dt.Mixture(*parts, by="constant"), dt.BOFT(where="q"))]
)
def test_dropout_in_a_node_on_the_weight(node: Any) -> None:
    """It needs the activations: while it trains that is an error, and no dropout that is left out."""
    model = BED.model()
    dt.attach(model, node(dt.LoRA(r=2, where="q", dropout=0.5), dt.BOFT(where="q")))
    out(model)
    with pytest.raises(ValueError, match="q_proj: its dropout needs the activations"):
        out(model.train())


def test_rows_with_nothing_in_front_in_a_graph() -> None:
    """A graph cannot tell which rows have a prefix: rows without one do not get another row's."""
    model = BED.model()
    perturb(dt.attach(model, dt.Route(dt.LoRA(r=2), dt.PrefixTuning(n=3))))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        ones = torch.ones(4, dtype=torch.long)
        close(compiled(**BED.batch(), adapter_ids=ones)[0], out(model, adapter_ids=ones), 1e-5, "all with a prefix")
        with pytest.raises(RuntimeError, match="rows without learned tokens in front cannot run in a graph"):
            compiled(**BED.batch(), adapter_ids=torch.tensor([1, 1, 0, 1]))


@pytest.mark.parametrize("side", [dt.LST(r=2, weights="random"), dt.AttentionFusion()])
def test_beside_a_side_network_nothing_trains(side: Any) -> None:
    """It reads the blocks' outputs detached: what stands in the backbone gets no gradient, and is refused in one tree."""
    name = side.method.name
    for tree, other in (
        (dt.Stack(side, dt.LoRA(r=2)), "lora"),
        (dt.Sum(dt.PrefixTuning(n=2), side), "prefix_tuning"),
        (dt.Stack(dt.PromptTuning(n=2), side), "prompt_tuning"),
        (dt.Stack(dt.LNTuning(), dt.Average(side)), "ln_tuning"),
        (dt.Stack(dt.Residual(r=2), side), "residual"),
        (dt.Average(side, dt.LST(r=4, weights="random"), dt.LoRA(r=2)), "lora"),
    ):
        refused(
            BED.model(), tree, rf"{other} would not be trained, since beside .*{name}.* at layers.1 no gradient enters"
        )


@pytest.mark.parametrize(
    "tree",
    [
        lambda side: dt.Gate(side, dt.LoRA(r=2)),
        lambda side: dt.Sum(side, dt.Residual(r=2)),
        lambda side: dt.Average(side, dt.Residual(r=2)),
        lambda side: dt.Stack(side, dt.Residual(r=2, layers=-1)),
        lambda side: dt.Stack(dt.LNTuning(where=["norm"], layers=None), dt.Gate(side)),
    ],
)
def test_where_a_gradient_comes_through_it_trains(tree: Any) -> None:
    model = BED.model()
    adapter = perturb(dt.attach(model, tree(dt.AttentionFusion())))
    out(model).square().mean().backward()
    for (path, site), delta in adapter.deltas.items():
        for name, p in delta.named_parameters() if not isinstance(delta, Mixer) else ():
            assert p.grad is not None and bool(p.grad.any()), f"{path} {site} {name}"


def test_a_side_network_around_what_is_frozen(tmp_path: Any) -> None:
    """A LoRA that was trained before needs no gradient; neither does one that is another adapter, trained at other times."""
    model = BED.model()
    perturb(dt.attach(model, dt.LoRA(r=2))).save(tmp_path)
    other = BED.model()
    adapter = dt.attach(other, dt.Stack(dt.saved(tmp_path, frozen=True), dt.AttentionFusion()))
    out(other).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    dt.attach(model, dt.AttentionFusion(), name="side")
    with dt.adapters(model)["side"].disabled():
        same(out(model), out(model), "the output")


@pytest.mark.parametrize("side", [dt.LST, dt.AttentionFusion])
def test_a_side_network_without_its_end(side: Any) -> None:
    """What it read would be given out nowhere, and nothing would train."""
    words = (
        r"layers.0: what \w+ reads here would reach no output, since it does not stand at the last block of the stack"
    )
    refused(BED.model(), side(layers=0), words)
    refused(BED.model(), dt.Mixture(side(layers=0), dt.LoRA(r=2), by="constant"), words)


def test_a_weight_of_its_own_around_another() -> None:
    """Of what lies inside a copy of the layer nothing is left; outside of it, beside it at one site or in another slice it runs."""
    copy, lora = dt.Copy(where="q"), dt.LoRA(r=2, where="q")
    words = (
        r"q_proj: lora would have no effect, since copy around it has a weight of its own in the place of the layer's"
    )
    refused(BED.model(), dt.Stack(lora, copy), words)
    refused(BED.model(), dt.Sum(dt.IA3(), dt.Stack(lora, copy)), words)
    norms = dt.Sum(dt.LTSFT(where="norm"), dt.Copy(where="mlp_norm"))  # two sites of one layer
    refused(BED.model(), norms, r"layernorm:mlp_norm: lt_sft would have no effect, since copy around it")
    for tree in (dt.Stack(copy, lora), dt.Sum(lora, copy), dt.Stack(lora, dt.Gate(copy))):
        model = BED.model()
        adapter = perturb(dt.attach(model, tree))
        out(model).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())


def test_a_file_says_where_and_not_in_which_order(tmp_path: Any) -> None:
    """SuperLoRA's matrices lie in one large one in the backbone's order, also where another leaf's sites came first."""
    model = BED.model()
    perturb(dt.attach(model, dt.Sum(dt.LoRA(r=2, where="v,o"), dt.SuperLoRA(r=2, where="q,k,v,o")))).save(tmp_path)
    other = BED.model()
    dt.load(other, tmp_path)
    same(out(other), out(model), "the output after loading")


def test_a_node_in_a_node_with_learned_keys() -> None:
    """The inner node's weights are read at the attention's input, and reach its keys."""
    model = BED.model()
    adapter = perturb(
        dt.attach(model, dt.Mixture(dt.Gate(dt.PrefixTuning(n=2), by="sequence"), dt.LoRA(r=2), by="task"))
    )
    out(model, task_ids=torch.zeros(4, dtype=torch.long)).square().mean().backward()
    grads = {key: d.g.grad for key, d in adapter.deltas.items() if d.name == "gate"}  # type: ignore[attr-defined]
    assert grads
    assert all(g is not None and bool(g.any()) for g in grads.values())


def test_a_norm_s_weight_and_its_input() -> None:
    """A bias of a norm and Pfeiffer's adapter at it are at two sites of one layer: their order in the tree is no matter."""
    found = []
    for order in ((0, 1), (1, 0)):
        model = BERT.model()
        parts = [dt.LNTuning(), dt.Sequential(r=4, where="post_norm")]
        adapter = dt.attach(model, dt.Sum(*(parts[i] for i in order)))
        for (path, _), delta in adapter.deltas.items():
            generator = torch.Generator().manual_seed(order[int(path)])
            for p in delta.parameters():
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        found.append(model(**BERT.batch())[0])
    close(found[1], found[0], 1e-6, "the other order")


@pytest.mark.parametrize("n", [1, 2])
def test_a_bias_that_merging_adds_is_no_method_s_tensor(n: int) -> None:
    """A layer without a bias gets a copy of SSF's shift, which what is merged next does not write over."""
    model = BED.model()
    adapter = perturb(dt.attach(model, dt.Stack(*[dt.SSF(where="q")] * n)))
    want, state = out(model), {k: t.clone() for k, t in adapter.state_dict().items()}
    adapter.merge()
    close(out(model), want, 1e-5, "merged")
    bias = model.get_submodule("layers.0.self_attn.q_proj").bias
    assert all(bias.data_ptr() != p.data_ptr() for p in adapter.parameters())  # type: ignore[union-attr, operator]
    adapter.unmerge()
    for key, tensor in adapter.state_dict().items():
        same(tensor, state[key], key)
    same(out(model), want, "the output after unmerge")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("node", [dt.Gate, dt.Mixture, dt.Fuse])
def test_a_saved_node_brings_its_own_tensors(node: Any, frozen: bool, tmp_path: Any) -> None:
    """Its weights and whether they train, in the tree that it is made a part of and in that one's file."""
    model = BED.model()
    tree = node(dt.LoRA(r=2), dt.LoRA(r=3))
    perturb(dt.attach(model, tree)).save(tmp_path / "node")
    other = BED.model()
    adapter = dt.attach(other, dt.Sum(dt.saved(tmp_path / "node", frozen=frozen), dt.LoRA(r=2)))
    close(out(other), out(model), 1e-6, "the output")
    adapter.save(tmp_path / "tree")
    again = dt.load(BED.model(), tmp_path / "tree", trainable=True)
    for one in (adapter, again):
        mixers = [d for (path, _), d in one.deltas.items() if path == "0.2"]
        assert mixers
        assert all(bool([*d.parameters()]) is not frozen and d.state_dict() for d in mixers)
    assert again.tree == adapter.tree
    adapter.schedule.begin(torch.optim.SGD(adapter.groups(1e-3)), 1)
    out(other).square().mean().backward()
    adapter.schedule.before_step(0)  # Fuse's penalty, which frozen tensors have not


@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_part_brings_its_own_shapes(tmp_path: Any, frozen: bool) -> None:
    """Diff pruning's entries are as many as its course left: a part of a tree takes them as `load` does."""
    model = BED.model()
    adapter = perturb(dt.attach(model, "diff_pruning", where="q"))
    adapter.save(tmp_path)
    other = BED.model()
    part = dt.attach(other, dt.Stack(dt.saved(tmp_path, frozen=frozen), dt.LoRA(r=2)))
    close(out(other), out(model), 1e-5, "the output")
    (values, *_) = (d.values for d in part.deltas.values() if d.name == "diff_pruning")  # type: ignore[attr-defined]
    assert (
        values.numel() > dt.attach(BED.model(), dt.saved(tmp_path).method(where="q")).params() / 100
    )  # more than it keeps
