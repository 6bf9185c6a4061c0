"""A Gaussian around a trained LoRA, and probabilities that know of it: Laplace-LoRA (2308.13111).

    posterior = dt.laplace.fit(adapter, batches)     # after training, on the training rows
    posterior.predict(batch)                         # (B, C) probabilities
    posterior.save(folder); dt.laplace.load(adapter, folder)

theta, all A and B, is N(trained, (F + tau I)^-1). F is the Fisher information of the labels that the model itself expects, a
block for each A and each B, in Kronecker factors: with x a site's input, g the gradient at its output and s = alpha / r,

    F_A = n E[x x^T] (x) E[s^2 B^T g g^T B]        F_B = n E[A x x^T A^T] (x) E[s^2 g g^T]

over the n real tokens. The wide side of each is kept by its `n_kfac` leading eigenvectors, the narrow one, R x R, whole.
Predictions are those of the model that is linear in theta: its logits are N(f(x), J (F + tau I)^-1 J^T). All of it stands in the
eigenvectors of the factors, where F is diagonal, so that another tau costs nothing.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from .core import files
from .core.adapter import Adapter
from .core.calibrate import Covariance, collect
from .core.errors import unknown
from .core.record import HEAD
from .methods.lora import LoRA
from .version import VERSION

FORMAT = 1
WEIGHTS, CARD = "posterior.safetensors", "posterior.json"
WIDEST = 8192  # a side up to this width is summed up whole, (D, D); a wider one as a few columns
SMALLEST, LARGEST = 1e-4, 1e8  # between these lies the prior's precision that is looked for

Batch = Mapping[str, Tensor]
Prior = Literal["evidence", "validation"] | float


class Side:
    """The sum of v v^T over vectors of one width, whole; where that is too wide, c c^T near it with `keep` columns c."""

    def __init__(self, keep: int | None = None) -> None:
        self.keep, self.sum, self.columns = keep, torch.empty(0), False

    def add(self, rows: Tensor) -> None:
        """Take in (n, D)."""
        if not self.sum.numel():
            self.columns = self.keep is not None and rows.shape[1] > WIDEST
            self.sum = rows.new_zeros(rows.shape[1], 0 if self.columns else rows.shape[1])
        if not self.columns:
            self.sum.addmm_(rows.t(), rows)
            return
        both = torch.cat([self.sum, rows.t()], 1)
        vectors = torch.linalg.eigh(both.t() @ both).eigenvectors[:, -self.keep :]  # type: ignore[operator]
        self.sum = both @ vectors

    def leading(self, n: int | None) -> tuple[Tensor, Tensor]:
        """The `n` largest eigenvalues, and their eigenvectors (D, n)."""
        if self.columns:
            vectors, roots, _ = torch.linalg.svd(self.sum, full_matrices=False)
            return roots[:n].square(), vectors[:, :n]
        values, vectors = torch.linalg.eigh(self.sum.double() if len(self.sum) <= 1024 else self.sum)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        return values[:n].to(self.sum.dtype), vectors[:, :n].to(self.sum.dtype).contiguous()


class Sides(Covariance):
    """Of each site the wide and the narrow side of one factor: x and A x of its input, or s g and s B^T g of its gradient."""

    def __init__(
        self, sites: Mapping[str, tuple[nn.Module, LoRA]], of: Literal["input", "gradient"], n_kfac: int | None
    ) -> None:
        super().__init__({name: module for name, (module, _) in sites.items()}, of)
        self.deltas = {name: delta for name, (_, delta) in sites.items()}
        keep = None if n_kfac is None else 4 * n_kfac
        self.wide, self.narrow = {name: Side(keep) for name in sites}, {name: Side() for name in sites}

    def add(self, name: str, rows: Tensor) -> None:
        delta = self.deltas[name]
        if self.of == "gradient":
            rows = delta.scale * _own(delta, rows)
        self.wide[name].add(rows)
        self.narrow[name].add(rows @ (delta.a.t() if self.of == "input" else delta.b).detach())


class Jacobian:
    """The logits' derivative in each A (B, R, I) and each B (B, R, O), transposed, of every row of one batch."""

    def __init__(self, sites: Mapping[str, tuple[nn.Module, LoRA]]) -> None:
        modules = {name: module for name, (module, _) in sites.items()}
        self.deltas = {name: delta for name, (_, delta) in sites.items()}
        self.inputs, self.gradients = Covariance(modules, "input"), Covariance(modules, "gradient")
        self.tensors: Mapping[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.inputs.begin()
        self.gradients.begin()

    def made(self) -> list[Tensor]:
        return self.gradients.made()

    def see(self, grads: Mapping[str, Tensor | None], of_made: Sequence[Tensor | None], real: Tensor | None) -> None:
        for (name, x), g in zip(self.inputs.seen, of_made, strict=True):
            if g is None:
                continue
            delta = self.deltas[name]
            x, g = (t.flatten(1, -2) if t.ndim > 2 else t[:, None] for t in (x, g))
            x, g = (t if t.dtype == torch.float64 else t.float() for t in (x, g))
            g = delta.scale * _own(delta, g)
            for key, parts in (("a", (g @ delta.b, x)), ("b", (x @ delta.a.t(), g))):
                value = parts[0].mT @ parts[1]
                self.found[f"{name}.{key}"] = self.found.get(f"{name}.{key}", 0) + value.detach()

    def end(self) -> None:
        self.inputs.end()
        self.gradients.end()

    def result(self, n_passes: int) -> dict[str, Tensor]:
        return self.found


@dataclass(frozen=True)
class Block:
    """One factor's part of the Fisher information: wide (D, K) and narrow (R, R) eigenvectors, values (K, R)."""

    wide: Tensor
    narrow: Tensor
    values: Tensor


@dataclass(frozen=True)
class Sight:
    """What a batch's predictions need, whatever tau is: J along the known eigenvectors, and J J^T of the rest."""

    mean: Tensor  # (B, C)
    along: Tensor  # (B, C, N)
    rest: Tensor  # (B, C, C)

    def covariance(self, values: Tensor, prior: float) -> Tensor:
        """(B, C, C) of the logits: J (F + tau I)^-1 J^T."""
        return self.along / (values + prior) @ self.along.mT + self.rest / prior


@dataclass(frozen=True)
class Posterior:
    """N(trained, (F + tau I)^-1) over A and B of all sites of `adapter`; `prior` is tau, the precision of the prior N(0, 1 / tau)."""

    adapter: Adapter
    blocks: dict[str, Block]
    prior: float
    log_likelihood: float  # of the labels of the rows that it was fitted on
    n_classes: int
    n_kfac: int | None
    choices: tuple[int, ...] | None = None  # the classes' tokens, where a language model's head answers

    def evidence(self, prior: float | None = None) -> float:
        """log p(labels | tau) by Laplace: log p(labels | theta) - tau |theta|^2 / 2 - log det(I + F / tau) / 2."""
        tau = self.prior if prior is None else prior
        square = sum(float(p.detach().double().square().sum()) for p in _factors(self.adapter).values())
        spread = float(torch.log1p(self.values.double() / tau).sum())
        return self.log_likelihood - tau * square / 2 - spread / 2

    @property
    def values(self) -> Tensor:
        """(N) eigenvalues of F that are known, block after block."""
        return torch.cat([block.values.flatten() for block in self.blocks.values()])

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean (B, C) and the covariance (B, C, C) of the logits of the model that is linear in theta."""
        sight = self.sight(batch)
        return sight.mean, sight.covariance(self.values, self.prior)

    def predict(
        self, batch: Batch, how: Literal["probit", "mc"] = "probit", n_samples: int = 1000, seed: int = 0
    ) -> Tensor:
        """(B, C) probabilities. "probit" is softmax(f / sqrt(1 + pi / 8 var f)), "mc" the mean softmax of `n_samples` logits."""
        return probabilities(*self.logits(batch), how, n_samples, seed)

    def sight(self, batch: Batch) -> Sight:
        """What is known of a batch before tau is: `logits` and `predict` for several taus at the price of one."""
        model, sites, n_classes, means = self.adapter.model, _sites(self.adapter), self.n_classes, []

        def each(model: nn.Module, repeated: Batch) -> Tensor:  # row c B + b stands for class c of row b
            logits = _logits(model, repeated, self.choices).unflatten(0, (n_classes, -1))
            means.append(logits[0].detach())
            return logits.diagonal(0, 0, 2).sum()

        with _evaluated(model):
            rows = _repeated(_moved(model, batch), n_classes)
            jacobian = collect(model, [rows], each, {"j": Jacobian(sites)})["j"]
        (mean,), along = means, []
        rest = mean.new_zeros(len(mean), n_classes, n_classes)
        for key, block in self.blocks.items():
            j = jacobian[key].unflatten(0, (n_classes, -1)).transpose(0, 1).to(block.values.dtype)  # (B, C, R, D)
            j = block.narrow.mT @ j
            inside = j @ block.wide
            outside = (j - inside @ block.wide.mT).flatten(2)
            rest += (outside @ outside.mT).to(rest.dtype)
            along.append(inside.mT.flatten(2))
        return Sight(mean, torch.cat(along, 2), rest)

    def tuned(self, prior: Prior = "evidence", validation: Iterable[Batch] | None = None) -> "Posterior":
        """The same with another prior, given or found as by `fit`: F does not depend on it."""
        _check_prior(prior, validation)
        if not isinstance(prior, str):
            return replace(self, prior=float(prior))
        loss = _validation(self, validation) if validation is not None else lambda tau: -self.evidence(tau)
        return replace(self, prior=_least(loss))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `posterior.safetensors` and `posterior.json`; the adapter itself is saved by its own `save`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{k}.{name}": getattr(b, name) for k, b in self.blocks.items() for name in Block.__annotations__}
        data = save_bytes({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"format": "pt"})
        card = {
            "format": FORMAT,
            "deltatune": VERSION,
            "prior": self.prior,
            "log_likelihood": self.log_likelihood,
            "n_classes": self.n_classes,
            "n_kfac": self.n_kfac,
            "choices": None if self.choices is None else list(self.choices),
            "adapter": _mark(self.adapter),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        files.write_atomic(folder / WEIGHTS, data)
        files.write_atomic(folder / CARD, (json.dumps(card, indent=1) + "\n").encode())


def fit(
    adapter: Adapter,
    batches: Iterable[Batch],
    prior: Prior = "evidence",
    *,
    validation: Iterable[Batch] | None = None,
    n_kfac: int | None = 10,
    labels: Literal["all", "sampled"] = "all",
    choices: Sequence[int] | None = None,
    seed: int = 0,
) -> Posterior:
    """The posterior of a trained LoRA, from its training rows, each once; `batch["labels"]` are the numbers of the classes.

    `prior` is the precision tau of theta ~ N(0, 1 / tau), or how it is found: "evidence" maximises the Laplace evidence,
    "validation" minimises the negative log-likelihood of the probit predictions on `validation`. `n_kfac` eigenvectors of each
    wide side are kept (None: all). The Fisher information is the sum over `labels="all"`, weighted by their probability, or
    takes one "sampled" of each row. `choices` are the tokens of the classes where a language model answers at its last token.

    Raises ValueError where the adapter is no LoRA on linear layers that runs, where rows do not fit, or there are none.
    """
    _check_prior(prior, validation)
    if n_kfac is not None and n_kfac < 1:
        raise ValueError(f"n_kfac = {n_kfac}, but it must be at least 1, or None for all")
    if labels not in ("all", "sampled"):
        raise unknown("labels", labels, ["all", "sampled"])
    model, sites = adapter.model, _sites(adapter)
    expected = _Expected(labels, None if choices is None else tuple(int(t) for t in choices), seed)
    inputs, gradients = Sides(sites, "input", n_kfac), Sides(sites, "gradient", n_kfac)
    with _evaluated(model):
        passes = expected.passes(model, batches)
        collect(model, passes, expected.loss, {"x": inputs, "g": gradients})
    blocks: dict[str, Block] = {}
    for name in sites:
        n = inputs.count[name]
        for key, wide, narrow in (("a", inputs.wide, gradients.narrow), ("b", gradients.wide, inputs.narrow)):
            (large, u), (small, v) = wide[name].leading(n_kfac), narrow[name].leading(None)
            blocks[f"{name}.{key}"] = Block(u, v, large[:, None] * small / n)
    found = Posterior(adapter, blocks, 1.0, expected.log_likelihood, expected.n_classes, n_kfac, expected.choices)
    return found.tuned(prior, validation)


def load(adapter: Adapter, folder: str | os.PathLike[str]) -> Posterior:
    """The posterior that `save` wrote, around the same trained adapter. Raises ValueError where it is of another one."""
    _sites(adapter)
    folder = Path(folder)
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no posterior: it has no {name}")
    data = (folder / WEIGHTS).read_bytes()
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise ValueError(f"its format is {card['format']}; this version reads format {FORMAT}")
        if card["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError(f"{WEIGHTS} is not the file that it describes")
        choices = None if card["choices"] is None else tuple(card["choices"])
        rest = float(card["prior"]), float(card["log_likelihood"]), card["n_classes"], card["n_kfac"], choices
        mark, tensors = card["adapter"], load_bytes(data)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder / CARD} is damaged: {error}") from None
    if mark != _mark(adapter):
        raise ValueError(f"{folder} holds the posterior of other weights than those of adapter {adapter.name!r}")
    device = adapter.parameters()[0].device
    names = sorted({key.rpartition(".")[0] for key in tensors})
    order = {key: i for i, key in enumerate(_factors(adapter))}
    blocks = {
        name: Block(*(tensors[f"{name}.{part}"].to(device) for part in Block.__annotations__))
        for name in sorted(names, key=lambda name: order[name])
    }
    return Posterior(adapter, blocks, *rest)


class _Expected:
    """A loss whose gradients are those of log p(c): each row once for every class c, weighted by sqrt(p(c)), or for one drawn."""

    def __init__(self, labels: str, choices: tuple[int, ...] | None, seed: int) -> None:
        self.labels, self.choices = labels, choices
        self.generator = torch.Generator().manual_seed(seed)
        self.n_classes, self.log_likelihood = 0, 0.0

    def passes(self, model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as `loss` wants them; the first one is looked at here and now for the number of classes."""
        rest = iter(batches)
        first = next(rest, None)
        if first is None:
            raise ValueError("laplace: no batch was given")
        with torch.no_grad():
            self.n_classes = _logits(model, _moved(model, first), self.choices).shape[1]
        return (self._pass(_moved(model, batch)) for batch in itertools.chain([first], rest))

    def _pass(self, batch: Batch) -> dict[str, Tensor]:
        labels = _labels(batch, self.n_classes)
        return _repeated({**batch, "labels": labels}, self.n_classes if self.labels == "all" else 1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum over the rows; adds up the likelihood of their own labels."""
        logits = _logits(model, batch, self.choices)
        p, own = logits.detach().softmax(-1), logits.detach().log_softmax(-1).gather(1, batch["labels"][:, None])
        if self.labels == "all":
            n_rows = len(p) // self.n_classes
            self.log_likelihood += float(own[:n_rows].double().sum())
            c = torch.arange(self.n_classes, device=p.device).repeat_interleave(n_rows)
            weight = p.gather(1, c[:, None]).sqrt()
        else:
            self.log_likelihood += float(own.double().sum())
            c = torch.multinomial(p.cpu(), 1, generator=self.generator)[:, 0].to(p.device)
            weight = torch.ones_like(p[:, :1])
        return (logits * (nn.functional.one_hot(c, self.n_classes) - p) * weight).sum()


def _check_prior(prior: Prior, validation: Iterable[Batch] | None) -> None:
    if isinstance(prior, bool) or isinstance(prior, str) and prior not in ("evidence", "validation"):
        raise unknown("prior", str(prior), ["evidence", "validation"])
    if not isinstance(prior, str) and not (prior > 0 and math.isfinite(prior)):
        raise ValueError(f"prior = {prior}, but a precision must be above 0")
    if (prior == "validation") is not (validation is not None):
        raise ValueError("prior='validation' and validation=batches go together: one is given without the other")


def _validation(found: Posterior, batches: Iterable[Batch]) -> Callable[[float], float]:
    """tau -> the negative log-likelihood of the labels of `batches` under the probit predictions."""
    sights, labels = [], []
    for batch in batches:
        sights.append(found.sight(batch))
        labels.append(_labels(_moved(found.adapter.model, batch), found.n_classes))
    if not labels:
        raise ValueError("laplace: no validation batch was given")
    sight = Sight(*(torch.cat([getattr(one, name) for one in sights]) for name in Sight.__annotations__))
    rows, targets, values = torch.arange(len(sight.mean), device=sight.mean.device), torch.cat(labels), found.values

    def loss(tau: float) -> float:
        p = probabilities(sight.mean, sight.covariance(values, tau))
        return -float(p[rows, targets].clamp_min(1e-30).double().log().sum())

    return loss


def _least(loss: Callable[[float], float]) -> float:
    """The tau of least `loss`: the best of ten to a decade, then the golden section around it."""
    low, high = math.log10(SMALLEST), math.log10(LARGEST)
    n = round(10 * (high - low))
    grid = [low + i * (high - low) / n for i in range(n + 1)]
    best = min(range(n + 1), key=lambda i: loss(10 ** grid[i]))
    a, b = grid[max(best - 1, 0)], grid[min(best + 1, n)]
    shrink = (math.sqrt(5) - 1) / 2
    while b - a > 1e-5:
        c, d = b - shrink * (b - a), a + shrink * (b - a)
        a, b = (a, d) if loss(10**c) < loss(10**d) else (c, b)
    return float(10 ** ((a + b) / 2))


def probabilities(
    mean: Tensor, covariance: Tensor, how: str = "probit", n_samples: int = 1000, seed: int = 0
) -> Tensor:
    """(B, C), the expected softmax of logits with this mean (B, C) and covariance (B, C, C): `Posterior.predict`."""
    if how == "probit":
        variance = covariance.diagonal(dim1=1, dim2=2)
        return (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
    if how != "mc":
        raise unknown("how", how, ["probit", "mc"])
    if n_samples < 1:
        raise ValueError(f"n_samples = {n_samples}, but it must be at least 1")
    values, vectors = torch.linalg.eigh(covariance.double())  # a root of a covariance that may be singular
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    drawn = torch.randn((n_samples, *mean.shape, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + (root @ drawn.to(mean.device))[..., 0]).softmax(-1).mean(0).to(mean.dtype)


def _sites(adapter: Adapter) -> dict[str, tuple[nn.Module, LoRA]]:
    """(layer, delta) by leaf path and site. Raises ValueError where it is not a LoRA on linear layers that runs, alone at each."""
    if not adapter.enabled:
        raise ValueError(f"adapter {adapter.name!r} is merged or disabled; its posterior needs it to run")
    found: dict[str, tuple[nn.Module, LoRA]] = {}
    for entry, module, delta in adapter._standing():
        if HEAD in entry.sites:
            continue
        site = delta.site
        if not isinstance(delta, LoRA) or type(delta).fold is not LoRA.fold or site.kind != "linear":
            what = getattr(delta, "name", "") or type(delta).__name__
            raise ValueError(f"{site.name}: a posterior is of LoRA on linear layers, not of {what} on a {site.kind}")
        if "a" not in delta._parameters:
            raise ValueError(f"{site.name}: a posterior is of A and B that are trained, and A of {delta.name} is not")
        if any(hasattr(p, "full_tensor") for p in delta.parameters()):
            raise ValueError(f"adapter {adapter.name!r} is sharded; its posterior is taken in one process")
        for key, other in module.deltas.items():  # type: ignore[operator, union-attr]
            if other is not delta and other.switch.on and other.site.name == site.name:
                raise ValueError(
                    f"{site.name}: {key.partition('|')[0]!r} stands there too; a posterior is of one adapter"
                )
        (path,) = entry.sites
        found[f"{path}.{site.name}"] = (module, delta)
    if not found:
        raise ValueError(f"adapter {adapter.name!r} has no LoRA; there is nothing to take a posterior of")
    return found


def _factors(adapter: Adapter) -> dict[str, Tensor]:
    """Every A and B, by the name of its block."""
    return {f"{name}.{key}": getattr(d, key) for name, (_, d) in _sites(adapter).items() for key in ("a", "b")}


def _mark(adapter: Adapter) -> str:
    """What tells these trained factors from any others."""
    digest = hashlib.sha256()
    for name, p in _factors(adapter).items():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _own(delta: LoRA, gradient: Tensor) -> Tensor:
    """Of the gradient of a fused projection the rows that are the delta's."""
    rows = delta.site.rows
    return gradient if rows is None else torch.cat([gradient[..., first:last] for first, last in rows], -1)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout, inside a `with`."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _moved(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


def _logits(model: nn.Module, batch: Batch, choices: tuple[int, ...] | None) -> Tensor:
    """(B, C) of a classifier, or of the tokens `choices` behind each row's last real token."""
    out = model(**{k: v for k, v in batch.items() if k != "labels"})
    logits: Tensor = getattr(out, "logits", out)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if choices is not None:
        if logits.ndim != 3 or not all(0 <= c < logits.shape[-1] for c in choices):
            raise ValueError(f"choices = {choices}, but the model's logits have the shape {tuple(logits.shape)}")
        mask = batch.get("attention_mask")
        last = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        if mask is not None and mask.shape == logits.shape[:2]:
            last = last - mask.long().flip(1).argmax(1)
        logits = logits[torch.arange(len(logits), device=logits.device), last][:, list(choices)]
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"a posterior predicts classes: logits (B, C) with C above 1, not {tuple(logits.shape)}; of a language "
            f"model name the classes' tokens, choices=[...]"
        )
    return logits


def _labels(batch: Batch, n_classes: int) -> Tensor:
    """(B), the numbers of the classes. Raises ValueError where they are missing or of another kind."""
    n_rows, labels = len(next(iter(batch.values()))), batch.get("labels")
    if labels is None or labels.shape != (n_rows,) or labels.is_floating_point():
        got = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"a batch needs labels of shape ({n_rows},), the numbers of the classes; got {got}")
    if n_rows and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        raise ValueError(
            f"labels lie between {int(labels.min())} and {int(labels.max())}, the classes are 0 to {n_classes - 1}"
        )
    return labels


def _repeated(batch: Batch, n: int) -> dict[str, Tensor]:
    """All rows `n` times, one behind the other."""
    return {k: v.repeat(n, *(1 for _ in v.shape[1:])) for k, v in batch.items()}
