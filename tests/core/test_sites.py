"""The site table of every backbone family, written out: roles, sizes, spans, stacks; then what `where` selects from it.

A family's table has one entry a site, `role kind name size`, between bars. A block's entries follow its own, are named
from it and stand there once where blocks are alike. A size is d_out x d_in, `+b` with a bias, experts' number in front;
an attention's is n_kv_heads x d_head; a span has `entry -> exit`. `-` is no role. `[encoder]` is the stack.
"""

import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.site import KINDS, PLACES, ROLES, Site, all_sites, select, sites, slices

transformers = pytest.importorskip("transformers")

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
BASE: dict[str, Any] = WIDTHS | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = BASE | {"num_key_value_heads": 2}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 40, "num_layers": 2, "num_heads": 4}
SIDES = ("encoder", "decoder")
SEQ2SEQ: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ |= {"decoder_start_token_id": 2, "forced_eos_token_id": 2} | {f"{side}_layers": 2 for side in SIDES}
SEQ2SEQ |= {f"{side}_attention_heads": 4 for side in SIDES} | {f"{side}_ffn_dim": 40 for side in SIDES}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
VIT = WIDTHS | {"image_size": 8, "patch_size": 4}


def build(model: str, config: str, **sizes: Any) -> nn.Module:
    """A transformers model on the meta device, from its configuration alone."""
    with torch.device("meta"):
        made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    assert isinstance(made, nn.Module)
    return made


