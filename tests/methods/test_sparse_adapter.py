"""SparseAdapter beside its reference's masks; zeros that stay; its file; the masked form of a tree and of any method."""

import copy
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import deltatune as dt
from deltatune.core import bits
from deltatune.core.method import METHODS
from deltatune.methods.sparse_adapter import Masked, chosen

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_sparse_adapter.py"))
fill, batches = (MAKE[k] for k in ("fill", "batches"))
D, LAYERS, R, ALPHA, KEEP = (MAKE[k] for k in ("D", "LAYERS", "R", "ALPHA", "KEEP"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("sparse_adapter", {"r": R}),
    "lora": ("sparse_lora", {"r": R, "alpha": ALPHA}),
}
PLACES = {"attn.o": "attn", "mlp.down": "mlp", "attn.q": "q", "attn.v": "v"}


def backbone() -> Any:
    """The golden's, without dropout."""
    return MAKE["backbone"]().eval()


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def attached(form: str, attention: str = "eager", **hyper: Any) -> tuple[nn.Module, dt.Adapter]:
    """The golden's model and tensors, before a mask is chosen."""
    method, own = FORMS[form]
    model = backbone()
    model.set_attn_implementation(attention)
    adapter = dt.attach(model, method, head=None, **{**own, "keep": KEEP, **hyper})
    with torch.no_grad():
        for name, (d, key) in named(adapter).items():
            p = getattr(d, f"{key}_values") if key in d.full else getattr(d, key)
            p.copy_(fill(name, d.full.get(key, p.shape)).reshape(p.shape))
    return model, adapter


def named(adapter: dt.Adapter) -> dict[str, tuple[Any, str]]:
    """{the golden's name: (delta, slot)}, layer by layer."""
    found = {}
    for d in adapter.deltas.values():
        assert isinstance(d, Masked)
        biases = [k for k in d.slots if k.endswith("bias")]
        found |= {f"{d.site.layer}.{PLACES[str(d.site.role)]}.{key}": (d, key) for key in (*d.full, *biases)}
    return dict(sorted(found.items()))


def masks_of(adapter: dt.Adapter) -> dict[str, str]:
    found = {}
    for name, (d, key) in named(adapter).items():
        if key in d.full:
            mask = bits.unpack(getattr(d, f"{key}_bits"), d.full[key])
            assert torch.equal(getattr(d, key) != 0, mask)
            found[name] = "".join(str(int(bit)) for bit in mask.flatten().tolist())
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", ["magnitude", "snip", "grasp", "synflow"])
def test_masks_are_the_references(score: str, form: str, attention: str) -> None:
    """Bit for bit on equal weights and data, over all matrices and for each; and the model is left as it was."""
    for scope in ("global", "local"):
        want = GOLDEN[form].get(f"{score} {scope}")
        if want is None:
            continue
        model, adapter = attached(form, attention, score=score, scope=scope)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "values" not in n}
        values = {name: getattr(d, key).detach().clone() for name, (d, key) in named(adapter).items()}
        model.train()
        adapter.calibrate(batches(), loss_of)
        assert model.training and all(p.grad is None for p in model.parameters())
        assert masks_of(adapter) == want
        for name, p in model.named_parameters():
            assert "values" in name or torch.equal(p, before[name]), name
        for name, (d, key) in named(adapter).items():
            now = getattr(d, key)
            assert torch.equal(now, values[name] * (now != 0 if key in d.full else 1))


@pytest.mark.parametrize("form", FORMS)
def test_random_masks(form: str) -> None:
    """The reference's edge on the reference's draws; ours come from the adapter's seed, whoever asks first."""
    _, adapter = attached(form)
    for scope in ("global", "local"):
        want = GOLDEN[form][f"random {scope}"]
        torch.manual_seed(0)
        own = named(adapter)
        # the reference's order: its modules', down and up or a and b
        scores = {(name,): torch.randn(own[name][0].full[own[name][1]], dtype=torch.float64) for name in want}
        masks = chosen(scores, KEEP, scope)  # type: ignore[arg-type]
        assert {name: "".join(str(int(bit)) for bit in mask.tolist()) for (name,), mask in masks.items()} == want
    found = []
    for seed in (0, 0, 1):
        model = backbone()
        torch.manual_seed(len(found))
        adapter = dt.attach(model, FORMS[form][0], head=None, seed=seed, score="random", **FORMS[form][1])
        adapter.schedule.begin(torch.optim.AdamW(adapter.groups(1e-3)), 3)  # no data is asked for
        found.append(masks_of(adapter))
    assert found[0] == found[1] != found[2]


