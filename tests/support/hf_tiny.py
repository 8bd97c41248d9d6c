"""Tiny random models of every text, image and seq2seq type of the installed transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

VOCABULARY = 99
KINDS = {  # transformers' table of classes: what its inputs are, first table first
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "encoder",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image",
}


@functools.cache
def cases() -> dict[str, tuple[str, str, str]]:
    """{case: (type, class, kind)}, a case for each class of a type. Its name is the type's, with
    the kind's appended if the type has several."""
    found, seen = {}, set()
    for table, kind in KINDS.items():
        for name, model in getattr(modeling_auto, table).items():
            model = model if isinstance(model, str) else model[0]
            if (name, model) not in seen:
                seen.add((name, model))
                found[f"{name}-{kind}" if name in found else name] = (name, model, kind)
    return found


# ---- tiny configurations -------------------------------------------------------------------------

# By the name of the field, wherever it occurs, where its default is a number.
SMALL = {
    "hidden_size_global": 32,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "emb_dim": 32, "dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 32, "n_inner": 48, "d_ff": 48,
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "ffn_hidden_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "d_inner": 48,
    "intermediate_size_mlp": 48, "dense_intermediate_size": 48, "attention_hidden_size": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "head_dim": 8, "global_head_dim": 8, "d_kv": 8, "attention_head_dim": 8, "d_head": 8,
    "dim_head": 8, "kv_channels": 8, "qk_head_dim": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "rotary_dim": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4,
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "type_vocab_size": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "max_source_positions": 64, "max_target_positions": 64, "block_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1,
    "encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "first_k_dense_replace": 1, "sliding_window": 4, "sliding_window_size": 4,
    "window_size": 4, "local_attention": 4, "attention_window": 4, "attention_chunk_size": 4,
    "chunk_size": 4, "image_size": 16, "patch_size": 4, "num_channels": 3, "num_mel_bins": 8,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_groups": 1, "n_groups": 1,
    "mamba_chunk_size": 4, "time_step_rank": 4, "mamba_dt_rank": 4, "max_window_layers": 1,
    "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "sep_token_id": 2, "cls_token_id": 1, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "pooler_hidden_size": 32,
    "dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "projection_dim": 32, "num_labels": 3, "num_nextn_layers": 0,
}  # fmt: skip
# A dropout of any other name is 0 as well.

# Additional settings that a type needs.
START = {"decoder_start_token_id": 1}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
HEADS = {"num_key_value_heads": 4}
CHANGES: dict[str, dict] = {
    "efficientnet": {"hidden_dim": 2560, "depth_coefficient": 0.1},
    "pvt": {"image_size": 64},
    "reformer-encoder": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"],
                         "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32,
                        "attention_window_size": 4, "num_key_value_heads": 1},
    "xmod": {"default_language": "en_XX"},
    "clip": {"image_size": 16},
    "t5": START, "longt5": START, "switch_transformers": START,
    "qwen4_exp_text": INDEXER, "qwen4_exp": INDEXER,
    "bit": {"hidden_sizes": [32] * 4, "depths": [1] * 4, "embedding_size": 32, "num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "convnext": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "convnextv2": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}},
    "donut-swin": {"image_size": 64, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": HEADS,
    "dots3_note_text": HEADS,
    "esm": {"vocab_size": VOCABULARY, "token_dropout": False},
    "esmc": HEADS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "levit": {"image_size": 64},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
              "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
               "hybrid_layer_ids": [1, 3], "attention_hidden_size": 64, "attention_head_dim": 16,
               "n_mamba_heads": 4, "mamba_headdim": 16, "num_query_groups": 4,
               "num_key_value_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2,
             "n_output_layers": 2},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "resnet": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "segformer": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "swin": {"image_size": 128, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
    "swinv2": {"image_size": 128, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

SPREAD = {"mobilebert": 0.1}  # of the weights, where sdpa's gradients too are far from eager's

UNBUILT: dict[str, str] = {  # types that no tiny random configuration makes, and why
    "dinat": "needs the package natten",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "reads the keys and values of another model",
    "gemma4_unified_assistant": "reads the keys and values of another model",
    "nemo_speechlm": "its parts must agree in sizes that shrinking one by one breaks",
    "xlstm": "has no attention, and its recurrence takes no heads this small",
    "timm_wrapper": "needs the package timm",
    "shieldgemma2": "reads the logits of two words of its own vocabulary",
    "siglip2": "takes patches and their shapes instead of images",
    "voxtral_realtime": "needs a sound and a text of matching lengths",
    "vibevoice_asr": "has 690 million weights in its audio tokenizers, whatever its configuration",
}


def configuration(name: str):
    """A tiny configuration of the type, or of the part of it that the class uses."""
    kind, model, _ = cases()[name]
    model = getattr(transformers, model)
    cls, changes = CONFIG_MAPPING[kind], CHANGES.get(name, CHANGES.get(kind, {}))
    return _shrunk(cls if issubclass(cls, model.config_class) else model.config_class, changes)


def _shrunk(cls, changes):
    default = cls()
    fields = {}
    for key, x in vars(default).items():
        if key in changes or key in getattr(default, "attribute_map", {}) or key.startswith("_"):
            continue
        if key in getattr(default, "sub_configs", {}):
            if isinstance(x, transformers.PreTrainedConfig):
                fields[key] = _shrunk(type(x), {}).to_dict()
        elif key in SMALL and (x is None or not isinstance(x, (list, tuple, dict, bool))):
            if x is not None or key in ("num_key_value_heads", "pad_token_id"):
                fields[key] = SMALL[key]
        elif ("drop" in key or key.endswith("pdrop")) and isinstance(x, float):
            fields[key] = 0.0
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent keys have no groups
    if "num_hidden_layers" not in changes:
        fields |= _one_layer_of_each(default, fields)
    return cls(**fields | changes)


def _one_layer_of_each(default, fields) -> dict:
    """Where layers differ, one of each, so that two layers include every kind."""
    lists = {}
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        x = getattr(default, key, None)
        settable = not isinstance(getattr(type(default), key, None), property)
        if (
            isinstance(x, (list, tuple))
            and settable
            and key not in getattr(default, "attribute_map", {})
        ):
            lists[key] = list(dict.fromkeys(x))
    if not lists:
        return {}
    count = max(2, *(len(x) for x in lists.values()))
    found = {key: (x * count)[:count] for key, x in lists.items()}
    name = getattr(default, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    return found | ({name: count} if name in fields else {})


def build(name: str, implementation: str = "eager"):
    """A model with random weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    model = getattr(transformers, cases()[name][1])
    model = model._from_config(configuration(name), attn_implementation=implementation).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("sinks"):
                parameter.normal_(0, SPREAD.get(name, 0.25))
    return model
