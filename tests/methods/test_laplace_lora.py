"""Laplace-LoRA against laplace-torch's and bayesian_lora's numbers, against autograd, and against the dense Gaussian."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import deltatune as dt
from deltatune import laplace
from deltatune.core.calibrate import collect

MAKE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "golden" / "make_laplace_lora.py"))
fill, rows, labels, R, ALPHA, SHAPES = (MAKE[k] for k in ("fill", "rows", "labels", "R", "ALPHA", "SHAPES"))
ROWS, N_NEW, BATCHES, N_CLASSES, N_KFAC = (MAKE[k] for k in ("ROWS", "N_NEW", "BATCHES", "N_CLASSES", "N_KFAC"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))


class Two(nn.Module):
    """The golden's model without its LoRA."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_out, d_in) in SHAPES.items():
            layer = nn.Linear(d_in, d_out, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(fill(f"{name}.w", layer.weight.shape))
                layer.bias.copy_(fill(f"{name}.bias", layer.bias.shape))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())  # type: ignore[no-any-return, operator]


def trained() -> dt.Adapter:
    adapter = dt.attach(Two(), "laplace_lora", where=list(SHAPES), r=R, alpha=ALPHA, head=None)
    with torch.no_grad():
        for (_, site), delta in adapter.deltas.items():
            for key in ("a", "b"):
                getattr(delta, key).copy_(fill(f"{site}.{key}", getattr(delta, key).shape))
    return adapter


def data(n: int = ROWS, name: str = "x") -> dict[str, Tensor]:
    return {"x": rows(name, n), "labels": labels(n)}


def same(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    got, want = (torch.as_tensor(t, dtype=torch.float64) for t in (got, want))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prior", GOLDEN["kron"]["priors"])
@pytest.mark.parametrize("size", [ROWS, 5])
def test_laplace_torch(prior: str, size: int) -> None:
    """Evidence, mean and covariance of the linear model, and the probit probabilities, however the rows are cut."""
    whole, want = data(), GOLDEN["kron"]["priors"][prior]
    cut = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, ROWS, size)]
    posterior = dt.laplace.fit(trained(), cut, prior=float(prior), n_kfac=None)
    mean, covariance = posterior.logits(data(N_NEW, "new"))
    same(mean, GOLDEN["kron"]["mean"])
    same(covariance, want["covariance"])
    same(posterior.predict(data(N_NEW, "new")), want["probit"])
    same(posterior.evidence(), want["evidence"])


def test_the_prior_of_largest_evidence() -> None:
    posterior = dt.laplace.fit(trained(), [data()], n_kfac=None)
    assert posterior.prior == pytest.approx(GOLDEN["kron"]["best"], rel=1e-3)
    for factor in (0.99, 1.01):
        assert posterior.evidence(posterior.prior * factor) < posterior.evidence()


