"""What other libraries put around a model: accelerate, parametrize, HF PEFT, the stock Trainer."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from foreign import Case, Documented, Refused, base, batch, cells, check_cell, close, gradients, labels, outputs, row
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments

import deltatune as dt

ACCELERATE, WEIGHTS, PEFT, TRAINER = "Accelerate", "Parametrize", "HF PEFT", "The stock Trainer"
OFFLOADED = "accelerate offloaded the adapter's own tensors; offload the base first, then attach"


@row(ACCELERATE, "`Accelerator(cpu=True).prepare(model, optimizer)`, one step: as without")
def prepare(case: Case) -> None:
    results = []
    for prepared in (False, True):
        model = case.attached().train()
        adapter = dt.adapters(model)["default"]
        optimizer: Any = torch.optim.SGD(adapter.groups(0.1))
        if prepared:
            model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
        model(**batch(), labels=labels()).loss.backward()
        optimizer.step()
        results.append(outputs(model.eval()))
        assert not torch.equal(results[-1], outputs(case.attached()))
        assert list(dt.adapters(model)) == ["default"]
    assert torch.equal(*results)


@row(ACCELERATE, "`add_hook_to_module` on every module before attach; removed, detached, attached again")
def hooks_before(case: Case) -> None:
    hooked(case, before=True)


@row(ACCELERATE, "`add_hook_to_module` on every module after attach; removed, detached, attached again")
def hooks_after(case: Case) -> None:
    hooked(case, before=False)


def hooked(case: Case, before: bool) -> None:
    """The outputs with hooks, after their removal, after detach and after another attach."""
    want, model = outputs(case.attached()), base()
    calls: list[nn.Module] = []

    class Count(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    def add() -> None:
        for module in list(model.modules()):
            add_hook_to_module(module, Count())

    if before:
        add()
    adapter = case.attach(model)
    if not before:
        add()
    assert torch.equal(outputs(model), want)
    assert model.model.layers[0].self_attn.q_proj in calls
    with adapter.disabled():
        assert torch.equal(outputs(model), outputs(base()))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(outputs(model), want)
    adapter.detach()
    assert torch.equal(outputs(model), outputs(base()))
    case.attach(model)
    assert torch.equal(outputs(model), want)


@row(
    ACCELERATE,
    "`cpu_offload(model)`, then attach: outputs, `save`, `detach`",
    full=Refused("is offloaded by accelerate; full trains it in place"),
)
def offload_before(case: Case) -> None:
    model = base()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    adapter = case.attach(model)
    assert torch.equal(outputs(model), outputs(case.attached()))
    adapter.save(case.tmp / "out")
    fresh = base()
    dt.load(fresh, case.tmp / "out")
    assert torch.equal(outputs(fresh), outputs(model))
    if adapter.mergeable:
        with pytest.raises(ValueError, match="its weight is offloaded or on the meta device"):
            adapter.merge()
    adapter.detach()
    assert torch.equal(outputs(model), outputs(base()))


@row(
    ACCELERATE,
    "attach, then `cpu_offload(model)`",
    Refused(OFFLOADED),
    full=Documented("the outputs are exact; `save` refuses until the parameters are back"),
)
def offload_after(case: Case) -> None:
    model = case.attached()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(outputs(model), outputs(case.attached()))
    with pytest.raises(ValueError, match="was offloaded since; bring it back first"):
        dt.adapters(model)["default"].save(case.tmp / "out")


DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
DEVICES |= {"model.rotary_emb": "cpu", "score": "disk"}


def dispatched(case: Case, model: Any) -> Any:
    """`device_map`'s own verb, with a layer and the head on disk."""
    return accelerate.dispatch_model(model, DEVICES, main_device="cpu", offload_dir=case.tmp / "disk", force_hooks=True)


@row(
    ACCELERATE,
    "`dispatch_model(device_map)` with layers on disk, then attach",
    full=Refused("is offloaded by accelerate; full trains it in place"),
)
def dispatch_before(case: Case) -> None:
    model = dispatched(case, base())
    case.attach(model)
    assert torch.equal(outputs(model), outputs(case.attached()))


@row(
    ACCELERATE,
    "attach, then `dispatch_model(device_map)` with layers on disk",
    Refused(OFFLOADED),
    prompt_tuning=Refused("does not give any device for the following parameters: model.deltas.default.prompt"),
    full=Documented("the outputs are exact; `save` refuses until the parameters are back"),
)
def dispatch_after(case: Case) -> None:
    model = dispatched(case, case.attached())
    assert torch.equal(outputs(model), outputs(case.attached()))
    with pytest.raises(ValueError, match="was offloaded since; bring it back first"):
        dt.adapters(model)["default"].save(case.tmp / "out")


