"""Tiny models of every family, and samples written for them: what the family contract is checked on."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from terrace.data.stream.collate import CollateSettings, LoadedSample, collate
from terrace.data.template import measure_sample
from terrace.data.tokenizer import TextTokenizer, train_tokenizer
from terrace.data.types import PackedExample, PackSpec, PromptInputs, Sample, SampleRef
from terrace.families.interface import Bounds, Family
from terrace.families.registry import make_family
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_of_model
from terrace.recipe.schema import Model

VOCABULARY = 448
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
PATCHES = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 14, "vision_use_head": False}

OPT = {
    "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 64, "max_position_embeddings": 1024, "dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
Q_FORMER = TOWER | {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "cross_attention_frequency": 2, "encoder_hidden_size": 32,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": PATCHES | {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64, "patch_size": 14},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": PATCHES | {
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 112, "fullatt_block_indexes": [1],
            "patch_size": 14,
        },
    },
    "qwen3_vl": {
        "text_config": TEXT | {"head_dim": 32, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        "vision_config": PATCHES | {
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT | {
            "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
        "vision_config": PATCHES | {
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        "tie_word_embeddings": False,
    },
    "kimi_k25": {
        "text_config": TEXT | {
            "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 48, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_mtp_layers": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": TOWER | {"patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8},
        "projection_hidden_size": 32, "tie_word_embeddings": False,
    },
    "gemma3": {
        "text_config": TEXT | {
            "head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
        },
        "vision_config": TOWER | SIGLIP | {"image_size": 56}, "mm_tokens_per_image": 4, "tie_word_embeddings": False,
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 16}, "vision_config": TOWER | SIGLIP | {"image_size": 56},
        "projection_dim": 64, "tie_word_embeddings": False,
    },
    "blip_2": {
        "text_config": OPT, "vision_config": TOWER | {"image_size": 56, "patch_size": 14}, "qformer_config": Q_FORMER,
        "num_query_tokens": 4,
    },
    "chameleon": {
        **TEXT, "vq_config": {
            "embed_dim": 16, "num_embeddings": 32, "latent_channels": 16, "resolution": 32, "in_channels": 3, "base_channels": 32,
            "channel_multiplier": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16],
        },
    },
    "idefics": {
        **{key: value for key, value in TEXT.items() if key != "num_key_value_heads"}, "alpha_initializer": "ones",
        "cross_layer_interval": 2,
        "vision_config": {
            "embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        },
        "use_resampler": True, "tie_word_embeddings": False,
        "perceiver_config": {
            "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16,
        },
    },
    "mllama": {
        "text_config": TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
            "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0], "vision_output_dim": 64,
        },
    },
    "instructblip": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER | {"image_size": 56, "patch_size": 14},
        "qformer_config": Q_FORMER | {"vocab_size": VOCABULARY}, "num_query_tokens": 4,
    },
    "llama_vid": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER | {"image_size": 56, "patch_size": 14},
        "qformer_config": Q_FORMER | {"vocab_size": VOCABULARY}, "num_query_tokens": 4, "content_side": 2, "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": TEXT, "vision_config": TOWER | {"image_size": 56, "patch_size": 14}, "image_seq_length": 16,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": TOWER | {"image_size": [56, 56], "patch_size": [14, 14]},
        "tie_word_embeddings": False, "image_seq_length": 4,
    },
    "terrace_vlm": {
        "text_config": TEXT | {"model_type": "qwen2", "hidden_size": 64},
        "vision_config": TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14},
        "connector": {"kind": "resampler", "queries": 9, "heads": 4}, "image_layout": "padded", "tie_word_embeddings": False,
    },
    "terrace_vlm_any_size": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14},
        "connector": {"kind": "resampler", "queries": 9, "heads": 4, "output_projection": "projector"}, "tie_word_embeddings": False,
        "pictures": {"scale": 84},
    },
    "llava_next": {
        "text_config": TEXT, "vision_config": TOWER | {"image_size": 56, "patch_size": 14},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
    "llava_onevision": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False},
        "image_grid_pinpoints": [[56 * rows, 56 * columns] for rows in range(1, 4) for columns in range(1, 4)],
        "vision_aspect_ratio": "anyres_max_3",
    },
    "minicpmv4_6": {
        "text_config": TEXT | {"model_type": "qwen2"}, "image_size": 112, "insert_layer_id": 0,
        "vision_config": TOWER | {"image_size": 56, "patch_size": 14}, "tie_word_embeddings": False,
    },
    "idefics3": {
        "text_config": TEXT, "vision_config": TOWER | {"image_size": 56, "patch_size": 14}, "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    "smolvlm": {
        "text_config": TEXT, "vision_config": TOWER | {"image_size": 66, "patch_size": 16}, "scale_factor": 4,
        "tie_word_embeddings": True,
    },
    "glm4v": {
        "text_config": TEXT | {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
        "vision_config": PATCHES | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "patch_size": 14, "image_size": 56,
        },
    },
    "fuyu": {"text_config": {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}, "patch_size": 18},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "vision_config": TOWER | {"patch_size": 14},
        "tie_word_embeddings": False,
    },
}  # fmt: skip
CONFIGS |= {"flamingo": CONFIGS["idefics"] | {"video_frames": 4}}
NAMES = tuple(CONFIGS)
# Of these every check is in `make test`; of others the cheap ones.
QUICK = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "terrace_vlm")
TILED = ("llava_next", "llava_onevision")  # padding dropped and newlines added behind the projector: patches per placeholder differ
PIXELS: dict[str, Bounds] = {
    "terrace_vlm_any_size": (784, 5 * 84 * 84),
    "qwen3_vl": (4_096, 40_000), "qwen3_vl_moe": (4_096, 40_000), "internvl": (3_136, 6 * 56 * 56), "minicpmv4_6": (12_544, 5 * 112 * 112),
    "idefics3": (3_136, 168 * 168), "smolvlm": (4_356, 198 * 198), "mistral3": (784, 140 * 140), "fuyu": (324, 162 * 288),
}  # fmt: skip
WORDS = ["How many circles are there? A red circle and 3 blue squares.\n", "USER: ASSISTANT: You are a helpful assistant. user system"]


@dataclass(frozen=True)
class Case:
    """A family with everything that its checks need."""

    name: str
    section: Model
    family: Family
    tokenizer: TextTokenizer
    config: Any  # transformers'
    pixels: Bounds


def recipe_model(name: str) -> dict[str, Any]:
    """`model:` of a recipe."""
    return {"architecture": name, "config": CONFIGS[name]}


@lru_cache(maxsize=len(NAMES))
def case_of(name: str, folder: Path) -> Case:
    section = Model.model_validate(recipe_model(name))
    family = make_family(name, CONFIGS[name])
    tokenizer = train_tokenizer(WORDS * 40, 400, folder / name, family)
    return Case(name, section, tokenizer.fit(family), tokenizer, model_config(section, tokenizer), PIXELS.get(name, (784, 12_544)))


def model_of(case: Case, deviation: float = 0.15) -> Any:
    """The tiny model with weights large enough for a leak between segments to show."""
    model = build_model(case.section, case.config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
            elif case.name == "mllama" and parameter.numel() == 1:  # gates, which begin shut
                parameter.fill_(0.8)
    family_of_model(model)
    return model


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=0)
    return out.getvalue()


def conversation(number: int, sizes: Sequence[tuple[int, int]], drawn: bool = True) -> LoadedSample:
    """A question about some pictures, with a box in the answer, and an answer without pictures where there are none."""
    content = [{"type": "image", "image": place} for place in range(len(sizes))]
    answer: list[dict[str, Any]] = [{"type": "text", "text": f"A red circle and {number} squares"}]
    if sizes:
        answer += [{"type": "text", "text": " at "}, {"type": "box", "image": 0, "box": [1, 2, sizes[0][0] - 1, sizes[0][1] - 2]}]
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": "How many circles?" * (1 + number % 3)}]},
        {"role": "assistant", "content": answer},
    ]
    images = [picture(*size, seed=number) if drawn else b"" for size in sizes]
    return LoadedSample(Sample(f"s{number}", "qa", messages), images, list(sizes))


def random_samples(count: int, seed: int = 0, most_images: int = 3) -> list[LoadedSample]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        sizes = [(int(rng.integers(20, 200)), int(rng.integers(20, 200))) for _ in range(int(rng.integers(0, most_images + 1)))]
        made.append(conversation(number, sizes))
    return made


def settings_of(case: Case) -> CollateSettings:
    return CollateSettings(str(case.tokenizer.directory), case.family, case.pixels, 4096, 10**7, {}, frozenset())


def pack_of(case: Case, samples: Sequence[LoadedSample], number: int = 0) -> PackedExample:
    """The samples as one pack, through the data path's own collation; lengths come from arithmetic alone."""
    lengths, visual, rows = [], [], 0
    for loaded in samples:
        measure = measure_sample(loaded.sample, loaded.sizes, case.tokenizer, case.family)
        lengths.append(measure.length(loaded.sizes, case.pixels, case.family))
        views = [case.family.view(*size, case.pixels) for size in loaded.sizes]
        visual.append(sum(view.tokens for view in views))
        rows += sum(view.rows for view in views)
    refs = tuple(SampleRef("src", place, loaded.sample.id) for place, loaded in enumerate(samples))
    spec = PackSpec(number, refs, tuple(lengths), tuple(visual), rows, 0)
    return collate(spec, samples, case.tokenizer, settings_of(case))


