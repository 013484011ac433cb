"""A model of parts with torch: its class and configuration are ours (models.modules), and an export carries their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from terrace.families.terrace_vlm import WINDOW_PROCESSOR_FILE, untaken_blocks
from terrace.models.families.crossing import BESIDE, prompt_ends
from terrace.models.families.interface import Choice, FamilyModel, Features
from terrace.models.families.own_code import files_of
from terrace.models.modules.configuration_terrace_vlm import TerraceVlmConfig
from terrace.models.modules.modeling_terrace_vlm import TerraceVlmForConditionalGeneration
from terrace.models.modules.sparse_mlp import SparseMlp
from terrace.recipe.schema import PartName

AutoConfig.register(TerraceVlmConfig.model_type, TerraceVlmConfig, exist_ok=True)
AutoModelForImageTextToText.register(TerraceVlmConfig, TerraceVlmForConditionalGeneration, exist_ok=True)


OF_IMAGES = ".image."  # in the name of a visual expert's matrix
ADAPTERS = (".window_adapters.", ".adapter.", ".adapter_kinds.")  # in the names of what is added to a tower or language model
BEHIND_THE_QUERIES = "model.multi_modal_projector.output_"


class TerraceVlmFamily(FamilyModel):
    code: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_terrace_vlm.TerraceVlmConfig",
        "AutoModelForImageTextToText": "modeling_terrace_vlm.TerraceVlmForConditionalGeneration",
    }

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        return self.family.mean  # type: ignore[attr-defined]

    @property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        return self.family.std  # type: ignore[attr-defined]

    def part_of(self, name: str) -> PartName:
        if self.copied_from(name) is not None:
            return "projector"  # CogVLM trains its experts with the connector, while the language model is frozen
        behind = self.family.output_in_tower and name.startswith(BEHIND_THE_QUERIES)  # type: ignore[attr-defined]
        return "vision" if behind else super().part_of(name)

    def may_be_new(self, name: str) -> bool:
        return name.startswith(BEHIND_THE_QUERIES) or self.copied_from(name) is not None or any(word in name for word in ADAPTERS)

    def copied_from(self, name: str) -> str | None:
        owner, found, leaf = name.rpartition(OF_IMAGES)
        return f"{owner}.{leaf}" if found and name.startswith(self.blocks["language"]) else None

    def language_inputs(self, features: Features, places: torch.Tensor) -> dict[str, Any]:
        family: Any = self.family
        return {"image_places": places} if family.visual_expert or family.modality_adapters else {}

    def run_language(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Where adapters ask for the kind of a token's sample (1: it has pictures), a prefill keeps that of each prompt."""
        if self.family.modality_adapters:  # type: ignore[attr-defined]
            options = dict(options)
            places, decode = options.pop("image_places", None), options.get("decode")
            if decode is not None:
                of_prompts, prompts = decode.beside
                kinds = of_prompts[prompts].repeat_interleave(embeddings.shape[1] // len(prompts))[None]
            else:
                kinds = kinds_of_samples(positions[0], places)
            if (keep := options.get("keep")) is not None:
                keep[BESIDE] = (kinds[0, prompt_ends(options)],)  # type: ignore[assignment]
            options["sample_kinds"] = kinds
        return super().run_language(model, embeddings, positions, options)

    def routers(self, model: Any) -> list[Any]:
        return [layer.mlp.gate for layer in self.blocks_of(model, "language") if isinstance(layer.mlp, SparseMlp)]

    def experts(self, model: Any) -> list[Any]:
        return [layer.mlp for layer in self.blocks_of(model, "language") if isinstance(layer.mlp, SparseMlp)]

    def choice(self, router: Any, output: Any) -> Choice:
        probabilities = output.float().flatten(0, -2).softmax(dim=-1)
        return Choice(probabilities, probabilities.topk(self.family.experts_per_token, dim=-1).indices)  # type: ignore[attr-defined]

    def dropped(self, model: Any) -> list[torch.Tensor]:
        layers = self.blocks_of(model, "language")
        return [layer.mlp.dropped for layer in layers if isinstance(layer.mlp, SparseMlp) and layer.mlp.dropped is not None]

    def dense_sources(self, name: str) -> tuple[str, ...]:
        layer, _, leaf = name.rpartition(".mlp.")
        found = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}.get(leaf, ())
        return tuple(f"{layer}.mlp.{source}" for source in found)

    def code_files(self) -> list[Path]:
        windows = [WINDOW_PROCESSOR_FILE] if self.family.layout == "windows" else []  # type: ignore[attr-defined]
        return files_of([*self.code.values(), *windows])

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        """What lies behind the layer whose features are taken; CLIP's last norm is for its class token alone."""
        depth = config.vision_config.num_hidden_layers
        idle = untaken_blocks(config.to_dict())
        behind = [f"{self.blocks['vision']}.{number}." for number in range(depth - idle, depth)]
        if idle or (config.vision_config.model_type == "clip_vision_model" and config.vision_variant is None):
            behind.append("model.vision_tower.post_layernorm.")
        return [name for name in names if name.startswith(tuple(behind))]


def kinds_of_samples(positions: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """int64 [1, L]: 1 for tokens of a sample that has pictures. Positions [1, L] begin with 0 in every sample; `places` as in `hidden`."""
    if places is None:
        return torch.zeros_like(positions, dtype=torch.long)
    samples = (positions[0] == 0).long().cumsum(0)
    pictures = torch.zeros(len(samples) + 1, dtype=torch.long, device=samples.device).index_add_(0, samples, places[0].long())
    return (pictures > 0).long()[samples][None]


MODEL = TerraceVlmFamily
