"""FAR: the paper has no code, so priming, choice and slices are done a second time on whole matrices under a mask."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Phi3Config, Phi3Model

import deltatune as dt
from deltatune.core.ragged import refill

SIZES = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
N_STEPS, PRIME, KEEP, LR = 6, 2, 0.3, 1e-2
ARCHS = ["bert", "llama", "phi3"]  # two matrices with biases; three; two, the first of them fused
WIDENING = {"bert": ["intermediate.dense"], "llama": ["gate_proj", "up_proj"], "phi3": ["gate_up_proj"]}
NARROWING = {"bert": "output.dense", "llama": "down_proj", "phi3": "down_proj"}


def base(arch: str) -> Any:
    torch.manual_seed(0)
    model: nn.Module
    if arch == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
        model = BertModel(BertConfig(**SIZES, **quiet), add_pooling_layer=False)
    else:
        config, cls = (LlamaConfig, LlamaModel) if arch == "llama" else (Phi3Config, Phi3Model)
        model = cls(config(**SIZES, pad_token_id=0, initializer_range=0.3))
    return model.double().train()


def loss(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    ids = torch.randint(1, 30, (6, 5), generator=torch.Generator().manual_seed(step))
    out: Tensor = model(input_ids=ids[part]).last_hidden_state
    return (out - 0.4).square().mean()


def ours(arch: str, n_micro: int = 1, **hyper: Any) -> Iterator[tuple[int, Any, dt.Adapter, torch.optim.Optimizer]]:
    model = base(arch)
    adapter = dt.attach(model, "far", **{"keep": KEEP, "prime": PRIME} | hyper, head=None)
    optimizer = torch.optim.AdamW(adapter.groups(LR))
    schedules = dt.Schedules([adapter])
    schedules.begin(optimizer, N_STEPS, n_micro)
    for step in range(N_STEPS):
        for i in range(n_micro):
            (loss(model, step, slice(i, None, n_micro)) / n_micro).backward()
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
        yield step, model, adapter, optimizer
    schedules.end()


def mlps(arch: str, model: nn.Module) -> list[dict[str, nn.Module]]:
    """The matrices of each block's MLP by name."""
    ends = (*WIDENING[arch], NARROWING[arch])
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if name.endswith(ends) and "attention" not in name:
            found.setdefault(name.split("layer")[1].split(".")[1] + name.split("layers")[-1][:2], {})[name] = module
    assert len(found) == 2
    return list(found.values())


class Plain:
    """Whole matrices trained by an AdamW written out, their frozen nodes set back after each step."""

    def __init__(self, arch: str) -> None:
        self.arch, self.model = arch, base(arch)
        self.mlps = mlps(arch, self.model)
        self.trained = []
        for mlp in self.mlps:
            for name, module in mlp.items():
                self.trained.append(module.weight)
                if not name.endswith(NARROWING[arch]) and module.bias is not None:
                    self.trained.append(module.bias)
        self.start = {id(p): p.detach().clone() for p in self.trained}
        self.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in self.trained}
        self.kept: list[Tensor] = []

    def by_node(self, name: str, t: Tensor) -> Tensor:
        """(20, ...), a view."""
        if name.endswith(NARROWING[self.arch]):
            return t.t()
        return t.unflatten(0, (2, 20)).transpose(0, 1) if self.arch == "phi3" else t

    def step(self, step: int) -> None:
        grads = torch.autograd.grad(loss(self.model, step), self.trained)
        with torch.no_grad():
            for p, g in zip(self.trained, grads, strict=True):
                first, second = self.moments[id(p)]
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                t = step + 1
                p -= LR * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            if step + 1 == PRIME:
                self.kept = [self.choice(mlp) for mlp in self.mlps]
            for mlp, kept in zip(self.mlps, self.kept, strict=bool(self.kept)):
                frozen = [j for j in range(20) if j not in kept.tolist()]
                for name, module in mlp.items():
                    for p in (module.weight, module.bias):
                        if p is not None and id(p) in self.start:
                            self.by_node(name, p)[frozen] = self.by_node(name, self.start[id(p)])[frozen]

    def choice(self, mlp: dict[str, nn.Module]) -> Tensor:
        """The 6 of 20 nodes that moved farthest."""
        far = torch.zeros(20, dtype=torch.float64)
        for name, module in mlp.items():
            for p in (module.weight, module.bias):
                if p is not None and id(p) in self.start:
                    far += self.by_node(name, (p - self.start[id(p)]).abs()).reshape(20, -1).sum(1)
        return far.topk(6).indices.sort().values


@pytest.mark.parametrize("arch", ARCHS)
def test_against_the_plain_one(arch: str) -> None:
    """The same nodes of each MLP, and the same matrices after each step."""
    plain = Plain(arch)
    for step, model, adapter, _ in ours(arch):
        plain.step(step)
        if step + 1 < PRIME:
            assert {len(d.nodes) for d in adapter.deltas.values()} == {20}
        elif step + 1 == PRIME:
            for mlp, kept in zip(plain.mlps, plain.kept, strict=True):
                for name in mlp:
                    assert adapter.deltas["0", name].nodes.tolist() == kept.tolist()
            assert plain.kept[0].tolist() != plain.kept[1].tolist()
        with torch.no_grad():
            for mlp in plain.mlps:
                for name, module in mlp.items():
                    layer = model.get_submodule(name)
                    weight, bias = adapter.deltas["0", name].fold(layer.weight, layer.bias)
                    torch.testing.assert_close(weight, module.weight.detach(), rtol=0, atol=1e-9)
                    assert bias is None or torch.allclose(bias, module.bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_and_file_fall_with_the_share(arch: str, tmp_path: Path) -> None:
    """6 of 20 nodes in the optimiser's moments and in the file, as small whole matrices."""
    sizes = {}
    for step, _, adapter, optimizer in ours(arch):
        sizes[step] = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)
        if step == 0:
            assert sizes[0] == 2 * adapter.params()
    assert sizes[N_STEPS - 1] == 2 * adapter.params() and 20 * sizes[N_STEPS - 1] == 6 * sizes[0]
    adapter.save(tmp_path)
    kept = load_file(tmp_path / "adapter.safetensors")
    shapes = {tuple(t.shape) for n, t in kept.items() if n.endswith(".w")}
    assert shapes == ({(12, 8), (6, 8)} if arch == "phi3" else {(6, 8)})
    again = base(arch).eval()
    dt.load(again, tmp_path)
    assert torch.equal(loss(again, 50), loss(adapter.model.eval(), 50))


