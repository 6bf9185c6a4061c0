"""What an adapter library says when a user's wish cannot be met: HF PEFT and deltatune, the same mistakes, side by side.

    python benchmarks/silence.py            runs every case and prints the table
    python benchmarks/silence.py --write    writes results/silence.json, and docs/silence.md from it, too

A case is a wish, put to both real libraries on tiny random models on the CPU. What comes of it is measured:

silent        the wish was not met, and neither an exception, nor a warning, nor a log line says so
warns         a warning or a log line; its text is kept, and whether the wish was met
raises        an exception; its text is kept
right         the wish was met
not compared  run on HF PEFT alone
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
from bench import machine, versions
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core.method import METHODS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "silence.json", ROOT / "docs" / "silence.md"
IDS = torch.tensor([[3, 7, 1, 12, 9, 30], [8, 2, 15, 4, 21, 6]])
A = "model.layers.0.self_attn.q_proj"
REFUSALS = (ValueError, TypeError, RuntimeError)  # anything else is a fault of this file


@dataclass(frozen=True)
class Seen:
    """Was the wish met, a sentence with the numbers, and lists too long for it."""

    met: bool
    says: str
    lists: dict[str, list[str]] = field(default_factory=dict)


Run = Callable[[Path], Seen]  # gets an empty folder


@dataclass(frozen=True)
class Case:
    """A wish, how it is put to each, and the upstream threads about it."""

    wish: str
    theirs: Run
    ours: Run | None
    threads: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(wish: str, *threads: str) -> Callable[[Callable[[], tuple[Run, Run | None]]], None]:
    """Register the pair of runs that the function gives, under the function's name."""

    def register(function: Callable[[], tuple[Run, Run | None]]) -> None:
        CASES[function.__name__] = Case(wish, *function(), threads)

    return register


def tiny(seed: int = 0, layers: int = 3, hidden: int = 16, **options: Any) -> LlamaForCausalLM:
    """A random Llama in eval mode, the same at every call; another seed is another base of the same shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module, **batch: Any) -> Tensor:
    """Of the two rows of IDS."""
    return model(input_ids=IDS, **batch).logits


def far(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a - b).norm() / b.norm()).item()


def wrapped(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """HF PEFT's LoRA on `tiny()`, with its own random start off the identity, so that it shows."""
    base = tiny() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | options))


def moved(**options: Any) -> PeftModel:
    """The same, off the identity and in eval mode."""
    return wrapped(init_lora_weights=False, **options).eval()


def adapted(model: nn.Module) -> list[str]:
    """The layers that got a low-rank pair, by the base's names."""
    names = [name for name, module in model.named_modules() if len(getattr(module, "lora_A", ()))]
    return [name.removeprefix("base_model.model.") for name in names]


def trained(model: nn.Module) -> list[str]:
    """The names of what trains."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def attached(method: Any = "lora", base: nn.Module | None = None, **options: Any) -> tuple[nn.Module, dt.Adapter]:
    """deltatune on `tiny()`, every tensor off its start."""
    model = tiny() if base is None else base
    adapter = dt.attach(model, method, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model, adapter


def refused(method: Any = "lora", base: Callable[[], nn.Module] = tiny, **options: Any) -> Run:
    """A run of deltatune's attach that is expected to raise."""

    def run(folder: Path) -> Seen:
        dt.attach(base(), method, **options)
        return Seen(False, "attaches all the same")

    return run


def saved(folder: Path, method: Any = "lora", **options: Any) -> Tensor:
    """Save deltatune's adapter into the folder; the logits that belong to it."""
    model, adapter = attached(method, **options)
    adapter.save(folder)
    return logits(model)


def loads(change: Callable[[Path], Any], base: Callable[[], nn.Module] = tiny) -> Run:
    """Save with deltatune, change the folder, load on a base."""

    def run(folder: Path) -> Seen:
        right = saved(folder)
        change(folder)
        model = base()
        dt.load(model, folder)
        distance = far(logits(model), right)
        return Seen(distance < 1e-6, f"loads, {distance:.1%} from the right logits")

    return run


