"""Forward and gradients beside HF PEFT's on one small Llama; beside the equation where HF PEFT has no such method."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_lora_curve.py"))
llama, spread = MAKE["llama"], MAKE["spread"]
IDS = MAKE["batches"]()[0][:, :12]
N, KV_HEADS, D_HEAD = 3, 2, 8


def filled(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters, given values by their order."""
    with torch.no_grad():
        for i, p in enumerate(named.values()):
            p.copy_(spread(p.shape, 100 + i, 0.3))
    return named


def copied(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    """Give theirs the values of ours."""
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a.view(b.shape))


def grads(logits: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of the cross entropy of each next token."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return [g.detach() for g in torch.autograd.grad(loss, parameters)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def theirs(config: str, **options: Any) -> nn.Module:
    """HF PEFT on the same start; skipped where it is not installed."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model: nn.Module = peft.get_peft_model(llama(), getattr(peft, config)(task_type="CAUSAL_LM", **options)).eval()
    return model


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_LAYERS: dict[str, tuple[dt.LoRA, str, dict[str, Any]]] = {  # type: ignore[valid-type]
    "lora q, v": (dt.LoRA(r=4, alpha=6.0, where="q,v"), "LoraConfig",
                  {"r": 4, "lora_alpha": 6.0, "target_modules": ["q_proj", "v_proj"]}),
    "lora all-linear": (dt.LoRA(r=4, where="all-linear"), "LoraConfig",
                        {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
    "ia3": (dt.IA3(), "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ia3 defaults": (dt.IA3(), "IA3Config", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_LAYERS)
def test_in_layers(case: str) -> None:
    tree, config, options = IN_LAYERS[case]
    model, other = llama(), theirs(config, **options)
    adapter = dt.attach(model, tree)
    mine = list(filled(dict(adapter.named_parameters())).values())
    yours = [p for p in other.parameters() if p.requires_grad]
    copied(mine, yours)
    a, b = model(IDS).logits, other(input_ids=IDS).logits
    assert (a - llama()(IDS).logits).abs().max() > 0.1
    close(a, b)
    for g, h in zip(grads(a, mine), grads(b, yours), strict=True):
        close(g, h.view(g.shape))


def test_prompt_tuning() -> None:
    model, other = llama(), theirs("PromptTuningConfig", num_virtual_tokens=N)
    adapter = dt.attach(model, "prompt_tuning", n=N)
    mine = list(filled(dict(adapter.named_parameters())).values())
    yours = [p for p in other.parameters() if p.requires_grad]
    copied(mine, yours)
    a, b = model(IDS).logits, other(input_ids=IDS).logits
    assert (a.shape[1], b.shape[1]) == (12, 12 + N), "ours has the user's own length, theirs the soft tokens in front"
    close(a, b[:, N:])
    close(grads(a, mine)[0], grads(b[:, N:], yours)[0])


def prefixes() -> tuple[nn.Module, list[nn.Parameter], nn.Module, nn.Parameter]:
    """Ours and theirs with equal keys and values: theirs is one (n, layers * 2 * heads * d) table."""
    model, other = llama(), theirs("PrefixTuningConfig", num_virtual_tokens=N)
    adapter = dt.attach(model, "prefix_tuning", n=N)
    mine = list(filled(dict(adapter.named_parameters())).values())  # key and value of each layer, (heads, n, d)
    (table,) = (p for p in other.parameters() if p.requires_grad)
    with torch.no_grad():
        table.copy_(as_table(mine))
    return model, mine, other, table


def as_table(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.detach().transpose(0, 1) for t in tensors], 1).reshape(N, -1)


def test_prefix_tuning() -> None:
    """Equal with the tokens at positions n, n + 1, ...: theirs puts the prefix into the cache, which shifts them."""
    model, mine, other, table = prefixes()
    shifted = (torch.arange(IDS.shape[1]) + N).expand_as(IDS)
    a, b = model(IDS, position_ids=shifted).logits, other(input_ids=IDS).logits
    close(a, b)
    close(as_table(grads(a, mine)), grads(b, [table])[0])


def test_prefix_tuning_positions() -> None:
    """Ours leaves the tokens where they are. Rotary scores among them are the same, with a prefix they are not."""
    model, _, other, _ = prefixes()
    shifted = (torch.arange(IDS.shape[1]) + N).expand_as(IDS)
    bare = llama()
    close(bare(IDS).logits, bare(IDS, position_ids=shifted).logits)
    assert (model(IDS).logits - other(input_ids=IDS).logits).abs().max() > 1e-2


def by_hand(change: Callable[[str, nn.Module], None], roles: tuple[str, ...]) -> nn.Module:
    """The base with `change` at every module whose last name is in `roles`."""
    model = llama()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in roles:
            change(name, module)
    return model


def test_bitfit() -> None:
    """A bias of its own on every linear layer; Llama's norms have no place for one."""
    model = llama()
    adapter = dt.attach(model, "bitfit")
    named = filled(dict(adapter.named_parameters()))
    assert [n for n in named if "norm" in n] == []
    biases = {n: nn.Parameter(p.detach().clone()) for n, p in named.items()}

    def change(name: str, module: nn.Module) -> None:
        module.bias = biases[f"0.{name}.d"]

    other = by_hand(change, tuple(ALL))
    a, b = model(IDS).logits, other(IDS).logits
    close(a, b)
    for g, h in zip(grads(a, list(named.values())), grads(b, [biases[n] for n in named]), strict=True):
        close(g, h)


def test_sequential() -> None:
    """y + U relu(D y + c) + e behind `o_proj` and `down_proj`."""
    model = llama()
    adapter = dt.attach(model, "sequential", r=5)
    named = filled(dict(adapter.named_parameters()))
    own = {n: nn.Parameter(p.detach().clone()) for n, p in named.items()}

    def change(name: str, module: nn.Module) -> None:
        d, c, u, e = (own[f"0.{name}.{key}"] for key in ("down", "down_bias", "up", "up_bias"))
        module.register_forward_hook(lambda _, args, y: y + F.relu(y @ d.T + c) @ u.T + e)

    other = by_hand(change, ("o_proj", "down_proj"))
    a, b = model(IDS).logits, other(IDS).logits
    close(a, b)
    for g, h in zip(grads(a, list(named.values())), grads(b, [own[n] for n in named]), strict=True):
        close(g, h)
