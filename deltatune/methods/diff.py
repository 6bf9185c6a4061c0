"""A difference that learns to be sparse, and is then cut to values at indices."""

import zlib
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.inits import constant
from ..core.method import Slot, param
from ..core.ragged import refill
from ..core.refold import linear
from ..core.schedule import Schedule
from .sparse import Sparse


class Projection(Schedule):
    """Trains the difference with its gates under the L0 penalty, cuts it to the largest entries, and trains those.

    The penalty's gradient is added once a step, whatever the number of backward passes, and so the noise of the gates is
    drawn once a step: of the adapter's seed, the step and the site alone. What is cut loses its tensors and moments. An
    adapter that is cut already, as a file is, trains on as it is.
    """

    resizes = True
    has_penalty = True

    def __init__(self, adapter):
        super().__init__(adapter)
        self.done = 0

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer = optimizer
        self.deltas = {key: d for key, d in self.adapter.deltas.items() if isinstance(d, DiffPruning)}
        config = self.common(self.deltas.values())
        self.dense = max(1, int(config.dense * n_steps)) if config.dense < 1 else int(config.dense)
        if not any(d.is_dense for d in self.deltas.values()):
            self.dense = 0
        if self.dense >= n_steps > 1:
            raise ValueError(f"diff_pruning: dense = {self.dense} steps leave none of {n_steps} to train what is kept")
        for d in self.deltas.values():
            d.draw = self.done, self.adapter.seed

    @torch.no_grad()
    def before_step(self, step):
        for d in self.deltas.values():
            for t in (d.gate, d.group) if d.is_dense else ():
                open_ = torch.sigmoid(t - d.shift)  # the probability of not being 0
                slope = d.config.penalty * open_ * (1 - open_)
                t.grad = slope if t.grad is None else t.grad.add_(slope)

    @torch.no_grad()
    def after_step(self, step):
        self.done = step + 1
        for d in self.deltas.values():
            d.draw = self.done, self.adapter.seed
        if self.done == self.dense:
            self._project()

    def _project(self):
        """Of all entries keep the share of largest |z w|, whatever site they are of."""
        dense = {key: d for key, d in self.deltas.items() if d.is_dense}
        moved = {key: d.change(noise=False).cpu() for key, d in dense.items()}
        keep = next(iter(self.deltas.values())).config.keep
        for key, mask in largest(moved, keep).items():
            d = dense[key]
            for part in d.DENSE:
                self.optimizer.state.pop(getattr(d, part), None)
                refill(d, part, torch.zeros(0))
            refill(d, "index", mask.nonzero().flatten())
            refill(d, "values", moved[key][mask])

    def end(self):
        for d in self.deltas.values():
            d.draw = 0, 0

    def state_dict(self):
        return super().state_dict() | {"done": self.done}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.done = state["done"]


def largest(values, keep):
    """Masks over the `keep` share of all entries of largest absolute value, one at least; of equals the first."""
    flat = torch.cat([v.abs() for v in values.values()])
    k = max(1, round(keep * len(flat)))
    edge = flat.kthvalue(len(flat) - k + 1).values
    mask = flat > edge
    mask[(flat == edge).nonzero().flatten()[: k - int(mask.sum())]] = True
    return dict(zip(values, mask.split([len(v) for v in values.values()]), strict=True))


