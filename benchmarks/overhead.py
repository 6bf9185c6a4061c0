"""Microseconds that one adapted layer costs beside its arithmetic: a deep model of tiny layers, one thread.

The floor is the shortest LoRA that one can write, a subclass of `nn.Linear` with the equation in its forward.
"""

import torch
import torch.nn.functional as F
from bench import Options, Row, agree, batch, benchmark, fill, in_turns, llama, low, pairs_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import deltatune as dt


class Floor(nn.Linear):
    """y + 2 B A x"""

    def forward(self, x: Tensor) -> Tensor:
        """The equation alone."""
        return F.linear(x, self.weight, self.bias) + 2.0 * F.linear(F.linear(x, self.a), self.b)


@benchmark("overhead")
def overhead(options: Options) -> list[Row]:
    """The 10th percentile of a forward, without gradients."""
    device = options.device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, floor = llama("deep", device), llama("deep", device)
        dt.attach(ours, "lora", where="all-linear", r=8)
        theirs = get_peft_model(
            llama("deep", device), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        ).eval()
        fill(ours)
        fill(theirs)
        pairs = pairs_of(ours)
        for name, (a, b) in pairs.items():
            module = floor.get_submodule(name)
            module.a, module.b, module.__class__ = a, b, Floor
        models = {"base": llama("deep", device), "floor": floor, "ours": ours, "HF PEFT": theirs}
        ids = batch("deep", device)
        with torch.no_grad():
            for name in ("ours", "HF PEFT"):
                agree(name, models[name](ids).logits, floor(ids).logits, 1e-5)
            functions = {name: lambda model=model: model(ids) for name, model in models.items()}
            in_turns(functions, 10, device)
            times = {name: low(ts) for name, ts in in_turns(functions, options.repeats or 250, device).items()}
    finally:
        torch.set_num_threads(threads)
    return [
        {
            f"{len(pairs)} layers of 32": name,
            "forward ms": seconds * 1e3,
            "us a layer over floor": (seconds - times["floor"]) / len(pairs) * 1e6 if name != "base" else "",
            "x floor": seconds / times["floor"],
        }
        for name, seconds in times.items()
    ]
