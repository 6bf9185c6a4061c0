"""The masks of SAM's reference runner, in fp64.

    python tests/golden/make_sam.py REFERENCE

where REFERENCE is GitHub's fuzihaofzh/AnalyzeParameterEfficientFinetune at COMMIT; its runner's own training step is run, on
stand-ins for the classes of jiant that it is given (a model's loss, a list of batches). Writes tests/golden/sam.json:

    settings  {share, burnin, max_grad_norm}; the runner adds up the gradients of burnin - 1 steps, each of which it clips to
              max_grad_norm over all parameters, the classifier's too
    masks     {parameter: string} of the encoder's tensors: a mask is a string of 0 and 1, 1 where an entry trains, in row-major
              order, for `classifier` of make_child_tuning.py over its `examples` in `batches`, without dropout
    sums      {parameter: gradients added up} of one parameter
    batches   the rows of each step

The parts without the reference are imported by the test on our side.
"""

import json
import runpy
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().with_name("sam.json")
COMMIT = "ea1a73b40dfe9aaa740bf1979caf0b87357d20f1"
SETTINGS = {"share": 0.07, "burnin": 5, "max_grad_norm": 0.05}
BATCHES = [[0, 1], [2, 3], [4, 5], [1, 2], [3, 4], [5, 0]]
SHOWN = "encoder.encoder.layer.1.output.dense.bias"
BASE = runpy.run_path(str(Path(__file__).resolve().with_name("make_child_tuning.py")))
classifier, collate, examples = (BASE[k] for k in ("classifier", "collate", "examples"))


class Jiant(nn.Module):
    """The same classifier with its parts under jiant's names."""

    def __init__(self) -> None:
        super().__init__()
        model = classifier()
        self.encoder = model.bert
        self.taskmodels_dict = nn.ModuleDict({"task": model.classifier})
        self.whole = [model]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Of one batch."""
        return self.whole[0].train()(**batch).loss  # type: ignore[no-any-return]


class Batch(dict[str, Tensor]):
    """What the runner moves to its device."""

    def to(self, device: Any) -> "Batch":
        """Itself: it is there."""
        return self


def runner(folder: str) -> Any:
    """The reference's module, with stand-ins for what it imports of jiant."""
    names = ("tasks.evaluate", "utils.torch_utils", "proj.main.modeling.primary", "shared.constants", "shared.runner",
             "utils.display", "utils.python.datastructures")  # fmt: skip
    for name in names:
        parts = f"jiant.{name}".split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    sys.modules["container_setup"] = types.ModuleType("container_setup")
    given: dict[str, dict[str, Any]] = {
        "container_setup": {"JiantTaskContainer": object},
        "jiant.tasks": {"evaluate": None},
        "jiant.utils": {"torch_utils": None},
        "jiant.proj.main.modeling.primary": {"JiantModel": object, "wrap_jiant_forward": forward},
        "jiant.shared.constants": {"PHASE": None},
        "jiant.shared.runner": {"get_train_dataloader_from_cache": None, "get_eval_dataloader_from_cache": None},
        "jiant.utils.display": {"maybe_tqdm": None},
        "jiant.utils.python.datastructures": {"InfiniteYield": object, "ExtendedDataClassMixin": object},
    }
    for name, values in given.items():
        vars(sys.modules[name]).update(values)
    return runpy.run_path(str(Path(folder) / "src" / "runner.py"))


def forward(jiant_model: Jiant, batch: Batch, task: Any, compute_loss: bool) -> SimpleNamespace:
    """The model's loss, as jiant hands it over."""
    return SimpleNamespace(loss=jiant_model.loss(batch))


def masks(folder: str) -> dict[str, Any]:
    """The runner's, after its burn-in."""
    module, model, rows = runner(folder), Jiant(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = SimpleNamespace(gradient_accumulation_steps=1)
    container = SimpleNamespace(
        task_sampler=SimpleNamespace(pop=lambda: ("task", None)), task_specific_configs={"task": settings}
    )
    log = SimpleNamespace(write_entry=lambda *args: None)
    schedule = SimpleNamespace(optimizer=optimizer, step=optimizer.step)
    parameters = module["RunnerParameters"](-1, 1, False, SETTINGS["max_grad_norm"])
    run = module["JiantRunner"](container, model, schedule, "cpu", parameters, log)
    run.user_mode = {"bsearch": str(SETTINGS["share"]), "burnin": str(SETTINGS["burnin"])}
    queue = [Batch((k, v) for k, v in collate([rows[i] for i in picked]).items() if k != "idx") for picked in BATCHES]
    loader = {"task": SimpleNamespace(pop=lambda: (queue.pop(0), None))}
    state = module["TrainState"].from_task_name_list(["task"])
    bar = SimpleNamespace(set_postfix=lambda given: None)
    for _ in range(int(SETTINGS["burnin"])):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        run.run_train_step(loader, state, bar)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved, "no step was taken behind the burn-in"
    frozen = {n: m for n, m in run.bs_mask.items() if n.startswith("encoder")}
    return {
        "settings": SETTINGS,
        "batches": BATCHES[: int(SETTINGS["burnin"])],
        "masks": {n: BASE["bits"](~m) for n, m in frozen.items()},
        "sums": {SHOWN: BASE["listed"](run.bs_accu[SHOWN])},
    }


if __name__ == "__main__":
    import transformers

    card = {
        "command": "python tests/golden/make_sam.py REFERENCE",
        "reference": {"repository": "fuzihaofzh/AnalyzeParameterEfficientFinetune", "commit": COMMIT},
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
        **masks(sys.argv[1]),
    }
    GOLDEN.write_text(json.dumps(card, separators=(",", ":")) + "\n", encoding="utf-8")
