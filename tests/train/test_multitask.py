"""Several tasks on one backbone: heads, the loss of mixed rows, how rows are drawn, files, a resumed run."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

import deltatune as dt
from deltatune.tasks import Split, Task
from deltatune.train import (
    JointCollate,
    TaskHead,
    add_heads,
    evaluate,
    heads_of,
    joint_rows,
    load_joint,
    mixed,
    predict_tasks,
    read_tasks,
    save_joint,
    shares,
)
from deltatune.train.data import Rows
from deltatune.train.fit import Plan, fit
from deltatune.train.trainer import AdapterTrainer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "multitask.json").read_text(encoding="utf-8"))
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24, "pad_token_id": 0,
}  # fmt: skip
HEADS = [TaskHead("a/two", ("no", "yes")), TaskHead("value", (), 4.0), TaskHead("three", ("x", "y", "z"))]
WIDTHS = [2, 1, 3]
IDS = torch.randint(3, 20, (6, 7), generator=torch.Generator().manual_seed(2))
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "task_ids": torch.tensor([0, 2, 1, 1, 2, 0]),
    "labels": torch.tensor([1.0, 2.0, 3.7, -0.4, 0.0, 0.0]),
}


def plain(arch: str) -> Any:
    """A tiny classifier of transformers, without dropout."""
    torch.manual_seed(0)
    if arch == "distilbert":
        config: Any = tr.DistilBertConfig(
            vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=24, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0
        )  # fmt: skip
        return tr.DistilBertForSequenceClassification(config).eval()
    if arch == "t5":
        config = tr.T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0, decoder_start_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
        return tr.T5ForSequenceClassification(config).eval()
    if arch == "llama":
        return tr.LlamaForSequenceClassification(tr.LlamaConfig(**SIZES)).eval()
    name = {"bert": "Bert", "roberta": "Roberta"}[arch]
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(tr, f"{name}Config")(**SIZES, **quiet)
    return getattr(tr, f"{name}ForSequenceClassification")(config).eval()


def inputs_of(arch: str) -> dict[str, Tensor]:
    batch = {k: v for k, v in BATCH.items() if k != "labels"}
    return batch | {"input_ids": torch.cat([IDS, torch.ones(6, 1, dtype=torch.long)], 1),
                    "attention_mask": torch.ones(6, 8, dtype=torch.long)} if arch == "t5" else batch  # fmt: skip


@pytest.mark.parametrize("arch", ["bert", "roberta", "distilbert", "llama", "t5"])
def test_each_head_is_the_models_own(arch: str) -> None:
    """With one of the heads in the one head's place transformers' own forward and loss give the same."""
    single, joint = plain(arch), plain(arch)
    add_heads(joint, HEADS)
    assert type(joint).__name__ == type(single).__name__ and isinstance(joint, type(single))
    assert (
        joint.config.num_labels == 6
        and joint.config.id2label[1] == "a/two: yes"
        and joint.config.id2label[2] == "value"
    )
    inputs = inputs_of(arch)
    out = joint(**inputs, labels=BATCH["labels"])
    assert out.logits.shape == (6, 6)
    total = torch.zeros(())
    root = next(name for name, module in joint.named_children() if module is heads_of(joint))
    before = getattr(single, root)
    for i, task in enumerate(HEADS):
        head = getattr(heads_of(joint), task.key)
        assert type(head) is type(before)
        setattr(single, root, head)
        single.config.num_labels = single.num_labels = task.n_outputs
        single.config.problem_type = None
        if hasattr(getattr(single, "model", None), "num_labels"):
            single.model.num_labels = task.n_outputs
        own = BATCH["task_ids"] == i
        labels = BATCH["labels"][own] if i == 1 else BATCH["labels"][own].long()
        theirs = single(**{k: v[own] for k, v in inputs.items() if k != "task_ids"}, labels=labels)
        torch.testing.assert_close(out.logits[own][:, heads_of(joint).columns(task.name)], theirs.logits)
        total = total + int(own.sum()) / 6 * theirs.loss / task.scale
    torch.testing.assert_close(out.loss, total)
    assert torch.equal(joint(**inputs, return_dict=False)[0], out.logits)
    first, second = {k: v[:2] for k, v in inputs.items()}, {k: v[2:] for k, v in inputs.items()}
    torch.testing.assert_close(torch.cat([joint(**first).logits, joint(**second).logits]), out.logits)


@pytest.mark.parametrize("arch", ["bert", "roberta", "llama", "t5"])
def test_heads_start_as_the_models_own(arch: str) -> None:
    """By the architecture's rule: T5's is 1 / sqrt(d), the others' initializer_range."""
    single, joint = plain(arch), add_heads(plain(arch), [TaskHead(name, tuple("abcdefgh")) for name in ("x", "y", "z")])
    own, made = (torch.cat([p.flatten() for p in weights(m)]) for m in (single, joint))
    want = 16**-0.5 if arch == "t5" else 0.02
    for values in (own, made):
        assert float(values.detach().std()) == pytest.approx(want, rel=0.2)
    heads: Any = heads_of(joint)
    first, second = (torch.cat([p.detach().flatten() for p in weights(head)]) for head in (heads.x, heads.y))
    assert not torch.equal(first, second)
    assert not any(p.any() for name, p in heads.named_parameters() if name.endswith("bias"))


