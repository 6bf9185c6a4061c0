"""What TRL's trainers do: SFT and DPO of a tiny decoder, beside the same steps and losses written by hand."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import COLUMNS, EXACT, Case, Documented, Refused, base, cells, check_cell, close, moved, outputs, row
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import deltatune as dt
from deltatune.train.trainer import ScheduleCallback

SFT, DPO = "TRL's SFTTrainer", "TRL's DPOTrainer"
NO_HEAD = Refused("this backbone has no 'head'")
LR, BETA = 0.3, 0.1
TEXTS = ["w3 w4 w5 w6", "w9 w10 w11", "w4 w8 w22 w30 w40", "w50 w7"]
PAIRS = [("w3 w4", " w5 w6", " w7 w8 w9"), ("w9 w10 w11", " w12 w13 w14", " w20 w21")]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: `w5` is 5, padding 0, the end 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def ids(text: str) -> list[int]:
    """What `tokenizer` gives, by hand."""
    return [int(word[1:]) for word in text.split()]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), padded on the right."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True), mask


def next_token_loss(model: Any) -> Tensor:
    """The mean negative log-likelihood of the next token over `TEXTS`."""
    tokens, mask = padded([[*ids(text), 2] for text in TEXTS])
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100).flatten())


def scores(model: Any) -> Tensor:
    """(2, pairs): the log-probability of each chosen and of each rejected completion."""
    rows = [
        [*ids(prompt), *ids(answer), 2] for k in (1, 2) for prompt, answer in ((pair[0], pair[k]) for pair in PAIRS)
    ]
    tokens, mask = padded(rows)
    found = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    found = found.gather(-1, tokens[:, 1:, None])[..., 0]
    completion = mask[:, 1:].clone()
    for i, (prompt, _, _) in enumerate(PAIRS * 2):
        completion[i, : len(ids(prompt)) - 1] = 0
    return (found * completion).sum(1).view(2, -1)


def preference_loss(model: Any, reference: Tensor) -> Tensor:
    """-log sigmoid(beta ((chosen - its reference) - (rejected - its reference))), the mean over the pairs."""
    chosen, rejected = scores(model) - reference
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def by_hand(model: Any, loss_of: Any, n_steps: int) -> list[float]:
    """The losses of a plain loop with SGD on the adapter's groups."""
    optimizer = torch.optim.SGD(dt.adapters(model)["default"].groups(LR))
    found = []
    for _ in range(n_steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def trainer(
    case: Case, model: Any, kind: str = "SFT", *, own: bool = True, watched: bool = True, **options: Any
) -> Any:
    """TRL's trainer with its own optimiser, or with SGD on the adapter's groups; fp32, checkpointing on as TRL has it."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    import datasets

    given = {k: options.pop(k) for k in ("peft_config", "ref_model") if k in options}
    if not own:
        given["optimizers"] = torch.optim.SGD(dt.adapters(model)["default"].groups(LR)), None
    settings = {
        "bf16": False, "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "output_dir": str(case.tmp / "run"),
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    columns = {"text": TEXTS}
    if kind == "DPO":
        columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*PAIRS, strict=True)), strict=True))
        settings["beta"] = BETA
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer(),
        callbacks=[ScheduleCallback(model)] if watched else None,
        **given,
    )


def losses(run: Any) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def frozen(model: Any) -> dict[str, Tensor]:
    """A copy of what does not train."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def weights(folder: Path) -> list[str]:
    """The files of weights in a checkpoint."""
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "pytorch_model.bin")


def loaded(folder: Path) -> Any:
    """A fresh base with the adapter of that checkpoint."""
    model = base("causal")
    dt.load(model, folder)
    return model


def from_folder(case: Case) -> Any:
    """The base as `from_pretrained` gives it: TRL can load it again by its name."""
    base("causal").save_pretrained(case.tmp / "base")
    return AutoModelForCausalLM.from_pretrained(case.tmp / "base")


OTHERS = tuple(c for c in COLUMNS if c not in ("lora", "prompt_tuning"))


