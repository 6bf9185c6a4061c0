"""What laplace-torch and bayesian_lora make of two LoRA layers on fixed inputs, in fp64.

    python tests/golden/make_laplace_lora.py REFERENCE

where REFERENCE is GitHub's MaximeRobeyns/bayesian_lora at COMMIT, which needs jaxtyping and tqdm, in an environment with
laplace-torch 0.3, curvlinops-for-pytorch 3.0.1 and torch. Writes tests/golden/laplace_lora.json:

    kron        laplace-torch's KronLaplace over A and B of both layers, on ROWS rows: for each of PRIORS its log marginal
                likelihood, on N_NEW other rows the linear model's mean (once) and covariance and the probit probabilities;
                best, the prior precision at which its log marginal likelihood is highest, by its own gradient descent
    low_rank    bayesian_lora on a single layer and class vectors that are drawn: for the K-FAC sums over BATCHES of one row
                each, `incremental_svd` of the wide sides (as c c^T), the narrow ones whole, the labels it drew, and of
                `variance` and `calc_M` with those factors the covariance and log det M at each of PRIORS

The model is logits = L2(tanh(L1(x))), a layer L(x) = W x + s B (A x), s = ALPHA / R. Tensors are `fill` of their names.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("laplace_lora.json")
COMMIT = "4e99db8df6860eaf0e4bc1a168fb3faa45a094f0"
R, ALPHA, N_CLASSES, N_KFAC = 2, 3.0, 3, 3
SHAPES = {"first": (7, 6), "last": (N_CLASSES, 7)}  # d_out, d_in
ROWS, N_NEW, BATCHES = 12, 3, 8
PRIORS = (0.05, 1.0, 30.0)


def fill(key: str, shape: Iterable[int], size: float = 0.6) -> Tensor:
    """Multiples of the golden ratio modulo 1, even over (-size, size), exact on every machine: the tensor of that name."""
    shape = tuple(shape)
    k = torch.arange(torch.Size(shape).numel()) + 7919 * (zlib.crc32(key.encode()) % 10007)
    return (((k * 2654435761 % 2**32).double() / 2**32 * 2 - 1) * size).view(shape)


def rows(name: str, n: int) -> Tensor:
    """(n, 6) inputs."""
    return fill(name, (n, SHAPES["first"][1]), 2.0)


def labels(n: int) -> Tensor:
    """(n) classes."""
    return torch.arange(n) * 5 % 7 % N_CLASSES


class Low(nn.Module):
    """A layer with its LoRA, A and B as layers of their own, as both references want them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        d_out, d_in = SHAPES[name]
        self.base = nn.Linear(d_in, d_out, dtype=torch.float64).requires_grad_(False)
        self.lora_a = nn.Linear(d_in, R, bias=False, dtype=torch.float64)
        self.lora_b = nn.Linear(R, d_out, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.base.weight.copy_(fill(f"{name}.w", (d_out, d_in)))
            self.base.bias.copy_(fill(f"{name}.bias", (d_out,)))
            self.lora_a.weight.copy_(fill(f"{name}.a", (R, d_in)))
            self.lora_b.weight.copy_(fill(f"{name}.b", (d_out, R)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / R * self.lora_b(self.lora_a(x))


class Model(nn.Module):
    """Two such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Low("first"), Low("last")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def kron() -> dict[str, Any]:
    """laplace-torch's numbers."""
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows("x", ROWS), labels(ROWS)), batch_size=ROWS)
    la = Laplace(Model(), "classification", subset_of_weights="all", hessian_structure="kron", backend=CurvlinopsGGN,
                 prior_precision=1.0)  # fmt: skip
    la.fit(loader)
    found: dict[str, Any] = {"priors": {}}
    new = rows("new", N_NEW)
    for prior in PRIORS:
        la.prior_precision = prior
        mean, covariance = la._glm_predictive_distribution(new)
        found["mean"] = mean.tolist()
        found["priors"][str(prior)] = {
            "evidence": float(la.log_marginal_likelihood(torch.tensor(prior, dtype=torch.float64))),
            "covariance": covariance.tolist(),
            "probit": la(new, pred_type="glm", link_approx="probit").tolist(),
        }
    la.prior_precision = 1.0
    la.optimize_prior_precision(method="marglik", n_steps=3000, lr=0.02)
    found["best"] = float(la.prior_precision)
    return found


def low_rank() -> dict[str, Any]:
    """bayesian_lora's numbers."""
    sys.path.insert(0, sys.argv[1])
    from bayesian_lora import main as reference
    from bayesian_lora.kfac import calculate_kronecker_factors

    drawn: list[int] = []
    multinomial = torch.multinomial

    def record(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(int(multinomial(*args, **kwargs)))
        return torch.tensor([[drawn[-1]]])

    model, data = Model(), rows("x", BATCHES)[:, None]  # one token a row: it looks at the last
    torch.manual_seed(0)
    torch.multinomial = record  # type: ignore[assignment]
    factors = calculate_kronecker_factors(
        model, lambda m, x: m(x)[:, -1], [row[None] for row in data], n_kfac=N_KFAC, lr_threshold=R + 1,
        target_module_keywords=["lora"],
    )  # fmt: skip
    torch.multinomial = multinomial
    found: dict[str, Any] = {"labels": drawn, "factors": {}, "priors": {}}
    for name, (a, s) in factors.items():
        wide, narrow = (a, s) if "lora_a" in name else (s, a)
        found["factors"][name] = {"wide": (wide @ wide.t()).tolist(), "narrow": narrow.tolist()}
    new = rows("new", N_NEW)
    jacobian = {n: torch.stack([torch.autograd.grad(model(x[None])[0, c], p, retain_graph=True)[0] for x in new
                                for c in range(N_CLASSES)]).view(N_NEW, N_CLASSES, *p.shape)
                for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    roots = {n: (a, torch.linalg.cholesky(s)) if "lora_a" in n else (torch.linalg.cholesky(a), s)
             for n, (a, s) in factors.items()}  # fmt: skip
    for prior in PRIORS:
        variance = torch.tensor(1 / prior, dtype=torch.float64)
        torch.set_default_dtype(torch.float64)
        covariance = reference.variance(
            SimpleNamespace(input_ids=new), jacobian, roots, variance, N_CLASSES, R, N_KFAC, "cpu"
        )
        torch.set_default_dtype(torch.float32)
        log_det = sum(float(torch.slogdet(reference.calc_M(*pair, R, N_KFAC, variance))[1]) for pair in roots.values())
        found["priors"][str(prior)] = {"covariance": covariance.tolist(), "log_det": log_det}
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"kron": kron(), "low_rank": low_rank()}) + "\n", encoding="utf-8")
