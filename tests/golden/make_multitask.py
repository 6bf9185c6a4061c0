"""How HyperFormer's reference draws its tasks.

    python tests/golden/make_multitask.py REFERENCE

where REFERENCE is GitHub's rabeehk/hyperformer at COMMIT; its `MultiTaskBatchSampler` is run as it is, in one process. Writes
tests/golden/multitask.json: by temperature, the probabilities that its `generate_tasks_distribution` gives for tasks of SIZES rows.
"""

import importlib.util
import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().with_name("multitask.json")
COMMIT = "56b0f993eeec62f5a8c962704739912b5f039a9b"
SIZES = [8551, 3668, 2490, 67349, 5749]
TEMPERATURES = [1, 2, 5, 10, 1000]


def main(reference: Path) -> None:
    """Write the file."""
    spec = importlib.util.spec_from_file_location(
        "sampler", reference / "hyperformer" / "data" / "multitask_sampler.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for temperature in TEMPERATURES:
        sampler = module.MultiTaskBatchSampler(SIZES, batch_size=8, temperature=temperature, num_replicas=1, rank=0)
        found[str(temperature)] = sampler.generate_tasks_distribution().tolist()
    text = json.dumps({"commit": COMMIT, "sizes": SIZES, "shares": found}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
