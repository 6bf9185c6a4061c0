"""AdapterDrop against AdapterHub's `adapters`; nothing runs backwards below it; drawn layers; bottom blocks run once."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.drop import answers

TESTS = Path(__file__).resolve().parent
MAKE = runpy.run_path(str(TESTS.parent / "golden" / "make_adapter_drop.py"))
GOLDEN = json.loads(MAKE["GOLDEN"].read_text(encoding="utf-8"))["states"]
FILL, STATES, R = MAKE["MAKE"]["fill"], MAKE["MAKE"]["states"], MAKE["MAKE"]["R"]
SIZES: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def bert(n_layers: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    config = tf.BertConfig(
        **SIZES, num_hidden_layers=n_layers, max_position_embeddings=32, initializer_range=0.2, **more
    )
    return tf.BertForSequenceClassification(config).eval()


def llama(n_layers: int = 4) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **SIZES, num_hidden_layers=n_layers, num_key_value_heads=1, pad_token_id=0, initializer_range=0.2
    )
    return tf.LlamaForCausalLM(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 4, "dropout_rate": 0.0}
    config = tf.T5Config(vocab_size=30, **sizes, initializer_factor=4.0, decoder_start_token_id=0, pad_token_id=0)
    return tf.T5ForConditionalGeneration(config).eval()


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, num_hidden_layers=4, image_size=8, patch_size=4)).eval()


def rows(**more: Any) -> dict[str, Any]:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 9, 10, 11, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **more}


def moved(adapter: dt.Adapter, seed: int = 0) -> dt.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("m", MAKE["M"])
@pytest.mark.parametrize("name", MAKE["BACKBONES"])
def test_as_adapters_computes(name: str, m: int) -> None:
    """Its `leave_out`, over the same tensors; ours trained with a fixed m, and with all layers and that m set."""
    words = {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias"}
    want, bare = (torch.tensor(GOLDEN[name][key]) for key in (str(m), "bare"))
    assert (want - bare).abs().max() > 0.1
    for robust in (False, True):
        model = MAKE["backbone"](name)
        adapter = dt.attach(model, "adapter_drop", r=R, m=m, robust=robust, head=None)
        layers = {(d.site.stack, d.site.layer) for d in adapter.deltas.values()}
        assert len(layers) == len(adapter.deltas) == (4 if robust else 4 - m) * (2 if name == "t5" else 1)
        with torch.no_grad():
            for d in adapter.deltas.values():
                for key, word in words.items():
                    p = getattr(d, key)
                    p.copy_(FILL(".".join(filter(None, (d.site.stack, str(d.site.layer), "mlp", word))), p.shape))
        torch.testing.assert_close(STATES(model, name), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("robust", [False, True])
def test_nothing_runs_backwards_below_the_first_adapter(make: Any, robust: bool) -> None:
    """No output of a lower block requires a gradient, and no block there keeps a tensor for the backward."""
    model = make().train()
    adapter = dt.attach(model, "adapter_drop", m=2, robust=robust, r=4)
    blocks = [model.get_submodule(s.module) for s in dt.sites(model, "block")]
    required: list[bool] = []
    kept: list[int] = []

    def begin(module: nn.Module, args: Any) -> None:
        kept.append(0)

    def end(module: nn.Module, args: Any, out: Any) -> None:
        required.append((out[0] if isinstance(out, tuple) else out).requires_grad)

    def pack(t: Tensor) -> Tensor:
        if kept:
            kept[-1] += 1
        return t

    for block in blocks:
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)
    batch = rows(labels=torch.tensor([0, 1])) if make is bert else rows(labels=rows()["input_ids"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    assert required == [False, False, True, True]
    assert kept[:2] == [0, 0] and kept[2] > 0
    loss.backward()
    asleep = {id(p) for d in adapter.deltas.values() if d.site.layer in (0, 1) for p in d.parameters()}
    assert len(asleep) == (8 if robust else 0)
    for p in adapter.parameters():
        assert (p.grad is None) == (id(p) in asleep)


def test_where_it_stands_and_how_much_it_trains() -> None:
    """Five of twelve layers go without by default; on BERT the rest have Pfeiffer's adapter, on Llama one behind the block."""
    sizes = {**SIZES, "num_hidden_layers": 12}
    for model in (
        tf.BertModel(tf.BertConfig(**sizes, max_position_embeddings=8)),
        tf.LlamaModel(tf.LlamaConfig(**sizes)),
    ):
        adapter = dt.attach(model, "adapter_drop", r=4, head=None)
        assert {d.site.layer for d in adapter.deltas.values()} == set(range(5, 12))
        assert {d.site.role for d in adapter.deltas.values()} == {
            "post_norm" if isinstance(model, tf.BertModel) else "block"
        }
        assert adapter.params() == 7 * (2 * 4 * 16 + 4 + 16)
    for n, m in ((1, 0), (2, 1), (6, 2), (24, 10)):
        adapter = dt.attach(llama(n), "adapter_drop", r=4)
        assert len(adapter.deltas) == n - m