@row(
    SFT,
    "SGD on `adapter.groups(lr)`: the losses and weights of a loop by hand; the adapter alone moves, the base by no bit",
    head=NO_HEAD,
)
def sft_groups(case: Case) -> None:
    model, twin = case.attached("causal"), case.attached("causal")
    adapter, still = dt.adapters(model)["default"], frozen(model)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    run = trainer(case, model, own=False)
    run.train()
    assert losses(run) == pytest.approx(by_hand(twin, next_token_loss, 3), rel=1e-5)
    assert close(outputs(model.eval(), "causal"), outputs(twin, "causal"))
    assert all(torch.equal(model.get_parameter(n), p) for n, p in still.items())
    assert not any(torch.equal(p, before[n]) for n, p in adapter.named_parameters())
    with adapter.disabled():
        assert torch.equal(outputs(model, "causal"), outputs(base("causal"), "causal"))


@row(
    SFT,
    "TRL's own optimiser; its last checkpoint and `save_model`: the adapter alone, and `dt.load` gives the trained model",
    slow=OTHERS,
    head=NO_HEAD,
)
def sft_checkpoint(case: Case) -> None:
    model = case.attached("causal")
    before, still = outputs(model, "causal"), frozen(model)
    run = trainer(case, model, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(case.tmp / "saved"))
    trained = outputs(model.eval(), "causal")
    assert not torch.equal(trained, before)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in still.items())
    for folder in (case.tmp / "run" / "checkpoint-3", case.tmp / "saved"):
        assert weights(folder) == ["adapter.safetensors"]
        assert torch.equal(outputs(loaded(folder), "causal"), trained)


@row(SFT, "`train(resume_from_checkpoint=…)` equals the run that was not cut", slow=OTHERS, head=NO_HEAD)
def sft_resume(case: Case) -> None:
    whole = case.attached("causal")
    trainer(case, whole, save_strategy="steps", save_steps=1).train()
    torch.manual_seed(11)
    model = case.attached("causal", seed=9)
    trainer(case, model).train(resume_from_checkpoint=str(case.tmp / "run" / "checkpoint-2"))
    assert close(outputs(model.eval(), "causal"), outputs(whole.eval(), "causal"), 1e-6)


@row(
    SFT,
    "TRL's defaults, bfloat16 autocast and checkpointing: the losses within bf16's rounding, the adapter stays fp32",
    slow=OTHERS,
    head=NO_HEAD,
)
def sft_bfloat16(case: Case) -> None:
    model, twin = case.attached("causal"), case.attached("causal")
    run = trainer(case, model, own=False, bf16=None)
    assert run.args.bf16
    assert run.args.gradient_checkpointing
    run.train()
    assert losses(run) == pytest.approx(by_hand(twin, next_token_loss, 3), rel=0.02)
    assert {p.dtype for p in dt.adapters(model)["default"].parameters()} == {torch.float32}


@row(
    SFT,
    "`packing=True`: several texts in one row, the same losses",
    slow=OTHERS,
    prompt_tuning=Refused("soft tokens have no place in packed rows"),
    head=NO_HEAD,
)
def sft_packed(case: Case) -> None:
    model, twin = case.attached("causal"), case.attached("causal")
    run = trainer(case, model, own=False, packing=True, max_length=32)
    assert len(run.train_dataset) == 1
    run.train()
    assert losses(run) == pytest.approx(by_hand(twin, next_token_loss, 3), rel=1e-5)


BUT_LORA = tuple(c for c in COLUMNS if c != "lora")
CODED = Refused("trains it in place, and its weight is quantised")


def same_steps(case: Case, build: Any, dtype: torch.dtype) -> None:
    """On the quantised base that `build` gives: the losses and outputs of a loop by hand, which begins with the adapter's
    values in `dtype`, and not one bit of the base moves."""
    model, twin = build(), build()
    for one in (model, twin):
        case.attach(one)
        one.train()  # in eval mode bitsandbytes has a bf16 kernel on some CPUs
    for p in dt.adapters(twin)["default"].parameters():
        p.data = p.data.to(dtype).float()
    still = frozen(model)
    run = trainer(case, model, own=False)
    run.train()
    assert {p.dtype for p in dt.adapters(model)["default"].parameters()} == {torch.float32}
    assert losses(run) == pytest.approx(by_hand(twin, next_token_loss, 3), rel=1e-5)
    assert close(outputs(model, "causal"), outputs(twin, "causal"))
    assert any(t.dtype == torch.uint8 for t in (*model.parameters(), *model.buffers()))
    assert all(torch.equal(model.get_parameter(n), p) for n, p in still.items())


