"""Peak memory of a training step, split, and what an estimate from the configuration alone says of it.

Full fine-tuning, LoRA and QLoRA on a Llama with random weights in bf16, 512 tokens, one and four rows, with checkpoints of the
activations and without. A step is forward, backward, AdamW, and gradients that are gone before the next; the second one is
measured. On a GPU the peak is the allocator's, and `activations` is what it holds beyond weights, gradients, moments and what the
method has of its own: where gradients come as activations go, as in full fine-tuning, it is nearly nothing. `accumulating` is the
peak of a second micro-batch, where all gradients stand from the first. On a CPU activations are what autograd saves, and the peak
is the sum.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bench import SHAPES, Options, Red, Row, batch, begun, benchmark, markdown, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.assess.measure import saved_bytes
from deltatune.quant.layers import options_of

RANK, FORMAT, GIB = 16, "bnb-nf4", 2**30
METHODS = ("full", "lora", "qlora")
ROWS = (1, 4)
PARTS = ("weights", "activations", "gradients", "optimiser", "method state")
PEAKS = ("peak", "accumulating")
TARGETS = {"7b": 1 / 3, "13b": 1 / 4}  # QLoRA over full fine-tuning, as 2312.12148 reports them


# --- the estimate ------------------------------------------------------------------------------------------------------


def kept(config: dict[str, int], method: str) -> tuple[float, float]:
    """Bytes that autograd keeps a token: of one layer, and above the layers without the loss.

    Hidden states are in bf16. A norm keeps its input in fp32 and its output, full fine-tuning also what its weight multiplies;
    the attention q, k, v, its output and the logarithms of its sums; the MLP both halves, the activated one and their product.
    """
    h, i, heads = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    narrow = h * config["num_key_value_heads"] // heads
    norm = 4 * h + 4 + 2 * h + (2 * h if method == "full" else 0)
    layer = 2 * norm + 2 * (2 * h + 2 * narrow) + 4 * heads + 4 * 2 * i
    if method == "full":
        return layer, norm
    return layer + 7 * 2 * RANK, 4 * h + 4  # a frozen head keeps no input


def estimate(config: dict[str, int], rows: int, tokens: int, checkpoints: bool, method: str) -> dict[str, float]:
    """Bytes of each part, and of the peak, of a step of `method` ("full", "lora", "qlora").

    The peak is the largest of these moments: the loss, with its logits in fp32 twice and their gradient; the backward of each
    layer, with the gradients of those above it; the end, with all gradients. `accumulating` is the peak where all gradients stand
    already, those of another micro-batch; `saved` what autograd keeps between forward and backward.
    """
    h, i, v, n_layers, heads = (
        config[k]
        for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
    )
    narrow = h * config["num_key_value_heads"] // heads
    shapes = [(h, h), (h, narrow), (h, narrow), (h, h), (h, i), (h, i), (i, h)]
    linear = sum(a * b for a, b in shapes)
    outside = 2 * v * h + h  # embeddings, head and last norm
    if method == "qlora":  # codes, a byte a block of 64, fp32 for 256 blocks, and the tables
        layer_bytes = linear * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + len(shapes) * 4 * (16 + 256 + 1) + 2 * 2 * h
    else:
        layer_bytes = 2.0 * (linear + 2 * h)
    pairs = RANK * sum(a + b for a, b in shapes)
    trained = 2.0 * (linear + 2 * h) if method == "full" else 4.0 * pairs  # bytes a layer: the deltas are in fp32
    above = 2.0 * outside if method == "full" else 0.0
    parts = {
        "weights": n_layers * layer_bytes + 2.0 * outside,
        "gradients": n_layers * trained + above,
        "optimiser": 2 * (n_layers * trained + above),
        "method state": 0.0 if method == "full" else n_layers * trained,
    }
    n = rows * tokens
    layer, top = kept(config, method)
    # the deltas in the activations' dtype, and A of q, k, v and of gate, up once more, one below the other
    casts = 0 if method == "full" else 2 * (pairs + 5 * RANK * h)
    whole = n * layer + casts
    work = n * (4 * i + 4 * h) + (2 * h * i if method == "qlora" else 0)  # gradients in flight; a weight as numbers
    under = n * 2 * h if checkpoints else whole  # what each layer that has not run backward holds
    # on a frozen base the first norm runs on what needs no gradient, unless checkpoints ask for one
    spared = 0 if checkpoints or method == "full" else n * (4 * h + 4)
    forward = n_layers * under - spared + n * top
    at_loss = forward + n * 12 * v
    moments, most = [at_loss, parts["gradients"]], at_loss
    for left in range(n_layers, 0, -1):
        held = (left - 1) * under - spared + whole + work + (n * 2 * h if checkpoints else 0)
        moments.append(held + (n_layers - left + 1) * trained + above / 2)
        most = max(most, held)
    parts["activations"] = max(moments) - parts["gradients"]
    parts["saved"] = forward + n * 4 * v  # with the logarithms of the softmax
    parts["peak"] = sum(parts[name] for name in PARTS)
    parts["accumulating"] = parts["peak"] - parts["activations"] + most
    return parts


# --- the measurement ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def base(shape: str, device: str, to: str | None = None) -> LlamaForCausalLM:
    """A Llama in bf16 with random weights, made on the device one layer after the other; its linear layers as `to`."""
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape].config, use_cache=False, pad_token_id=None))
    for name, module in list(model.named_modules()):
        for key, p in module._parameters.items():
            if p is not None:
                made = torch.randn(p.shape, device=device, dtype=torch.bfloat16).mul_(0.02)
                module._parameters[key] = nn.Parameter(
                    made if p.ndim > 1 else torch.ones_like(made), requires_grad=False
                )
        for key, t in module._buffers.items():
            module._buffers[key] = None if t is None else t.to(device)
        if to is not None and isinstance(module, nn.Linear) and name != "lm_head":
            kind, options = options_of(to, {})
            model.set_submodule(name, kind.make(module, **options))
    return model.train()


def nbytes(model: nn.Module) -> int:
    """Of all parameters, buffers and what a quantised weight has beside its codes."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        while state is not None:
            tensors += [state.absmax, state.code, getattr(state, "offset", None)]
            state = getattr(state, "state2", None)
    found = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor) and t.device.type != "meta"}
    return sum(found.values())


