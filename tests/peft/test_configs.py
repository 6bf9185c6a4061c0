"""HF PEFT's configurations: its rules for names, its defaults, and a word on every field of the installed version."""

import json
import runpy
import warnings
from dataclasses import fields as fields_of
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from hf_models import config, make, theirs, written
from safetensors.torch import load_file
from test_interchange import CASES

import deltatune as dt
from deltatune.peft import FIELDS

CONFIGS = {
    "LORA": "LoraConfig", "ADALORA": "AdaLoraConfig", "IA3": "IA3Config", "PROMPT_TUNING": "PromptTuningConfig",
    "P_TUNING": "PromptEncoderConfig", "PREFIX_TUNING": "PrefixTuningConfig", "OFT": "OFTConfig", "BOFT": "BOFTConfig",
    "LOHA": "LoHaConfig", "LOKR": "LoKrConfig", "VERA": "VeraConfig",
    "SHIRA": "ShiraConfig", "LN_TUNING": "LNTuningConfig",
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "SHIRA": {"r": 2},
    "ADALORA": {"init_r": 4, "total_step": 100, "tinit": 1, "tfinal": 2}, "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, "PREFIX_TUNING": {"num_virtual_tokens": 3},
}  # fmt: skip


def quiet(kind: str, arch: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF PEFT's advice
        return config(CONFIGS[kind], arch, **NEEDED.get(kind, {}), **options)


def outcome(arch: str, cfg: Any) -> str:
    """What attach makes of a configuration object: the tree and its sites, or the error."""
    model = make(arch)
    try:
        adapter = dt.attach(model, cfg)
    except ValueError as error:
        assert not dt.adapters(model)
        return f"error: {error}"
    sizes = {n: tuple(p.shape) for n, p in adapter.named_parameters()}
    return f"{adapter.tree.to_dict()} {sorted(adapter.deltas)} {sizes}"


def file_outcome(arch: str, folder: Path, **changed: Any) -> str:
    """The same of a file whose configuration was changed."""
    card = json.loads((folder / "adapter_config.json").read_text()) | changed
    (folder / "adapter_config.json").write_text(json.dumps(card))
    model = make(arch)
    try:
        adapter = dt.load(model, folder)
    except ValueError as error:
        assert not dt.adapters(model)
        return f"error: {error}".replace(str(folder), "")
    return f"{adapter.tree.to_dict()} {sorted(adapter.deltas)}"


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_has_a_word(kind: str) -> None:
    assert set(FIELDS[kind]) == {f.name for f in fields_of(getattr(peft, CONFIGS[kind]))}
    assert {f.kind for f in FIELDS[kind].values()} <= {"translated", "training", "no effect", "refused"}
    assert all(f.text for f in FIELDS[kind].values())


SET: dict[str, Any] = {
    "megatron_config": {"a": 1}, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1}, "velora_config": {"a": 1}, "alora_invocation_tokens": [1], "use_qalora": True,
    "monteclora_config": {"a": 1}, "layer_replication": [[0, 1]], "use_bdlora": {"a": 1}, "arrow_config": {"a": 1},
    "kasa_config": {"a": 1}, "ensure_weight_tying": True, "init_lora_weights": "gaussian", "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "a", "tokenizer_kwargs": {"a": 1}, "init_weights": "zero",
    "init_ia3_weights": False, "rank_dropout": 0.5, "module_dropout": 0.5,
    "boft_dropout": 0.5, "mask_type": "mine", "r": 4, "use_rslora": True, "alpha_pattern": {"q_proj": 1}, "use_dora": True,
    "lora_bias": True, "target_parameters": ["a"], "runtime_config": SimpleNamespace(ephemeral_gpu_offload=True),
}  # fmt: skip
STRICT = [(kind, n) for kind in CONFIGS for n, f in FIELDS[kind].items() if f.kind in ("refused", "training")]


@pytest.mark.parametrize(("kind", "field"), STRICT, ids=[" ".join(case) for case in STRICT])
def test_refused_when_set(kind: str, field: str, tmp_path: Path) -> None:
    """In an object always; in a file unless training alone knows it."""
    assert not outcome("llama", quiet(kind, "llama")).startswith("error") or kind == "P_TUNING"
    cfg = quiet(kind, "llama")
    setattr(cfg, field, SET[field])
    said = outcome("llama", cfg)
    assert said.startswith("error") and field in said and FIELDS[kind][field].text in said
    folder = written(theirs("llama", quiet(kind, "llama")), tmp_path)
    value = vars(SET[field]) if isinstance(SET[field], SimpleNamespace) else SET[field]
    bare = file_outcome("llama", folder)
    assert not bare.startswith("error")
    found = file_outcome("llama", folder, **{field: value})
    if FIELDS[kind][field].kind == "training":
        assert found == bare
    else:
        assert found.startswith("error") and field in found


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changes_the_base(start: str, tmp_path: Path) -> None:
    folder = written(theirs("llama", quiet("LORA", "llama")), tmp_path)
    assert "it changes the base's weights" in file_outcome("llama", folder, init_lora_weights=start)


