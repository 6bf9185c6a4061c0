"""One batch whose rows run different adapters: beside separate forwards, HF PEFT's mixed batches, training and `generate`."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from soft import check_generate, logits, model_of, moved, near, padded, rows
from torch import Tensor, nn

import deltatune as dt
from deltatune.contract.beds import checkpointed
from deltatune.core.compose import Node, Tree

LORA, IA3, PROMPT, PREFIX = dt.LoRA(r=4), dt.IA3(), dt.PromptTuning(n=3), dt.PrefixTuning(n=3)
IN_FRONT = {"prompt": (PROMPT, PROMPT), "prefix": (PREFIX, PREFIX), "made prefix": (dt.PrefixTuning(n=3, mid=5),) * 2}
BEHIND: dict[str, tuple[Tree, ...]] = {
    "lora": (LORA, LORA),
    "ranks": (LORA, dt.LoRA(r=2, bias=True), LORA),
    "ia3": (IA3, IA3),
    "pfeiffer": (dt.pfeiffer(r=4), dt.pfeiffer(r=4)),
    "parallel": (dt.Parallel(r=4), dt.Parallel(r=6)),
    "fold alone": (dt.LNTuning(), dt.LNTuning()),
    "dora": (dt.DoRA(r=4), dt.DoRA(r=4)),
    "words": (dt.LoRA(r=4, where="embed"), dt.LoRA(r=4, where="embed")),
    "kinds": (LORA, IA3, dt.pfeiffer(r=4)),
    "met": (dt.Stack(dt.pfeiffer(r=2), dt.pfeiffer(r=4)), dt.Average(dt.pfeiffer(r=4), dt.pfeiffer(r=3))),
    "places": (dt.LoRA(r=4, where="q"), dt.LoRA(r=4, where="q"), dt.LoRA(r=4, where="v")),
    "positions": (dt.LoRA(r=2, where=["position_embeddings"]),) * 2,
    "input": (dt.Hadamard(where="q"), dt.Fuse(LORA)),
    "nested": (dt.Sum(LORA, dt.LoRA(r=2)), dt.Gate(LORA, by="sequence"), dt.BitFit()),
}


def batch(kind: str) -> dict[str, Tensor]:
    return padded(kind) | ({"decoder_input_ids": rows()[:, :4]} if kind == "t5" else {})


def routed(kind: str, children: tuple[Tree, ...]) -> tuple[Any, dt.Adapter]:
    model = model_of(kind)
    return model, moved(dt.attach(model, dt.Route(*children), head=None))


def alone(kind: str, adapter: dt.Adapter, i: int) -> Any:
    """Another model with the i-th child alone, on the same values."""
    assert isinstance(adapter.tree, Node)
    model = model_of(kind)
    own = dt.attach(model, adapter.tree.children[i], head=None).deltas
    for (path, site), delta in adapter.deltas.items():
        if path.split(".")[0] != str(i):
            continue
        mine = own[path.partition(".")[2] or "0", site]
        mine.load_state_dict(delta.state_dict())
        for key, slot in delta.slots_of(delta.config).items():
            if slot.shared:
                mine.bank_parameter(key).data.copy_(delta.bank_parameter(key))
    return model


AT = {
    "lora": "bert llama t5",
    "pfeiffer": "bert llama",
    "met": "bert llama",
    "ia3": "bert t5",
    "kinds": "bert",
    "positions": "bert",
    "prompt": "t5",
    "prefix": "llama t5",
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in (*BEHIND, *IN_FRONT) for kind in AT.get(name, "llama").split()]
)
def test_a_row_is_what_its_adapter_alone_gives(name: str, kind: str) -> None:
    model, adapter = routed(kind, children := (BEHIND | IN_FRONT)[name])
    bare = logits(model_of(kind), **batch(kind))
    each = [logits(alone(kind, adapter, i), **batch(kind)) for i in range(len(children))]
    for ids in ([1, 0, 1], [0, 0, 0], [len(children) - 1, 1, 0]):
        got = logits(model, **batch(kind), adapter_ids=torch.tensor(ids))
        for k, i in enumerate(ids):
            near(got[k], each[i][k], 1e-6)
            assert (got[k] - bare[k]).abs().max() > 1e-3
    got = logits(model, **batch(kind), adapter_ids=torch.tensor([-1, -1, -1]))
    assert torch.equal(got, bare)
    if name not in IN_FRONT:
        got = logits(model, **batch(kind), adapter_ids=torch.tensor([-1, 1, 0]))
        assert torch.equal(got[0], bare[0])
        near(got[1:], torch.stack([each[1][1], each[0][2]]), 1e-6)


NAMES = {-1: "__base__", 0: "default", 1: "b", 2: "c"}


def beside(kind: str, configs: list[Any], children: list[Tree]) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Ours, HF PEFT's, and each one's layers by name, with the same values."""
    theirs: Any = peft.get_peft_model(model_of(kind), configs[0])
    for i, config in enumerate(configs[1:], 1):
        theirs.add_adapter(NAMES[i], config)
    theirs.eval()
    model, adapter = routed(kind, tuple(children))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "base_layer")
    }
    own = {f"{path} {site}": delta for (path, site), delta in adapter.deltas.items() if path != str(len(children))}
    assert own.keys() == {f"{i} {at}" for i in range(len(children)) for at in layers}
    return model, theirs, own, layers


