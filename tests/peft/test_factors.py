"""LoHa, LoKr and VeRA through HF PEFT's files and objects: logits equal to the installed peft's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import config, loaded, logits, make, stir, theirs, written
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltatune as dt

LOHA, LOKR, VERA = "LoHaConfig", "LoKrConfig", "VeraConfig"
MLP = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONV: dict[str, Any] = {"target_modules": ["projection"], "modules_to_save": ["classifier"]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loha by place": (
        "llama", LOHA,
        {"target_modules": MLP, "exclude_modules": ["layers.0.self_attn.v_proj"], "use_effective_conv2d": True, "alpha": 5,
         "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*_proj": 3}},
    ),
    "loha in training": (
        "bert", LOHA, {"rank_dropout": 0.5, "module_dropout": 0.5, "init_weights": False, "modules_to_save": ["pooler"]},
    ),
    "loha of a convolution": ("vit", LOHA, {**CONV, "r": 3}),
    "effective loha": ("vit", LOHA, {**CONV, "r": 3, "use_effective_conv2d": True}),
    "lokr both": ("t5", LOKR, {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "lokr by place": (
        "llama", LOKR,
        {"target_modules": MLP, "r": 2, "rank_pattern": {"q_proj": 1, "down_proj": 30}, "alpha_pattern": {"up_proj": 3}},
    ),
    "lokr of a bound": ("llama", LOKR, {"target_modules": MLP, "decompose_factor": 5, "r": 2, "decompose_both": True}),
    "lokr of one number": ("llama", LOKR, {"decompose_factor": -3, "r": 2}),
    "lokr in training": ("bert", LOKR, {"rank_dropout": 0.5, "rank_dropout_scale": True, "init_weights": "lycoris"}),
    "lokr of a convolution": ("vit", LOKR, {**CONV, "r": 1}),
    "whole lokr of a convolution": ("vit", LOKR, CONV),
    "effective lokr": ("vit", LOKR, {**CONV, "r": 1, "use_effective_conv2d": True, "decompose_both": True}),
    "vera of unlike layers": ("llama", VERA, {"target_modules": MLP, "r": 5, "d_initial": 0.3, "vera_dropout": 0.1}),
    "vera drawn": (
        "llama", VERA, {"target_modules": MLP, "save_projection": False, "projection_prng_key": 3, "r": 40},
    ),
    "vera beside a saved head": (
        "llama", VERA, {"target_modules": ".*(q_proj|lm_head)", "modules_to_save": ["lm_head"], "save_projection": False},
    ),
    "vera of one layer": ("t5", VERA, {"target_modules": ["q"], "layers_to_transform": [1]}),
    "vera on GPT-2": ("gpt2", VERA, {"target_modules": ["c_attn", "c_fc"], "r": 9}),
    "vera with its biases": ("bert", VERA, {"bias": "vera_only", "save_projection": False}),
}  # fmt: skip
TRAINING = ("rank_dropout", "init_weights")  # an object with these is refused, which test_configs holds


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    """Their file here, then ours there, and ours here: the same logits, far from the base's."""
    arch, kind, options = CASES[case]
    hf = theirs(arch, config(kind, arch, **options))
    want, bare = logits(hf, arch), logits(make(arch), arch)
    model = make(arch)
    adapter = dt.load(model, written(hf, tmp_path / "theirs"))
    close(logits(model, arch), want)
    assert (want - bare).abs().max() > 0.05
    adapter.save(tmp_path / "ours", format="peft")
    close(logits(loaded(arch, tmp_path / "ours"), arch), want)
    for folder, form in (("ours", "peft"), ("own", "deltatune")):
        adapter.save(tmp_path / folder, format=form)
        again = make(arch)
        dt.load(again, tmp_path / folder)
        close(logits(again, arch), want)
    adapter.detach()
    assert torch.equal(logits(model, arch), bare)


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
@pytest.mark.parametrize(
    "case", [name for name, (*_, options) in CASES.items() if not any(k in options for k in TRAINING)]
)
def test_objects_adapt_what_theirs_do(case: str, tmp_path: Path) -> None:
    """An object trains the tensors that HF PEFT's own model has, and starts as it starts."""
    arch, kind, options = CASES[case]
    model, cfg = make(arch), config(kind, arch, **options)
    adapter = dt.attach(model, cfg, head="auto" if cfg.task_type else None)
    assert torch.equal(logits(model, arch), logits(make(arch), arch))
    folder = written(theirs(arch, config(kind, arch, **options)), tmp_path / "theirs")
    read = dt.load(make(arch), folder).deltas
    assert {at: d.config for at, d in read.items()} == {at: d.config for at, d in adapter.deltas.items()}
    adapter.save(tmp_path / "ours", format="peft")
    have, want = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "ours", folder))
    extra = (".original_module.", ".modules_to_save.", "base_layer.weight")
    want = {k: t for k, t in want.items() if not any(part in k for part in extra)}
    assert {k: t.shape for k, t in have.items()} == {k: t.shape for k, t in want.items()}
    for key in ("base_model.vera_A", "base_model.vera_B"):
        assert torch.equal(have[key], want[key]) if key in want else key not in have


