"""Candidates at once against each alone: starts, losses, tensors; divergence, refusals, and what is left on the model."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import deltatune as dt
from deltatune.train.backbone import load_classifier
from deltatune.train.candidates import Candidate, candidates, fit_together, mean_loss
from deltatune.train.data import Collate, Row, Rows, encode, predict
from deltatune.train.fit import Plan, fit

NARROW = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
FOUR = [
    Candidate(dt.LoRA(r=4), lr=1e-2),
    Candidate(dt.LoRA(r=8, bias=True), lr=3e-3, head_lr=5e-2, seed=1),
    Candidate(dt.IA3(), lr=2e-2, seed=2),
    Candidate(dt.Sequential(r=8), lr=5e-3, seed=3),
]


def bert() -> Any:
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return (
        BertForSequenceClassification(BertConfig(**NARROW, **quiet, initializer_range=0.3, num_labels=3))
        .double()
        .eval()
    )


def llama() -> Any:
    """Its own loss is fp32's, whatever the model's dtype."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**NARROW, use_cache=False)).double().eval()
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    return model


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config).double().eval()


MODELS = {"bert": bert, "llama": llama, "t5": t5}


class Padded:
    """Rows to a batch, padded to the longest; without labels of their own, the tokens are the labels."""

    def __init__(self, kind: str) -> None:
        self.kind, self.n_tokens = kind, 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        mask = (ids != 0).long()
        self.n_tokens += int(mask.sum())
        of_class = torch.tensor([row["labels"] for row in rows])
        labels = of_class if self.kind == "bert" else ids.masked_fill(ids == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(n: int = 26) -> Rows:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 12, (n,), generator=draw).tolist()
    return Rows([{"input_ids": torch.randint(1, 50, (k,), generator=draw).tolist(), "labels": k % 3} for k in lengths])


def alone(kind: str, candidate: Candidate, plan: Plan | None = None) -> tuple[dt.Adapter, list[float]]:
    """The candidate by itself, by `fit` where there is a plan; the loss of each step in fp64, which the Trainer's log has not."""
    model, losses = MODELS[kind](), list[float]()
    torch.manual_seed(candidate.seed)
    adapter = dt.attach(model, candidate.tree, seed=candidate.seed)
    if plan is not None:
        model.register_forward_hook(lambda module, args, out: losses.append(out.loss.item()))
        fit(model, rows(), Padded(kind), candidate.plan(plan))  # type: ignore[arg-type]
    return adapter, losses


def near(one: dt.Adapter, other: dt.Adapter, most: float) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, t in ours.items():
        torch.testing.assert_close(t, theirs[key], rtol=0, atol=most, msg=key)


def state_of(model: nn.Module) -> Any:
    kinds = [type(m) for m in model.modules()]
    return kinds, {k: v.clone() for k, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]


def check_same(one: Any, other: Any) -> None:
    assert one[0] == other[0] and one[2] == other[2] and one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][key], other[1][key]) for key in one[1])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("by_length", [True, False])
def test_each_is_what_it_is_alone(kind: str, by_length: bool) -> None:
    """Over two epochs, whose last batches are short; 9 steps of a curve that has them all."""
    plan = Plan(n_steps=9, batch=8, by_length=by_length, clip=0.5)
    together = candidates(MODELS[kind](), FOUR)
    for adapter, candidate in zip(together.adapters, FOUR, strict=True):
        near(adapter, alone(kind, candidate)[0], 0.0)
        assert bool(adapter.n_head) == (kind == "bert")
    seen: list[float] = []

    def noted(*args: Any) -> Tensor:
        loss = mean_loss(*args)
        seen.append(loss.item())
        return loss

    fitted = fit_together(together, rows(), Padded(kind), plan, loss=noted)  # type: ignore[arg-type]
    found = torch.tensor(seen[5:], dtype=torch.float64).view(
        9, 4
    )  # behind those of the check in front of the first step
    for k, candidate in enumerate(FOUR):
        own, losses = alone(kind, candidate, plan)
        near(together.split()[k], own, 1e-10)
        assert (torch.tensor(losses, dtype=torch.float64) - found[:, k]).abs().max() <= 1e-10
        assert [step for step, _ in fitted[k].curve] == list(range(1, 10)) and fitted[k].diverged is None
        assert [loss for _, loss in fitted[k].curve] == found[:, k].tolist()
        assert fitted[k].optimizer_bytes == sum(2 * p.nbytes for p in own.parameters())


