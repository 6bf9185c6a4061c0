"""`import deltatune` beside `import torch`: fresh interpreters, in turns."""

import subprocess
import sys

from bench import Options, Red, Row, benchmark, median

CODE = """
import sys, time
start = time.perf_counter()
import {0}
print(time.perf_counter() - start, "transformers" in sys.modules)
"""


@benchmark("import")
def imports(options: Options) -> list[Row]:
    """Seconds of the import alone, the median of the turns."""
    times: dict[str, list[float]] = {"torch": [], "deltatune": [], "peft": []}
    for turn in range((options.repeats or 7) + 1):
        for name in times:
            done = subprocess.run([sys.executable, "-c", CODE.format(name)], capture_output=True, text=True, check=True)
            seconds, heavy = done.stdout.split()
            if name == "deltatune" and heavy == "True":
                raise Red("import deltatune imports transformers")
            if turn:  # the first turn fills the disk cache
                times[name].append(float(seconds))
    floor = median(times["torch"])
    return [{"import": name, "s": median(ts), "x torch": median(ts) / floor} for name, ts in times.items()]