def test_what_is_masked_stays_zero(tmp_path: Path) -> None:
    """Through momentum and weight decay, in both files; what is trained, counted and optimised is what the mask keeps."""
    model, adapter = attached("adapter")
    dense = adapter.params()
    with pytest.raises(ValueError, match="Masking looks at data first"):
        adapter.schedule.begin(torch.optim.AdamW(adapter.groups(1e-2)), 3)
    schedules = dt.Schedules([adapter])
    schedules.calibrate(batches, loss_of)
    want = masks_of(adapter)
    n_kept, n_all = sum(m.count("1") for m in want.values()), sum(map(len, want.values()))
    assert n_kept == n_all - math.ceil((1 - KEEP) * n_all)
    assert adapter.params() == dense - (n_all - n_kept)
    groups = adapter.groups(1e-2, weight_decay=0.5)
    (decayed,) = [g["params"] for g in groups if g["weight_decay"]]
    assert sum(p.numel() for p in decayed) == n_kept
    optimizer = torch.optim.AdamW(groups)
    schedules.begin(optimizer, 6)
    before = {name: getattr(d, key).detach().clone() for name, (d, key) in named(adapter).items()}
    for step in range(6):
        loss_of(model, batches()[step % 3]).backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
    schedules.end()
    assert masks_of(adapter) == want
    assert all(not torch.equal(getattr(d, key), before[name]) for name, (d, key) in named(adapter).items())
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) == 2 * adapter.params()
    out = model(**batches()[0]).logits
    adapter.save(tmp_path)
    held = load_file(tmp_path / "adapter.safetensors")
    packed = {k: t for k, t in held.items() if k.endswith("_bits")}
    assert len(packed) == len(want) and {t.dtype for t in packed.values()} == {torch.uint8}
    assert sum(t.numel() for t in packed.values()) == sum(-(-len(m) // 8) for m in want.values())
    assert sum(t.numel() for k, t in held.items() if k.endswith("_values")) == n_kept
    other = backbone()
    loaded = dt.load(other, tmp_path, trainable=True)
    assert masks_of(loaded) == want and torch.equal(other(**batches()[0]).logits, out)
    assert json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))["n_params"] == loaded.params()
    assert loaded.is_finished()
    schedules = dt.Schedules([loaded])
    assert not schedules.waiting()
    schedules.begin(torch.optim.AdamW(loaded.groups(1e-2)), 3)
    assert masks_of(loaded) == want, "training on keeps the mask"
    with pytest.raises(ValueError, match="its mask is chosen already, and stays as it is"):
        loaded.calibrate(batches(), loss_of)
    twin = copy.deepcopy(other)
    assert torch.equal(twin(**batches()[0]).logits, out)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_under_the_mask(form: str) -> None:
    """dL/dw of the kept entries is that of the dense adapter with zeros in it."""
    model, adapter = attached(form)
    adapter.calibrate(batches(), loss_of)
    loss_of(model, batches()[0]).backward()
    other, plain = backbone(), {"adapter": "sequential", "lora": "lora"}[form]
    dense = dt.attach(other, plain, head=None, **FORMS[form][1])
    for (place, d), own in zip(dense.deltas.items(), adapter.deltas.values(), strict=True):
        assert own is adapter.deltas[place]
        with torch.no_grad():
            for key, p in d.named_parameters():
                p.copy_(getattr(own, key))
    torch.testing.assert_close(other(**batches()[1]).logits, model(**batches()[1]).logits, rtol=0, atol=1e-12)
    loss_of(other, batches()[0]).backward()
    for place, d in dense.deltas.items():
        own = adapter.deltas[place]
        assert isinstance(own, Masked)
        for key, shape in own.full.items():
            grad = d.get_parameter(key).grad
            assert grad is not None
            mask = bits.unpack(getattr(own, f"{key}_bits"), shape)
            torch.testing.assert_close(getattr(own, f"{key}_values").grad, grad[mask][:, None], rtol=0, atol=1e-12)