def test_an_encoder_and_a_decoder() -> None:
    plan = Plan(n_steps=4, batch=6)
    each = [Candidate(dt.LoRA(r=4, where="attn.q,cross.v"), 1e-2), Candidate(dt.IA3(), 2e-2, seed=1)]
    together = candidates(t5(), each)
    fit_together(together, rows(), Padded("t5"), plan)  # type: ignore[arg-type]
    for adapter, candidate in zip(together.adapters, each, strict=True):
        near(adapter, alone("t5", candidate, plan)[0], 1e-10)


KINDS = {
    "weights": [dt.DoRA(r=4), dt.LoRA(r=4), dt.LoKr(), dt.LoRA(r=2)],
    "norms": [dt.pfeiffer(r=4), dt.LNTuning(), dt.BitFit(), dt.SSF()],
    "spans": [dt.Parallel(r=4), dt.LoRA(r=2), dt.Parallel(r=4, where="attn"), dt.VeRA(r=4)],
    "places": [dt.LoRA(r=4, where="q"), dt.LoRA(r=4, where="all-linear"), dt.LoRA(r=4, where="embed"), dt.Head()],
    "courses": [dt.OFT(), dt.DyLoRA(r=4), dt.DeltaLoRA(r=4), dt.AFLoRA(r=4)],
    "met": [dt.Stack(dt.LoRA(r=2), dt.IA3()), dt.Sum(dt.LoRA(r=2), dt.LoRA(r=4)), dt.LoRA(r=2), dt.LoHa(r=2)],
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_methods(name: str) -> None:
    plan = Plan(n_steps=3, batch=5)
    each = [Candidate(tree, 3e-3, seed=k) for k, tree in enumerate(KINDS[name])]
    together = candidates(bert(), each)
    fit_together(together, rows(), Padded("bert"), plan)  # type: ignore[arg-type]
    for adapter, candidate in zip(together.adapters, each, strict=True):
        near(adapter, alone("bert", candidate, plan)[0], 1e-10)


def gpt2() -> Any:
    """Its projections are one Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config).eval()


def packed() -> Any:
    model = LlamaForCausalLM(LlamaConfig(**NARROW)).eval()
    dt.quantise(model, "int4", group=16)
    return model


@pytest.mark.parametrize("make", [gpt2, packed])
@pytest.mark.parametrize("beneath", [False, True])
def test_rows_of_other_bases(make: Any, beneath: bool) -> None:
    """And beside an adapter of no candidate, which all rows run. Losses, and the gradients of each."""
    model = make()
    if beneath:
        moved(dt.attach(model, "lora", r=2, where="all-linear", name="beneath"), 9).trainable(False)
    together = candidates(model, [Candidate(dt.LoRA(r=4)), Candidate(dt.LoRA(r=2)), Candidate(dt.DoRA(r=4))])
    batch = Padded("llama")(rows(6).rows)
    for k, adapter in enumerate(together.adapters):
        moved(adapter, k)
    with together.rows([2, 2, 2]):
        losses = together.losses(batch, [2, 2, 2])
        torch.stack(losses).sum().backward()
    for k, adapter in enumerate(together.adapters):
        own = {key: t[2 * k : 2 * k + 2] for key, t in batch.items()}
        with together.alone(k):
            loss = model(**own).loss
        grads = torch.autograd.grad(loss, adapter.parameters())
        assert losses[k].item() == pytest.approx(loss.item(), rel=1e-5)
        for p, want in zip(adapter.parameters(), grads, strict=True):
            assert p.grad is not None and (p.grad - want).norm() <= 1e-4 * want.norm()


def moved(adapter: dt.Adapter, seed: int) -> dt.Adapter:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return adapter


def test_texts_in_bf16(backbone: str) -> None:
    """All learn, dropout and all, and a method that does not fold beside them."""
    torch.manual_seed(0)
    model, tokenizer = load_classifier(backbone, ("down", "up"))
    texts = [("good " * (1 + i % 5) if i % 2 else "bad " * (1 + i % 5),) for i in range(48)]
    coded, collate = encode(texts, [i % 2 for i in range(48)], tokenizer, 32), Collate(tokenizer, False)
    trees = (dt.LoRA(r=8), dt.LoRA(r=4), dt.LoRA(r=8, dropout=0.1), dt.Parallel(r=8))
    each = [Candidate(tree, 1e-2, 5e-2) for tree in trees]
    told: list[int] = []
    together = candidates(model, each)
    plan = Plan(n_steps=40, batch=16, bf16=True)
    fitted = fit_together(together, coded, collate, plan, progress=lambda step, n, loss, rate: told.append(step))
    assert told == list(range(1, 41))
    for k, own in enumerate(fitted):
        assert own.curve[-1][1] < 0.8 * own.curve[0][1] and own.step_ms > 0 and own.tokens_per_s > 0
        with together.alone(k):
            outputs = predict(model, coded, collate, 16)
        assert (outputs.argmax(-1) == torch.tensor([row["labels"] for row in coded.rows])).float().mean() > 0.9


def test_checkpointing_changes_nothing() -> None:
    adapters = []
    for checkpointing in (False, True):
        together = candidates(llama(), FOUR)
        fit_together(together, rows(), Padded("llama"), Plan(n_steps=3, batch=4, checkpointing=checkpointing))  # type: ignore[arg-type]
        adapters.append(together.split())
    for one, other in zip(*adapters, strict=True):
        near(one, other, 1e-12)


def test_one_that_diverges_touches_no_other() -> None:
    plan = Plan(n_steps=5, batch=6)
    calm = [Candidate(dt.LoRA(r=4), 1e-2), Candidate(dt.LoRA(r=4), 1e-2, seed=1)]
    wild = Candidate(dt.LoRA(r=4), 1e-2, seed=2)
    together = candidates(bert(), [calm[0], wild, calm[1]])
    with torch.no_grad():
        next(iter(together.adapters[1].deltas.values())).a.fill_(torch.nan)
    kept = together.adapters[1].state_dict()
    kept = {key: t.clone() for key, t in kept.items()}
    fitted = fit_together(together, rows(), Padded("bert"), plan)  # type: ignore[arg-type]
    assert [f.diverged for f in fitted] == [None, 1, None] and not fitted[1].curve
    for key, t in together.adapters[1].state_dict().items():
        assert torch.equal(t.nan_to_num(), kept[key].nan_to_num())
    assert all(p.requires_grad for p in together.adapters[1].parameters())
    for k, candidate in ((0, calm[0]), (2, calm[1])):
        near(together.adapters[k], alone("bert", candidate, plan)[0], 1e-10)


def test_one_that_diverges_in_mid_run_keeps_its_last_tensors() -> None:
    """A rate that leaves the numbers of fp64 at the second step; all of them stop, and the run ends."""
    each = [Candidate(dt.IA3(), 1e200), Candidate(dt.IA3(), 1e200, seed=1)]
    together = candidates(bert(), each)
    fitted = fit_together(together, rows(), Padded("bert"), Plan(n_steps=6, batch=6, warmup=0.0))  # type: ignore[arg-type]
    for adapter, own in zip(together.adapters, fitted, strict=True):
        assert own.diverged == 2 and len(own.curve) == 1
        assert all(t.isfinite().all() for t in adapter.state_dict().values())


def test_each_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    model = bert()
    bare, batch = state_of(model), Padded("bert")(rows(5).rows)
    plain = model(**batch).logits
    together = candidates(model, FOUR)
    fit_together(together, rows(), Padded("bert"), Plan(n_steps=3, batch=6))  # type: ignore[arg-type]
    assert torch.equal(model(**batch).logits, plain)  # off outside of the run
    each = []
    for k, adapter in enumerate(together.split()):
        with together.alone(k):
            each.append(model(**batch).logits)
        adapter.save(tmp_path / str(k))
        other = bert()
        dt.load(other, tmp_path / str(k))
        torch.testing.assert_close(other(**batch).logits, each[-1], rtol=0, atol=1e-12)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(each))
    joint = {key: torch.cat([t] * 4) for key, t in batch.items()}
    with together.rows([5] * 4), torch.no_grad():
        torch.testing.assert_close(model(**joint).logits, torch.cat(each), rtol=0, atol=1e-12)
    with together.rows([5, 0, 0, 5]), torch.no_grad():
        pair = {key: torch.cat([t] * 2) for key, t in batch.items()}
        torch.testing.assert_close(model(**pair).logits, torch.cat([each[0], each[3]]), rtol=0, atol=1e-12)
    copy.deepcopy(model)
    together.detach()
    check_same(state_of(model), bare)


REFUSED = [
    (dt.Full(), r"candidate 1, full: it trains the base itself"),
    (dt.AdaLoRA(), r"candidate 1, adalora: it has a course that is a run's own, Allocator"),
    (dt.AdaMix(), r"candidate 1, adamix: .*TwoPasses"),
    (dt.SPT(), r"candidate 1: it has a course that is a run's own, Sensitivity"),
    (dt.PrefixTuning(n=3), r"candidate 1, prefix_tuning: it puts tokens, keys or values in front"),
    (dt.PromptTuning(n=3), r"candidate 1, prompt_tuning: it puts tokens"),
    (dt.Route(dt.LoRA(), dt.LoRA()), r"candidate 1, rows: it reads masks or ids"),
    (dt.Residual(), r"candidate 1, residual: it stands at whole blocks"),
    (dt.Sequential(where="block"), r"candidate 1, sequential at bert.encoder.layer.0: it stands at a whole block"),
    (dt.QLoRA(), r"candidate 1, qlora: it changes the base, or asks for one of its own"),
    (dt.LoRA(r=99), r"candidate 1: bert.encoder.layer.0.attention.self.query: lora: r = 99"),
    (dt.LoRA(where="nothing"), r"candidate 1: .*nothing"),
    ("lara", r"candidate 1: .*'lara'.*lora"),
]


@pytest.mark.parametrize(("tree", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_share_leaves_the_model_as_it_was(tree: Any, match: str) -> None:
    model = bert()
    bare, generator = state_of(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        candidates(model, [Candidate(dt.LoRA(r=4)), Candidate(tree)])
    check_same(state_of(model), bare)
    assert not dt.adapters(model) and torch.equal(torch.get_rng_state(), generator)


def test_errors_of_a_run() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        candidates(bert(), [])
    with pytest.raises(ValueError, match="candidate 1: lr = 0"):
        candidates(bert(), [Candidate(dt.LoRA()), Candidate(dt.LoRA(), lr=0.0)])
    together = candidates(bert(), FOUR)
    with (
        pytest.raises(ValueError, match=r"4 candidates need a number of rows each, .* not \[1, 1\]"),
        together.rows([1, 1]),
    ):
        pass
    with pytest.raises(ValueError, match="3 rows arrive where the candidates have 4 together"), together.rows([1] * 4):
        together.losses(Padded("bert")(rows(3).rows), [1] * 4)
    assert together.model.__dict__["_deltatune"].frame.among is None and not any(a.enabled for a in together.adapters)
    with pytest.raises(ValueError, match="save_steps = 5"):
        fit_together(together, rows(), Padded("bert"), Plan(save_steps=5))  # type: ignore[arg-type]
    calls = itertools.count()

    def drifting(model: nn.Module, logits: Tensor, batch: Any) -> Tensor:
        return mean_loss(model, logits, batch) + next(calls)

    with pytest.raises(ValueError, match=r"candidate 0's loss is .* beside the others and .* alone"):
        fit_together(together, rows(), Padded("bert"), Plan(n_steps=1), loss=drifting)  # type: ignore[arg-type]


class Mean(nn.Module):
    """Lets every row see the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True)


def test_a_backbone_whose_rows_are_not_apart_is_refused() -> None:
    model = bert()
    model.dropout = Mean()
    together = candidates(model, FOUR[:2])
    with pytest.raises(ValueError, match="this backbone does not keep rows apart"):
        fit_together(together, rows(), Padded("bert"), Plan(n_steps=1, batch=4))  # type: ignore[arg-type]
    assert not model.training and not any(a.enabled for a in together.adapters)
