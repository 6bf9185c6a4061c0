"""What every field of HF PEFT's configurations means here: the reader obeys this table, and docs/peft.md shows it."""

from typing import Any, NamedTuple


class Field(NamedTuple):
    """What a field of HF PEFT's means here."""

    kind: str  # translated, training (a file is past it, a configuration object is refused), no effect, refused
    text: str  # to what, or why
    off: tuple[Any, ...] = (None,)  # the values of a refused one, or one for training alone, that say nothing


_COMMON = {
    "peft_type": Field("translated", "the method"),
    "task_type": Field("translated", "SEQ_CLS: `all-linear` leaves its head out, an encoder's prompts are `pooled`; prompts need one"),
    "auto_mapping": Field("no effect", "classes to build the base with; the model is here already"),
    "peft_version": Field("no effect", "named in the error of a field that is not known"),
    "base_model_name_or_path": Field("no effect", "a name, no fingerprint; written where it is a name of the hub, never a path"),
    "revision": Field("no effect", "of that name"),
    "inference_mode": Field("no effect", "`load(..., trainable=True)` says it here"),
    "modules_to_save": Field("translated", "leaves of `copy`; the task head is the head's leaf"),
}  # fmt: skip
_TARGETS = {
    "target_modules": Field("translated", "`where`, by HF PEFT's rules; an entry that matches nothing is an error in an object"),
    "exclude_modules": Field("translated", "left out of `where`"),
    "fan_in_fan_out": Field("no effect", "the layer itself says how its weight is stored"),
}  # fmt: skip
_START = (
    "starts that leave the base as it is (True, False, gaussian, eva, orthogonal, mica): a file is past them, an object has True; "
    "pissa is the method `pissa`, pissa_niter_N in an object"
)
_LORA = _COMMON | _TARGETS | {
    "r": Field("translated", "`r`"),
    "lora_alpha": Field("translated", "`alpha`"),
    "lora_dropout": Field("translated", "`dropout`; none on embeddings and experts, as there"),
    "bias": Field("translated", "a `Sum` with `bitfit` at the biased sites, all or the adapted ones"),
    "use_rslora": Field("translated", "`power=0.5`"),
    "init_lora_weights": Field("training", _START, (True,)),
    "layers_to_transform": Field("translated", "`where`"),
    "layers_pattern": Field("translated", "`where`"),
    "rank_pattern": Field("translated", "`where` as a mapping: `r` by place"),
    "alpha_pattern": Field("translated", "`where` as a mapping: `alpha` by place"),
    "megatron_config": Field("refused", "layers of Megatron have no sites here"),
    "megatron_core": Field("no effect", "where to import Megatron from; without megatron_config nothing"),
    "trainable_token_indices": Field("translated", "a leaf of `token_rows`, on the tied output layer too"),
    "loftq_config": Field("refused", "it changes the base's weights", (None, {})),
    "eva_config": Field("training", "a start that needs data"),
    "corda_config": Field("refused", "it changes the base's weights"),
    "lora_ga_config": Field("refused", "it changes the base's weights"),
    "use_dora": Field("translated", "the method `dora`"),
    "velora_config": Field("training", "another backward pass, the same function"),
    "alora_invocation_tokens": Field("refused", "an adapter that begins in the middle of a sequence is no method here"),
    "use_qalora": Field("refused", "pooled inputs are no method here", (False, None)),
    "qalora_group_size": Field("no effect", "without use_qalora nothing"),
    "monteclora_config": Field("refused", "sampled factors are no method here"),
    "layer_replication": Field("refused", "it builds another backbone"),
    "runtime_config": Field("refused", "offloading while running is not done here", (None, {"ephemeral_gpu_offload": False})),
    "lora_bias": Field("translated", "`bias=True`, its bias times the scale"),
    "target_parameters": Field("translated", "fused experts in `where`; other parameters are refused by name"),
    "use_bdlora": Field("refused", "block-diagonal factors are no method here"),
    "arrow_config": Field("refused", "routing between adapters is no method here"),
    "kasa_config": Field("refused", "it changes the base's weights"),
    "ensure_weight_tying": Field("refused", "a delta on one layer is not tied to another's", (False, None)),
}  # fmt: skip
_LAYERS = {
    "layers_to_transform": Field("translated", "`where`"),
    "layers_pattern": Field("translated", "`where`"),
}  # fmt: skip
_LYCORIS = _COMMON | _LAYERS | {
    "target_modules": _TARGETS["target_modules"],
    "exclude_modules": _TARGETS["exclude_modules"],
    "r": Field("translated", "`r`"),
    "alpha": Field("translated", "`alpha`"),
    "rank_pattern": Field("translated", "`where` as a mapping: `r` by place"),
    "alpha_pattern": Field("translated", "`where` as a mapping: `alpha` by place"),
    "rank_dropout": Field("training", "rows of the update that are 0 for a step", (0.0, 0)),
    "module_dropout": Field("training", "layers without their update for a step", (0.0, 0)),
    "use_effective_conv2d": Field("translated", "`effective`"),
}  # fmt: skip
_PROMPT = _COMMON | {
    "num_virtual_tokens": Field("translated", "`n`"),
    "token_dim": Field("translated", "must be the backbone's"),
    "num_transformer_submodules": Field("translated", "of 2 n rows the first n; the others are in no forward of HF PEFT's"),
    "num_attention_heads": Field("no effect", "of prefixes alone"),
    "num_layers": Field("no effect", "of prefixes alone"),
}  # fmt: skip

