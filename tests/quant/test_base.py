"""Quantised bases: made in place or while loading, kept in a file, trained by every trainer, and every mistake one error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import IDS, llama, moved
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import deltatune as dt
from deltatune.core.storage import format_of
from deltatune.quant import n_weights
from deltatune.train.fit import optimizer_of

WITH_FILE = ("bnb-nf4", "bnb-fp4", "bnb-int8", "int2", "int3", "int4", "nf3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model in two shards."""
    path = tmp_path_factory.mktemp("plain")
    llama().save_pretrained(path, max_shard_size="150KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


@pytest.mark.parametrize("to", [*WITH_FILE, "ao-int8"])
def test_loaded_as_quantised_in_place(to: str, folder: Path) -> None:
    model = dt.load_base(folder, to, dtype=torch.float32)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(IDS).logits, dt.quantise(llama(), to)(IDS).logits)
    assert n_weights(model) == sum(p.numel() for p in llama().parameters())
    assert format_of(model.lm_head) is None


@pytest.mark.parametrize("to", WITH_FILE)
def test_saved_once(to: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"group": 32} if to in ("int4", "nf3") else {"block": 128} if to == "bnb-nf4" else {}
    model = dt.quantise(llama(), to, **options)
    dt.save_base(model, tmp_path / "base")
    again = dt.load_base(tmp_path / "base")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    kept = {key: t for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    assert all(torch.equal(t, kept[key]) for key, t in again.state_dict().items() if key in kept)
    plain = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert (tmp_path / "base" / "base.safetensors").stat().st_size < plain * (0.62 if to[-1] == "8" else 0.5)


def test_a_tied_model(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "plain")
    model = dt.load_base(tmp_path / "plain", "int4", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dt.save_base(model, tmp_path / "base")
    again: Any = dt.load_base(tmp_path / "base")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


class Shared(LlamaForCausalLM):
    """Two layers that both blocks have."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        one, other = self.model.layers
        other.mlp.up_proj, other.self_attn.q_proj = one.mlp.up_proj, one.self_attn.q_proj


def shared() -> Any:
    torch.manual_seed(0)
    return Shared(llama().config).eval()


@pytest.mark.parametrize("to", ["bnb-nf4", "int4"])
def test_a_module_of_two_parents(to: str, tmp_path: Path) -> None:
    """It becomes one quantised module under both names, in place, as it loads, and from its own file."""

    def same(model: Any) -> nn.Module:
        one, other = model.model.layers
        assert other.mlp.up_proj is one.mlp.up_proj and other.self_attn.q_proj is one.self_attn.q_proj
        assert torch.equal(model(IDS).logits, want)
        layer: nn.Module = other.mlp.up_proj
        return layer

    model = dt.quantise(shared(), to)
    want = model(IDS).logits
    assert format_of(same(model)) is not None
    dt.save_base(model, tmp_path / "base")
    assert format_of(same(dt.load_base(tmp_path / "base", cls=Shared))) is not None
    every = shared().state_dict()
    shared().config.save_pretrained(tmp_path)
    for left_out in ("layers.1.mlp.up", "layers.0.mlp.up", "neither"):  # a file has one name, the other one, or both
        save_file({k: t.clone() for k, t in every.items() if left_out not in k}, tmp_path / "model.safetensors")
        assert format_of(same(dt.load_base(tmp_path, to, cls=Shared, dtype=torch.float32))) is not None
    want = dt.dequantise(model)(IDS).logits
    assert type(same(model)) is nn.Linear


def test_dequantised() -> None:
    model = dt.quantise(llama(), "int4")
    want = model(IDS).logits
    dt.dequantise(model)
    assert all(type(m) is nn.Linear for m in model.modules() if hasattr(m, "in_features"))
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-6, rtol=0)


def test_one_adapter_for_all_formats(tmp_path: Path, folder: Path) -> None:
    """A file knows its base by embeddings and norms, which every format leaves."""
    base = dt.load_base(folder, "bnb-nf4", dtype=torch.float32)
    moved(dt.attach(base, "lora", name="a")).save(tmp_path / "a")
    for other in (llama(), dt.quantise(llama(), "int4")):
        dt.load(other, tmp_path / "a")
    torch.manual_seed(1)
    stranger = LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="other weights"):
        dt.load(stranger, tmp_path / "a")


def test_as_hf_peft_with_bitsandbytes(folder: Path) -> None:
    """QLoRA: outputs, loss and gradients on the same weights; in train mode, since in eval mode bitsandbytes has a bf16 kernel
    for some inputs on some CPUs."""
    peft = pytest.importorskip("peft")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    theirs = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, lora)
    ours = dt.load_base(folder, "bnb-nf4", dtype=torch.float32)
    adapter = dt.attach(ours, "qlora", r=8, dropout=0.0)
    ours.train()
    theirs.train()
    state, copied = theirs.state_dict(), 0
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for delta in adapter.deltas.values():
            for key, name in (("a", "lora_A"), ("b", "lora_B")):
                p = getattr(delta, key)
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
                state[f"base_model.model.{delta.site.name}.{name}.default.weight"].copy_(p)
                copied += 1
    assert copied == 28
    got, want = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-6, rtol=0)
    got.loss.backward()
    want.loss.backward()
    theirs_of = dict(theirs.named_parameters())
    for delta in adapter.deltas.values():
        for key, name in (("a", "lora_A"), ("b", "lora_B")):
            other = theirs_of[f"base_model.model.{delta.site.name}.{name}.default.weight"].grad
            torch.testing.assert_close(getattr(delta, key).grad, other, atol=1e-6, rtol=1e-4)


def _rows() -> Any:
    return [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


def _options(out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip


def test_the_stock_trainer(folder: Path, tmp_path: Path) -> None:
    """Its guard against models that are nothing but quantised stays, and lets adapters of ours pass."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, _options(tmp_path), train_dataset=_rows())
    adapter = dt.attach(model, "qlora", r=4)
    before = [p.detach().clone() for p in adapter.parameters()]
    Trainer(model, _options(tmp_path), train_dataset=_rows()).train()
    assert any(not torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))


def test_our_trainer(folder: Path, tmp_path: Path) -> None:
    from deltatune.train.trainer import AdapterTrainer

    for to in ("bnb-nf4", "int4"):
        model = dt.load_base(folder, to, dtype=torch.float32)
        adapter = dt.attach(model, "qlora", r=4)
        before = [p.detach().clone() for p in adapter.parameters()]
        AdapterTrainer(model, _options(tmp_path), train_dataset=_rows()).train()
        assert any(not torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))