def test_the_inputs_of_frozen_nodes_are_not_kept() -> None:
    """The narrowing matrix keeps its nodes' columns of the activations for the backward, and no others."""
    *_, (_, model, _, _) = ours("bert")
    sizes: list[tuple[int, ...]] = []
    narrow = model.encoder.layer[1].output.dense
    x = torch.randn(3, 5, 20, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        narrow(x)
    assert any(size[-1] == 6 for size in sizes) and not any(size == (3, 5, 20) or size == (15, 20) for size in sizes)


@pytest.mark.parametrize("arch", ["bert", "phi3"])
def test_accumulation_changes_nothing(arch: str) -> None:
    *_, (_, _, one, _) = ours(arch)
    *_, (_, _, three, _) = ours(arch, n_micro=3)
    for a, b in zip(one.deltas.values(), three.deltas.values(), strict=True):
        assert torch.equal(a.nodes, b.nodes)
        torch.testing.assert_close(a.w, b.w, rtol=1e-7, atol=1e-9)


class Wide(nn.Linear):
    """A layer whose output is fp32 under autocast too, as some quantised ones are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize("arch", ARCHS)
def test_bf16(arch: str) -> None:
    """A base in bf16, autocast, and layers in it that stay fp32: as the whole in fp32, roughly."""
    *_, (_, _, trained, _) = ours(arch)
    ids = torch.randint(1, 30, (6, 5), generator=torch.Generator().manual_seed(9))
    found = []
    for how in ("fp32", "autocast", "fp32 layers in it", "bf16"):
        model = base(arch).to(torch.bfloat16 if how == "bf16" else torch.float32).eval()
        for name, module in model.named_modules():
            if how == "fp32 layers in it" and name.endswith(tuple(WIDENING[arch])) and "attention" not in name:
                module.__class__ = Wide
        adapter = dt.attach(model, "far", head=None)
        for key, d in adapter.deltas.items():
            for slot in ("nodes", *dict(d.named_parameters())):
                refill(d, slot, getattr(trained.deltas[key], slot).detach())
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="fp32" != how != "bf16"):
            found.append(model(input_ids=ids).last_hidden_state.detach())
    for out in found[1:]:
        torch.testing.assert_close(out.float(), found[0], rtol=0, atol=0.1)
    assert found[-1].dtype == torch.bfloat16


def test_a_file_trains_on_with_its_nodes(tmp_path: Path) -> None:
    """They are not cut a second time, and steps may be few."""
    *_, (_, _, adapter, _) = ours("bert")
    adapter.save(tmp_path)
    for n_steps in (N_STEPS, PRIME):
        model = base("bert")
        loaded = dt.load(model, tmp_path, trainable=True)
        optimizer, schedule = torch.optim.AdamW(loaded.groups(LR)), loaded.schedule
        schedule.begin(optimizer, n_steps)
        for step in range(n_steps):
            loss(model, step).backward()
            schedule.before_step(step)
            optimizer.step()
            schedule.after_step(step)
            optimizer.zero_grad()
        for key, d in loaded.deltas.items():
            assert torch.equal(d.nodes, adapter.deltas[key].nodes) and not torch.equal(d.w, adapter.deltas[key].w)


def test_one_priming_and_one_share_of_an_mlp() -> None:
    for key, values in (("prime", (0.1, 0.2)), ("keep", (0.1, 0.2))):
        where = {place: {key: value} for place, value in zip(("mlp.up", "mlp.down"), values, strict=True)}
        adapter = dt.attach(base("bert"), "far", where=where, head=None)
        with pytest.raises(ValueError, match=f"far has one {key} for all its sites, not 0.1 at encoder.layer.0.inter"):
            adapter.schedule.begin(torch.optim.SGD(adapter.parameters()), 9)


def test_refusals() -> None:
    for key, value in (("keep", 0.0), ("keep", 1.5), ("prime", -1.0)):
        with pytest.raises(ValueError, match=f"far: {key} = {value}, but"):
            dt.FAR(**{key: value})
    with pytest.raises(ValueError, match="prime = 6 steps leave none of 6"):
        next(ours("bert", prime=6))
    delta = next(iter(dt.attach(base("bert"), "far", head=None).deltas.values()))
    good = {"nodes": torch.tensor([1, 4], dtype=torch.int32), "w": torch.zeros(2, 8), "d": torch.zeros(2)}
    delta.check_ragged(good)
    with pytest.raises(ValueError, match="nodes must ascend within the 20"):
        delta.check_ragged(good | {"nodes": torch.tensor([4, 1], dtype=torch.int32)})
    for wrong in (
        {"w": torch.zeros(3, 8)}, {"w": torch.zeros(2)}, {"d": torch.zeros(3)}, {"d": torch.zeros(2, 2)},
        {"nodes": good["nodes"][:, None]}, {"nodes": good["nodes"].long()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="are no nodes of width 8"):
            delta.check_ragged(good | wrong)