@pytest.mark.parametrize(("kind", "ranks"), [("bert", (4, 2, 8)), ("llama", (4, 4, 4)), ("t5", (4, 4, 4))])
def test_a_mixed_batch_of_hf_peft(kind: str, ranks: tuple[int, ...]) -> None:
    """Logits, and the gradient of every matrix; an adapter without a row has none."""
    at = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}[kind]
    configs = [peft.LoraConfig(r=r, lora_alpha=16, target_modules=at) for r in ranks]
    where = "attn.q,attn.v,cross.q,cross.v" if kind == "t5" else "q,v"
    model, theirs, own, layers = beside(kind, configs, [dt.LoRA(r=r, alpha=16.0, where=where) for r in ranks])
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for key, delta in own.items():
        i, _, site = key.partition(" ")
        a, b = (getattr(layers[site], f"lora_{word}")[NAMES[int(i)]].weight for word in "AB")
        pairs += [(delta.a, a.requires_grad_()), (delta.b, b.requires_grad_())]
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    for ids in ([1, -1, 0], [2, 1, 2]):
        model.zero_grad()
        theirs.zero_grad()
        out = model(**batch(kind), adapter_ids=torch.tensor(ids)).logits
        want = theirs(**batch(kind), adapter_names=[NAMES[i] for i in ids]).logits
        near(out, want)
        for each in (out, want):
            (each * torch.linspace(-1, 1, each.numel()).view(each.shape)).sum().backward()
        for key, two in zip(own, zip(pairs[::2], pairs[1::2], strict=True), strict=True):
            for mine, other in two:
                assert (mine.grad is None) == (other.grad is None) == (int(key[0]) not in ids)
                if mine.grad is not None and other.grad is not None:
                    near(mine.grad, other.grad)
    if kind == "bert":
        return
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for n_beams in (1, 3):
        mine = model.generate(**padded(kind), **options, num_beams=n_beams, adapter_ids=torch.tensor([1, -1, 0]))
        names = [NAMES[i] for i in (1, -1, 0)]
        assert torch.equal(mine, theirs.generate(**padded(kind), **options, num_beams=n_beams, adapter_names=names))


