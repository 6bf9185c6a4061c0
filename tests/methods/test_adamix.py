"""AdaMix beside its reference repository: losses under one seed, gradients, the mean; its passes, draws and file."""

import functools
import itertools
import json
import pickle
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

import deltatune as dt
from deltatune.methods.adamix import AdaMix, AdaMixLoRA, Experts
from deltatune.train.multitask import TaskHead, add_heads
from deltatune.train.trainer import AdapterTrainer, ScheduleCallback

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_adamix.py"))
fill, filled, batch, text = (MAKE[k] for k in ("fill", "filled", "batch", "text"))
D, LAYERS, R, M, ALPHA, SEEDS, WEIGHT = (MAKE[k] for k in ("D", "LAYERS", "R", "M", "ALPHA", "SEEDS", "WEIGHT"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
HALVES = {"down": "down", "down_bias": "down", "up": "up", "up_bias": "up"}


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def roberta(share: str = "none", n_layers: int = LAYERS) -> tuple[nn.Module, dt.Adapter]:
    """The golden's model, with its experts."""
    config = RobertaConfig(**{**MAKE["roberta_sizes"](), "num_hidden_layers": n_layers})
    model = filled(RobertaForSequenceClassification(config))
    adapter = dt.attach(model, "adamix", r=R, n_experts=M, share=share, head=None)
    with torch.no_grad():
        for d in experts(adapter):
            for key in HALVES:
                for i, t in enumerate(getattr(d, key)):
                    t.copy_(fill(named(d, key, i), t.shape))
    return model, adapter


def gpt2(share: str) -> tuple[nn.Module, dt.Adapter]:
    """The same of the other golden; q and v are slices of one matrix, whose draws the reference has in common."""
    sizes = {"n_positions": 16, "n_embd": D, "n_layer": LAYERS, "n_head": 2, "pad_token_id": 0}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = filled(GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes, **drop)))
    adapter = dt.attach(model, "adamix_lora", r=R, alpha=ALPHA, n_experts=M, share=share, head=None)
    with torch.no_grad():
        for d in experts(adapter):
            for key in "ab":
                for i, t in enumerate(getattr(d, key)):
                    t.copy_(half_of(fill(named(d, key, i), (2 * t.shape[0], t.shape[1])), d))
    return model, adapter


def experts(adapter: dt.Adapter) -> list[Any]:
    return [d for d in adapter.deltas.values() if isinstance(d, Experts)]


def half_of(t: Tensor, d: Any) -> Tensor:
    return t.chunk(2)[0 if d.site.name.endswith("[q]") else 1]


def named(d: Any, key: str, i: int) -> str:
    """The golden's name of an expert's tensor."""
    kind = "" if key in "ab" else ".bias" if key.endswith("bias") else ".weight"
    return f"{d.site.layer}.{HALVES.get(key, key)}.{i}{kind}"


def begun(adapter: dt.Adapter, n_micro: int = 1) -> dt.Schedule:
    schedule = adapter.schedule
    schedule.begin(torch.optim.AdamW(adapter.groups(1e-3)), 10, n_micro)
    return schedule


def check_grads(adapter: dt.Adapter, want: dict[str, Any], scale: float) -> None:
    for d in experts(adapter):
        for key in d.slots_of(d.config):
            for i, grad in enumerate(getattr(d, key).grad):
                found = want[named(d, key, i)]
                if found is None:
                    assert not grad.any()
                    continue
                found = exact(found) if key not in "ab" else half_of(exact(found), d)
                assert found.any()
                torch.testing.assert_close(grad, found, rtol=0, atol=scale * 1e-6)


