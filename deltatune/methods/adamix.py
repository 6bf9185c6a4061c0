"""AdaMix: several experts of which each forward draws one, every batch run twice; in the end their mean is one adapter."""

import inspect
import itertools
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.base import own_class
from ..core.calibrate import predicts_next
from ..core.compose import Per
from ..core.inits import kaiming, normal, zeros
from ..core.method import Method, param
from ..core.schedule import Schedule, ride
from ..kernels.lora import low_rank
from .bottleneck import Activation, Sequential
from .lora import LoRA, LowRank

_TOKENS = itertools.count(1)  # which course it is that an adapter is in


class TwoPasses(Schedule):
    """Runs each forward of the training twice: loss + w / 2 (KL(q || p) + KL(p || q)), p and q the two passes' answers.

    The first distribution of each KL takes no gradient; the second pass has no other loss. The answers are the outputs
    called logits: of the rows, or of the tokens that have a label, next tokens where the model predicts those. A regression
    has no distributions, and runs once. The term is in the model's own loss; of a model that gives none it rides on the
    answers, where an fp16 loss scale does not reach it.
    """

    hooks_model = True

    def begin(self, optimizer, n_steps, n_micro=1):
        super().begin(optimizer, n_steps, n_micro)
        self._off()
        self.sites = [d for d in self.adapter.deltas.values() if isinstance(d, Experts)]
        self.weight = self.common(self.sites, "consistency").consistency
        self.n_micro, self.again, self.token = n_micro, False, next(_TOKENS)
        for d in self.sites:
            d.course = self.token
        if self.weight:
            self.handle = self.adapter.model.register_forward_hook(self.twice, with_kwargs=True)

    def end(self):
        self._off()
        for d in self.sites:
            d.course = 0

    def _off(self):
        handle = self.__dict__.pop("handle", None)
        if handle is not None:
            handle.remove()

    def _is_mine(self, model):
        """Is this still the course of the adapter that stands there? A run that broke off leaves its hook behind."""
        record, first = model.__dict__.get("_deltatune"), self.sites[0]
        info = record.infos.get(self.adapter.name) if record is not None else None
        return info is not None and info.switch is first.switch and first.course == self.token

    def twice(self, model, args, kwargs, out):
        """The forward hook of the model."""
        if self.again or not (model.training and torch.is_grad_enabled()):
            return None
        if not self._is_mine(model):
            self._off()
            return None
        if not self.sites[0].switch.on:
            return None
        mine, names = _answers(model, out), list(inspect.signature(type(model).forward).parameters)[1:]
        if not mine:
            return None
        known = dict(zip(names, args, strict=False)) | kwargs
        if "task_ids" in names and known.get("task_ids") is not None:
            raise ValueError(
                f"adamix compares all logits of a row, and those of {own_class(model).__name__} are of several tasks side by "
                f"side; set consistency=0"
            )
        self.again = True
        try:
            other = model(*args, **kwargs)
        finally:
            self.again = False
        theirs = _answers(model, other)
        n_items = known.get("num_items_in_batch")
        term = sum(_apart(model, mine[key], theirs[key], known, n_items) for key in mine)
        if isinstance(out, Tensor):
            return ride(out, term, self.weight / self.n_micro)
        if out.get("loss") is None:
            first = next(iter(mine))
            out[first] = ride(mine[first], term, self.weight / self.n_micro)
        else:
            out["loss"] = out["loss"] + self.weight * term.to(out["loss"].dtype)
        return out


def _answers(model, out):
    """What the model says of a batch, by name: distributions of rows or tokens. Raises ValueError where it says nothing."""
    found = out.items() if hasattr(out, "items") else [("logits", out)] if isinstance(out, Tensor) else []
    found = {k: v for k, v in found if k.endswith("logits") and v is not None}
    if not found:
        raise ValueError(
            f"adamix compares the answers of two passes, and {own_class(model).__name__} gives no logits; train the model "
            f"with its head and return_dict=True, or set consistency=0"
        )
    for key, value in found.items():
        if value.ndim > 3:
            raise ValueError(
                f"adamix compares the answers for rows or tokens, and {own_class(model).__name__} gives {key} of shape "
                f"{tuple(value.shape)}; set consistency=0"
            )
    return {k: v for k, v in found.items() if v.ndim > 1 and v.shape[-1] > 1}


def _apart(model, mine, theirs, known, n_items):
    """1/2 (KL(q || p) + KL(p || q)), the mean over what is asked, or its sum over `n_items`, which a step has in all."""
    if mine.ndim == 3:
        asked = _asked(model, mine, known)
        mine, theirs = (t[:, : asked.shape[1]][asked] for t in (mine, theirs))
    p, q = (F.log_softmax(t.float(), -1) for t in (mine, theirs))
    both = F.kl_div(p, q.detach(), reduction="sum", log_target=True)
    both = both + F.kl_div(q, p.detach(), reduction="sum", log_target=True)
    return 0.5 * both / (max(len(p), 1) if n_items is None else n_items)


def _asked(model, logits, known):
    """(B, T or T - 1), the tokens whose answers have a label; without labels of tokens, the real ones."""
    labels, shape = known.get("labels"), logits.shape[:2]
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        return (labels[:, 1:] if predicts_next(model) else labels) != -100
    for key in ("decoder_attention_mask", "attention_mask"):
        mask = known.get(key)
        if isinstance(mask, Tensor) and mask.shape == shape:
            return mask != 0
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def alike(init):
    """Every expert starts as the same draw."""

    def start(shape, **more):
        return init(shape[1:], **more).expand(shape)

    return start