def reference_inputs(case: Case, example: PackedExample | PromptInputs, model: Any) -> dict[str, Any]:
    """Arguments of transformers' own forward for one sample."""
    from terrace.models.batch import image_facts

    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    family = family_of_model(model)
    if len(example.image_rows):
        pixels = family.normalised(torch.from_numpy(example.pixels), torch.float32)
        inputs |= family.inputs(pixels, image_facts(example))
    if case.name in ("blip_2", "instructblip") and "pixel_values" not in inputs:  # the class wants features, even none
        module = importlib.import_module(type(model).__module__)

        empty = torch.zeros(0, model.config.num_query_tokens, model.config.text_config.hidden_size)
        given = module.BaseModelOutputWithVisionQformerOutputs(pooler_output=empty)
        inputs |= {"pixel_values": None, "mm_encoder_outputs": {"image": given}}
        inputs |= {"qformer_input_ids": None} if case.name == "instructblip" else {}
    if case.name in ("idefics", "flamingo"):  # a token sees the last picture before it; of a sample without one, none of a blank
        pixels = inputs.get("pixel_values", torch.zeros(1, 3, case.family.side, case.family.side))
        shown = torch.cumsum(ids == model.config.image_token_id, dim=1) - 1
        inputs["pixel_values"] = pixels[None]
        inputs["image_attention_mask"] = (shown[..., None] == torch.arange(len(pixels))).long()
    if case.name == "mllama" and len(example.image_rows):
        inputs |= {name: value.transpose(0, 1) for name, value in inputs.items() if name.startswith(("pixel", "aspect"))}
        tiles = [example.image_facts.astype(int).prod(axis=1).tolist()]
        seen, image = importlib.import_module("transformers.models.mllama.processing_mllama"), model.config.image_token_id
        rows = [seen.get_cross_attention_token_mask(ids[0].tolist(), image)]
        mask = seen.convert_sparse_cross_attention_mask_to_dense(rows, tiles, case.family.most_tiles, ids.shape[1])
        inputs["cross_attention_mask"] = torch.from_numpy(mask)
    if case.name == "gemma3":  # what sees each other in both directions: images, or everything before the answer
        inputs["token_type_ids"] = (ids == model.config.image_token_id).int()
    if case.name == "paligemma":
        learned = np.flatnonzero(getattr(example, "targets", np.zeros(0)) >= 0)
        inputs["token_type_ids"] = (torch.arange(ids.shape[1])[None] > (learned[0] if len(learned) else ids.shape[1])).int()
    if case.family.position_rows > 1:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return inputs
