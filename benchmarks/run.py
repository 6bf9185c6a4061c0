"""Time and memory, HF PEFT beside us in the same run.

    python benchmarks/run.py                            all of them on the CPU
    python benchmarks/run.py step --device cuda --shape 1b

prints a table each and writes results/bench/NAME-DEVICE.json. A benchmark whose comparison is red prints no number, and
the exit status is 1.
"""

import argparse
import sys
import warnings
from pathlib import Path

import adapter_drop
import attach
import coda
import imports
import lora_fa
import lora_prune
import lst
import overhead
import route
import sparse
import step
from bench import BENCHMARKS, SHAPES, Options, Red, table, write

assert {adapter_drop, attach, coda, imports, lora_fa, lora_prune, lst, overhead, route, sparse, step}, (
    "imported for their places in BENCHMARKS"
)
RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench"


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="of `step`; small on a CPU, 1b on a GPU by default")
    parser.add_argument("--repeats", type=int, help="how many turns or rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    given = parser.parse_args()
    for name in given.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, read by HF PEFT
    options = Options(given.device, given.shape or ("1b" if given.device == "cuda" else "small"), given.repeats)
    n_red = 0
    for name in given.names or BENCHMARKS:
        try:
            rows = BENCHMARKS[name](options)
        except Red as red:
            print(f"\n{name}: RED, no numbers: {red}", file=sys.stderr)
            n_red += 1
            continue
        write(given.out, name, options, rows)
        print(f"\n{name}\n{table(rows)}", flush=True)
    return int(n_red > 0)


if __name__ == "__main__":
    sys.exit(main())