def test_rows_of_ia3_are_what_hf_peft_s_adapters_give_one_at_a_time() -> None:
    """There a mixed batch is silently all the active adapter's."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model, theirs, own, layers = beside("llama", [config, config], [IA3, IA3])
    with torch.no_grad():
        for key, delta in own.items():
            i, _, site = key.partition(" ")
            vector = layers[site].ia3_l[NAMES[int(i)]]
            vector.copy_(delta.scale.view(vector.shape))
    got = logits(model, **padded(), adapter_ids=torch.tensor([1, 0, 1]))
    silent = logits(theirs, **padded(), adapter_names=["b", "default", "b"])
    first = logits(theirs, **padded())
    theirs.set_adapter("b")
    other = logits(theirs, **padded())
    assert torch.equal(silent, first) and (first[0] - other[0]).abs().max() > 1e-3
    near(got, torch.stack([other[0], first[1], other[2]]))


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "lora"), ("t5", "ia3"), ("t5", "pfeiffer"), ("llama", "prompt"), ("t5", "prefix")]
)
def test_generate(kind: str, name: str) -> None:
    """Greedy and with beams, with the cache and without, as each prompt alone."""
    tree = dt.Route(*(BEHIND | IN_FRONT)[name])
    check_generate(kind, lambda model: dt.attach(model, tree, head=None), adapter_ids=torch.tensor([1, 0]))


def grads(model: Any, adapter: dt.Adapter, kind: str) -> dict[str, Tensor | None]:
    """Of two forwards with other ids in front of one backward."""
    for p in adapter.parameters():
        p.grad = None
    losses = [
        model(**batch(kind), adapter_ids=torch.tensor(ids)).logits.square().mean() for ids in ([0, 1, 1], [1, 1, 0])
    ]
    (losses[0] + 3 * losses[1]).backward()
    return {key: p.grad for key, p in adapter.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "name", "reentrant"),
    [("llama", "lora", False), ("bert", "kinds", True), ("t5", "ia3", False), ("llama", "prefix", True)],
)
def test_checkpointing(kind: str, name: str, reentrant: bool) -> None:
    """Each recomputation sees the ids of its own forward."""
    model, adapter = routed(kind, (BEHIND | IN_FRONT)[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    want = grads(model, adapter, kind)
    checkpointed(model, reentrant)
    for key, grad in grads(model, adapter, kind).items():
        assert (grad is None) == (want[key] is None)
        if grad is not None:
            near(grad, want[key])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lora", "ia3", "words", "nested", "fold alone"])
def test_only_the_adapters_of_a_batch_s_rows_learn(name: str) -> None:
    """The others have no gradient at all, so that neither weight decay nor momentum moves them."""
    model, adapter = routed("llama", BEHIND[name])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    for ids in ([0, 0, -1], [1, -1, 1]):
        before = {key: p.detach().clone() for key, p in adapter.named_parameters()}
        optimizer.zero_grad()
        model(**batch("llama"), adapter_ids=torch.tensor(ids)).logits.square().mean().backward()
        optimizer.step()
        for key, p in adapter.named_parameters():
            assert torch.equal(p, before[key]) == (not key.startswith(str(max(ids)))), key


@pytest.mark.parametrize(
    ("kind", "name"), [("bert", "lora"), ("bert", "ranks"), ("bert", "ia3"), ("bert", "met"), ("llama", "prefix")]
)
def test_one_graph_for_all_ids(kind: str, name: str) -> None:
    model = model_of(kind)
    moved(dt.attach(model, dt.Route(*(BEHIND | IN_FRONT)[name]), layers=0, head=None))
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for n, ids in enumerate(([0, 1, 1], [1, 1, 0])):
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            got = logits(compiled, **batch(kind), adapter_ids=torch.tensor(ids))
        near(got, logits(model, **batch(kind), adapter_ids=torch.tensor(ids)))


def test_bf16_keeps_the_digits_of_each_adapter() -> None:
    """A scale near 1 is not rounded before it is used, as in a separate forward."""
    model, adapter = routed("llama", (dt.SSF(), dt.SSF()))
    each = [alone("llama", adapter, i).bfloat16() for i in (0, 1)]
    got = logits(model.bfloat16(), **padded(), adapter_ids=torch.tensor([0, 1, 0]))
    for k, i in enumerate((0, 1, 0)):
        assert torch.equal(got[k], logits(each[i], **padded())[k])


def test_bf16_behind_a_norm_and_in_front_of_it() -> None:
    """One child works on the norm's weight, the other on the norm's own input: they are mixed behind it."""
    model, _ = routed("bert", (dt.LNTuning(where="post_norm"), dt.pfeiffer(r=4)))
    ids = torch.tensor([0, 1, 1])
    near(
        logits(model.bfloat16(), **padded(), adapter_ids=ids).float(),
        logits(model.float(), **padded(), adapter_ids=ids),
        0.03,
    )


def test_saved_adapters_serve_together(tmp_path: Path) -> None:
    each = []
    for i, method in enumerate((LORA, dt.pfeiffer(r=4))):
        model = model_of("llama")
        torch.manual_seed(i)
        moved(dt.attach(model, method, head=None)).save(tmp_path / str(i))
        each.append(logits(model, **padded()))
    model = model_of("llama")
    parts = [dt.saved(tmp_path / str(i), frozen=True) for i in (0, 1)]
    adapter = dt.attach(model, dt.Route(*parts), head=None)
    assert not list(adapter.parameters())
    got = logits(model, **padded(), adapter_ids=torch.tensor([1, 0, 0]))
    near(got, torch.stack([each[1][0], each[0][1], each[0][2]]), 1e-6)


@pytest.mark.parametrize(
    ("children", "ids", "match"),
    [
        ((LORA, LORA), None, r"q_proj: adapter_ids are missing, a tensor with the number of each row's adapter"),
        ((LORA, LORA), torch.tensor([0, 2, 1]), r"q_proj: adapter id 2, but there are the adapters 0 to 1, and -1"),
        ((LORA, LORA), torch.tensor([-2, 0, 1]), r"adapter id -2"),
        ((LORA, LORA), torch.tensor([0, 1]), r"adapter_ids of torch.int64 and shape \(2,\); here are 3 rows"),
        ((LORA, LORA), torch.tensor([[0], [1], [1]]), r"shape \(3, 1\); here are 3 rows"),
        ((LORA, LORA), torch.tensor([0.0, 1.0, 1.0]), r"adapter_ids of torch.float32"),
        ((PROMPT, dt.PromptTuning(n=5)), torch.tensor([0, 1, 0]), r"cannot have \[3, 5\] learned tokens in front"),
        ((PREFIX, dt.PrefixTuning(n=5)), torch.tensor([0, 1, 0]), r"cannot have \[3, 5\] learned tokens in front"),
        ((PREFIX, PREFIX), torch.tensor([0, -1, 0]), r"rows of adapter_ids \[-1\] put no tokens in front"),
        ((PROMPT, LORA), torch.tensor([0, 1, 0]), r"rows of adapter_ids \[1\] put no tokens in front"),
        ((PROMPT, PROMPT), None, r"adapter_ids are missing"),
        ((PROMPT, PROMPT), torch.tensor([0, 1, 4]), r"adapter id 4"),
    ],
)
def test_errors(children: tuple[Tree, ...], ids: Tensor | None, match: str) -> None:
    model, _ = routed("llama", children)
    with pytest.raises(ValueError, match=match):
        model(**padded(), adapter_ids=ids)
    assert not model.__dict__["_deltatune"].frame.stash


def test_what_cannot_be_routed_is_refused_at_once() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="trains the base itself"):
        dt.attach(model, dt.Route(dt.Full(), LORA), head=None)
    dt.attach(model, LORA, head=None)
    with pytest.raises(ValueError, match="adapter_ids was given, but no attached method reads it"):
        model(**padded(), adapter_ids=torch.tensor([0, 0, 0]))
