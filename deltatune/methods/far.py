"""Nodes of the MLPs, chosen in the first steps: rows of what widens and columns of what narrows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.method import Method, fixed, param
from ..core.ragged import refill
from ..core.schedule import Schedule


class Priming(Schedule):
    """Trains all nodes, then keeps of each MLP those that moved farthest, and trains these alone.

    A node's distance is the L1 norm of what changed in its rows, its biases and its column. The kept ones go on from where
    they are, with their moments; the others return to the base. An adapter that brings its nodes along, as a file does,
    trains on with them.
    """

    resizes = True

    def __init__(self, adapter):
        super().__init__(adapter)
        self.done = 0

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self.optimizer = optimizer
        self.mlps = {}
        for (path, _), d in self.adapter.deltas.items():
            if isinstance(d, FAR):
                self.mlps.setdefault((path, d.site.stack, d.site.layer), []).append(d)
        deltas = [d for group in self.mlps.values() for d in group]
        prime = self.common(deltas, "prime").prime
        for group in self.mlps.values():
            self.common(group, "keep")
            sites = [d.site for d in group]
            if len({d.n_nodes for d in group}) > 1 or len({s.role for s in sites}) < len(sites):
                names = ", ".join(s.name for s in sites)
                raise ValueError(f"far: {names} lie in one block and are no one MLP, whose nodes they would share")
        self.prime = max(1, int(prime * n_steps)) if 0 < prime < 1 else int(prime)
        if any(len(d.nodes) < d.n_nodes for d in deltas):  # they are chosen
            self.prime = None
        elif self.prime >= n_steps > 1:
            raise ValueError(f"far: prime = {self.prime} steps leave none of {n_steps} to train what is kept")
        elif self.done == self.prime == 0:
            self._choose()

    @torch.no_grad()
    def after_step(self, step):
        self.done = step + 1
        if self.done == self.prime:
            self._choose()

    @torch.no_grad()
    def _choose(self):
        for group in self.mlps.values():
            moved = torch.stack([d.distance().cpu() for d in group]).sum(0)
            k = max(1, round(group[0].keep * len(moved)))
            kept = moved.argsort(descending=True, stable=True)[:k].sort().values
            for d in group:
                self._cut(d, kept.to(d.w.device))

    def _cut(self, d, kept):
        """Leave the nodes `kept` of one matrix."""
        n = len(d.nodes)
        for p in d.parameters():
            state = self.optimizer.state.get(p, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[name] = value.unflatten(0, (n, -1))[kept].flatten(0, 1)
        for key, p in list(d.named_parameters()):
            refill(d, key, p.unflatten(0, (n, -1))[kept].flatten(0, 1))
        refill(d, "nodes", d.nodes[kept])

    def state_dict(self):
        return super().state_dict() | {"done": self.done}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.done = state["done"]


def every(shape, **_):
    """0, 1, 2, ..."""
    return torch.arange(shape[0], dtype=torch.int32)


class FAR(Method, name="far"):
    """W'[N] = W[N] + V and b'[N] = b[N] + d for the nodes N of an MLP in what widens, W'[:, N] = W[:, N] + V^T in what narrows.

    N is all nodes for a short priming, then the share of each MLP that moved farthest: small dense matrices, whose moments
    and kept inputs shrink with the share. The narrowing matrix' bias belongs to no node and stays.
    """

    paper = "2205.01541"
    category = "partial"
    where = "mlp"
    kinds = frozenset({"linear"})
    ragged = frozenset({"nodes", "w", "d"})
    lr = (5e-5, 2e-3)
    schedule = Priming
    keep: float = 0.1  # share of each MLP's nodes that is kept
    prime: float = 0.1  # steps that train all nodes, to choose by; below 1 a share of all
    nodes: Tensor = fixed("n_kept", every)
    w: Tensor = param("n_kept*parts width")
    d: Tensor = param("n_kept*parts")

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if not 0 < config.keep <= 1:
            raise ValueError(f"{cls.name}: keep = {config.keep}, but a share lies above 0 and not above 1")
        if config.prime < 0:
            raise ValueError(f"{cls.name}: prime = {config.prime}, but it must be at least 0")
        return config

    @classmethod
    def fits(cls, config, site):
        return site.role in ("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down")

    def build(self, base, dtype):
        self.narrows = self.site.role == "mlp.down"
        self.parts = 2 if self.site.role == "mlp.gate_up" else 1  # one above the other, a node has a row in each
        self.n_nodes = self.site.d_in if self.narrows else self.site.d_out // self.parts
        super().build(base, dtype)
        if self.narrows or not self.site.bias:
            del self.d

    def dims(self, base):
        there = self._buffers.get("nodes")
        n = self.n_nodes if there is None else len(there)
        width = self.site.d_out if self.narrows else self.site.d_in
        n_bias = 0 if self.narrows or not self.site.bias else n * self.parts
        return super().dims(base) | {"n_kept": n, "parts": self.parts, "width": width, "n_bias": n_bias}

    @classmethod
    def count(cls):
        return "n_kept*parts*width + n_bias"

    def check_ragged(self, tensors):
        nodes, w = tensors["nodes"], tensors["w"]
        rows = len(nodes) * self.parts
        width = self.site.d_out if self.narrows else self.site.d_in
        biases = tensors.get("d", w[:, 0] if w.ndim == 2 else w)
        if nodes.dtype != torch.int32 or nodes.ndim != 1 or w.shape != (rows, width) or biases.shape != (rows,):
            raise ValueError(
                f"nodes {tuple(nodes.shape)}, w {tuple(w.shape)} and d {tuple(biases.shape)} are no nodes of width {width}"
            )
        if not len(nodes) or nodes[0] < 0 or nodes[-1] >= self.n_nodes or bool((nodes.diff() <= 0).any()):
            raise ValueError(f"nodes must ascend within the {self.n_nodes} of the MLP")

    def rows(self):
        """The output rows of the nodes, a node's beside each other."""
        return self.nodes if self.parts == 1 else torch.stack([self.nodes, self.nodes + self.n_nodes], 1).flatten()

    def distance(self):
        """How far each node has moved, (N)."""
        n = len(self.nodes)
        return sum(p.abs().reshape(n, -1).sum(1) for p in self.parameters())

    def fold(self, weight, bias):
        if self.narrows:
            return weight.index_add(1, self.nodes, self.w.t()), bias
        rows = self.rows()
        bias = bias.index_add(0, rows, self.d) if "d" in self._parameters else bias
        return weight.index_add(0, rows, self.w), bias

    def post(self, y, x):
        if self.narrows:
            return y + F.linear(x.index_select(-1, self.nodes), self.w.t())
        moved = F.linear(x, self.w, self.d if "d" in self._parameters else None)
        return y.index_add(-1, self.rows(), moved.to(y.dtype))  # under autocast the layer's own may be fp32