@contextmanager
def trained(model: Any, method: str, checkpoints: bool) -> Iterator[list[nn.Parameter]]:
    """What trains under the method, on the base and gone again."""
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = None
    if method == "full":
        model.requires_grad_(True)
    else:
        more = {"dropout": 0.0} if method == "qlora" else {}
        adapter = dt.attach(model, method, where="linear", r=RANK, **more)
    try:
        yield list(model.parameters()) if adapter is None else adapter.parameters()
    finally:
        if adapter is not None:
            adapter.detach()
        model.requires_grad_(False)
        if checkpoints:
            model.gradient_checkpointing_disable()
            model.get_input_embeddings()._forward_hooks.clear()  # it lets their output require a gradient, and leaves that


def measured(model: Any, method: str, checkpoints: bool, ids: Tensor) -> dict[str, float]:
    """Bytes of each part, and the peak of the second step. Raises Red where the step trains something else."""
    device, weights = ids.device.type, nbytes(model)
    with trained(model, method, checkpoints) as parameters:
        own = nbytes(model) - weights
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device == "cuda")

        def micro() -> None:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if not math.isfinite(float(loss.detach())) or any(p.grad is None for p in parameters):
                raise Red(f"{method}: the loss is {float(loss.detach())}, or something has no gradient")

        def step() -> None:
            micro()
            optimizer.step()
            optimizer.zero_grad()

        step()
        moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        parts = {
            "weights": weights, "gradients": sum(p.nbytes for p in parameters), "optimiser": moments, "method state": own
        }  # fmt: skip
        if device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            stands, said = torch.cuda.memory_allocated(), weights + own + moments
            if abs(stands - said) > 0.02 * said + GIB / 4:
                raise Red(f"{method}: {said / GIB:.2f} GiB are known between steps, {stands / GIB:.2f} GiB are there")
            peak = peak_of(step)
            parts["activations"] = peak - sum(parts.values())
            micro()
            accumulating = peak_of(micro)
        else:
            step()
            parts["activations"] = saved_bytes(model, {"input_ids": ids, "labels": ids})
            peak = accumulating = sum(parts.values())
    return parts | {"peak": peak, "accumulating": accumulating}


