"""HF PEFT's files read and written: logits equal to the installed peft's, for each row on each kind of backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import IDS, batch, config, loaded, logits, make, stir, theirs, written
from safetensors.torch import load_file, save_file

import deltatune as dt

N = 3
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "rslora": ("LoraConfig", {"use_rslora": True, "r": 4, "lora_alpha": 3}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "lora_bias": ("LoraConfig", {"lora_bias": True}),
    "bias all": ("LoraConfig", {"bias": "all"}),
    "bias lora_only": ("LoraConfig", {"bias": "lora_only", "lora_bias": True}),
    "all-linear": ("LoraConfig", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "trained tokens": ("LoraConfig", {"trainable_token_indices": [2, 5, 11]}),
    "ia3": ("IA3Config", {}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10, "tinit": 1, "tfinal": 2}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": N}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": N, "encoder_hidden_size": 8}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": N}),
    "prefix mlp": ("PrefixTuningConfig", {"num_virtual_tokens": N, "prefix_projection": True, "encoder_hidden_size": 8}),
}  # fmt: skip
LORA = "LoraConfig"
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "layers of a list": ("t5-odd", LORA, {"layers_to_transform": [1], "layers_pattern": "block", "target_modules": ["q"]}),
    "one layer": ("llama", LORA, {"layers_to_transform": 1, "target_modules": ["q_proj", "v_proj"]}),
    "expression": ("llama", LORA, {"target_modules": r".*layers\.0.*_proj", "exclude_modules": ["v_proj"]}),
    "exclude by expression": ("llama", LORA, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"}),
    "patterns": ("llama", LORA, {
        "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "use_rslora": True, "alpha_pattern": {"layers.1.*_proj": 5},
        "rank_pattern": {"down_proj": 2, "^model.layers.0.self_attn.q_proj": 3},
    }),
    "dora patterns": ("gpt2", LORA, {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 3}}),
    "embeddings": ("llama", LORA, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 4, "lora_dropout": 0.1}),
    "saved embeddings": ("llama", LORA, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "saved tied head": ("gpt2", LORA, {"modules_to_save": ["lm_head"]}),
    "adapted tied table": ("gpt2", LORA, {"target_modules": ["c_attn", "wte"], "r": 4}),
    "tokens by name": ("llama", LORA, {"trainable_token_indices": {"embed_tokens": [3, 4]}}),
    "no task": ("bert", LORA, {"task_type": None}),
    "pooler": ("bert", LORA, {"modules_to_save": ["classifier", "pooler"]}),
    "token classification": ("bert-tokens", LORA, {"bias": "all"}),
    "orthogonal start": ("llama", LORA, {"init_lora_weights": "orthogonal"}),
    "mica start": ("llama", LORA, {"init_lora_weights": "mica"}),
    "no head": ("bert-model", LORA, {}),
    "adalora with biases": (
        "bert", "AdaLoraConfig", {"init_r": 4, "total_step": 10, "tinit": 1, "tfinal": 2, "bias": "all"},
    ),
    "head of two layers": ("roberta", LORA, {"bias": "all"}),
    "two head layers": ("distilbert", LORA, {"target_modules": ["q_lin"]}),
    "experts": ("mixtral", LORA, {
        "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2,
        "rank_pattern": {"experts.down_proj": 3},
    }),
    "experts alone": ("mixtral", LORA, {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 2}),
    "transposed experts": ("gpt-oss", LORA, {
        "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2,
    }),
    "convolution": ("vit", LORA, {"target_modules": ["projection"], "r": 4, "modules_to_save": ["classifier"]}),
    "dora of a convolution": ("vit", LORA, {"target_modules": ["projection"], "use_dora": True, "r": 4}),
    "ia3 of other layers": ("llama", "IA3Config", {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": ["o_proj"]}),
    "ia3 by expression": ("llama", "IA3Config", {"target_modules": ".*_proj", "feedforward_modules": ".*down_proj"}),
    **{f"shira of {arch}": (arch, "ShiraConfig", {"r": 4, "random_seed": 5}) for arch in ("bert", "llama", "t5", "bart")},
    "shira without a seed": ("llama", "ShiraConfig", {"r": 2, "target_modules": ["q_proj", "down_proj"]}),
    "shira beside a saved layer": ("llama", "ShiraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
    "norms of bert": ("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "norms of llama": ("llama", "LNTuningConfig", {}),
    "norms of gpt2": ("gpt2", "LNTuningConfig", {"modules_to_save": ["lm_head"]}),
    "norms of t5": ("t5", "LNTuningConfig", {}),
    "norms of bart": ("bart", "LNTuningConfig", {}),
    "norms by expression": (
        "llama", "LNTuningConfig", {"target_modules": r".*layers\.\d.*norm", "exclude_modules": [r"layers.0.input_layernorm"]},
    ),
    "roberta prompt": ("roberta", "PromptTuningConfig", {"num_virtual_tokens": N}),
    "roberta prefix": ("roberta", "PrefixTuningConfig", {"num_virtual_tokens": N}),
    "opt prompt": ("opt", "PromptTuningConfig", {"num_virtual_tokens": N}),
    "opt prefix": ("opt", "PrefixTuningConfig", {"num_virtual_tokens": N}),
    "bart prompt": ("bart", "PromptTuningConfig", {"num_virtual_tokens": N}),
    "prompt for tokens": ("bert-tokens", "PromptTuningConfig", {"num_virtual_tokens": N}),
    "prefix for tokens": ("bert-tokens", "PrefixTuningConfig", {"num_virtual_tokens": N}),
    "prompt for features": ("bert-model", "PromptTuningConfig", {"num_virtual_tokens": N}),
    "three layers of T5": ("t5-odd", "PrefixTuningConfig", {"num_virtual_tokens": N}),
}  # fmt: skip
CASES = {
    f"{arch} {name}": (arch, *row) for arch in ("bert", "llama", "gpt2", "t5") for name, row in KINDS.items()
} | MORE


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    """Their file here, then ours there: the same logits, far from the base's."""
    arch, kind, options = CASES[case]
    hf = theirs(arch, config(kind, arch, **options))
    want = logits(hf, arch)
    model = make(arch)
    adapter = dt.load(model, written(hf, tmp_path / "theirs"))
    close(logits(model, arch), want)
    assert (want - logits(make(arch), arch)).abs().max() > 0.1
    assert not any(p.requires_grad for p in model.parameters())
    adapter.save(tmp_path / "ours", format="peft")
    close(logits(loaded(arch, tmp_path / "ours"), arch), want)
    adapter.detach()
    assert torch.equal(logits(model, arch), logits(make(arch), arch))


