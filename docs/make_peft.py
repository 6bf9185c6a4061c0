"""docs/peft.md from the table that the reader of HF PEFT's files obeys: run this file to write it, a test compares."""

from pathlib import Path

from deltatune.peft import FIELDS

PAGE = Path(__file__).resolve().parent / "peft.md"
NAMES = {
    "LORA": "LoraConfig", "ADALORA": "AdaLoraConfig", "IA3": "IA3Config", "PROMPT_TUNING": "PromptTuningConfig",
    "P_TUNING": "PromptEncoderConfig", "PREFIX_TUNING": "PrefixTuningConfig", "LN_TUNING": "LNTuningConfig", "SHIRA": "ShiraConfig",
    "OFT": "OFTConfig", "BOFT": "BOFTConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig", "VERA": "VeraConfig",
}  # fmt: skip
HEAD = """# HF PEFT: files and configurations, both ways

```python
adapter = dt.load(model, "a/folder/of/HF/PEFT")      # adapter_config.json and adapter_model.safetensors
adapter.save("out", format="peft")                   # what PeftModel.from_pretrained reads
adapter = dt.attach(model, peft.LoraConfig(...))     # its configuration objects, unresolved defaults included
```

Made by `python docs/make_peft.py`; every field's word is from the table that the reader obeys, in `peft/fields.py`.
`tests/peft` holds every row: files of the installed peft 0.21 read and written on an encoder, a decoder and an
encoder-decoder, random tensors everywhere, logits equal within 1e-5 in fp32. The package `peft` is not needed for files.

| theirs | here | read | written |
| --- | --- | --- | --- |
| LoRA, rsLoRA, patterns of ranks and alphas | `lora`, hyperparameters by place | yes | yes; slices as one update of the whole |
| DoRA | `dora` | yes, not on embeddings | yes, not on slices |
| fused experts (`target_parameters`) | `lora` on sites of kind `experts` | yes | yes |
| AdaLoRA, pruned files too | `adalora` | yes, on linear layers | yes, alike everywhere |
| (IA)³ | `ia3`, `side` by place | yes | yes |
| OFT, constrained and shared too | `oft` | yes, of convolutions 1 x 1 ones | yes |
| BOFT | `boft` | yes | yes |
| LoHa, effective convolutions too | `loha`, `r` and `alpha` by place | yes | yes, not on slices |
| LoKr in each of its forms | `lokr`, `r` and `alpha` by place | yes | yes, not on slices |
| VeRA, its A and B saved or drawn | `vera`, `saved` or from `key` | yes | yes, one leaf, not on slices |
| LoRA with `init_lora_weights="pissa"` | `pissa` | yes; `pissa_niter_N` in objects | as LoRA of rank 2 r, as they convert it |
| no field of theirs | `lora_plus`, `lora_fa` | no | as LoRA |
| SHiRA, masks of a function too | `shira` | yes | yes: entries of value 0 fill up to r (O + I) |
| LN tuning | `ln_tuning`: what moved in the norms | yes, on norms | yes |
| prompt tuning | `prompt_tuning` | yes | yes |
| P-tuning | `prompt_tuning`: files hold what its network made | yes, no objects | as prompt tuning |
| prefix tuning, with or without its network | `prefix_tuning` with `shift=True` | yes | yes |
| biases, saved modules, trained tokens | leaves of `bitfit`, `copy`, `token_rows` | yes | yes, beside one of the above |

What cannot be said in HF PEFT's format is an error that names the method: other methods, methods that train the base in place,
`bitfit` alone or at some layers, a prefix with `shift=False`, prompts whose head pools another token, `Average`.

**What a file does not say.** HF PEFT's files hold no fingerprint of their base: a base with the same layers and other weights
takes the adapter without a word. Only a file that brings its embeddings along shows it, and is refused where they differ. Save
in our own format to be safe. `base_model_name_or_path` is written where it is a name of the hub, and never a path.

**Names.** `target_modules` and its companions keep HF PEFT's rules: ends of names in a list, expressions that match whole names,
`all-linear` without the output layer, its default for each architecture. An entry of an object that matches nothing is an error,
where HF PEFT adapts the rest in silence. In a file the tensors say what was adapted, and its list may name more. A key of
`rank_pattern` or `alpha_pattern` that matches nothing is an error in both.

**Soft tokens.** A head that pools the first token of an encoder reads a soft token's state in HF PEFT (`pooled=True`, set on
reading); by our own default it reads the text's first token. A decoder that classifies is pooled by HF PEFT at the row's last
position, padding included; here at its last real token. Of an encoder-decoder's 2 n prompts HF PEFT runs the first n.

**Prefixes.** HF PEFT keeps a prefix in the cache, so that the text's tokens stand behind it: `shift=True` moves positions by n
and gives T5's prefix the bias of the places where it stands. Where a backbone takes no positions (BART) it is refused. On an
encoder-decoder HF PEFT prefixes the decoder's self-attentions alone, and of L layers, L even, i and i + L / 2 read one prefix:
others cannot be written.

**PiSSA and rotations.** HF PEFT takes PiSSA's start off the base as it builds or reads; here the base keeps its values, so that such
an adapter stands beside others and is detached bit for bit. A file of `pissa_niter_N` says something else each time HF PEFT reads
it, which draws the random SVD anew: it is refused. With `use_cayley_neumann=False` HF PEFT rotates by the inverse of what it
rotates by with it; the sign is kept in reading. On convolutions wider than 1 x 1 its OFT is another layer already at the start
(patches that overlap are added up), and is refused; without its CUDA extension its BOFT runs one factor, whatever was asked for.

**Shared random matrices.** VeRA's A and B are drawn here as HF PEFT draws them, from `projection_prng_key` and the sizes of the
largest layers, bit for bit on the CPU. A file with `save_projection=True` brings its own, which are read as they are and written
again: over a bf16 base HF PEFT rounds them.

**What fails in HF PEFT itself** (0.21 on transformers 5.23): prompts and prefixes on DistilBERT (no `token_dim`) and on
encoder-decoders that classify sequences (errors in the forward); `all-linear` on DistilBERT's classifier
(`pre_classifier` is adapted and saved whole at once); prompts without a `task_type` (`KeyError: None`; refused
here); the gradients of LoHa's two output factors beside cores (`use_effective_conv2d=True` on kernels above 1 x 1).
"""


def rows(fields: dict[str, object]) -> str:
    """One table."""
    lines = ["| field | | here |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {field.kind} | {field.text} |" for name, field in fields.items()]  # type: ignore[attr-defined]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page as a string."""
    parts = [HEAD, "## Every field\n", "**translated**: to what. **training**: a file is past it, an object is refused where "
             "it is set. **no effect**: it says nothing about the function.\n**refused**: where it is set, in both.\nA field "
             "that is in no table, of a newer version, is an error.\n"]  # fmt: skip
    for kind, fields in FIELDS.items():
        shared = {} if kind == "LORA" else FIELDS["PROMPT_TUNING" if kind in ("P_TUNING", "PREFIX_TUNING") else "LORA"]
        own = {name: field for name, field in fields.items() if shared.get(name) != field}
        note = "" if len(own) == len(fields) else "Its other fields are those of the same names above.\n"
        parts += [f"### {NAMES[kind]}\n", rows(own), *([note] if note else [])]  # type: ignore[arg-type]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
