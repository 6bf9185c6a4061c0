"""AdaLoRA against HF PEFT, step by step on the same gradients, and against its reference repository's numbers."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import deltatune as dt
from deltatune.methods.ranks import Allocator
from deltatune.train.trainer import AdapterTrainer

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_adalora.py"))
fill, gradient, SHAPES, R, LR, STEPS = (MAKE[k] for k in ("fill", "gradient", "SHAPES", "R", "LR", "STEPS"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))
SETTINGS = GOLDEN["settings"]


@pytest.fixture
def any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference and HF set no limit to the rank, and the golden's third layer has one above its width."""
    monkeypatch.setattr(dt.AdaLoRA, "limits", {})


class Layers(nn.Module):
    """The golden's layers side by side; the loss is the sum of all that they give."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name, (d_out, d_in) in SHAPES.items():
            layer = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(fill(f"{name}.w", layer.weight.shape))
            self.add_module(name, layer)

    def forward(self, row: int | None = None) -> Any:
        """The loss of the golden's inputs, or of one of their rows, as HF PEFT's AdaLoRA wants it."""
        total = torch.zeros(())
        for layer in self.children():
            if isinstance(layer, nn.Linear) or hasattr(layer, "in_features"):
                x = fill("x", (2, layer.in_features))
                x = x if row is None else x[row : row + 1]
                y = layer(x.to(next(layer.parameters()).dtype))
                total = total + y.square().mean().double()
        return SimpleNamespace(loss=total)


def attached(model: nn.Module, **hyper: Any) -> dt.Adapter:
    options = {
        "r": R,
        "target": 2,
        "alpha": SETTINGS["lora_alpha"],
        "beta1": SETTINGS["beta1"],
        "beta2": SETTINGS["beta2"],
    }
    return dt.attach(model, "adalora", where=list(SHAPES), head=None, **{**options, **hyper})


def triplets(adapter: dt.Adapter) -> dict[str, Tensor]:
    """The golden's names of the trained tensors."""
    return {f"{site}.{k}": getattr(d, k) for (_, site), d in adapter.deltas.items() for k in ("a", "e", "b")}


def filled(adapter: dt.Adapter) -> None:
    with torch.no_grad():
        for key, p in triplets(adapter).items():
            p.copy_(fill(key, (*p.shape, 1) if key.endswith("e") else p.shape).view(p.shape))


def stepped(tensors: dict[str, Tensor], step: int) -> None:
    """One step of the golden's: its gradients, and its update."""
    for key, p in tensors.items():
        shape = (len(p), 1) if key.endswith("e") else p.shape
        p.grad = gradient(step, key, shape).to(p.dtype).view(p.shape)
        p.data -= LR * p.grad


def begun(adapter: dt.Adapter, n_steps: int = STEPS, n_micro: int = 1) -> Allocator:
    schedule = adapter.schedule
    assert isinstance(schedule, Allocator)
    schedule.begin(torch.optim.SGD(adapter.parameters(), lr=0.0), n_steps, n_micro)
    return schedule


def run(adapter: dt.Adapter, n_steps: int = STEPS) -> Iterator[tuple[int, Allocator, dict[str, Tensor]]]:
    """(step, schedule, tensors) after each step of the golden's series."""
    filled(adapter)
    schedule, tensors = begun(adapter, n_steps), triplets(adapter)
    for step in range(n_steps):
        schedule.before_step(step)
        stepped(tensors, step)
        schedule.after_step(step)
        yield step, schedule, tensors
    schedule.end()


def gates(tensors: dict[str, Tensor]) -> list[list[float]]:
    return [tensors[f"{name}.e"].detach().flatten().tolist() for name in SHAPES]