def test_one_classifier_of_a_decoder(tmp_path: Path) -> None:
    """HF PEFT pools rows with prompts at their last position, padded or not: equal where nothing is padded."""
    hf = theirs("llama-head", config("PromptTuningConfig", "llama-head", num_virtual_tokens=N))
    model = make("llama-head")
    adapter = dt.load(model, written(hf, tmp_path))
    assert adapter.tree.to_dict()["config"]["pooled"] is False
    with torch.no_grad():
        close(model(input_ids=IDS).logits, hf(input_ids=IDS).logits)


def test_pruned_adalora(tmp_path: Path) -> None:
    """HF PEFT's file holds the kept triplets alone, and keeps the scale of the rank at the start."""
    hf: Any = theirs("llama", config("AdaLoraConfig", "llama", init_r=4, total_step=10, tinit=1, tfinal=2))
    names = [n for n, _ in hf.named_parameters() if "lora_E" in n]
    kept = [[True, False, True, True], [False] * 4, [True] * 4, [False, False, False, True]]
    pattern = {n.removeprefix("base_model.model."): k for n, k in zip(names, kept, strict=True)}
    hf.peft_config["default"].rank_pattern = pattern
    with torch.no_grad():
        for name, mask in zip(names, kept, strict=True):
            hf.get_parameter(name)[~torch.tensor(mask)] = 0
    folder = written(hf, tmp_path)
    shapes = {
        tuple(t.shape) for k, t in load_file(folder / "adapter_model.safetensors").items() if k.endswith("lora_A")
    }
    assert shapes == {(3, 32), (0, 32), (4, 32), (1, 32)}
    model = make("llama")
    adapter = dt.load(model, folder)
    close(logits(model, "llama"), logits(hf, "llama"))
    close(logits(loaded("llama", folder), "llama"), logits(hf, "llama"))
    assert [d.rank for d in adapter.deltas.values()] == [3, 0, 4, 1]


def moved(arch: str, tree: Any, **options: Any) -> tuple[Any, dt.Adapter]:
    model = make(arch)
    adapter = dt.attach(model, tree, **options)
    stir(model)
    return model, adapter