def weights(module: Any) -> list[Tensor]:
    """The matrices of the heads."""
    is_model = isinstance(module, tr.PreTrainedModel)
    named = [(n, p) for n, p in module.named_parameters() if n.endswith("weight")]
    return [p for n, p in named if not is_model or n.startswith(("classif", "score"))]


def test_a_row_trains_its_own_head() -> None:
    model = add_heads(plain("bert"), HEADS)
    adapter = dt.attach(model, "lora", r=2)
    assert adapter.n_head == 17 * 6
    rows = {k: v[BATCH["task_ids"] != 2] for k, v in BATCH.items()}
    model(**rows).loss.backward()
    moved = {key.split(".")[2]: float(p.grad.abs().sum()) for key, p in adapter.named_parameters() if ".weight" in key}  # type: ignore[union-attr]
    assert moved["three"] == 0 and moved["a_two"] > 0 and moved["value"] > 0
    logits = model(**{k: v for k, v in rows.items() if k != "labels"}).logits
    want = [F.cross_entropy(logits[:1, :2], torch.tensor([1])), (logits[1, 2] - 3.7) ** 2 / 4]
    want += [(logits[2, 2] + 0.4) ** 2 / 4, F.cross_entropy(logits[3:, :2], torch.tensor([0]))]
    torch.testing.assert_close(heads_of(model).losses(logits, rows["labels"], rows["task_ids"]), torch.stack(want))


def test_clear_errors() -> None:
    model: Any = plain("bert")
    with pytest.raises(ValueError, match="load_joint or add_heads"):
        heads_of(model)
    for name in ("train", "scale"):
        with pytest.raises(ValueError, match=f"'{name}' is taken"):
            add_heads(model, [TaskHead(name, ("a", "b"))])
    with pytest.raises(ValueError, match="'a_b' is taken"):
        add_heads(model, [TaskHead("a/b"), TaskHead("a-b")])
    dt.attach(model, "lora").detach()  # nothing of the attempts is left
    assert type(model) is tr.BertForSequenceClassification and isinstance(model.classifier, nn.Linear)
    adapter = dt.attach(model, "lora")
    with pytest.raises(ValueError, match="add the heads first"):
        add_heads(model, HEADS)
    adapter.detach()
    with pytest.raises(ValueError, match="no task head of num_labels"):
        add_heads(tr.BertModel(model.config), HEADS)
    add_heads(model, HEADS)
    with pytest.raises(ValueError, match="has heads already: a/two, value, three"):
        add_heads(model, HEADS)
    with pytest.raises(ValueError, match=r"needs task_ids .* not none"):
        model(input_ids=IDS, labels=BATCH["labels"])
    with pytest.raises(ValueError, match=r"task id 3, .* 0 to 2"):
        model(**BATCH | {"task_ids": BATCH["task_ids"] + 1})
    with pytest.raises(ValueError, match="row 0: label 2, but a/two has the classes 0 to 1"):
        model(**BATCH | {"labels": BATCH["labels"] + 1})
    with pytest.raises(ValueError, match=r"row 0: label 0\.5, but a/two has the classes 0 to 1"):
        model(**BATCH | {"labels": BATCH["labels"] - 0.5})
    with pytest.raises(ValueError, match=r"task 'v': scale = 0\.0, but an error is divided by a number above 0"):
        TaskHead("v", (), 0.0)
    with pytest.raises(ValueError, match="did you mean 'three'"):
        heads_of(model).columns("tree")


