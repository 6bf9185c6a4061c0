"""Time and memory, HF PEFT beside us in the same run.

    python benchmarks/run.py                            all of them on the CPU
    python benchmarks/run.py step --device cuda --shape 1b

prints a table each and writes results/bench/NAME-DEVICE.json. A benchmark whose comparison is red prints no number, and
the exit status is 1. `memory` and `qlora` keep what is done in a .part.json, from which the same command goes on; `--write` puts
their results into their page.
"""

import argparse
import sys
import warnings
from pathlib import Path

import adapter_drop
import attach
import candidates
import coda
import imports
import load_base
import lora_fa
import lora_prune
import low_rank
import lst
import memory
import overhead
import qlora
import route
import sparse
import step
from bench import BENCHMARKS, SHAPED, SHAPES, Options, Red, put, table, write

assert {
    adapter_drop,
    attach,
    candidates,
    coda,
    imports,
    load_base,
    lora_fa,
    lora_prune,
    low_rank,
    lst,
    memory,
    overhead,
    qlora,
    route,
    sparse,
    step,
}, "imported for their places in BENCHMARKS"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "bench"
PAGES = {"memory": ("quantised.md", memory.page), "qlora": ("quantised.md", qlora.page)}  # those that write into one


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape", choices=SHAPES, help=f"of {', '.join(SHAPED)}; by default small on a CPU, 1b on a GPU"
    )
    parser.add_argument("--repeats", type=int, help="how many turns or rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--profile", action="store_true", help="of `qlora`: where a step's time goes, beside the JSON")
    parser.add_argument(
        "--write", action="store_true", help=f"only put the results of {', '.join(PAGES)} into their pages"
    )
    given = parser.parse_args()
    for name in given.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if given.write:
        for name, (page, made) in PAGES.items():
            put(ROOT / "docs" / page, name, made(given.out))
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, read by HF PEFT
    shape = given.shape or ("1b" if given.device == "cuda" else "small")
    options = Options(given.device, shape, given.repeats, given.out, given.profile)
    n_red = 0
    for name in given.names or BENCHMARKS:
        try:
            rows = BENCHMARKS[name](options)
        except Red as red:
            print(f"\n{name}: RED, no numbers: {red}", file=sys.stderr)
            n_red += 1
            continue
        write(name, options, rows)
        print(f"\n{name}\n{table(rows)}", flush=True)
    return int(n_red > 0)


if __name__ == "__main__":
    sys.exit(main())
