"""The Fisher information and masks of FISH's reference code, in fp64.

    python tests/golden/make_fish_mask.py REFERENCE

where REFERENCE is GitHub's varunnair18/FISH at COMMIT; of its GLUE script the functions that make the mask are run as they
are, under today's transformers. Writes tests/golden/fish_mask.json:

    masks     {sample_type: {parameter: string}} for `classifier` of make_child_tuning.py over its `examples`, one row a
              batch, without dropout: a mask is a string of 0 and 1 in row-major order; `label` takes the rows' labels,
              `expect` the mean over labels drawn from the model
    fisher    {sample_type: {parameter: sums}} of two parameters, the squared gradients summed over the rows
    sizes     {keep_ratio, all, classifier, kept}: of all entries the share keep_ratio is trained, the classifier first

The parts without the reference are imported by the test on our side.
"""

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().with_name("fish_mask.json")
COMMIT = "b5bff1e66559f7c865e2f45c1488ae13e193dae2"
SCRIPT = "transformers/examples/text-classification/run_glue_sparse_update.py"
KEEP_RATIO = 0.1
SHOWN = ("bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.LayerNorm.bias")
BASE = runpy.run_path(str(Path(__file__).resolve().with_name("make_child_tuning.py")))
classifier, collate, examples = (BASE[k] for k in ("classifier", "collate", "examples"))


def functions(path: Path, names: set[str], scope: dict[str, Any]) -> dict[str, Any]:
    """These functions of a script whose other parts do not run here."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    picked = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in picked} == names
    exec(compile(ast.Module(picked, []), str(path), "exec"), scope)
    return scope


def one(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as the script's collator gives it: tensors alone."""
    return {k: v for k, v in collate(rows).items() if k != "idx"}


def made(folder: str) -> dict[str, Any]:
    """The masks, and the sums that they are made of."""
    names = {"calculate_the_importance_label", "calculate_the_importance_expect", "create_mask_gradient"}
    reference = functions(Path(folder) / SCRIPT, names, {"torch": torch, "DataLoader": torch.utils.data.DataLoader})
    rows = examples()
    card: dict[str, Any] = {"masks": {}, "fisher": {}}
    for kind in ("label", "expect"):
        model = classifier().eval()
        masks = reference["create_mask_gradient"](model, rows, one, len(rows), KEEP_RATIO, kind, "square")
        card["masks"][kind] = {n: BASE["bits"](m) for n, m in masks.items()}
        loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=one)
        sums = reference[f"calculate_the_importance_{kind}"](model, loader, len(rows), "cpu", "square")
        card["fisher"][kind] = {n: BASE["listed"](sums[n]) for n in SHOWN}
    sizes = {n: p.numel() for n, p in classifier().named_parameters()}
    head = sum(n for name, n in sizes.items() if "classifier" in name)
    kept = sum(text.count("1") for name, text in card["masks"]["label"].items() if "classifier" not in name)
    return card | {"sizes": {"keep_ratio": KEEP_RATIO, "all": sum(sizes.values()), "classifier": head, "kept": kept}}


if __name__ == "__main__":
    import transformers

    card = {
        "command": "python tests/golden/make_fish_mask.py REFERENCE",
        "reference": {"repository": "varunnair18/FISH", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
        **made(sys.argv[1]),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