def _optimised(folder: Path, out: Path, optim: str) -> tuple[list[torch.Tensor], Any]:
    from deltatune.train.trainer import AdapterTrainer

    torch.manual_seed(0)
    model = dt.load_base(folder, "int4", dtype=torch.float32)
    adapter = dt.attach(model, "qlora", r=4, dropout=0.0)
    options = _options(out)
    options.optim, options.weight_decay = optim, 0.1
    trainer = AdapterTrainer(model, options, train_dataset=_rows())
    trainer.train()
    return [p.detach() for p in adapter.parameters()], trainer.optimizer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_paged_optimiser(folder: Path, tmp_path: Path) -> None:
    """It is AdamW with the same constants; our trainer takes it where all methods that train ask for it."""
    plain, _ = _optimised(folder, tmp_path, "adamw_torch")
    paged, optimizer = _optimised(folder, tmp_path, "paged_adamw_32bit")
    assert optimizer.optimizer.is_paged
    for got, want in zip(paged, plain, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    model = dt.load_base(folder, "int4")
    qlora = dt.attach(model, "qlora", r=4, name="one")
    assert optimizer_of(model) == (None, "plain AdamW, its pages are CUDA's alone")
    other = dt.attach(model, "qa_lora", r=4, name="two")
    assert optimizer_of(model) == (None, "AdamW")
    other.detach()
    qlora.detach()
    dt.attach(model, dt.Stack(dt.QLoRA(r=4), dt.IA3()))
    assert optimizer_of(model) == (None, "AdamW")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_paged_optimiser_on_a_gpu(folder: Path) -> None:
    model = dt.load_base(folder, "bnb-nf4", device="cuda")
    dt.attach(model, "qlora", r=4)
    assert optimizer_of(model) == ("paged_adamw_32bit", "paged AdamW")


# --- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"to": "nf5"}, r"unknown format 'nf5'; did you mean"),
        ({"to": "int5"}, r"unknown format 'int5'"),
        ({"to": "int4", "grup": 32}, r"unknown option of int4 'grup'; did you mean 'group'"),
        ({"to": "bnb-nf4", "group": 32}, r"unknown option of bnb-nf4 'group'; known: block, double"),
        ({"to": "int4", "group": 48}, r"q_proj: group is 48; it must be in eights and divide the layer's 64 inputs"),
        ({"to": "int4", "group": 128}, r"q_proj: group is 128"),
        ({"to": "bnb-nf4", "block": 48}, r"block is 48; bitsandbytes has powers of 2"),
        ({"to": "int4", "where": "norm"}, r"norm: int4 keeps whole linear layers, and this is a norm"),
    ],
)
def test_what_cannot_be_quantised(arguments: dict[str, Any], text: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=text):
        dt.quantise(model, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), llama().parameters(), strict=True))