def test_shares_are_hyperformers() -> None:
    for temperature, want in GOLDEN["shares"].items():
        torch.testing.assert_close(shares(GOLDEN["sizes"], float(temperature)).tolist(), want, rtol=1e-12, atol=0)
    assert shares([1, 10, 1000], float("inf")).tolist() == [1 / 3] * 3
    with pytest.raises(ValueError, match="temperature 0 must be above 0"):
        shares([1, 2], 0)


def test_rows_are_drawn_by_their_shares() -> None:
    rows = Rows([{"task_ids": i, "at": at} for i, n in enumerate([4, 64, 1]) for at in range(n)])
    drawn = mixed(rows, 30_000, temperature=2.0, seed=3).rows
    p = shares([4, 64, 1], 2.0)
    counts = torch.tensor([sum(row["task_ids"] == i for row in drawn) for i in range(3)])
    assert (counts - 30_000 * p).abs().max() < 4 * (30_000 * p * (1 - p)).sqrt().max()
    own = [row["at"] for row in drawn if row["task_ids"] == 1]
    for at in range(0, len(own) - 64, 64):  # each once before any comes again, each time in another order
        assert sorted(own[at : at + 64]) == list(range(64))
    assert own[:64] != own[64:128]
    assert mixed(rows, 50, seed=3).rows == mixed(rows, 50, seed=3).rows != mixed(rows, 50, seed=4).rows


def toy_tasks() -> list[Task]:
    """Is there a good word; how many; which of two words comes first, of pairs."""
    draw = torch.Generator().manual_seed(0)
    pick = lambda words: words[int(torch.randint(len(words), (), generator=draw))]  # noqa: E731

    def task(name: str, labels: tuple[str, ...], metric: str, texts: list[tuple[str, ...]], targets: list[Any]) -> Task:
        split = [Split(texts[at : at + n], targets[at : at + n]) for at, n in ((0, 90), (90, 20), (110, 40))]
        kind: Any = "classification" if labels else "regression"
        return Task(name, 1, kind, tuple(f"t{i}" for i in range(len(texts[0]))), labels, metric, "", "", *split)

    tone = [pick(["good", "bad"]) for _ in range(150)]
    n_good = [int(torch.randint(0, 5, (), generator=draw)) for _ in range(150)]
    second = [pick(["film", "book", "meal"]) for _ in range(150)]
    return [
        task("toy/tone", ("bad", "good"), "accuracy", [(f"the {w} film",) for w in tone], [int(w == "good") for w in tone]),
        task("count", (), "pearson", [("good " * n + "bad " * (4 - n),) for n in n_good], [float(n) for n in n_good]),
        task("pair", ("film", "book", "meal"), "accuracy", [("the best", f"a {w}") for w in second],
             [["film", "book", "meal"].index(w) for w in second]),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "hyperformer"])
def test_learn_save_load(backbone: str, method: str, tmp_path: Path) -> None:
    tasks = toy_tasks()
    torch.manual_seed(0)
    model, tokenizer = load_joint(backbone, tasks)
    assert [round(task.scale, 2) for task in heads_of(model).tasks][::2] == [1.0, 1.0]
    adapter = dt.attach(model, method, **({"n_tasks": 3, "r": 4} if method == "hyperformer" else {}))
    collate = JointCollate(tokenizer)
    data = mixed(joint_rows(tasks, "train", tokenizer), 16 * 80, temperature=float("inf"))
    fit(model, data, collate, Plan(n_steps=80, batch=16, lr=3e-3, head_lr=3e-2))
    test, seen = joint_rows(tasks, "test", tokenizer), []
    found = evaluate(model, tasks, test, collate, 16, lambda *a: seen.append(a))
    assert found["toy/tone"]["accuracy"] > 0.9 and found["count"]["pearson"] > 0.8 and found["pair"]["accuracy"] > 0.9
    assert seen == [(task.name, 40, 40) for task in tasks]

    save_joint(adapter, tmp_path)
    again, _ = load_joint(backbone, tmp_path)
    fresh = predict_tasks(again, test, collate, 16)
    loaded = dt.load(again, tmp_path)
    assert loaded.n_head == adapter.n_head == 33 * 6 and read_tasks(tmp_path) == [TaskHead.of(t) for t in tasks]
    for name, outputs in predict_tasks(model, test, collate, 16).items():
        assert torch.equal(predict_tasks(again, test, collate, 16)[name], outputs), name
        assert not torch.allclose(fresh[name], outputs)
    batch = collate(test.rows[35:45])
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(twin(**batch).loss, again(**batch).loss) and type(twin) is type(again)

    with pytest.raises(ValueError, match=r"heads, in this order, of \['toy/tone', 'count', 'pair'\]"):
        evaluate(model, tasks[::-1], test, collate)
    other, _ = load_joint(backbone, tasks[:2])
    with pytest.raises(ValueError, match="rows of task 2, but the model has heads of the tasks 0 to 1"):
        predict_tasks(other, test, collate)
    with pytest.raises(ValueError, match=r"classifier\.pair"):
        dt.load(other, tmp_path)
    (tmp_path / "tasks.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tasks\.json is damaged"):
        load_joint(backbone, tmp_path)