def reseal(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of deltatune's file, with a hash that fits, so that the hash is not what refuses."""
    file, card = folder / "adapter.safetensors", folder / "adapter.json"
    tensors = load_file(file)
    change(tensors)
    file.write_bytes(save(tensors))
    fields = json.loads(card.read_text(encoding="utf-8")) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    card.write_text(json.dumps(fields), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of HF PEFT's file."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def flip(file: Path) -> None:
    """One bit: the sign of the last number."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x80
    file.write_bytes(data)


# what is adapted


@case(
    "adapt `q_proj` and `v_porj`, a typo",
    "huggingface/peft#1959: asks for an error where one name of the list matches nothing",
    "huggingface/peft#3693: proposes a warning for it",
)
def target_typo() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        names = adapted(wrapped(target_modules=["q_proj", "v_porj"]))
        n_v = sum(name.endswith("v_proj") for name in names)
        return Seen(n_v == 3, f"adapts {len(names)} layers of 6: {n_v} are `v_proj`")

    return theirs, refused(where=["q_proj", "v_porj"])


@case("train a copy of `lm_haed`, a typo, beside LoRA")
def modules_to_save_typo() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        names = trained(wrapped(modules_to_save=["lm_haed"]))
        n_head = sum("lora_" not in name for name in names)
        return Seen(n_head == 1, f"trains {len(names)} tensors, {n_head} of them beside LoRA's")

    return theirs, refused(dt.Sum(dt.LoRA(r=2), dt.Copy(where=["lm_haed"])))


@case(
    "adapt layers 1 and 7 of a model of 3 layers",
    "huggingface/peft#1024: a target lost beside `layers_to_transform`; a warning is called useful",
)
def layer_out_of_range() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        found = [
            adapted(wrapped(target_modules=["q_proj"], layers_to_transform=[1, 7], layers_pattern=pattern))
            for pattern in (None, "layers")
        ]
        n = [len(names) for names in found]
        return Seen(n == [2, 2], f"adapts {n[0]} layer; with `layers_pattern`, {n[1]}")

    return theirs, refused(where=["q_proj"], layers=[1, 7])


@case("adapt the first layer and, as -1, the last")
def negative_layer() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        names = adapted(wrapped(target_modules=["q_proj"], layers_to_transform=[0, -1]))
        return Seen(len(names) == 2, f"adapts {len(names)} layer: `{'`, `'.join(names)}`")

    def ours(folder: Path) -> Seen:
        _, adapter = attached(where=["q_proj"], layers=[0, -1])
        names = [name for _, name in adapter.deltas]
        return Seen(len(names) == 2, f"adapts {len(names)} layers: `{'`, `'.join(names)}`")

    return theirs, ours


@case("leave out `k_proj` and `v_porj`, a typo")
def exclude_one_of_two() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        options = {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ["k_proj", "v_porj"]}
        names = adapted(wrapped(**options))
        n_v = sum(name.endswith("v_proj") for name in names)
        return Seen(n_v == 0, f"adapts {len(names)} layers, {n_v} of them `v_proj`")

    return theirs, refused(exclude_modules=["k_proj", "v_porj"])


@case("leave out `v_porj`, a typo, and nothing else")
def exclude_nothing() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        names = adapted(wrapped(exclude_modules=["v_porj"]))
        return Seen(len(names) == 3, f"adapts {len(names)} layers")

    return theirs, refused(exclude_modules=["v_porj"])


def pattern_typo(key: str) -> Run:
    """A rank or an alpha of its own for a layer that is not there."""

    def theirs(folder: Path) -> Seen:
        model = wrapped(**{key: {"v_porj": 4}})
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
        value = layer.r["default"] if key == "rank_pattern" else layer.lora_alpha["default"]
        return Seen(value == 4, f"`v_proj` has {value}")

    return theirs


@case(
    "another rank for `v_porj`, a typo",
    "huggingface/peft#3588: adds the warning",
    "huggingface/peft#3582: reports the silence before it",
)
def rank_pattern_typo() -> tuple[Run, Run]:
    return pattern_typo("rank_pattern"), refused(dt.Sum(dt.LoRA(r=2, where="q"), dt.LoRA(r=4, where=["v_porj"])))


@case("another alpha for `v_porj`, a typo", "huggingface/peft#3588: adds the warning")
def alpha_pattern_typo() -> tuple[Run, Run]:
    return pattern_typo("alpha_pattern"), refused(dt.Sum(dt.LoRA(where="q"), dt.LoRA(alpha=4.0, where=["v_porj"])))


@case("adapt `v_porj` alone, a typo", "huggingface/peft#40: asks for the error")
def every_target_wrong() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        return Seen(False, f"adapts {len(adapted(wrapped(target_modules=['v_porj'])))} layers")

    return theirs, refused(where=["v_porj"])


@case("set `alhpa`, a typo")
def hyperparameter_typo() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        wrapped(alhpa=4)
        return Seen(False, "builds all the same")

    return theirs, refused(alhpa=4)


@case("LoRA of rank 200 on layers of 16 x 16")
def rank_above_size() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        model = wrapped(target_modules=["q_proj"], r=200)
        n, full = model.get_nb_trainable_parameters()[0], 3 * 16 * 16
        return Seen(n <= full, f"trains {n:,} numbers to change {full:,}")

    return theirs, refused(where=["q_proj"], r=200)


# what takes effect


@case("dropout 0.9 before LoRA on an embedding")
def dropout_on_embedding() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        equal = {}
        for target in ("embed_tokens", "q_proj"):
            model = wrapped(target_modules=[target], lora_dropout=0.9, init_lora_weights=False).train()
            equal[target] = torch.equal(logits(model), logits(model))
        word = {True: "equal", False: "different"}
        says = f"two forwards in train mode are {word[equal['embed_tokens']]} ({word[equal['q_proj']]} on `q_proj`)"
        return Seen(not equal["embed_tokens"], says)

    return theirs, refused(where="embed", dropout=0.9)


@case(
    "train the biases of layers that have none",
    "huggingface/peft#679: asks that the biases be made",
)
def bias_of_none() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        names = [name for name in trained(wrapped(bias="lora_only")) if "bias" in name]
        return Seen(bool(names), f'`bias="lora_only"` trains {len(names)} biases')

    def ours(folder: Path) -> Seen:
        _, adapter = attached("bitfit", where="q,v")
        n = len(list(adapter.parameters()))
        return Seen(n == 6, f"`bitfit` makes them: {n} biases train")

    return theirs, ours


@case(
    "adapt `linear1` of a `torch.nn.TransformerEncoderLayer`",
)
def encoder_fast_path() -> tuple[Run, Run]:
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)).eval()

    def theirs(folder: Path) -> Seen:
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
        moves = {}
        for mode in (True, False):
            base = encoder().train(mode)(x)
            model = wrapped(encoder(), target_modules=["linear1"], init_lora_weights=False).train(mode)
            moves[mode] = far(model(x), base)
        says = f"the adapter moves the output by {moves[True]:.1%} in train mode and by {moves[False]:.1%} in eval mode"
        return Seen(moves[False] > 1e-3, says)

    return theirs, refused(base=encoder, where=["linear1"])


@case(
    "attach LoRA with dropout 0.5 to a model in eval mode, and run it",
    "huggingface/peft#3753: the new modules start in train mode",
)
def eval_mode() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        base = tiny()
        model = wrapped(base, lora_dropout=0.5, init_lora_weights=False)
        a, b = logits(model), logits(model)
        says = f"the base is in {'train' if base.training else 'eval'} mode, and two forwards differ by {far(a, b):.1%}"
        return Seen(torch.equal(a, b), says)

    def ours(folder: Path) -> Seen:
        base = tiny()
        model, _ = attached(base=base, dropout=0.5)
        a, b = logits(model), logits(model)
        says = f"the base is in {'train' if base.training else 'eval'} mode, and two forwards differ by {far(a, b):.1%}"
        return Seen(torch.equal(a, b), says)

    return theirs, ours


def dressed(name: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A method of HF PEFT on `tiny()`, off its start and in eval mode, and what its forward wants besides the ids."""
    linear: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    soft = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    own: dict[str, dict[str, Any]] = {
        "ADALORA": linear | {"init_r": 2, "total_step": 10},
        "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
        "BEFT": {"target_modules": ["v_proj"]},
        "BOFT": linear | {"boft_block_size": 4},
        "C3A": linear | {"block_size": 4},
        "CARTRIDGE": soft,
        "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
        "FOURIERFT": linear | {"n_frequency": 20},
        "IA3": linear | {"feedforward_modules": []},
        "LN_TUNING": {"target_modules": ["input_layernorm"]},
        "MULTITASK_PROMPT_TUNING": soft | {"num_tasks": 2},
        "OFT": linear | {"oft_block_size": 4},
        "OSF": linear | {"effective_rank": 4},
        "POLY": linear | {"r": 2, "n_tasks": 2, "task_type": "CAUSAL_LM"},
        "PREFIX_TUNING": soft,
        "PROMPT_TUNING": soft,
        "P_TUNING": soft | {"encoder_hidden_size": 8},
        "ROAD": linear | {"group_size": 4},
        "SHADOW": {"r": 2},
        "TRAINABLE_TOKENS": {"token_indices": IDS.flatten().tolist()},
        "VBLORA": linear | {"r": 2, "topk": 2, "num_vectors": 4, "vector_length": 4},
        "WAVEFT": linear | {"n_frequency": 20},
        "XLORA": {"hidden_size": 16, "adapters": {}},
    }
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]]
    options = own.get(name, linear | ({"r": 2} if "r" in config.__dataclass_fields__ else {}))
    if name == "XLORA":
        for expert in "01":
            moved().save_pretrained(folder / expert)
            options["adapters"][expert] = str(folder / expert)
    base = tiny()
    torch.manual_seed(1)
    model = get_peft_model(base, config(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    task_ids = {"task_ids": torch.zeros(2, dtype=torch.long)}
    return model, task_ids if name in ("MULTITASK_PROMPT_TUNING", "POLY") else {}


def row_by_row(name: str, folder: Path) -> tuple[str, str]:
    """What a forward does whose first row asks for the base and whose second asks for the adapter, and its words."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # FRoD draws a progress bar
        warnings.simplefilter("ignore")  # what is said of building it and of a plain forward is another matter
        model, batch = dressed(name, folder)
        on, base = logits(model, **batch)[:, -IDS.shape[1] :], logits(tiny())
    assert far(on[0], base[0]) > 1e-3, f"{name} does not move the output: nothing can be told from it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = logits(model, adapter_names=["__base__", "default"], **batch)[:, -IDS.shape[1] :]
        except REFUSALS as error:
            return "raises", f"{name} ({type(error).__name__}: {error})"
    if caught:
        return "warns", f"{name} ({caught[0].message})"
    if far(got, on) < 1e-5:
        return "ignores it", name
    assert max(far(got[0], base[0]), far(got[1], on[1])) < 1e-5, f"{name}: neither its own rows nor those asked for"
    return "obeys", name


@case(
    "one row of a batch with the adapter, one without, for each of HF PEFT's methods",
    "huggingface/peft#1558: `adapter_names`, made for LoRA's layers",
)
def rows_of_a_batch() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        found: dict[str, list[str]] = {"obeys": [], "raises": [], "warns": [], "ignores it": []}
        for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
            (folder / kind.value).mkdir()
            word, told = row_by_row(kind.value, folder / kind.value)
            found[word].append(told)
        n, lost = sum(map(len, found.values())), len(found["ignores it"])
        says = f"`adapter_names` is obeyed by {len(found['obeys'])} of {n} methods, {len(found['raises'])} raises; \
{lost} give every row the active adapter"
        return Seen(lost == 0, says, {word: sorted(names) for word, names in found.items()})

    def ours(folder: Path) -> Seen:
        model, _ = attached()
        logits(model, adapter_ids=torch.tensor([0, 1]))
        return Seen(False, "runs all the same")

    return theirs, ours


@case(
    "a batch for an adapter that is not there",
    "huggingface/peft#2090: adds the error",
)
def unknown_row() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        logits(moved(), adapter_names=["default", "defualt"])
        return Seen(False, "runs all the same")

    return theirs, CASES["rows_of_a_batch"].ours  # type: ignore[return-value]


@case("pass the argument of the other library: `adapter_ids` to HF PEFT, `adapter_names` to deltatune")
def argument_of_the_other() -> tuple[Run, Run]:
    def told(model: nn.Module, **batch: Any) -> Seen:
        swallowed = torch.equal(logits(model, **batch), logits(model))
        return Seen(not swallowed, "the `**kwargs` of the backbone's own forward swallow it" if swallowed else "")

    def theirs(folder: Path) -> Seen:
        return told(moved(), adapter_ids=torch.tensor([0, 1]))

    def ours(folder: Path) -> Seen:
        return told(attached()[0], adapter_names=["__base__", "default"])

    return theirs, ours


# what changes behind the user's back


@case(
    "run the base for a moment, with an adapter whose first layer was frozen by hand",
    "huggingface/peft#3447: the same for an adapter loaded for inference",
)
def disabled_for_a_moment() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        model = wrapped()
        for name, p in model.named_parameters():
            if "layers.0." in name:
                p.requires_grad_(False)
        moved().save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny(), folder)
        counts = []
        for each in (model, loaded):
            before = len(trained(each))
            with each.disable_adapter():
                logits(each)
            counts.append((before, len(trained(each))))
        (a, b), (c, d) = counts
        return Seen((a, c) == (b, d), f"{a} tensors train before and {b} after; loaded for inference, {c} and {d}")

    def ours(folder: Path) -> Seen:
        model, adapter = attached()
        for name, p in model.named_parameters():
            if "layers.0." in name:
                p.requires_grad_(False)
        adapter.save(folder)
        loaded = tiny()
        handle = dt.load(loaded, folder)
        counts = []
        for each, its in ((model, adapter), (loaded, handle)):
            before = len(trained(each))
            with its.disabled():
                logits(each)
            counts.append((before, len(trained(each))))
        (a, b), (c, d) = counts
        return Seen((a, c) == (b, d), f"{a} tensors train before and {b} after; loaded for inference, {c} and {d}")

    return theirs, ours


def rounds(weight: Tensor, there: Callable[[], Any], back: Callable[[], Any]) -> tuple[float, float]:
    """The shares of entries that differ from the start after one round and after ten."""
    start, shares = weight.detach().clone(), []
    for _ in range(10):
        there()
        back()
        shares.append((weight != start).float().mean().item())
    return shares[0], shares[-1]


@case(
    "merge and unmerge, ten times",
    "huggingface/trl#6688: a comment measures the same over more rounds",
)
def ten_merges() -> tuple[Run, Run]:
    dtypes = (torch.bfloat16, torch.float32)

    def told(found: list[tuple[float, float]]) -> Seen:
        (one, ten), (_, full) = found
        says = f"{ten:.0%} of a bf16 weight's entries have changed ({one:.0%} after one round), {full:.0%} in fp32"
        return Seen(ten == full == 0, says)

    def theirs(folder: Path) -> Seen:
        found = []
        for dtype in dtypes:
            model = wrapped(tiny(hidden=128).to(dtype), r=8, init_lora_weights=False).eval()
            weight = model.get_submodule(f"base_model.model.{A}.base_layer").weight
            found.append(rounds(weight, model.merge_adapter, model.unmerge_adapter))
        return told(found)

    def ours(folder: Path) -> Seen:
        found = []
        for dtype in dtypes:
            model, adapter = attached(base=tiny(hidden=128).to(dtype), r=8)
            found.append(rounds(model.get_submodule(A).weight, adapter.merge, adapter.unmerge))
        return told(found)

    return theirs, ours


@case(
    "run the base for a moment, after a start by PiSSA",
    "huggingface/peft#1626: adds PiSSA; the review names this side effect",
    "huggingface/peft#2184: another adapter on the changed base",
)
def pissa_base() -> tuple[Run, Run | None]:
    def theirs(folder: Path) -> Seen:
        base = logits(tiny())
        model = wrapped(init_lora_weights="pissa").eval()
        with model.disable_adapter():
            off = logits(model)
        gone = logits(model.unload())
        says = f"inside `disable_adapter()` the logits are {far(off, base):.1%} from the base's; after `unload()`, \
{far(gone, base):.1%}"
        return Seen(torch.equal(off, base), says)

    def ours(folder: Path) -> Seen:
        model, adapter = attached("pissa", where="q,v")
        with adapter.disabled():
            off = logits(model)
        distance = far(off, logits(tiny()))
        return Seen(distance == 0, f"inside `disabled()` the logits are {distance:.1%} from the base's")

    return theirs, ours if "pissa" in METHODS else None


@case("adapt a model that is adapted already")
def adapted_twice() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        wrapped(wrapped(), target_modules=["k_proj"])
        return Seen(True, "wraps it again")

    def ours(folder: Path) -> Seen:
        model, _ = attached()
        dt.attach(model, "lora", where=["k_proj"])
        return Seen(True, "attaches both")

    return theirs, ours


# what is in the file


def from_pretrained(change: Callable[[Path], Any], base: Callable[[], nn.Module] = tiny, **options: Any) -> Run:
    """Save with HF PEFT, change the folder, load on a base."""

    def run(folder: Path) -> Seen:
        model = moved(**options)
        right = logits(model)
        model.save_pretrained(folder)
        change(folder)
        model = PeftModel.from_pretrained(base(), folder)
        distance = far(logits(model), right)
        in_file = set(load_file(folder / "adapter_model.safetensors"))
        used = in_file & set(peft.get_peft_model_state_dict(model))
        says = f"loads {len(used)} of the file's {len(in_file)} tensors, {distance:.1%} from the right logits"
        return Seen(used == in_file and distance < 1e-6, says)

    return run


PEFT_KEY = f"base_model.model.{A}.lora_A.weight"
OUR_KEY = f"0.{A}.a"


@case("load a file with a tensor that has no place")
def extra_tensor() -> tuple[Run, Run]:
    def extra(key: str) -> Callable[[dict[str, Tensor]], Any]:
        return lambda tensors: tensors.update({key.replace("layers.0", "layers.9"): tensors[key].clone()})

    return (
        from_pretrained(lambda folder: rewrite(folder, extra(PEFT_KEY))),
        loads(lambda folder: reseal(folder, extra(OUR_KEY))),
    )


def renamed(key: str) -> Callable[[dict[str, Tensor]], Any]:
    """`q_proj` of the first layer under a wrong name."""
    return lambda tensors: tensors.update({key.replace("q_proj", "q_porj"): tensors.pop(key)})


@case(
    "load a file with a tensor under a wrong name",
    "huggingface/peft#2118: adds the warning about missing tensors",
)
def renamed_tensor() -> tuple[Run, Run]:
    return (
        from_pretrained(lambda folder: rewrite(folder, renamed(PEFT_KEY))),
        loads(lambda folder: reseal(folder, renamed(OUR_KEY))),
    )


@case(
    "the same, by `load_adapter` beside another adapter",
    "huggingface/peft#2118: `load_adapter` returns the lists, and does not warn",
)
def renamed_tensor_beside_another() -> tuple[Run, Run]:
    def theirs(folder: Path) -> Seen:
        model = moved()
        right = logits(model)
        model.save_pretrained(folder)
        rewrite(folder, renamed(PEFT_KEY))
        model = wrapped()
        result = model.load_adapter(folder, "second")
        model.set_adapter("second")
        says = f"returns {len(result.missing_keys)} missing and {len(result.unexpected_keys)} unexpected key, \
and is {far(logits(model), right):.1%} from the right logits"
        return Seen(False, says)

    def ours(folder: Path) -> Seen:
        saved(folder)
        reseal(folder, renamed(OUR_KEY))
        model, _ = attached("ia3")
        dt.load(model, folder, name="second")
        return Seen(False, "loads")

    return theirs, ours


@case("load a file on a base with one layer fewer")
def fewer_layers() -> tuple[Run, Run]:
    def shorter() -> nn.Module:
        return tiny(layers=2)

    return from_pretrained(lambda folder: None, shorter), loads(lambda folder: None, shorter)


@case("load a file with a tensor of another size")
def mis_sized_tensor() -> tuple[Run, Run]:
    def wrong(key: str) -> Callable[[dict[str, Tensor]], Any]:
        return lambda tensors: tensors.update({key: torch.zeros(3, 16)})

    return (
        from_pretrained(lambda folder: rewrite(folder, wrong(PEFT_KEY))),
        loads(lambda folder: reseal(folder, wrong(OUR_KEY))),
    )


@case("load a file on another base of the same shape")
def another_base() -> tuple[Run, Run]:
    def other() -> nn.Module:
        return tiny(seed=1)

    return from_pretrained(lambda folder: None, other), loads(lambda folder: None, other)


@case("load a file in which one bit has flipped")
def flipped_bit() -> tuple[Run, Run]:
    return (
        from_pretrained(lambda folder: flip(folder / "adapter_model.safetensors")),
        loads(lambda folder: flip(folder / "adapter.safetensors")),
    )


@case("save an embedding that was trained by hand beside LoRA")
def trained_by_hand() -> tuple[Run, Run]:
    def train(model: nn.Module) -> None:
        weight = model.get_input_embeddings().weight
        weight.requires_grad_(True)
        with torch.no_grad():
            weight.add_(0.5)

    def theirs(folder: Path) -> Seen:
        model = moved()
        train(model)
        right = logits(model)
        model.save_pretrained(folder)
        distance = far(logits(PeftModel.from_pretrained(tiny(), folder)), right)
        return Seen(distance == 0, f"the file leaves it out: loaded, it is {distance:.1%} from the right logits")

    def ours(folder: Path) -> Seen:
        model, adapter = attached()
        train(model)
        adapter.save(folder)
        dt.load(tiny(), folder)
        return Seen(False, "loads")

    return theirs, ours


@case(
    "save the biases that were trained beside LoRA",
    "huggingface/peft#3306: reports their loss in 0.19",
)
def trained_biases() -> tuple[Run, Run]:
    def base() -> nn.Module:
        return tiny(attention_bias=True)

    def theirs(folder: Path) -> Seen:
        model = moved(base=base(), bias="lora_only")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(0.5 * (p.requires_grad and "bias" in name))
        model.save_pretrained(folder)
        distance = far(logits(PeftModel.from_pretrained(base(), folder)), logits(model))
        return Seen(distance == 0, f"loaded, the logits differ by {distance:.1%}")

    def ours(folder: Path) -> Seen:
        right = saved(folder, dt.Sum(dt.LoRA(r=2), dt.BitFit(where="q,v")), base=base())
        model = base()
        dt.load(model, folder)
        return Seen(torch.equal(logits(model), right), f"loaded, the logits differ by {far(logits(model), right):.1%}")

    return theirs, ours


@case("save AdaLoRA after its ranks were pruned, and load it")
def adalora_pruned() -> tuple[Run, None]:
    def theirs(folder: Path) -> Seen:
        steps = 12
        config = peft.AdaLoraConfig(
            init_r=6,
            target_r=2,
            total_step=steps,
            tinit=2,
            tfinal=4,
            deltaT=1,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        base = tiny()
        torch.manual_seed(2)
        model = get_peft_model(base, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
        for i in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(i)
            optimizer.zero_grad()
        right = logits(model.eval())
        ranks = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]
        model.save_pretrained(folder)
        distance = far(logits(PeftModel.from_pretrained(tiny(), folder)), right)
        says = f"loads ranks {min(ranks)} to {max(ranks)} with the logits that were saved, within {distance:.0e}: nothing was ignored"
        return Seen(distance < 1e-5, says)

    return theirs, None


# running and telling


class Heard(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())


def watch(run: Run | None) -> dict[str, Any]:
    """Run one side of a case in an empty folder; what came of it, and every word that was said."""
    if run is None:
        return {"kind": "not compared", "met": False, "says": "", "words": [], "lists": {}}
    heard, loggers = Heard(), [logging.getLogger(name) for name in ("peft", "transformers", "deltatune")]
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(heard)
        try:
            seen, error = run(Path(name)), ""
        except REFUSALS as raised:
            seen, error = Seen(False, ""), f"{type(raised).__name__}: {raised}"
        finally:
            for logger in loggers:
                logger.removeHandler(heard)
    # a FutureWarning speaks of an old name in transformers, whatever the case
    own = [f"{w.category.__name__}: {w.message}" for w in caught if not issubclass(w.category, FutureWarning)]
    words = [
        " ".join(word.replace(name, "FOLDER").split()) for word in [*own, *heard.lines, *([error] if error else [])]
    ]
    kind = "raises" if error else "warns" if words else "right" if seen.met else "silent"
    return {"kind": kind, "met": seen.met, "says": seen.says, "words": words, "lists": seen.lists}


def outcome(name: str) -> dict[str, Any]:
    """Both sides of a case."""
    one = CASES[name]
    return {
        "case": name,
        "wish": one.wish,
        "HF PEFT": watch(one.theirs),
        "deltatune": watch(one.ours),
        "threads": list(one.threads),
    }


GROUPS = {
    "silent": "HF PEFT says nothing",
    "warns": "HF PEFT warns",
    "raises": "HF PEFT raises",
    "right": "HF PEFT does what was asked",
}
HEAD = """# What your adapter library does not tell you

Wishes that cannot be met, or that go wrong on the way, put to HF PEFT {peft} and to deltatune {deltatune} on the same tiny
random models. The rule here is that each is one error before anything is changed, or it is done; of the {n} rows
below, deltatune itself breaks it in {broken}.

HF PEFT is good software with a long memory. Files and scripts of several years have to go on working, one list of
target names serves many architectures, and a new error would stop runs that were meant as they were; that explains
most of the first table. The others are the rest of the picture: where nothing at all matches, where a size is wrong or
an option or an adapter unknown, HF PEFT raises, and some silences of earlier releases are warnings now, or mended.

Measured on {date} with Python {python}, torch {torch}, transformers {transformers} on {cpu}, by

    python benchmarks/silence.py --write

from which this page is made. **silent**: not done, and no exception, warning or log line says so. **right**: done.
Percentages of logits are ||a - b|| / ||b||, `FOLDER` is where the adapter lies. The last column names threads about the
case, where one was found. `tests/peft/test_silence_page.py` runs every case again.
"""
NOTES = """## Notes

In *{wish}* the first row asks for `__base__`, the second for the adapter. {rows}

**not compared**: run on HF PEFT alone.
"""


def short(text: str, most: int = 260) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 2].rstrip() + " …"


def cell(side: dict[str, Any]) -> str:
    """What one library did, for Markdown: its kind, its numbers, its words."""
    parts = [f"**{side['kind']}**", side["says"], *(f"`{short(word).replace('`', '')}`" for word in side["words"])]
    return "<br>".join(part.replace("|", "\\|") for part in parts if part)


def page(card: dict[str, Any]) -> str:
    """docs/silence.md as a string."""
    broken = sum(row["deltatune"]["kind"] == "silent" for row in card["rows"])
    about = {"date": card["date"], "cpu": card["machine"]["cpu"], "n": len(card["rows"]), "broken": broken}
    parts = [HEAD.format(**card["versions"], **about)]
    for kind, title in GROUPS.items():
        rows = [row for row in card["rows"] if row["HF PEFT"]["kind"] == kind]
        if not rows:
            continue
        lines = ["| asked for | HF PEFT | deltatune | upstream |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {row['wish']} | {cell(row['HF PEFT'])} | {cell(row['deltatune'])} | {'<br>'.join(row['threads'])} |"
            for row in rows
        ]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    row = next(row for row in card["rows"] if row["HF PEFT"]["lists"])
    lists = {word: names for word, names in row["HF PEFT"]["lists"].items() if names}
    told = " ".join(f"**{word}**: {', '.join(f'`{name}`' for name in names)}." for word, names in lists.items())
    parts.append(NOTES.format(wish=row["wish"], rows=told, **card["versions"]))
    return "\n".join(parts)


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("asked for", f"HF PEFT {peft.__version__}", "deltatune", show_lines=True)
    colours = {"silent": "red", "warns": "yellow", "raises": "green", "right": "green", "not compared": "dim"}
    for row in rows:
        sides = []
        for side in (row["HF PEFT"], row["deltatune"]):
            told = "\n".join(part.replace("[", "\\[") for part in [side["says"], *map(short, side["words"])] if part)
            sides.append(f"[{colours[side['kind']]}]{side['kind']}[/]\n{told}")
        table.add_row(row["wish"], *sides)
    Console().print(table)


def main() -> int:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write results/silence.json and docs/silence.md")
    given = parser.parse_args()
    rows = [outcome(name) for name in CASES]
    show(rows)
    if given.write:
        card = {
            "benchmark": "silence",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": "python benchmarks/silence.py --write",
            "machine": machine("cpu"),
            "versions": versions(),
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(card), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