def test_not_twice_nor_under_an_adapter() -> None:
    model = dt.quantise(llama(), "int4")
    with pytest.raises(ValueError, match=r"quantised already \(groups of codes\)"):
        dt.quantise(model, "bnb-nf4")
    dt.attach(model, "lora")
    for verb in (dt.quantise, dt.dequantise):
        with pytest.raises(ValueError, match="an adapter stands on this model"):
            verb(model)


@pytest.mark.parametrize("method", ["qlora", "qdylora", "qa_lora", "peqa"])
def test_a_plain_base_is_refused(method: str, tmp_path: Path) -> None:
    more = {} if method == "peqa" else {"r": 4}
    model = llama()
    with pytest.raises(ValueError, match=f"{method} is meant for a quantised base, and this layer is a plain one"):
        dt.attach(model, method, **more)
    assert not dt.adapters(model) and torch.equal(model(IDS).logits, llama()(IDS).logits)
    dt.attach(dt.quantise(llama(), "int4"), method, **more).save(tmp_path)
    with pytest.raises(ValueError, match="is meant for a quantised base"):
        dt.load(model, tmp_path)


@pytest.mark.parametrize("method", ["full", "child_tuning_d"])
@pytest.mark.parametrize("to", ["bnb-nf4", "int4"])
def test_a_quantised_base_cannot_be_trained(method: str, to: str) -> None:
    with pytest.raises(ValueError, match=rf"q_proj: {method} trains it in place, and its weight is quantised"):
        dt.attach(dt.quantise(llama(), to), method)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept")
    dt.save_base(dt.quantise(llama(), "int4"), path)
    return path


def _damaged(kept: Path, out: Path) -> Path:
    return Path(shutil.copytree(kept, out / "copy"))