def ranks(tensors: dict[str, Tensor]) -> str:
    return " ".join("".join(str(int(v != 0)) for v in row) for row in gates(tensors))


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("series", GOLDEN["series"])
def test_as_the_reference_allocates(series: str) -> None:
    """Step by step, but for the step total - final where it is no multiple of the interval: there the reference masks
    nothing, HF PEFT always does, and so do we; what is kept from then on is what that step chose."""
    golden = GOLDEN["series"][series]
    options = {
        "warmup": SETTINGS["init_warmup"],
        "final": golden["final_warmup"],
        "interval": SETTINGS["mask_interval"],
    }
    last = STEPS - golden["final_warmup"]
    ours_alone = set() if last % SETTINGS["mask_interval"] == 0 else {last}
    adapter = attached(Layers(), **options)
    differ = set()
    for step, schedule, tensors in run(adapter):
        want = golden["steps"][step]
        assert schedule.budget(step) == want["budget"]
        if step not in ours_alone:
            assert ranks(tensors) == want["kept"], step
            torch.testing.assert_close(gates(tensors), want["e"], rtol=1e-10, atol=1e-12)
        elif ranks(tensors) != want["kept"]:
            differ.add(step)
            assert sum(d.rank for d in adapter.deltas.values()) == want["budget"]  # type: ignore[attr-defined]
            assert ranks(tensors) == golden["steps"][step + 1]["kept"]
    assert differ == ours_alone
    for key, (smooth, spread) in GOLDEN["scores"][series].items():
        name = f"0|{key[0]}|{key[2]}"
        for have, want in ((schedule.smooth[name], smooth), (schedule.spread[name], spread)):
            torch.testing.assert_close(
                have, torch.tensor(want, dtype=torch.float64).view(have.shape), rtol=1e-10, atol=1e-14
            )


