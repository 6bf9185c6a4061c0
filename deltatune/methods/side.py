"""Networks beside the backbone: they read what its blocks give, and no gradient goes into the backbone."""

from functools import partial
from types import FunctionType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import shapes
from ..core.base import Base, quantised, stored, take_rows, transposed
from ..core.calibrate import gradients
from ..core.inits import kaiming, normal, ones, zeros
from ..core.method import Method, bank, param
from ..core.schedule import Schedule
from ..core.sharded import assign
from ..core.site import all_sites, expanded


class Side(Method):
    """What the two have in common: one delta a block, the last of which puts its own in place of the block's output.

    Each block's output is read detached, so that autograd keeps nothing of the backbone.
    """

    category = "additive"
    where = "block"
    kinds = frozenset({"block"})
    reads_call = True
    exceptions = {
        "identity": "the last block's output is replaced by the method's own, from the start",
        "checkpointing": "nothing of the backbone is kept for the backward, so there is nothing to recompute: it is refused",
    }

    @property
    def is_end(self):
        """Is this the last block of its stack?"""
        return self.site.layer == self.site.n_layers - 1

    @property
    def seals(self):
        return self.is_end and self.site.stack != "encoder"  # whose output stays the backbone's

    @classmethod
    def numbers(cls, config, sites):
        """None; raises ValueError where what is read of a stack would be given out nowhere."""
        ends = {s.stack for s in sites if s.layer == s.n_layers - 1 and s.stack != "encoder"}
        lost = [s for s in sites if s.stack not in ends and not (s.stack == "encoder" and "decoder" in ends)]
        if lost:
            last = "the decoder's last block" if lost[0].stack == "encoder" else "the last block of the stack"
            raise ValueError(
                f"{lost[0].name}: what {cls.name} reads here would reach no output, since it does not stand at {last}, which "
                f"gives it out; see layers and where"
            )
        return super().numbers(config, sites)

    def key(self, what):
        """Under which name one adapter's leaf leaves something for a later block."""
        return f"deltatune_{id(self.switch)}.{self.path}.{what}"

    def refuse_recomputation(self):
        """Raise ValueError in a block that gradient checkpointing runs again, where what the blocks before it left is gone."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{self.site.name}: {self.name} keeps no activations of the backbone, so gradient checkpointing has nothing to "
                f"save, and a block that is run again misses what the blocks before it left; turn checkpointing off"
            )


class AttentionFusion(Side, name="attention_fusion"):
    """o = sum_j softmax_j(q . h_j) h_j, of each token's states h_0 (the embedded input) to h_L, in place of h_L.

    One vector q for all layers and tokens, 0 at the start (the mean of the states); in an encoder-decoder over the decoder.
    """

    paper = "Findings of NAACL 2022, 64"
    lr = (1e-3, 1e-1)
    query: Tensor = bank("d_in", zeros, train=True, by="stack")

    @classmethod
    def fits(cls, config, site):
        return site.stack != "encoder"

    def post(self, y, x):
        self.refuse_recomputation()
        stash, key = self.frame.stash, self.key(self.site.stack)
        states = (*stash.pop(key, (x.detach(),)), y.detach())
        if not self.is_end:
            stash[key] = states
            return y
        h = torch.stack(states, -2)
        return ((h @ self.query).softmax(-1)[..., None, :] @ h).squeeze(-2)


def anatomy(block):
    """(role -> part, its norms in order) of one block, each as `Base` sees it; fused projections in their parts."""
    holder = nn.Module()
    holder.layers = nn.ModuleList([block])
    parts, norms = {}, []
    table = expanded(all_sites(holder))
    for site in table:
        if not site.module.startswith("layers.0."):
            continue
        part = Base(holder.get_submodule(site.module), site)
        if site.kind == "attention":
            parts.setdefault(f"{site.role} itself", part)
        elif site.kind in ("linear", "experts"):
            parts.setdefault(site.role, part)
        elif site.kind == "norm" and site.role == "norm" and site.d_out == table[0].d_out:
            norms.append(part)
    return parts, norms


def activation(block):
    """What the block's MLP applies; GELU where no name says it."""
    names = ("act", "act_fn", "activation_fn", "intermediate_act_fn", "activation")
    found = (getattr(m, n, None) for key, m in block.named_modules() for n in names if "deltas" not in key)
    return next((f for f in found if callable(f)), F.gelu)