OURS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "defaults of GPT-2": ("gpt2", dt.LoRA(r=4), {}),
    "slices of unlike scale": ("gpt2", dt.Sum(dt.LoRA(r=2, alpha=3.0, where="q"), dt.LoRA(r=3, where="v")), {}),
    "ia3 on slices": ("gpt2", dt.IA3(), {}),
    "another power": ("llama", dt.LoRA(r=4, power=0.3), {}),
    "places": ("llama", dt.LoRA(r=4, where={"attn": {"r": 2}, "mlp": {"alpha": 3.0}}), {}),
    "two leaves": ("bert", dt.Sum(dt.LoRA(r=2, where="attn.o"), dt.LoRA(r=4, where="mlp")), {}),
    "ours with bitfit": ("bert", dt.Sum(dt.LoRA(where="all-linear"), dt.BitFit()), {}),
    "stacked bitfit": ("bert", dt.Stack(dt.DoRA(), dt.BitFit()), {}),
    "experts": ("mixtral", dt.LoRA(r=2, where="experts,q"), {}),
    "shira": ("bert", dt.SHiRA(), {}),
    "shira of layers of two sizes": ("llama", dt.SHiRA(keep=0.2, where="q,k,mlp"), {}),
    "shira of a rank": ("t5", dt.SHiRA(r=3, mask_seed=7), {}),
    "norms": ("bert", dt.LNTuning(), {}),
    "norms of one layer": ("bart", dt.LNTuning(layers=1), {}),
    "a prefix with its network": ("llama", dt.PrefixTuning(n=N, shift=True, mid=5), {}),
    "a head left out": ("bert", dt.LoRA(), {"head": None}),
    "a prompt without a head": ("bert", dt.PromptTuning(n=N, pooled=True), {"head": None}),
    "two layers of a head": ("distilbert", dt.LoRA(), {}),
    "dropout": ("bert", dt.LoRA(dropout=0.2), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_ours(case: str, tmp_path: Path) -> None:
    arch, tree, options = OURS[case]
    model, adapter = moved(arch, tree, **options)
    adapter.save(tmp_path, format="peft")
    want = logits(model, arch)
    assert (want - logits(make(arch), arch)).abs().max() > 0.1
    close(logits(loaded(arch, tmp_path), arch), want)
    again = make(arch)
    dt.load(again, tmp_path)
    close(logits(again, arch), want)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no such method": ("bert", dt.Sequential(), "sequential cannot be written"),
    "bitfit alone": ("bert", dt.BitFit(), "needs one of adalora, "),
    "biases beside norms": ("bert", dt.Sum(dt.LNTuning(), dt.BitFit(where="q")), "bitfit beside ln_tuning"),
    "in place": ("bert", dt.Full(), "full trains the base itself"),
    "two methods": ("bert", dt.Sum(dt.LoRA(where="q"), dt.IA3()), "ia3, lora cannot be written as one adapter"),
    "two at one layer": ("bert", dt.Sum(dt.LoRA(), dt.LoRA(r=2)), "query: lora, lora meet there"),
    "a mean": ("bert", dt.Average(dt.LoRA(), dt.BitFit(where="q")), "query: lora, bitfit meet there"),
    "some biases": ("bert", dt.Sum(dt.LoRA(), dt.BitFit(where="mlp.up")), "biases of all layers that have one"),
    "a new bias": ("llama", dt.Sum(dt.LoRA(), dt.BitFit(where="q,v")), "biases of all layers that have one"),
    "an untied row": ("gpt2", dt.Sum(dt.LoRA(), dt.TokenRows(ids=(1,))), "lm_head, transformer.wte together"),
    "dora on slices": ("gpt2", dt.DoRA(), "dora on a slice"),
    "dora on experts": ("mixtral", dt.DoRA(r=2, where="experts"), "dora on fused experts"),
    "dora on a table": ("llama", dt.DoRA(where="embed"), "dora on an embedding"),
    "ia3 on experts": ("mixtral", dt.IA3(where="experts"), "ia3 on experts"),
    "a group of channels": ("vit", dt.AdaLoRA(r=2, where="conv2d"), "adalora is written as HF PEFT's on whole linear layers"),
    "[CLS]": ("bert", dt.PromptTuning(n=N), "only pooled=True"),
    "decoder's prompt": ("t5", dt.PromptTuning(n=N, side="decoder"), "in front of the (encoder's) input"),
    "prefix in place": ("llama", dt.PrefixTuning(n=N), "only shift=True"),
    "prefix of some layers": ("llama", dt.PrefixTuning(n=N, shift=True, layers=1), "one prefix in every layer"),
    "prefix of two lengths": (
        "llama", dt.PrefixTuning(shift=True, where={"model.layers.0.self_attn": {"n": 2}, "model.layers.1.self_attn": {}}),
        "prefixes of one length",
    ),
    "unlike layers of T5": (
        "t5", dt.PrefixTuning(n=N, shift=True, where=r"decoder.*SelfAttention"), "SelfAttention one prefix; here they have two",
    ),
    "dropouts": (
        "bert", dt.LoRA(where={"q": {"dropout": 0.1}, "v": {}}), "HF PEFT's, which has one",
    ),
    "a bias here and there": ("bert", dt.LoRA(where={"q": {"bias": True}, "v": {}}), "which is everywhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_not_written(case: str, tmp_path: Path) -> None:
    arch, tree, message = REFUSED[case]
    _, adapter = moved(arch, tree)
    with pytest.raises(ValueError) as error:
        adapter.save(tmp_path / "out", format="peft")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unlike_layers_of_three_are_written(tmp_path: Path) -> None:
    """HF PEFT pairs T5's layers 0 and n / 2, 1 and n / 2 + 1, ...; of an odd number each has its own."""
    model, adapter = moved("t5-odd", dt.PrefixTuning(n=N, shift=True, where=r"decoder.*SelfAttention"))
    adapter.save(tmp_path, format="peft")
    close(logits(loaded("t5-odd", tmp_path), "t5-odd"), logits(model, "t5-odd"))


def folder_of(
    tmp_path: Path, arch: str = "bert", **options: Any
) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    folder = written(theirs(arch, config("LoraConfig", arch, **options)), tmp_path)
    card = json.loads((folder / "adapter_config.json").read_text())
    return folder, card, load_file(folder / "adapter_model.safetensors")


def refuses(arch: str, folder: Path) -> str:
    model = make(arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        dt.load(model, folder)
    assert not dt.adapters(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.requires_grad for p in model.parameters())
    return str(error.value)


def test_damaged_tensors_in_one_error(tmp_path: Path) -> None:
    folder, _, tensors = folder_of(tmp_path)
    at = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
    tensors[f"{at}B.weight"] = tensors[f"{at}B.weight"][:, :2].contiguous()
    tensors["base_model.model.bert.odd"] = tensors.pop(f"{at}A.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    said = refuses("bert", folder)
    assert f"missing {at}A.weight" in said and "unexpected base_model.model.bert.odd" in said
    assert f"{at}B.weight is (32, 2), here it must be (32, 8)" in said


def test_another_architecture(tmp_path: Path) -> None:
    folder, _, _ = folder_of(tmp_path)
    assert "matches no layer of this LlamaForCausalLM" in refuses("llama", folder)
    assert "missing base_model.model.roberta.encoder" in refuses("roberta", folder)


def test_another_base_is_seen_where_a_file_holds_its_embeddings(tmp_path: Path) -> None:
    folder, _, tensors = folder_of(tmp_path, "llama", target_modules=["q_proj", "embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in tensors
    dt.load(make("llama"), folder)
    save_file(tensors | {key: tensors[key] + 0.1}, folder / "adapter_model.safetensors")
    assert f"{key} brings other values than the base has" in refuses("llama", folder)
    save_file(tensors | {key: torch.zeros(44, 32)}, folder / "adapter_model.safetensors")
    assert "resize the base's embeddings first" in refuses("llama", folder)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder, _, tensors = folder_of(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    assert "it has no adapter_model.safetensors" in refuses("bert", folder)
    torch.save(tensors, folder / "adapter_model.bin")
    assert "is a pickle, which could run code" in refuses("bert", folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files(file: str, tmp_path: Path) -> None:
    folder, _, _ = folder_of(tmp_path)
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    assert f"{file} is damaged" in refuses("bert", folder)


def test_no_path_is_written(tmp_path: Path) -> None:
    """A name of the hub is kept, a path of this machine is not, and HF PEFT needs neither."""
    for name, want in (
        ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        (str(tmp_path), None),
        ("", None),
    ):
        model, adapter = moved("bert", dt.LoRA())
        model.config._name_or_path = name
        adapter.save(tmp_path / "out", format="peft")
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == want


def test_ours_comes_first(tmp_path: Path) -> None:
    """A folder that holds both formats is read as ours."""
    _, adapter = moved("bert", dt.LoRA(r=3))
    adapter.save(tmp_path, format="peft")
    adapter.save(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert dt.load(make("bert"), tmp_path).tree == adapter.tree
    with pytest.raises(ValueError, match="in our own format"):
        adapter.save(tmp_path, format="peft", resumable=True)


def test_it_trains_on(tmp_path: Path) -> None:
    folder, _, _ = folder_of(tmp_path, use_dora=True, bias="all", trainable_token_indices=[3])
    model = make("bert")
    adapter = dt.load(model, folder, trainable=True)
    model(**batch("bert"), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