@pytest.mark.usefixtures("any_rank")
def test_as_the_reference_computes() -> None:
    """The layers' outputs, on the fast path, on the weight path and merged."""
    model = Layers()
    adapter = attached(model)
    filled(adapter)
    for merged in (False, True):
        for (_, name), delta in adapter.deltas.items():
            x = fill("x", (2, delta.site.d_in)).double()
            want = torch.tensor(GOLDEN["outputs"][name], dtype=torch.float64)
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-11)
            if not merged:
                weight, _ = delta.fold(layer.weight, None)
                torch.testing.assert_close(x @ weight.t(), want, rtol=0, atol=1e-11)
                torch.testing.assert_close(delta.post(x @ layer.weight.t(), x), want, rtol=0, atol=1e-11)
        if not merged:
            adapter.merge()


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("n_micro", [1, 4])
def test_penalty_is_the_references(n_micro: int) -> None:
    """With e = 0 the loss itself moves neither A nor B, so that their gradients are the penalty's alone."""
    golden = GOLDEN["orthogonality"]
    model = Layers()
    adapter = attached(model, orth=golden["weight"])
    filled(adapter)
    tensors = triplets(adapter)
    with torch.no_grad():
        for key, p in tensors.items():
            if key.endswith("e"):
                p.zero_()
    schedule = begun(adapter, n_micro=n_micro)
    for _ in range(n_micro):
        (model().loss / n_micro).backward()
    for key, want in golden["grads"].items():
        torch.testing.assert_close(tensors[key].grad, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    schedule.end()
    adapter.model.zero_grad()
    model().loss.backward()
    grads = [tensors[key].grad for key in golden["grads"]]
    assert not any(grad is None or grad.any() for grad in grads), "after the end nothing pulls"


# warm-up, final, interval, rank at the start, target: in steps, and as shares of the thirty steps
HF = [
    (0, 0, 1, 4, 2),
    (4, 9, 3, 4, 2),
    (4, 8, 3, 4, 1),
    (2, 20, 7, 3, 2),
    (10, 5, 1, 4, 3),
    (0, 29, 2, 3, 1),
    (0.2, 0.5, 4, 4, 2),
]


def hf(warmup: float, final: float, interval: int, r: int, target: int, dtype: torch.dtype, **more: Any) -> Any:
    """HF PEFT's AdaLoRA on the same layers; its E (r, 1) is our e (r)."""
    steps = [int(n * STEPS) if n < 1 else int(n) for n in (warmup, final)]
    betas = {"beta1": SETTINGS["beta1"], "beta2": SETTINGS["beta2"]}
    config = peft.AdaLoraConfig(
        init_r=r, target_r=target, tinit=steps[0], tfinal=steps[1], deltaT=interval, total_step=STEPS,
        target_modules=list(SHAPES), lora_alpha=SETTINGS["lora_alpha"], **{**betas, **more},
    )  # fmt: skip
    model = peft.get_peft_model(Layers(dtype=dtype), config)
    if dtype == torch.float64:
        model.double()
    found = {}
    for name in SHAPES:
        layer = model.base_model.model.get_submodule(name)
        found |= {f"{name}.{k.lower()}": getattr(layer, f"lora_{k}")["default"] for k in "AEB"}
    return model, found


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("setting", HF, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_as_peft_allocates(setting: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Ranks, budget and e, step by step."""
    warmup, final, interval, r, target = setting
    model, theirs = hf(*setting, dtype)
    adapter = attached(Layers(dtype=dtype), warmup=warmup, final=final, interval=interval, r=r, target=target)
    with torch.no_grad():
        for key, p in theirs.items():
            p.copy_(fill(key, p.shape))
    allocator, moved, before = model.base_model.rankallocator, set(), ""
    for step, schedule, ours in run(adapter):
        stepped(theirs, step)
        model.base_model.update_and_allocate(step)
        assert schedule.budget(step) == allocator.budget_schedule(step)[0]
        assert ranks(ours) == ranks(theirs), step
        assert gates(ours) == gates(theirs), step
        moved |= {ranks(ours)} - {before}
        before = ranks(ours)
    assert len(moved) > 1, "ranks that never move compare nothing"
    assert not final or ranks(ours).count("1") == target * len(SHAPES)


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("n_micro", [1, 4])
def test_penalty_is_pefts(dtype: torch.dtype, n_micro: int) -> None:
    """The gradient of HF's loss term, also under a bf16 base, where both keep the adapter in fp32."""
    weight = 0.3
    model, theirs = hf(4, 9, 3, R, 2, dtype, orth_reg_weight=weight)
    base = Layers(dtype=dtype)
    adapter = attached(base, orth=weight)
    ours = triplets(adapter)
    with torch.no_grad():
        for key, p in theirs.items():
            p.copy_(torch.zeros(p.shape) if key.endswith("e") else fill(key, p.shape))
            ours[key].copy_(p.view(ours[key].shape))
    begun(adapter, n_micro=n_micro)
    for i in range(n_micro):
        (model.base_model(i % 2).loss / n_micro).backward()
        (base(i % 2).loss / n_micro).backward()
    for key, p in theirs.items():
        mine = ours[key]
        assert mine.dtype == p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if key.endswith("e"):  # the loss's own, in the base's dtype
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(mine.grad, p.grad.view(mine.shape), rtol=tolerance, atol=tolerance * 0.1)
        else:
            assert p.grad.abs().max() > 1e-3
            torch.testing.assert_close(mine.grad, p.grad, rtol=1e-5, atol=1e-7)


def test_penalty_is_fp32_under_autocast() -> None:
    """The products A A^T and B^T B too."""
    base = Layers(dtype=torch.float32)
    adapter = attached(base, r=3)
    grads = []
    for cast in (False, True):
        base.zero_grad()
        begun(adapter)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = base().loss
        loss.backward()
        grads.append({key: p.grad for key, p in triplets(adapter).items() if not key.endswith("e")})
    for key, exact in grads[0].items():
        torch.testing.assert_close(grads[1][key], exact, rtol=1e-5, atol=1e-7)


def test_penalty_counts_each_run_of_a_layer() -> None:
    """Two forwards before one backward bring it twice, as the footguns page says; HF's rides on the loss, once for each."""
    base = Layers(dtype=torch.float32)
    adapter = attached(base, r=3)
    begun(adapter)
    grads = []
    for n in (1, 2):
        base.zero_grad()
        sum(base().loss for _ in range(n)).backward()  # type: ignore[union-attr]
        factors = {key: p for key, p in triplets(adapter).items() if not key.endswith("e")}
        grads.append({key: p.grad.clone() for key, p in factors.items() if p.grad is not None})
    assert len(grads[0]) == 2 * len(SHAPES)
    for key, once in grads[0].items():
        torch.testing.assert_close(grads[1][key], 2 * once)


def test_nothing_is_pruned_where_the_target_is_the_start() -> None:
    """The reference and HF fail there in kthvalue; the budget that equals the total masks nothing here."""
    assert "kthvalue" in GOLDEN["full_budget"]
    for target in (3, 7):
        adapter = attached(Layers(), r=3, target=target, warmup=4, final=9, interval=3)
        for step, schedule, tensors in run(adapter):
            assert schedule.budget(step) == 9
            assert set(ranks(tensors)) == {"1", " "}


def test_no_step_to_prune_in() -> None:
    for warmup, final in ((10, 20), (0.5, 0.5), (25, 0.2), (40, 0)):
        adapter = attached(Layers(), r=3, warmup=warmup, final=final)
        with pytest.raises(
            ValueError, match=r"^adalora: warmup = \d+ and final = \d+ leave no step of 30 to prune in$"
        ):
            begun(adapter)
    begun(attached(Layers(), r=3, warmup=9, final=20))


def test_one_step_to_prune_in() -> None:
    """warm-up + final = steps - 1: everything goes at once, on the step total - final."""
    adapter = attached(Layers(), r=3, warmup=9, final=20, interval=7, target=1)
    seen = [ranks(tensors) for _, _, tensors in run(adapter)]
    assert set("".join(seen[:10])) == {"1", " "}
    assert [s.count("1") for s in seen[10:]] == [3] * 20
    assert len(set(seen[10:])) == 1


def test_ties_all_go() -> None:
    """As in HF: what scores as much as the edge is masked, and the budget is undershot. All numbers here are exact."""
    model, theirs = hf(0, 5, 1, 3, 2, torch.float64, beta1=0.5, beta2=0.5)
    adapter = attached(Layers(), r=3, warmup=0, final=5, interval=1, beta1=0.5, beta2=0.5)
    schedule, ours = begun(adapter), triplets(adapter)
    for tensors in (theirs, ours):
        for key, p in tensors.items():
            p.data.fill_(0.5 if key[0] != "1" else 1.0)
            p.grad = torch.ones_like(p)
    for step in range(2):
        schedule.after_step(step)
        model.base_model.update_and_allocate(step)
        assert ranks(ours) == ranks(theirs)
    assert ranks(ours) == "000 111 000" and schedule.budget(1) > 3


def test_a_tensor_without_gradient_is_named() -> None:
    adapter = attached(Layers(), r=3)
    schedule = begun(adapter)
    with pytest.raises(ValueError, match=r"^adalora: 0\.0\.a has no gradient at step 0"):
        schedule.after_step(0)


@pytest.mark.parametrize("hyper", [{"interval": 0}, {"target": 0}, {"warmup": -1}, {"beta1": 1.0}])
def test_numbers_that_mean_nothing(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(hyper))} = "):
        attached(Layers(), r=3, **hyper)


def test_another_sites_state_is_refused() -> None:
    schedule = begun(attached(Layers(), r=3))
    other = Layers()
    few = dt.attach(other, "adalora", r=3, where=["0"], head=None)
    with pytest.raises(ValueError, match="other sites"):
        few.schedule.load_state_dict(schedule.state_dict())


@pytest.mark.parametrize("n_micro", [1, 4])
def test_our_trainer_counts_backward_passes(n_micro: int, tmp_path: Path) -> None:
    """A step of plain SGD, at the start where e = 0, moves A and B by the penalty's gradient, counted once a step."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 13,
    }
    model = BertForSequenceClassification(BertConfig(**sizes))
    adapter = dt.attach(model, "adalora", r=4, orth=0.3, where="q,mlp.up", head=None)
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(20.0)
    before = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    total = torch.zeros(())
    for key, p in before.items():
        if not key.endswith(".e"):
            total = total + ((p @ p.T if key.endswith(".a") else p.T @ p) - torch.eye(4)).norm()
    (0.3 / 4 * total).backward()  # A and B of two sites
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=n_micro,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", weight_decay=0.0, max_grad_norm=0.0,
        save_strategy="no", report_to="none", remove_unused_columns=False,
        dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": list(range(1 + i, 7 + i)), "labels": i % 2} for i in range(4)]
    trainer = AdapterTrainer(model, options, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for key, p in adapter.named_parameters():
        grad = before[key].grad
        if key.endswith(".e"):
            assert p.any()
        else:
            assert grad is not None and grad.abs().max() > 0.01
            torch.testing.assert_close(p.detach(), (before[key] - 0.1 * grad).detach(), rtol=0, atol=1e-6)
