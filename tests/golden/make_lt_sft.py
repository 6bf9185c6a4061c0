"""What composable-sft's trainer finds, and what two of its fine-tunings add up to, in fp64.

    python tests/golden/make_lt_sft.py REFERENCE/src

where REFERENCE is GitHub's cambridgeltl/composable-sft at COMMIT, under today's transformers; its hook of the Trainer for
logging and saving, which older ones called otherwise, is left out. Its copies of the start hang on the graph of the
parameters themselves, so that its penalty |p - p0| has no gradient; `detached` takes them off. Writes
tests/golden/lt_sft.json:

    settings  of the optimiser and the phases
    runs      {name: {iterations, k, l1, seed, frozen, detached, batches, diffs, head}}: frozen are parts of names; batches
              the rows of each step, phase after phase; diffs {parameter: [[position, ...], [value, ...]]} of the entries
              that it kept, positions in row-major order; head {parameter: values}
    both      logits of `classifier` of make_child_tuning.py on its `examples` under the differences of the run `one` and then
              those of `two`, and the head of `two`

Training is without dropout; all but the classifier is maskable. The parts without the reference are imported by the test
on our side.
"""

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

GOLDEN = Path(__file__).resolve().with_name("lt_sft.json")
COMMIT = "29f7872d018555ee84fb9620ba7d69df426a7bdb"
SETTINGS = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "batch": 2, "dense_steps": 4, "sparse_steps": 4}
RUNS: dict[str, dict[str, Any]] = {
    "one": {"iterations": 1, "k": 60, "l1": 0.0, "seed": 1, "frozen": [], "detached": False},
    "two": {"iterations": 2, "k": 60, "l1": 0.0, "seed": 2, "frozen": [], "detached": False},
    # a key's bias has no gradient but rounding, whose sign the penalty would take up
    "l1": {"iterations": 2, "k": 40, "l1": 0.5, "seed": 3, "frozen": ["self.key"], "detached": True},
    "l1 as it is": {"iterations": 1, "k": 40, "l1": 0.5, "seed": 3, "frozen": ["self.key"], "detached": False},
}
BASE = runpy.run_path(str(Path(__file__).resolve().with_name("make_child_tuning.py")))
classifier, collate, examples = (BASE[k] for k in ("classifier", "collate", "examples"))


def logits(model: nn.Module) -> Any:
    """Of all rows."""
    with torch.no_grad():
        return BASE["listed"](model.eval()(collate(examples())["input_ids"]).logits)


def run(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One fine-tuning: the reference's object, and what is written of it."""
    from sft import LotteryTicketSparseFineTuner, SftArguments
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    batches: list[list[int]] = []

    first = [int(row["input_ids"][0]) for row in examples()]  # each row has another

    def plain(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in collate(rows).items() if k != "idx"}

    class Quiet(LotteryTicketSparseFineTuner(Trainer)):  # type: ignore[misc]
        use_apex = False  # a Trainer of today has none, and the penalty asks for it

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            pass

        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Any:
            batches.append([first.index(token) for token in inputs["input_ids"][:, 0].tolist()])
            return super().training_step(model, inputs, *args)

    model = classifier()
    for n, p in model.named_parameters():
        p.requires_grad_(not any(part in n for part in options["frozen"]))
    maskable = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("classifier")]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, learning_rate=SETTINGS["lr"], adam_beta1=SETTINGS["betas"][0], adam_beta2=SETTINGS["betas"][1],
            adam_epsilon=SETTINGS["eps"], lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
            per_device_train_batch_size=SETTINGS["batch"], seed=options["seed"], use_cpu=True, report_to=[],
            remove_unused_columns=False, disable_tqdm=True, optim="adamw_torch", dataloader_pin_memory=False,
        )  # fmt: skip
        sft_arguments = SftArguments(
            ft_params_num=options["k"], n_ft_iterations=options["iterations"], full_l1_reg=options["l1"],
            sparse_l1_reg=options["l1"], apply_reg_to_sparse_only=True,
            full_ft_max_steps_per_iteration=SETTINGS["dense_steps"],
            sparse_ft_max_steps_per_iteration=SETTINGS["sparse_steps"],
        )  # fmt: skip
        trainer = Quiet(
            sft_args=sft_arguments, maskable_params=maskable, model=model, args=arguments, train_dataset=examples(),
            data_collator=plain,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if options["detached"]:
            trainer._original_params = {n: p.detach() for n, p in trainer._original_params.items()}
        trainer.train()
        found = trainer.sft()
    diffs = {n: d.to_dense().flatten() for n, d in found.diffs.items()}
    places = {n: d.nonzero()[:, 0] for n, d in diffs.items()}
    return found, {
        **options,
        "batches": batches,
        "diffs": {n: [at.tolist(), BASE["listed"](diffs[n][at])] for n, at in places.items() if len(at)},
        "head": {n: BASE["listed"](p.detach()) for n, p in model.classifier.named_parameters()},
    }


def made() -> dict[str, Any]:
    """All of it."""
    found = {name: run(options) for name, options in RUNS.items()}
    model = classifier()
    found["one"][0].apply(model, with_abs=False)
    found["two"][0].apply(model)
    return {"settings": SETTINGS, "runs": {name: card for name, (_, card) in found.items()}, "both": logits(model)}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    card = {
        "command": "python tests/golden/make_lt_sft.py REFERENCE/src",
        "reference": {"repository": "cambridgeltl/composable-sft", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
        **made(),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
