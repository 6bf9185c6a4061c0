"""Host memory while `dt.load_base` reads and quantises a folder: each case in a process of its own, watched from within."""

import json
import subprocess
import sys
import tempfile

import torch
from bench import Options, Red, Row, benchmark
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
}  # fmt: skip
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
FORMATS = ("bnb-nf4", "int4")
CODE = """
import json, sys, threading, time
import torch
import bitsandbytes, transformers, accelerate
import deltatune as dt
from deltatune.core.storage import format_of

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024

dt.load_base(sys.argv[3], sys.argv[2])  # what is imported, or set up at a first call, is none of a model's
before = peak = held()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = dt.load_base(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
done.set()
thread.join()
kept = {t.untyped_storage().data_ptr(): t.nbytes for t in model.state_dict().values() if torch.is_tensor(t)}
n = sum(format_of(m) is not None for m in model.modules())
print(json.dumps({"s": seconds, "model": sum(kept.values()), "layers": n, "peak": peak - before}))
"""
MIB = 2**20


@benchmark("load_base")
def load_base(options: Options) -> list[Row]:
    """MiB of 334 M random weights in bf16, in one file and in shards of 100 MB; pages of the file that are mapped count."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    n_layers = 7 * SIZES["num_hidden_layers"]
    plain = sum(p.nbytes for p in model.parameters())
    layer = max(p.nbytes for n, p in model.named_parameters() if "layers" in n)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for files, size in (("one", "10GB"), ("shards", "100MB")):
            model.save_pretrained(f"{folder}/{files}", max_shard_size=size)
        del model
        LlamaForCausalLM(LlamaConfig(**SIZES | TINY)).to(torch.bfloat16).save_pretrained(f"{folder}/tiny")
        for to in FORMATS:
            for files in ("one", "shards"):
                done = subprocess.run(
                    [sys.executable, "-c", CODE, f"{folder}/{files}", to, f"{folder}/tiny"],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                got = json.loads(done.stdout.splitlines()[-1])
                if got["layers"] != n_layers:
                    raise Red(f"{to}: {got['layers']} of {n_layers} layers are quantised")
                rows.append(
                    {
                        "format": to, "files": files, "plain": plain / MIB, "quantised": got["model"] / MIB, "a layer": layer / MIB,
                        "peak": got["peak"] / MIB, "beyond": (got["peak"] - got["model"]) / MIB, "s": got["s"],
                    }
                )  # fmt: skip
    return rows