class DiffPruning(Sparse, name="diff_pruning"):
    """[W | b]' = [W | b] + z_t z o w, z_t and z hard-concrete gates of a tensor and of an entry; then values at indices.

    z = clamp(s (r - l) + l, 0, 1), s = sigmoid(logit(u) + gate), u uniform while training and 1/2 else. The penalty is the
    sum of sigmoid(gate - log(-l / r)) over all gates. After `dense` steps the `keep` share of largest |z_t z w| stays, over
    all sites, and trains under a fixed mask. `where` can take the embeddings in, as the paper does.
    """

    paper = "2012.07463"
    lr = (1e-5, 3e-4)
    schedule = Projection
    still = dict.fromkeys(
        ("gate", "group"), "the paper's gates start open, where the hard concrete is flat: but for rare noise no slope"
    )
    DENSE: ClassVar[tuple[str, ...]] = ("w", "gate", "group")
    ragged = frozenset({"index", "values", "w", "gate", "group"})
    dense: float = 0.5  # steps before the difference is cut; below 1 a share of all
    penalty: float = 1.25e-7  # weight of the L0 norm's expectation
    start: float = 5.0  # gates at the start
    low: float = -1.5  # l, where the gates' interval begins
    high: float = 1.5  # r, where it ends
    gate_lr: float = 2000.0  # learning rate of the gates, as a multiple: 0.1 beside 5e-5
    phase: Literal["dense", "sparse"] = "dense"  # sparse, as in a finished file: values at indices from the start
    w: Tensor = param("size")
    gate: Tensor = param("size", constant("start"), lr="gate_lr")
    group: Tensor = param("n_tensors", constant("start"), lr="gate_lr")

    draw: ClassVar[tuple[int, int]] = (0, 0)  # what the noise comes of beside the site: the step and the seed

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not config.low < 0 < 1 < config.high:
            raise ValueError(
                f"{cls.name}: low = {config.low} and high = {config.high}, but a gate's interval reaches below 0 and above 1"
            )
        for key in ("dense", "penalty", "gate_lr"):
            if getattr(config, key) < 0:
                raise ValueError(f"{cls.name}: {key} = {getattr(config, key)}, but it must be at least 0")
        return config

    @classmethod
    def slots_of(cls, config) -> dict[str, Slot]:
        return {k: s for k, s in cls.slots.items() if config.phase == "dense" or k not in cls.DENSE}

    @classmethod
    def count(cls):
        return "2*size + n_tensors"

    def build(self, base, dtype):
        super().build(base, dtype)
        if self.phase == "dense":
            for part in ("index", "values"):
                refill(self, part, torch.zeros(0))

    def dims(self, base):
        k = self._parameters.get("values")
        here = {"size": self.size, "n_tensors": 1 + (self.size > self.n_weight)}
        return super().dims(base) | here | ({"k": k.numel()} if k is not None else {})

    @property
    def is_dense(self):
        """Is the difference still whole?"""
        return self._parameters.get("w") is not None and self.w.numel() > 0

    @property
    def shift(self):
        """log(-l / r)"""
        return torch.tensor(-self.low / self.high).log().item()

    def check_ragged(self, tensors):
        dense = [tuple(tensors[part].shape) for part in self.DENSE if part in tensors]
        whole = [(self.size,), (self.size,), (1 + (self.size > self.n_weight),)]
        if dense and (dense not in (whole, [(0,)] * 3) or (dense == whole and tensors["values"].numel())):
            raise ValueError(f"w, gate and group are {dense}, here they are {whole}, or empty beside the values")
        super().check_ragged(tensors)

    @torch.compiler.disable  # a generator has no place in a graph; else each site and step would be traced to find that out
    def noise(self, part, n):
        """u (n), the same each time in one step."""
        step, seed = self.draw
        key = f"{seed} {self.path} {self.site.name} {part} {step}"
        made = torch.Generator(self.w.device).manual_seed(zlib.crc32(key.encode()))
        return torch.rand(n, generator=made, device=self.w.device, dtype=self.w.dtype).clamp(1e-4, 1 - 1e-4)

    def opened(self, part, noise):
        """The gates of entries or of tensors, between 0 and 1."""
        gate = getattr(self, part)
        s = torch.sigmoid(gate + torch.logit(self.noise(part, gate.numel())) if noise else gate)
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    def change(self, noise):
        """z_t z o w of [W | b]."""
        of_tensor = self.opened("group", noise)
        sizes = torch.tensor([self.n_weight, self.size - self.n_weight][: len(of_tensor)], device=of_tensor.device)
        return self.opened("gate", noise) * of_tensor.repeat_interleave(sizes, output_size=self.size) * self.w

    def fold(self, weight, bias):
        if not self.is_dense:
            return super().fold(weight, bias)
        moved = self.change(noise=self.training)
        weight = weight + moved[: self.n_weight].view(weight.shape)
        has_bias = self.size > self.n_weight  # one that another delta made is not ours
        return weight, bias + moved[self.n_weight :] if has_bias else bias

    def product(self, x, weight, bias):
        if not self.is_dense:
            return super().product(x, weight, bias)
        return linear(x, partial(self._cast_fold, weight, bias), [self])

    def _cast_fold(self, weight, bias):
        made, made_bias = self.fold(weight.to(self.w.dtype), None if bias is None else bias.to(self.w.dtype))
        # in one layout, as the values at indices are added to the weight: then the same bits come of both
        return made.to(weight.dtype).contiguous(), None if bias is None else made_bias.to(bias.dtype)

    def finished(self, leaf):
        if self.phase == "sparse":
            return super().finished(leaf)
        index, values = self.index, self.values
        if self.is_dense:
            moved = self.change(noise=False)
            index = moved.nonzero().flatten().to(torch.int32)
            values = moved[index]
        return leaf.changed(phase="sparse"), {"index": index, "values": values}
