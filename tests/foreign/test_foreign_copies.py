"""What others do to a model as an object: copies, files, state dicts, processes, looks."""

import copy
import functools
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import foreign_child
import pytest
import torch
from foreign import COLUMNS, Case, Documented, Refused, base, batch, cells, check_cell, outputs, row
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

import deltatune as dt

LOOKS, FILES, COPIES = "What the model looks like", "Files and state", "Copies and processes"


@row(LOOKS, "`inspect.signature(forward)` of the model and of every site, `isinstance`, the class's name")
def signature(case: Case) -> None:
    before = base()
    model = case.attached()
    for (name, old), new in zip(
        before.named_modules(), (model.get_submodule(n) for n, _ in before.named_modules()), strict=True
    ):
        assert inspect.signature(new.forward) == inspect.signature(old.forward), name
        assert isinstance(new, type(old)), name
        assert type(new).__name__ == type(old).__name__, name


@row(LOOKS, "every key of the base's `state_dict`, and its values")
def base_keys(case: Case) -> None:
    before = base()
    own = case.attached().state_dict()
    for key, value in before.state_dict().items():
        assert key in own
        assert case.column == "full" or torch.equal(own[key], value)
    assert case.column == "full" or own.keys() - before.state_dict().keys()


@row(LOOKS, "`repr`, `model.num_parameters()`, `named_parameters()` without doubles")
def looks(case: Case) -> None:
    before, model = base(), base()
    adapter = case.attach(model)
    assert repr(model).startswith("LlamaForSequenceClassification(")
    extra = 0 if case.column == "full" else adapter.params() + adapter.n_head
    assert model.num_parameters() == before.num_parameters() + extra
    assert model.num_parameters(only_trainable=True) == adapter.params() + adapter.n_head
    assert repr(adapter).startswith("Adapter('default'")


@row(LOOKS, "`model.train()`, `model.eval()`, `zero_grad`")
def modes(case: Case) -> None:
    model = case.attached()
    want = outputs(model)
    model.train()
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())
    model.zero_grad()
    assert torch.equal(outputs(model), want)


@row(FILES, "`save_pretrained(folder)`, then `dt.load` of the folder on a fresh base: the adapter alone is in it")
def save_pretrained(case: Case) -> None:
    model = case.attached()
    model.save_pretrained(case.tmp / "out")
    assert sorted(p.name for p in (case.tmp / "out").iterdir()) == ["adapter.json", "adapter.safetensors"]
    fresh = base()
    dt.load(fresh, case.tmp / "out")
    assert torch.equal(outputs(fresh), outputs(model))


@row(
    FILES,
    "`from_pretrained(folder)` of what the attached model saved",
    Refused("no file named model.safetensors", OSError),
)
def from_pretrained(case: Case) -> None:
    case.attached().save_pretrained(case.tmp / "out")
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForSequenceClassification.from_pretrained(case.tmp / "out")
    LlamaForSequenceClassification.from_pretrained(case.tmp / "out")


@row(FILES, "`save_pretrained(folder, push_to_hub=True)`", Refused("push_to_hub"))
def push_to_hub(case: Case) -> None:
    case.attached().save_pretrained(case.tmp / "out", push_to_hub=True)


@row(FILES, "`load_state_dict(strict=True)` with the attached model's own `state_dict`")
def own_state(case: Case) -> None:
    model, other = case.attached(), case.attached(seed=7)
    assert not torch.equal(outputs(other), outputs(model))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(other), outputs(model))


@row(
    FILES,
    "`load_state_dict(strict=True)` with the base's `state_dict`, into the attached model",
    Refused("Missing key(s) in state_dict", RuntimeError),
    full=Documented("has no key of its own: the base's values come in, and the adapter is back at its start"),
)
def base_state(case: Case) -> None:
    model = case.attached()
    model.load_state_dict(base().state_dict(), strict=True)
    assert torch.equal(outputs(model), outputs(base()))


@row(
    FILES,
    "`load_state_dict(strict=True)` with the attached model's `state_dict`, into the bare base",
    Refused("Unexpected key(s) in state_dict", RuntimeError),
    full=Documented("has no key of its own: the tuned values come in, which is the tuned model"),
)
def attached_state(case: Case) -> None:
    model, bare = case.attached(), base()
    bare.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(bare), outputs(model))