@pytest.mark.parametrize("share", ["none", "up"])
def test_adapters_as_the_reference_trains(share: str) -> None:
    """The same draws from the same seed; loss with its term, every gradient, and the mean in evaluation."""
    golden, (model, adapter) = GOLDEN["adapter"][share], roberta(share)
    schedule = begun(adapter)
    model.train()
    for seed, (want,) in zip(SEEDS, golden["losses"], strict=True):
        torch.manual_seed(seed)
        adapter.model.zero_grad()
        loss = model(**batch()).loss
        assert float(loss.detach()) == pytest.approx(want, abs=1e-7)
        if seed == SEEDS[0]:
            loss.backward()
            check_grads(adapter, golden["grads"], 0.1)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, exact(golden["eval"]), rtol=0, atol=1e-9)
    schedule.end()


class Given:
    """`torch.randint` that gives what was drawn before."""

    def __init__(self, draws: list[int]) -> None:
        self.left: Iterator[int] = iter(draws)

    def __call__(self, high: int, size: tuple[int, ...], **_: Any) -> Tensor:
        return torch.tensor([next(self.left)]) if high > 1 else torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize("share", ["none", "up"])
def test_lora_as_the_reference_trains(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the golden's draws: the loss of next tokens, the term over those with a label, gradients, and the mean."""
    golden, (model, adapter) = GOLDEN["lora"][share], gpt2(share)
    ids, asked = text()
    labels = torch.cat([torch.full((2, 1), -100), ids[:, 1:].masked_fill(asked == 0, -100)], 1)
    n = int(asked.sum())
    schedule = begun(adapter)
    model.train()
    per_layer = 1 if share == "up" else 2  # draws of c_attn, which are those of q and of v
    drawn = golden["draws"]
    both = [i for at in range(0, len(drawn), per_layer) for i in drawn[at : at + per_layer] * 2]
    monkeypatch.setattr(torch, "randint", Given(both))
    loss = model(input_ids=ids, labels=labels).loss
    monkeypatch.undo()
    whole, term = golden["losses"][0]
    want = (whole - WEIGHT * term) * (n + 1e-4) / n + WEIGHT * term  # the reference's own mean is over n + 1e-4
    assert float(loss.detach()) == pytest.approx(want, abs=WEIGHT * 1e-7)
    loss.backward()
    check_grads(adapter, golden["grads"], WEIGHT)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits[:, :-1][asked == 1], exact(golden["eval"]), rtol=0, atol=1e-9
        )
        assert model(input_ids=ids, labels=labels).loss < 10  # one pass
        out = model(input_ids=ids)
        schedule.end()
        model.train()
        assert torch.equal(model(input_ids=ids).logits, out.logits), "behind the training it is the mean, in any mode"
        adapter.merge()
        torch.testing.assert_close(model(input_ids=ids).logits, out.logits, rtol=0, atol=1e-12)


def test_checkpoints_compute_the_pass_again() -> None:
    """Two passes before one backward: each block finds the draws of its own pass, of both kinds of checkpoint."""
    found = []
    for kind in (None, False, True):
        model, adapter = roberta(n_layers=3)
        schedule = begun(adapter)
        model.train()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        torch.manual_seed(5)
        model(**batch()).loss.backward()
        found.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
        schedule.end()
    assert all(g.any() for g in found[0].values())
    for again in found[1:]:
        for name, grad in again.items():
            torch.testing.assert_close(grad, found[0][name], rtol=0, atol=1e-12)


def test_a_pass_draws_once_for_all_rows_and_the_next_anew() -> None:
    """Equal rows have equal answers; over many forwards each expert of each half comes as often as chance has it."""
    model, adapter = roberta()
    schedule = begun(adapter)
    schedule.end()
    (d, *_) = experts(adapter)
    d.course = 1
    model.train()
    h = torch.randn(1, D, dtype=torch.float64).expand(6, D)
    out = d.mlp(h)
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-12)
    seen: dict[float, int] = {}
    torch.manual_seed(0)
    for _ in range(900):
        value = round(float(d.mlp(h[:1]).detach().sum()), 9)
        seen[value] = seen.get(value, 0) + 1
    assert len(seen) == M * M and all(60 < n < 150 for n in seen.values()), "both halves apart, all alike"