FIELDS: dict[str, dict[str, Field]] = {
    "LORA": _LORA,
    "ADALORA": _LORA | {
        "init_r": Field("translated", "`r`"),
        "target_r": Field("translated", "`target`"),
        "tinit": Field("translated", "`warmup`"),
        "tfinal": Field("translated", "`final`"),
        "deltaT": Field("translated", "`interval`"),
        "beta1": Field("translated", "`beta1`"),
        "beta2": Field("translated", "`beta2`"),
        "orth_reg_weight": Field("translated", "`orth`"),
        "total_step": Field("no effect", "the trainer says how many steps there are"),
        "rank_pattern": Field("translated", "which triplets a file holds; the others are 0. An object must not have it"),
        "r": Field("refused", "HF PEFT ignores it; the rank is init_r", (8, None)),
        "use_rslora": Field("refused", "HF PEFT's AdaLoRA ignores it", (False, None)),
        "alpha_pattern": Field("refused", "HF PEFT's AdaLoRA ignores it", (None, {})),
        "use_dora": Field("refused", "HF PEFT's AdaLoRA does not know it", (False, None)),
        "lora_bias": Field("refused", "HF PEFT's AdaLoRA ignores it", (False, None)),
        "target_parameters": Field("refused", "HF PEFT's AdaLoRA does not know it"),
        "velora_config": Field("refused", "HF PEFT's AdaLoRA ignores it"),
    },
    "IA3": _COMMON | _TARGETS | {
        "feedforward_modules": Field("translated", "`side=\"input\"` there, `side=\"output\"` elsewhere"),
        "init_ia3_weights": Field("training", "1 at the start", (True,)),
    },
    "OFT": _COMMON | _TARGETS | {
        "peft_version": Field("translated", "below 0.18 the series of use_cayley_neumann was another: such a file is refused"),
        "r": Field("translated", "how many blocks: `block` by place, the nearest number that divides the width"),
        "oft_block_size": Field("translated", "`block`, by place where it does not divide the width"),
        "module_dropout": Field("no effect", "HF PEFT builds it and never runs it"),
        "bias": Field("translated", "a `Sum` with `bitfit` at the biased sites, all or the adapted ones"),
        "init_weights": Field("training", "R = I at the start", (True,)),
        "layers_to_transform": Field("translated", "`where`"),
        "layers_pattern": Field("translated", "`where`"),
        "coft": Field("translated", "`eps`"),
        "eps": Field("translated", "`eps`, with coft"),
        "block_share": Field("translated", "`share`"),
        "use_cayley_neumann": Field("translated", "`terms`, without it 0"),
        "num_cayley_neumann_terms": Field("translated", "`terms`; 3 as HF PEFT runs it, as 4; fewer are refused"),
    },
    "BOFT": _COMMON | _TARGETS | {
        "boft_block_size": Field("translated", "`block`"),
        "boft_block_num": Field("translated", "how many blocks: `block` by place"),
        "boft_n_butterfly_factor": Field("translated", "`factors`; without its CUDA extension HF PEFT runs 1"),
        "boft_dropout": Field("training", "blocks that do not turn for a step", (0.0,)),
        "bias": Field("translated", "a `Sum` with `bitfit` at the biased sites, all or the adapted ones"),
        "init_weights": Field("training", "R = I and s = 1 at the start", (True,)),
        "layers_to_transform": Field("translated", "`where`"),
        "layers_pattern": Field("translated", "`where`"),
    },
    "LOHA": _LYCORIS | {
        "init_weights": Field("training", "A2 = 0 at the start", (True,)),
    },
    "LOKR": _LYCORIS | {
        "decompose_both": Field("translated", "`both`"),
        "decompose_factor": Field("translated", "`factor`"),
        "rank_dropout_scale": Field("no effect", "of rank_dropout"),
        "init_weights": Field("training", "W1 = 0 at the start", (True,)),
    },
    "VERA": _COMMON | _LAYERS | {
        "target_modules": _TARGETS["target_modules"],
        "fan_in_fan_out": _TARGETS["fan_in_fan_out"],
        "r": Field("translated", "`r`"),
        "projection_prng_key": Field("translated", "`key`"),
        "save_projection": Field("translated", "`saved`"),
        "vera_dropout": Field("translated", "`dropout`"),
        "d_initial": Field("translated", "`d_initial`"),
        "bias": Field("translated", "a `Sum` with `bitfit` at the biased sites, all or the adapted ones"),
        "init_weights": Field("training", "b = 0 and d = d_initial at the start", (True,)),
    },
    "SHIRA": _COMMON | {
        "target_modules": _TARGETS["target_modules"],
        "fan_in_fan_out": _TARGETS["fan_in_fan_out"],
        "r": Field("translated", "`r`: r (O + I) entries of each layer"),
        "mask_type": Field("training", "masks of a function of the user's: a file holds them, an object has `random`", ("random",)),
        "random_seed": Field("translated", "`mask_seed`; without one a new generator's, as there"),
        "init_weights": Field("training", "v = 0 at the start", (True,)),
    },
    "LN_TUNING": _COMMON | {
        "task_type": Field("no effect", "the task's head is the head's leaf"),
        "target_modules": Field("translated", "`where`: norms alone; an entry that matches nothing is an error in an object"),
        "exclude_modules": _TARGETS["exclude_modules"],
    },
    "PROMPT_TUNING": _PROMPT | {
        "prompt_tuning_init": Field(
            "training", "here prompts start from rows of the vocabulary, RANDOM or SAMPLE_VOCAB", ("RANDOM", "SAMPLE_VOCAB")
        ),
        "prompt_tuning_init_text": Field("training", "a start from a text's tokens"),
        "tokenizer_name_or_path": Field("training", "of that text"),
        "tokenizer_kwargs": Field("training", "of that text"),
    },
    "P_TUNING": _PROMPT | {
        "encoder_reparameterization_type": Field("no effect", "files hold the prompts that the network made, not the network"),
        "encoder_hidden_size": Field("no effect", "of that network"),
        "encoder_num_layers": Field("no effect", "of that network"),
        "encoder_dropout": Field("no effect", "of that network"),
    },
    "PREFIX_TUNING": _PROMPT | {
        "task_type": Field("translated", "must be there, and SEQ_2_SEQ_LM on an encoder-decoder: HF PEFT runs no other"),
        "num_transformer_submodules": Field("translated", "2 on an encoder-decoder: the decoder's self-attentions, its layers paired"),
        "num_attention_heads": Field("translated", "must be the keys' heads"),
        "num_layers": Field("translated", "must be the backbone's"),
        "prefix_projection": Field("translated", "`mid`; files hold the keys and values that the network made"),
        "encoder_hidden_size": Field("translated", "`mid`, with prefix_projection"),
        "init_weights": Field("training", "a start at 0"),
    },
}  # fmt: skip