@row(
    SFT,
    "a base in NF4 as transformers loads it, `BitsAndBytesConfig`: the losses and weights of a loop by hand, the base by no bit",
    Documented("TRL rounds the adapter to bfloat16 as it is made; from its first step on it is fp32, as everywhere"),
    slow=BUT_LORA,
    full=CODED,
    head=NO_HEAD,
)
def sft_nf4(case: Case) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base("causal").save_pretrained(case.tmp / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    same_steps(
        case,
        lambda: AutoModelForCausalLM.from_pretrained(case.tmp / "base", quantization_config=config, dtype="float32"),
        torch.bfloat16,
    )


@row(
    SFT,
    "a base in NF4 or `int4` of `dt.quantise`: the same",
    slow=BUT_LORA,
    full=CODED,
    head=NO_HEAD,
)
def sft_codes(case: Case) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for to, options in (("bnb-nf4", {}), ("int4", {"group": 16})):
        same_steps(case, lambda to=to, options=options: dt.quantise(base("causal"), to, **options), torch.float32)


UNSEEN = Refused("got no gradient: its site did not run, its forward was replaced after attach, or the loss reads")


@row(
    SFT,
    "the method on `lm_head` too, whose weight TRL reads past the layer; with `ScheduleCallback`",
    lora=UNSEEN,
    sequential=UNSEEN,
    ia3=UNSEEN,
    prefix_tuning=Refused("names sites of kind linear, supported here: attention"),
    prompt_tuning=Refused("names sites of kind linear, supported here: input"),
    head=UNSEEN,
)
def sft_lm_head(case: Case) -> None:
    model = base("causal")
    where = {} if case.column == "full" else {"where": "attn.q,lm_head"}
    dt.attach(model, case.column, **COLUMNS[case.column][1], **where)
    case.unchanged(model, "causal")
    trainer(case, model, max_steps=1).train()
    assert not torch.equal(model.lm_head.weight, base("causal").lm_head.weight)


@row(
    SFT,
    "`SFTTrainer(attached, peft_config=LoraConfig(q, v))`",
    Documented(
        "trains and saves HF PEFT's tensors alone, ours stay as they are (see HF PEFT); with `ScheduleCallback` the first "
        "step refuses"
    ),
    slow=OTHERS,
    head=NO_HEAD,
)
def sft_peft_config(case: Case) -> None:
    peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
    for watched in (False, True):
        model = case.attached("causal")
        held = [(p, p.detach().clone()) for p in dt.adapters(model)["default"].parameters()]
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        run = trainer(
            case, model, watched=watched, peft_config=config, max_steps=1, save_strategy="steps", save_steps=1
        )
        trained = [n for n, p in run.model.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in n for n in trained)
        if watched:
            with pytest.raises(ValueError, match=r"took the layer's place|does not require a gradient"):
                run.train()
        else:
            run.train()
            assert weights(case.tmp / "run" / "checkpoint-1") == ["adapter_model.safetensors"]
        assert all(torch.equal(p, was) for p, was in held)


@row(
    SFT,
    "`detach` after training: the base again, though TRL keeps the bound `forward` that it found",
    slow=OTHERS,
    head=NO_HEAD,
)
def sft_detach(case: Case) -> None:
    model = case.attached("causal")
    trainer(case, model, max_steps=1).train()
    dt.adapters(model)["default"].detach()
    assert torch.equal(outputs(model.eval(), "causal"), outputs(base("causal"), "causal"))


@row(
    DPO,
    "`ref_model=copy.deepcopy(model)`: from log 2, the losses and weights of a loop by hand; reference and base stand still",
    head=NO_HEAD,
)
def dpo_copy(case: Case) -> None:
    model, twin = case.attached("causal"), case.attached("causal")
    still = frozen(model)
    with torch.no_grad():
        start = scores(model)
    run = trainer(
        case, model, "DPO", own=False, ref_model=copy.deepcopy(model), save_strategy="steps", save_steps=3
    )  # fmt: skip
    run.train()
    found = losses(run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(by_hand(twin, lambda m: preference_loss(m, start), 3), rel=1e-5)
    assert found[2] < found[0]
    assert close(outputs(model.eval(), "causal"), outputs(twin, "causal"))
    with torch.no_grad():
        assert close(scores(run.ref_model), start, 1e-6)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in still.items())
    assert weights(case.tmp / "run" / "checkpoint-3") == ["adapter.safetensors"]
    assert torch.equal(outputs(loaded(case.tmp / "run" / "checkpoint-3"), "causal"), outputs(model, "causal"))


@row(
    DPO,
    "`precompute_ref_log_probs=True`: the reference is the model at the start, adapter included, and no second model",
    slow=OTHERS,
    head=NO_HEAD,
)
def dpo_precomputed(case: Case) -> None:
    model, twin = case.attached("causal"), case.attached("causal")
    with torch.no_grad():
        start = scores(model)
    run = trainer(case, model, "DPO", own=False, precompute_ref_log_probs=True)
    assert run.ref_model is None
    assert close(precomputed(run), start)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run) == pytest.approx(by_hand(twin, lambda m: preference_loss(m, start), 3), rel=1e-5)