def test_bayesian_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its incremental low-rank factors, row by row with its labels; of those its covariance and its log det."""
    monkeypatch.setattr(laplace, "WIDEST", 0)  # every wide side as columns, as many as the reference keeps
    want, adapter = GOLDEN["low_rank"], trained()
    sites = {name.partition(".")[2]: pair for name, pair in laplace._sites(adapter).items()}
    sides = {"x": laplace.Sides(sites, "input", N_KFAC), "g": laplace.Sides(sites, "gradient", N_KFAC)}
    for side in sides.values():
        for wide in side.wide.values():
            wide.keep = N_KFAC
    drawn = iter(want["labels"])

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), torch.tensor([next(drawn)]))

    collect(adapter.model, list(rows("x", BATCHES)[:, None]), loss, sides)
    blocks = {}
    for name in SHAPES:
        for key, of, other in (("a", "x", "g"), ("b", "g", "x")):
            there = want["factors"][f"{name}.lora_{key}"]
            wide, narrow = sides[of].wide[name], sides[other].narrow[name]
            same(wide.sum @ wide.sum.t(), there["wide"])
            same(narrow.sum / BATCHES, there["narrow"])
            (large, u), (small, v) = wide.leading(N_KFAC), narrow.leading(None)
            blocks[f"0.{name}.{key}"] = laplace.Block(u, v, large[:, None] * small / BATCHES)
    for prior, there in want["priors"].items():
        posterior = laplace.Posterior(adapter, blocks, float(prior), 0.0, N_CLASSES, N_KFAC)
        square = sum(float(p.detach().square().sum()) for p in adapter.parameters())
        same(posterior.logits(data(N_NEW, "new"))[1], there["covariance"], 1e-8)
        same(-2 * posterior.evidence() - float(prior) * square, there["log_det"], 1e-8)


def bert(**more: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        max_position_embeddings=16, initializer_range=0.3, **more,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def shaken(adapter: dt.Adapter) -> dt.Adapter:
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return adapter


def texts(n: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (n, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(3, 7, (n, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.sum(1) % 3}


def decoder() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


CASES: dict[str, Any] = {
    "classifier": lambda: (dt.attach(bert(), "laplace_lora", r=3), None),
    "fused": lambda: (dt.attach(decoder(), "lora", r=3), (3, 7, 11)),  # q and v are rows of one projection
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[dt.Adapter, Any]:
    adapter, choices = CASES[request.param]()
    return shaken(adapter), choices


def answers(adapter: dt.Adapter, batch: dict[str, Tensor], choices: Any) -> Tensor:
    """(B, C), taken by hand."""
    logits = adapter.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if choices is None:
        return logits  # type: ignore[no-any-return]
    last = batch["attention_mask"].sum(1) - 1
    return torch.stack([logits[i, at, list(choices)] for i, at in enumerate(last)])


def dense(posterior: dt.laplace.Posterior) -> dict[str, Tensor]:
    """F + tau I of each block, over the entries of A, or of B transposed."""
    found = {}
    for key, block in posterior.blocks.items():
        wide, narrow = (torch.cat([q, torch.zeros(len(q), len(q) - q.shape[1])], 1) for q in (block.wide, block.narrow))
        values = torch.zeros(len(narrow), len(wide))
        values[:, : block.wide.shape[1]] = block.values.t()
        basis = torch.kron(narrow, wide)
        found[key] = basis * values.flatten() @ basis.t() + posterior.prior * torch.eye(len(basis))
    return found


@pytest.mark.parametrize("n_kfac", [2, None])
def test_the_covariance_is_autograds_jacobian_around_the_dense_inverse(
    case: tuple[dt.Adapter, Any], n_kfac: int
) -> None:
    adapter, choices = case
    posterior = dt.laplace.fit(adapter, [texts(8, 1)], prior=2.0, n_kfac=n_kfac, choices=choices)
    batch = texts()
    mean, covariance = posterior.logits(batch)
    logits = answers(adapter, batch, choices)
    torch.testing.assert_close(mean, logits.detach(), rtol=1e-5, atol=1e-5)
    factors = laplace._factors(adapter)
    inverse = {key: torch.linalg.inv(f.double()) for key, f in dense(posterior).items()}
    for i, row in enumerate(logits):
        want = torch.zeros(3, 3, dtype=torch.float64)
        grads = [torch.autograd.grad(value, list(factors.values()), retain_graph=True) for value in row]
        for n, key in enumerate(factors):
            j = torch.stack([(g[n] if key.endswith("a") else g[n].t()).flatten() for g in grads]).double()
            want += j @ inverse[key] @ j.t()
        torch.testing.assert_close(covariance[i].double(), want, rtol=1e-4, atol=1e-5)


def test_the_factors_are_the_tokens(case: tuple[dt.Adapter, Any]) -> None:
    """F_A and F_B once more from the gradients of log p(c), one row and one class at a time."""
    adapter, choices = case
    posterior = dt.laplace.fit(adapter, [texts(3, 1), texts(2, 2)], prior=1.0, n_kfac=None, choices=choices)
    seen: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}
    sites = laplace._sites(adapter)
    own: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, out: Tensor) -> None:
            own[name] = (args[0].detach()[0], out)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, (module, _) in sites.items()]
    for batch in (texts(3, 1), texts(2, 2)):
        for i in range(len(batch["labels"])):
            n = int(batch["attention_mask"][i].sum())
            one = {k: v[i : i + 1, :n] for k, v in batch.items() if k != "labels"}
            logits = answers(adapter, one, choices)[0]
            for c, p in enumerate(logits.softmax(0).detach()):
                grads = torch.autograd.grad(logits.log_softmax(0)[c], [own[s][1] for s in sites], retain_graph=True)
                for name, g in zip(sites, grads, strict=True):
                    delta = sites[name][1]
                    rows_ = delta.site.rows or ((0, g.shape[-1]),)
                    g = torch.cat([g[0][:, first:last] for first, last in rows_], 1)
                    gradients.setdefault(name, []).append(p.sqrt() * delta.scale * g)
                    seen.setdefault(name, []).append(own[name][0])
    for handle in handles:
        handle.remove()
    whole = dense(posterior)
    for name, (_, delta) in sites.items():
        x, g = torch.cat(seen[name]), torch.cat(gradients[name])  # each token once a class
        h, u = x @ delta.a.detach().t(), g @ delta.b.detach()
        for key, (wide, narrow) in {"a": (x.t() @ x, u.t() @ u), "b": (g.t() @ g, h.t() @ h)}.items():
            want = torch.kron(narrow, wide) / len(x)
            got = whole[f"{name}.{key}"] - torch.eye(len(want))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max() + 1))


def test_the_dense_gaussian_where_it_has_that_form() -> None:
    """One row, one factor that learns (B = 0 leaves A without a gradient): Kronecker factors are the GGN itself."""
    model = nn.Sequential(Two().double())
    adapter = dt.attach(model, "lora", where=["0.last"], r=R, head=None)
    batch = data(1)
    posterior = dt.laplace.fit(adapter, [{"input": batch["x"], "labels": batch["labels"]}], prior=0.7, n_kfac=None)
    new = {"input": rows("new", N_NEW)}
    parameters = adapter.parameters()

    def jacobian(x: Tensor) -> Tensor:
        grads = [torch.autograd.grad(v, parameters, retain_graph=True) for v in model(x[None])[0]]
        return torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])

    p = model(batch["x"])[0].detach().softmax(0)
    j = jacobian(batch["x"][0])
    inverse = torch.linalg.inv(
        j.t() @ (p.diag() - torch.outer(p, p)) @ j + 0.7 * torch.eye(j.shape[1], dtype=torch.float64)
    )
    for x, covariance in zip(new["input"], posterior.logits(new)[1], strict=True):
        same(covariance, jacobian(x) @ inverse @ jacobian(x).t())


def test_a_full_n_kfac_is_all() -> None:
    adapter = shaken(dt.attach(bert(), "laplace_lora", r=3))
    whole, full, few = (dt.laplace.fit(adapter, [texts(8)], prior=1.0, n_kfac=n) for n in (None, 16, 2))
    want = whole.logits(texts(seed=3))[1]
    assert torch.equal(full.logits(texts(seed=3))[1], want)
    less = few.logits(texts(seed=3))[1]  # what is left out of F is left in the covariance
    assert bool((torch.linalg.eigvalsh(less - want) > -1e-5).all())
    assert float((less - want).norm()) > 1e-3 * float(want.norm())


def test_wide_sides_as_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more columns are kept than there are directions, the sum is the whole one's."""
    adapter = shaken(dt.attach(bert(), "laplace_lora", r=3))
    want = dt.laplace.fit(adapter, [texts(2)], prior=1.0, n_kfac=12).logits(texts(seed=3))[1]
    monkeypatch.setattr(laplace, "WIDEST", 0)
    got = dt.laplace.fit(adapter, [texts(2)], prior=1.0, n_kfac=12).logits(texts(seed=3))[1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_predictions() -> None:
    adapter = shaken(dt.attach(bert(), "laplace_lora", r=3))
    posterior = dt.laplace.fit(adapter, [texts(8)], prior=3.0)
    batch = texts(seed=3)
    mean, covariance = posterior.logits(batch)
    drawn = torch.distributions.MultivariateNormal(mean, covariance + 1e-6 * torch.eye(3)).sample((200_000,))
    many = posterior.predict(batch, "mc", n_samples=50_000)
    torch.testing.assert_close(many, drawn.softmax(-1).mean(0), rtol=0, atol=5e-3)
    assert torch.equal(posterior.predict(batch, "mc", seed=1), posterior.predict(batch, "mc", seed=1))
    assert not torch.equal(posterior.predict(batch, "mc", seed=1), posterior.predict(batch, "mc", seed=2))
    probit = posterior.predict(batch)
    torch.testing.assert_close(probit.sum(1), torch.ones(4))
    assert bool((probit.amax(1) < mean.softmax(1).amax(1)).all())  # less sure than the point


def test_a_prior_from_validation_rows() -> None:
    adapter = shaken(dt.attach(bert(), "laplace_lora", r=3))
    validation = [texts(8, 5), texts(3, 6)]
    posterior = dt.laplace.fit(adapter, [texts(8)], "validation", validation=validation)

    def loss(prior: float) -> float:
        other = dt.laplace.fit(adapter, [texts(8)], prior)
        p = torch.cat([other.predict(b) for b in validation])
        return -float(p.gather(1, torch.cat([b["labels"] for b in validation])[:, None]).log().mean())

    assert all(loss(posterior.prior) <= loss(posterior.prior * k) + 1e-6 for k in (0.5, 0.8, 1.25, 2.0))


def test_labels_that_are_drawn_agree_in_the_mean() -> None:
    adapter = trained()
    exact = dt.laplace.fit(adapter, [data()], 1.0, n_kfac=None)
    drawn = dt.laplace.fit(adapter, [data()] * 300, 1.0, n_kfac=None, labels="sampled", seed=2)
    for key, want in dense(exact).items():
        got = (dense(drawn)[key] - torch.eye(len(want))) / 300
        want = want - torch.eye(len(want))
        assert float((got - want).norm() / want.norm()) < 0.1, key


def test_a_file_and_back(tmp_path: Path) -> None:
    adapter = shaken(dt.attach(bert(), "laplace_lora", r=3))
    posterior = dt.laplace.fit(adapter, [texts(8)])
    adapter.save(tmp_path / "adapter")
    posterior.save(tmp_path / "posterior")
    again = dt.load(bert(), tmp_path / "adapter")
    read = dt.laplace.load(again, tmp_path / "posterior")
    torch.testing.assert_close(read.predict(texts()), posterior.predict(texts()))
    assert (read.prior, read.evidence(), read.n_kfac) == (posterior.prior, posterior.evidence(), 10)
    with pytest.raises(ValueError, match=r"holds no posterior: it has no posterior\.json"):
        dt.laplace.load(again, tmp_path / "adapter")
    with torch.no_grad():
        again.parameters()[0].add_(1e-3)
    with pytest.raises(ValueError, match="posterior of other weights"):
        dt.laplace.load(again, tmp_path / "posterior")
    weights = tmp_path / "posterior" / "posterior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not the file that it describes"):
        dt.laplace.load(again, tmp_path / "posterior")