def run(adapter: dt.Adapter, model: nn.Module, first: int, last: int, state: Any = None) -> tuple[list[Any], Any]:
    """Steps `first` to `last`: the layers awake in each, and what the schedule would be resumed from."""
    schedules = dt.Schedules([adapter])
    optimizer = torch.optim.SGD(adapter.groups(0.05))
    schedules.begin(optimizer, 40)
    if state is not None:
        schedules.load_state_dict(state)
    awake = []
    for step in range(first, last):
        for _ in range(2 if step < 4 else 1):  # both passes of one step leave out the same
            model(**rows(labels=torch.tensor([0, 1]))).loss.backward()
        found = {
            d.site.layer
            for d in adapter.deltas.values()
            if getattr(d, "up", None) is not None and d.up.grad is not None
        }
        awake.append(min(layer for layer in found if layer is not None))
        assert found == set(range(awake[-1], 4))
        schedules.before_step(step)
        optimizer.step()
        schedules.after_step(step)
        optimizer.zero_grad()
    return awake, schedules.state_dict()


def test_robust_draws_layers_from_its_seed_and_is_taken_up_again() -> None:
    """The first step has all layers, the others a uniform number of them; a second run draws the same, also from a state."""
    model = bert().train()
    adapter = dt.attach(model, "adapter_drop", r=2, robust=True, seed=5)
    whole, _ = run(adapter, model, 0, 24)
    assert whole[0] == 0
    assert set(whole) == {0, 1, 2, 3}
    assert all(2 <= whole.count(m) <= 12 for m in range(4))
    first, state = run(adapter, model, 0, 7)
    rest, _ = run(adapter, model, 7, 24, state)
    assert first + rest == whole
    other = bert().train()
    assert run(dt.attach(other, "adapter_drop", r=2, robust=True, seed=6), other, 0, 12)[0] != whole[:12]


def test_a_draw_is_of_training_alone() -> None:
    model = bert()
    adapter = moved(dt.attach(model, "adapter_drop", r=2, robust=True))
    want = model(**rows()).logits
    schedules = dt.Schedules([adapter])
    schedules.begin(torch.optim.SGD(adapter.groups(0.1)), 9)
    for step in range(9):
        schedules.after_step(step)
        if any(getattr(d, "drawn", None) for d in adapter.deltas.values()):
            break
    assert torch.equal(model(**rows()).logits, want)
    model.train()
    assert any(getattr(d, "asleep", False) for d in adapter.deltas.values())
    schedules.end()
    assert not any(getattr(d, "asleep", False) for d in adapter.deltas.values())


def test_m_is_set_on_a_standing_adapter(tmp_path: Path) -> None:
    """Layers left out at inference are as if never there; the number is saved; none can come that was not trained."""
    model = bert()
    adapter = moved(dt.attach(model, "adapter_drop", r=2, m=1, head=None))
    some = model(**rows()).logits
    adapter.set(m=3)
    few = model(**rows()).logits
    assert (few - some).abs().max() > 1e-3
    adapter.save(tmp_path)
    other = bert()
    dt.load(other, tmp_path)
    assert torch.equal(other(**rows()).logits, few)
    top = bert()
    alone = dt.attach(top, "adapter_drop", r=2, m=3, head=None)
    with torch.no_grad():
        for (path, site), delta in alone.deltas.items():
            for p, q in zip(delta.parameters(), adapter.deltas[path, site].parameters(), strict=True):
                p.copy_(q)
    assert torch.equal(top(**rows()).logits, few)
    adapter.set(m=1)
    assert torch.equal(model(**rows()).logits, some)
    with pytest.raises(ValueError, match=r"encoder.layer.1.*m = 0, but the lowest of its adapters is in layer 1"):
        adapter.set(m=0)
    with pytest.raises(ValueError, match=r"m = 4, but of 4 layers between 0 and 3"):
        adapter.set(m=4)
    assert torch.equal(model(**rows()).logits, some)


def test_impossible_numbers_of_layers() -> None:
    for m in (-1, 4, 12):
        with pytest.raises(
            ValueError, match=rf"bert.encoder.layer.0.*adapter_drop: m = {m}, but of 4 layers between 0 and 3"
        ):
            dt.attach(bert(), "adapter_drop", m=m)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generates_alike_with_cache_without_and_with_beams(side: str) -> None:
    model = llama()
    moved(dt.attach(model, "adapter_drop", r=4, m=2))
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]) if side == "left" else torch.tensor([[5, 6, 7], [3, 4, 5]])
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for beams in (1, 3):
        said = [
            model.generate(ids, attention_mask=(ids != 0).long(), num_beams=beams, use_cache=cache, **options)
            for cache in (True, False)
        ]
        assert torch.equal(*said)


def attached(model: nn.Module, *each: dict[str, Any]) -> list[str]:
    """Adapters a, b, ... of different values, each with a head of its own."""
    names = []
    for i, hyper in enumerate(each):
        names.append("abc"[i])
        moved(dt.attach(model, "adapter_drop", name=names[-1], r=4, **hyper), seed=i)
    return names