def test_projections_of_a_file_are_kept(tmp_path: Path) -> None:
    """A file's A and B, drawn by another version or rounded to bf16 with its base, are read as they are, and stay in our files."""
    folder = written(theirs("llama", config(VERA, "llama", r=6)), tmp_path / "theirs")
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in ("base_model.vera_A", "base_model.vera_B"):
        tensors[key] = tensors[key].bfloat16().float() + 0.01
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    want = logits(loaded("llama", folder), "llama")
    model = make("llama")
    adapter = dt.load(model, folder)
    close(logits(model, "llama"), want)
    assert not [n for n, _ in adapter.named_parameters() if "bank" in n]
    for form in ("deltatune", "peft"):
        adapter.save(tmp_path / form, format=form)
        again = make("llama")
        dt.load(again, tmp_path / form)
        close(logits(again, "llama"), want)
    held = load_file(tmp_path / "deltatune" / "adapter.safetensors")
    assert sorted(k.partition(".")[2][:1] for k in held if k.startswith("bank.")) == ["a", "b"]
    del tensors["base_model.vera_B"]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing base_model\.vera_B"):
        dt.load(make("llama"), folder)


OURS: dict[str, tuple[str, Any]] = {
    "lokr by place": ("llama", dt.LoKr(r=1, both=True, where={"q": {}, "mlp": {"r": 2, "alpha": 5.0}})),
    "effective lokr": ("vit", dt.LoKr(r=1, effective=True, where="q,conv2d")),
    "vera": ("gpt2", dt.VeRA(r=7, key=5, where="mlp")),
    "vera with its matrices": ("t5", dt.VeRA(r=7, key=-5, saved=True, where="q,mlp")),
    "vera with biases": ("bert", dt.Sum(dt.VeRA(r=7, where="all-linear"), dt.BitFit())),
}


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
@pytest.mark.parametrize("case", OURS)
def test_ours(case: str, tmp_path: Path) -> None:
    """Ours, trained, is read by HF PEFT."""
    arch, tree = OURS[case]
    model = make(arch)
    adapter = dt.attach(model, tree)
    stir(model)
    adapter.save(tmp_path, format="peft")
    close(logits(loaded(arch, tmp_path), arch), logits(model, arch))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "loha on Conv1D": ("gpt2", dt.LoHa(where="mlp"), "HF PEFT has no LoHa on a Conv1D"),
    "a slice": ("gpt2", dt.VeRA(where="q"), "HF PEFT has no VeRA on a slice of a fused projection"),
    "a table": ("llama", dt.LoKr(where="embed"), "HF PEFT has no LoKr on a Embedding"),
    "vera on a convolution": ("vit", dt.VeRA(where="conv2d"), "HF PEFT has no VeRA on a Conv2d"),
    "two keys": ("llama", dt.VeRA(where={"q": {"d_initial": 0.2}, "v": {}}), "by place cannot be written as HF PEFT's"),
    "two pairs of matrices": ("llama", dt.Sum(dt.VeRA(where="q"), dt.VeRA(where="v")), "by place cannot be written"),
    "two factors": ("llama", dt.LoKr(where={"q": {"factor": 4}, "v": {}}), "factor, both, effective by place cannot be written"),
    "biases": ("bert", dt.Sum(dt.LoHa(), dt.BitFit(where="mlp.up")), "bitfit beside loha"),
    "krona": ("llama", dt.KronA(), "krona cannot be written as HF PEFT's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_not_written(case: str, tmp_path: Path) -> None:
    arch, tree, message = REFUSED[case]
    model = make(arch)
    adapter = dt.attach(model, tree)
    stir(model)
    with pytest.raises(ValueError) as error:
        adapter.save(tmp_path / "out", format="peft")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_not_read(tmp_path: Path) -> None:
    """Layers where HF PEFT itself has no such method, and a padding that it would not pad."""
    for kind in (LOHA, LOKR):
        with pytest.raises(ValueError, match="on a Conv1D"):
            dt.attach(make("gpt2"), config(kind, "gpt2", target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="has no VeRA on a Embedding"):
        dt.attach(make("llama"), config(VERA, "llama", target_modules=["embed_tokens"]))
    vit: Any = make("vit")
    folder = written(theirs("vit", config(LOHA, "vit", **CONV)), tmp_path)
    vit.vit.embeddings.patch_embeddings.projection.padding_mode = "circular"
    with pytest.raises(ValueError, match="pads by 'circular'"):
        dt.load(vit, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LOHA"