def test_damaged_files(kept: Path, tmp_path: Path, folder: Path) -> None:
    copy = _damaged(kept, tmp_path)
    data = (copy / "base.safetensors").read_bytes()
    (copy / "base.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"base.safetensors is damaged"):
        dt.load_base(copy)
    (copy / "base.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=r"base.safetensors is not the file that base.json describes: its hash differs"
    ):
        dt.load_base(copy)
    (copy / "base.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no base.safetensors"):
        dt.load_base(copy)
    (copy / "base.json").write_text("{")
    with pytest.raises(ValueError, match=r"base.json is damaged"):
        dt.load_base(copy)
    shards = Path(shutil.copytree(folder, tmp_path / "shards"))
    shard = sorted(shards.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        dt.load_base(shards, "int4")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        dt.load_base(shards, "int4")


def test_other_damage(kept: Path, folder: Path, tmp_path: Path) -> None:
    """Of the card, the index, the configuration, or numbers that are none."""
    copy = _damaged(kept, tmp_path)
    text = (copy / "base.json").read_text()
    name = next(iter(json.loads(text)["layers"]))
    for change, why in (
        (lambda c: c["layers"].update({name: {}}), r"base.json is damaged: 'to'"),
        (lambda c: c["layers"].update({name: {"to": "nf9"}}), rf"base.safetensors: {name} is no nf9: unknown format 'nf9'"),
        (lambda c: c["layers"].update({name: {"to": "int4", "grop": 8}}), rf"{name} is no int4 8: unknown option of int4 'grop'"),
        (lambda c: c["layers"].update({name: {"to": "ao-int8"}}), rf"{name} is no ao-int8: this format has no file"),
        (lambda c: c["layers"].update({"model.nowhere": {"to": "int4"}}), r"model.nowhere is no int4: .*no attribute"),
        (lambda c: c["layers"].update({name: {"to": "bnb-nf4"}}), rf"{name} is no bnb-nf4: its file holds no nf4 weight"),
    ):  # fmt: skip
        card = json.loads(text)
        change(card)
        (copy / "base.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match=why):
            dt.load_base(copy)
    shards = Path(shutil.copytree(folder, tmp_path / "shards"))
    for tensor_name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        shard = next(p for p in shards.glob("model-*.safetensors") if tensor_name in load_file(p))
        (tensors := load_file(shard))[tensor_name][0, 0] = torch.nan
        save_file(tensors, shard)
    with pytest.raises(
        ValueError, match=r"model-.*safetensors: model.layers.1.mlp.up_proj.weight: its weight is not finite"
    ):
        dt.load_base(shards, "int4")
    shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        dt.load_base(shards, "int4")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        dt.load_base(shards, "int4")
    config = json.loads((shards / "config.json").read_text())
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (shards / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(ValueError, match=r"is quantised already, by gptq; transformers' from_pretrained loads it"):
        dt.load_base(shards, "int4")
    (shards / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        dt.load_base(shards, "int4")
    sick = llama()
    with torch.no_grad():
        sick.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: its weight is not finite"):
        dt.quantise(sick, "int4")
    assert all(format_of(m) is None for m in sick.modules())


@pytest.mark.parametrize(
    ("to", "options", "why"),
    [("int5", {}, "unknown format 'int5'"), ("nf8", {}, "unknown format 'nf8'"), ("int4", {"group": 48}, "q_proj: group is 48")],
)  # fmt: skip
def test_what_cannot_be_loaded(to: str, options: dict[str, Any], why: str, folder: Path) -> None:
    """It is said before a shard is opened, and the folder stays as it is."""
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    with pytest.raises(ValueError, match=why):
        dt.load_base(folder, to, **options)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_another_format_than_the_file_s(kept: Path, tmp_path: Path) -> None:
    copy = _damaged(kept, tmp_path)
    with pytest.raises(ValueError, match=r"is quantised already; load it without 'bnb-nf4'"):
        dt.load_base(copy, "bnb-nf4")
    card = json.loads((copy / "base.json").read_text())
    name = next(iter(card["layers"]))
    card["layers"][name]["to"] = "int3"
    (copy / "base.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"{name}.*int3"):
        dt.load_base(copy)
    card["layers"][name] = {"to": "int4", "group": 32}
    (copy / "base.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"{name}.*int4"):
        dt.load_base(copy)
    card["format"] = 9
    (copy / "base.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="has format 9"):
        dt.load_base(copy)


def test_a_folder_that_lacks_a_tensor(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "plain"))
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    gone = sorted(key for key in tensors if "layers" in key or "embed" in key)[0]
    save_file({k: t for k, t in tensors.items() if k != gone}, shard)
    with pytest.raises(ValueError, match=rf"has no {gone}"):
        dt.load_base(copy, "int4")
    save_file({**tensors, "model.layers.0.mlp.extra.weight": torch.zeros(2)}, shard)
    with pytest.raises(ValueError, match=r"it holds model.layers.0.mlp.extra.weight, which the model does not have"):
        dt.load_base(copy, "int4")


def test_what_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantised layer"):
        dt.save_base(llama(), tmp_path / "x")
    with pytest.raises(ValueError, match="has no file here"):
        dt.save_base(dt.quantise(llama(), "ao-int8"), tmp_path / "x")
    model = dt.quantise(llama(), "int4")
    dt.attach(model, "lora")
    with pytest.raises(ValueError, match="an adapter stands on this model"):
        dt.save_base(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="say a format"):
        dt.load_base(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"is no model: it has no config\.json"):
        dt.load_base(tmp_path / "nowhere", "int4")