def family(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: build(model, config, **sizes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": family("BertForSequenceClassification", "BertConfig", **BASE),
    "bert-mlm": family("BertForMaskedLM", "BertConfig", **BASE),
    "roberta": family("RobertaForSequenceClassification", "RobertaConfig", **BASE),
    "distilbert": family("DistilBertForSequenceClassification", "DistilBertConfig",
                         vocab_size=64, dim=16, n_layers=2, n_heads=4, hidden_dim=40),
    "electra": family("ElectraForSequenceClassification", "ElectraConfig", embedding_size=8, **BASE),
    "deberta-v2": family("DebertaV2ForSequenceClassification", "DebertaV2Config", **BASE),
    "albert": family("AlbertForSequenceClassification", "AlbertConfig", embedding_size=8, **BASE),
    "modernbert": family("ModernBertForSequenceClassification", "ModernBertConfig", cls_token_id=1, sep_token_id=2,
                         **BASE),
    "t5": family("T5ForConditionalGeneration", "T5Config", **T5 | {"num_layers": 1}),
    "t5-gated": family("T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", **T5),
    "bart": family("BartForSequenceClassification", "BartConfig", **SEQ2SEQ),
    "gpt2": family("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt-neox": family("GPTNeoXForCausalLM", "GPTNeoXConfig", **BASE),
    "opt": family("OPTForCausalLM", "OPTConfig", vocab_size=64, hidden_size=16, num_hidden_layers=2,
                  num_attention_heads=4, ffn_dim=40, word_embed_proj_dim=8),
    "llama": family("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "llama-classifier": family("LlamaForSequenceClassification", "LlamaConfig", **GROUPED),
    "mistral": family("MistralForCausalLM", "MistralConfig", **GROUPED),
    "qwen2": family("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": family("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **GROUPED),
    "gemma": family("GemmaForCausalLM", "GemmaConfig", head_dim=8, **GROUPED),
    "gemma2": family("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, **GROUPED),
    "gemma3": family("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, **GROUPED),
    "phi3": family("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    "falcon": family("FalconForCausalLM", "FalconConfig", **BASE),
    "mixtral": family("MixtralForCausalLM", "MixtralConfig", num_local_experts=3, **GROUPED),
    "qwen3-moe": family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=8, num_experts=3, num_experts_per_tok=2,
                        moe_intermediate_size=24, **GROUPED),
    "qwen2-moe": family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=3, num_experts_per_tok=2,
                        moe_intermediate_size=24, shared_expert_intermediate_size=24, **GROUPED),
    "gpt-oss": family("GptOssForCausalLM", "GptOssConfig", head_dim=8, num_local_experts=3, **GROUPED),
    "vit": family("ViTForImageClassification", "ViTConfig", **VIT),
    "clip": family("CLIPModel", "CLIPConfig", text_config=BASE, vision_config=VIT | {"hidden_size": 24},
                   projection_dim=12),
    "whisper": family("WhisperForConditionalGeneration", "WhisperConfig", **SEQ2SEQ),
    "swin": family("SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=8, depths=[1, 2],
                   num_heads=[2, 4], window_size=4),
}  # fmt: skip


def entry(site: Site, block: str = "") -> str:
    """One site as the tables write it, its names taken from `block`."""

    def near(name: str | None) -> str:
        return repr(name) if not name else name.removeprefix(f"{block}.").removeprefix(block) if block else name

    size = f"{site.d_in}" if site.kind in ("norm", "block", "input") else f"{site.d_out}x{site.d_in}"
    if site.kind == "attention":
        size = f"{site.n_kv_heads}x{site.d_head}"
    if site.kind == "span":
        assert site.name == f"{block}:{site.role}"
        return f"{site.role} span {near(site.entry)} -> {near(site.module)}"
    size = (f"{site.n_experts} x " if site.n_experts else "") + size + ("+b" if site.bias else "")
    return f"{site.role or '-'} {site.kind} {near(site.name)} {size}"


def render(model: nn.Module) -> list[str]:
    """The table of a model: a stack's name in front of what belongs to it, alike blocks in a row as one."""
    entries: list[str] = []
    seen: list[str] = []
    for (stack, layer), group in itertools.groupby(all_sites(model), lambda site: (site.stack, site.layer)):
        here = list(group)
        tag = f"[{stack}] " if stack else ""
        if layer is None:
            entries += [tag + entry(site) for site in here]
            continue
        assert here[0].kind == "block"
        body = [entry(site, here[0].name) for site in here[1:]]
        if body != seen:
            entries += [tag + entry(here[0]), *body]
            seen = body
        else:
            at = len(entries) - len(body) - 1
            entries[at] = re.sub(r"( to \d+)?$", f" to {layer}", entries[at])
    return entries


TABLES = {
    "bert": """
        input input bert 16 | embed embedding bert.embeddings.word_embeddings 64x16
        - embedding bert.embeddings.position_embeddings 512x16
        - embedding bert.embeddings.token_type_embeddings 2x16 | norm norm bert.embeddings.LayerNorm 16+b
        block block bert.encoder.layer.0 16 to 1 | attn span attention.self.query -> attention.output.dense
        mlp span intermediate.dense -> output.dense | attn attention attention.self 4x4
        attn.q linear attention.self.query 16x16+b | attn.k linear attention.self.key 16x16+b
        attn.v linear attention.self.value 16x16+b | attn.o linear attention.output.dense 16x16+b
        norm norm attention.output.LayerNorm 16+b | mlp.up linear intermediate.dense 40x16+b
        mlp.down linear output.dense 16x40+b | norm norm output.LayerNorm 16+b
        pooler linear bert.pooler.dense 16x16+b | head linear classifier 2x16+b
    """,
    "bert-mlm": """
        input input bert 16 | embed embedding bert.embeddings.word_embeddings 64x16
        - embedding bert.embeddings.position_embeddings 512x16
        - embedding bert.embeddings.token_type_embeddings 2x16 | norm norm bert.embeddings.LayerNorm 16+b
        block block bert.encoder.layer.0 16 to 1 | attn span attention.self.query -> attention.output.dense
        mlp span intermediate.dense -> output.dense | attn attention attention.self 4x4
        attn.q linear attention.self.query 16x16+b | attn.k linear attention.self.key 16x16+b
        attn.v linear attention.self.value 16x16+b | attn.o linear attention.output.dense 16x16+b
        norm norm attention.output.LayerNorm 16+b | mlp.up linear intermediate.dense 40x16+b
        mlp.down linear output.dense 16x40+b | norm norm output.LayerNorm 16+b
        lm_head linear cls.predictions.transform.dense 16x16+b | lm_head norm cls.predictions.transform.LayerNorm 16+b
        lm_head linear cls.predictions.decoder 64x16+b
    """,
    "roberta": """
        input input roberta 16 | embed embedding roberta.embeddings.word_embeddings 64x16
        - embedding roberta.embeddings.token_type_embeddings 2x16 | norm norm roberta.embeddings.LayerNorm 16+b
        - embedding roberta.embeddings.position_embeddings 512x16
        block block roberta.encoder.layer.0 16 to 1 | attn span attention.self.query -> attention.output.dense
        mlp span intermediate.dense -> output.dense | attn attention attention.self 4x4
        attn.q linear attention.self.query 16x16+b | attn.k linear attention.self.key 16x16+b
        attn.v linear attention.self.value 16x16+b | attn.o linear attention.output.dense 16x16+b
        norm norm attention.output.LayerNorm 16+b | mlp.up linear intermediate.dense 40x16+b
        mlp.down linear output.dense 16x40+b | norm norm output.LayerNorm 16+b | head linear classifier.dense 16x16+b
        head linear classifier.out_proj 2x16+b
    """,
    "distilbert": """
        input input distilbert 16 | embed embedding distilbert.embeddings.word_embeddings 64x16
        - embedding distilbert.embeddings.position_embeddings 512x16 | norm norm distilbert.embeddings.LayerNorm 16+b
        block block distilbert.transformer.layer.0 16 to 1 | attn span attention.q_lin -> attention.out_lin
        mlp span ffn.lin1 -> ffn.lin2 | attn attention attention 4x4 | attn.q linear attention.q_lin 16x16+b
        attn.k linear attention.k_lin 16x16+b | attn.v linear attention.v_lin 16x16+b
        attn.o linear attention.out_lin 16x16+b | norm norm sa_layer_norm 16+b | mlp.up linear ffn.lin1 40x16+b
        mlp.down linear ffn.lin2 16x40+b | norm norm output_layer_norm 16+b | head linear pre_classifier 16x16+b
        head linear classifier 2x16+b
    """,
    "electra": """
        input input electra 8 | embed embedding electra.embeddings.word_embeddings 64x8
        - embedding electra.embeddings.position_embeddings 512x8
        - embedding electra.embeddings.token_type_embeddings 2x8 | norm norm electra.embeddings.LayerNorm 8+b
        - linear electra.embeddings_project 16x8+b
        block block electra.encoder.layer.0 16 to 1 | attn span attention.self.query -> attention.output.dense
        mlp span intermediate.dense -> output.dense | attn attention attention.self 4x4
        attn.q linear attention.self.query 16x16+b | attn.k linear attention.self.key 16x16+b
        attn.v linear attention.self.value 16x16+b | attn.o linear attention.output.dense 16x16+b
        norm norm attention.output.LayerNorm 16+b | mlp.up linear intermediate.dense 40x16+b
        mlp.down linear output.dense 16x40+b | norm norm output.LayerNorm 16+b | head linear classifier.dense 16x16+b
        head linear classifier.out_proj 2x16+b
    """,
    "deberta-v2": """
        input input deberta 16 | embed embedding deberta.embeddings.word_embeddings 64x16
        - embedding deberta.embeddings.position_embeddings 512x16 | norm norm deberta.embeddings.LayerNorm 16+b
        block block deberta.encoder.layer.0 16 to 1 | attn span attention.self.query_proj -> attention.output.dense
        mlp span intermediate.dense -> output.dense | attn attention attention.self 4x4
        attn.q linear attention.self.query_proj 16x16+b | attn.k linear attention.self.key_proj 16x16+b
        attn.v linear attention.self.value_proj 16x16+b | attn.o linear attention.output.dense 16x16+b
        norm norm attention.output.LayerNorm 16+b | mlp.up linear intermediate.dense 40x16+b
        mlp.down linear output.dense 16x40+b | norm norm output.LayerNorm 16+b | head linear pooler.dense 16x16+b
        head linear classifier 2x16+b
    """,
    "albert": """
        input input albert 8 | embed embedding albert.embeddings.word_embeddings 64x8
        - embedding albert.embeddings.position_embeddings 512x8
        - embedding albert.embeddings.token_type_embeddings 2x8 | norm norm albert.embeddings.LayerNorm 8+b
        - linear albert.encoder.embedding_hidden_mapping_in 16x8+b
        block block albert.encoder.albert_layer_groups.0.albert_layers.0 16
        attn span attention.query -> attention.dense | mlp span ffn -> ffn_output
        norm norm full_layer_layer_norm 16+b | attn attention attention 4x4 | attn.q linear attention.query 16x16+b
        attn.k linear attention.key 16x16+b | attn.v linear attention.value 16x16+b
        attn.o linear attention.dense 16x16+b | norm norm attention.LayerNorm 16+b | mlp.up linear ffn 40x16+b
        mlp.down linear ffn_output 16x40+b | pooler linear albert.pooler 16x16+b | head linear classifier 2x16+b
    """,
    "modernbert": """
        input input model 16 | embed embedding model.embeddings.tok_embeddings 64x16
        norm norm model.embeddings.norm 16
        block block model.layers.0 16 | attn span attn.Wqkv -> attn.Wo | mlp span mlp.Wi -> mlp.Wo
        attn attention attn 4x4 | attn.qkv linear attn.Wqkv 48x16 | attn.o linear attn.Wo 16x16
        norm norm mlp_norm 16 | mlp.gate_up linear mlp.Wi 80x16 | mlp.down linear mlp.Wo 16x40
        block block model.layers.1 16 | attn span attn.Wqkv -> attn.Wo | mlp span mlp.Wi -> mlp.Wo
        norm norm attn_norm 16 | attn attention attn 4x4 | attn.qkv linear attn.Wqkv 48x16
        attn.o linear attn.Wo 16x16 | norm norm mlp_norm 16 | mlp.gate_up linear mlp.Wi 80x16
        mlp.down linear mlp.Wo 16x40 | norm norm model.final_norm 16 | head linear head.dense 16x16
        head norm head.norm 16 | head linear classifier 2x16+b
    """,
    "t5": """
        - embedding shared 64x16
        [encoder] input input encoder 16
        [encoder] embed embedding encoder.embed_tokens 64x16
        [encoder] block block encoder.block.0 16 | attn span layer.0.SelfAttention.q -> layer.0.SelfAttention.o
        mlp span layer.1.DenseReluDense.wi -> layer.1.DenseReluDense.wo | attn attention layer.0.SelfAttention 4x4
        attn.q linear layer.0.SelfAttention.q 16x16 | attn.k linear layer.0.SelfAttention.k 16x16
        attn.v linear layer.0.SelfAttention.v 16x16 | attn.o linear layer.0.SelfAttention.o 16x16
        - embedding layer.0.SelfAttention.relative_attention_bias 32x4 | norm norm layer.0.layer_norm 16
        mlp.up linear layer.1.DenseReluDense.wi 40x16 | mlp.down linear layer.1.DenseReluDense.wo 16x40
        norm norm layer.1.layer_norm 16
        [encoder] norm norm encoder.final_layer_norm 16
        [decoder] input input decoder 16
        [decoder] embed embedding decoder.embed_tokens 64x16
        [decoder] block block decoder.block.0 16 | attn span layer.0.SelfAttention.q -> layer.0.SelfAttention.o
        cross span layer.1.EncDecAttention.q -> layer.1.EncDecAttention.o
        mlp span layer.2.DenseReluDense.wi -> layer.2.DenseReluDense.wo | attn attention layer.0.SelfAttention 4x4
        attn.q linear layer.0.SelfAttention.q 16x16 | attn.k linear layer.0.SelfAttention.k 16x16
        attn.v linear layer.0.SelfAttention.v 16x16 | attn.o linear layer.0.SelfAttention.o 16x16
        - embedding layer.0.SelfAttention.relative_attention_bias 32x4 | norm norm layer.0.layer_norm 16
        cross attention layer.1.EncDecAttention 4x4 | cross.q linear layer.1.EncDecAttention.q 16x16
        cross.k linear layer.1.EncDecAttention.k 16x16 | cross.v linear layer.1.EncDecAttention.v 16x16
        cross.o linear layer.1.EncDecAttention.o 16x16 | norm norm layer.1.layer_norm 16
        mlp.up linear layer.2.DenseReluDense.wi 40x16 | mlp.down linear layer.2.DenseReluDense.wo 16x40
        norm norm layer.2.layer_norm 16
        [decoder] norm norm decoder.final_layer_norm 16 | lm_head linear lm_head 64x16
    """,
    "t5-gated": """
        - embedding shared 64x16
        [encoder] input input encoder 16
        [encoder] embed embedding encoder.embed_tokens 64x16
        [encoder] block block encoder.block.0 16 | attn span layer.0.SelfAttention.q -> layer.0.SelfAttention.o
        mlp span layer.1.DenseReluDense.wi_0 -> layer.1.DenseReluDense.wo | attn attention layer.0.SelfAttention 4x4
        attn.q linear layer.0.SelfAttention.q 16x16 | attn.k linear layer.0.SelfAttention.k 16x16
        attn.v linear layer.0.SelfAttention.v 16x16 | attn.o linear layer.0.SelfAttention.o 16x16
        - embedding layer.0.SelfAttention.relative_attention_bias 32x4 | norm norm layer.0.layer_norm 16
        mlp.gate linear layer.1.DenseReluDense.wi_0 40x16 | mlp.up linear layer.1.DenseReluDense.wi_1 40x16
        mlp.down linear layer.1.DenseReluDense.wo 16x40 | norm norm layer.1.layer_norm 16
        [encoder] block block encoder.block.1 16 | attn span layer.0.SelfAttention.q -> layer.0.SelfAttention.o
        mlp span layer.1.DenseReluDense.wi_0 -> layer.1.DenseReluDense.wo | attn attention layer.0.SelfAttention 4x4
        attn.q linear layer.0.SelfAttention.q 16x16 | attn.k linear layer.0.SelfAttention.k 16x16
        attn.v linear layer.0.SelfAttention.v 16x16 | attn.o linear layer.0.SelfAttention.o 16x16
        norm norm layer.0.layer_norm 16 | mlp.gate linear layer.1.DenseReluDense.wi_0 40x16
        mlp.up linear layer.1.DenseReluDense.wi_1 40x16 | mlp.down linear layer.1.DenseReluDense.wo 16x40
        norm norm layer.1.layer_norm 16
        [encoder] norm norm encoder.final_layer_norm 16
        [decoder] input input decoder 16
        [decoder] embed embedding decoder.embed_tokens 64x16
        [decoder] block block decoder.block.0 16 | attn span layer.0.SelfAttention.q -> layer.0.SelfAttention.o
        cross span layer.1.EncDecAttention.q -> layer.1.EncDecAttention.o
        mlp span layer.2.DenseReluDense.wi_0 -> layer.2.DenseReluDense.wo | attn attention layer.0.SelfAttention 4x4
        attn.q linear layer.0.SelfAttention.q 16x16 | attn.k linear layer.0.SelfAttention.k 16x16
        attn.v linear layer.0.SelfAttention.v 16x16 | attn.o linear layer.0.SelfAttention.o 16x16
        - embedding layer.0.SelfAttention.relative_attention_bias 32x4 | norm norm layer.0.layer_norm 16
        cross attention layer.1.EncDecAttention 4x4 | cross.q linear layer.1.EncDecAttention.q 16x16
        cross.k linear layer.1.EncDecAttention.k 16x16 | cross.v linear layer.1.EncDecAttention.v 16x16
        cross.o linear layer.1.EncDecAttention.o 16x16 | norm norm layer.1.layer_norm 16
        mlp.gate linear layer.2.DenseReluDense.wi_0 40x16 | mlp.up linear layer.2.DenseReluDense.wi_1 40x16
        mlp.down linear layer.2.DenseReluDense.wo 16x40 | norm norm layer.2.layer_norm 16
        [decoder] block block decoder.block.1 16 | attn span layer.0.SelfAttention.q -> layer.0.SelfAttention.o
        cross span layer.1.EncDecAttention.q -> layer.1.EncDecAttention.o
        mlp span layer.2.DenseReluDense.wi_0 -> layer.2.DenseReluDense.wo | attn attention layer.0.SelfAttention 4x4
        attn.q linear layer.0.SelfAttention.q 16x16 | attn.k linear layer.0.SelfAttention.k 16x16
        attn.v linear layer.0.SelfAttention.v 16x16 | attn.o linear layer.0.SelfAttention.o 16x16
        norm norm layer.0.layer_norm 16 | cross attention layer.1.EncDecAttention 4x4
        cross.q linear layer.1.EncDecAttention.q 16x16 | cross.k linear layer.1.EncDecAttention.k 16x16
        cross.v linear layer.1.EncDecAttention.v 16x16 | cross.o linear layer.1.EncDecAttention.o 16x16
        norm norm layer.1.layer_norm 16 | mlp.gate linear layer.2.DenseReluDense.wi_0 40x16
        mlp.up linear layer.2.DenseReluDense.wi_1 40x16 | mlp.down linear layer.2.DenseReluDense.wo 16x40
        norm norm layer.2.layer_norm 16
        [decoder] norm norm decoder.final_layer_norm 16 | lm_head linear lm_head 64x16
    """,
    "bart": """
        - embedding model.shared 64x16
        [encoder] input input model.encoder 16
        [encoder] embed embedding model.encoder.embed_tokens 64x16
        [encoder] - embedding model.encoder.embed_positions 1026x16
        [encoder] block block model.encoder.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        mlp span fc1 -> fc2 | attn attention self_attn 4x4 | attn.k linear self_attn.k_proj 16x16+b
        attn.v linear self_attn.v_proj 16x16+b | attn.q linear self_attn.q_proj 16x16+b
        attn.o linear self_attn.out_proj 16x16+b | norm norm self_attn_layer_norm 16+b | mlp.up linear fc1 40x16+b
        mlp.down linear fc2 16x40+b | norm norm final_layer_norm 16+b
        [encoder] norm norm model.encoder.layernorm_embedding 16+b
        [decoder] input input model.decoder 16
        [decoder] embed embedding model.decoder.embed_tokens 64x16
        [decoder] - embedding model.decoder.embed_positions 1026x16
        [decoder] block block model.decoder.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        cross span encoder_attn.q_proj -> encoder_attn.out_proj | mlp span fc1 -> fc2 | attn attention self_attn 4x4
        attn.k linear self_attn.k_proj 16x16+b | attn.v linear self_attn.v_proj 16x16+b
        attn.q linear self_attn.q_proj 16x16+b | attn.o linear self_attn.out_proj 16x16+b
        norm norm self_attn_layer_norm 16+b | cross attention encoder_attn 4x4
        cross.k linear encoder_attn.k_proj 16x16+b | cross.v linear encoder_attn.v_proj 16x16+b
        cross.q linear encoder_attn.q_proj 16x16+b | cross.o linear encoder_attn.out_proj 16x16+b
        norm norm encoder_attn_layer_norm 16+b | mlp.up linear fc1 40x16+b | mlp.down linear fc2 16x40+b
        norm norm final_layer_norm 16+b
        [decoder] norm norm model.decoder.layernorm_embedding 16+b | head linear classification_head.dense 16x16+b
        head linear classification_head.out_proj 3x16+b
    """,
    "gpt2": """
        input input transformer 16 | embed embedding transformer.wte 64x16 | - embedding transformer.wpe 1024x16
        block block transformer.h.0 16 to 1 | attn span attn.c_attn -> attn.c_proj | mlp span mlp.c_fc -> mlp.c_proj
        norm norm ln_1 16+b | attn attention attn 4x4 | attn.qkv linear attn.c_attn 48x16+b
        attn.o linear attn.c_proj 16x16+b | norm norm ln_2 16+b | mlp.up linear mlp.c_fc 64x16+b
        mlp.down linear mlp.c_proj 16x64+b | norm norm transformer.ln_f 16+b | lm_head linear lm_head 64x16
    """,
    "gpt-neox": """
        input input gpt_neox 16 | embed embedding gpt_neox.embed_in 64x16
        block block gpt_neox.layers.0 16 to 1 | attn span attention.query_key_value -> attention.dense
        mlp span mlp.dense_h_to_4h -> mlp.dense_4h_to_h | norm norm input_layernorm 16+b
        norm norm post_attention_layernorm 16+b | attn attention attention 4x4
        attn.qkv linear attention.query_key_value 48x16+b | attn.o linear attention.dense 16x16+b
        mlp.up linear mlp.dense_h_to_4h 40x16+b | mlp.down linear mlp.dense_4h_to_h 16x40+b
        norm norm gpt_neox.final_layer_norm 16+b | lm_head linear lm_head 64x16
    """,
    "opt": """
        input input model.decoder 8 | embed embedding model.decoder.embed_tokens 64x8
        - embedding model.decoder.embed_positions 2050x16 | - linear model.decoder.project_out 8x16
        - linear model.decoder.project_in 16x8 | norm norm model.decoder.final_layer_norm 16+b
        block block model.decoder.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        mlp span fc1 -> fc2 | attn attention self_attn 4x4 | attn.k linear self_attn.k_proj 16x16+b
        attn.v linear self_attn.v_proj 16x16+b | attn.q linear self_attn.q_proj 16x16+b
        attn.o linear self_attn.out_proj 16x16+b | norm norm self_attn_layer_norm 16+b | mlp.up linear fc1 40x16+b
        mlp.down linear fc2 16x40+b | norm norm final_layer_norm 16+b | lm_head linear lm_head 64x8
    """,
    "llama mistral": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x4 | attn.q linear self_attn.q_proj 16x16
        attn.k linear self_attn.k_proj 8x16 | attn.v linear self_attn.v_proj 8x16
        attn.o linear self_attn.o_proj 16x16 | mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16
        mlp.down linear mlp.down_proj 16x40 | norm norm input_layernorm 16 | norm norm post_attention_layernorm 16
        norm norm model.norm 16 | lm_head linear lm_head 64x16
    """,
    "llama-classifier": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x4 | attn.q linear self_attn.q_proj 16x16
        attn.k linear self_attn.k_proj 8x16 | attn.v linear self_attn.v_proj 8x16
        attn.o linear self_attn.o_proj 16x16 | mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16
        mlp.down linear mlp.down_proj 16x40 | norm norm input_layernorm 16 | norm norm post_attention_layernorm 16
        norm norm model.norm 16 | head linear score 2x16
    """,
    "qwen2": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x4
        attn.q linear self_attn.q_proj 16x16+b | attn.k linear self_attn.k_proj 8x16+b
        attn.v linear self_attn.v_proj 8x16+b | attn.o linear self_attn.o_proj 16x16
        mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16 | mlp.down linear mlp.down_proj 16x40
        norm norm input_layernorm 16 | norm norm post_attention_layernorm 16 | norm norm model.norm 16
        lm_head linear lm_head 64x16
    """,
    "qwen3": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x8 | attn.q linear self_attn.q_proj 32x16
        attn.k linear self_attn.k_proj 16x16 | attn.v linear self_attn.v_proj 16x16
        attn.o linear self_attn.o_proj 16x32 | norm norm self_attn.q_norm 8 | norm norm self_attn.k_norm 8
        mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16 | mlp.down linear mlp.down_proj 16x40
        norm norm input_layernorm 16 | norm norm post_attention_layernorm 16 | norm norm model.norm 16
        lm_head linear lm_head 64x16
    """,
    "gemma": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x8 | attn.q linear self_attn.q_proj 32x16
        attn.k linear self_attn.k_proj 16x16 | attn.v linear self_attn.v_proj 16x16
        attn.o linear self_attn.o_proj 16x32 | mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16
        mlp.down linear mlp.down_proj 16x40 | norm norm input_layernorm 16 | norm norm post_attention_layernorm 16
        norm norm model.norm 16 | lm_head linear lm_head 64x16
    """,
    "gemma2": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x8 | attn.q linear self_attn.q_proj 32x16
        attn.k linear self_attn.k_proj 16x16 | attn.v linear self_attn.v_proj 16x16
        attn.o linear self_attn.o_proj 16x32 | mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16
        mlp.down linear mlp.down_proj 16x40 | norm norm input_layernorm 16 | norm norm post_attention_layernorm 16
        norm norm pre_feedforward_layernorm 16 | norm norm post_feedforward_layernorm 16 | norm norm model.norm 16
        lm_head linear lm_head 64x16
    """,
    "gemma3": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj
        mlp span mlp.gate_proj -> mlp.down_proj | attn attention self_attn 2x8 | attn.q linear self_attn.q_proj 32x16
        attn.k linear self_attn.k_proj 16x16 | attn.v linear self_attn.v_proj 16x16
        attn.o linear self_attn.o_proj 16x32 | norm norm self_attn.q_norm 8 | norm norm self_attn.k_norm 8
        mlp.gate linear mlp.gate_proj 40x16 | mlp.up linear mlp.up_proj 40x16 | mlp.down linear mlp.down_proj 16x40
        norm norm input_layernorm 16 | norm norm post_attention_layernorm 16 | norm norm pre_feedforward_layernorm 16
        norm norm post_feedforward_layernorm 16 | norm norm model.norm 16 | lm_head linear lm_head 64x16
    """,
    "phi3": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.qkv_proj -> self_attn.o_proj
        mlp span mlp.gate_up_proj -> mlp.down_proj | attn attention self_attn 2x4
        attn.o linear self_attn.o_proj 16x16 | attn.qkv linear self_attn.qkv_proj 32x16
        mlp.gate_up linear mlp.gate_up_proj 80x16 | mlp.down linear mlp.down_proj 16x40 | norm norm input_layernorm 16
        norm norm post_attention_layernorm 16 | norm norm model.norm 16 | lm_head linear lm_head 64x16
    """,
    "falcon": """
        input input transformer 16 | embed embedding transformer.word_embeddings 64x16
        block block transformer.h.0 16 to 1 | attn span self_attention.query_key_value -> self_attention.dense
        mlp span mlp.dense_h_to_4h -> mlp.dense_4h_to_h | attn attention self_attention 1x4
        attn.qkv linear self_attention.query_key_value 24x16 | attn.o linear self_attention.dense 16x16
        mlp.up linear mlp.dense_h_to_4h 64x16 | mlp.down linear mlp.dense_4h_to_h 16x64
        norm norm input_layernorm 16+b | norm norm transformer.ln_f 16+b | lm_head linear lm_head 64x16
    """,
    "mixtral": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj | mlp span mlp -> mlp
        attn attention self_attn 2x4 | attn.q linear self_attn.q_proj 16x16 | attn.k linear self_attn.k_proj 8x16
        attn.v linear self_attn.v_proj 8x16 | attn.o linear self_attn.o_proj 16x16 | router router mlp.gate 3x16
        mlp.gate_up experts mlp.experts.gate_up_proj 3 x 80x16 | mlp.down experts mlp.experts.down_proj 3 x 16x40
        norm norm input_layernorm 16 | norm norm post_attention_layernorm 16 | norm norm model.norm 16
        lm_head linear lm_head 64x16
    """,
    "qwen3-moe": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj | mlp span mlp -> mlp
        attn attention self_attn 2x8 | attn.q linear self_attn.q_proj 32x16 | attn.k linear self_attn.k_proj 16x16
        attn.v linear self_attn.v_proj 16x16 | attn.o linear self_attn.o_proj 16x32 | norm norm self_attn.q_norm 8
        norm norm self_attn.k_norm 8 | mlp.gate_up experts mlp.experts.gate_up_proj 3 x 48x16
        mlp.down experts mlp.experts.down_proj 3 x 16x24 | router router mlp.gate 3x16 | norm norm input_layernorm 16
        norm norm post_attention_layernorm 16 | norm norm model.norm 16 | lm_head linear lm_head 64x16
    """,
    "qwen2-moe": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj | mlp span mlp -> mlp
        attn attention self_attn 2x4 | attn.q linear self_attn.q_proj 16x16+b | attn.k linear self_attn.k_proj 8x16+b
        attn.v linear self_attn.v_proj 8x16+b | attn.o linear self_attn.o_proj 16x16 | router router mlp.gate 3x16
        mlp.gate_up experts mlp.experts.gate_up_proj 3 x 48x16 | mlp.down experts mlp.experts.down_proj 3 x 16x24
        mlp.gate linear mlp.shared_expert.gate_proj 24x16 | mlp.up linear mlp.shared_expert.up_proj 24x16
        mlp.down linear mlp.shared_expert.down_proj 16x24 | router linear mlp.shared_expert_gate 1x16
        norm norm input_layernorm 16 | norm norm post_attention_layernorm 16 | norm norm model.norm 16
        lm_head linear lm_head 64x16
    """,
    "gpt-oss": """
        input input model 16 | embed embedding model.embed_tokens 64x16
        block block model.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.o_proj | mlp span mlp -> mlp
        attn attention self_attn 2x8 | attn.q linear self_attn.q_proj 32x16+b | attn.k linear self_attn.k_proj 16x16+b
        attn.v linear self_attn.v_proj 16x16+b | attn.o linear self_attn.o_proj 16x32+b
        router router mlp.router 3x16+b | mlp.gate_up experts mlp.experts.gate_up_proj 3 x 80x16+b
        mlp.down experts mlp.experts.down_proj 3 x 16x40+b | norm norm input_layernorm 16
        norm norm post_attention_layernorm 16 | norm norm model.norm 16 | lm_head linear lm_head 64x16
    """,
    "vit": """
        input input vit 16 | embed conv2d vit.embeddings.patch_embeddings.projection 16x48+b
        block block vit.layers.0 16 to 1 | attn span attention.q_proj -> attention.o_proj
        mlp span mlp.fc1 -> mlp.fc2 | attn attention attention 4x4 | attn.q linear attention.q_proj 16x16+b
        attn.k linear attention.k_proj 16x16+b | attn.v linear attention.v_proj 16x16+b
        attn.o linear attention.o_proj 16x16+b | norm norm layernorm_before 16+b | norm norm layernorm_after 16+b
        mlp.up linear mlp.fc1 40x16+b | mlp.down linear mlp.fc2 16x40+b | norm norm vit.layernorm 16+b
        head linear classifier 2x16+b
    """,
    "clip": """
        [text] input input text_model 16
        [text] embed embedding text_model.embeddings.token_embedding 64x16
        [text] - embedding text_model.embeddings.position_embedding 77x16
        [text] block block text_model.encoder.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        mlp span mlp.fc1 -> mlp.fc2 | attn attention self_attn 4x4 | attn.k linear self_attn.k_proj 16x16+b
        attn.v linear self_attn.v_proj 16x16+b | attn.q linear self_attn.q_proj 16x16+b
        attn.o linear self_attn.out_proj 16x16+b | norm norm layer_norm1 16+b | mlp.up linear mlp.fc1 40x16+b
        mlp.down linear mlp.fc2 16x40+b | norm norm layer_norm2 16+b
        [text] norm norm text_model.final_layer_norm 16+b
        [vision] input input vision_model 24
        [vision] embed conv2d vision_model.embeddings.patch_embedding 24x48
        [vision] - embedding vision_model.embeddings.position_embedding 5x24
        [vision] norm norm vision_model.pre_layrnorm 24+b
        [vision] block block vision_model.encoder.layers.0 24 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        mlp span mlp.fc1 -> mlp.fc2 | attn attention self_attn 4x6 | attn.k linear self_attn.k_proj 24x24+b
        attn.v linear self_attn.v_proj 24x24+b | attn.q linear self_attn.q_proj 24x24+b
        attn.o linear self_attn.out_proj 24x24+b | norm norm layer_norm1 24+b | mlp.up linear mlp.fc1 40x24+b
        mlp.down linear mlp.fc2 24x40+b | norm norm layer_norm2 24+b
        [vision] norm norm vision_model.post_layernorm 24+b | - linear visual_projection 12x24
        - linear text_projection 12x16
    """,
    "whisper": """
        [encoder] input input model.encoder 16
        [encoder] - embedding model.encoder.embed_positions 1500x16
        [encoder] block block model.encoder.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        mlp span fc1 -> fc2 | attn attention self_attn 4x4 | attn.k linear self_attn.k_proj 16x16
        attn.v linear self_attn.v_proj 16x16+b | attn.q linear self_attn.q_proj 16x16+b
        attn.o linear self_attn.out_proj 16x16+b | norm norm self_attn_layer_norm 16+b | mlp.up linear fc1 40x16+b
        mlp.down linear fc2 16x40+b | norm norm final_layer_norm 16+b
        [encoder] norm norm model.encoder.layer_norm 16+b
        [decoder] input input model.decoder 16
        [decoder] embed embedding model.decoder.embed_tokens 64x16
        [decoder] - embedding model.decoder.embed_positions 448x16
        [decoder] block block model.decoder.layers.0 16 to 1 | attn span self_attn.q_proj -> self_attn.out_proj
        cross span encoder_attn.q_proj -> encoder_attn.out_proj | mlp span fc1 -> fc2 | attn attention self_attn 4x4
        attn.k linear self_attn.k_proj 16x16 | attn.v linear self_attn.v_proj 16x16+b
        attn.q linear self_attn.q_proj 16x16+b | attn.o linear self_attn.out_proj 16x16+b
        norm norm self_attn_layer_norm 16+b | cross attention encoder_attn 4x4
        cross.k linear encoder_attn.k_proj 16x16 | cross.v linear encoder_attn.v_proj 16x16+b
        cross.q linear encoder_attn.q_proj 16x16+b | cross.o linear encoder_attn.out_proj 16x16+b
        norm norm encoder_attn_layer_norm 16+b | mlp.up linear fc1 40x16+b | mlp.down linear fc2 16x40+b
        norm norm final_layer_norm 16+b
        [decoder] norm norm model.decoder.layer_norm 16+b | lm_head linear proj_out 64x16
    """,
    "swin": """
        input input swin 8 | embed conv2d swin.embeddings.patch_embeddings.projection 8x48+b
        norm norm swin.embeddings.norm 8+b
        block block swin.encoder.layers.0.blocks.0 8 | attn span attention.q_proj -> attention.o_proj
        mlp span mlp.fc1 -> mlp.fc2 | attn attention attention 2x4 | attn.q linear attention.q_proj 8x8+b
        attn.k linear attention.k_proj 8x8+b | attn.v linear attention.v_proj 8x8+b
        attn.o linear attention.o_proj 8x8+b | norm norm layernorm_before 8+b | norm norm layernorm_after 8+b
        mlp.up linear mlp.fc1 32x8+b | mlp.down linear mlp.fc2 8x32+b
        - linear swin.encoder.layers.0.downsample.reduction 16x32
        norm norm swin.encoder.layers.0.downsample.norm 32+b
        block block swin.encoder.layers.1.blocks.0 16 to 2 | attn span attention.q_proj -> attention.o_proj
        mlp span mlp.fc1 -> mlp.fc2 | attn attention attention 4x4 | attn.q linear attention.q_proj 16x16+b
        attn.k linear attention.k_proj 16x16+b | attn.v linear attention.v_proj 16x16+b
        attn.o linear attention.o_proj 16x16+b | norm norm layernorm_before 16+b | norm norm layernorm_after 16+b
        mlp.up linear mlp.fc1 64x16+b | mlp.down linear mlp.fc2 16x64+b | norm norm swin.layernorm 16+b
        head linear classifier 2x16+b
    """,
}


@pytest.fixture(scope="module")
def made() -> Callable[[str], nn.Module]:
    """Each family's model, built once: selecting changes nothing."""
    cache: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        return cache[name] if name in cache else cache.setdefault(name, MODELS[name]())

    return get


Made = Callable[[str], nn.Module]


def names(model: nn.Module, where: Any, *args: Any, **kwargs: Any) -> list[str]:
    return [site.name for site in sites(model, where, *args, **kwargs)]


def ends(model: nn.Module, where: Any, layers: Any = 0, **kwargs: Any) -> list[str]:
    """The last component of what is selected in the first layer."""
    return [name.rpartition(".")[2] for name in names(model, where, layers, **kwargs)]


@pytest.mark.parametrize("name", MODELS)
def test_table(name: str, made: Made) -> None:
    expected = next(table for keys, table in TABLES.items() if name in keys.split())
    entries = [entry.strip() for line in expected.strip().splitlines() for entry in line.split("|")]
    assert render(made(name)) == entries


@pytest.mark.parametrize("name", MODELS)
def test_table_is_sound(name: str, made: Made) -> None:
    """Names are unique, modules exist, roles and kinds are known, sizes are those of the weights."""
    model = made(name)
    table = all_sites(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    assert len({site.name for site in table}) == len(table)
    for site in table:
        assert site.kind in KINDS
        assert site.role is None or site.role in ROLES
        assert site.entry is None or site.entry in modules
        module = modules[site.module]
        assert site.d_in == site.d_out or site.kind not in ("norm", *PLACES)
        if site.n_weights:
            weight = getattr(module, site.param)
            assert weight.numel() == site.n_weights, site
            bias = "bias" if site.param == "weight" else f"{site.param}_bias"
            assert site.bias == (getattr(module, bias, None) is not None)
        for part in slices(site):
            assert part.rows is not None
            assert sum(stop - start for start, stop in part.rows) == part.d_out
        rows = sorted(row for part in slices(site) for row in part.rows or ())
        assert [start for start, _ in rows] == [0, *(stop for _, stop in rows)][: len(rows)]
        assert not rows or rows[-1][1] == site.d_out


def test_the_empty_name_is_a_place() -> None:
    bert = build("BertModel", "BertConfig", **BASE)
    (site,) = sites(bert, "input")
    assert (site.name, site.module, site.d_in) == ("", "", 16)
    assert names(bert, "pooler") == ["pooler.dense"]
    assert "pooler.dense" in names(bert, "linear")
    (linear,) = all_sites(nn.Linear(3, 4))
    assert (linear.name, linear.kind, linear.d_out, linear.d_in, linear.layer) == ("", "linear", 4, 3, None)


def test_plain_torch() -> None:
    table = all_sites(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)))
    assert [entry(site) for site in table] == ["- linear 0 5x3+b", "norm norm 2 5+b", "- linear 3 2x5"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert names(encoder, "block") == ["layers.0", "layers.1"]
    linears = sites(encoder, "linear", -1)
    assert [s.name for s in linears] == [f"layers.1.{n}" for n in ("self_attn.out_proj", "linear1", "linear2")]
    assert {site.role for site in linears} == {None}
    conv = all_sites(nn.Conv2d(6, 4, (3, 5), groups=2))[0]
    assert (conv.kind, conv.d_out, conv.d_in, conv.n_weights) == ("conv2d", 4, 45, 180)
    assert all_sites(nn.ReLU()) == ()


class Block(nn.Module):
    """Attention and MLP under names of one's own."""

    def __init__(self, mlp: dict[str, nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.attn.num_heads = 2  # type: ignore[assignment]
        self.mlp = nn.ModuleDict(mlp)


def test_blocks_may_stand_in_a_sequential() -> None:
    """timm's layout: no base model, blocks in a Sequential, a fused qkv, `head`."""
    vit = nn.Module()
    vit.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4)})
    vit.blocks = nn.Sequential(*(Block({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)}) for _ in range(3)))
    vit.head = nn.Linear(8, 10)
    assert ends(vit, "q,v,attn.o", -1) == ["qkv[q]", "qkv[v]", "proj"]
    assert names(vit, "mlp") == [f"blocks.{i}:mlp" for i in range(3)]
    assert names(vit, "head") == ["head"]
    assert (sites(vit, "input")[0].d_in, sites(vit, "embed")[0].name) == (8, "patch_embed.proj")
    assert "head" not in names(vit, "linear")


def test_width_has_the_last_word_on_up_and_down() -> None:
    def roles(**mlp: tuple[int, int]) -> dict[str, str | None]:
        layers = nn.ModuleList([Block({name: nn.Linear(*sizes) for name, sizes in mlp.items()})])
        return {site.name.rpartition(".")[2]: site.role for site in all_sites(layers) if ".mlp." in site.name}

    assert roles(w1=(8, 32), w2=(32, 8), w3=(8, 32)) == {"w1": "mlp.gate", "w2": "mlp.down", "w3": "mlp.up"}
    assert roles(w1=(8, 32), w2=(32, 8)) == {"w1": "mlp.up", "w2": "mlp.down"}
    assert roles(fc2=(8, 32), fc1=(32, 8)) == {"fc2": "mlp.up", "fc1": "mlp.down"}
    assert roles(fc1=(8, 4), fc2=(4, 8)) == {"fc1": "mlp.up", "fc2": "mlp.down"}  # an expert may be narrow
    assert roles(up_proj=(5, 32), down_proj=(32, 5)) == {"up_proj": None, "down_proj": None}
    assert roles(gate=(8, 3), up_proj=(8, 32), down_proj=(32, 8))["gate"] == "router"


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        ("BertForNextSentencePrediction", "BertConfig", {"cls.seq_relationship": "head"}),
        ("BertForQuestionAnswering", "BertConfig", {"qa_outputs": "head"}),
        ("ElectraForMaskedLM", "ElectraConfig", dict.fromkeys(
            ["generator_predictions.LayerNorm", "generator_predictions.dense", "generator_lm_head"], "lm_head")),
        ("RobertaForMaskedLM", "RobertaConfig", dict.fromkeys(
            ["lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"], "lm_head")),
    ],
)  # fmt: skip
def test_heads_lie_outside_the_backbone(model: str, config: str, expected: dict[str, str]) -> None:
    table = all_sites(build(model, config, **BASE))
    assert {site.name: site.role for site in table if site.role in ("head", "lm_head")} == expected


def test_a_model_may_have_both_heads() -> None:
    model = build("GPT2DoubleHeadsModel", "GPT2Config", **GPT2)
    assert names(model, "head") == ["multiple_choice_head.summary"]
    assert names(model, "lm_head") == ["lm_head"]


def test_roles_select(made: Made) -> None:
    assert names(made("roberta"), "head") == ["classifier.dense", "classifier.out_proj"]
    assert ends(made("t5"), "q,v") == ["q", "v", "q", "v", "q", "v"]  # encoder, decoder, cross
    assert len(sites(made("t5"), "attn.q")) == 2
    assert names(made("t5"), "cross.v") == ["decoder.block.0.layer.1.EncDecAttention.v"]
    assert ends(made("t5-gated"), "gate,down") == ["wi_0", "wo", "wi_0", "wo"]
    assert ends(made("llama"), "mlp.down, attn.q") == ["q_proj", "down_proj"]  # module order, not the order asked
    assert ends(made("bart"), "cross,mlp", kinds={"span"}) == ["0:mlp", "0:cross", "0:mlp"]
    assert names(made("llama"), "attention", 1) == ["model.layers.1.self_attn"]
    assert names(made("clip"), "input") == ["text_model", "vision_model"]
    assert [site.kind for site in sites(made("llama"), "attn", 0)] == ["span", "attention"]
    assert names(made("mixtral"), "router", 0) == ["model.layers.0.mlp.gate"]
    assert len(sites(made("bert"), "norm")) == len(sites(made("bert"), "embed,norm")) - 1 == 5


def test_kinds_leave_heads_alone(made: Made) -> None:
    assert "lm_head" not in names(made("llama"), "linear")
    assert not any("cls" in name for name in names(made("bert-mlm"), "norm,linear"))
    assert names(made("bert"), ["classifier"]) == names(made("bert"), "classifier") == ["classifier"]  # but by name
    assert len(sites(made("llama"), "all-linear")) == 14
    assert "score" not in names(made("llama-classifier"), "all-linear")
    assert len(sites(made("gpt2"), "all-linear")) == 8  # the fused projection whole, beside no slice


def test_names_select_by_the_rules_of_hf_peft(made: Made) -> None:
    llama = made("llama")
    expected = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert names(llama, ["q_proj", "v_proj"]) == expected
    assert names(llama, r".*\.(q|v)_proj") == expected
    assert names(llama, ["v", "q"]) == expected  # no such module: roles
    assert names(llama, ["layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert names(llama, "model.norm") == names(llama, ["norm"]) == ["model.norm"]  # a suffix before a role
    assert names(made("mixtral"), ["experts.down_proj"], -1) == ["model.layers.1.mlp.experts.down_proj"]
    assert ends(made("gpt2"), ["c_attn[v]"]) == ends(made("gpt2"), r".*\[v\]") == ["c_attn[v]"]
    assert all(site.kind != "span" for site in sites(llama, ".*"))
    assert names(llama, ".*0:mlp") == ["model.layers.0:mlp"]


def test_fused_projections_give_slices(made: Made) -> None:
    q, v = sites(made("gpt2"), "q,v", 0)
    assert (q.name, q.module, q.role) == ("transformer.h.0.attn.c_attn[q]", "transformer.h.0.attn.c_attn", "attn.q")
    assert (q.rows, v.rows, v.d_out, v.d_in) == (((0, 16),), ((32, 48),), 16, 16)
    (k,) = sites(made("gpt-neox"), "attn.k", 0)
    assert (k.rows, k.d_out) == (((4, 8), (16, 20), (28, 32), (40, 44)), 16)
    assert [s.rows for s in sites(made("phi3"), "attn.q,attn.v", 0)] == [((0, 16),), ((24, 32),)]
    assert [s.rows for s in sites(made("phi3"), "mlp.up", 0)] == [((40, 80),)]
    grouped = build("FalconForCausalLM", "FalconConfig", new_decoder_architecture=True, num_kv_heads=2, **BASE)
    assert [s.rows for s in sites(grouped, "q,k", 0)] == [((0, 8), (16, 24)), ((8, 12), (24, 28))]
    assert names(made("gpt2"), "qkv", 0) == ["transformer.h.0.attn.c_attn"]


# The norm in front of the MLP, the norm that ends the block, and whether blocks read patches; "" where no name says so.
MADE_OF_ROWS = {
    "bert": ("", "LayerNorm", False), "roberta": ("", "LayerNorm", False), "electra": ("", "LayerNorm", False),
    "deberta-v2": ("", "LayerNorm", False), "distilbert": ("", "output_layer_norm", False),
    "albert": ("", "full_layer_layer_norm", False), "modernbert": ("mlp_norm", "", False), "t5": ("layer_norm", "", False),
    "bart": ("", "", False), "opt": ("", "", False), "whisper": ("", "", False), "gpt2": ("ln_2", "", False),
    "gpt-neox": ("post_attention_layernorm", "", False), "llama": ("post_attention_layernorm", "", False),
    "gemma2": ("pre_feedforward_layernorm", "", False), "mixtral": ("post_attention_layernorm", "", False),
    "vit": ("layernorm_after", "", True), "clip": ("layer_norm2", "", True), "swin": ("layernorm_after", "", False),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_OF_ROWS)
def test_what_is_made_of_rows(name: str, made: Made) -> None:
    """`mlp+norm`, `post_norm` and `blocks`: in no table, selected by their roles alone, one for each MLP, block or stack."""
    model = made(name)
    norm, last, patches = MADE_OF_ROWS[name]
    table = all_sites(model)
    n_blocks = sum(s.kind == "block" for s in table)
    for role, leaf, n in (("mlp+norm", norm, sum(s.role == "mlp" for s in table)), ("post_norm", last, n_blocks)):
        if not leaf:
            with pytest.raises(ValueError, match=f"no {re.escape(repr(role))}"):
                sites(model, role)
            assert sites(model, f"{role}|block") == sites(model, "block")
            continue
        found = sites(model, f"{role}|block")
        assert len(found) == n
        assert {(s.entry or s.module).rpartition(".")[2] for s in found} == {leaf}
        assert not {s.name for s in found} & {s.name for s in table}
    for whole in sites(model, "blocks"):
        inside = [
            s for s in table if s.kind == "block" and s.module.rpartition(".")[0] == whole.module.rpartition(".")[0]
        ]
        assert (whole.module, whole.leave or whole.module) == (inside[0].module, inside[-1].module)
    assert any(s.patches for s in table) == patches


# The norm behind the attention's residual add, and whether the attention says that it is causal; "" where no name says so.
AROUND_ATTENTION: dict[str, tuple[str, set[bool | None]]] = {
    "bert": ("LayerNorm", {False}), "roberta": ("LayerNorm", {False}), "electra": ("LayerNorm", {False}),
    "deberta-v2": ("LayerNorm", {None}), "distilbert": ("sa_layer_norm", {False}), "albert": ("LayerNorm", {False}),
    "modernbert": ("", {False}), "t5": ("", {False, True}), "bart": ("", {False, True}), "opt": ("", {True}),
    "gpt2": ("", {True}), "gpt-neox": ("", {True}), "llama": ("", {True}), "gemma2": ("", {True}), "mixtral": ("", {True}),
    "vit": ("", {False}), "swin": ("", {False}),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND_ATTENTION)
def test_norms_around_the_attention(name: str, made: Made) -> None:
    """`attn_norm` behind it, `mlp_norm` in front of the MLP: the same norms as in the table, under roles of their own."""
    model = made(name)
    behind, causal = AROUND_ATTENTION[name]
    in_front, *_ = MADE_OF_ROWS[name]
    table = all_sites(model)
    for role, leaf, n in (("attn_norm", behind, "block"), ("mlp_norm", in_front, "mlp")):
        if not leaf:
            with pytest.raises(ValueError, match=f"no {role!r}"):
                sites(model, role)
            continue
        found = sites(model, role)
        assert len(found) == sum(s.role == n for s in table) and {s.kind for s in found} == {"norm"}
        assert {s.module.rpartition(".")[2] for s in found} == {leaf}
        assert not {s.name for s in found} & {s.name for s in table} and {s.module for s in found} <= {
            s.name for s in table
        }
    assert {s.is_causal for s in table if s.role == "attn" and s.kind == "span"} == causal
    if behind:
        assert {s.is_causal for s in sites(model, "attn_norm")} == causal


def test_a_projection_of_unknown_layout_has_no_slices() -> None:
    codegen = build("CodeGenForCausalLM", "CodeGenConfig", rotary_dim=2, **GPT2)
    assert ends(codegen, "qkv") == ["qkv_proj"]
    with pytest.raises(ValueError, match=r"no 'q'; it has .*attn\.qkv"):
        sites(codegen, "q")


@pytest.mark.parametrize(
    ("model", "config", "sizes"),
    [
        ("GPT2Model", "GPT2Config", GPT2),
        ("GPTNeoXModel", "GPTNeoXConfig", BASE),
        ("BloomModel", "BloomConfig", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
        ("FalconModel", "FalconConfig", BASE | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("FalconModel", "FalconConfig", BASE | {"multi_query": False, "alibi": True}),
        ("Phi3Model", "Phi3Config", GROUPED),
        ("DebertaModel", "DebertaConfig", BASE),
        ("ModernBertModel", "ModernBertConfig", BASE | {"cls_token_id": 1, "sep_token_id": 2}),
    ],
)
def test_slices_are_what_they_say(model: str, config: str, sizes: dict[str, Any]) -> None:
    """Without q or without k an attention is uniform, the same either way; without v it writes nothing."""
    torch.manual_seed(0)
    net = getattr(transformers, model)(getattr(transformers, config)(attn_implementation="eager", **sizes)).eval()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.5)
    parts = {site.role: site for site in sites(net, "q,k,v", 0)}
    (span,) = sites(net, "attn", 0, kinds={"span"})
    seen: list[torch.Tensor] = []
    net.get_submodule(span.module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    @torch.no_grad()
    def without(role: str) -> torch.Tensor:
        module = net.get_submodule(parts[role].module)
        saved = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for start, stop in parts[role].rows or ():
            dim = 1 if type(module).__name__ == "Conv1D" else 0
            module.weight.narrow(dim, start, stop - start).zero_()
            if module.bias is not None:
                module.bias[start:stop] = 0
        for name, bias in net.named_parameters():  # DeBERTa keeps these two outside the projection
            if name.endswith(("self.q_bias", "self.v_bias")):
                bias.zero_()
        net(torch.tensor([[3, 4, 5, 6, 7]]))
        net.load_state_dict(saved)
        return seen.pop(0)

    no_q, no_k, no_v = (without(f"attn.{part}") for part in "qkv")
    assert not no_v.any()
    assert no_q.any()
    if model != "DebertaModel":  # its scores have terms of position besides
        torch.testing.assert_close(no_q, no_k)


def test_layers(made: Made) -> None:
    gpt2 = made("gpt2")
    for layers in (1, -1, [1], range(1, 2), (-1,)):
        assert names(gpt2, "mlp.up", layers) == ["transformer.h.1.mlp.c_fc"]
    assert names(gpt2, "mlp.up", [-1, 0]) == names(gpt2, "mlp.up")
    assert names(gpt2, "mlp.up,embed", 0) == ["transformer.h.0.mlp.c_fc"]  # what lies in no layer is in no range
    assert ends(made("bart"), "mlp.up", -1) == ["fc1", "fc1"]  # each stack's last
    assert names(made("swin"), "attn.q", -1) == ["swin.encoder.layers.1.blocks.1.attention.q_proj"]


def test_shares_of_layers(made: Made) -> None:
    assert names(made("gpt2"), "mlp.up", "1/2-1") == ["transformer.h.1.mlp.c_fc"]
    assert names(made("gpt2"), "mlp.up,embed", "0-1/2") == ["transformer.h.0.mlp.c_fc"]
    assert names(made("bart"), "mlp.up", "1/2-1") == names(made("bart"), "mlp.up", 1)  # each stack's own depth


CUTS = [["0", "1/6", "1/2", "5/6", "1"], ["0", "1/3", "2/3", "1"], ["0", "3/10", "1"]]


@pytest.mark.parametrize("cuts", CUTS, ids="|".join)
def test_shares_divide_every_depth(cuts: list[str]) -> None:
    """Each layer lies in one share alone; shares of a stack that is deep enough hold a layer each."""
    parts = [f"{a}-{b}" for a, b in itertools.pairwise(cuts)]
    for n in range(1, 49):
        table = [Site(f"h.{i}", f"h.{i}", "block", "block", i, 8, 8, False) for i in range(n)]
        found: list[list[int | None]] = []
        for part in parts:
            with contextlib.suppress(ValueError) if n < len(parts) else contextlib.nullcontext():
                found.append([site.layer for site in select(table, "block", part)])
        assert [layer for layers in found for layer in layers] == list(range(n))
        if n == 12 and len(parts) == 4:
            assert list(map(len, found)) == [2, 4, 4, 2]


SHARES = ["0-1", "1/2", "1/2-1/6", "1/6-1/6", "1/6-7/6", "0-1/0", "-1", "0-2", "q", "", "0.5-1"]


@pytest.mark.parametrize("layers", SHARES)
def test_what_is_no_share(layers: str, made: Made) -> None:
    said = re.escape(f"layers={layers!r} is no share of a stack's depth; write two fractions")
    with pytest.raises(ValueError, match=said):
        sites(made("llama"), "q", layers)
    with pytest.raises(ValueError, match=said):
        dt.LoRA(layers=layers)


def test_deltas_do_not_show(made: Made) -> None:
    model = MODELS["llama"]()
    before = all_sites(model)
    target = model.get_submodule("model.layers.0.self_attn.q_proj")
    target.__class__ = type("LoRALinear", (type(target),), {})
    for module in (target, model.get_submodule("model.norm"), model.get_submodule("model.layers.0.mlp"), model):
        module.add_module("deltas", nn.ModuleDict({"default": nn.Linear(2, 2)}))
    model.add_module("banks", nn.ModuleDict({"shared": nn.Linear(2, 2)}))
    assert all_sites(model) == before


def test_another_librarys_wrapper_is_the_linear(made: Made) -> None:
    """HF PEFT's layers hold the base and their own factors as children; neither is a site."""
    peft = pytest.importorskip("peft")
    model = transformers.LlamaModel(transformers.LlamaConfig(**GROUPED))
    expected = names(model, "attn.q,mlp")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert names(wrapped, "attn.q,mlp") == [f"base_model.model.{name}" for name in expected]


ERRORS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("llama", "attn.p", {}, r"unknown site 'attn\.p'; did you mean 'attn\."),
    ("llama", "attn.q,atn.v", {}, r"unknown role or kind 'atn\.v'; did you mean 'attn\.v'"),
    ("llama", "qq,vv", {}, r"unknown role or kind 'qq'"),
    ("llama", "q_porj", {}, r"unknown site 'q_porj'; did you mean 'q_proj'"),
    ("llama", "q_proj", {}, r"matches no whole name; as a list, \['q_proj'\]"),
    ("llama", r".*\.q_prij", {}, r"unknown site .*did you mean .*q_proj"),
    ("llama", "(q|v", {}, r"where='\(q\|v' is no regular expression: "),
    ("llama", "", {}, "unknown site ''"),
    ("llama", [], {}, "where is an empty list"),
    ("llama", ["q_proj", "v_porj"], {}, r"unknown target 'v_porj'; did you mean 'v_proj'"),
    ("llama", "cross.v", {}, r"this backbone has no 'cross\.v'; it has attn\.q, .*lm_head"),
    ("llama", "attn.q,head", {}, r"no 'head'; it has attn\.q"),
    ("llama", "conv2d", {}, r"no 'conv2d'; it has"),
    ("bert", "mlp.gate", {}, r"no 'mlp\.gate'; it has .*mlp\.up"),
    ("mixtral", "mlp.up", {}, r"no 'mlp\.up'; it has .*mlp\.gate_up"),
    ("llama", "norm", {"kinds": {"linear"}}, "where='norm' names sites of kind norm, supported here: linear"),
    ("llama", "attn.q,block", {"kinds": {"linear", "conv2d"}}, "where='block' .*block, .*: conv2d, linear"),
    ("llama", ["q_proj", "norm"], {"kinds": {"linear"}}, "where='norm' names sites of kind norm"),
    ("llama", ".*norm", {"kinds": {"linear"}}, "kind norm, supported here: linear"),
    ("mixtral", "router", {"kinds": {"linear", "experts"}}, "kind router, supported here"),
    ("llama", "q", {"layers": 2}, "layer 2 is out of range: this backbone has 2 layers$"),
    ("llama", "q", {"layers": [0, -3]}, "layer -3 is out of range"),
    ("llama", "q", {"layers": range(1, 9)}, "layer 2 is out of range"),
    ("bart", "q", {"layers": 5}, "2 layers in its encoder, 2 layers in its decoder"),
    ("llama", "q", {"layers": []}, r"layers=\[\] must be an index"),
    ("llama", "q", {"layers": ["1"]}, r"layers=\['1'\] must be an index"),
    ("llama", "embed", {"layers": 0}, "where='embed' has no site in layers=0"),
    ("llama", "q", {"layers": "0-1/6"}, "layers='0-1/6' holds the middle of no layer: this backbone has 2 layers$"),
    (
        "bart",
        "q",
        {"layers": "0-1/6"},
        "holds the middle of no layer: .*2 layers in its encoder, 2 layers in its decoder",
    ),
]


@pytest.mark.parametrize(("name", "where", "more", "message"), ERRORS)
def test_errors(name: str, where: Any, more: dict[str, Any], message: str, made: Made) -> None:
    with pytest.raises(ValueError, match=message):
        sites(made(name), where, **more)


def test_no_layers_at_all() -> None:
    with pytest.raises(ValueError, match="layer 0 is out of range: this backbone has no layers"):
        sites(nn.Sequential(nn.Linear(2, 2)), "linear", 0)
    with pytest.raises(ValueError, match="it has no site at all"):
        sites(nn.ReLU(), "linear")
