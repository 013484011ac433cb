"""Published sizes of families whose shape has something of its own: the plan counts what transformers' class has, in closed form."""

from __future__ import annotations

import pytest

from terrace.models.build import meta_model, model_config
from terrace.models.parts import part_parameters
from terrace.planner.parameters import active_parameters, parameter_counts
from terrace.planner.shapes import shape_of_config
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Model

SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
SIZES = {  # configuration, and billions of parameters in all and of one token as published
    "qwen3_vl_moe": ({
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    }, 31, 3.9),
    "kimi_k25": ({
        "text_config": {
            "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
            "vocab_size": 163840, "n_routed_experts": 384, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128,
        },
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
        "projection_hidden_size": 1152, "tie_word_embeddings": False,
    }, 1027, 33.3),
    "gemma3": ({
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
        },
        "vision_config": SIGLIP | {"image_size": 896}, "tie_word_embeddings": True,
    }, 4.3, 4.3),
    "paligemma": ({
        "text_config": {
            "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
            "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216,
        },
        "vision_config": SIGLIP | {"image_size": 224}, "projection_dim": 2048, "tie_word_embeddings": True,
    }, 2.9, 2.9),
    "bert": ({
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30522,
        "max_position_embeddings": 512,
    }, 0.11, 0.11),
    "blip_2": ({
        "text_config": {
            "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
            "max_position_embeddings": 2048, "vocab_size": 50304, "dropout": 0.0, "word_embed_proj_dim": 2560,
        },
        "vision_config": {
            "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224,
            "patch_size": 14,
        },
        "qformer_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "cross_attention_frequency": 2, "encoder_hidden_size": 1408, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "num_query_tokens": 32,
    }, 3.75, 3.75),
    "mllama": ({
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        },
        "vision_config": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8, "attention_heads": 16,
            "image_size": 560, "patch_size": 14, "vision_output_dim": 7680,
        },
    }, 10.67, 10.67),
}  # fmt: skip
for _name, _size in {"instructblip-vicuna-7b": 7.91, "flamingo-9b": 8.93, "chameleon-7b": 7.04}.items():  # as their recipes have it
    _model = load_recipe(_name).model
    SIZES[_model.architecture] = (_model.config, _size, _size)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_counted_exactly(name):
    values, everything, met = SIZES[name]
    config = model_config(Model.model_validate({"architecture": name, "config": values}))
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(meta_model(config)).items()}
    shape = shape_of_config(config.to_dict(), name)
    assert parameter_counts(shape) == counted
    assert sum(counted.values()) / 1e9 == pytest.approx(everything, rel=0.02)
    assert sum(active_parameters(shape).values()) / 1e9 == pytest.approx(met, rel=0.02)
