"""What HyperFormer's reference modules compute on the sub-layers of a T5, in fp64.

    python tests/golden/make_hyperformer.py REFERENCE

where REFERENCE is GitHub's rabeehk/hyperformer at COMMIT and python is this repository's. The reference's own T5 is of
transformers 3.5.1; its adapters are plain torch, and stand here on transformers' T5 where the reference has them: on
what self-attention and MLP give, in front of dropout and residual add. The reference runs one task a batch; it runs
on `batch` once under each task, and row i is kept of task i. The file writes tests/golden/hyperformer.json:

    bare           the decoder's last hidden states (3, 4, D) of the plain `backbone` on `batch`
    hyperformer    {states, loss, probes}: MetaAdapterController in every place, conditional norms, embeddings projected
    hyperformer++  {states, loss, probes}: one AdapterLayersOneHyperNetController a stack
    start          {name: [mean, std]} of the reference's own start, for tensors of a wide adapter

loss is sum(fill("loss") * states); probes holds, for the gradient g of each of our tensors, sum(fill("probe of " + key)
* g).
No weight is stored: each is `fill` of its name.
"""

import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("hyperformer.json")
COMMIT = "56b0f993eeec62f5a8c962704739912b5f039a9b"
D, LAYERS, R, TASKS = 8, 2, 2, 3
SIZES = {"d_task": 5, "d_hidden": 6, "d_code": 4}
STACKS = ("encoder", "decoder")
PLACES = ("attn.o", "mlp.down")


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The tensor of that name: multiples of the golden ratio modulo 1, even over (-0.4, 0.4), exact on every machine.

    Vectors called weight or gain lie around 1, as a norm's do.
    """
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    spread = (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * 0.4).float().view(shape)
    return (spread + (len(shape) == 1 and key.endswith(("weight", "gain")))).double()


def backbone() -> Any:
    """T5 of two layers a stack, in fp64 and without dropout."""
    from transformers import T5Config, T5Model

    sizes = {"vocab_size": 30, "d_model": D, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": LAYERS}
    model = T5Model(T5Config(**sizes, dropout_rate=0.0, use_cache=False)).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(fill(key, p.shape))
    return model


def batch() -> dict[str, Tensor]:
    """Three rows, two of them padded on the right."""
    k = torch.arange(3 * 5).view(3, 5)
    mask = torch.stack([(torch.arange(5) < n).long() for n in (5, 3, 4)])
    return {
        "input_ids": (1 + (5 * k + 3) % 29) * mask,
        "attention_mask": mask,
        "decoder_input_ids": 1 + (7 * k[:, :4] + 2) % 29,
    }


def states(model: nn.Module, **own: Any) -> Tensor:
    """The decoder's last hidden states."""
    out: Tensor = model(**batch(), **own).last_hidden_state
    return out


def listed(t: Tensor) -> Any:
    """Nested lists of numbers with twelve digits."""
    return [listed(part) for part in t] if t.ndim else float(f"{t.item():.12g}")


def places(model: Any) -> Iterator[tuple[str, int, str, nn.Module]]:
    """(stack, layer, place, the module whose output the adapter there gets)."""
    for stack in STACKS:
        for i, block in enumerate(getattr(model, stack).block):
            for place, module in zip(
                PLACES, (block.layer[0].SelfAttention.o, block.layer[-1].DenseReluDense.wo), strict=True
            ):
                yield stack, i, place, module


def config(projected: bool, d: int = D, sizes: dict[str, int] = SIZES, r: int = R) -> Any:
    """The reference's, as its published configurations have it, but for the sizes."""
    from hyperformer.adapters import MetaAdapterConfig

    found = MetaAdapterConfig()
    found.input_dim, found.reduction_factor, found.device = d, d // r, torch.device("cpu")
    found.tasks, found.task_to_embeddings, found.task_to_adapter = [str(i) for i in range(TASKS)], None, None
    found.non_linearity, found.conditional_layer_norm, found.train_task_embeddings = "gelu_new", True, projected
    found.task_embedding_dim, found.task_hidden_dim = sizes["d_task"], sizes["d_hidden"]
    found.projected_task_embedding_dim = sizes["d_code"]
    return found


Tensors = dict[str, list[nn.Parameter]]  # our tensor -> the reference's, one under the other


def made_by(down: Any, up: Any, norm: Any) -> list[Any]:
    """The reference's matrices that make D, c, U, e, gain and offset, in our order."""
    nets = [net for sampler in (down, up) for net in (sampler.weight_generator[0], sampler.bias_generator[0])]
    return [*nets, norm.weight_generator, norm.bias_generator]


def projector(net: Any, at: str = "") -> Tensors:
    """The two layers of h_I."""
    first, _, second = net.task_embeding_generator
    return {
        f"{at}inner": [first.weight],
        f"{at}inner_bias": [first.bias],
        f"{at}outer": [second.weight],
        f"{at}outer_bias": [second.bias],
    }