class Half(nn.Module):
    """w / 2."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def halve(model: Any) -> None:
    """Parametrize the value projections."""
    for block in model.model.layers:
        parametrize.register_parametrization(block.self_attn.v_proj, "weight", Half())


def halved(case: Case) -> Tensor:
    """What a base whose value projections are halved gives, under the method."""
    model = base()
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data.mul_(0.5)
    if case.column != "full":
        case.attach(model)
        return outputs(model)
    case.attach(model := base())
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data.mul_(0.5)
    return outputs(model)


@row(
    WEIGHTS,
    "`register_parametrization` on sites, then attach, then detach; `merge` there refuses",
    full=Documented("trains the parametrization's `original`, at its start the same outputs, and restores it"),
)
def parametrize_before(case: Case) -> None:
    model = base()
    halve(model)
    bare = outputs(model)
    if case.column == "full":
        adapter = dt.attach(model, "full")
        assert torch.equal(outputs(model), bare)
        assert "model.layers.0.self_attn.v_proj.parametrizations.weight.original" in gradients(model)
    else:
        adapter = case.attach(model)
        assert close(outputs(model), halved(case))
    if case.column in ("lora", "ia3"):
        with pytest.raises(ValueError, match="its weight is computed"):
            adapter.merge()
    adapter.detach()
    assert torch.equal(outputs(model), bare)


@row(
    WEIGHTS,
    "attach, then `register_parametrization` on sites",
    Documented("no site of this method was touched: exact"),
    lora=Documented("the forward is exact; `detach` and `merge` refuse and name the class in between"),
    ia3=Documented("the forward is exact; `detach` and `merge` refuse and name the class in between"),
    full=Documented("the forward is exact; `detach` and `save` refuse, since the parameter that it trained is gone"),
)
def parametrize_after(case: Case) -> None:
    model = base()
    adapter = case.attach(model)
    halve(model)
    assert close(outputs(model), halved(case))
    if case.column in ("lora", "ia3"):
        for verb in (adapter.detach, adapter.merge):
            with pytest.raises(
                ValueError, match=r"its class was replaced by torch\.nn\.utils\.parametrize\.ParametrizedLinear"
            ):
                verb()
    elif case.column == "full":
        for act in (adapter.detach, lambda: adapter.save(case.tmp / "out")):
            with pytest.raises(ValueError, match="trains a parameter that is gone"):
                act()
    assert close(outputs(model), halved(case))


def on_top(model: Any) -> Any:
    """HF PEFT's LoRA on queries and values."""
    peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@row(
    PEFT,
    "`get_peft_model(attached, LoraConfig(q, v))`, later `unload()`",
    Documented(
        "the outputs are exact; PEFT freezes the adapter (`adapter.trainable()` thaws it), and each side saves its own"
    ),
    lora=Documented(
        "outputs exact, frozen by PEFT; while its layer holds ours, `save`, `merge`, `detach` refuse and name it"
    ),
    ia3=Documented(
        "outputs exact, frozen by PEFT; while its layer holds ours, `save`, `merge`, `detach` refuse and name it"
    ),
)
def peft_on_top(case: Case) -> None:
    model = base()
    adapter = case.attach(model)
    want = outputs(model)
    n = adapter.params()
    peft_model = on_top(model)
    assert torch.equal(outputs(peft_model), want)
    trained = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    if case.column in ("lora", "ia3"):
        for act in (lambda: adapter.save(case.tmp / "out"), adapter.merge, adapter.detach):
            with pytest.raises(ValueError, match=r"took the layer's place|its class was replaced"):
                act()
    else:
        adapter.save(case.tmp / "out")
    assert torch.equal(outputs(peft_model), want)
    peft_model.save_pretrained(case.tmp / "peft")
    assert (case.tmp / "peft" / "adapter_model.safetensors").is_file()
    assert peft_model.unload() is model
    assert adapter.params() == n
    adapter.trainable()
    adapter.save(case.tmp / "again")
    adapter.detach()
    assert torch.equal(outputs(model), outputs(base()))


@row(PEFT, "`dt.attach(peft_model)`: sites are found inside, PEFT's tensors freeze with the base; save, load, detach")
def peft_underneath(case: Case) -> None:
    def under(seed: int = 5) -> Any:
        peft_model = on_top(base())
        generator = torch.Generator().manual_seed(seed)
        for n, p in peft_model.named_parameters():
            if "lora_" in n:
                p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
        return peft_model

    model = under()
    bare, trained = outputs(model), [n for n, p in model.named_parameters() if p.requires_grad]
    adapter = case.attach(model)
    if case.column != "full":
        merged = under().merge_and_unload()
        case.attach(merged)
        assert close(outputs(model), outputs(merged), 1e-4)
        assert not any("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    gradients(model)
    with pytest.raises(ValueError, match="carries adapters of deltatune too"):
        model.save_pretrained(case.tmp / "peft")
    adapter.save(case.tmp / "out")
    again = under()
    dt.load(again, case.tmp / "out")
    assert torch.equal(outputs(again), outputs(model))
    with pytest.raises(ValueError, match="whose layers are not those of this model"):
        dt.load(base(), case.tmp / "out")
    adapter.detach()
    assert torch.equal(outputs(model), bare)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`batch`, row by row."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {**{k: v[i] for k, v in batch().items()}, "labels": labels()[i]}


def trainer(case: Case, model: Any, **options: Any) -> Trainer:
    """transformers' own Trainer, four steps, a checkpoint after each."""
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 4,
    } | options
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(case.tmp / "run"), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
            per_device_train_batch_size=4, learning_rate=0.3, lr_scheduler_type="constant",
            dataloader_pin_memory=False, **options,
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(),
    )  # fmt: skip