class Experts(Method):
    """The common part: tensors with an expert's number in front, one of them drawn for a forward, or their mean.

    Draws come from torch's generator, as dropout's do: one for all rows of a forward, for each site and for both halves of an
    adapter apart, again the same where a checkpoint computes a block anew. Only while the schedule runs and in training.
    """

    paper = "2205.12410"
    category = "unified"
    kinds = frozenset({"linear"})
    schedule = TwoPasses
    halves: ClassVar[dict[str, tuple[str, ...]]] = {}  # which tensors are drawn together
    plain: ClassVar[type[Method]]  # what the mean of the experts is
    course: ClassVar[int] = 0  # which run of its schedule it is in; 0: none
    n_experts: int = 4  # experts
    share: Literal["up", "down", "none"] = "up"  # the half that all experts have in common
    consistency: float = 1.0  # w, weight of the two passes' agreement; 0: one pass

    @classmethod
    def configure(cls, **hyper):
        config = super().configure(**hyper)
        if config.consistency < 0:
            raise ValueError(f"{cls.name}: consistency = {config.consistency}, but it must be at least 0")
        return config

    @classmethod
    def slots_of(cls, config):
        common = cls.halves.get(config.share, ())
        slots = super().slots_of(config)
        return {k: replace(s, shape=s.shape.replace("n_experts", "1")) if k in common else s for k, s in slots.items()}

    def half(self, name):
        """The tensors of one half, in their own dtype."""
        own = [getattr(self.exact, key) for key in self.halves[name]]
        if self.course and self.training:
            drawn = torch.randint(len(own[0]), (1,), device=own[0].device)
            return [t.index_select(0, drawn)[0] for t in own]
        return [t.mean(0) for t in own]

    def finished(self, leaf):
        known, where = self.plain.Config.__dataclass_fields__, leaf.where

        def kept(values):
            return {k: v for k, v in values.items() if k in known}

        if isinstance(where, Per):
            where = Per(tuple((place, tuple(kept(dict(own)).items())) for place, own in where.each))
        config = self.plain.configure(**kept(vars(leaf.config)))
        leaf = replace(leaf, method=self.plain, config=config, where=self.where if where is None else where)
        return leaf, {key: getattr(self, key).mean(0) for key in self.slots_of(self.config)}


class AdaMix(Experts, Sequential, name="adamix"):
    """y' = y + U_j f(D_i y + c_i) + e_j behind the MLP, expert i and j drawn for each forward of the training, then their mean.

    The U_j are one by default, as in the paper's scripts. Each batch runs twice, and the loss asks that the passes agree. The
    file holds one adapter, `sequential`.
    """

    where = "mlp.down"
    exceptions = {"identity": "the paper's code starts near the identity, U and D at N(0, 0.02^2), not at it"}
    around_kinds = frozenset()
    lr = (3e-4, 5e-3)
    halves = {"down": ("down", "down_bias"), "up": ("up", "up_bias")}
    plain = Sequential
    r: int = 16  # bottleneck width
    f: Activation = "gelu"  # activation between the two matrices
    down: Tensor = param("n_experts r d_out", normal(0.02))
    down_bias: Tensor = param("n_experts r")
    up: Tensor = param("n_experts d_out r", normal(0.02))
    up_bias: Tensor = param("n_experts d_out")

    def mlp(self, h, dropout=0.0):
        down, c, up, e = (t.to(h.dtype) for t in (*self.half("down"), *self.half("up")))
        return F.linear(getattr(F, self.f)(F.linear(h, down, c)), up, e)


class AdaMixLoRA(Experts, LowRank, name="adamix_lora"):
    """W' = W + (alpha / r) B_j A_i, expert i and j drawn for each forward of the training, then their mean; B = 0 at the start.

    The B_j are one by default, and the A_i start as one, as in the paper's code. Each batch runs twice, and the loss asks
    that the passes agree. The file holds one `lora`, and a merge is that of the mean. The weight of 100 is that of the paper's
    code for generation, at a learning rate of 2e-4; beside it a rate of 1e-2, LoRA's own, trains little but the agreement.
    """

    where = "q,v"
    lr = (2e-4, 5e-3)
    halves = {"down": ("a",), "up": ("b",)}
    plain = LoRA
    n_experts: int = 8  # experts
    r: int = 4  # rank
    alpha: float = 32.0  # scale of the update, divided by r^power
    consistency: float = 100.0  # w, weight of the two passes' agreement; 0: one pass
    a: Tensor = param("n_experts r d_in", alike(kaiming))
    b: Tensor = param("n_experts d_out r", zeros)

    def fold(self, weight, bias):
        if self.course and self.training and torch.is_grad_enabled():
            raise ValueError(
                f"{self.site.name}: {self.name} draws an expert for the activations, but what stands around it here works on "
                f"the weight; attach the other at other sites"
            )
        return weight + self.scale * (self.b.mean(0) @ self.a.mean(0)), bias

    def post(self, y, x):
        (a,), (b,) = self.half("down"), self.half("up")
        h = F.linear(F.dropout(x, self.dropout, self.training), a.to(y.dtype))
        return y + self.scale * F.linear(h, b.to(y.dtype))

    def linear(self, x, base):
        (a,), (b,) = self.half("down"), self.half("up")
        dropped = F.dropout(x, self.dropout, self.training)
        return low_rank(base, x, dropped, a.to(x.dtype), b.to(x.dtype), self.scale)