def hyperformer(model: Any) -> tuple[Tensors, Callable[[str], None]]:
    """The reference's modules on `model`: their parameters by our names, and what sets the task."""
    from hyperformer.adapters import MetaAdapterController, TaskEmbeddingController

    tasks, now = TaskEmbeddingController(config(True)), {"task": "0"}
    found = {"task": list(tasks.task_to_embeddings.values())} | projector(tasks.task_hyper_net)
    for stack, i, place, module in places(model):
        own = MetaAdapterController(config(True))
        nets = made_by(own.meta_down_sampler, own.meta_up_sampler, own.post_layernorm_hypernet)
        found[f"{stack}.{i}.{place}.maker"] = [net.weight for net in nets]
        found[f"{stack}.{i}.{place}.maker_bias"] = [net.bias for net in nets]
        module.register_forward_hook(lambda m, args, y, own=own: own(tasks(now["task"]), y))
    return found, lambda task: now.update(task=task)


def hyperformer_plus(model: Any) -> tuple[Tensors, Callable[[str], None]]:
    """The same of the variant with one hypernetwork a stack."""
    from hyperformer.adapters import (
        AdapterLayersOneHyperNetController,
        MetaLayersAdapterController,
        TaskEmbeddingController,
    )

    tasks, now = TaskEmbeddingController(config(False)), {"task": "0"}
    found: Tensors = {"task": list(tasks.task_to_embeddings.values())}
    adapter = MetaLayersAdapterController(config(False))
    nets: dict[str, Any] = {}
    for stack in STACKS:
        nets[stack] = net = AdapterLayersOneHyperNetController(config(False), LAYERS)
        made = made_by(net.down_sampler_hyper_net, net.up_sampler_hyper_net, net.post_layernorm_hypernet)
        found |= projector(net.task_hypernet, f"{stack}.")
        found |= {f"{stack}.maker": [m.weight for m in made], f"{stack}.maker_bias": [m.bias for m in made]}
        found |= {f"{stack}.gain": [net.LayerNorm.weight], f"{stack}.offset": [net.LayerNorm.bias]}
        found[f"{stack}.layers"], found[f"{stack}.places"] = (
            [net.layer_id_embeddings.weight],
            [net.adapters_block_type.weight],
        )
    for stack, i, place, module in places(model):
        word = {"attn.o": "self_attention", "mlp.down": "feed_forward"}[place]

        def hook(m: Any, args: Any, y: Tensor, stack: str = stack, i: int = i, word: str = word) -> Tensor:
            out: Tensor = adapter(y, getattr(nets[stack](tasks(now["task"]), i), word))
            return out

        module.register_forward_hook(hook)
    return found, lambda task: now.update(task=task)


def whole(tensors: list[Any]) -> Tensor:
    """Several tensors as one: embeddings of tasks as rows, parts of a matrix one under the other."""
    return torch.stack(tensors) if tensors[0].ndim == 1 and len(tensors) == TASKS else torch.cat(tensors)


def adapted(make: Callable[[Any], tuple[Tensors, Callable[[str], None]]]) -> dict[str, Any]:
    """States, loss and gradients under the reference's modules."""
    model = backbone()
    found, set_task = make(model)
    every = {id(p): p for parts in found.values() for p in parts}
    for p in every.values():
        p.data = p.data.double()
    with torch.no_grad():
        for key, parts in found.items():
            value = fill(key, whole(parts).shape)
            pieces = value.unbind() if key == "task" else value.split([len(p) for p in parts])
            for p, piece in zip(parts, pieces, strict=True):
                p.copy_(piece)
    rows = []
    for i in range(TASKS):
        set_task(str(i))
        rows.append(states(model)[i])
    seen = torch.stack(rows)
    loss = (fill("loss", seen.shape) * seen).sum()
    loss.backward()
    probes: dict[str, float] = {}
    for key, parts in found.items():
        grad = whole([torch.zeros_like(p) if p.grad is None else p.grad for p in parts])
        probes[key] = (fill(f"probe of {key}", grad.shape) * grad).sum().item()
    return {"states": listed(seen), "loss": loss.item(), "probes": probes}


def start() -> dict[str, list[float]]:
    """How the reference's tensors start."""
    from hyperformer.adapters import AdapterLayersOneHyperNetController, TaskEmbeddingController

    torch.manual_seed(0)
    sizes = {"d_task": 256, "d_hidden": 128, "d_code": 64}
    tasks = TaskEmbeddingController(config(False, 64, sizes, 8))
    net: Any = AdapterLayersOneHyperNetController(config(False, 64, sizes, 8), 8)
    made = made_by(net.down_sampler_hyper_net, net.up_sampler_hyper_net, net.post_layernorm_hypernet)
    found = {key: parts[0] for key, parts in projector(net.task_hypernet).items()}
    found |= {"task": whole(list(tasks.task_to_embeddings.values())), "maker": whole([m.weight for m in made])}
    found |= {"maker_bias": whole([m.bias for m in made]), "gain": net.LayerNorm.weight, "offset": net.LayerNorm.bias}
    found |= {"layer": net.layer_id_embeddings.weight, "place": net.adapters_block_type.weight}
    return {key: [t.mean().item(), t.std().item()] for key, t in found.items()}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    card: dict[str, Any] = {
        "command": "python tests/golden/make_hyperformer.py REFERENCE",
        "reference": {"repository": "rabeehk/hyperformer", "commit": COMMIT},
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "start": start(),
    }
    with torch.no_grad():
        card["bare"] = listed(states(backbone()))
    card |= {"hyperformer": adapted(hyperformer), "hyperformer++": adapted(hyperformer_plus)}
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