@row(TRAINER, "`train()`, then its last checkpoint: the adapter alone, and `dt.load` gives the trained model")
def train(case: Case) -> None:
    model = case.attached()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = outputs(model)
    trainer(case, model, eval_strategy="no").train()
    model.eval()
    assert not torch.equal(outputs(model), before)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    folder = case.tmp / "run" / "checkpoint-4"
    weights = [p.name for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "pytorch_model.bin"]
    assert weights == ["adapter.safetensors"]
    fresh = base()
    dt.load(fresh, folder)
    assert torch.equal(outputs(fresh), outputs(model))


@row(
    TRAINER,
    "`load_best_model_at_end=True`: the best checkpoint's values, in the parameters that were there",
)
def load_best(case: Case) -> None:
    model = case.attached()
    adapter = dt.adapters(model)["default"]
    owners = [id(p) for p in adapter.parameters()]
    run = trainer(case, model, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    run.train()
    model.eval()
    scores = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    worst = max(scores, key=lambda step: scores[step])  # of the loss the greatest: rarely the last
    assert run.state.best_model_checkpoint is not None
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{worst}")
    fresh = base()
    dt.load(fresh, run.state.best_model_checkpoint)
    assert torch.equal(outputs(model), outputs(fresh))
    assert [id(p) for p in adapter.parameters()] == owners


@row(TRAINER, "`train(resume_from_checkpoint=…)` equals the run that was not cut")
def resume(case: Case) -> None:
    whole = case.attached()
    trainer(case, whole, eval_strategy="no").train()
    torch.manual_seed(11)
    model = case.attached(seed=9)
    trainer(case, model, eval_strategy="no").train(resume_from_checkpoint=str(case.tmp / "run" / "checkpoint-2"))
    assert close(outputs(model.eval()), outputs(whole.eval()), 1e-6)


@row(TRAINER, "`train(resume_from_checkpoint=…)` of another adapter's run", Refused("the adapter 'default' is"))
def resume_another(case: Case) -> None:
    other = base()
    dt.attach(other, "bitfit")
    trainer(case, other, eval_strategy="no", max_steps=1).train()
    model = case.attached()
    case.unchanged(model)
    trainer(case, model, eval_strategy="no").train(resume_from_checkpoint=str(case.tmp / "run" / "checkpoint-1"))


@row(TRAINER, "`bf16=True`, then `detach`: the base again, though autocast keeps the bound `forward` that it found")
def trainer_autocast(case: Case) -> None:
    model = case.attached()
    trainer(case, model, eval_strategy="no", save_strategy="no", max_steps=1, bf16=True).train()
    dt.adapters(model)["default"].detach()
    assert close(outputs(model.eval()).float(), outputs(base()), 2e-2)


@row(TRAINER, "`gradient_checkpointing=True`, reentrant: as without it")
def trainer_checkpointing(case: Case) -> None:
    results = []
    for on in (False, True):
        model = case.attached()
        trainer(
            case, model, eval_strategy="no", save_strategy="no", max_steps=2,
            gradient_checkpointing=on, gradient_checkpointing_kwargs={"use_reentrant": True},
        ).train()  # fmt: skip
        results.append(outputs(model.eval()))
    assert close(*results, 1e-4)


@row(TRAINER, "two adapters on one model: a checkpoint has a folder for each, and resuming restores both")
def two_adapters(case: Case) -> None:
    def both(seed: int) -> Any:
        model = case.attached(seed=seed)
        dt.attach(model, "bitfit", name="second", head=None)
        return model

    model = both(1)
    trainer(case, model, eval_strategy="no", max_steps=2).train()
    names = sorted(p.parent.name for p in (case.tmp / "run" / "checkpoint-2").glob("*/adapter.safetensors"))
    assert names == ["default", "second"]
    other = both(9)
    trainer(case, other, eval_strategy="no", max_steps=2).train(
        resume_from_checkpoint=str(case.tmp / "run" / "checkpoint-2")
    )
    assert torch.equal(outputs(other.eval()), outputs(model.eval()))


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)
