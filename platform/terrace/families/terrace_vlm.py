"""A vision tower, a connector and a language model taken from different checkpoints: Qwen-VL, Yi-VL, LLaVA, InternVL from parts.

`model.connector` says what stands between them, `image_layout` in the configuration how a picture becomes squares of the
tower's size: `square` (stretched, Qwen-VL), `padded` (LLaVA, Yi-VL), `tiles` in the nearest aspect ratio with a thumbnail
(InternVL), or `windows`, always the same grid of them with an overview (Monkey). Towers are CLIP's and SigLIP's, language models
those with Llama's layout; the conversation is ChatML. Coordinates are thousandths of the picture, of the padded square under `padded`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.errors import nearest
from terrace.families import added
from terrace.families.checks import complete, language_rules
from terrace.families.connector import Connector, checked, findings
from terrace.families.interface import Bounds, Costs, Family, Finding, Picture, View
from terrace.families.internvl import COORDINATE_SCALE, InternVL
from terrace.families.llava import PADDING, clip_block, idle_blocks
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD, qwen_language
from terrace.families.shapes import ExpertsShape, LanguageShape, ModelShape, ProjectorShape, VisionShape
from terrace.families.squares import padded_coordinate, padded_coordinates
from terrace.families.tiles import cut_tiles

LAYOUTS = ("square", "padded", "tiles", "windows")
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
WINDOW_PROCESSOR, WINDOW_PROCESSOR_FILE = "WindowImageProcessor", "image_processing_windows"  # which goes into an export
EVA = ("eva_clip_g", "eva2_clip_e")  # variants of a tower in CLIP's layout
LANGUAGES = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}  # model type -> biases on query, key and value


@dataclass(frozen=True)
class TerraceVlm(InternVL):
    """Tiles are InternVL's; the other layouts are one tile."""

    name: ClassVar[str] = "terrace_vlm"
    connects: ClassVar[bool] = True
    experts: ClassVar[bool] = True  # once a stage has made some

    layout: str = "square"
    output_in_tower: bool = False  # what stands behind the resampler's attention is a part of vision
    visual_expert: bool = False
    experts_per_token: int = 0  # of an upcycled language model
    grid: tuple[int, int] = (1, 1)  # rows and columns of windows
    modality_adapters: bool = False
    siglip: bool = False  # its own mean and deviation of pixels, no class token

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TerraceVlm:
        vision = config.get("vision_config") or {}
        side, patch = vision.get("image_size", 224), vision.get("patch_size", 14)
        connector, rows_columns = checked(config) or Connector(), config.get("window_grid") or (1, 1)
        tokens = picture_tokens(connector, side // patch, vision.get("num_hidden_layers", 24))
        return cls(
            side, tokens, patch, config.get("image_layout", "square"),
            connector.output_projection == "vision", bool(config.get("visual_expert")), (config.get("experts") or {}).get("per_token", 0),
            (rows_columns[0], rows_columns[-1]), config.get("modality_adapters") is not None, vision.get("model_type", CLIP) == SIGLIP,
        )  # fmt: skip

    @property
    def asks_kinds(self) -> bool:  # type: ignore[override]
        return self.modality_adapters

    @property
    def unshared(self) -> str:  # type: ignore[override]
        return "its modality_adapters ask for a token's whole sample" if self.modality_adapters else ""

    @property
    def mean(self) -> tuple[float, ...]:
        return (0.5, 0.5, 0.5) if self.siglip else tuple(IMAGE_MEAN)

    @property
    def std(self) -> tuple[float, ...]:
        return (0.5, 0.5, 0.5) if self.siglip else tuple(IMAGE_STD)

    # ------------------------------------------------------------ an image

    @property
    def unit(self) -> int:
        return max(1, self.side * self.side // self.tokens)

    def most_tiles(self, most_pixels: int) -> int:
        return super().most_tiles(most_pixels) if self.layout == "tiles" else math.prod(self.grid)

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if self.layout != "windows":
            return super().view(width, height, pixels)
        (rows, columns), squares = self.grid, math.prod(self.grid) + 1
        size = (rows * self.side, columns * self.side)
        return View(squares * self.tokens, squares, self.grid, size, (COORDINATE_SCALE, COORDINATE_SCALE))

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        if self.layout != "padded":
            return super().pixels(picture, view, out)
        rows = cut_tiles(picture.padded_square(PADDING).planes(self.side, self.side), self.side)
        if out is None:
            return rows
        out[...] = rows
        return out

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        tiles, side = int(facts[0]) * int(facts[1]), math.isqrt(self.tokens)
        return tiles + (tiles > 1), *((side, side) if side * side == self.tokens else (1, self.tokens))

    # ------------------------------------------------------------ coordinates

    def coordinate(self, value: float, axis: int, size: tuple[int, int], view: View) -> int:
        if self.layout != "padded":
            return super().coordinate(value, axis, size, view)
        return padded_coordinate(value, axis, size, COORDINATE_SCALE)

    def coordinates(
        self, values: np.ndarray, axes: np.ndarray, widths: np.ndarray, heights: np.ndarray, costs: Costs
    ) -> np.ndarray:
        if self.layout != "padded":
            return super().coordinates(values, axes, widths, heights, costs)
        return padded_coordinates(values, axes, widths, heights, COORDINATE_SCALE)

    def shown_coordinate(self, value: float, axis: int, size: tuple[int, int], shown: tuple[int, int]) -> int:
        if self.layout != "padded":
            return super().shown_coordinate(value, axis, size, shown)
        return padded_coordinate(value, axis, size, shown[axis])

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text, family = config["vision_config"], config["text_config"], cls.of(config)
        kind = text.get("model_type", "llama")
        biases = bool(text.get("attention_bias"))  # on what leaves attention, too
        language = qwen_language(config, vocabulary, LANGUAGES.get(kind, False) or biases, head_norms=kind == "qwen3")
        language = dataclasses.replace(language, layer_biases=language.layer_biases + biases * language.width)
        if (sparse := config.get("experts")) is not None:
            dense = language.layers - len(sparse["layers"])
            experts = ExpertsShape(sparse["count"], sparse["per_token"], language.intermediate, dense_layers=dense)
            language = dataclasses.replace(language, experts=experts)
        width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
        added_here = added.modality_parameters(config, language.width)
        language = dataclasses.replace(
            language, layer_biases=language.layer_biases + added_here, adapter_products=added.modality_products(config, language.width),
            other_biases=language.other_biases + (added.WAYS * language.width if added_here else 0),
        )  # fmt: skip
        block = clip_block(width, inner) + added.window_parameters(config, width) + added.modality_parameters(config, width)
        values, patches = 3 * family.patch**2, (family.side // family.patch) ** 2
        idle, layer = untaken_blocks(config), config.get("vision_feature_layer", -2)
        variant = config.get("vision_variant")
        # SigLIP: a bias of the patches; CLIP: the class token, its position and a norm before the blocks. Both: a norm behind them.
        other = values * width + patches * width + 2 * width + (width if family.siglip else 4 * width)
        other += output_parameters(language.width) if family.output_in_tower else 0
        other -= (2 if variant == "eva2_clip_e" else 1) * 2 * width - width if variant else 0  # norms fewer, and a bias of the patches
        block -= width if variant == "eva_clip_g" else 0
        behind = 0 if variant or (family.siglip and layer == -1) else 2 * width
        plain_gelu = vision.get("hidden_act", "gelu_pytorch_tanh" if family.siglip else "quick_gelu") == "quick_gelu"  # no fused function
        return ModelShape(
            VisionShape(
                depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None,
                full_blocks=depth, patch_values=values, patches_per_token=patches / family.tokens, block_parameters=block,
                adapter_products=added.window_products(config, width) + added.modality_products(config, width),
                other_parameters=other, kept_inner=3 if plain_gelu else 2, extra_tokens=0 if family.siglip else 1,
                unused_parameters=idle * block + behind, idle_blocks=idle, outer_norms=int(variant == "eva_clip_g"),
            ),
            projector_shape(checked(config) or Connector(), width, language.width, patches).plus(*visual_expert(language, family)),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        text, vision, at = config.get("text_config"), config.get("vision_config"), ("vision_config",)
        if isinstance(text, dict):
            kind = text.get("model_type", "llama")
            if kind not in LANGUAGES:
                yield ("text_config", "model_type"), f"must be one of {', '.join(LANGUAGES)}{nearest(str(kind), LANGUAGES)}"
            if text.get("mlp_bias") or (text.get("attention_bias") and (kind != "llama" or config.get("visual_expert"))):
                yield ("text_config",), "has `attention_bias`, which llama alone has and no visual_expert, or `mlp_bias`, which none has"
        if config.get("image_layout", "square") not in LAYOUTS:
            yield ("image_layout",), f"must be one of {', '.join(LAYOUTS)}{nearest(str(config['image_layout']), LAYOUTS)}"
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        if vision.get("model_type", CLIP) not in (CLIP, SIGLIP):
            yield (*at, "model_type"), f"must be {CLIP} or {SIGLIP}"
        elif vision.get("model_type") == SIGLIP and vision.get("vision_use_head", True):
            yield at, "needs `vision_use_head: false`: nobody takes what the pooling head gives"
        if (variant := config.get("vision_variant")) is not None:
            if variant not in EVA:
                yield ("vision_variant",), f"must be one of {', '.join(EVA)}{nearest(str(variant), EVA)}"
            elif vision.get("model_type", CLIP) != CLIP or config.get("vision_feature_layer", -2) != -1:
                yield ("vision_variant",), f"needs a {CLIP} whose last block is taken: vision_feature_layer: -1"
            elif (checked(config) or Connector()).kind == "class_tokens":
                yield ("vision_variant",), "and a connector of class_tokens do not go together"
        if config.get("visual_expert") and config.get("experts"):
            yield ("visual_expert",), "and a mixture of experts do not go together"
        if vision["image_size"] % vision["patch_size"]:
            yield (*at, "image_size"), f"{vision['image_size']} is no multiple of patch_size {vision['patch_size']}"
        if vision["hidden_size"] % vision["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
        yield from added.findings(config, config.get("image_layout", "square"))
        layer = config.get("vision_feature_layer", -2)
        if not isinstance(layer, int) or not -vision["num_hidden_layers"] <= layer <= -1:
            yield ("vision_feature_layer",), f"must be -1 (the tower's output) to -{vision['num_hidden_layers']}"
        connector = checked(config)
        if connector is None:
            yield ("connector",), "needs `connector` with its kind, best written as model.connector"
            return
        width = text.get("hidden_size") if isinstance(text, dict) else None
        if connector.kind == "class_tokens" and (vision.get("model_type", CLIP) != CLIP or connector.every > vision["num_hidden_layers"]):
            yield ("connector", "kind"), f"class_tokens needs a clip_vision_model of {connector.every} blocks or more"
        across = vision["image_size"] // vision["patch_size"]
        for field, message in findings(connector, vision["hidden_size"], width if isinstance(width, int) else None, across):
            yield ("connector", field), message

    @classmethod
    def balance_weight(cls, config: Mapping[str, Any]) -> float:
        return float((config.get("experts") or {}).get("auxiliary_loss", 0.0))

    @classmethod
    def upcycled(cls, config: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, Any]:
        text = config["text_config"]
        step = 1 if experts["layers"] == "all" else 2
        layers = list(range(0, text["num_hidden_layers"], step))
        return {**config, "experts": {**experts, "layers": layers}, "text_config": {**text, "num_experts_per_tok": experts["per_token"]}}

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        yield from (super().check_pixels(low, high) if self.layout == "tiles" else Family.check_pixels(self, low, high))

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        shared = {**super().preprocessor(pixels), "image_mean": list(self.mean), "image_std": list(self.std)}
        del shared["processor_class"]
        if self.layout == "tiles":
            return shared
        if self.layout == "windows":
            code = {"AutoImageProcessor": f"{WINDOW_PROCESSOR_FILE}.{WINDOW_PROCESSOR}"}
            kind = {"image_processor_type": WINDOW_PROCESSOR, "auto_map": code}
            return {name: shared[name] for name in ("image_mean", "image_std", "size")} | {**kind, "window_grid": list(self.grid)}
        for name in ("crop_to_patches", "min_patches", "max_patches"):
            del shared[name]
        if self.layout == "padded":
            size = {"size": {"shortest_edge": self.side}, "crop_size": shared["size"]}
            return {**shared, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True, **size}
        return {**shared, "image_processor_type": "CLIPImageProcessor", "do_center_crop": False}

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return super().exported_pixels(values) if self.layout == "tiles" else (self.side**2, self.side**2)

    def processor(self) -> dict[str, Any]:
        return {}


def picture_tokens(connector: Connector, across: int, blocks: int) -> int:
    """Visual tokens of one square of `across` x `across` patches, through a tower of `blocks`."""
    if connector.kind == "class_tokens":
        return max(1, blocks // connector.every)
    if connector.kind in ("resampler", "q_former"):
        return connector.queries
    return (across // (connector.merge if connector.kind == "pixel_shuffle_mlp" else 1)) ** 2


def untaken_blocks(config: Mapping[str, Any]) -> int:
    """Blocks of the tower behind the last whose features are taken."""
    connector = checked(config)
    if connector is not None and connector.kind == "class_tokens":
        return int(config["vision_config"]["num_hidden_layers"]) % connector.every
    return idle_blocks(config)


def visual_expert(language: LanguageShape, family: TerraceVlm) -> tuple[int, int]:
    """Parameters of the image tokens' own matrices, which train with the projector, and multiply-adds of a token in them; they run in
    place of the language model's."""
    if not family.visual_expert:
        return 0, 0
    matrices = 2 * language.width * (language.query_width + language.key_width) + 3 * language.width * language.intermediate
    biases = language.query_width + 2 * language.key_width if language.attention_biases else 0
    return language.layers * (matrices + biases), language.layers * matrices


def output_parameters(width: int) -> int:
    """Of the norm and the projection behind a resampler's attention."""
    return 2 * width + width * width


def projector_shape(connector: Connector, vision: int, width: int, patches: int) -> ProjectorShape:
    """Parameters and multiply-adds of a connector. `inner` is what it keeps for backward per token, a third of it."""
    kind, layers = connector.kind, connector.layers
    if kind in ("linear", "mlp", "mlp_layer_norm"):
        layers = 1 if kind == "linear" else layers
        matrices = vision * width + (layers - 1) * width * width
        norms = 2 * layers * width if kind == "mlp_layer_norm" else 0
        return ProjectorShape(matrices + layers * width + norms, matrices, (layers - 1) * width + (layers * width if norms else 0))
    if kind == "glu":
        products = width * (vision + 3 * connector.width)
        return ProjectorShape(products + 2 * width, products, (3 * width + 4 * connector.width) // 3)
    if kind == "pixel_shuffle_mlp":
        merged = vision * connector.merge**2
        return ProjectorShape(2 * merged + merged * width + width * width + 2 * width, width * (merged + width), width)
    if kind == "class_tokens":
        inner = connector.width
        return ProjectorShape(vision * inner + inner + inner * width + width, inner * (vision + width), inner)
    queries = connector.queries
    if kind == "resampler":
        parameters = queries * width + vision * width + 4 * width + 4 * (width * width + width)
        products, per_patch = width * width, vision * width + 2 * width * width + 2 * queries * width
        if connector.output_projection != "none":
            products += width * width
            parameters += output_parameters(width) if connector.output_projection == "projector" else 0
        kept = patches * 4 * width + queries * 3 * width
        return ProjectorShape(
            parameters, products, kept // queries // 3, patch_products=per_patch, patch_outer=vision * width, once=queries * width * width
        )
    inner, looks = connector.width, (layers + 1) // 2
    layer = 4 * (inner * inner + inner) + 2 * inner + 8 * inner * inner + 5 * inner + 2 * inner
    look = 2 * (inner * inner + inner) + 2 * (vision * inner + inner) + 2 * inner
    parameters = queries * inner + 2 * inner + layers * layer + looks * look + inner * width + width
    products = layers * (queries * 12 * inner * inner + 2 * queries * queries * inner) + queries * inner * width
    products += looks * (queries * 2 * inner * inner + patches * 2 * vision * inner + 2 * queries * patches * inner)
    kept = layers * queries * 16 * inner + looks * (queries * 4 * inner + patches * 2 * inner)
    return ProjectorShape(parameters, products // queries, kept // queries // 3)


FAMILY = TerraceVlm
