"""OFT, BOFT, PiSSA, LoRA+ and LoRA-FA through HF PEFT's files and objects: logits equal to the installed peft's."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_models import config, loaded, logits, make, stir, theirs, written
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt

OFT, BOFT, LORA = "OFTConfig", "BOFTConfig", "LoraConfig"
PISSA: dict[str, Any] = {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": (OFT, {"oft_block_size": 8}),
    "oft exact": (OFT, {"oft_block_size": 8, "use_cayley_neumann": False}),
    "boft": (BOFT, {"boft_block_size": 4, "boft_n_butterfly_factor": 3}),
    "pissa": (LORA, PISSA),
}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "oft of the nearest number": ("llama", OFT, {"oft_block_size": 0, "r": 5}),
    "oft of the nearest size": ("bert", OFT, {"oft_block_size": 7, "target_modules": "all-linear"}),
    "oft of unlike sizes": ("bert", OFT, {"oft_block_size": 0, "r": 4, "target_modules": "all-linear"}),
    "oft of three terms": ("llama", OFT, {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft of four terms": ("llama", OFT, {"oft_block_size": 8, "num_cayley_neumann_terms": 4}),
    "oft of seven terms, shared": ("llama", OFT, {"oft_block_size": 4, "num_cayley_neumann_terms": 7, "block_share": True}),
    "coft": ("llama", OFT, {"oft_block_size": 8, "coft": True, "eps": 0.9}),
    "coft, shared": ("bert", OFT, {"oft_block_size": 8, "coft": True, "eps": 0.9, "block_share": True}),
    "oft on tables": ("llama", OFT, {"oft_block_size": 8, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "exact oft on a table": ("llama", OFT, {"oft_block_size": 8, "use_cayley_neumann": False, "target_modules": ["embed_tokens"]}),
    "oft with dropout": ("bert", OFT, {"oft_block_size": 8, "module_dropout": 0.5}),
    "oft with biases": ("bert", OFT, {"oft_block_size": 8, "bias": "all"}),
    "oft with its biases": ("bert", OFT, {"oft_block_size": 8, "bias": "oft_only", "modules_to_save": ["pooler"]}),
    "boft of one factor": ("llama", BOFT, {}),
    "boft of four blocks": ("bert", BOFT, {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 2}),
    "boft with its biases": ("bert", BOFT, {"bias": "boft_only", "boft_dropout": 0.5}),
    "boft of odd blocks": ("vit", BOFT, {"boft_block_size": 3, "target_modules": ["projection"], "modules_to_save": ["classifier"]}),
    "boft of a convolution": (
        "vit", BOFT, {"boft_block_size": 8, "boft_n_butterfly_factor": 3, "target_modules": ["projection"]},
    ),
    "pissa of another power": ("llama", LORA, PISSA | {"use_rslora": True}),
    "pissa on GPT-2": ("gpt2", LORA, PISSA),
    "pissa by place": (
        "llama", LORA,
        PISSA | {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 2}},
    ),
    "pissa with biases": ("bert", LORA, PISSA | {"bias": "all"}),
}  # fmt: skip
CASES = {f"{arch} {name}": (arch, *row) for arch in ("bert", "llama", "t5") for name, row in KINDS.items()} | MORE


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    """Their file here, ours there, ours here: the same logits, far from the base's. Their object is the same adapter."""
    arch, kind, options = CASES[case]
    hf: Any = theirs(arch, config(kind, arch, **options))
    want, bare = logits(hf, arch), logits(make(arch), arch)
    model = make(arch)
    folder = written(hf, tmp_path / "theirs")
    adapter = dt.load(model, folder)
    close(logits(model, arch), want)
    assert (want - bare).abs().max() > 0.1
    adapter.save(tmp_path / "ours", format="peft")
    close(logits(loaded(arch, tmp_path / "ours"), arch), want)
    again = make(arch)
    dt.load(again, tmp_path / "ours")
    close(logits(again, arch), want)
    configs = {at: d.config for at, d in adapter.deltas.items()}
    adapter.detach()
    assert torch.equal(logits(model, arch), bare)
    if kind != LORA:  # PiSSA is written as LoRA of twice the rank
        have, other = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "ours", folder))
        twice = (".original_module.", ".modules_to_save.", "base_layer.weight")
        assert {k: t.shape for k, t in have.items()} == {
            k: t.shape for k, t in other.items() if not any(part in k for part in twice)
        }
    if options.get("boft_dropout"):  # an object with it is refused, which test_configs holds
        return
    cfg = config(kind, arch, **options)
    started = dt.attach(model, cfg, head="auto" if cfg.task_type else None)
    assert torch.equal(logits(model, arch), bare)
    assert {at: d.config for at, d in started.deltas.items()} == configs


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_written_as_hf_peft_converts_it(rslora: bool, tmp_path: Path) -> None:
    """The tensors, rank and scale of `path_initial_model_for_weight_conversion`, from the same start and the same end."""
    cfg = config(LORA, "llama", **PISSA, use_rslora=rslora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf: Any = peft.get_peft_model(make("llama"), cfg).eval()
        hf.peft_config["default"].init_lora_weights = True
        hf.save_pretrained(tmp_path / "start")
        hf.peft_config["default"].init_lora_weights = "pissa"
        stir(hf)
        model = make("llama")
        adapter = dt.load(model, written(hf, tmp_path / "end"))
        adapter.save(tmp_path / "ours", format="peft")
        hf.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=os.fspath(tmp_path / "start"))
    have, want = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("ours", "theirs"))
    assert have.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(have[key], want[key], rtol=0, atol=1e-6)
    have, want = (json.loads((tmp_path / at / "adapter_config.json").read_text()) for at in ("ours", "theirs"))
    assert (have["r"], have["use_rslora"]) == (want["r"], want["use_rslora"])
    assert float(have["lora_alpha"]) == pytest.approx(float(want["lora_alpha"]))


