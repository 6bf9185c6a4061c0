"""What others do with a model's forward: generation, checkpointing, export, compilation, precision, token tables."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    COLUMNS,
    Case,
    Documented,
    Refused,
    base,
    batch,
    cells,
    check_cell,
    close,
    gradients,
    labels,
    outputs,
    row,
)
from torch import Tensor, nn

import deltatune as dt

GENERATE, MEMORY, GRAPHS, TABLES = "Generation and outputs", "Gradient checkpointing", "Graphs", "Tables and precision"
NO_HEAD = Refused("this backbone has no 'head'")


def continued(model: Any, **options: Any) -> Tensor:
    """Eight new tokens for two left-padded prompts."""
    ids = batch()["input_ids"][:2].clone()
    mask = torch.ones_like(ids)
    ids[1] = ids[1].roll(3)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert isinstance(found, Tensor)
    return found


@row(
    GENERATE,
    "`generate`, decoder-only: greedy with the cache ≡ without ≡ each prompt alone ≡ the forward's own argmax",
    head=NO_HEAD,
)
def greedy(case: Case) -> None:
    model = case.attached("causal")
    cached = continued(model)
    assert torch.equal(cached, continued(model, use_cache=False))
    alone = batch()["input_ids"][:2].clone()[1:2, :6]  # the second prompt without its padding
    ids = continued_alone(model, alone)
    assert torch.equal(ids[0, 6:], cached[1, 9:])
    grown = alone
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=grown, attention_mask=torch.ones_like(grown)).logits[:, -1]
            logits[:, 2] = -torch.inf
            grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(grown, ids)
    assert not torch.equal(cached, continued(base("causal")))


def continued_alone(model: Any, ids: Tensor) -> Tensor:
    """Eight new tokens for one prompt without padding."""
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert isinstance(found, Tensor)
    return found


@row(GENERATE, "`generate`, decoder-only: three beams with the cache ≡ without", head=NO_HEAD)
def beams(case: Case) -> None:
    model = case.attached("causal")
    assert torch.equal(continued(model, num_beams=3), continued(model, num_beams=3, use_cache=False))


@row(GENERATE, "`generate`, encoder-decoder: greedy and three beams, with the cache ≡ without", head=NO_HEAD)
def encoder_decoder(case: Case) -> None:
    model = case.attached("t5")
    for n_beams in (1, 3):
        given = {k: v for k, v in batch("t5").items() if k != "decoder_input_ids"}
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": n_beams}
        cached = model.generate(**given, **options)
        assert torch.equal(cached, model.generate(**given, **options, use_cache=False))


@row(GENERATE, "`output_hidden_states=True`: as many as before, of the user's own length; the logits do not change")
def hidden_states(case: Case) -> None:
    model = case.attached()
    with torch.no_grad():
        out = model(**batch(), output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(4, 9, 32)] * 3
    assert torch.equal(out.logits, outputs(model))


@row(
    GENERATE,
    "`output_attentions=True` under eager attention",
    prefix_tuning=Documented("the attention has n more columns, in front: what each token gives to the prefix"),
    prompt_tuning=Documented("the attention has n more rows and columns, in front: the soft tokens' own"),
)
def attentions(case: Case) -> None:
    model = case.attached()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch(), output_attentions=True)
    extra = {"prefix_tuning": (0, 5), "prompt_tuning": (5, 5)}.get(case.column, (0, 0))
    assert [tuple(a.shape) for a in out.attentions] == [(4, 4, 9 + extra[0], 9 + extra[1])] * 2
    assert close(out.logits, outputs(case.attached()))


@row(
    GENERATE,
    '`set_attn_implementation("flex_attention")` after attach',
    Documented("no delta of this method is in the attention: transformers runs it, or not, as without"),
    slow=tuple(c for c in COLUMNS if c != "prefix_tuning"),
    prefix_tuning=Refused("learned keys and values do not run with 'flex_attention' attention; use 'sdpa' or 'eager'"),
)
def flex_attention(case: Case) -> None:
    model = case.attached()
    model.set_attn_implementation("flex_attention")
    bare = base()
    bare.set_attn_implementation("flex_attention")
    errors = []
    for m in (model, bare):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of its flags
                outputs(m)
            errors.append("")
        except Exception as error:
            if case.column == "prefix_tuning" and isinstance(error, ValueError):
                raise
            errors.append(type(error).__name__)
    assert errors[0] == errors[1]


def checkpointed(case: Case, use_reentrant: bool, before: bool) -> None:
    """Gradients under checkpointing equal those without, and nothing stays behind."""
    want = gradients(case.attached().train())
    model = base()
    options = {"use_reentrant": use_reentrant}
    if before:
        model.gradient_checkpointing_enable(options)
    case.attach(model)
    if not before:
        model.gradient_checkpointing_enable(options)
    model.train()
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert close(got[name], grad), name
    frame = model.__dict__["_deltatune"].frame
    assert frame.call is None
    assert not frame.stash


@row(MEMORY, "non-reentrant checkpointing, enabled before attach: the same gradients")
def before_attach(case: Case) -> None:
    checkpointed(case, use_reentrant=False, before=True)


@row(MEMORY, "non-reentrant checkpointing, enabled after attach: the same gradients")
def after_attach(case: Case) -> None:
    checkpointed(case, use_reentrant=False, before=False)


@row(MEMORY, "reentrant checkpointing, enabled before attach: the same gradients, none is None")
def reentrant_before_attach(case: Case) -> None:
    checkpointed(case, use_reentrant=True, before=True)


@row(MEMORY, "reentrant checkpointing, enabled after attach: the same gradients, none is None")
def reentrant_after_attach(case: Case) -> None:
    checkpointed(case, use_reentrant=True, before=False)


@row(
    MEMORY,
    "checkpointing enabled after attach: no gradient flows below the first adapted layer",
    prompt_tuning=Documented("the soft tokens are the input: every layer passes the gradient on"),
    full=Documented("every layer trains"),
    head=Documented("the head is above every layer: none passes a gradient on"),
)
def below_the_first(case: Case) -> None:
    model = base()
    _, hyper = COLUMNS[case.column]
    chosen = {} if case.column in ("prompt_tuning", "full", "head") else {"layers": [1]}
    dt.attach(model, case.column, **hyper, **chosen)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    flows: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda m, args, out: flows.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    model(**batch(), labels=labels()).loss.backward()
    want = {"prompt_tuning": [True, True], "full": [True, True], "head": [False, False]}.get(case.column, [False, True])
    assert flows[:2] == want


@row(GRAPHS, "`torch.export.export`, run again from its program")
def export(case: Case) -> None:
    model = case.attached("bert")
    program = torch.export.export(model, (), batch("bert"), strict=False)
    with torch.no_grad():
        got = program.module()(**batch("bert")).logits
    assert close(got, outputs(model, "bert"))


@row(
    GRAPHS,
    "`torch.onnx.export(dynamo=True)`, evaluated by ONNX's own reference",
    slow=tuple(c for c in COLUMNS if c not in ("lora", "prefix_tuning")),
)
def onnx(case: Case) -> None:
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    import onnx as library

    model = case.attached("bert")
    given = batch("bert")  # with what BERT would gather from its buffers, which the reference evaluator cannot
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    given["position_ids"] = torch.arange(9)[None]
    program = torch.onnx.export(model, (), kwargs=given, dynamo=True, verbose=False, optimize=False)
    file = io.BytesIO()
    program.save(file)
    run = reference.ReferenceEvaluator(library.load_from_string(file.getvalue()))
    got = torch.from_numpy(run.run(None, {n: given[n].numpy() for n in run.input_names})[0])
    assert close(got, outputs(model, "bert"), 1e-4)


def refused_compiled(case: Case) -> Any:
    compiled = torch.compile(base(), backend="eager")
    case.after.append(
        lambda: None if torch.equal(outputs(compiled._orig_mod), outputs(base())) else pytest.fail("changed")
    )
    return compiled


@row(
    GRAPHS,
    "`dt.attach(torch.compile(model))`",
    Refused("the model comes from torch.compile; attach to the model itself, then compile it"),
)
def attach_compiled(case: Case) -> None:
    case.attach(refused_compiled(case))


FEW = tuple(c for c in COLUMNS if c not in ("lora", "prefix_tuning"))


@row(GRAPHS, "`model.compile()`, then attach, then detach: each is seen by the compiled graph", slow=FEW)
def compiled_in_place(case: Case) -> None:
    torch._dynamo.reset()
    model = base("bert")
    model.compile(backend="eager")
    want = outputs(model, "bert")
    adapter = case.attach(model)
    assert close(outputs(model, "bert"), outputs(case.attached("bert"), "bert"))
    with adapter.disabled():
        assert close(outputs(model, "bert"), want)
    adapter.detach()
    assert close(outputs(model, "bert"), want)


@row(
    GRAPHS, "`torch.compile(model, fullgraph=True)` after attach: forward, gradients, `disabled()`, `detach`", slow=FEW
)
def compile_attached(case: Case) -> None:
    torch._dynamo.reset()
    model = base("bert")
    adapter = case.attach(model)
    want, grads = outputs(model, "bert"), gradients(model, "bert")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(outputs(compiled, "bert"), want)
    got = {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, "bert").items()}
    assert all(close(got[n], g, 1e-4) for n, g in grads.items())
    with adapter.disabled():
        assert close(outputs(compiled, "bert"), outputs(base("bert"), "bert"))
    adapter.detach()
    assert close(outputs(compiled, "bert"), outputs(base("bert"), "bert"))


@row(
    TABLES,
    "`resize_token_embeddings` after attach: old tokens' outputs stay; a file from before is refused on a larger base",
    full=Refused("adapter 'default' is on the token embeddings; resize them first, then attach"),
)
def resize(case: Case) -> None:
    model = base()
    adapter = case.attach(model)
    want = outputs(model)
    adapter.save(case.tmp / "out")
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(outputs(model), want)
    assert all(p.requires_grad for p in adapter.parameters())
    assert not model.get_input_embeddings().weight.requires_grad
    adapter.save(case.tmp / "larger")
    larger = base()
    larger.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(ValueError, match="was made for llama, whose layers are not those of this model"):
        dt.load(larger, case.tmp / "out")


@row(TABLES, "tied token table and LM head: tied before and after, one gradient, saved and loaded", head=NO_HEAD)
def tied(case: Case) -> None:
    model = case.attached("tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    grads = gradients(model, "tied")
    assert ("model.embed_tokens.weight" in grads) == (case.column == "full")
    model.save_pretrained(case.tmp / "out")
    fresh = base("tied")
    dt.load(fresh, case.tmp / "out")
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(outputs(fresh, "tied"), outputs(model, "tied"))


@row(TABLES, "`tie_weights()` after attach", head=NO_HEAD)
def tie_again(case: Case) -> None:
    model = case.attached("tied")
    want = outputs(model, "tied")
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(outputs(model, "tied"), want)


@row(
    TABLES,
    "`model.to(torch.bfloat16)` after attach",
    Documented(
        "casts the adapter's tensors too: the outputs agree within bf16's rounding, and training goes on in bf16"
    ),
)
def to_bf16(case: Case) -> None:
    model = base()
    adapter = case.attach(model)
    want = outputs(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert close(outputs(model).float(), want, 0.05)
    gradients(model)


@row(
    TABLES,
    "a bfloat16 base, then attach: the adapter is fp32, and so are its gradients",
    full=Documented("trains the base's own bfloat16 tensors"),
)
def bf16_base(case: Case) -> None:
    model = base().to(torch.bfloat16)
    adapter = case.attach(model)
    dtype = torch.bfloat16 if case.column == "full" else torch.float32
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    assert {g.dtype for g in gradients(model).values()} == {dtype}
    assert outputs(model).dtype == torch.bfloat16


@row(TABLES, "`torch.autocast(bfloat16)` around forward and backward")
def autocast(case: Case) -> None:
    model = case.attached()
    with torch.autocast("cpu", torch.bfloat16):
        assert close(outputs(model).float(), outputs(case.attached()).float(), 0.05)
        gradients(model)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@cells(__name__)
def test_cell(name: str, column: str, tmp_path: Path) -> None:
    check_cell(name, column, tmp_path)


def test_compile_and_checkpointing_keep_a_user_hook() -> None:
    """Enabling checkpointing does not take away what the user asked for herself."""
    model = base()
    model.enable_input_require_grads()
    dt.attach(model, "lora", r=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model._require_grads_hooks
    layer: nn.Module = model.get_input_embeddings()
    assert layer(batch()["input_ids"]).requires_grad