def peak_of(function: Callable[[], None]) -> int:
    """The most that the allocator held while it ran."""
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def row(options: Options, cell: dict[str, Any], found: dict[str, float] | None) -> Row:
    """A cell in GiB; one that did not fit has the estimate's numbers and says so."""
    n_tokens = SHAPES[options.shape].tokens
    said = estimate(SHAPES[options.shape].config, cell["rows"], n_tokens, cell["checkpoints"], cell["method"])
    if options.device == "cpu":  # what is counted there
        said |= {"activations": said["saved"]}
        said["peak"] = said["accumulating"] = sum(said[name] for name in PARTS)
    taken = said if found is None else found
    by = "estimate" if found is None else "measured" if options.device == "cuda" else "accounted"
    return {
        **cell,
        "by": by,
        **{name: taken[name] / GIB for name in (*PARTS, *PEAKS)},
        "estimated activations": said["activations"] / GIB,
        **{f"estimated {name}": said[name] / GIB for name in PEAKS},
        **{f"{name}'s error": said[name] / taken[name] - 1 for name in PEAKS},
    }


@benchmark("memory")
def memory(options: Options) -> list[Row]:
    """GiB of each part and of the peak, and the estimate's peak beside it."""
    rows = begun("memory", options)
    done = [{key: r[key] for key in ("rows", "checkpoints", "method")} for r in rows]
    ids = batch(options.shape, options.device)
    for methods, to in ((("lora", "full"), None), (("qlora",), FORMAT)):
        cells = [{"rows": n, "checkpoints": c, "method": m} for m in methods for n in ROWS for c in (True, False)]
        cells = [cell for cell in cells if cell not in done]
        model = base(options.shape, options.device, to) if cells else None
        for cell in cells:
            found = None
            with suppress(torch.OutOfMemoryError):  # what the step's frames held goes with the exception
                found = measured(model, cell["method"], cell["checkpoints"], ids[: cell["rows"]])
            assert model is not None
            for p in model.parameters():
                p.grad = None
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            rows.append(row(options, cell, found))
            write("memory", options, rows, done=False)
        del model
        gc.collect()
    rows.sort(key=lambda r: (r["rows"], not r["checkpoints"], METHODS.index(r["method"])))
    full = {(r["rows"], r["checkpoints"]): r for r in rows if r["method"] == "full"}
    return [r | {f"{p} x full": r[p] / full[r["rows"], r["checkpoints"]][p] for p in PEAKS} for r in rows]


# --- the page ----------------------------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """What a folder of results holds of the two shapes that have a target, for docs/quantised.md."""
    parts = []
    for shape, target in TARGETS.items():
        path = folder / f"memory-cuda-{shape}.json"
        if not path.is_file():
            continue
        card = json.loads(path.read_text(encoding="utf-8"))
        rows, tokens = card["rows"], SHAPES[shape].tokens
        done = [r for r in rows if r["by"] == "measured"]
        errors = [abs(r[f"{p}'s error"]) for r in done for p in PEAKS]
        worst = [max(r[f"{p} x full"] for r in rows if r["method"] == "qlora") for p in PEAKS]
        parts.append(
            f"**{shape.upper()}**, {tokens} tokens a row, GiB, {card['machine']['gpu']}. QLoRA has at most {worst[0]:.3f} of full "
            f"fine-tuning's peak, {worst[1]:.3f} while accumulating (to be met: {target:.3f}). The estimate is off by at most "
            f"{max(errors):.1%}, by {sum(errors) / len(errors):.1%} on average"
            + (f"; {len(rows) - len(done)} cells did not fit, and are the estimate's" if len(done) < len(rows) else "")
            + f". `{card['command']}`\n"
        )
        shown = [
            {"rows": r["rows"], "checkpoints": "yes" if r["checkpoints"] else "", "method": f"`{r['method']}`"}
            | {name: f"{r[name]:.2f}" for name in (*PARTS, "peak")}
            | {"estimated": f"{r['estimated peak']:.2f}", "x full": f"{r['peak x full']:.3f}"}
            | {"accumulating": f"{r['accumulating']:.2f}", "estimated ": f"{r['estimated accumulating']:.2f}"}
            | {"x full ": f"{r['accumulating x full']:.3f}"}
            for r in rows
        ]
        parts.append(markdown(shown))
    return "\n".join(parts)
