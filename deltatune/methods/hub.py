"""LoRAHub: coefficients of trained LoRA modules, found over a few shots without a gradient."""

import importlib
import math
import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import files
from ..core.adapter import Adapter
from ..core.calibrate import looking
from ..core.compose import Tree, preset, tree_from_dict
from ..core.method import METHODS
from ..core.sharded import assign
from ..core.sources import folders_of, read
from .lora import LoRA

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own. Raises ValueError where it has none."""
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(f"the batches hold {', '.join(batch)}, and the model has no loss without labels")
    return loss


@torch.no_grad()
def objective(model: nn.Module, batches: Iterable[Batch], weights: Sequence[float], loss: Loss, l1: float) -> float:
    """sum of the batches' losses / number of rows + l1 mean |w|.

    A batch's loss is a mean already; that it is divided by the number of rows again is what the paper's code does, so that
    more shots weigh less against `l1`.
    """
    total, n_rows = 0.0, 0
    for batch in batches:
        total += float(loss(model, batch))
        n_rows += len(next(iter(batch.values())))
    return total / n_rows + l1 * sum(map(abs, weights)) / len(weights)


def searched(of: Callable[[list[float]], float], n: int, budget: int, bound: float, seed: int) -> list[float]:
    """The n coefficients within +-bound that Nevergrad's NGOpt recommends for the least `of`, from 0, after `budget` evaluations.

    The same from the same seed; NGOpt spends few evaluations for each coefficient on COBYLA, which draws nothing.
    """
    import numpy

    before = random.getstate(), numpy.random.get_state()
    with warnings.catch_warnings():
        # what its optimisers say of each other: COBYLA of a tolerance of 0, CMA-ES of solutions that others found
        warnings.filterwarnings("ignore", category=UserWarning, module="nevergrad|cma|scipy")
        try:
            nevergrad = _nevergrad()
            random.seed(seed)
            numpy.random.seed(seed)
            array = nevergrad.p.Array(init=[0.0] * n, lower=[-bound] * n, upper=[bound] * n)
            optimizer = nevergrad.optimizers.NGOpt(parametrization=array, budget=budget)
            return optimizer.minimize(lambda weights: of(weights.tolist())).value.tolist()
        except TypeError as error:  # under numpy 2.4 its quadratic model, which large budgets for few coefficients get
            if "nevergrad" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            raise ValueError(
                f"nevergrad {nevergrad.__version__} fails at budget = {budget} for {n} modules ({error}); take a smaller budget"
            ) from error
        finally:  # importing it draws too
            random.setstate(before[0])
            numpy.random.set_state(before[1])


def _nevergrad() -> Any:
    try:
        return importlib.import_module("nevergrad")
    except ImportError:
        raise ValueError(
            "looking for LoRAHub's coefficients needs the package nevergrad: pip install 'deltatune[merge]'"
        ) from None


@preset(
    "lora_hub",
    paper="2307.13269",
    category="multi-task",
    lr=(3e-4, 2e-2),
    exceptions={"identity": "it starts from modules that were trained"},
    sources="lora",
)
def lora_hub(
    sources: tuple[str, ...] = (),  # folders of trained LoRA modules of one rank, scale and place
    batches: object = (),  # the few shots: batches of the model's keywords, with labels
    weights: tuple[float, ...] = (),  # coefficients that are known; 1 / n each without them and without batches
    loss: object = None,  # loss(model, batch), by default the model's own
    budget: int = 40,  # evaluations of the shots
    bound: float = 1.5,  # largest size of a coefficient
    l1: float = 0.05,  # weight of the coefficients' mean size beside the loss
    seed: int = 42,  # of the search
) -> Tree:
    """A = sum_i w_i A_i, B = sum_i w_i B_i over n modules; w least in loss + l1 mean |w| over a few shots, by Nevergrad.

    The A's and the B's are mixed apart, so the product holds w_i w_j B_i A_j of every pair, as in the paper's code. After
    `attach` the coefficients are `adapter.calibrated["weights"]`; from then on it is an ordinary LoRA. A task head stays the
    model's own.
    """
    if not sources:
        return replace(LoRA(), start=_none)
    folders = folders_of("lora_hub", sources)
    if weights and len(weights) != len(folders):
        raise ValueError(f"lora_hub: {len(weights)} weights for {len(folders)} sources")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"lora_hub: the weights {tuple(weights)} are not all finite")
    shots = list(batches)
    if isinstance(batches, Mapping) or batches != () and not shots:
        raise ValueError(f"lora_hub: batches are a list of the model's keywords, at least one, not {batches!r:.80}")
    if weights and shots:
        raise ValueError("lora_hub: give weights that are known, or batches to find them over, not both")
    for key, value, least in (("budget", budget, 1), ("l1", l1, 0)):
        if value < least:
            raise ValueError(f"lora_hub: {key} = {value}, but it must be at least {least}")
    if bound <= 0:
        raise ValueError(f"lora_hub: bound = {bound}, but it must lie above 0")
    card, _ = files.read_adapter(folders[0])
    if card["tree"].get("method") != "lora":
        raise ValueError(f"{folders[0]} holds {card['tree'].get('method', card['tree'].get('op'))!r}, not 'lora'")
    find = partial(searched, budget=budget, bound=bound, seed=seed)
    score = partial(objective, loss=loss or own_loss, l1=l1)
    start = partial(_from_modules, folders, tuple(weights), shots, score, find)
    return replace(tree_from_dict(card["tree"], METHODS), start=start)


def _none(adapter: Adapter, path: str) -> None:
    raise ValueError("lora_hub is made of trained LoRA modules; give it sources=[folder, ...]")


def _from_modules(
    folders: tuple[str, ...],
    weights: tuple[float, ...],
    shots: list[Batch],
    score: Callable[..., float],
    find: Callable[..., list[float]],
    adapter: Adapter,
    path: str,
) -> None:
    saved = read(adapter.model, folders, "lora")
    for one in saved[1:]:
        apart = {k for k, v in one.tree["config"].items() if k != "dropout" and v != saved[0].tree["config"].get(k)}
        apart |= {k for k in ("where", "layers") if one.tree[k] != saved[0].tree[k]}
        if apart:
            key = min(apart)
            theirs, ours = ({**t.tree, **t.tree["config"]}[key] for t in (one, saved[0]))
            raise ValueError(
                f"{one.folder} and {folders[0]} cannot be mixed: {key} of the one is {theirs!r}, of the other {ours!r}"
            )
    targets = {
        f"0.{site}.{name}": p
        for (leaf, site), d in adapter.deltas.items()
        if leaf == path
        for name, p in d.named_parameters()
    }
    for one in saved:
        mine = {key: t for key, t in one.tensors.items() if key.startswith("0.")}
        files.check_keys(one.folder, {key: tuple(t.shape) for key, t in targets.items()}, mine)

    @torch.no_grad()
    def mix(weights: Sequence[float]) -> None:
        for key, target in targets.items():
            assign(target, sum(w * one.tensors[key].to(target.device) for w, one in zip(weights, saved, strict=True)))

    def of(weights: Sequence[float]) -> float:
        mix(weights)
        found = score(adapter.model, shots, weights)
        if not math.isfinite(found):
            raise ValueError(f"lora_hub: the loss is {found} at the coefficients {weights}; see to it, or lower bound")
        return found

    if shots:
        with looking(adapter.model, False, adapter.seed):
            weights = tuple(find(of, len(saved)))
    weights = weights or (1 / len(saved),) * len(saved)
    mix(weights)
    adapter.calibrated = {"weights": torch.tensor(weights)}
