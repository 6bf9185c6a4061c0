"""ProPELT against its reference repository: masks, straight-through gradients, three forms on one RoBERTa; its file."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import bits
from deltatune.core.method import Method, shared_tensor

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_propelt.py"))
fill, score_of, backbone, batch, states = (MAKE[k] for k in ("fill", "score_of", "backbone", "batch", "states"))
D, LAYERS, R, P, MID, KEPT = (MAKE[k] for k in ("D", "LAYERS", "R", "P", "MID", "KEPT"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
TOLERANCE = 1e-9

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("propelt", {"r": R, "keep": KEPT["adapter"]}),
    "lora": ("propelt_lora", {"r": R, "alpha": MAKE["ALPHA"], "keep": KEPT["lora"]}),
    "prefix": ("propelt_prefix", {"n": P, "mid": MID, "keep": KEPT["prefix"]}),
}
PROTOTYPES = {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias"}
PROTOTYPES |= {"embedding": "wte.weight", "inner": "first.weight", "inner_bias": "first.bias"}
PROTOTYPES |= {"outer": "second.weight", "outer_bias": "second.bias"}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def attached(form: str, model: nn.Module, **more: Any) -> dt.Adapter:
    method, hyper = FORMS[form]
    return dt.attach(model, method, head=None, **{**hyper, **more})


def tensors(adapter: dt.Adapter) -> dict[str, Tensor]:
    """Everything that is trained, by the golden's names."""
    found: dict[str, Tensor] = {}
    for delta in adapter.deltas.values():
        role = (delta.site.role or "").removeprefix("attn.")
        lora = isinstance(delta, dt.LoRA)
        for key, slot in delta.slots_of(delta.config).items():
            if slot.shared:
                found[f"{role}.{key}" if lora else PROTOTYPES[key]] = shared_tensor(key, delta)
            elif key == "score":
                found[f"{delta.site.layer}.score"] = delta.score  # type: ignore[attr-defined]
            else:
                masked = key.removesuffix("_score")
                name = f"{role}.{masked}" if lora else PROTOTYPES[masked]
                found[f"{delta.site.layer}.{name}.score"] = getattr(delta, key)
    return found


def filled(adapter: dt.Adapter) -> dict[str, Tensor]:
    found = tensors(adapter)
    with torch.no_grad():
        for key, p in found.items():
            p.copy_(fill(key, p.shape))
    return found


def text(mask: Tensor) -> str:
    return "".join(str(int(bit)) for bit in mask.flatten().tolist())


@pytest.mark.parametrize("case", range(len(GOLDEN["masks"])))
def test_masks_and_their_gradients(case: int) -> None:
    golden = GOLDEN["masks"][case]
    shape = golden["shape"]
    scores = score_of(case, shape).double().requires_grad_()
    weight = fill("weight", shape).double().requires_grad_()
    mask = bits.straight_through(scores, golden["kept"])
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert text(mask) == text(bits.top(scores, golden["kept"])) == golden["mask"]
    (fill("loss", shape).double() * weight * mask).sum().backward()
    for p, key in ((scores, "score_grad"), (weight, "weight_grad")):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, exact(golden[key]), rtol=0, atol=1e-11)
    packed = bits.pack(mask.bool())
    assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
    assert torch.equal(bits.unpack(packed, tuple(shape)), mask.bool())


@pytest.mark.parametrize("form", FORMS)
def test_as_the_reference_computes(form: str) -> None:
    """States, loss, masks, and the gradient of every score, prototype and bias, in fp64."""
    golden, model = GOLDEN[form], backbone()
    with torch.no_grad():
        torch.testing.assert_close(states(model), exact(GOLDEN["bare"]), rtol=0, atol=TOLERANCE)
    adapter = attached(form, model)
    found = filled(adapter)
    assert found.keys() == golden["grads"].keys()
    assert {id(p) for p in found.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    seen = states(model)
    torch.testing.assert_close(seen, exact(golden["states"]), rtol=0, atol=TOLERANCE)
    assert (seen - exact(GOLDEN["bare"])).abs().max() > 0.05, "an adapter without effect would compare nothing"
    loss = (fill("loss", seen.shape).double() * seen).sum()
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=TOLERANCE)
    loss.backward()
    for key, want in golden["grads"].items():
        grad = found[key].grad
        assert grad is not None and exact(want).any()
        torch.testing.assert_close(grad, exact(want), rtol=0, atol=TOLERANCE)
    masks = {key: text(bits.top(p, golden["kept"])) for key, p in found.items() if key.endswith("score")}
    assert masks == golden["masks"]


