"""What MoV's and MoLoRA's reference modules compute, in fp64 but for the routers, which are fp32 there.

    python tests/golden/make_mov.py REFERENCE FLAXFORMER

where REFERENCE is GitHub's for-ai/parameter-efficient-moe at COMMIT and FLAXFORMER google/flaxformer at its own; needs jax and
flax, and no torch. Of flaxformer, whose other imports are gone, one class runs as it is. Writes tests/golden/mov.json:

    settings  {n_experts, r, heads, d_head, d_in, d_out, shape: [rows, tokens]}
    heads     MoVAttention on fill("x", (*shape, heads, d_head)), the keys or values of `heads` heads
    vector    MoV on fill("x", (*shape, d_in)), what goes into an MLP's last matrix
    molora    MoLoRa on fill("x", (*shape, d_in)): what is added to the layer's output

each {out, grads}: the gradients of x and of our tensors, flat, under the loss sum(out * fill("y", ...)). Our `vectors` are
(experts, features), `b` is (outputs, experts, rank), `a` (experts, rank, inputs).
"""

import ast
import collections.abc
import functools
import json
import sys
import types
import typing
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import frozen_dict
from flax.linen import partitioning

GOLDEN = Path(__file__).resolve().with_name("mov.json")
COMMITS = {
    "for-ai/parameter-efficient-moe": "e2683fead45eb480bcbf9c2e646fbbc2f7fc6efb",
    "google/flaxformer": "399ea3a85e9807ada653fd0de1a9de627eb0acde",
}
SIZES = {"n_experts": 3, "r": 2, "heads": 2, "d_head": 4, "d_in": 6, "d_out": 7, "shape": (3, 4)}
E, R, HEADS, D_HEAD, D_IN, D_OUT, SHAPE = SIZES.values()
Arrays = dict[str, Any]


def fill(key: str, shape: Iterable[int], size: float = 0.6) -> Any:
    """The array of that name: multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine."""
    shape = tuple(shape)
    k = np.arange(np.prod(shape, dtype=int)) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return ((((k * 2654435761 % 2**32).astype(np.float64) / 2**32) * 2 - 1) * size).reshape(shape)


def listed(t: Any) -> Any:
    """Nested lists of numbers with sixteen digits."""
    return [listed(part) for part in t] if np.ndim(t) else float(f"{float(t):.16g}")


def modules() -> Any:
    """The reference's modules, over flaxformer's own dense layer."""
    path = Path(sys.argv[2]) / "flaxformer" / "components" / "dense.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {"_normalize_axes", "_canonicalize_tuple", "_RESHAPED_KERNEL_AXIS_NAME_MAP", "DenseGeneral"}
    tree.body = [n for n in tree.body if getattr(n, "name", None) in names or isinstance(n, ast.Assign)
                 and getattr(n.targets[0], "id", "") in names]  # fmt: skip
    sys.path[:0] = [sys.argv[2]]
    dense = types.ModuleType("flaxformer.components.dense")
    vars(dense).update(
        {k: getattr(typing, k) for k in ("Any", "Callable", "Mapping", "Optional", "Sequence", "Tuple", "Union")}
    )
    vars(dense).update(Iterable=collections.abc.Iterable, nn=linen, frozen_dict=frozen_dict, partitioning=partitioning)
    vars(dense).update(lax=jax.lax, jnp=jnp, np=np, default_kernel_init=linen.linear.default_kernel_init)
    vars(dense).update(Array=jnp.ndarray, DType=Any, Initializer=Callable)
    sys.modules["flaxformer.components"] = components = types.ModuleType("flaxformer.components")
    sys.modules["flaxformer.components.dense"] = components.dense = dense  # type: ignore[attr-defined]
    exec(compile(tree, str(path), "exec"), vars(dense))
    sys.path[:0] = [sys.argv[1]]
    from src import molora, mov, routing

    return types.SimpleNamespace(mov=mov, molora=molora, routing=routing)


def router(space: Any) -> Any:
    """As the reference's gin files have it."""
    weights = space.routing.RouterWeights(use_bias=False, dtype=jnp.float32, kernel_axis_names=("mlp", "unmodeled"))
    return space.routing.Router(
        router_weights=weights, jitter_noise=0.0, dtype=jnp.float32, ignore_padding_tokens=False
    )


Ours = Callable[[Any], Any]  # our tensor as the reference has it


def look(
    module: Any, x_shape: tuple[int, ...], y_shape: tuple[int, ...], tensors: dict[str, tuple[Any, Ours]]
) -> Arrays:
    """Forward and backward with our tensors, each given by its shape and the reference's view of it."""
    x, y = fill("x", x_shape), fill("y", y_shape)

    def loss(x: Any, ours: Arrays) -> Any:
        params = {key: turn(ours[key]) for key, (_, turn) in tensors.items()}
        kernel = params.pop("router")
        tree = {"router": {"router_weights": {"v": {"kernel": kernel}}}}
        names = {"vectors": "mov_scaling", "a": "lora_A", "b": "lora_B"}
        out = module.apply({"params": tree | {names[key]: value for key, value in params.items()}}, x)
        return (out * y).sum(), out

    ours = {key: fill(key, shape) for key, (shape, _) in tensors.items()}
    (_, out), (of_x, of_ours) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, ours)
    grads = {key: listed(np.asarray(g).reshape(-1)) for key, g in ({"x": of_x} | of_ours).items()}
    return {"out": listed(np.asarray(out)), "grads": grads}


def card() -> Arrays:
    """All of it."""
    space = modules()
    own = functools.partial(dict, num_experts=E, dtype=jnp.float64)
    attention = space.mov.MoVAttention(router=router(space), **own())
    vector = space.mov.MoV(router=router(space), **own())
    lora = space.molora.MoLoRa(router=router(space), rank=R, output_dim=D_OUT, **own())
    turned: Ours = lambda t: t.T  # noqa: E731
    heads = {
        "vectors": ((E, HEADS * D_HEAD), lambda t: t.reshape(E, HEADS, D_HEAD).transpose(1, 0, 2)),
        "router": ((E, D_HEAD), turned),
    }
    whole = {"vectors": ((E, D_IN), lambda t: t), "router": ((E, D_IN), turned)}
    low_rank = {
        "a": ((E, R, D_IN), lambda t: t.transpose(0, 2, 1)),
        "b": ((D_OUT, E, R), lambda t: t.transpose(1, 2, 0)),
        "router": ((E, D_IN), turned),
    }
    wide = (*SHAPE, HEADS, D_HEAD)
    return {
        "heads": look(attention, wide, wide, heads),
        "vector": look(vector, (*SHAPE, D_IN), (*SHAPE, D_IN), whole),
        "molora": look(lora, (*SHAPE, D_IN), (*SHAPE, D_OUT), low_rank),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    about = {
        "command": "python tests/golden/make_mov.py REFERENCE FLAXFORMER",
        "references": COMMITS,
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "settings": SIZES,
    }
    GOLDEN.write_text(json.dumps(about | card(), separators=(",", ":")) + "\n", encoding="utf-8")
