"""LoRA-FA: what it keeps for the backward, and its corrected gradient beside HF PEFT's optimiser, step by step."""

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 12, generator=generator), torch.randn(6, 9, generator=generator)


def both(rslora: bool = False, **hyper: Any) -> tuple[Any, nn.Module, dt.Adapter]:
    """HF PEFT's LoRA and ours with its A."""
    cfg = peft.LoraConfig(target_modules=["one", "two"], r=4, lora_alpha=6, use_rslora=rslora)
    theirs: Any = peft.get_peft_model(Net(), cfg)
    model = Net()
    power = 0.5 if rslora else 1.0
    options: dict[str, Any] = {"r": 4, "alpha": 6.0, "power": power, **hyper}
    adapter = dt.attach(model, "lora_fa", where=["one", "two"], head=None, **options)
    for d, name in zip(adapter.deltas.values(), ("one", "two"), strict=True):
        d.a.copy_(getattr(theirs.base_model.model, name).lora_A["default"].weight.detach())  # type: ignore[operator]
    return theirs, model, adapter


@pytest.mark.parametrize("rslora", [False, True])
def test_corrected_as_hf_peft_steps(rslora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of `LoraFAOptimizer`, which rounds the corrected gradient to bf16 where the machine knows that."""
    theirs, model, adapter = both(rslora, corrected=True)
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-2)
    optimizer = torch.optim.AdamW(adapter.groups(1e-2), eps=1e-15)
    other.param_groups[0]["eps"] = 1e-15  # AdamW adds eps behind its correction of the moments, theirs before
    schedule = adapter.schedule
    schedule.begin(optimizer, 8)
    yours = [p for n, p in theirs.named_parameters() if p.requires_grad and "lora_B" in n]
    base = [p for n, p in theirs.named_parameters() if "lora" not in n and p.requires_grad]
    assert not base and len(yours) == len(adapter.parameters()) == 2
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    for step in range(8):
        x, target = batch(step)
        for net in (model, theirs):
            (net(x) - target).square().mean().backward()
        schedule.before_step(step)
        for opt in (optimizer, other):
            opt.step()
            opt.zero_grad()
        for b, p in zip(adapter.parameters(), yours, strict=True):
            torch.testing.assert_close(b, p, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
    assert (model(x) - Net()(x)).abs().max() > 0.1


def test_corrected_is_nearest_to_the_whole_weights_gradient() -> None:
    """s g_B' A is the least-squares fit, among all s G A, of the gradient that the whole weight would have."""
    _, model, adapter = both(corrected=True)
    x, target = batch(0)
    (model(x) - target).square().mean().backward()
    adapter.schedule.before_step(0)
    model_full = Net()
    (model_full(x) - target).square().mean().backward()
    for d, layer in zip(adapter.deltas.values(), (model_full.one, model_full.two), strict=True):
        a, full = d.a, layer.weight.grad
        assert isinstance(a, Tensor) and full is not None
        want = torch.linalg.lstsq(d.scale * a.t(), full.t()).solution.t()  # type: ignore[operator]
        torch.testing.assert_close(d.b.grad, want, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_corrected_once() -> None:
    """Two backward passes of half the batch and one step are one pass of all of it."""
    found = []
    for parts in (1, 2):
        _, model, adapter = both(corrected=True)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1)
        x, target = batch(0)
        for rows in torch.arange(6).chunk(parts):
            ((model(x[rows]) - target[rows]).square().mean() / parts).backward()
        adapter.schedule.before_step(0)
        found.append([p.grad for p in adapter.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def kept(method: str, **hyper: Any) -> int:
    """Bytes of the activations that one forward of a small Llama keeps for the backward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    model.requires_grad_(False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    if method:
        adapter = dt.attach(model, method, where="all-linear", head=None, **hyper)
        state = [*adapter.parameters(), *(d.a for d in adapter.deltas.values() if isinstance(d, dt.LoRAFA))]
        own |= {t.untyped_storage().data_ptr() for t in state}  # type: ignore[union-attr]
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage()
        if place.data_ptr() not in own:
            sizes[place.data_ptr()] = place.nbytes()
        return t

    embedded = model.get_input_embeddings()(torch.arange(32)[None].repeat(4, 1)).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(inputs_embeds=embedded).logits
    del out
    return sum(sizes.values())


def test_it_saves_the_input_of_each_layer() -> None:
    """Of what LoRA keeps beyond the frozen model (x at each layer), at least 90 % goes: A x (r numbers a token) stays."""
    floor, lora, fa = kept(""), kept("lora", r=2), kept("lora_fa", r=2)
    assert lora > 1.05 * floor
    assert lora - fa >= 0.9 * (lora - floor), f"floor {floor}, lora {lora}, lora_fa {fa}"


def test_only_b_trains_and_a_is_in_the_file() -> None:
    _, _, adapter = both()
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"b"}
    assert {k.rpartition(".")[2] for k in adapter.state_dict()} == {"a", "b"}
    assert adapter.params() == 4 * (20 + 9)
    with pytest.raises(ValueError, match="alpha = 0 leaves no gradient to correct"):
        dt.attach(Net(), "lora_fa", where=["one"], alpha=0.0, corrected=True, head=None)