@pytest.mark.parametrize("make", [bert, llama, t5, vit])
def test_several_tasks_run_the_bottom_blocks_once(make: Any) -> None:
    """The outputs of full forwards, bit for bit; three tasks run the two bottom blocks once and the others three times."""
    model = make()
    names = attached(model, {"m": 2}, {"m": 3}, {"m": 2, "robust": True})
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)} if make is vit else rows()
    batch |= {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])} if make is t5 else {}
    found = dt.adapters(model)
    found["b"].disable()
    counts: dict[str, int] = {}
    for site in dt.sites(model, "block"):
        inside = next(s for s in dt.sites(model, "attn.q") if s.module.startswith(f"{site.module}."))

        def count(module: nn.Module, args: Any, out: Any, key: str = site.name) -> None:
            counts[key] = counts.get(key, 0) + 1

        model.get_submodule(inside.module).register_forward_hook(count)
    with torch.no_grad():
        want = {}
        for name in names:
            for other in names:
                found[other].enable() if other == name else found[other].disable()
            want[name] = model(**batch, **({} if make in (bert, vit) else {"use_cache": False})).logits
        found["a"].enable()
        found["b"].disable()
        found["c"].enable()
        counts.clear()
        got = answers(model, names, **batch)
    assert list(got) == names
    for name in names:
        assert torch.equal(got[name].logits, want[name])
    assert (want["a"] - want["b"]).abs().max() > 1e-3
    order = [counts[s.name] for s in dt.sites(model, "block")]
    once = [1, 1, 3, 3]
    assert order == ([*once, 3, 3, 3, 3] if make is t5 else once)  # T5's decoder reads encoders that differ
    assert [found[n].enabled for n in names] == [True, False, True]
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_answers_on_other_rows_and_after_an_error() -> None:
    """What was kept is of one call, and a failing forward leaves the model as it was."""
    model = bert()
    names = attached(model, {"m": 2}, {"m": 2})
    with torch.no_grad():
        one = answers(model, names, **rows())["a"].logits
        two = answers(model, names, input_ids=rows()["input_ids"].flip(0))["a"].logits
    assert (one - two).abs().max() > 1e-3
    with pytest.raises(IndexError):
        answers(model, names, input_ids=torch.tensor([[99]]))
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(a.enabled for a in dt.adapters(model).values())


def test_what_answers_refuses() -> None:
    model = bert()
    attached(model, {"m": 2}, {"m": 0}, {"m": 0})
    dt.attach(model, "child_tuning_f", name="inside", head=None)
    with pytest.raises(
        ValueError, match=r"these begin in the first: 'b' at bert.encoder.layer.0\S*, 'c' at bert.encoder.layer.0"
    ):
        answers(model, ["a", "b", "c"], **rows())
    with pytest.raises(ValueError, match="unknown adapter 'bb'; did you mean 'b'"):
        answers(model, ["a", "bb"], **rows())
    with pytest.raises(ValueError, match="'inside' is in the base's own weights"):
        answers(model, ["a", "inside"], **rows())
    with pytest.raises(ValueError, match=r"model.eval\(\) first"):
        answers(model.train(), ["a"], **rows())


def test_soft_tokens_in_front_share_nothing_and_stay_right() -> None:
    """Another adapter's tokens change what the first block reads; outputs are those of full forwards all the same."""
    model = llama()
    names = attached(model, {"m": 2}, {"m": 2})
    moved(dt.attach(model, "prompt_tuning", name="p", n=3))
    with pytest.raises(ValueError, match="'p' at"):
        answers(model, [*names, "p"], **rows())
    with torch.no_grad():
        assert len(answers(model, names, **rows())) == 2


def test_trainer_trains_it_robust_and_resumes(tmp_path: Path) -> None:
    """The liveness check passes at the first step, and where a resumed run begins with layers left out."""
    from deltatune.train.trainer import AdapterTrainer

    data = [{k: v[0] for k, v in rows(labels=torch.tensor([1, 0])).items()} for _ in range(8)]

    def train(steps: int, resume: bool) -> dt.Adapter:
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        torch.manual_seed(1)
        adapter = dt.attach(model, "adapter_drop", r=2, robust=True, seed=3)
        course: Any = adapter.schedule
        course.step = steps
        course.draw()
        assert any(getattr(d, "drawn", None) for d in adapter.deltas.values())
        course.end()
        options = tf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, save_steps=steps, learning_rate=1e-2,
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = AdapterTrainer(model, options, train_dataset=data)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}") if resume else None)
        return adapter

    whole = train(2, False)
    again = train(2, True)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_with_all_layers_it_is_the_preset_pfeiffer() -> None:
    one, two = bert(), bert()
    ours = moved(dt.attach(one, "adapter_drop", r=4, m=0, head=None))
    theirs = dt.attach(two, "pfeiffer", r=4, head=None)
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    assert torch.equal(one(**rows()).logits, two(**rows()).logits)