def test_labels_of_the_whole_step() -> None:
    """Where the loss is a sum over the labels of all passes of a step, as the Trainer asks causal models, so is the term."""
    model, adapter = gpt2("none")
    ids, _ = text()
    schedule = begun(adapter)
    model.train()
    losses = []
    for n_items in (None, torch.tensor(60)):
        torch.manual_seed(3)
        losses.append(float(model(input_ids=ids, labels=ids, num_items_in_batch=n_items).loss.detach()))
    assert losses[1] == pytest.approx(losses[0] * 12 / 60, rel=1e-6)
    schedule.end()


def small(kind: Any = BertForSequenceClassification, method: str = "adamix", **hyper: Any) -> tuple[Any, dt.Adapter]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16, initializer_range=0.3)).train()
    return model, dt.attach(model, method, **{"r": 4, **hyper})


def rows(n: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 30, (n, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


def collate(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([row[k] for row in found]) for k in found[0]}


def options(out: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        weight_decay=0.1, max_grad_norm=0.0, lr_scheduler_type="constant", seed=3, save_strategy="no",
        logging_strategy="no", report_to="none", remove_unused_columns=False, dataloader_pin_memory=False,
        disable_tqdm=True, use_cpu=True, train_sampling_strategy="sequential", **more,
    )  # fmt: skip


def seeded(passes: Iterator[int], model: nn.Module, args: Any) -> None:
    """Each pass of a training has a seed of its own: a trainer's loader draws too."""
    if model.training:
        torch.manual_seed(next(passes))


def test_every_loop_trains_alike(tmp_path: Path) -> None:
    """Our trainer, transformers' own with the callback, and a loop by hand, each with two backward passes a step."""
    found = []
    for how in ("ours", "callback", "hand"):
        model, adapter = small()
        passes = itertools.count()
        model.register_forward_pre_hook(functools.partial(seeded, passes))
        if how == "hand":
            optimizer = torch.optim.AdamW(adapter.groups(1e-2, weight_decay=0.1))
            schedules = dt.Schedules([adapter])
            schedules.begin(optimizer, 3, 2)
            for step in range(3):
                for micro in range(2):
                    at = (4 * step + 2 * micro) % 8
                    (model(**collate(rows()[at : at + 2])).loss / 2).backward()
                schedules.before_step(step)
                optimizer.step()
                schedules.after_step(step)
                optimizer.zero_grad()
            schedules.end()
        elif how == "ours":
            AdapterTrainer(model, options(tmp_path), data_collator=collate, train_dataset=rows()).train()
        else:
            optimizer = torch.optim.AdamW(adapter.groups(1e-2, weight_decay=0.1))
            turn = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            trainer = Trainer(
                model, options(tmp_path), data_collator=collate, train_dataset=rows(), optimizers=(optimizer, turn),
                callbacks=[ScheduleCallback(model)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.model_accepts_loss_kwargs = (
                False  # else the classifier's loss is not divided by the passes of a step
            )
            trainer.train()
        assert not model._forward_hooks and next(passes) == 12
        found.append({n: p.detach().clone() for n, p in adapter.named_parameters()})
    for other in found[1:]:
        for name, p in other.items():
            torch.testing.assert_close(p, found[0][name], rtol=0, atol=1e-6)


def term_of(model: nn.Module, adapter: dt.Adapter, seed: int = 4, **given: Any) -> Tensor:
    """The two passes' disagreement, from the answers of two forwards by hand."""
    torch.manual_seed(seed)
    with torch.no_grad():
        one, two = (model(**given).logits.log_softmax(-1) for _ in range(2))
    both = (one.exp() * (one - two) + two.exp() * (two - one)).sum(-1)
    return 0.5 * both.mean()


def test_without_a_loss_the_term_rides_on_the_answers() -> None:
    """Label smoothing and losses of one's own read the answers: the gradient is the same, divided by the passes of a step."""
    given = collate(rows())
    labels = given.pop("labels")
    grads = []
    for inside in (True, False):
        model, adapter = small()
        with torch.no_grad():
            for d in experts(adapter):
                for p in d.parameters():
                    p.normal_(0, 0.5, generator=torch.Generator().manual_seed(p.numel()))
        schedule = begun(adapter, n_micro=1 if inside else 2)
        torch.manual_seed(4)
        if inside:
            model(**given, labels=labels).loss.backward()
        else:
            nn.functional.cross_entropy(model(**given).logits, labels).backward()
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
        schedule.end()
    bare, adapter = small(consistency=0.0)
    with torch.no_grad():
        for d in experts(adapter):
            for p in d.parameters():
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(p.numel()))
    schedule = begun(adapter)
    torch.manual_seed(4)
    bare(**given, labels=labels).loss.backward()
    schedule.end()
    moved = 0
    for name, p in adapter.named_parameters():
        term = grads[0][name] - p.grad
        moved += int(bool((term.abs() > 1e-4).any()))
        torch.testing.assert_close(grads[1][name], p.grad + term / 2, rtol=0, atol=1e-5)
    assert moved


def test_what_is_compared() -> None:
    """Rows, two kinds of answers at once, tokens with a label; a model without answers is refused."""
    model, adapter = small(BertForQuestionAnswering)
    with torch.no_grad():
        for d in experts(adapter):
            d.down.normal_()
            d.up.normal_()
    given = {"input_ids": collate(rows())["input_ids"]}
    marks = {"start_positions": torch.zeros(8, dtype=torch.long), "end_positions": torch.ones(8, dtype=torch.long)}
    schedule = begun(adapter)
    torch.manual_seed(4)
    loss = model(**given, **marks).loss
    torch.manual_seed(4)
    schedule.again = True  # one pass
    one, two = model(**given, **marks), model(**given, **marks)
    want = one.loss
    for key in ("start_logits", "end_logits"):
        p, q = (o[key].log_softmax(-1) for o in (one, two))
        want = want + 0.5 * (p.exp() * (p - q) + q.exp() * (q - p)).sum(-1).mean()
    assert float((loss - want).detach().abs()) < 1e-5 and float((want - one.loss).detach()) > 1e-3
    schedule.end()
    bare, adapter = small(BertModel)
    begun(adapter)
    with pytest.raises(ValueError, match="BertModel gives no logits; train the model with its head"):
        bare(**given)


def test_what_has_no_distribution() -> None:
    """A regression runs once, and its loss is its own; maps, and heads of several tasks side by side, are refused."""
    config = BertForSequenceClassification(BertConfig(num_labels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                      intermediate_size=24, vocab_size=30)).config  # fmt: skip
    model: Any = BertForSequenceClassification(config).train()
    adapter = dt.attach(model, "adamix", r=4)
    runs: list[int] = []
    model.bert.register_forward_hook(lambda *_: runs.append(1))
    begun(adapter)
    out = model(**collate(rows()) | {"labels": torch.ones(8)})
    assert len(runs) == 1 and torch.equal(out.loss, nn.functional.mse_loss(out.logits[:, 0], torch.ones(8)))

    tasks = [TaskHead("a", ("x", "y")), TaskHead("b", ("u", "v", "w"))]
    for consistency in (1.0, 0.0):
        joint, gone = small()
        gone.detach()
        add_heads(joint, tasks)
        begun(dt.attach(joint, "adamix", r=4, consistency=consistency))
        given = collate(rows()) | {"task_ids": torch.arange(8) % 2}
        if not consistency:
            joint(**given).loss.backward()
            continue
        with pytest.raises(
            ValueError, match="BertForSequenceClassification are of several tasks side by side; set cons"
        ):
            joint(**given)

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.at(x).view(-1, 3, 2, 2)}

    maps = Maps().train()
    begun(dt.attach(maps, "adamix", r=2, where=["at"], head=None))
    with pytest.raises(ValueError, match=r"Maps gives logits of shape \(5, 3, 2, 2\); set consistency=0"):
        maps(torch.randn(5, 8))


def test_a_run_that_broke_off_leaves_nothing() -> None:
    """Its hook goes with the next forward once another run has begun, or once the adapter is gone."""
    given = collate(rows())
    model, adapter = small()
    begun(adapter)
    schedule = begun(adapter)
    torch.manual_seed(4)
    twice = model(**given).loss
    assert len(model._forward_hooks) == 1
    schedule.again = True
    torch.manual_seed(4)
    once = model(**given)
    schedule.again = False
    with torch.no_grad():
        other = model(**given)
    p, q = (o.logits.log_softmax(-1) for o in (once, other))
    torch.testing.assert_close(twice, once.loss + 0.5 * (p.exp() * (p - q) + q.exp() * (q - p)).sum(-1).mean())
    with adapter.disabled():
        torch.manual_seed(4)
        assert model(**given).loss != twice
    twin = pickle.loads(pickle.dumps(model))
    torch.manual_seed(4)
    assert torch.equal(twin(**given).loss, twice)
    adapter.detach()
    model(**given)
    assert not model._forward_hooks


@pytest.mark.parametrize("method", ["adamix", "adamix_lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_file_holds_one_adapter(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The mean of the experts under another name, bit for bit what evaluation runs; a resumable one holds all of them."""
    where: Any = {"mlp.down": {"r": 4}, "o": {"r": 2, "n_experts": 3}} if method == "adamix" else "q,v"
    model, adapter = small(method=method, where=where, share="none")
    model.to(dtype) if dtype != torch.float32 else model.eval()
    if dtype != torch.float32:
        adapter.detach()
        adapter = dt.attach(model, method, where=where, share="none")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape).to(p.dtype))
    model.eval()
    given = {"input_ids": collate(rows())["input_ids"]}
    out = model(**given).logits
    adapter.save(tmp_path / "one")
    adapter.save(tmp_path / "all", resumable=True)
    other, gone = small()
    gone.detach()
    other = other.to(dtype).eval()
    loaded = dt.load(other, tmp_path / "one")
    (_, leaf), *_ = loaded.tree.leaves()
    assert leaf.method.name == {"adamix": "sequential", "adamix_lora": "lora"}[method]
    assert torch.equal(other(**given).logits, out)
    assert loaded.params() < adapter.params() / 2
    loaded.detach()
    assert dt.load(other, tmp_path / "all").tree == adapter.tree


def test_starts_and_counts() -> None:
    """Adapters' experts start apart, LoRA's A as one, as in the reference's code; the shared half comes once."""
    model, adapter = small()
    for d in experts(adapter):
        assert isinstance(d, AdaMix) and d.down.shape == (4, 4, 16) and d.up.shape == (1, 16, 4)
        assert not torch.equal(d.down[0], d.down[1])
    adapter.detach()
    for d in experts(dt.attach(model, "adamix_lora", share="down", n_experts=3)):
        assert isinstance(d, AdaMixLoRA) and d.a.shape == (1, 4, 16) and d.b.shape == (3, 16, 4) and not d.b.any()
    with pytest.raises(ValueError, match=r"adamix: consistency = -1\.0, but it must be at least 0"):
        dt.AdaMix(consistency=-1.0)


def test_what_works_on_the_weight_is_refused_in_training() -> None:
    model, adapter = small(method="adamix_lora", where="q")
    dt.attach(model, "loha", name="outer", where="q", head=None)
    schedule = begun(adapter)
    with pytest.raises(
        ValueError, match="draws an expert for the activations, but what stands around it here works on"
    ):
        model(**collate(rows())).loss.backward()
    schedule.end()
    model(**collate(rows())).loss.backward()
