"""What AdapterHub's `adapters` computes for Compacter: states and gradients, from weights that are formulas.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0                   # first, so that no other package chooses its build
    ENV/bin/pip install 'adapters==1.3.*' torch==2.13.0
    ENV/bin/python tests/golden/make_compacter.py REFERENCE

REFERENCE is a clone of GitHub's rabeehk/compacter at COMMIT. The script writes tests/golden/compacter.json, in fp64, with
the backbones and the batch of make_adapters.py. For each of BACKBONES and each of CONFIGS:

    states  the last hidden states
    loss    sum(fill("loss") * states)
    probes  of the gradient g of each tensor of the adapter: sum(fill("probe of " + key) * g)

and under "module", for the paper's own HyperComplexAdapter on a matrix fill("x"), its output and the same probes, x's too.
"module" also holds the spread of its start: the bound of its factors, and the standard deviation of the shared rule.
"""

import importlib.metadata
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "compacter.json"
ADAPTERS = runpy.run_path(str(HERE / "make_adapters.py"))
COMMIT = "e123daaaee59488e305297b9685c084edc07b5c0"
D, R, N = ADAPTERS["D"], 8, 4  # model's width, bottleneck's, Kronecker products
BACKBONES = ("bert", "llama", "t5")
CONFIGS = ("compacter", "compacter++", "compacter++ before the add")
PARTS = {"W_left": "left", "W_right": "right", "b": "bias"}  # a PHM layer's tensors, as they are called here
place = ADAPTERS["place"]


def fill(key: str, shape: Any) -> Tensor:
    """The tensor of that name, in fp64."""
    value: Tensor = ADAPTERS["fill"](key, shape).double()
    return value


def backbone(name: str) -> nn.Module:
    """The backbone of make_adapters.py in fp64."""
    model: nn.Module = ADAPTERS["backbone"](name).double()
    return model


def probes(tensors: dict[str, Tensor], loss: Tensor) -> dict[str, float]:
    """The probe of each tensor's gradient."""
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return {key: float((fill(f"probe of {key}", g.shape) * g).sum()) for key, g in zip(tensors, grads, strict=True)}


def looked(states: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What is compared, of states that carry a graph."""
    loss = (fill("loss", states.shape) * states).sum()
    return {"loss": float(loss.detach()), "probes": probes(tensors, loss)}


def states(model: nn.Module, name: str) -> Tensor:
    """The last hidden states, of T5 the decoder's, with their graph."""
    out: Tensor = model(**ADAPTERS["batch"](name))[0]
    return out


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's one adapter by the golden's names."""
    from adapters.methods.modeling import Adapter

    found: dict[str, Tensor] = {"rule": model.shared_parameters["a"]["phm_rule"]}  # type: ignore[index, union-attr]
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            for word, layer in (("down", module.adapter_down[0]), ("up", module.adapter_up)):
                found |= {f"{place(path)}.{word}_{to}": getattr(layer, of) for of, to in PARTS.items()}
    return found


def configs() -> dict[str, Any]:
    """Each configuration; the last is where the paper's code has Compacter++, on the MLP's output alone."""
    from adapters.configuration.adapter_config import CompacterConfig, CompacterPlusPlusConfig

    wide: dict[str, Any] = {"reduction_factor": D / R}
    return {
        "compacter": CompacterConfig(**wide),
        "compacter++": CompacterPlusPlusConfig(**wide),
        "compacter++ before the add": CompacterConfig(**wide, mh_adapter=False),
    }


def adapted(name: str, config: Any) -> dict[str, Any]:
    """States, loss and gradients under one configuration."""
    import adapters as ah

    model = backbone(name)
    ah.init(model)
    model.add_adapter("a", config=config)
    model.set_active_adapters("a")
    model.double().eval()
    tensors = tensors_of(model)
    with torch.no_grad():
        for key, p in tensors.items():
            p.copy_(fill(key, p.shape))
    out = states(model, name)
    return {"states": out.tolist(), **looked(out, tensors)}


def own_module(reference: str) -> dict[str, Any]:
    """The paper's own module, and how it starts."""
    root = Path(reference)
    for package in ("seq2seq", "seq2seq.adapters", "seq2seq.hypercomplex"):  # without the imports of their __init__
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(root / package.replace(".", "/"))]
    sys.path.insert(0, str(root / "seq2seq"))  # one file of it imports from there, where an `adapters` lies too
    from seq2seq.adapters.adapter_modeling import HyperComplexAdapter

    del sys.path[0]

    config = types.SimpleNamespace(
        input_dim=D, reduction_factor=D // R, non_linearity="gelu_new", phm_c_init="normal", hypercomplex_division=N,
        learn_phm=True, hypercomplex_nonlinearity="glorot-uniform", shared_phm_rule=True, factorized_phm=True,
        shared_W_phm=False, factorized_phm_rule=False, phm_rank=1, phm_init_range=1e-4, kronecker_prod=False,
    )  # fmt: skip
    module = HyperComplexAdapter(config)
    layers = {"down": module.down_sampler, "up": module.up_sampler}
    bounds = {}
    for word, layer in layers.items():
        for of, to in (("W_left", "left"), ("W_right", "right")):
            many = torch.empty(2000, *getattr(layer, of).shape)
            for one in many:
                layer.init_W()
                one.copy_(getattr(layer, of).detach())
            bounds[f"{word}_{to}"] = float(many.abs().max())
    module.double()
    tensors = {f"{word}_{to}": getattr(layer, of) for word, layer in layers.items() for of, to in PARTS.items()}
    rule = nn.Parameter(torch.empty(N, N, N, dtype=torch.float64))
    tensors["rule"] = rule
    for layer in layers.values():
        layer.set_phm_rule(phm_rule=rule)
    with torch.no_grad():
        for key, p in tensors.items():
            p.copy_(fill(key, p.shape))
    tensors["x"] = fill("x", (5, D)).requires_grad_()
    out = module(tensors["x"])
    return {"out": out.tolist(), **looked(out, tensors), "bounds": bounds}


if __name__ == "__main__":
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")}
    card: dict[str, Any] = {
        "command": "python tests/golden/make_compacter.py REFERENCE",
        "versions": versions,
        "reference": {"repository": "rabeehk/compacter", "commit": COMMIT},
        "module": own_module(sys.argv[1]),
    }
    for name in BACKBONES:
        card[name] = {key: adapted(name, config) for key, config in configs().items()}
    text = json.dumps(card, separators=(",", ":")).replace('},"', '},\n"')
    GOLDEN.write_text(text + "\n", encoding="utf-8")
