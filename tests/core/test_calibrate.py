"""Statistics of gradients over batches, and nothing left behind."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from deltatune.core.calibrate import Covariance, Gradients, collect, gradients, looking, predicts_next


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("of", [torch.square, torch.abs, lambda g: g], ids=["square", "abs", "mean"])
def test_the_mean_of_what_was_asked(of) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    tensors = {"w": model[0].weight, "b": model[2].bias}
    got = gradients(model, tensors, batches(3), loss, of)
    want = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for batch in batches(3):
        for name, grad in zip(tensors, torch.autograd.grad(loss(model, batch), list(tensors.values())), strict=True):
            want[name] += of(grad) / 3
    for name in tensors:
        torch.testing.assert_close(got[name], want[name])


def test_nothing_is_left_behind() -> None:
    model = nn.Linear(4, 3).to(torch.bfloat16).requires_grad_(False)
    model.bias.requires_grad_(True)
    with torch.no_grad():
        got = gradients(model, {"w": model.weight}, [b.bfloat16() for b in batches(2)], loss)
    assert got["w"].dtype == torch.float32
    assert not got["w"].requires_grad
    assert (model.weight.requires_grad, model.bias.requires_grad) == (False, True)
    assert model.weight.grad is None
    assert model.bias.grad is None


def test_looking_draws_from_its_seed_and_seeds_no_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPUs those of the model alone are seeded, and set back; here it has none."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(1)
    seeded.clear()
    before, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        with looking(nn.Dropout(), True, seed):
            drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before) and not seeded


@pytest.mark.parametrize(("name", "both", "want"), [
    ("GPT2LMHeadModel", False, True), ("LlamaForCausalLM", False, True), ("LlavaForConditionalGeneration", False, True),
    ("T5ForConditionalGeneration", True, False), ("BertForMaskedLM", False, False), ("GPT2ForTokenClassification", False, False),
])  # fmt: skip
def test_whose_answers_are_about_the_next_token(name: str, both: bool, want: bool) -> None:
    model = type(name, (nn.Module,), {"config": SimpleNamespace(is_encoder_decoder=both)})()
    assert predicts_next(model) is want


def test_errors_name_the_tensor_and_restore() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    idle = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match="does not depend on idle"):
        gradients(model, {"w": model.weight, "idle": idle}, batches(1), loss)
    with pytest.raises(ValueError, match="does not depend on w"):
        gradients(model, {"w": model.weight}, batches(1), lambda m, batch: torch.ones(()))
    with pytest.raises(ValueError, match="the gradients of w are not finite"):
        gradients(model, {"w": model.weight}, batches(2), lambda m, batch: loss(m, batch) / 0.0)
    with pytest.raises(ValueError, match="no batch"):
        gradients(model, {"w": model.weight}, [], loss)
    assert not any(t.requires_grad for t in (model.weight, model.bias, idle))


def padded() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    return {"x": torch.randn(2, 3, 4, generator=generator), "attention_mask": mask}


def of_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(batch["x"]) * batch["attention_mask"][..., None]
    return out.square().sum() / len(out)


@pytest.mark.parametrize("frozen", [True, False])
def test_covariances_of_real_tokens(frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(not frozen)
    at = {"last": model[2]}
    wanted = {
        "in": Covariance(at, "input"), "out": Covariance(at, "output"), "grad": Covariance(at, "gradient"),
        "fisher": Gradients({"w": model[0].weight}),
    }  # fmt: skip
    got = collect(model, [padded(), padded()], of_rows, wanted)
    batch = padded()
    real = batch["attention_mask"].bool()
    inputs = model[1](model[0](batch["x"][real]))
    outputs = model[2](inputs)
    for name, rows in {"in": inputs, "out": outputs, "grad": outputs}.items():  # the loss is |y|^2 / 2: g = y
        torch.testing.assert_close(got[name]["last"], rows.t() @ rows / len(rows))
    model.requires_grad_(True)
    (grad,) = torch.autograd.grad(of_rows(model, batch), [model[0].weight])
    torch.testing.assert_close(got["fisher"]["w"], grad.square())
    assert not model[2]._forward_hooks


def test_gradients_at_a_frozen_layer_alone() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    got = collect(model, [padded()], of_rows, {"g": Covariance({"it": model}, "gradient")})["g"]["it"]
    rows = model(padded()["x"][padded()["attention_mask"].bool()])
    torch.testing.assert_close(got, rows.t() @ rows / len(rows))
    with pytest.raises(ValueError, match="idle did not run"):
        collect(model, [padded()], of_rows, {"g": Covariance({"idle": nn.Linear(2, 2)}, "gradient")})
    with pytest.raises(ValueError, match="'input', 'output' or 'gradient', not 'x'"):
        Covariance({}, "x")  # type: ignore[arg-type]


def test_examples_one_by_one() -> None:
    model = nn.Linear(4, 3)
    tensors = {"w": model.weight}
    got = collect(model, [padded(), padded()], of_rows, {"f": Gradients(tensors)}, rows="example", most=3)["f"]["w"]
    batch = padded()
    each = []
    for i in (0, 1, 0):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        each.append(torch.autograd.grad(of_rows(model, one), [model.weight])[0].square())
    torch.testing.assert_close(got, torch.stack(each).mean(0))
    moved = Gradients(tensors, lambda g, t: (g * t).abs())
    both = collect(model, [batch], of_rows, {"a": moved, "b": Gradients(tensors, lambda g, t: g)})
    torch.testing.assert_close(both["a"]["w"], (both["b"]["w"] * model.weight).abs())


def test_no_batch_more_than_asked_for() -> None:
    model, seen = nn.Linear(4, 3), []
    collect(model, (seen.append(b) or b for b in batches(5)), loss, {"": Gradients({"w": model.weight})}, most=2)  # type: ignore[func-returns-value]
    assert len(seen) == 2


def on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    got = gradients(model, {"w": model.weight}, batches(4)[2 * rank : 2 * rank + 2], loss)["w"]
    torch.save((model.weight, got), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_agree(tmp_path: Path) -> None:
    """Each with batches of its own: both have the mean of all four, bit for bit the same."""
    mp.spawn(on_rank, (str(tmp_path),), 2)
    (weight, one), (_, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, two)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    assert torch.equal(model.weight, weight)
    torch.testing.assert_close(one, gradients(model, {"w": model.weight}, batches(4), loss)["w"])