def test_a_random_svd_is_not_in_the_file(tmp_path: Path) -> None:
    """HF PEFT draws it anew as it reads, and its own logits are others; in an object it is a start like any."""
    options = PISSA | {"init_lora_weights": "pissa_niter_1"}
    hf = theirs("llama", config(LORA, "llama", **options))
    folder = written(hf, tmp_path)
    assert (logits(loaded("llama", folder), "llama") - logits(hf, "llama")).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"init_lora_weights = 'pissa_niter_1' cannot be kept in a file"):
        dt.load(make("llama"), folder)
    model = make("llama")
    adapter = dt.attach(model, config(LORA, "llama", **options))
    assert adapter.tree.to_dict()["config"]["niter"] == 1
    assert torch.equal(logits(model, "llama"), logits(make("llama"), "llama"))


OURS: dict[str, tuple[str, Any]] = {
    "oft of our defaults": ("llama", dt.OFT(block=8)),
    "coft": ("bert", dt.OFT(block=8, eps=0.5, where="all-linear")),
    "oft by place": ("bert", dt.OFT(block=8, where={"attn": {"block": 8}, "mlp.up": {"block": 7}})),
    "oft with bitfit": ("bert", dt.Stack(dt.OFT(block=8, terms=0), dt.BitFit())),
    "boft of our defaults": ("llama", dt.BOFT()),
    "boft with bitfit": ("bert", dt.Sum(dt.BOFT(), dt.BitFit())),
    "boft on a convolution": ("vit", dt.BOFT(where="conv2d")),
    "pissa on slices": ("gpt2", dt.PiSSA(r=3)),
    "pissa on experts": ("mixtral", dt.PiSSA(r=2, where="experts,q")),
    "pissa of an odd power": ("llama", dt.PiSSA(r=4, power=0.3)),
    "pissa on a table": ("llama", dt.PiSSA(r=4, where="embed")),
    "pissa on a convolution": ("vit", dt.PiSSA(r=4, where="conv2d")),
    "lora_plus": ("bert", dt.LoRAPlus(r=4, where="all-linear")),
    "lora_plus with biases": ("bert", dt.LoRAPlus(r=4, bias=True)),
    "lora_fa": ("llama", dt.LoRAFA(r=4)),
    "laplace_lora": ("bert", dt.LaplaceLoRA(r=4)),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_ours(case: str, tmp_path: Path) -> None:
    arch, tree = OURS[case]
    model = make(arch)
    adapter = dt.attach(model, tree)
    stir(model)
    adapter.save(tmp_path, format="peft")
    want = logits(model, arch)
    assert (want - logits(make(arch), arch)).abs().max() > 0.1
    close(logits(loaded(arch, tmp_path), arch), want)
    again = make(arch)
    dt.load(again, tmp_path)
    close(logits(again, arch), want)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "oft on slices": ("gpt2", dt.OFT(block=8), "oft on a slice of a fused projection cannot be written"),
    "oft on experts": ("mixtral", dt.OFT(block=8, where="experts"), "oft on fused experts cannot be written"),
    "oft on a stored transpose": ("gpt2", dt.OFT(block=8, where="mlp"), "HF PEFT has no OFT on a Conv1D"),
    "oft on a convolution": ("vit", dt.OFT(block=8, where="conv2d"), "no change of its weight"),
    "oft of three terms": ("llama", dt.OFT(block=8, terms=3), "whose 3 terms are 4"),
    "oft of two kinds": ("llama", dt.OFT(block=8, where={"q": {"terms": 0}, "v": {}}), "has one of each"),
    "oft of two sizes": ("llama", dt.OFT(where={"q": {"block": 8}, "v": {"block": 4}}), "blocks of 4, 8 cannot be written"),
    "boft on a table": ("llama", dt.BOFT(where="embed"), "HF PEFT has no BOFT on this Embedding"),
    "boft of two sizes": ("llama", dt.BOFT(where={"q": {"block": 4}, "v": {}}), "2 of blocks of 4, 2 of blocks of 8"),
    "two methods": ("llama", dt.Sum(dt.OFT(block=8, where="q"), dt.BOFT(where="v")), "cannot be written as one adapter"),
    "oft on lora": ("llama", dt.Stack(dt.OFT(block=8, where="q"), dt.LoRAFA(where="q")), "q_proj: oft, lora meet there"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_not_written(case: str, tmp_path: Path) -> None:
    arch, tree, message = REFUSED[case]
    adapter = dt.attach(make(arch), tree)
    with pytest.raises(ValueError) as error:
        adapter.save(tmp_path / "out", format="peft")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


UNREAD: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "oft on a stored transpose": ("gpt2", OFT, {}, "HF PEFT has no OFT on a Conv1D"),
    "oft on a convolution": ("vit", OFT, {"target_modules": ["projection"]}, "no change of its weight"),
    "too few terms": ("llama", OFT, {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms = 2 cannot be kept"),
    "boft on a table": ("llama", BOFT, {"target_modules": ["embed_tokens"]}, "HF PEFT has no BOFT on this Embedding"),
    "boft that does not divide": ("llama", BOFT, {"boft_block_size": 5}, "boft_block_size = 5 does not divide its width 32"),
    "too many factors": (
        "llama", BOFT, {"boft_n_butterfly_factor": 5}, "boft_n_butterfly_factor = 5 does not fit 8 blocks of 4",
    ),
    "pissa and dora": ("llama", LORA, PISSA | {"use_dora": True}, "use_dora = True beside init_lora_weights"),
    "pissa on a table": ("llama", LORA, PISSA | {"target_modules": ["embed_tokens"]}, "no PiSSA on a embedding"),
    "pissa on tied tables": ("gpt2", LORA, PISSA | {"target_modules": ["lm_head"]}, "its weight is the input embeddings' too"),
    "another start": ("llama", LORA, PISSA | {"init_lora_weights": "olora"}, "cannot be kept"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_not_read(case: str) -> None:
    arch, kind, options, message = UNREAD[case]
    model = make(arch)
    with pytest.raises(ValueError) as error:
        dt.attach(model, config(kind, arch, **options))
    assert message in str(error.value) and not dt.adapters(model)


class Convolutions(nn.Module):
    """One narrow and one wide convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x))


def test_oft_of_convolutions(tmp_path: Path) -> None:
    """A 1 x 1 convolution is read; what HF PEFT makes of a wider one is another layer already at its start."""
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    bare = Convolutions()(x)
    options: dict[str, Any] = {"oft_block_size": 4}
    hf: Any = stir(peft.get_peft_model(Convolutions(), peft.OFTConfig(target_modules=["narrow"], **options))).eval()
    model = Convolutions()
    dt.load(model, written(hf, tmp_path))
    close(model(x), hf(x))
    assert (hf(x) - bare).abs().max() > 0.1
    wide = peft.get_peft_model(Convolutions(), peft.OFTConfig(target_modules=["wide"], **options)).eval()
    assert (wide(x) - bare).abs().max() > 1.0
    close(wide.merge_and_unload()(x), bare)