def test_a_tree_under_a_mask(tmp_path: Path) -> None:
    """One edge over all that has a masked form, the rest as it is; large and sparse has as many entries as small and dense."""
    tree = dt.SparseAdapter(dt.mam(n=3, r=4), keep=0.2, score="magnitude")
    adapter = dt.attach(backbone(), tree, head=None)
    assert [leaf.method.name for _, leaf in adapter.tree.leaves()] == ["prefix_tuning", "sparse_parallel"]
    adapter.schedule.begin(torch.optim.AdamW(adapter.groups(1e-3)), 3)
    n = 2 * LAYERS * 4 * D
    found = [p.numel() for name, p in adapter.named_parameters() if name.endswith("values")]
    assert sum(found) == n - -(-8 * n // 10) and len(set(found)) > 1
    (_, leaf), *_ = dt.SparseAdapter(dt.pfeiffer(r=8), k=4).leaves()
    assert (leaf.method.name, leaf.config.r, leaf.config.keep, leaf.where) == (
        "sparse_adapter",
        32,
        0.25,
        "post_norm|block",
    )
    per = dt.SparseAdapter(dt.LoRA(where={"q": {"r": 2}, "v": {}}), k=2, score="random")
    model = backbone()
    each = dt.attach(model, per, head=None)
    assert {d.site.role: d.r for d in each.deltas.values()} == {"attn.q": 4, "attn.v": 16}  # type: ignore[attr-defined]
    assert dt.large_sparse(r=8, k=4).config == dt.SparseAdapter(dt.Sequential(r=8), k=4).config  # type: ignore[union-attr]
    both = dt.Stack(dt.SparseAdapter(dt.LoRA(), keep=0.5), dt.SparseAdapter(dt.Sequential(), keep=0.4))
    with pytest.raises(
        ValueError, match=r"one mask is chosen over all of it, not with keep, score, scope, n_samples = \(0.5"
    ):
        dt.Schedules([dt.attach(model, both, name="both", head=None)]).waiting()
    with pytest.raises(ValueError, match="vera has no masked form; there is one of sequential, parallel, lora"):
        dt.SparseAdapter(dt.VeRA())
    with pytest.raises(ValueError, match="k = 0, but it must be at least 1"):
        dt.SparseAdapter(dt.LoRA(), k=0)
    dt.attach(backbone(), "lora", head=None).save(tmp_path)
    with pytest.raises(ValueError, match="lora comes with its values from files; a mask is chosen of fresh ones"):
        dt.SparseAdapter(dt.saved(tmp_path))


def test_any_method() -> None:
    """A class with the mask in front: products of four factors, which fold; what has no matrix or a course is refused."""
    try:

        class SparseLoHa(Masked, dt.LoHa, name="sparse_loha"):
            """Masked factors."""

            kinds = frozenset({"linear"})

        model = backbone()
        adapter = dt.attach(model, SparseLoHa(r=4, keep=0.25, score="random", where="q,v"), head=None)
        adapter.schedule.begin(torch.optim.AdamW(adapter.groups(1e-3)), 3)
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
        out = model(**batches()[0]).logits
        zeros = [float((getattr(d, key) == 0).double().mean()) for d in adapter.deltas.values() for key in d.full]  # type: ignore[attr-defined]
        assert sum(zeros) / len(zeros) == pytest.approx(0.75, abs=0.02)
        adapter.merge()
        torch.testing.assert_close(model(**batches()[0]).logits, out, rtol=0, atol=1e-9)
        with pytest.raises(TypeError, match="SparseIA3 cannot be masked: it has no matrix of its own"):
            type("SparseIA3", (Masked, dt.IA3), {"__doc__": "No."}, name="sparse_ia3")
        with pytest.raises(TypeError, match=r"SparseAdaLoRA cannot be masked: .* has a course of its own"):
            type("SparseAdaLoRA", (Masked, dt.AdaLoRA), {"__doc__": "No."}, name="sparse_adalora")
    finally:
        for name in ("sparse_loha", "sparse_ia3", "sparse_adalora"):
            METHODS.pop(name, None)


def test_errors() -> None:
    """Scores that tell nothing apart, shares that are none, and files whose mask is not that of their values."""
    _, adapter = attached("lora")
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.b_values.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"the scores of all 768 entries are 0 .* let it start elsewhere, or take"):
        adapter.calibrate(batches(), loss_of)
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"sparse_lora: keep = {keep}, but a share lies above 0 and not above 1"):
            dt.SparseLoRA(keep=keep)
    with pytest.raises(ValueError, match="n_samples = 0, but it must be at least 1"):
        dt.SparseLoRA(n_samples=0)
    (d, *_) = adapter.deltas.values()
    held = {k: t.clone() for k, t in d.state_dict().items()}
    d.check_ragged(held)
    with pytest.raises(ValueError, match=r"a_values are \(96, 1\), and the mask keeps 95 entries"):
        d.check_ragged({**held, "a_bits": bits.pack(torch.arange(96) > 0)})
    with pytest.raises(ValueError, match=r"a_bits \(3,\) is no mask of \(6, 16\)"):
        d.check_ragged({**held, "a_bits": held["a_bits"][:3]})


def test_rows_that_are_looked_at() -> None:
    """As many as it says and no batch more; bf16 and a compiled graph run what was chosen."""
    seen = []

    def counted() -> Any:
        for batch in batches():
            seen.append(1)
            yield batch

    _, adapter = attached("adapter", n_samples=8)
    adapter.calibrate(counted(), loss_of)
    assert len(seen) == 2
    model: Any = BertForSequenceClassification(backbone().config).bfloat16().eval()
    adapter = dt.attach(model, "sparse_adapter", r=R, keep=KEEP, score="synflow", head=None)
    adapter.schedule.begin(torch.optim.AdamW(adapter.groups(1e-3)), 3)
    out = model(**batches()[0])
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
