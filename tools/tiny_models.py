"""A tiny random model of any type that Transformers knows, by the names of its configuration's fields."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VISION = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
TYPES: dict[str, str] = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **VISION}
WORDS = 160

# values, and the fields that have them in a tiny model
_SIZES: list[tuple[Any, str]] = [
    (
        64,
        "hidden_size d_model n_embd emb_dim embedding_dim dim embed_dim hidden_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim lru_width attention_hidden_size max_position_embeddings n_positions "
        "n_ctx max_seq_len context_length max_target_positions max_source_positions out_hidden_size projection_dim "
        "projector_input_dim projector_output_dim vision_output_dim dim_model_base backbone_hidden_size embed_proj_dim "
        "ngram_vocab_size_base encoder_hash_byte_group_vocab hidden_size_global",
    ),
    (
        96,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff ffn_hidden_size "
        "feed_forward_size d_inner intermediate_size_mlp dense_intermediate_size mlp_dim",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size original_max_position_embeddings image_size pronunciation_vocab_size "
        "shape_vocab_size audio_vocab_size depthwise_separable_out_channel ext_pw_out_channel nemo_conv_channels",
    ),
    (24, "q_lora_rank"),
    (
        16,
        "router_hidden_size head_dim d_head dim_head kv_channels global_head_dim attention_head_size swa_head_dim "
        "kv_lora_rank qk_head_dim v_head_dim o_lora_rank index_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim mamba_d_head mamba_head_dim mamba_headdim attention_head_dim hidden_size_per_layer_input "
        "num_position_embeddings ple_embed_dim position_bias_num_buckets query_pre_attn_scalar rel_extent",
    ),
    (
        8,
        "qk_rope_head_dim qk_nope_head_dim index_topk sliding_window attention_window_size sliding_window_size "
        "attention_chunk_size window_size local_attention keep_window_size mamba_n_heads mamba_num_heads mamba_d_state "
        "ssm_state_size state_size mamba_chunk_size chunk_size adapter_rank rotary_dim laurel_rank patch_size "
        "hc_lowrank d_rel gated_norm_rank block_size num_centroids compress_rate_hca "
        "make_ngram_vocab_size_divisible_by",
    ),
    (128, "mamba_d_ssm"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_hidden_layers n_layer "
        "n_layers num_layers decoder_layers num_decoder_layers num_blocks num_experts num_local_experts "
        "n_routed_experts moe_num_experts index_n_heads index_block_size linear_num_value_heads linear_num_heads "
        "mamba_dt_rank "
        "time_step_rank mm_tokens_per_image num_query_groups prompt_types prompt_length segment_types "
        "compress_rate_csa",
    ),
    (3, "moe_layer_end_index mask_token_id"),
    (
        2,
        "num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads swa_num_key_value_heads encoder_layers "
        "num_encoder_layers num_layers_per_stack depth zero_expert_num num_experts_per_tok num_experts_per_token "
        "moe_topk moe_top_k moe_k top_k_experts n_group num_expert_group o_groups index_topk_blocks "
        "linear_num_key_heads "
        "n_mamba_heads mamba_n_groups n_groups num_kv_shared_layers altup_num_inputs type_vocab_size attn_layer_period "
        "expert_layer_period global_layer_interval full_attention_interval sliding_window_pattern "
        "_sliding_window_pattern global_attn_every_n_layers interleave_moe_layer_step no_rope_layer_interval "
        "max_window_layers eos_token_id sep_token_id centroid_intermediate_top_k split_ngram_parts",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts topk_group first_k_dense_replace num_dense_layers "
        "moe_layer_start_index mamba_ngroups attn_layer_offset expert_layer_offset num_mem_blocks decoder_sparse_step "
        "num_random_blocks bos_token_id cls_token_id decoder_start_token_id num_global_layers max_num_tiles",
    ),
    (0, "vocab_offset pad_token_id pad_index num_nextn_predict_layers chunk_size_feed_forward mtp_num_hidden_layers"),
    (WORDS, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (0.05, "initializer_range"),
    (2.0, "embedding_multiplier"),
    (False, "use_mamba_kernels use_cache"),
    (None, "moe_latent_size"),
]
_FIELDS = {name: value for value, names in _SIZES for name in names.split()}
_TOGETHER = {  # of these 1 stays 1
    *[
        "num_key_value_heads",
        "num_kv_heads",
        "kv_n_heads",
        "n_group",
        "topk_group",
        "n_groups",
        "mamba_n_groups",
        "linear_num_key_heads",
    ],
    *["num_experts_per_tok", "moe_top_k", "moe_topk", "num_experts_per_token", "num_expert_group"],
}
_OPTIONAL = {  # of these 0 stays 0: the type has no such part
    *["num_shared_experts", "n_shared_experts", "shared_intermediate_size", "num_local_experts", "num_experts"],
    *[
        "first_k_dense_replace",
        "num_kv_shared_layers",
        "zero_expert_num",
        "num_dense_layers",
        "hidden_size_per_layer_input",
    ],
}
_LEFT_OUT = {  # lists by layer, of the real depth: the configuration makes new ones
    *[
        "layers_block_type",
        "mlp_layer_types",
        "block_types_",
        "moe_layers",
        "no_rope_layers",
        "full_attn_idxs",
        "attention_layers",
    ],
    *[
        "indexer_types",
        "num_attention_heads_per_layer",
        "layer_rope_theta",
        "intermediate_size_",
        "activation_sparsity_pattern",
    ],
    *[
        "per_layer_config",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "architectures",
        "id2label",
        "label2id",
        "hybrid_layer_ids",
    ],
    *["mtp_layers_block_type", "ple_layer_ids"],
}
_BY_LAYER: dict[str, Any] = {
    "attention_types": [[["global", "local"], 2]],
    "attn_layers": ["local"] * 4,
    "cross_attention_layers": [3],
}
_LATENT = {"head_dim": 8}  # of these the field means the rotary part alone
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_HYBRID = {
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
}
_ENCODERS = (  # decoders only if asked
    "bart bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "deepseek_v3", "longcat_flash", "youtu"], _LATENT),
    **{key: {"head_dim": 8, "num_key_value_heads": 4} for key in ["axk2", "deepseek_v32", "glm_moe_dsa"]},
    **{key: {"head_dim": 16} for key in ["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"]},
    **{key: {"text_config.rope_parameters": _MROPE} for key in ["qwen2_vl", "qwen2_5_vl"]},
    **{name: {"is_decoder": True} for name in _ENCODERS.split()},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mllama": {"text_config.num_hidden_layers": 4, "vision_config.max_num_tiles": 4},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": _HYBRID,
    "zamba2": {**_HYBRID, "n_mamba_heads": 8, "layer_types": None, "hybrid_layer_ids": [2, 4]},
}


def tiny_config(kind: str) -> Any:
    """A configuration of the type with four layers, 64 channels and `WORDS` words; what makes the type special, such as
    experts, windows or shared keys and values, stays."""
    cls = CONFIG_MAPPING[kind]
    values = _shrunk(cls())
    for key, value in _SPECIAL.get(kind, {}).items():
        *path, last = key.split(".")
        where = values
        for part in path:
            where = where.setdefault(part, {})
        if value is None:
            where.pop(last, None)
        else:
            where[last] = value
    return cls(**values)


def tiny_model(kind: str) -> Any:
    """The model, float32, with random weights that are neither 0 nor 1 nor too small to be seen."""
    cls = getattr(transformers, TYPES[kind])
    config = tiny_config(kind)
    if getattr(cls, "config_class", None) is not None and not isinstance(config, cls.config_class):
        config = config.get_text_config()
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    model = cls._from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data.add_(noise * (0.1 if parameter.dim() < 2 else 0.7 * parameter.shape[-1] ** -0.5))
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point() and buffer.dim() == 1:  # of routers
            buffer.add_(torch.randn(buffer.shape, generator=draw) * 0.05)
    return model


def write_tiny(kind: str, folder: Path) -> Path:
    """Save the model as the stage download leaves it, without a tokenizer."""
    tiny_model(kind).save_pretrained(folder)
    return folder


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """What the fields of a configuration are in a tiny model, where that differs."""
    found: dict[str, Any] = {}
    ids = 100
    for key, value in object.__getattribute__(config, "__dict__").items():
        if key in _LEFT_OUT or (key.startswith("_") and key != "_sliding_window_pattern"):
            continue
        if isinstance(value, PretrainedConfig):
            found[key] = _shrunk(value)
        elif key == "layer_types" and isinstance(value, list):
            found[key] = _spread(value, 4)
        elif key in _BY_LAYER and (key != "attn_layers" or isinstance(value, list | tuple)):
            found[key] = _BY_LAYER[key]
        elif key == "intermediate_size" and isinstance(value, list):
            found[key] = [96] * 4
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            found[key] = copy.deepcopy(value)
            _shrink_rope(found[key])
        elif key not in _FIELDS and isinstance(value, int) and re.search(r"(token_id|_index)$", key):
            ids += 1
            found[key] = ids
        elif key in _FIELDS:
            new = _size(key, value)
            if new is not ...:
                found[key] = new
        elif key == "partial_rotary_factor" and value not in (None, 1, 1.0):
            found[key] = 0.5
    return found


def _size(key: str, value: Any) -> Any:
    """The value of a field in a tiny model; ... if it stays as it is."""
    new = _FIELDS[key]
    if (value is None and key != "n_inner") or isinstance(value, bool) != isinstance(new, bool):
        return ...
    if isinstance(value, list | tuple):
        return new if key == "eos_token_id" else ...
    if isinstance(value, int) and new is not None:
        if value == 1 and key in _TOGETHER:
            return 1
        if value == 0 and key in _OPTIONAL:
            return 0
    return new


def _spread(pattern: list[Any], count: int) -> list[Any]:
    """`count` layers in which every kind of layer occurs."""
    kinds = list({str(one): one for one in pattern}.values())
    return [kinds[index % len(kinds)] for index in range(max(count, len(kinds)))]


def _shrink_rope(values: dict[str, Any]) -> None:
    part = values.get("partial_rotary_factor")
    if "mrope_section" in values:
        values["mrope_section"] = [4, 2, 2] if part in (None, 1, 1.0) else [2, 1, 1]
    if part not in (None, 1, 1.0):
        values["partial_rotary_factor"] = 0.5
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = 32
    for value in values.values():
        if isinstance(value, dict):
            _shrink_rope(value)