def precomputed(run: Any) -> Tensor:
    """(2, pairs): the reference's log-probabilities in TRL's data."""
    return torch.tensor([run.train_dataset[f"ref_{name}_logps"][:] for name in ("chosen", "rejected")])


@row(
    DPO,
    "`precompute_ref_log_probs=True` again, of the same tensors under another `alpha`, or with the adapter disabled",
    Documented("TRL's cache knows a model by its tensors alone: the reference is the first one's"),
    slow=OTHERS,
    full=EXACT,
    head=NO_HEAD,
)
def dpo_same_tensors(case: Case) -> None:
    model = case.attached("causal")
    first = precomputed(trainer(case, model, "DPO", precompute_ref_log_probs=True))
    with dt.adapters(model)["default"].disabled(), torch.no_grad():
        then, now = precomputed(trainer(case, model, "DPO", precompute_ref_log_probs=True)), scores(model)
    if case.column == "full":  # disabled, it has the base's own tensors
        assert close(then, now)
        return
    assert torch.equal(then, first)
    assert not close(then, now, 1e-3)
    if case.column == "lora":
        other = base("causal")
        torch.manual_seed(1)
        moved(dt.attach(other, "lora", r=4, alpha=64.0))
        assert torch.equal(precomputed(trainer(case, other, "DPO", precompute_ref_log_probs=True)), first)
        with torch.no_grad():
            assert not close(first, scores(other), 1e-3)


@row(
    DPO,
    "`ref_model=None`, the adapter at its start, a base from a folder: TRL loads the base again, the loss begins at log 2",
    slow=OTHERS,
    sequential=Documented("starts near the base, at N(0, 0.01²), and the loss near log 2"),
    prefix_tuning=Documented(
        "its start is not the base, nor the loss log 2; pass `copy.deepcopy(model)`, or `precompute_ref_log_probs=True`"
    ),
    prompt_tuning=Documented(
        "its start is not the base, nor the loss log 2; pass `copy.deepcopy(model)`, or `precompute_ref_log_probs=True`"
    ),
    head=NO_HEAD,
)
def dpo_none(case: Case) -> None:
    model = from_folder(case)
    torch.manual_seed(1)
    dt.attach(model, case.column, **COLUMNS[case.column][1])
    first = reloaded(case, model)
    exact = case.column in ("lora", "ia3", "full")
    assert (first == pytest.approx(math.log(2), abs=1e-6)) == exact
    assert close(outputs(model.eval(), "causal"), outputs(base("causal"), "causal"), 1e-6) == exact


@row(
    DPO,
    "`ref_model=None`, an adapter trained before, a base from a folder",
    Documented(
        "the reference is the base, not the model at the start; pass `copy.deepcopy(model)`, or "
        "`precompute_ref_log_probs=True`"
    ),
    slow=OTHERS,
    head=NO_HEAD,
)
def dpo_none_trained(case: Case) -> None:
    model = from_folder(case)
    case.attach(model)
    assert reloaded(case, model) != pytest.approx(math.log(2), abs=1e-4)


def reloaded(case: Case, model: Any) -> float:
    """The first loss with `ref_model=None`, which is that of the base without the adapter as the reference."""
    run = trainer(case, model, "DPO", max_steps=1, learning_rate=0.0)
    assert run.ref_model is not model
    assert not dt.adapters(run.ref_model)
    with torch.no_grad():
        reference = scores(run.ref_model)
        assert close(reference, scores(base("causal")), 1e-6)
        want = float(preference_loss(model, reference))
    run.train()
    assert losses(run) == pytest.approx([want], rel=1e-5)
    return losses(run)[0]


@row(
    DPO,
    "`ref_model=None`, a base made in memory: TRL has no name to load it by",
    Refused("Repo id must use alphanumeric chars", OSError),
    head=NO_HEAD,
)
def dpo_nameless(case: Case) -> None:
    model = case.attached("causal")
    case.unchanged(model, "causal")
    trainer(case, model, "DPO")


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)
