"""Training: schedules in three loops, the liveness check, checkpoints that hold adapters alone and resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import deltatune as dt
from deltatune.core.compose import PRESETS
from deltatune.core.method import METHODS
from deltatune.core.schedule import Schedule, Schedules
from deltatune.train.backbone import load_classifier
from deltatune.train.data import Collate, Rows, encode, predict
from deltatune.train.fit import Plan, fit
from deltatune.train.trainer import AdapterTrainer, ScheduleCallback, check_alive


def setting(backbone: str, n: int = 48) -> tuple[nn.Module, Rows, Collate]:
    torch.manual_seed(0)
    model, tokenizer = load_classifier(backbone, ("down", "up"))
    texts = [("good " * (1 + i % 5) if i % 2 else "bad " * (1 + i % 5),) for i in range(n)]
    return model, encode(texts, [i % 2 for i in range(n)], tokenizer, 32), Collate(tokenizer, False)


SMALL = {
    "dept": {"n": 4},
    "intrinsic_said": {"d": 500},
    "prefix_tuning": {"n": 4},
    "prompt_tuning": {"n": 4},
    "propelt_prefix": {"n": 4, "mid": 8},
    "lq_lora": {"r": 8, "bits": 5.0},
    **{key: {"r": 8} for key in ("qlora", "qdylora", "qa_lora")},
}
ON_TEXT = [
    name
    for name, m in {**METHODS, **PRESETS}.items()
    if name not in ("copy", "vpt", "verbaliser", "xattn", "s4")  # s4: four layers, in its own file
    and "toy" not in name
    and not (m.sources and m.needs_sources)
]


@pytest.mark.parametrize("method", ON_TEXT)
def test_every_method_learns(backbone: str, method: str) -> None:
    model, rows, collate = setting(backbone)
    if {**METHODS, **PRESETS}[method].quantised:
        dt.quantise(model, "int4", group=16)
    adapter = dt.attach(model, method, **SMALL.get(method, {}))
    # ProPELT's scores train at 300 times that; beside AdaMix's agreement, which weighs 100, 1e-2 is too fast
    lr = {"propelt_lora": 3e-5, "adamix_lora": 3e-3}.get(method, 1e-2)
    fitted = fit(model, rows, collate, Plan(n_steps=40, batch=16, lr=lr, head_lr=5e-2))
    assert fitted.curve[-1][1] < 0.8 * fitted.curve[0][1]
    outputs = predict(model, rows, collate, 16)
    assert (outputs.argmax(-1) == torch.tensor([r["labels"] for r in rows.rows])).float().mean() > 0.9
    assert fitted.step_ms > 0 and fitted.tokens_per_s > 0 and fitted.optimizer_bytes > 0
    assert adapter.n_head == 32 * 2 + 2


def test_predict_keeps_the_order(backbone: str) -> None:
    model, rows, collate = setting(backbone, 20)
    alone = torch.cat([predict(model, Rows([rows[i]]), collate, 1) for i in range(len(rows))])
    assert torch.allclose(predict(model, rows, collate, 7), alone, atol=1e-5)


class Noted(Schedule):
    """Writes down its events."""

    def __init__(self, adapter: Any) -> None:
        super().__init__(adapter)
        self.seen: list[Any] = []

    def begin(self, optimizer: Any, n_steps: int, n_micro: int = 1) -> None:
        super().begin(optimizer, n_steps, n_micro)
        self.seen.append(("begin", n_steps))

    def before_step(self, step: int) -> None:
        assert all(p.grad is not None for p in self.adapter.parameters())
        self.seen.append(("before", step))

    def after_step(self, step: int) -> None:
        assert all(p.grad is not None for p in self.adapter.parameters())
        self.seen.append(("after", step))

    def end(self) -> None:
        self.seen.append("end")


def test_three_loops_are_one(backbone: str, tmp_path: Path) -> None:
    """Our trainer, the stock Trainer with the callback, and a loop by hand: the same events, losses and weights."""
    want = [("begin", 3), *[(w, s) for s in range(3) for w in ("before", "after")], "end"]
    base, rows, collate = setting(backbone)
    results = []
    for loop in ("ours", "stock", "hand"):
        model = copy.deepcopy(base)
        torch.manual_seed(1)
        adapter = dt.attach(model, "lora", r=4)
        noted = Noted(adapter)
        options = TrainingArguments(
            output_dir=str(tmp_path / loop), max_steps=3, per_device_train_batch_size=16, learning_rate=1e-2, weight_decay=0.0,
            lr_scheduler_type="constant", train_sampling_strategy="sequential", report_to="none", save_strategy="no", use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, max_grad_norm=1e9, seed=0,
        )  # fmt: skip
        if loop == "hand":
            model.train()
            optimizer = torch.optim.AdamW(adapter.groups(1e-2), betas=(0.9, 0.999), eps=1e-8)
            schedules = Schedules([adapter])
            schedules.each[adapter.name] = noted
            schedules.begin(optimizer, 3)
            for step in range(3):
                model(**collate([rows[i] for i in range(16 * step, 16 * step + 16)])).loss.backward()
                schedules.before_step(step)
                optimizer.step()
                schedules.after_step(step)
                optimizer.zero_grad()
            schedules.end()
        else:
            if loop == "ours":
                trainer: Trainer = AdapterTrainer(model, options, data_collator=collate, train_dataset=rows)
                events = trainer.events  # type: ignore[attr-defined]
            else:
                events = ScheduleCallback(model)
                trainer = Trainer(model, options, data_collator=collate, train_dataset=rows, callbacks=[events])
            events.schedules.each[adapter.name] = noted
            trainer.train()
        assert noted.seen == want, loop
        results.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[0], results[2], atol=1e-5)  # a thousandth of one step: AdamW's fused and plain form


def test_groups_that_a_schedule_needs(backbone: str) -> None:
    model, *_ = setting(backbone)
    adapter = dt.attach(model, "lora", r=4)

    class Needy(Schedule):
        needs_groups = True

    with pytest.raises(ValueError, match=r"adapter\.groups"):
        Needy(adapter).begin(torch.optim.AdamW(adapter.parameters(), lr=1e-3), 3)
    Needy(adapter).begin(torch.optim.AdamW(adapter.groups(1e-3), lr=1e-3), 3)


def test_head_has_its_own_rate(backbone: str) -> None:
    model, *_ = setting(backbone)
    for method in ("lora", "full"):
        adapter = dt.attach(model, method)
        rates = {id(p): g["lr"] for g in adapter.groups(1e-3, 0.1, head_lr=0.5) for p in g["params"]}
        heads = {id(p) for p in adapter.head_parameters()}
        assert len(heads) == 2 and len(rates) == len(adapter.parameters())
        assert all(lr == (0.5 if key in heads else 1e-3) for key, lr in rates.items())
        adapter.detach()


def alive(model: nn.Module, adapter: dt.Adapter, batch: Any, optimizer: Any = None) -> None:
    model(**batch).loss.backward()
    check_alive(model, optimizer or torch.optim.AdamW(adapter.parameters(), lr=1e-3), [adapter])


def test_liveness(backbone: str) -> None:
    """Every way in which a tensor is trained in name only is an error that names it."""
    base, rows, collate = setting(backbone)
    batch = collate([rows[i] for i in range(4)])

    def fresh() -> tuple[nn.Module, dt.Adapter]:
        model = copy.deepcopy(base)
        return model, dt.attach(model, "lora", r=4)

    model, adapter = fresh()
    alive(model, adapter, batch)

    model, adapter = fresh()
    some = torch.optim.AdamW(adapter.parameters()[1:], lr=1e-3)
    with pytest.raises(ValueError, match=r"query\.a is not in the optimiser"):
        alive(model, adapter, batch, some)

    model, adapter = fresh()
    query = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    query.forward = lambda x: nn.functional.linear(x, query.weight, query.bias)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query\.[ab] got no gradient"):
        alive(model, adapter, batch)

    model, adapter = fresh()
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cast after attach"):
        alive(model, adapter, batch)

    model, adapter = fresh()
    model.get_parameter("bert.embeddings.LayerNorm.weight").requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"bert\.embeddings\.LayerNorm\.weight is trained though no adapter declares it"
    ):
        alive(model, adapter, batch)

    model, adapter = fresh()
    adapter.trainable(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, rows, collate, Plan(n_steps=1))
    with pytest.raises(ValueError, match="the model has no adapter"):
        fit(base, rows, collate, Plan(n_steps=1))


@pytest.mark.parametrize("method", ["lora", "full", "adalora", "child_tuning_d", "propelt"])
def test_resume(backbone: str, tmp_path: Path, method: str) -> None:
    """Checkpoints hold the adapter alone; a run resumed from one ends where the unbroken run ends."""
    base, rows, collate = setting(backbone)
    ends = []
    for broken in (False, True):
        out = str(tmp_path / str(broken))
        model = copy.deepcopy(base)
        torch.manual_seed(1)
        adapter = dt.attach(model, method)
        plan = Plan(n_steps=6, batch=16, lr=1e-3, save_steps=3)
        fit(model, rows, collate, plan, out=out)
        names = {p.name for p in (Path(out) / "checkpoint-3").iterdir()}
        assert {"adapter.safetensors", "adapter.json", "schedules.pt", "optimizer.pt"} <= names
        assert not names & {"model.safetensors", "pytorch_model.bin"}
        if broken:  # another process: a fresh model, another start, from the middle
            import shutil

            shutil.rmtree(Path(out) / "checkpoint-6")
            model = copy.deepcopy(base)
            torch.manual_seed(99)
            adapter = dt.attach(model, method)
            fit(model, rows, collate, plan, out=out, resume=True)
        ends.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert torch.equal(ends[0], ends[1])


def test_resume_of_a_plain_trainer(backbone: str, tmp_path: Path) -> None:
    """The callback's schedules resume in the stock Trainer too: AdaLoRA prunes as in the unbroken run."""
    base, rows, collate = setting(backbone)
    ends = []
    for cut in (None, 3):
        model = copy.deepcopy(base)
        torch.manual_seed(1)
        adapter = dt.attach(model, "adalora", r=4, target=2, warmup=1, final=2, interval=1)
        options = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=16, learning_rate=1e-2, report_to="none",
            save_strategy="steps", save_steps=1, use_cpu=True, remove_unused_columns=False, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            model, options, data_collator=collate, train_dataset=rows, callbacks=[ScheduleCallback(model)]
        )
        trainer.train(resume_from_checkpoint=None if cut is None else str(tmp_path / "run" / f"checkpoint-{cut}"))
        ends.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
        assert (
            sum(d.rank for d in adapter.deltas.values() if hasattr(d, "rank")) == 2 * 13
        )  # all linears, the pooler's too
    assert torch.equal(ends[0], ends[1])