def largest(importance, n):
    """The `n` rows of the largest sum of magnitudes, in order."""
    return importance.abs().flatten(1).sum(1).topk(n).indices.sort().values


class Pruned(Schedule):
    """Side blocks that start as the backbone's own, cut down to the rows and columns of the largest Fisher information."""

    @property
    def needs_data(self):
        """Is there a side network that starts from data and has not been trained? Its gates are 0 until then."""
        return any(d.weights == "fisher" for d in self.deltas()) and not any(
            bool(d.alpha.any()) for d in self.deltas() if d.alpha is not None
        )

    def deltas(self):
        """The side network's deltas."""
        return [d for d in self.adapter.deltas.values() if isinstance(d, LST)]

    def calibrate(self, batches, loss):
        """Squared gradients of the bare model (the paper's have one row a batch), then the cuts.

        This takes the memory of full fine-tuning's backward, once.
        """
        if not self.needs_data:
            raise ValueError(
                f"adapter {self.adapter.name!r}: lst needs no calibration data: weights='random', or it has been trained"
            )
        model, table = self.adapter.model, all_sites(self.adapter.model)
        blocks = [(site, *anatomy(model.get_submodule(site.module))) for site in table if site.kind == "block"]
        embed = next((s for s in table if s.role == "embed" and blocks[0][0].d_in in (s.d_in, s.d_out)), None)
        widths = sorted({site.d_in for site, *_ in blocks})
        if embed is None or len(widths) > 1:
            what = "no input embedding" if embed is None else f"stacks of the widths {widths}"
            raise ValueError(f"adapter {self.adapter.name!r}: lst finds {what}; use weights='random'")
        parts = [p for _, own, _ in blocks for p in own.values() if p.site.kind == "linear"]
        parts.append(Base(model.get_submodule(embed.module), embed))
        for part in parts:
            if quantised(part.module, part.site):
                raise ValueError(
                    f"{part.site.name}: lst: its weight is quantised and has no gradient; use weights='random'"
                )
        wanted = {id(stored(p.module, p.site)) for p in parts}
        weights = {n: p for n, p in model.named_parameters() if id(p) in wanted}
        with self.adapter.disabled():
            found = gradients(model, weights, batches, loss)
        fisher = Fisher({id(weights[n]): f for n, f in found.items()})
        for path in {d.path for d in self.deltas()}:
            here = {d.site.module: d for d in self.deltas() if d.path == path}
            r = next(iter(here.values())).r
            rows = fisher(parts[-1]) if embed.kind == "conv2d" else fisher(parts[-1]).mT
            keep = largest(rows, blocks[0][0].d_in // r)
            for site, own, norms in blocks:
                keep = Cut(here.get(site.module), own, norms, fisher, r)(keep)
                behind = table[table.index(site) :]
                tail = next(
                    (s for s in behind if s.kind == "norm" and s.layer is None and s.stack in ("", site.stack)), None
                )
                if site.module in here and here[site.module].is_end and tail is not None:
                    put_norm(here[site.module], "last", Base(model.get_submodule(tail.module), tail), keep)
        self.adapter.calibrated = {"kept": keep}


class Fisher:
    """The Fisher information of a part's (O, I) weight, in fp64: products of three leave fp32's range."""

    def __init__(self, found):
        self.found = found

    def __call__(self, part):
        f = self.found[id(stored(part.module, part.site))].double()
        f = f.mT if transposed(part.module, part.site.param) else f.flatten(1)
        return take_rows(f, part.site) if part.site.rows else f


@torch.no_grad()
def put_norm(delta, which, norm, keep):
    """A norm's scale and shift at the kept places, read off what it does to 1 and -1 (some scale by 1 + w)."""
    weight = getattr(delta, f"norm_{which}")
    if weight is None:
        return
    ends = 1 - 2 * (torch.arange(norm.site.d_out, device=norm.weight.device) % 2).to(norm.weight.dtype)
    up, down = (norm.module(ends.to(stored(norm.module, norm.site).dtype) * sign).float() for sign in (1, -1))
    assign(weight, ((up - down) / 2 * ends)[keep])
    bias = getattr(delta, f"norm_{which}_bias")
    if bias is not None:
        assign(bias, ((up + down) / 2)[keep])


class Cut:
    """One block of the backbone cut down by `r`, into its side block where it has one: LST's code, without the residual.

    Each matrix keeps the columns that the one before it kept as rows, and of its own rows the most important; queries, keys
    and values the same ones, by the product of their importances, heads apart or not. So do gate and up.
    """

    def __init__(self, delta, parts, norms, fisher, r):
        self.delta, self.parts, self.fisher, self.r = delta, parts, fisher, r
        self.norms = dict(zip(names_of(parts), norms, strict=False)) if len(norms) == len(names_of(parts)) else {}

    def __call__(self, keep):
        for which in names_of(self.parts):
            before = keep
            keep = self.mlp(keep) if which == "mlp" else self.attention(which, keep)
            if self.delta is not None and which in self.norms:
                put_norm(self.delta, which, self.norms[which], keep if self.delta.ends_with_norm else before)
        return keep

    def attention(self, which, keep):
        q, k, v, o = (self.parts[f"{which}.{role}"] for role in "qkvo")
        core = self.parts[f"{which} itself"].site
        fq, fk, fv = (self.fisher(part)[:, keep] for part in (q, k, v))
        shape = (core.n_kv_heads, -1, core.d_head, len(keep))  # queries that share keys and values keep the same places
        scores = (fq.view(shape) * (fk * fv).view(shape)).sum((1, 3)).flatten()
        kv = largest(scores[:, None], len(scores) // self.r)
        head, place = (kv // core.d_head).view(core.n_kv_heads, 1, -1), (kv % core.d_head).view(core.n_kv_heads, 1, -1)
        n_rep = q.site.d_out // k.site.d_out
        rows = ((head * n_rep + torch.arange(n_rep, device=kv.device)[:, None]) * core.d_head + place).flatten()
        out = largest(self.fisher(o)[:, rows], o.site.d_out // self.r)
        name = "" if which == "attn" else "cross_"
        for role, part, at in (("q", q, rows), ("k", k, kv), ("v", v, kv)):
            self.put(f"{name}{role}", part, at, keep)
        self.put(f"{name}o", o, out, rows)
        return out

    def mlp(self, keep):
        ins = {key: self.parts[f"mlp.{key}"] for key in ("gate", "up") if f"mlp.{key}" in self.parts}
        down = self.parts["mlp.down"]
        if down.site.kind != "linear" or not ins:  # experts: the side block has one MLP, of one's size
            return keep
        scores = torch.stack([self.fisher(part)[:, keep] for part in ins.values()]).prod(0)
        rows = largest(scores, len(scores) // self.r)
        out = largest(self.fisher(down)[:, rows], down.site.d_out // self.r)
        for key, part in ins.items():
            self.put(key, part, rows, keep)
        self.put("down", down, out, rows)
        return out

    @torch.no_grad()
    def put(self, name, part, rows, columns):
        weight = None if self.delta is None else getattr(self.delta, name)
        if weight is None:
            return
        assign(weight, part.weight[rows][:, columns])
        bias = getattr(self.delta, f"{name}_bias", None)
        if bias is not None:
            assign(bias, part.bias[rows])


def names_of(parts):
    """A block's sub-layers, in order."""
    return [n for n in ("attn", "cross") if f"{n}.q" in parts] + ["mlp"]


class Held:
    """A delta seen with copies of its tensors."""

    def __init__(self, delta):
        self.delta = delta

    def __getattr__(self, name):
        function = getattr(type(self.delta), name, None)
        if isinstance(function, FunctionType):
            return partial(function, self)
        value = getattr(self.delta, name)
        return value.clone() if isinstance(value, Tensor) else value


class LST(Side, name="lst"):
    """s <- S_i(m_i s + (1 - m_i) D_i h_i), m_i = sigmoid(alpha_i / T); s_0 = D_0 h_0, and U norm(s) in place of h_L.

    h_i is block i's output, h_0 the embedded input. S_i is a block like the backbone's, every width divided by r, with as many
    heads: its norms in the same places, its activation (GELU where no name says it), a gate where it has one. It has no
    positions of its own: h_i carry them. In an encoder-decoder each side has its network: the decoder's attends to the states
    that the encoder's ends with, and the encoder's output stays the backbone's. Blocks of `drop` leave s as it is.
    """

    paper = "2206.06522"
    lr = (3e-4, 1e-2)
    limits = {"r": "d_in"}
    schedule = Pruned
    r: int = 8  # what the backbone's widths are divided by
    drop: tuple[int, ...] = ()  # blocks without a side block
    weights: Literal["fisher", "random"] = "fisher"  # side blocks start as the backbone's, pruned on data, or at random
    temperature: float = 0.1  # of the gates, T
    dropout: float = 0.1  # in the side network, while training
    first: Tensor = param("is_first*width d_in", normal(0.01))
    first_bias: Tensor = param("is_first*width")
    alpha: Tensor = param("is_on")
    ladder: Tensor = param("is_on*width d_in", normal(0.01))
    ladder_bias: Tensor = param("is_on*width")
    norm_attn: Tensor = param("is_on*width", ones)
    norm_attn_bias: Tensor = param("is_on*width*has_norm_bias")
    q: Tensor = param("is_on*d_q width", kaiming)
    q_bias: Tensor = param("is_on*d_q*has_q_bias")
    k: Tensor = param("is_on*d_kv width", kaiming)  # a key's bias moves no softmax
    v: Tensor = param("is_on*d_kv width", kaiming)
    v_bias: Tensor = param("is_on*d_kv*has_q_bias")
    o: Tensor = param("is_on*width d_q", kaiming)
    o_bias: Tensor = param("is_on*width*has_o_bias")
    norm_cross: Tensor = param("has_cross*width", ones)
    norm_cross_bias: Tensor = param("has_cross*width*has_norm_bias")
    cross_q: Tensor = param("has_cross*d_q width", kaiming)
    cross_q_bias: Tensor = param("has_cross*d_q*has_q_bias")
    cross_k: Tensor = param("has_cross*d_kv width", kaiming)
    cross_v: Tensor = param("has_cross*d_kv width", kaiming)
    cross_v_bias: Tensor = param("has_cross*d_kv*has_q_bias")
    cross_o: Tensor = param("has_cross*width d_q", kaiming)
    cross_o_bias: Tensor = param("has_cross*width*has_o_bias")
    norm_mlp: Tensor = param("is_on*width", ones)
    norm_mlp_bias: Tensor = param("is_on*width*has_norm_bias")
    up: Tensor = param("is_on*inner width", kaiming)
    up_bias: Tensor = param("is_on*inner*has_up_bias")
    gate: Tensor = param("has_gate*inner width", kaiming)
    gate_bias: Tensor = param("has_gate*inner*has_up_bias")
    down: Tensor = param("is_on*width inner", kaiming)
    down_bias: Tensor = param("is_on*width*has_down_bias")
    norm_last: Tensor = param("is_last*width", ones)
    norm_last_bias: Tensor = param("is_last*width*has_norm_bias")
    lift: Tensor = param("d_out is_lifted*width", normal(0.01))
    lift_bias: Tensor = param("is_lifted*d_out")

    @classmethod
    def fits(cls, config, site):
        dropped = {i % site.n_layers for i in config.drop if -site.n_layers <= i < site.n_layers}
        return site.layer not in dropped or site.layer in (0, site.n_layers - 1)  # D_0 and U have to stand somewhere

    def build(self, base, dtype):
        """Those of the declared tensors that this block needs; the others are None."""
        self.__dict__["act"] = activation(base.module)  # no child: it is the backbone's
        self.sizes = self.measure(base.module)
        dims = self.dims(base)
        self.check_limits(dims)
        for name in ("d_in", "d_head", "inner_of_base"):
            if dims[name] % self.r:
                what = {"d_in": "model's width", "d_head": "width of a head", "inner_of_base": "MLP's width"}[name]
                raise ValueError(f"r = {self.r} does not divide the {what} {dims[name]}")
        for key, slot in self.slots.items():
            shape = tuple(int(d.evaluate(dims)) for d in shapes.parse(slot.shape))
            value = None if 0 in shape else nn.Parameter(slot.init(shape, base=base, delta=self).to(dtype))
            self.register_parameter(key, value)

    def measure(self, block):
        """The names in the shapes above, and what else the side block takes over: its norms, where they stand, its scale."""
        site, n = self.site, self.site.n_layers
        parts, norms = anatomy(block)
        needed = [f"attn.{role}" for role in "qkvo"] + ["attn itself", "mlp.down"]
        if site.stack == "decoder" and any(role.startswith("cross.") for role in parts):
            needed += [f"cross.{role}" for role in "qkvo"]
        missing = [role for role in needed if role not in parts]
        if missing or not norms:
            raise ValueError(f"a side block is a small copy of the block, which has no {', '.join(missing) or 'norm'}")
        if wrong := [i for i in self.drop if not -n <= i < n]:
            raise ValueError(f"drop names layer {wrong[0]}, but the stack has {n} layers")
        if site.is_causal is None:
            raise ValueError("its attention does not say whether a token sees later ones (is_causal)")
        on = site.layer not in {i % n for i in self.drop}
        q, o, down, core = (parts[role].site for role in ("attn.q", "attn.o", "mlp.down", "attn itself"))
        ups = [parts[f"mlp.{key}"].site for key in ("up", "gate_up") if f"mlp.{key}" in parts]
        norm, r = norms[0].module, max(self.r, 1)
        self.n_heads, self.n_kv_heads = q.d_out // core.d_head, core.n_kv_heads
        scale = getattr(parts["attn itself"].module, "scaling", None)
        is_own = isinstance(scale, float) and abs(scale - core.d_head**-0.5) > 1e-6  # T5's is 1, whatever the width
        self.scale = scale if is_own else (max(core.d_head // r, 1)) ** -0.5
        self.ends_with_norm = any(part.site.is_last for part in norms)
        self.is_rms = not isinstance(norm, nn.LayerNorm) and not norms[0].site.bias
        self.eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 1e-6)
        return {
            "width": site.d_in // r, "d_head": core.d_head, "inner": down.d_in // r, "inner_of_base": down.d_in,
            "d_q": q.d_out // r, "d_kv": core.n_kv_heads * core.d_head // r, "is_on": int(on),
            "is_first": int(site.layer == 0), "is_last": int(self.is_end),
            "is_lifted": int(self.is_end and site.stack != "encoder"), "has_cross": int(on and "cross.q" in needed),
            "has_gate": int(on and bool({"mlp.gate", "mlp.gate_up"} & parts.keys())), "has_norm_bias": int(norms[0].site.bias),
            "has_q_bias": int(q.bias), "has_o_bias": int(o.bias), "has_up_bias": int(any(up.bias for up in ups)),
            "has_down_bias": int(down.bias),
        }  # fmt: skip

    def dims(self, base):
        return super().dims(base) | self.sizes

    def post(self, y, x):
        self.refuse_recomputation()
        self = self.held()
        stash, key = self.frame.stash, self.key(self.site.stack)
        s = stash.pop(key, None)
        if self.first is not None:
            s = F.linear(x.detach(), self.first, self.first_bias)
        if self.alpha is not None:
            mu, new = torch.sigmoid(self.alpha / self.temperature), F.linear(y.detach(), self.ladder, self.ladder_bias)
            s = self.block((1 - mu) * new + (0 if s is None else mu * s))
        if s is None:
            raise ValueError(f"{self.site.name}: lst: no side block runs in front of it; see layers and drop")
        if self.is_end:
            s = self.drop_some(self.normed(s, "last"))
        if self.lift is not None:
            return F.linear(s, self.lift, self.lift_bias)
        stash[self.key("end") if self.is_end else key] = s
        return y

    def held(self):
        """This delta where nothing is sharded, else one whose tensors are copies.

        FSDP2 frees what it gathered for a block, and gathers it for the backward only where the block's output has a
        gradient, which these have not.
        """
        is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        return Held(self) if is_shared and isinstance(self, LST) else self  # one that is cast is copied already

    def block(self, s):
        """S_i (B, T, D/r)."""
        s = self.added(s, "attn", self.attend)
        if self.cross_q is not None:
            s = self.added(s, "cross", self.look)
        return self.added(s, "mlp", self.mlp)

    def added(self, s, which, sublayer):
        """s + f(norm(s)), or norm(s + f(s)) where the backbone's norms stand behind."""
        if self.ends_with_norm:
            return self.normed(s + self.drop_some(sublayer(s)), which)
        return s + self.drop_some(sublayer(self.normed(s, which)))

    def normed(self, s, which):
        weight, bias = getattr(self, f"norm_{which}"), getattr(self, f"norm_{which}_bias")
        if self.is_rms:
            return F.rms_norm(s, s.shape[-1:], weight, self.eps)
        return F.layer_norm(s, s.shape[-1:], weight, bias, self.eps)

    def drop_some(self, s):
        return F.dropout(s, self.dropout, self.training)

    def mlp(self, s):
        h = F.linear(s, self.up, self.up_bias)
        h = self.act(h) if self.gate is None else self.act(F.linear(s, self.gate, self.gate_bias)) * h
        return F.linear(self.drop_some(h), self.down, self.down_bias)

    def attend(self, s):
        k, v = self.heads(F.linear(s, self.k)), self.heads(F.linear(s, self.v, self.v_bias))
        if self.site.is_causal:
            k, v = self.call.keep(self.site, self.key(self.site.name), k, v)
        mask = self.seen(s.shape[1], k.shape[2], self.site.stack, self.site.is_causal, s.device)
        return self.attention(F.linear(s, self.q, self.q_bias), k, v, mask, self.o, self.o_bias)

    def look(self, s):
        """What the decoder's side block reads of the encoder's side states."""
        states = self.frame.stash.get(self.key("end"))
        if states is None:
            raise ValueError(
                f"{self.site.name}: lst: the encoder's side states are not here; attach it to the encoder too, and give "
                f"encoder_outputs as the attached model's encoder made them"
            )
        k = self.heads(F.linear(states, self.cross_k))
        v = self.heads(F.linear(states, self.cross_v, self.cross_v_bias))
        mask = self.seen(s.shape[1], k.shape[2], "encoder", False, s.device)
        return self.attention(F.linear(s, self.cross_q, self.cross_q_bias), k, v, mask, self.cross_o, self.cross_o_bias)

    def heads(self, t):
        """(B, T, H D) -> (B, H, T, D), of keys and values."""
        return t.unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)

    def attention(self, q, k, v, mask, o, o_bias):
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, scale=self.scale)
        return F.linear(a.transpose(1, 2).flatten(2), o, o_bias)

    def seen(self, n_queries, n_keys, stack, is_causal, device):
        """(B or 1, 1, Q or 1, K), which keys a token sees; soft tokens in front are real. None: all see all.

        No row of it is empty, which would be a softmax over nothing: padding sees itself, or all other padding.
        """
        mask = self.call.mask(stack)
        if mask is not None and (mask.ndim != 2 or mask.shape[1] > n_keys):
            raise ValueError(
                f"{self.site.name}: lst attends under a (B, T) mask of at most {n_keys} tokens, and this call has one of shape "
                f"{tuple(mask.shape)}"
            )
        if mask is None and not (is_causal and n_queries > 1):
            return None
        real = None if mask is None else F.pad(mask != 0, (n_keys - mask.shape[1], 0), value=True)[:, None, None]
        if not is_causal:
            return real | ~real.any(-1, keepdim=True)
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
        last = n_keys - n_queries  # the key that is the first query's own
        own = seen.tril(last).triu(last)
        seen = seen.tril(last)[None, None]
        return seen if real is None else seen & real | own
