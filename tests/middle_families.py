"""Models of every family of a shape at which activations outweigh what a plan rounds away: four layers, widths 128 and 256."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import CONFIGS, OPT, Q_FORMER, VOCABULARY, Case, case_of

from terrace.families.registry import make_family
from terrace.models.build import model_config
from terrace.recipe.schema import Model

MIDDLE_TOWER = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
MIDDLE: dict[str, dict[str, Any]] = {  # what `middle_case` changes of a configuration, beside the language model's sizes
    "llava_next": {
        "vision_config": MIDDLE_TOWER | {"image_size": 112},
        "image_grid_pinpoints": [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]],
    },
    "llava_onevision": {
        "vision_config": MIDDLE_TOWER | {"image_size": 112},
        "image_grid_pinpoints": [[112 * rows, 112 * columns] for rows in range(1, 4) for columns in range(1, 4)],
    },
    "minicpmv4_6": {"vision_config": MIDDLE_TOWER, "insert_layer_id": 1},
    "idefics3": {"vision_config": MIDDLE_TOWER | {"image_size": 112}},
    "smolvlm": {"vision_config": MIDDLE_TOWER | {"image_size": 130}},
    "blip_2": {
        "vision_config": MIDDLE_TOWER | {"image_size": 112}, "qformer_config": Q_FORMER | MIDDLE_TOWER | {"encoder_hidden_size": 128},
        "text_config": OPT | {"hidden_size": 256, "ffn_dim": 688, "num_hidden_layers": 4, "word_embed_proj_dim": 256},
    },
    "chameleon": {},
    "idefics": {
        "vision_config": {"embed_dim": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 112},
        "perceiver_config": {
            "use_resampler": True, "resampler_n_latents": 16, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 32,
        },
    },
    "instructblip": {
        "vision_config": MIDDLE_TOWER | {"image_size": 112},
        "qformer_config": Q_FORMER | MIDDLE_TOWER | {"encoder_hidden_size": 128, "vocab_size": VOCABULARY},
    },
    "mistral3": {"vision_config": MIDDLE_TOWER},
    "mllama": {"vision_config": {
        "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 4,
        "image_size": 210, "vision_output_dim": 256,
    }},
    "fuyu": {},
    "glm4v": {
        "vision_config": {"hidden_size": 128, "intermediate_size": 344, "depth": 4, "num_heads": 4, "out_hidden_size": 256},
    },
}  # fmt: skip
MIDDLE |= {"llama_vid": MIDDLE["instructblip"], "terrace_vlm_any_size": {"vision_config": MIDDLE_TOWER, "pictures": {"scale": 112}}}
MIDDLE |= {"flamingo": MIDDLE["idefics"]}


def middle_case(name: str, folder: Path) -> Case:
    """A shape at which activations outweigh what a plan rounds away: four layers, widths 128 and 256."""
    text = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    rope = {
        "qwen3_vl": [12, 10, 10], "qwen3_vl_moe": [12, 10, 10], "qwen2_vl": [8, 12, 12], "qwen2_5_vl": [8, 12, 12], "glm4v": [4, 6, 6]
    }  # fmt: skip
    vision: dict[str, Any] = {
        "qwen2_vl": {"embed_dim": 128, "mlp_ratio": 3, "depth": 4, "num_heads": 4, "hidden_size": 256},
        "llava": {"image_size": 112}, "kimi_k25": {}, **{key: {"image_size": 112} for key in ("gemma3", "paligemma")},
        "terrace_vlm": {"image_size": 112}, "internvl": {"image_size": [112, 112]},
    }.get(name, {"hidden_size": 128, "intermediate_size": 344, "depth": 4, "num_heads": 4, "out_hidden_size": 256})  # fmt: skip
    if name in ("llava", "internvl", "kimi_k25", "gemma3", "paligemma", "terrace_vlm"):
        vision |= {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    if "text_config" not in CONFIGS[name]:
        config = {**CONFIGS[name], **text}
    else:
        config = {**CONFIGS[name], "text_config": {**CONFIGS[name]["text_config"], **text}}
    if name in MIDDLE:
        vision = MIDDLE[name].get("vision_config", {})
        config |= MIDDLE[name]
    if "vision_config" in CONFIGS[name]:
        config["vision_config"] = {**CONFIGS[name]["vision_config"], **vision}
    if name in rope:
        config["text_config"]["rope_parameters"] = {**config["text_config"]["rope_parameters"], "mrope_section": rope[name]}
    if name in ("qwen3_vl", "qwen3_vl_moe"):
        config["text_config"]["head_dim"] = 64
    if name == "qwen3_vl_moe":
        config["text_config"]["moe_intermediate_size"] = 256
    if name == "paligemma":
        config["projection_dim"] = 256
    if name in ("gemma3", "paligemma"):
        config["text_config"] |= {"head_dim": 64} | ({"layer_types": ["full_attention"] * 4} if name == "gemma3" else {})
    if name == "kimi_k25":
        config["projection_hidden_size"] = 128
        config["text_config"] |= {
            "moe_intermediate_size": 256, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
            "v_head_dim": 48,
        }  # fmt: skip
    section = Model.model_validate({"architecture": name, "config": config})
    small = case_of(name, folder)
    pixels = (16_384, 100_000) if name in ("qwen3_vl", "qwen3_vl_moe") else (12_544, 100_352)
    family = small.tokenizer.fit(make_family(name, config))
    return Case(name, section, family, small.tokenizer, model_config(section, small.tokenizer), pixels)