def test_nothing_is_left_behind() -> None:
    model = bert(hidden_dropout_prob=0.1).train()
    adapter = shaken(dt.attach(model, "laplace_lora", r=3, dropout=0.1))
    model.bert.pooler.eval()
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    posterior = dt.laplace.fit(adapter, [texts(8)])
    assert torch.equal(posterior.predict(texts()), posterior.predict(texts()))
    assert model.training
    assert not model.bert.pooler.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_errors() -> None:
    adapter = dt.attach(bert(), "laplace_lora", r=3)
    fit = dt.laplace.fit
    for given, said in [
        ({"prior": "evidense"}, "evidence"),
        ({"prior": 0.0}, "prior = 0.0"),
        ({"prior": "validation"}, "without the other"),
        ({"validation": [texts()]}, "without the other"),
        ({"n_kfac": 0}, "n_kfac = 0"),
        ({"labels": "some"}, "sampled"),
        ({"choices": [3, 4]}, r"choices = \(3, 4\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            fit(adapter, [texts()], **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batch"):
        fit(adapter, [])
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*got none"):
        fit(adapter, [{k: v for k, v in texts().items() if k != "labels"}])
    with pytest.raises(ValueError, match="lie between 0 and 3, the classes are 0 to 2"):
        fit(adapter, [{**texts(), "labels": torch.arange(4)}])
    with pytest.raises(ValueError, match="did you mean 'probit'"):
        fit(adapter, [texts()]).predict(texts(), "probits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_samples = 0"):
        fit(adapter, [texts()]).predict(texts(), "mc", n_samples=0)
    adapter.merge()
    with pytest.raises(ValueError, match="merged or disabled"):
        fit(adapter, [texts()])
    with pytest.raises(ValueError, match="not of dora on a linear"):
        fit(dt.attach(bert(), "dora"), [texts()])
    with pytest.raises(ValueError, match="A of lora_fa is not"):
        fit(dt.attach(bert(), "lora_fa", r=3), [texts()])
    with pytest.raises(ValueError, match="has no LoRA"):
        fit(dt.attach(bert(), "full"), [texts()])
    model = bert()
    first = dt.attach(model, "lora", name="first")
    dt.attach(model, "lora", name="second", head=None)
    with pytest.raises(ValueError, match="'second' stands there too"):
        fit(first, [texts()])
    with pytest.raises(ValueError, match=r"logits \(B, C\).*choices="):
        fit(dt.attach(decoder(), "lora"), [{**texts(), "labels": texts()["labels"]}])
    assert math.isfinite(fit(dt.attach(bert(), "lora"), [texts()]).prior)
