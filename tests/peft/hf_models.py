"""Small random models whose adapters show in the logits, and HF PEFT's own adapters on them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tr
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn


class BlockDiagonal:
    """What HF PEFT's CUDA extension computes: without it, it would run one butterfly factor, whatever was asked for."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    def backward(self, grad: Tensor, blocks: Tensor) -> list[Tensor]:
        n, size = blocks.shape[1], blocks.shape[-1]
        parts = grad.view(-1, n, size, n, size).diagonal(dim1=1, dim2=3)
        return [parts.permute(0, 3, 1, 2).contiguous()]


boft_layer._FBD_CUDA = BlockDiagonal()
torch.sparse.check_sparse_tensor_invariants.disable()  # of HF PEFT's SHiRA, which leaves it open: torch would warn

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ROOM = SMALL | {"intermediate_size": 48}
NO_NOISE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _t5(n_layers: int, **options: Any) -> nn.Module:
    config = tr.T5Config(
        vocab_size=40, d_model=32, d_kv=8, num_layers=n_layers, num_decoder_layers=n_layers, num_heads=4, d_ff=48,
        pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0, **options,
    )  # fmt: skip
    return tr.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    return tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _llama_config() -> Any:
    return tr.LlamaConfig(**ROOM, num_key_value_heads=2, pad_token_id=0)


def _experts(config: type, model: type, **options: Any) -> nn.Module:
    sizes = SMALL | {
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    return model(config(**sizes, pad_token_id=0, **options))


MAKE = {
    "bert": lambda: tr.BertForSequenceClassification(tr.BertConfig(**ROOM, **NO_NOISE, num_labels=3)),
    "bert-tokens": lambda: tr.BertForTokenClassification(tr.BertConfig(**ROOM, **NO_NOISE, num_labels=3)),
    "bert-model": lambda: tr.BertModel(tr.BertConfig(**ROOM, **NO_NOISE)),
    "roberta": lambda: tr.RobertaForSequenceClassification(
        tr.RobertaConfig(**ROOM, **NO_NOISE, num_labels=3, pad_token_id=1)
    ),
    "distilbert": lambda: tr.DistilBertForSequenceClassification(
        tr.DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3)
    ),
    "llama": lambda: tr.LlamaForCausalLM(_llama_config()),
    "llama-head": lambda: tr.LlamaForSequenceClassification(_llama_config()),
    "gpt2": _gpt2,
    "opt": lambda: tr.OPTForCausalLM(
        tr.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1, dropout=0.0)
    ),
    "mixtral": lambda: _experts(tr.MixtralConfig, tr.MixtralForCausalLM),
    "gpt-oss": lambda: _experts(tr.GptOssConfig, tr.GptOssForCausalLM, head_dim=8),
    "t5": lambda: _t5(2),
    "t5-odd": lambda: _t5(3),
    "bart": lambda: tr.BartForConditionalGeneration(tr.BartConfig(
        vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=1, dropout=0.0,
    )),
    "vit": lambda: tr.ViTForImageClassification(tr.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=3,
    )),
}  # fmt: skip
TASK = {
    "bert": "SEQ_CLS", "bert-tokens": "TOKEN_CLS", "bert-model": "FEATURE_EXTRACTION", "roberta": "SEQ_CLS",
    "distilbert": "SEQ_CLS", "llama-head": "SEQ_CLS", "vit": None, "t5": "SEQ_2_SEQ_LM", "t5-odd": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}  # fmt: skip
IDS = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[1, 5:] = 0


def make(arch: str) -> nn.Module:
    """The same model each time, every tensor random and of a size that shows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = MAKE[arch]()
        for name, p in model.named_parameters():
            p.data.normal_(0.0, 0.15)
            if p.ndim == 1 and name.endswith("weight"):
                p.data += 1.0
    return model.eval()


def batch(arch: str) -> dict[str, Tensor]:
    """One batch, its second row padded."""
    if arch == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    found = {
        "input_ids": IDS.where(PADDED.bool(), 1 if arch in ("roberta", "opt", "bart") else 0),
        "attention_mask": PADDED,
    }
    if TASK.get(arch) == "SEQ_2_SEQ_LM":
        found["decoder_input_ids"] = IDS[:, :5]
    return found


@torch.no_grad()
def logits(model: nn.Module, arch: str) -> Tensor:
    """Of the real tokens, or one a row; without those of soft tokens in front."""
    given = batch(arch)
    out = model(**given)[0]
    if out.ndim < 3:
        return out
    if "decoder_input_ids" in given:
        return out
    return out[:, -IDS.shape[1] :][PADDED.bool()]


def stir(model: nn.Module) -> nn.Module:
    """Every trained tensor off its start."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(5)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def config(kind: str, arch: str, **options: Any) -> Any:
    """HF PEFT's configuration, its task named."""
    options = copy.deepcopy(options)  # HF PEFT changes lists that it is given
    return getattr(peft, kind)(**{"task_type": TASK.get(arch, "CAUSAL_LM")} | options)


def theirs(arch: str, cfg: Any) -> nn.Module:
    """HF PEFT's model with every adapter tensor off its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about options, in HF PEFT's own words
        return stir(peft.get_peft_model(make(arch), cfg)).eval()


def written(model: Any, folder: Path) -> Path:
    """HF PEFT's own files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def loaded(arch: str, folder: Path) -> nn.Module:
    """What HF PEFT reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make(arch), folder).eval()
