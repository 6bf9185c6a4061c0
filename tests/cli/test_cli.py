"""The command line, as a user types it: every verb on a tiny backbone, and every mistake as one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deltatune.cli import main
from deltatune.core.compose import PRESETS
from deltatune.core.method import METHODS

QUICK = ["--steps", "8", "--batch", "16", "--max_length", "32", "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def model_of(backbone: str) -> Any:
    """The base of the runs below."""
    from deltatune.train.backbone import load_classifier

    return load_classifier(backbone, ("down", "up"))[0]


def train(backbone: str, reviews: Path, out: Path, *more: str) -> int:
    return main(["train", "--model", backbone, "--data", str(reviews), "--out", str(out), *QUICK, *more])


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "methods", "--json")
    rows = json.loads(out)
    assert code == 0 and [r["name"] for r in rows] == [*METHODS, *PRESETS]
    for row in rows:
        assert {"name", "category", "paper", "where", "count", "mergeable", "hyperparameters"} <= row.keys()
    lora = next(r for r in rows if r["name"] == "lora")
    assert lora["mergeable"] is True and lora["count"] == "r*d_in + d_out*r"
    assert lora["hyperparameters"][0] == {"name": "r", "type": "int", "default": 8, "comment": "rank"}
    code, out, _ = run(capsys, "methods")
    assert code == 0 and all(name in out for name in (*METHODS, *PRESETS))
    assert "…" not in out  # what is too wide goes on in the next line
    cells = [line.split("│")[3].strip() for line in out.splitlines() if line.count("│") == 5]
    assert PRESETS["s4"].where.replace(" ", "") in "".join(cells).replace(" ", "")


def test_sites(capsys: pytest.CaptureFixture[str], backbone: str) -> None:
    code, out, _ = run(capsys, "sites", backbone, "--where", "q,v", "--layers", "1")
    assert code == 0 and "2 sites" in out and "encoder.layer.1.attention.self.query" in out and "2,048 weights" in out
    code, out, _ = run(capsys, "sites", backbone, "--where", "q,v", "--layers", "1/2-1")
    assert code == 0 and "2 sites" in out and "encoder.layer.1.attention.self.query" in out
    code, _, err = run(capsys, "sites", backbone, "--where", "mlp.gate")
    assert code == 2 and "mlp.gate" in err and "mlp.up" in err


def test_train_merge_export(capsys: pytest.CaptureFixture[str], backbone: str, reviews: Path, tmp_path: Path) -> None:
    """A run writes its effective configuration, which runs again; merging gives a plain model with the same outputs."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import deltatune as dt
    from deltatune.train.backbone import load_classifier

    out = tmp_path / "run"
    assert train(backbone, reviews, out, "--method", "lora", "--method.r", "4", "--method.where", "q,k") == 0
    shown = capsys.readouterr().out
    assert "2 classes" in shown and "parameters trained" in shown and "accuracy" in shown
    saved = yaml.safe_load((out / "run.yaml").read_text())
    assert (
        saved["method"]
        == {
            "name": "lora",
            "where": "q,k",
            "layers": None,
            "r": 4,
            "alpha": 16.0,
            "power": 1.0,
            "dropout": 0.0,
            "bias": False,
        }
        and saved["steps"] == 8
    )
    result = json.loads((out / "result.json").read_text())
    assert result["n_params"] == 2 * 2 * 4 * (32 + 32) and result["labels"] == ["down", "up"]

    config = {k: v for k, v in saved.items() if k not in ("verb", "out")}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert (
        main(["train", "--config", str(tmp_path / "again.yaml"), "--out", str(tmp_path / "run2"), "--device", "cpu"])
        == 0
    )
    assert (tmp_path / "run2" / "adapter" / "adapter.safetensors").read_bytes() == (
        out / "adapter" / "adapter.safetensors"
    ).read_bytes()

    for verb, more in (("merge", []), ("export", ["--format", "merged"])):
        to = tmp_path / verb
        assert main([verb, str(out), "--out", str(to), *more]) == 0
        model = AutoModelForSequenceClassification.from_pretrained(to).eval()
        tokenizer = AutoTokenizer.from_pretrained(to)
        assert model.config.id2label == {0: "down", 1: "up"}
        torch.manual_seed(5)
        base, _ = load_classifier(backbone, ("down", "up"))
        dt.load(base, out / "adapter")
        batch = tokenizer(["the film was good", "bad book"], return_tensors="pt", padding=True)
        assert torch.allclose(model(**batch).logits, base(**batch).logits, atol=1e-5)
    assert main(["export", str(out), "--out", str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    torch.manual_seed(5)
    base, _ = load_classifier(backbone, ("down", "up"))
    dt.load(base, tmp_path / "peft")
    assert torch.allclose(model(**batch).logits, base(**batch).logits, atol=1e-5)
    more = ["--method", "ties_svd", "--density", "0.5", "--weights=1,-0.5", "--rank", "4", "--head", "1"]
    code, said, _ = run(
        capsys, "combine", str(out), str(tmp_path / "run2" / "adapter"), *more, "--out", str(tmp_path / "both")
    )
    words = " ".join(said.split())  # a long path is wrapped
    assert code == 0 and "by ties_svd of 2 adapters" in words and "is left out" in words
    both = [out / "adapter", tmp_path / "run2" / "adapter"]
    assert "no task head" not in words
    code, said, _ = run(capsys, "combine", str(out), str(tmp_path / "run2"), "--out", str(tmp_path / "none"))
    assert code == 0 and "no task head: --head takes a source's" in " ".join(said.split())
    want = dt.combine(model_of(backbone), both, [1, -0.5], "ties_svd", density=0.5, rank=4, head=1).state_dict()
    got = dt.load(model_of(backbone), tmp_path / "both").state_dict()
    assert got.keys() == want.keys() and all(torch.equal(t, want[key]) for key, t in got.items())
    for wrong, text in (
        ("--weights=1,b", "numbers with commas"),
        ("--weights=1", "1 weights for 2"),
        ("--rank=4", "no rank"),
    ):
        code, _, err = run(capsys, "combine", *map(str, both), "--model", backbone, wrong, "--out", str(tmp_path / "x"))
        assert code == 2 and text in err
    code, _, err = run(capsys, "combine", *map(str, both), "--out", str(tmp_path / "x"))
    assert code == 2 and "give --model" in err
    code, _, err = run(capsys, "export", str(out), "--out", str(tmp_path / "merge"))
    assert code == 2 and "not an empty folder" in err
    code, _, err = run(capsys, "export", str(out), "--out", str(tmp_path / "x"), "--format", "mergd")
    assert code == 2 and "'merged'" in err


def test_train_a_tree(backbone: str, reviews: Path, tmp_path: Path) -> None:
    tree = {
        "op": "sum",
        "children": [{"method": "lora", "config": {"r": 2}}, {"method": "prefix_tuning", "config": {"n": 2}}],
    }
    (tmp_path / "tree.yaml").write_text(yaml.safe_dump({"method": tree}))
    assert train(backbone, reviews, tmp_path / "run", "--config", str(tmp_path / "tree.yaml")) == 0
    card = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert card["tree"]["op"] == "sum" and [c["method"] for c in card["tree"]["children"]] == ["lora", "prefix_tuning"]


def test_train_a_tree_of_presets_and_saved_adapters(
    backbone: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of a tree is written as a method alone is, or is what was trained before."""
    assert train(backbone, reviews, tmp_path / "first", "--method", "lora", "--method.r", "2") == 0
    before = load_file(tmp_path / "first" / "adapter" / "adapter.safetensors")

    def second(*parts: dict[str, Any]) -> int:
        (tmp_path / "tree.yaml").write_text(yaml.safe_dump({"method": {"op": "stack", "children": list(parts)}}))
        return train(backbone, reviews, tmp_path / "second", "--config", str(tmp_path / "tree.yaml"))

    first, pfeiffer = {"saved": str(tmp_path / "first" / "adapter"), "frozen": True}, {"name": "pfeiffer", "r": 4}
    assert second(first, pfeiffer | {"where": "block", "layers": [0]}) == 0
    after = load_file(tmp_path / "second" / "adapter" / "adapter.safetensors")
    kept = {key: t for key, t in before.items() if "classifier" not in key}
    assert kept and all(torch.equal(after[key], t) for key, t in kept.items())
    assert {key.split(".")[0] for key in after} >= {"0", "1"}
    for wrong, text in (
        (pfeiffer | {"rr": 4}, "did you mean 'r'"),
        (first | {"freeze": True}, "did you mean 'frozen'"),
        ({"naem": "lora"}, "did you mean 'name'"),
        ({"saved": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        assert second(first, wrong) == 2
        assert text in capsys.readouterr().err


def test_train_a_share_of_the_layers(backbone: str, reviews: Path, tmp_path: Path) -> None:
    """On the command line, in the run's own configuration, and in a tree of YAML."""
    assert train(backbone, reviews, tmp_path / "one", "--method", "lora", "--method.layers", "1/2-1") == 0
    written = yaml.safe_load((tmp_path / "one" / "run.yaml").read_text())["method"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"method": written}))
    assert train(backbone, reviews, tmp_path / "two", "--config", str(tmp_path / "again.yaml")) == 0
    parts = [("lora", "0-1/2"), ("bitfit", "1/2-1")]
    tree = {"op": "stack", "children": [{"method": method, "layers": layers} for method, layers in parts]}
    (tmp_path / "tree.yaml").write_text(yaml.safe_dump({"method": tree}))
    assert train(backbone, reviews, tmp_path / "tree", "--config", str(tmp_path / "tree.yaml")) == 0
    cards = [json.loads((tmp_path / name / "adapter" / "adapter.json").read_text()) for name in ("one", "two", "tree")]
    trees = [card["tree"] for card in cards]
    assert [t["layers"] for t in (*trees[:2], *trees[2]["children"])] == ["1/2-1", "1/2-1", "0-1/2", "1/2-1"]


def test_regression(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "scores.csv"
    rows = [f"{'good ' * (i % 5)}film {i},{i % 5 + (i % 7) / 10}" for i in range(120)]
    data.write_text("\n".join(["text,score", *rows]) + "\n")
    assert train(backbone, data, tmp_path / "run", "--method", "bitfit") == 0
    assert "regression" in capsys.readouterr().out
    assert "pearson" in json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["test"]


def test_compare(
    capsys: pytest.CaptureFixture[str], backbone: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells resume, failures are recorded and the others go on, the folder of another run is refused."""
    from deltatune.assess import matrix
    from deltatune.assess.cells import Cell, read_folder

    tiny = matrix.Size(n_steps=6, batch=16, lr_trials=2, head_lr=0.05, n_train=64, n_validation=16, max_length=32)
    monkeypatch.setitem(matrix.BUDGETS, "tiny-v1", tiny)
    out = tmp_path / "results"
    args = [
        "compare",
        "--model",
        backbone,
        "--data",
        str(reviews),
        "--budget",
        "tiny-v1",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    sequential = METHODS["sequential"].Config
    monkeypatch.setattr(METHODS["prefix_tuning"], "make", classmethod(_fails))
    assert main([*args, "--methods", "full,head,lora,prefix_tuning"]) == 1
    shown = capsys.readouterr().out
    assert "[4/4]" in shown and "about" in shown and "failed" in shown
    cells = {c.key.method: c for c in read_folder(out)}
    assert {m: c.status for m, c in cells.items()} == {
        "full": "done",
        "head": "done",
        "lora": "done",
        "prefix_tuning": "failed",
    }
    assert "on purpose" in (cells["prefix_tuning"].error or "")
    lora = cells["lora"]
    assert len(lora.trials) == 2 and lora.lr in {t.lr for t in lora.trials} and lora.n_head == 66
    assert lora.memory and lora.memory.peak == sum(
        (lora.memory.weights, lora.memory.activations, lora.memory.gradients, lora.memory.optimizer, lora.memory.method)
    )
    full = cells["full"]
    assert full.memory and lora.memory.gradients < full.memory.gradients and full.memory.method == 0
    assert (
        lora.memory.weights == full.memory.weights
        and full.memory.weights == 4 * (full.n_backbone + full.n_head) + 2 * 8 * 64
    )  # BERT's two buffers
    assert cells["head"].memory.activations < lora.memory.activations  # type: ignore[union-attr]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "lora" in page and "on purpose" in page and (out / "report.csv").is_file() and (out / "report.md").is_file()

    monkeypatch.undo()
    monkeypatch.setitem(matrix.BUDGETS, "tiny-v1", tiny)
    before = {p: p.read_bytes() for p in out.rglob("*.cell.json")}
    assert main([*args, "--methods", "full,head,lora,ia3,prefix_tuning", "--retry"]) == 0
    assert "done before" in capsys.readouterr().out
    after = {p: p.read_bytes() for p in out.rglob("*.cell.json")}
    assert {p.name for p in after if before.get(p) != after[p]} == {
        "ia3-seed0.cell.json",
        "prefix_tuning-seed0.cell.json",
    }
    assert all(Cell.read(p).status == "done" for p in after)

    monkeypatch.setitem(matrix.BUDGETS, "tiny-v2", tiny)
    code, _, err = run(capsys, *[a.replace("tiny-v1", "tiny-v2") for a in args], "--methods", "lora")
    assert code == 2 and "holds another run" in err and "tiny-v1" in err
    code, _, err = run(capsys, "report", str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere" in err
    assert (
        main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
        and (tmp_path / "page" / "report.html").is_file()
    )
    assert sequential is METHODS["sequential"].Config


def test_compare_what_is_made_of_saved_adapters(
    capsys: pytest.CaptureFixture[str], backbone: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run with their sources as a hyperparameter; `all` leaves the others out and says so."""
    from deltatune.assess import matrix
    from deltatune.assess.cells import read_folder
    from deltatune.train.backbone import load_shapes

    one, two = (tmp_path / name for name in ("one", "two"))
    assert train(backbone, reviews, one, "--method", "sequential", "--method.r", "4") == 0
    assert train(backbone, reviews, two, "--method", "sequential", "--method.r", "4", "--seed", "1") == 0
    folders = [str(f / "adapter") for f in (one, two)]
    assert (
        train(backbone, reviews, tmp_path / "soup", "--method", "adapter_soup", "--method.sources", ",".join(folders))
        == 0
    )
    card = json.loads((tmp_path / "soup" / "adapter" / "adapter.json").read_text())
    assert card["tree"]["method"] == "sequential" and card["tree"]["config"]["r"] == 4
    assert yaml.safe_load((tmp_path / "soup" / "run.yaml").read_text())["method"]["sources"] == ",".join(folders)

    given = {"mera": {"sources": folders}}
    names, left_out = matrix.all_methods(load_shapes(backbone), given)
    assert {"mera", "lora"} <= set(names) and not {"spot", "adapter_soup", "attempt"} & set(names)
    assert any(line.startswith("spot is left out: spot is made of saved adapters") for line in left_out)

    tiny = matrix.Size(n_steps=3, batch=16, lr_trials=1, head_lr=0.05, n_train=64, n_validation=16, max_length=32)
    monkeypatch.setitem(matrix.BUDGETS, "tiny-v1", tiny)
    out = tmp_path / "results"
    args = ["compare", "--model", backbone, "--data", str(reviews), "--budget", "tiny-v1", "--out", str(out)]
    args += ["--device", "cpu", "--methods"]
    hyper = f"{{sources: [{', '.join(folders)}]}}"
    assert main([*args, "ia3"]) == 0
    assert main([*args, "ia3,mera,lora", "--hyper.mera", hyper, "--hyper.lora", "{r: 3}"]) == 0
    cells = {c.key.method: c for c in read_folder(out)}
    assert all(c.status == "done" for c in cells.values())
    assert cells["mera"].config["hyper"]["mera"] == {"sources": folders} and "r=4" in cells["mera"].label
    assert "r=3" in cells["lora"].label
    code, _, err = run(capsys, *args, "mera", "--hyper.mera", hyper.replace(folders[1], folders[0]))
    assert code == 2 and "was measured with" in err and "give another --out" in err


def _fails(cls: Any, *args: Any) -> Any:
    raise ValueError("fails on purpose")


MISTAKES = {
    "verb": (["trian"], "did you mean 'train'"),
    "option": (["train", "--stepz", "3"], "stepz"),
    "method": (["train", "--method", "lroa"], "did you mean 'lora'"),
    "hyperparameter": (["train", "--method", "lora", "--method.rank", "3"], "unknown hyperparameter of lora 'rank'"),
    "value": (["train", "--method", "lora", "--method.r", "three"], "three"),
    "rank": (["train", "--method", "lora", "--method.r", "0"], "r = 0"),
    "too large a rank": (["train", "--method", "lora", "--method.r", "33"], "r = 33"),
    "place": (["train", "--method", "lora", "--method.where", "mlp.gate"], "mlp.gate"),
    "layer": (["train", "--method", "lora", "--method.layers", "7"], "layer 7 is out of range"),
    "share": (["train", "--method", "lora", "--method.layers", "1/2"], "layers='1/2' is no share of a stack's depth"),
    "too few layers": (["train", "--method", "s4"], "layers='0-1/6' holds the middle of no layer"),
    "sources": (
        ["train", "--method", "spot"],
        "spot is made of saved adapters, such as prompt_tuning's; give it --method.sources",
    ),
    "sources of another": (
        ["train", "--method", "lora", "--method.sources", "a"],
        "unknown hyperparameter of lora 'sources'",
    ),
    "number of sources": (
        ["train", "--method", "mera", "--method.batches", "a"],
        "unknown hyperparameter of mera 'batches'",
    ),
    "no sources to compare": (
        ["compare", "--methods", "lora,mera"],
        "mera is made of saved adapters, such as sequential's",
    ),
    "sources of lora": (["compare", "--methods", "lora", "--hyper.lora", "{{sources: [a]}}"], "takes no sources"),
    "hyper": (["compare", "--methods", "lora", "--hyper.lroa", "{{r: 2}}"], "did you mean 'lora'"),
    "steps": (["train", "--steps", "0"], "--steps is 0"),
    "task": (["compare", "--task", "glue/sst3"], "glue/sst2"),
    "budget": (["compare", "--budget", "demo"], "demo-v1"),
    "label": (["train", "--data", "{reviews}", "--label", "star"], "did you mean 'stars'"),
    "text": (["train", "--data", "{reviews}", "--text", "revue"], "did you mean 'review'"),
    "no file": (["train", "--data", "{tmp}/nothing.csv"], "nothing.csv"),
    "empty file": (["train", "--data", "{tmp}/empty.csv"], "empty.csv"),
    "backbone": (["train", "--model", "{tmp}/no-such-model", "--data", "{reviews}"], "no-such-model"),
    "configuration": (["train", "--config", "{tmp}/no.yaml"], "no.yaml"),
    "adapter": (["merge", "{tmp}", "--model", "{backbone}", "--out", "{tmp}/merged"], "adapter.json"),
    "class": (["check", "deltatune.core.site:Site"], "not a deltatune.Method"),
    "module": (["check", "no_such_module:Toy"], "no_such_module"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], backbone: str, reviews: Path, tmp_path: Path, mistake: str
) -> None:
    """One line on standard error that names what is wrong, exit code 2, and nothing written."""
    args, expected = MISTAKES[mistake]
    (tmp_path / "empty.csv").touch()
    args = [a.format(tmp=tmp_path, reviews=reviews, backbone=backbone) for a in args]
    if args[0] in ("train", "compare"):
        args += ["--out", str(tmp_path / "out")]
        if "--model" not in args:
            args += ["--model", backbone]
        if "--data" not in args and "--task" not in args:
            args += ["--data", str(reviews)]
    code, _, err = run(capsys, *args)
    assert code == 2 and err.startswith("deltatune: ") and err.count("\n") <= 6 and expected in err, err
    assert "Traceback" not in err


def test_folder_of_another_run(
    capsys: pytest.CaptureFixture[str], backbone: str, reviews: Path, tmp_path: Path
) -> None:
    assert train(backbone, reviews, tmp_path / "run", "--method", "head") == 0
    capsys.readouterr()
    assert train(backbone, reviews, tmp_path / "run", "--method", "bitfit") == 2
    assert "holds another run: its method" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert train(backbone, reviews, tmp_path / "mine") == 2
    assert "not empty" in capsys.readouterr().err


def test_check_from_outside(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deltatune check MODULE:CLASS` runs the contract on a class that no file of the package knows."""
    (tmp_path / "outside_method.py").write_text(
        '"""A method from outside."""\n\nimport deltatune as dt\nfrom torch import Tensor\n\n\n'
        'class Shift(dt.Method, name="outside_shift"):\n    """W\' = W, b\' = b + d."""\n\n    where = "linear"\n'
        '    kinds = frozenset({"linear"})\n    d: Tensor = dt.param("d_out")\n\n    def fold(self, weight, bias):\n'
        "        return weight, self.d if bias is None else bias + self.d\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        code, out, _ = run(capsys, "check", "outside_method:Shift")
        assert code == 0 and "passed" in out
    finally:
        METHODS.pop("outside_shift", None)
        sys.modules.pop("outside_method", None)


def test_a_preset_and_places_of_their_own(
    capsys: pytest.CaptureFixture[str], backbone: str, reviews: Path, tmp_path: Path
) -> None:
    """`--method mam` is a tree with a name; `where` in a file gives places their own hyperparameters."""
    assert train(backbone, reviews, tmp_path / "mam", "--method", "mam", "--method.r", "4", "--method.n", "3") == 0
    card = json.loads((tmp_path / "mam" / "adapter" / "adapter.json").read_text())
    assert [c["method"] for c in card["tree"]["children"]] == ["prefix_tuning", "parallel"]
    assert card["n_params"] == 2 * (2 * 3 * 32 + 2 * 4 * 32 + 4 + 32)
    config = tmp_path / "places.yaml"
    config.write_text(yaml.safe_dump({"method": {"name": "lora", "where": {"attn": {"r": 2}, "mlp": {"r": 8}}}}))
    assert train(backbone, reviews, tmp_path / "lora", "--config", str(config)) == 0
    card = json.loads((tmp_path / "lora" / "adapter" / "adapter.json").read_text())
    assert card["tree"]["where"] == {"attn": {"r": 2}, "mlp": {"r": 8}}
    assert card["n_params"] == 2 * (4 * 2 * 64 + 2 * 8 * (32 + 64))
    code, _, err = run(capsys, "train", "--method", "mam", "--method.rr", "4", "--out", str(tmp_path / "no"))
    assert code == 2 and "'rr'" in err and "'r'" in err
