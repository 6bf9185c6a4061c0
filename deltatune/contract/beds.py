"""The beds: one small model per kind of site, at most 32 x 48, with the roles and spans that real backbones have.

The local ones are a pre-norm transformer block of plain modules; learned keys, values and tokens enter through
transformers, so their beds are a Llama (rotary, grouped heads, causal) and a BERT (learned positions) of width 32.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.groups import GroupLinear
from ..core.method import Method
from ..core.site import Site, sites

WIDTH, WIDE, N_HEADS, VOCAB, N_CLASSES = 32, 48, 4, 40, 5
LENGTH = 6  # tokens of a row
WEIGHTS = ("linear", "conv2d", "embedding", "norm", "experts")


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (I, O), as transformers' GPT-2 has it."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.empty(d_in, d_out).normal_(std=d_in**-0.5))
        self.bias = nn.Parameter(torch.empty(d_out).normal_(std=0.1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """All experts' gated MLPs in two tensors, as MixtralExperts has them; every token takes every expert."""

    def __init__(self, n_experts: int = 2) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, WIDE, WIDTH).normal_(std=WIDTH**-0.5))
        self.down_proj = nn.Parameter(torch.empty(n_experts, WIDTH, WIDE // 2).normal_(std=(WIDE // 2) ** -0.5))

    def forward(self, hidden_states: Tensor, weights: Tensor) -> Tensor:
        """(B, T, D), (B, T, E) -> (B, T, D)"""
        gate, up = torch.einsum("btd,eod->beto", hidden_states, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("beto,edo,bte->btd", F.silu(gate) * up, self.down_proj, weights)


class Sparse(nn.Module):
    """A router and its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.experts(x, self.gate(x).softmax(-1))


class MLP(nn.Module):
    """down(relu(up(x)))"""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.up_proj, self.down_proj = linear(WIDTH, WIDE), linear(WIDE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down_proj(F.relu(self.up_proj(x)))


class Attention(nn.Module):
    """Attention over real tokens, without positions; its projections are apart or fused."""

    is_causal = False

    def __init__(self, linear: Callable[[int, int], nn.Module], fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = N_HEADS, WIDTH // N_HEADS
        if fused:
            self.qkv_proj = linear(WIDTH, 3 * WIDTH)
        else:
            self.q_proj, self.k_proj, self.v_proj = (linear(WIDTH, WIDTH) for _ in range(3))
        self.o_proj = linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), the keys and values of `memory` (B, S, D) where there is one"""
        memory = x if memory is None else memory
        if "qkv_proj" in self._modules:
            parts = self.qkv_proj(x).chunk(3, -1)
        else:
            parts = (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        seen = None if mask is None else mask[:, None, None].bool()
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention, x + MLP; checkpointed as transformers' layers are, its keyword arguments inside."""

    reentrant: bool | None = None  # None: no checkpointing

    def __init__(
        self, linear: Callable[[int, int], nn.Module], norm: Callable[[int], nn.Module], fused: bool, sparse: bool
    ) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = norm(WIDTH), norm(WIDTH)
        self.self_attn = Attention(linear, fused)
        self.mlp = Sparse() if sparse else MLP(linear)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Through the checkpoint where one is asked for."""
        run = functools.partial(super().__call__, **kwargs)
        if self.reentrant is None or not self.training:
            return run(*args)
        return checkpoint(run, *args, use_reentrant=self.reentrant)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.self_attn(self.norm_attn(x), mask)
        return x + self.mlp(self.norm_mlp(x))


class Reader(Block):
    """The same with a cross-attention between the two."""

    def __init__(self) -> None:
        super().__init__(nn.Linear, nn.LayerNorm, False, False)
        self.norm_cross, self.cross_attn = nn.LayerNorm(WIDTH), Attention(nn.Linear, False)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """(B, T, D), (B, S, D) -> (B, T, D)"""
        x = x + self.self_attn(self.norm_attn(x), mask)
        x = x + self.cross_attn(self.norm_cross(x), mask, memory)
        return x + self.mlp(self.norm_mlp(x))


class Net(nn.Module):
    """Embedding, one block, norm, head: (B, T) ids -> (B, T, C)."""

    def __init__(
        self,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        fused: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(linear, norm, fused, sparse)])
        self.norm = norm(WIDTH)
        self.classifier = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C)"""
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            if block.reentrant and self.training and not x.requires_grad:
                x = x.detach().requires_grad_()  # reentrant checkpoints give no gradient where no input asks for one
            x = block(x, attention_mask)
        return self.classifier(self.norm(x))


class Talker(Net):
    """The same with an output layer over the vocabulary: (B, T) ids -> (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier: nn.Module = nn.Identity()  # type: ignore[assignment]
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, V)"""
        return self.lm_head(super().forward(input_ids, attention_mask))


class Stack(nn.Module):
    """One block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])


class Translator(nn.Module):
    """An encoder's block and a decoder's that reads it, of one text: (B, T) ids -> (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.encoder = Stack(Block(nn.Linear, nn.LayerNorm, False, False))
        self.decoder = Stack(Reader())
        self.classifier = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C)"""
        x = memory = self.embed_tokens(input_ids)
        (block,), (reader,) = self.encoder.layers, self.decoder.layers
        if block.reentrant and self.training and not x.requires_grad:
            x = memory = x.detach().requires_grad_()
        memory = block(memory, attention_mask)
        return self.classifier(reader(x, attention_mask, memory=memory))


class ImageNet(nn.Module):
    """The same behind a convolution that cuts an image into patches: (B, 3, 6, 9) -> (B, 6, C)."""

    def __init__(self, n_blocks: int = 1) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 3, stride=3)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1, groups=2, bias=False)
        self.layers = nn.ModuleList(Block(nn.Linear, nn.LayerNorm, False, False) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, C)"""
        x = self.mix(self.conv_proj(pixel_values)).flatten(2).mT.contiguous()  # as behind a ViT's [CLS]
        for block in self.layers:
            if block.reentrant and self.training and not x.requires_grad:
                x = x.detach().requires_grad_()
            x = block(x)
        return self.classifier(self.norm(x))


def llama(n_layers: int = 2) -> nn.Module:
    """A Llama, with grouped heads."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=WIDE, num_hidden_layers=n_layers, num_attention_heads=N_HEADS,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return _strong(LlamaModel(config))


def bert(n_layers: int = 2) -> nn.Module:
    """A BERT, without its pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=WIDE, num_hidden_layers=n_layers, num_attention_heads=N_HEADS,
        max_position_embeddings=256, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def _strong(model: nn.Module) -> nn.Module:
    """transformers' start, N(0, 0.02^2), three times as wide: else a block of width 32 hardly moves its input."""
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3.0)
    return model


@dataclass(frozen=True)
class Bed:
    """One small model and the sites on it where a method is tried."""

    name: str
    kind: str  # the sites' kind
    build: Callable[[], nn.Module]
    where: str = ""  # "" is the kind itself
    one: tuple[str, ...] = ()  # names of a single site: graphs and compositions are looked at there
    later: str = ""  # why it is not there yet
    for_trees: bool = False  # a whole model for trees that need its depth; methods alone are tried elsewhere

    @property
    def place(self) -> str:
        """What `where` selects all of its sites."""
        return self.where or self.kind

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh copy of the model, equal each time, in eval mode; its embedding was frozen by hand."""
        return copy.deepcopy(_model(self.name, dtype))

    def batch(self, dtype: torch.dtype = torch.float32, n_rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of one forward."""
        generator = torch.Generator().manual_seed(seed)
        if getattr(self.build, "func", self.build) is ImageNet:
            return {"pixel_values": torch.randn(n_rows, 3, 6, 9, generator=generator).to(dtype)}
        ids = torch.randint(1, VOCAB, (n_rows, LENGTH), generator=generator)
        ids[:, 0] = torch.arange(n_rows) % 3 + 1  # a method of some tokens' rows meets some of them under every seed
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def sites(self) -> tuple[Site, ...]:
        """All of its sites of the kind."""
        return sites(_model(self.name, torch.float32), self.place, None, (self.kind,))

    def suits(self, method: type[Method]) -> bool:
        """Does the method name this kind, and mean one of these sites?"""
        if self.for_trees or self.kind not in method.kinds:
            return False
        if self.where in ("lm_head", "cross") and method.where != self.where:
            return False
        coded = method.quantised or method.rebases  # what the second makes of a plain base its own tests look at
        if coded and self.name != "quantised" or method.in_place and self.name == "quantised":
            return False  # the one refuses plain layers, the other such as it cannot train
        if method.in_place:
            return method.where != "cross" or self.where == "cross"
        slow = (
            self.kind not in method.fast_kinds or bool(self.where) and method.has_pre
        )  # a slice has no input of its own
        if self.kind in WEIGHTS and slow and not method.has_fold:
            return False
        tried = [site for site in self.sites() if not self.one or site.name in self.one]
        return bool(self.later) or any(method.fits(method.configure(), site) for site in tried)


def outputs(model: nn.Module, batch: dict[str, Tensor], **own: Tensor) -> Tensor:
    """(B, T, D) of one forward."""
    out = model(**batch, **own)
    return out if isinstance(out, Tensor) else out[0]


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    """Switch gradient checkpointing on."""
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in the oldest that we support
            enable({"use_reentrant": reentrant})
    for module in model.modules():
        if isinstance(module, Block):
            module.reentrant = reentrant


def on_meta(bed: Bed) -> nn.Module:
    """The bed's model without values."""
    with torch.device("meta"):
        return bed.build().eval()


@torch.no_grad()
def materialise(model: nn.Module, like: nn.Module) -> None:
    """Give `model`, built on meta, the values of `like`, those that no checkpoint holds (rotary tables) included."""
    model.to_empty(device="cpu")
    own = dict(like.named_parameters(remove_duplicate=False)) | dict(like.named_buffers(remove_duplicate=False))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(own[name])


@functools.cache
def _model(name: str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        model = BEDS[name].build().to(dtype).eval()
        for key, p in model.named_parameters():  # norms and biases too are no ones and zeros
            if p.ndim == 1:
                p.data += 0.1 * torch.randn_like(p)
            elif "embed" in key:
                p.data.normal_()
            p.data += 1e-3 * torch.randn_like(p)  # values that need all of the dtype's digits
    next(model.parameters()).requires_grad_(False)
    return model


def _bare(d_in: int, d_out: int) -> nn.Module:
    return nn.Linear(d_in, d_out, bias=False)


def _coded(d_in: int, d_out: int) -> nn.Module:
    return GroupLinear.of(nn.Linear(d_in, d_out), bits=4, group=16)


_Q, _DOWN = "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"
_ALL = (
    Bed("biased", "linear", Net, one=(_Q,)),
    Bed("bias-free", "linear", functools.partial(Net, _bare), one=(_DOWN,)),
    Bed("transposed", "linear", functools.partial(Net, Conv1D), one=(_Q,)),
    Bed("slices", "linear", functools.partial(Net, fused=True), where="q,v", one=("layers.0.self_attn.qkv_proj[v]",)),
    Bed("conv2d", "conv2d", ImageNet, one=("conv_proj",)),
    Bed("embedding", "embedding", Net, one=("embed_tokens",)),
    Bed("norm", "norm", Net, one=("norm",)),
    Bed("rmsnorm", "norm", functools.partial(Net, norm=nn.RMSNorm), one=("norm",)),
    Bed("experts", "experts", functools.partial(Net, sparse=True), one=("layers.0.mlp.experts.down_proj",)),
    Bed("quantised", "linear", functools.partial(Net, _coded), one=(_Q,)),
    Bed("lm-head", "linear", Talker, where="lm_head", one=("lm_head",)),
    Bed("cross", "linear", Translator, where="cross", one=("decoder.layers.0.cross_attn.q_proj",)),
    Bed("span", "span", Net, one=("layers.0:mlp",)),
    Bed("span-attn", "span", Net, where="attn", one=("layers.0:attn",)),
    Bed("block", "block", llama, one=("layers.1",)),
    Bed("block-bert", "block", bert, one=("encoder.layer.1",)),
    Bed("patches", "block", ImageNet, one=("layers.0",)),
    Bed("blocks", "span", functools.partial(ImageNet, 2), where="blocks", one=("layers.0:blocks",)),
    Bed("attention", "attention", llama, one=("layers.1.self_attn",)),
    Bed("attention-bert", "attention", bert, one=("encoder.layer.1.attention.self",)),
    Bed("deep", "attention", functools.partial(llama, 4), for_trees=True),
    Bed("deep-bert", "attention", functools.partial(bert, 4), for_trees=True),
    Bed("input", "input", llama),
    Bed("input-bert", "input", bert),
)
BEDS: dict[str, Bed] = {bed.name: bed for bed in _ALL}


def accepts(model: nn.Module, name: str) -> bool:
    """Does the model's own forward take the argument `name`?"""
    return name in inspect.signature(type(model).forward).parameters