def same_but_apart(model: Any, other: Any) -> None:
    """`other` gives the same logits, has its own adapter, and detaching it leaves `model` as it is."""
    want = outputs(model)
    assert torch.equal(outputs(other), want)
    adapter = dt.adapters(other)["default"]
    assert type(other) is type(model)
    adapter.detach()
    assert torch.equal(outputs(other), outputs(base()))
    assert torch.equal(outputs(model), want)
    assert dt.adapters(model)


@row(COPIES, "`copy.deepcopy(model)`; the copy stands alone")
def deepcopy(case: Case) -> None:
    model = case.attached()
    same_but_apart(model, copy.deepcopy(model))


@row(
    COPIES,
    "`copy.copy(model)`",
    Documented("shares its layers with the original, as that of any Module does: one adapter, seen twice"),
)
def shallow_copy(case: Case) -> None:
    model = case.attached()
    other = copy.copy(model)
    assert torch.equal(outputs(other), outputs(model))
    for seen in dt.adapters(other)["default"].parameters():
        seen.data.zero_()
    assert torch.equal(outputs(other), outputs(model))
    dt.adapters(other)["default"].detach()
    assert not dt.adapters(model)
    assert torch.equal(outputs(model), outputs(base()))
    assert torch.equal(outputs(other), outputs(base()))


@row(COPIES, "`pickle.loads(pickle.dumps(model))`")
def pickled(case: Case) -> None:
    model = case.attached()
    same_but_apart(model, pickle.loads(pickle.dumps(model)))


@row(COPIES, "`torch.save(model)`, `torch.load(weights_only=False)`")
def torch_save(case: Case) -> None:
    model, file = case.attached(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same_but_apart(model, torch.load(file, weights_only=False))


@row(
    COPIES,
    "`torch.save(model)`, `torch.load(weights_only=True)`",
    Refused("Weights only load failed", pickle.UnpicklingError),
)
def torch_load_weights_only(case: Case) -> None:
    file = io.BytesIO()
    torch.save(case.attached(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


@functools.cache
def in_a_child() -> dict[str, Tensor]:
    """The logits of every column's model, from one spawned process that had imported neither library before."""
    models = {column: Case(column, Path()).attached() for column in COLUMNS}
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(
        target=foreign_child.answer,
        args=(queue, foreign_child.Parcel(pickle.dumps(models)), batch(), torch.get_num_threads()),
    )
    process.start()
    loaded, found = queue.get(timeout=120)
    process.join()
    queue.close()
    queue.join_thread()
    assert process.exitcode == 0
    process.close()
    assert not loaded, f"the child had imported {loaded} before the model came"
    return {column: torch.tensor(values) for column, values in found.items()}


@row(COPIES, "sent to a spawned process that has imported neither deltatune nor transformers")
def spawn(case: Case) -> None:
    assert torch.equal(in_a_child()[case.column], outputs(case.attached()))


@row(COPIES, "`torch.func.functional_call` with all parameters, and with other values of the deltas'")
def functional_call(case: Case) -> None:
    model, other = case.attached(), case.attached(seed=7)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        got = torch.func.functional_call(model, state, (), batch()).logits
    assert torch.equal(got, outputs(other))
    assert torch.equal(outputs(model), outputs(case.attached()))


@row(LOOKS, "forward hooks, pre-hooks and backward hooks on a site, registered before and after")
def user_hooks(case: Case) -> None:
    model = base()
    seen: list[str] = []

    def register(when: str) -> None:
        site: nn.Module = model.model.layers[1].self_attn.v_proj
        site.register_forward_pre_hook(lambda m, args: seen.append(f"pre {when} {args[0].shape[-1]}"))
        site.register_forward_hook(lambda m, args, out: seen.append(f"post {when} {out.shape[-1]}"))
        site.register_full_backward_hook(lambda m, i, o: seen.append(f"back {when} {o[0].shape[-1]}"))

    register("before")
    case.attach(model)
    register("after")
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds, attention_mask=batch()["attention_mask"]).logits.sum().backward()
    assert sorted(seen) == sorted(
        f"{verb} {when} {n}" for when in ("before", "after") for verb, n in (("pre", 32), ("post", 16), ("back", 16))
    )


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)