LISTED = {"target_modules": ["q_proj", "v_proj"]}
PROMPTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "num_virtual_tokens": ("llama", {}, 5), "token_dim": ("llama", {}, 16), "task_type": ("bert", {}, None),
}  # fmt: skip
CHANGES: dict[str, dict[str, tuple[str, dict[str, Any], Any]]] = {
    "LORA": {
        "task_type": ("bert", {"target_modules": "all-linear"}, None), "modules_to_save": ("llama", LISTED, ["lm_head"]),
        "target_modules": ("llama", {}, ["k_proj"]), "exclude_modules": ("llama", LISTED, ["v_proj"]),
        "r": ("llama", {}, 3), "lora_alpha": ("llama", {}, 3), "lora_dropout": ("llama", {}, 0.5), "bias": ("bert", {}, "all"),
        "use_rslora": ("llama", {}, True), "layers_to_transform": ("llama", LISTED, [1]),
        "layers_pattern": ("llama", LISTED | {"layers_to_transform": [1]}, "blocks"),
        "rank_pattern": ("llama", LISTED, {"q_proj": 3}), "alpha_pattern": ("llama", LISTED, {"q_proj": 3}),
        "trainable_token_indices": ("llama", {}, [1]), "use_dora": ("llama", {}, True), "lora_bias": ("llama", {}, True),
        "target_parameters": ("mixtral", LISTED, ["experts.down_proj"]),
    },
    "ADALORA": {
        "init_r": ("llama", {}, 3), "target_r": ("llama", {}, 3), "tinit": ("llama", {}, 3), "tfinal": ("llama", {}, 3),
        "deltaT": ("llama", {}, 3), "beta1": ("llama", {}, 0.5), "beta2": ("llama", {}, 0.5),
        "orth_reg_weight": ("llama", {}, 0.1), "rank_pattern": ("llama", {}, {"a": [True]}),
    },
    "IA3": {"feedforward_modules": ("llama", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": []}, ["down_proj"])},
    "OFT": {
        "r": ("llama", {"r": 2, "oft_block_size": 0}, 4), "oft_block_size": ("llama", {}, 8), "coft": ("llama", {}, True),
        "eps": ("llama", {"coft": True}, 0.1), "block_share": ("llama", {}, True),
        "use_cayley_neumann": ("llama", {}, False), "num_cayley_neumann_terms": ("llama", {}, 7),
    },
    "BOFT": {
        "boft_block_size": ("llama", {}, 8), "boft_block_num": ("llama", {"boft_block_num": 8, "boft_block_size": 0}, 4),
        "boft_n_butterfly_factor": ("llama", {}, 2),
    },
    "LOHA": {"alpha": ("llama", {}, 3), "use_effective_conv2d": ("llama", {}, True)},
    "LOKR": {
        "alpha": ("llama", {}, 3), "use_effective_conv2d": ("llama", {}, True), "decompose_both": ("llama", {}, True),
        "decompose_factor": ("llama", {}, 2),
    },
    "VERA": {
        "projection_prng_key": ("llama", {}, 3), "save_projection": ("llama", {}, False), "vera_dropout": ("llama", {}, 0.5),
        "d_initial": ("llama", {}, 0.3),
    },
    "SHIRA": {"r": ("llama", {}, 3), "random_seed": ("llama", {}, 3)},
    "LN_TUNING": {
        "modules_to_save": ("llama", {}, ["lm_head"]), "target_modules": ("llama", {}, ["input_layernorm"]),
        "exclude_modules": ("llama", {}, ["input_layernorm"]),
    },
    "PROMPT_TUNING": PROMPTS,
    "P_TUNING": {},
    "PREFIX_TUNING": PROMPTS | {
        "task_type": ("t5", {}, "SEQ_CLS"),
        "token_dim": ("llama", {}, 32), "num_layers": ("llama", {}, 3),
        "num_attention_heads": ("llama", {}, 3), "num_transformer_submodules": ("llama", {}, 2),
        "prefix_projection": ("llama", {"encoder_hidden_size": 8}, True),
        "encoder_hidden_size": ("llama", {"encoder_hidden_size": 8, "prefix_projection": True}, 4),
    },
}  # fmt: skip
for _kind in ("ADALORA", "IA3", "OFT", "BOFT", "LOHA", "LOKR", "VERA", "SHIRA", "PROMPT_TUNING", "PREFIX_TUNING"):
    CHANGES[_kind] = {k: v for k, v in CHANGES["LORA"].items() if k in FIELDS[_kind]} | CHANGES[_kind]
IN_FILES = {("PROMPT_TUNING", "num_transformer_submodules"), ("OFT", "peft_version")} | {
    ("P_TUNING", f) for f in FIELDS["P_TUNING"]
}
MOVING = [(k, n) for k in CONFIGS for n, f in FIELDS[k].items() if f.kind == "translated" and n != "peft_type"]


@pytest.mark.parametrize(("kind", "field"), MOVING, ids=[" ".join(case) for case in MOVING])
def test_translated_fields_change_what_is_built(kind: str, field: str, tmp_path: Path) -> None:
    if (kind, field) in IN_FILES:
        arch = "bert" if field == "task_type" else "llama"
        folder = written(theirs(arch, quiet(kind, arch)), tmp_path)
        value = {
            "num_virtual_tokens": 2,
            "token_dim": 16,
            "num_transformer_submodules": 2,
            "modules_to_save": ["lm_head"],
            "peft_version": "0.17.1",
        }
        bare = file_outcome(arch, folder)
        assert not bare.startswith("error")
        assert file_outcome(arch, folder, **{field: value.get(field)}) != bare
        return
    arch, options, value = CHANGES[kind][field]
    options = {k: v for k, v in options.items() if k in FIELDS[kind]}
    bare = outcome(arch, quiet(kind, arch, **options))
    cfg = quiet(kind, arch, **options)
    assert getattr(cfg, field) != value
    setattr(cfg, field, value)
    assert not bare.startswith("error")
    assert outcome(arch, cfg) != bare


IDLE = [(k, n) for k in CONFIGS for n, f in FIELDS[k].items() if f.kind == "no effect" and n != "total_step"]


@pytest.mark.parametrize(("kind", "field"), IDLE, ids=[" ".join(case) for case in IDLE])
def test_fields_without_effect(kind: str, field: str, tmp_path: Path) -> None:
    """They change nothing, as in HF PEFT's own forward."""
    value = {"num_layers": 9, "num_attention_heads": 9, "task_type": None, "fan_in_fan_out": True}.get(field, "other")
    folder = written(theirs("llama", quiet(kind, "llama")), tmp_path)
    bare = file_outcome("llama", folder)
    assert not bare.startswith("error")
    assert file_outcome("llama", folder, **{field: value}) == bare


def test_unknown_field_and_type(tmp_path: Path) -> None:
    folder = written(theirs("llama", quiet("LORA", "llama")), tmp_path)
    said = file_outcome("llama", folder, use_news=False, peft_version="9.1.0")
    assert "the field 'use_news' is not known here; peft 9.1.0 wrote it" in said
    assert "unknown peft_type 'HRA'" in file_outcome("llama", folder, peft_type="HRA")
    assert "unknown peft_type 'HRA'" in outcome("llama", peft.HRAConfig())
    cfg = quiet("LORA", "llama")
    cfg._register_custom_module({object: object})
    assert "layers that were registered" in outcome("llama", cfg)
    assert "the network that makes the prompts is no method" in outcome("llama", quiet("P_TUNING", "llama"))


def test_an_object_that_hf_peft_has_used() -> None:
    """It notes `classifier` and `score` in the object, whichever the model has."""
    cfg = quiet("LORA", "bert", modules_to_save=["pooler"])
    theirs("bert", cfg)
    assert cfg.modules_to_save == ["pooler", "classifier", "score"]
    assert not outcome("bert", cfg).startswith("error")


def test_arguments_of_attach() -> None:
    model = make("bert")
    with pytest.raises(ValueError, match="where belongs to the LoraConfig; set it there"):
        dt.attach(model, quiet("LORA", "bert"), where="q")
    assert dt.attach(model, quiet("LORA", "bert"), name="bare", head=None).n_head == 0
    assert dt.attach(model, quiet("LORA", "bert"), name="two").n_head == 99
    assert dt.attach(model, quiet("LORA", "bert", modules_to_save=["classifier"]), name="three", head=None).n_head == 99


APART = {
    "llama bias all", "llama bias lora_only", "t5 bias all", "t5 bias lora_only",  # no bias to train: refused
    "orthogonal start", "mica start",  # refused: the start is another
    "t5 prefix", "t5 prefix mlp",  # theirs has one prefix for both layers, ours trains two
}  # fmt: skip
OBJECTS = {name: case for name, case in CASES.items() if case[1] != "PromptEncoderConfig" and name not in APART}


@pytest.mark.parametrize("case", OBJECTS)
def test_objects_adapt_what_theirs_do(case: str, tmp_path: Path) -> None:
    """An unresolved object trains the tensors that HF PEFT's own model has, by its own rules and defaults."""
    arch, kind, options = CASES[case]
    model = make(arch)
    cfg = config(kind, arch, **options)
    adapter = dt.attach(model, cfg, head="auto" if cfg.task_type else None)
    cfg = config(kind, arch, **options)
    want = load_file(written(theirs(arch, cfg), tmp_path / "theirs") / "adapter_model.safetensors")
    twice = (".base_layer.weight", ".original_module.", ".modules_to_save.")
    shapes = {k: tuple(t.shape) for k, t in want.items() if not any(part in k for part in twice)}
    if shapes.get("prompt_embeddings", (3,))[0] == 6:  # a second prompt, which no forward of theirs reads
        shapes["prompt_embeddings"] = (3, 32)
    adapter.save(tmp_path / "ours", format="peft")
    have = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in have.items()} == shapes


RULES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a typo in a list": ("llama", {"target_modules": ["q_proj", "v_prj"]}, "target_modules, which matches nothing, 'v_prj'"),
    "none matches": ("llama", {"target_modules": ["query"]}, "target_modules = ['query'] matches no layer"),
    "a part of a name": ("llama", {"target_modules": "q_proj"}, "'q_proj' matches no layer"),
    "no expression": ("llama", {"target_modules": "q_proj("}, "is no regular expression"),
    "idle exclusion": ("llama", {"exclude_modules": ["k_prj"]}, "exclude_modules, which matches nothing, 'k_prj'"),
    "a layer too far": (
        "llama", {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "layers_to_transform, which matches nothing, '2'",
    ),
    "an idle rank": ("llama", {"rank_pattern": {"k_proj": 3}}, "key of rank_pattern, which matches no adapted layer, 'k_proj'"),
    "an idle alpha": ("llama", {"alpha_pattern": {"k_proj": 3}}, "key of alpha_pattern"),
    "an idle copy": ("llama", {"modules_to_save": ["clasifier"]}, "modules_to_save, which matches nothing, 'clasifier'"),
    "no table": ("llama", {"trainable_token_indices": {"norm": [1]}}, "name one table"),
    "no such token": ("llama", {"trainable_token_indices": [40]}, "token 40 is not one of the table's 40"),
    "no biases": ("llama", {"bias": "all"}, "finds no bias"),
    "a whole block": ("llama", {"target_modules": ["mlp"]}, "mlp, a LlamaMLP, where lora has no place"),
    "a parameter": ("mixtral", {"target_parameters": ["gate.weight"]}, "which is no stack of fused experts"),
    "no default": ("vit", {}, "no default of target_modules for 'vit'"),
    "rank too large": ("llama", {"r": 64}, "r = 64, but it must lie between 1 and min(d_in,d_out) = 32"),
    "dora on a table": ("llama", {"use_dora": True, "target_modules": ["embed_tokens"]}, "columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_for_names(case: str) -> None:
    """What HF PEFT passes over in silence is an error that names it, and changes nothing."""
    arch, options, message = RULES[case]
    assert message in outcome(arch, quiet("LORA", arch, **options))


def test_a_list_in_a_file_may_name_more(tmp_path: Path) -> None:
    """Its tensors say which layers were adapted: what HF PEFT wrote of a list that it matched in part is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = written(theirs("llama", quiet("LORA", "llama", target_modules=["q_proj", "query"])), tmp_path)
    assert not file_outcome("llama", folder).startswith("error")
    assert "key of alpha_pattern" in file_outcome("llama", folder, alpha_pattern={"k_proj": 3})


def test_places_stay_short() -> None:
    """`where` is HF PEFT's own list, where that is a place here."""
    model = make("llama")
    assert dt.attach(model, quiet("LORA", "llama", target_modules=["v_proj", "q_proj"])).tree.to_dict()["where"] == [
        "q_proj",
        "v_proj",
    ]
    tree: Any = dt.attach(
        model, quiet("LORA", "llama", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}), name="two"
    ).tree
    assert [own for _, own in tree.where.each] == [(), (("r", 2),)]


def test_page_is_current() -> None:
    make_page = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_peft.py"))
    assert make_page["PAGE"].read_text(encoding="utf-8") == make_page["page"](), "run `python docs/make_peft.py`"
