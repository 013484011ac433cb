"""What a model family answers with torch, and the one forward pass that training, rollouts and evaluation share.

A family of this folder is a small class without state. Most give names only: `parts`, `blocks`, mean and deviation of
pixels. One generic `hidden` serves them: embeddings, image features in their places, language layers with whatever
the caller's attention needs (boundaries of segments, units of a shared prompt, a decoding cache). A family whose class
wants more overrides `inputs`, `features` or `language_inputs`, never `hidden` as a whole.

The parts of the transformers class are called directly rather than its own `forward`: segments of vision and language
are different and transformers would mix their keyword arguments; the text-only guard sits between the parts; its check
of placeholders would make every pack wait for the device; and logits of a whole pack must never exist. That it computes
the same is a test for every family, not a claim.

Shape letters: L tokens, I images, R rows of pixels, V visual tokens, H width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.models.batch import DeviceBatch, ImageFacts
from terrace.models.head import install_loss_head
from terrace.recipe.schema import PARTS, PartName


@dataclass(frozen=True)
class Features:
    """What the tower and the projector give for V visual tokens: what stands in their places, and what is added further up."""

    pooled: torch.Tensor  # [V, H]
    deep: tuple[torch.Tensor, ...] = ()  # [V, H] each, for the first language layers
    codes: torch.Tensor | None = None  # int64 [V]: the tokens that they are embeddings of, where the model has such for pictures

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Features:
        return Features(change(self.pooled), tuple(change(tensor) for tensor in self.deep), self.codes)

    def total(self) -> torch.Tensor:
        """The sum of everything that reaches the language model."""
        return self.pooled.sum() + sum((tensor.sum() for tensor in self.deep), torch.zeros((), device=self.pooled.device))


@dataclass(frozen=True)
class Choice:
    """One router over t tokens and E experts."""

    probabilities: torch.Tensor  # float32 [t, E], rows that sum to 1, with gradient
    experts: torch.Tensor  # int64 [t, k]: where each token goes

    def counts(self, tokens: int) -> torch.Tensor:
        """float32 [E]: assignments of the first `tokens` tokens to each expert."""
        chosen = self.experts[:tokens].reshape(-1)
        zeros = torch.zeros(self.probabilities.shape[1], device=chosen.device)
        return zeros.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))


PUBLISHED = (  # spellings on the hub, the first that fits
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.", "model.language_model."),
)


class FamilyModel:
    """Defaults: transformers' usual names, tiles of one size as `pixel_values` [tiles, 3, side, side]."""

    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (  # the first prefix that fits names the part
        ("model.vision_tower.", "vision"),
        ("model.multi_modal_projector.", "projector"),
        ("model.language_model.", "language"),
        ("lm_head.", "language"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {
        "vision": "model.vision_tower.encoder.layers", "language": "model.language_model.layers"
    }  # fmt: skip
    embedding: ClassVar[str] = "model.language_model.embed_tokens.weight"
    head: ClassVar[str] = "lm_head.weight"
    segmented: ClassVar[bool] = True  # samples of a pack stand in one sequence; False: side by side, with transformers' own attention
    starts_around: ClassVar[int] = 0  # so many modules further out the class initialises weights too
    held_buffers: ClassVar[tuple[str, ...]] = ()  # last names of buffers that a checkpoint keeps: here parameters that never train
    tower_attention: ClassVar[str] = "sdpa"  # `segments`: the tower takes images one after another with boundaries of its own
    code: ClassVar[Mapping[str, str]] = {}  # of a class that transformers lacks: `auto_map` of an export's config.json
    mean: ClassVar[Sequence[float]] = (0.48145466, 0.4578275, 0.40821073)
    std: ClassVar[Sequence[float]] = (0.26862954, 0.26130258, 0.27577711)
    published: ClassVar[Sequence[tuple[str, str]]] = PUBLISHED
    reads_vit: bool = False  # its tower is a ViT, whose tensors it takes as they are
    blank_value: ClassVar[float] = 0.0  # of the text-only guard's picture, normalised

    def __init__(self, family: Family) -> None:
        self.family = family

    def skeleton(self, config: Any) -> Any:
        """The transformers model, made where torch's default device is; its output layer computes the loss."""
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        install_loss_head(model, self.head.removesuffix(".weight"))
        return model

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        """The start of a parameter that the class leaves as it is, or starts otherwise than published; None: the class's own."""
        return None

    # ------------------------------------------------------------ names

    def part_of(self, name: str) -> PartName:
        """The part a parameter belongs to. Raises InputError for a name of no known part."""
        for prefix, part in self.parts:
            if name.startswith(prefix):
                return part
        raise InputError(f"tensor {name!r} belongs to none of the parts {', '.join(PARTS)} of {self.family.name}")

    def block_number(self, name: str) -> int | None:
        """Number of the repeated block that a parameter of vision or language lies in; None outside of them."""
        prefix = self.blocks.get(self.part_of(name))
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) if prefix else None
        return int(match.group(1)) if match else None

    def blocks_of(self, model: Any, part: PartName) -> list[Any]:
        """The repeated blocks of vision or language, in order."""
        return list(model.get_submodule(self.blocks[part])) if part in self.blocks else []

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        """Parameters that never get a gradient, whatever trains: they stay frozen, which the log and the plan say."""
        return [name for name in names if name.rpartition(".")[2] in self.held_buffers]

    def may_be_new(self, name: str) -> bool:
        """Whether a tensor starts random where its part's checkpoint has none: it is no tensor of the part's own class."""
        return False

    def copied_from(self, name: str) -> str | None:
        """The tensor that one begins as a copy of where its part has no checkpoint, or one without it; None: it begins random."""
        return None

    def position_tables(self, names: Iterable[str]) -> list[str]:
        """Learned positions of the tower's patches, one row each, behind those of other tokens."""
        return [name for name in names if self.part_of(name) == "vision" and "position_embedding" in name]

    def canonical_name(self, name: str) -> str:
        """A tensor name of any published spelling, or of a tower's or language model's own checkpoint, as transformers names it here."""
        if name.startswith(tuple(prefix for prefix, _ in self.parts)):
            return name
        for published, here in self.published:
            if name.startswith(published):
                return here + name.removeprefix(published)
        return name

    def canonical_names(self, stored: str) -> tuple[str, ...]:
        """The tensors that a stored one holds, or a piece of: usually one, `canonical_name`."""
        return (self.canonical_name(stored),)

    def published_name(self, name: str) -> str:
        """The inverse: the spelling in which the family's weights are published, which every loader reads."""
        return name

    def exported_config(self, config: Any) -> Any:
        """The configuration as config.json has it."""
        return config

    def code_files(self) -> list[Path]:
        """Files that an export carries because `code` names them, or they are imported there."""
        return []

    def vision(self, model: Any) -> Any:
        return model.model.vision_tower

    def language(self, model: Any) -> Any:
        return model.model.language_model

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What an export writes of a tensor, by published name."""
        return {self.published_name(name): tensor}

    def joined(self, name: str, pieces: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
        """The tensor `name` from what a directory with this configuration stores of it, by stored name. Also asked on the meta
        device, for its shape."""
        [tensor] = pieces.values()
        return tensor

    # ------------------------------------------------------------ a mixture of experts

    def routers(self, model: Any) -> list[Any]:
        """The modules that send tokens to experts, in the order of layers; none in a dense model."""
        return []

    def experts(self, model: Any) -> list[Any]:
        """The modules whose own tensors are experts [E, ...], in the order of layers. Their `answers`, or else their `forward`, takes
        tokens [T, H] and the experts chosen for them with their weights, [T, k] both; an expert E is nobody."""
        return []

    def choice(self, router: Any, output: Any) -> Choice:
        """What a router's output says."""
        raise NotImplementedError

    def dropped(self, model: Any) -> list[torch.Tensor]:
        """Assignments that the experts of each layer left out in the last forward pass with gradients; empty where none ever does."""
        return []

    def dense_sources(self, name: str) -> tuple[str, ...]:
        """The dense tensors that each expert of a tensor [experts, rows, columns] is a copy of, one under the other, when a dense
        model is upcycled; empty for other tensors."""
        return ()

    # ------------------------------------------------------------ pixels

    def normalised(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8, or float of the same range, [R, values] -> dtype [R, 3, values / 3]: (x / 255 - mean) / std per channel, in float32."""
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        scale, shift = 1.0 / (255.0 * std), mean / std
        values = pixels.view(len(pixels), 3, -1).float()
        return (values * scale.view(1, 3, 1) - shift.view(1, 3, 1)).to(dtype)

    def blank(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ImageFacts]:
        """Normalised rows [R, 3, values / 3] of one colour and facts of the smallest image, for the text-only guard."""
        view = self.family.view(1, 1, (1, 1))
        rows = torch.full((view.rows, 3, self.family.row_values // 3), self.blank_value, device=device, dtype=dtype)
        counts = [torch.tensor([number]) for number in (view.tokens, view.rows)]
        return rows, ImageFacts(torch.tensor([view.facts]), *counts)

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        """Normalised rows [R, 3, values / 3] -> arguments of `get_image_features`."""
        side = round(values.shape[2] ** 0.5)
        return {"pixel_values": values.view(-1, 3, side, side)}

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        """Features [V, H] of the images, in token order."""
        pooled = model.model.get_image_features(**self.inputs(values, images), return_dict=True).pooler_output
        pooled = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled.flatten(0, -2)
        return Features(pooled)

    # ------------------------------------------------------------ the forward pass

    def places(self, input_ids: torch.Tensor, config: Any) -> torch.Tensor:
        """bool [1, L]: the placeholders."""
        return input_ids == config.image_token_id

    def visual_ids(self, config: Any) -> tuple[int, ...]:
        """Token ids of the placeholders."""
        return (config.image_token_id,)

    def groups(self, model: Any, batch: DeviceBatch, attention: Mapping[str, Any]) -> np.ndarray | None:
        """int [tokens of the pack]: tokens of one number from 0 on see each other in both directions within their sample."""
        return None

    def seen(self, model: Any, batch: DeviceBatch, features: Features) -> None:
        """What the features of a pack's pictures change of it."""

    def language_inputs(self, features: Features, places: torch.Tensor) -> dict[str, Any]:
        """Further arguments of the language model for a pack with images."""
        return {}

    def hidden(self, model: Any, batch: DeviceBatch, attention: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states [L, H] of a pack after the final norm. `attention` is what the attention functions are told."""
        has_images = batch.image_facts is not None
        embeddings = self.language(model).embed_tokens(batch.input_ids)
        if has_images:
            features = self.features(model, self.normalised(batch.pixels, batch.dtype), batch.image_facts)
            self.seen(model, batch, features)
        else:
            features = self.features(model, *self.blank(batch.device, self.compute_dtype(model)))
        more: dict[str, Any] = {}
        if batch.sequence is not None:
            embeddings, features, has_images = batch.sequence.own_features(embeddings, features)
        if has_images:
            places = self.places(batch.input_ids, model.config)
            embeddings = placed(embeddings, places, features.pooled.to(embeddings.dtype))
            more = self.language_inputs(features, places)
        elif batch.sequence is None:
            embeddings = embeddings + 0.0 * features.total().to(embeddings.dtype)  # the text-only guard
        if (groups := self.groups(model, batch, attention)) is not None:
            padded = np.full(batch.boundaries[-1], -1, np.int64)
            padded[: len(groups)] = groups
            more = {**more, "bidirectional_groups": torch.from_numpy(padded).to(batch.device, non_blocking=True)}
        return self.run_language(model, embeddings, batch.position_ids, {**attention, **more})

    def run_language(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states [L, H] from embeddings [1, L, H] and positions [P, 1, L], without a cache of transformers' own."""
        output = self.language(model)(
            inputs_embeds=embeddings, position_ids=self.language_positions(positions), attention_mask=None, use_cache=False, **options,
        )  # fmt: skip
        return output.last_hidden_state[0]

    def language_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """What the language model takes of positions [P, 1, L]."""
        return positions if self.family.position_rows > 1 else positions[0]

    def compute_dtype(self, model: Any) -> torch.dtype:
        """What the tower computes in where a pack brings no pixels."""
        return next(self.vision(model).parameters()).dtype


def placed(embeddings: torch.Tensor, places: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Embeddings [1, L, H] with the vectors [N, H] in their order where `places` bool [1, L] says. On a CPU by index: whole rows are
    copied, and none is looked at element by element; on a GPU the index would have to be waited for."""
    if embeddings.device.type != "cpu":
        return embeddings.masked_scatter(places.unsqueeze(-1), vectors)
    rows = places[0].nonzero().squeeze(1)
    return embeddings.index_copy(1, rows, vectors[: len(rows)].unsqueeze(0))


def configurations(config: Any) -> list[Any]:
    """A configuration and those of its parts, outermost first: setting the attention of the first sets the others."""
    return [config, *(part for name in ("text_config", "vision_config") if (part := getattr(config, name, None)) is not None)]