def changed(form: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Module, dt.Adapter]:
    """A model under an adapter whose tensors are the golden's, with every layer's own mask."""
    torch.manual_seed(0)
    model = backbone().to(dtype)
    adapter = attached(form, model, **more)
    filled(adapter)
    return model, adapter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_finished_file_computes_the_same(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, and loads with fixed masks."""
    model, adapter = changed(form, dtype)
    with torch.no_grad():
        want = states(model)
    adapter.save(tmp_path)
    other = backbone().to(dtype)
    loaded = dt.load(other, tmp_path)
    assert {leaf.config.masks for _, leaf in loaded.tree.leaves()} == {"fixed"}
    with torch.no_grad():
        assert torch.equal(states(other), want)
    loaded.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter.safetensors")
    for key, t in load_file(tmp_path / "adapter.safetensors").items():
        assert torch.equal(again[key], t), key


@pytest.mark.parametrize("form", FORMS)
def test_bf16_activations_do_not_choose_the_mask(form: str) -> None:
    """Scores that are one in bf16 are different still: the mask is that of the fp32 scores, which the file has."""
    model, adapter = changed(form, torch.bfloat16)
    with torch.no_grad():
        for spread in (1e-3, 1.0):  # the later, the smaller; with the first of these all are one number in bf16
            for delta in adapter.deltas.values():
                for p in delta.parameters():
                    p.copy_((256 - spread * torch.arange(p.numel())).view(p.shape))
            have = states(model)
            if spread < 1:
                want = have
        assert torch.equal(have, want)


@pytest.mark.parametrize("form", FORMS)
def test_the_file_holds_one_bit_an_entry(form: str, tmp_path: Path) -> None:
    """Prototypes once, and for each masked tensor of each layer a byte for eight entries; and the fingerprint."""
    _, adapter = changed(form)
    scores = {n: p for n, p in adapter.named_parameters() if n.endswith("score")}
    adapter.save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    held = load_file(file)
    masks = {k: t for k, t in held.items() if k.endswith("bits")}
    assert masks.keys() == {n.removesuffix("score") + "bits" for n in scores}
    for key, packed in masks.items():
        score = scores[key.removesuffix("bits") + "score"]
        assert packed.dtype == torch.uint8 and packed.shape == (-(-score.numel() // 8),)
        assert torch.equal(bits.unpack(packed, tuple(score.shape)), bits.top(score, KEPT[form]))
    prototypes = {k: t for k, t in held.items() if k.startswith("bank.")}
    assert held.keys() - masks.keys() - prototypes.keys() == {"base.fingerprint"}
    n_prototypes = sum(t.numel() for t in prototypes.values())
    made = {"adapter": 2 * R * D + R + D, "lora": 2 * 2 * R * D, "prefix": P * 2 * D}[form]
    assert n_prototypes == made
    body = 4 * made + sum(-(-p.numel() // 8) for p in scores.values()) + held["base.fingerprint"].nbytes
    (header,) = torch.frombuffer(bytearray(file.read_bytes()[:8]), dtype=torch.int64).tolist()
    assert file.stat().st_size == 8 + header + body
    card = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))
    loaded = dt.load(backbone().float(), tmp_path, trainable=True)
    assert card["n_params"] == loaded.params() == made


@pytest.mark.parametrize("form", FORMS)
def test_what_is_finished_does_not_resume(form: str, tmp_path: Path) -> None:
    """A training adapter refuses the finished file and stays as it is, and takes the resumable one."""
    model, adapter = changed(form)
    with torch.no_grad():
        want = states(model)
    adapter.save(tmp_path / "finished")
    adapter.save(tmp_path / "resumable", resumable=True)
    torch.manual_seed(1)
    other = backbone().float()
    fresh = attached(form, other)
    before = {n: p.detach().clone() for n, p in fresh.named_parameters()}
    with pytest.raises(ValueError, match=r"holds .*'masks': 'fixed'.*, the adapter 'default' is .*'masks': 'trained'"):
        fresh.restore(tmp_path / "finished")
    for name, p in fresh.named_parameters():
        assert torch.equal(p, before[name])
    fresh.restore(tmp_path / "resumable")
    own = dict(adapter.named_parameters())
    for name, p in fresh.named_parameters():
        assert torch.equal(p, own[name])
    with torch.no_grad():
        assert torch.equal(states(other), want)
    loaded = dt.load(backbone().float(), tmp_path / "resumable", trainable=True)
    assert loaded.tree == adapter.tree and loaded.params() == adapter.params()


@pytest.mark.parametrize("form", FORMS)
def test_fixed_masks_train_prototypes_alone(form: str, tmp_path: Path) -> None:
    _, adapter = changed(form)
    adapter.save(tmp_path)
    model = backbone().float()
    loaded = dt.load(model, tmp_path, trainable=True)
    assert all(name.startswith("bank.") for name, _ in loaded.named_parameters())
    states(model).sum().backward()
    with torch.no_grad():
        for delta in loaded.deltas.values():
            assert isinstance(delta, Method) and not list(delta.parameters())
        for p in loaded.parameters():
            assert p.grad is not None and p.grad.any()


def roberta_base() -> tuple[nn.Module, int]:
    """RoBERTa-base with a head of two classes, on the meta device, and its size."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**sizes))
    return model, sum(p.numel() for p in model.parameters())


def test_count_on_roberta_base() -> None:
    """RF 12: what the survey prints as about 1.50 %."""
    model, n = roberta_base()
    adapter = dt.attach(model, "propelt")
    assert (adapter.params(), adapter.n_head) == (1_278_784, 592_130)
    assert round(n / 1e6, 2) == 124.65
    assert f"{100 * (adapter.params() + adapter.n_head) / n:.3f}" == "1.501"
    adapter.detach()
    prefix = dt.attach(model, "propelt_prefix", head=None)
    network = 64 * 768 + 512 * 768 + 512 + 1536 * 512 + 1536
    assert prefix.params() == network + 12 * 64 * 1536
    prefix.detach()
    lora = dt.attach(model, "propelt_lora", head=None)
    assert lora.params() == 2 * 2 * 32 * 768 * (1 + 12)


def test_starts() -> None:
    """Scores U(-1/sqrt(f), 1/sqrt(f)), f the fan of the reference's own layout; weights N(0, .02^2), LoRA's B at 0."""
    torch.manual_seed(0)
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=30, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    d, r, n = 48, 16, 20
    for method, hyper, fans in (
        ("propelt", {"r": r}, {"down_score": r, "up_score": d}),
        ("propelt_lora", {"r": r}, {"a_score": d, "b_score": r}),
        ("propelt_prefix", {"n": n, "mid": 8}, {"score": n * 2 * d}),
    ):
        adapter = dt.attach(model, method, **hyper)
        for delta in adapter.deltas.values():
            for key, fan in fans.items():
                score = getattr(delta, key)
                assert 0.95 * fan**-0.5 < score.abs().max() <= fan**-0.5
                assert abs(float(score.detach().mean())) < 0.1 * fan**-0.5
        shared = tensors(adapter)
        if method == "propelt":
            for key in ("down.weight", "up.weight"):
                assert 0.018 < float(shared[key].detach().std()) < 0.022
        elif method == "propelt_lora":
            assert not shared["q.b"].any() and not shared["v.b"].any()
            assert not torch.equal(shared["q.a"], shared["v.a"])
        else:
            assert 0.9 < float(shared["wte.weight"].detach().std()) < 1.1
        adapter.detach()


@pytest.mark.parametrize(("form", "factor"), [("adapter", 30.0), ("lora", 300.0), ("prefix", 1.0)])
def test_scores_have_a_rate_of_their_own(form: str, factor: float) -> None:
    """3e-3, 3e-2 and 1e-4 beside 1e-4 in the reference's scripts; an optimiser without these groups is refused."""
    _, adapter = changed(form)
    groups = adapter.groups(1e-4, weight_decay=0.1)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in groups) == len(adapter.parameters())
    for name, p in adapter.named_parameters():
        assert rates[id(p)] == pytest.approx(1e-4 * factor if name.endswith("score") else 1e-4)
    schedule = adapter.schedule
    if factor != 1:
        with pytest.raises(ValueError, match=r"its method sets parameter groups of its own"):
            schedule.begin(torch.optim.AdamW(adapter.parameters()), 3)
    schedule.begin(torch.optim.AdamW(groups), 3)


def test_two_forms_in_one_tree() -> None:
    """Each form's scores at its own rate."""
    model = backbone().float()
    adapter = dt.attach(model, dt.Sum(dt.ProPELTAdapter(r=R), dt.ProPELTLoRA(r=R)), head=None)
    rates = {id(p): g["lr"] for g in adapter.groups(1e-4) for p in g["params"]}
    for (path, _), delta in adapter.deltas.items():
        for p in delta.parameters():
            assert rates[id(p)] == pytest.approx(1e-4 * {"0": 30.0, "1": 300.0}[path])


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_share_is_a_share(keep: float) -> None:
    for method, hyper in FORMS.values():
        with pytest.raises(ValueError, match=f"{method}: keep = {keep}, but a share lies above 0 and not above 1"):
            dt.attach(backbone(), method, **{**hyper, "keep": keep})


def test_merged_lora_is_the_masked_one() -> None:
    """The reference merges without its masks; the forward is the definition, and ours merges that."""
    model, adapter = changed("lora", torch.float64)
    with torch.no_grad():
        want = states(model)
        adapter.merge()
        torch.testing.assert_close(states(model), want, rtol=0, atol=1e-12)
