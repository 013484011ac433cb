"""Any shipped recipe in miniature: the same stages, parts, objectives, mixtures and schedules on tiny shapes, rows and budgets.

`tiny(name, folder)` writes rows of every kind that the recipe's sources are, and gives a recipe that trains in seconds. What a
published size means (learning rates, tokens, memory) is gone; what a recipe says about stages is all there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from families import CONFIGS, PIXELS
from PIL import Image

from terrace.families.connector import OPTIONS
from terrace.recipe.loading import load_recipe, parse_recipe
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_model import FROM_STAGE, Model
from terrace.recipe.schema_views import PUBLISHED_VIEWS, VIEW_OPTIONS

FAST = ("llava-1.5-7b", "ui-tars-7b")  # in `make test`; the others are slow tests of the same kind
ROWS = 24
LENGTH, LONGER = 512, 768  # tokens of a pack: of the recipe's shortest sequences, and of longer ones
ENCODERS: dict[str, dict[str, Any]] = {  # of pictures alone
    "vit": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip
ENCODERS["vit_mae"] = ENCODERS["vit"] | {
    "decoder_hidden_size": 8, "decoder_intermediate_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
}  # fmt: skip
FEW = {"hidden_width": 16, "output_width": 8, "predictor_width": 4, "prototypes": 12, "queue": 10}  # of heads over views
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
BLIP_2 = CONFIGS["blip_2"]
TEXTS = {"bert": {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024,
    "vocab_size": 448,
}}  # fmt: skip
SMALL = {**CONFIGS, **ENCODERS, **TEXTS, "blip_2_matching": {
    "vision_config": BLIP_2["vision_config"], "qformer_config": BLIP_2["qformer_config"], "num_query_tokens": BLIP_2["num_query_tokens"],
    "text_config": {"vocab_size": BLIP_2["text_config"]["vocab_size"]}, "image_text_hidden_size": 16,
}}  # fmt: skip
RUN = {
    "precision": "fp32", "checkpoint": {"every_steps": 1}, "loss_chunk_tokens": 64, "gates": [],
    "data_loading": {"engine": "inline", "window_samples": 16}, "evaluate": {"max_samples_per_kind": 2}, "resources": {}, "parallel": {},
    "failure": {}, "profile": {},
}  # fmt: skip


def tiny(name: str, folder: Path, steps: int = 2) -> Recipe:
    """The shipped recipe `name` in miniature, over rows that are written into `folder`."""
    recipe = load_recipe(name)
    whole = recipe.model_dump(mode="json")
    architecture = recipe.model.architecture
    whole["model"] = tiny_model(recipe.model)
    whole["tokenizer"] = {"train_vocabulary_size": 400}
    write_pictures(folder)
    for source, values in whole["data"]["sources"].items():
        if values["kind"] == "picture":
            values |= {"uri": str(folder), "holdout_samples": min(values["holdout_samples"], 2)}
            continue
        path = folder / f"{source}.jsonl"
        path.write_text("".join(json.dumps(ROW[values["kind"]](number, values)) + "\n" for number in range(ROWS)))
        values |= {"uri": str(path), "holdout_samples": min(values["holdout_samples"], 2)}
    shortest = min(stage.sequence_length for stage in recipe.stages)
    for values, stage in zip(whole["stages"], recipe.stages):
        values |= RUN | {"batch": {"packs": 2}, "sequence_length": LENGTH if values["sequence_length"] == shortest else LONGER}
        values["budget"] = {"steps": steps}
        if stage.model is not None:
            values["model"] = tiny_model(stage.model)
        for number, change in enumerate(values.get("changes", ())):  # one after each further step
            values["budget"]["steps"] = steps + number + 1
            change["step"] = steps + number
        values["schedule"]["warmup"] = min(values["schedule"]["warmup"], 1)  # more is a number of the published steps
        for bounds in (values, *values.get("changes", ())):
            if bounds["pixels"]:
                bounds["pixels"] = tiny_pixels(recipe, bounds["pixels"]["max"])
        if side := (values["model_changes"] or {}).get("interpolate_positions"):
            published, small = ((model or {})["vision_config"] for model in (recipe.model.config, whole["model"]["config"]))
            patches = side * small["image_size"] // published["image_size"] // small["patch_size"]
            values["model_changes"]["interpolate_positions"] = patches * small["patch_size"]
        if options := values.get(values["objective"]) if values["objective"] in VIEW_OPTIONS else None:
            values[values["objective"]] = options | {key: few for key, few in FEW.items() if options.get(key)}
        if architecture in ENCODERS:
            values["batch"]["samples_per_pack"] = 3
            parts = [view for view in stage_views(values) if view["side"]]
            values["views"] = [view | ({"side": 16} if view in parts else {}) for view in stage_views(values)]
        if values["objective"] == "grpo":
            values["grpo"] |= {"prompts_per_iteration": 2, "samples_per_prompt": 3, "max_response_tokens": 8, "max_sampling_rounds": 1,
                               "engine": "native"}  # fmt: skip
            values["rewards"] = {task: [{"name": "rl_rules:share_of_digits"}] for task in values["rewards"]}
    whole.pop("planning", None)
    return parse_recipe(whole, f"tiny-{name}")


def tiny_pixels(recipe: Recipe, most: int) -> dict[str, int]:
    """Bounds on pixels in miniature; where the tower sees pictures of any size, the share of the recipe's largest that `most` is."""
    low, high = PIXELS.get(recipe.model.architecture, (784, 12_544))
    if recipe.model.architecture == "terrace_vlm_any_size":
        parts = [bounds.pixels.max for stage in recipe.stages for bounds in (stage, *stage.changes) if bounds.pixels]
        scale = SMALL["terrace_vlm_any_size"]["pictures"]["scale"]
        square = ((recipe.model.config or {}).get("pictures") or {}).get("layout") == "square"
        high = max(low, (scale**2 if square else high) * most // max(parts))
    return {"min": low, "max": high}


def stage_views(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stage's views, those of its objective where it gives none."""
    return values["views"] or [view.model_dump(mode="json") for view in PUBLISHED_VIEWS.get(values["objective"], [])]


def tiny_model(published: Model) -> dict[str, Any]:
    """The family's tiny configuration, with what the recipe says beyond numbers; its connector with few queries."""
    small = {key: value for key, value in SMALL[published.architecture].items() if key != "connector"}
    model = {"architecture": published.architecture, "config": shrunk(published.config or {}, small)}
    if published.connector is not None:
        model["connector"] = published.connector.model_dump(exclude_none=True, exclude_defaults=True)
        few = {"queries": 9, "heads": 4, "width": 64, "layers": 2, "every": 1}
        model["connector"] |= {key: few[key] for key in OPTIONS[published.connector.kind] if key in few}
    if published.init is not None and (taken := published.init.stages()):
        model["init"] = {part: f"{FROM_STAGE}{name}" for part, name in taken.items()}
    return model


def shrunk(published: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """The published configuration with tiny numbers where it has numbers; what it says else (norms, biases, layers) stays."""
    merged = dict(published)
    for key, value in small.items():
        if isinstance(value, Mapping):
            merged[key] = shrunk(published.get(key) or {}, value)
        elif not (isinstance(value, str) and key in published):
            merged[key] = value
    return merged


# ---------------------------------------------------------------- rows of every kind


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(ROWS):
        size = (int(rng.integers(40, 100)), int(rng.integers(40, 100)))
        Image.fromarray(np.full((*size, 3), list(COLOURS.values())[number % 3], np.uint8)).save(folder / f"{number}.png")


def colour(number: int) -> str:
    return list(COLOURS)[number % 3]


def caption(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": f"{number}.png", "caption": f"A picture in {colour(number)}, number {number}."}


def text(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": f"Number {number} is {colour(number)}. " * 3}


def document(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    words = [{"type": "text", "text": f"Page {number} shows {colour(number)}:"}, {"type": "text", "text": "and nothing else."}]
    return {"content": [words[0], {"type": "image", "image": f"{number}.png"}, words[1]]}


def question(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    said = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": f"{colour(number)} {number}"}]
    return {"messages": said, "images": [f"{number}.png"]}


def grounding(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    said = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": f"{colour(number)} at <bbox>"}]
    return {"messages": said, "images": [f"{number}.png"], "objects": {"bbox": [[2, 3, 30, 31]]}}


def video(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    frames = [f"{number}.png"] * 2
    ask = [{"type": "video", "video": frames, "fps": 1.0}, {"type": "text", "text": "What happens?"}]
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": f"{colour(number)} {number}"}]}


def preference(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    return {**question(number, source), "rejected_response": "purple"}


def prompt(number: int, source: Mapping[str, Any]) -> dict[str, Any]:
    ask = [{"role": "user", "content": f"<image>Digits: 0123456789 {number}"}]
    return {"messages": ask, "images": [f"{number}.png"], "task": source["task"], "solution": str(number)}


ROW: dict[str, Callable[[int, Mapping[str, Any]], dict[str, Any]]] = {
    "caption": caption, "text": text, "document": document, "grounding": grounding, "video": video, "preference": preference,
    "prompt": prompt,
    **dict.fromkeys(("ocr", "gui", "qa", "counting", "chart", "instruction", "reasoning"), question),
}  # fmt: skip