def test_heads_that_would_be_lost(backbone: str, tmp_path: Path) -> None:
    model, _ = load_joint(backbone, toy_tasks())
    with pytest.raises(ValueError, match="head=None: its file would hold none of the 3 heads"):
        save_joint(dt.attach(model, "lora", head=None), tmp_path)
    with pytest.raises(ValueError, match=r"has no tasks\.json"):
        load_joint(backbone, tmp_path)


def test_a_single_tasks_adapter_fits(backbone: str, tmp_path: Path) -> None:
    """Heads are no part of what says which backbone a file is of: an adapter of one task starts another of several."""
    tasks = toy_tasks()
    one, _ = load_joint(backbone, tasks[:1])
    torch.manual_seed(1)
    adapter = dt.attach(one, "sequential")
    for p in adapter.parameters():
        nn.init.normal_(p.data, std=0.1)
    adapter.save(tmp_path)
    several, _ = load_joint(backbone, tasks)
    merged = dt.attach(several, "mera", sources=[str(tmp_path), str(tmp_path)])
    moved = dict(merged.named_parameters())
    key = next(k for k in moved if not k.startswith("head"))
    assert float(moved[key].detach().abs().sum()) > 0 and merged.n_head == 33 * 6


class Stop(tr.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def trainer(backbone: str, out: Path, n_micro: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    tasks = toy_tasks()
    model, tokenizer = load_joint(backbone, tasks)
    dt.attach(model, "hyperformer", n_tasks=3, r=4)
    given = tr.TrainingArguments(**{
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 8 // n_micro, "learning_rate": 1e-2,
        "gradient_accumulation_steps": n_micro, "save_strategy": "steps", "save_steps": 3, "logging_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 5,
        "train_sampling_strategy": "sequential",
    } | options)  # fmt: skip
    data = mixed(joint_rows(tasks, "train", tokenizer), 48)
    return AdapterTrainer(model, given, data_collator=JointCollate(tokenizer), train_dataset=data)


def test_a_run_goes_on(backbone: str, tmp_path: Path) -> None:
    """Our trainer, with its own removal of columns: cut after three of six steps, and the same to the last bit."""
    whole = trainer(backbone, tmp_path / "whole")
    whole.train()
    cut = trainer(backbone, tmp_path / "cut")
    cut.add_callback(Stop())
    cut.train()
    second = trainer(backbone, tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    for one, two in zip(
        dt.adapters(whole.model)["default"].parameters(), dt.adapters(second.model)["default"].parameters(), strict=True
    ):
        assert torch.equal(one, two)


def test_passes_are_one_step(backbone: str, tmp_path: Path) -> None:
    """The mean over the rows of several passes is that of the whole batch."""
    found = []
    for n_micro in (1, 4):
        made = trainer(backbone, tmp_path, n_micro, max_steps=1, save_strategy="no", max_grad_norm=0.0)
        kept: dict[str, Tensor] = {}

        class Keep(tr.TrainerCallback):
            def on_pre_optimizer_step(
                self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
            ) -> None:
                kept["g"] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])  # noqa: B023

        made.add_callback(Keep())
        made.train()
        found.append(kept["g"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
