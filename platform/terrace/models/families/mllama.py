"""Mllama with torch: the class's layers one by one, those that read pictures with the row of tokens that sees the same of them.

The class's own forward takes a mask over all tokens and all tiles of all pictures. What it lets a token see is kept: the real tiles of the
last picture before it, and of those that stand in a row with that one; in front of a sample's first picture, all vectors of all pictures of
the sample, blank tiles among them, with the feed-forward shut; without a picture the layers do nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from terrace.families.mllama import Mllama
from terrace.models.batch import DeviceBatch, ImageFacts
from terrace.models.families.crossing import BESIDE, Crossing, CrossingModel, Run, prompt_ends, runs_at, runs_of_rows
from terrace.models.families.interface import Features
from terrace.recipe.schema import PartName

LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.")
TOWER = re.compile(r"model\.vision_model\.(global_)?transformer\.layers\.(\d+)\.")


class MllamaModel(CrossingModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.vision_model.", "vision"),
        ("model.multi_modal_projector.", "projector"),
        ("model.language_model.", "language"),
        ("lm_head.", "language"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {
        "vision": "model.vision_model.transformer.layers", "language": "model.language_model.layers"
    }  # fmt: skip
    published: ClassVar[Sequence[tuple[str, str]]] = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    family: Mllama

    # ------------------------------------------------------------ names

    def part_of(self, name: str) -> PartName:
        layer = LAYER.match(name)
        return "projector" if layer and int(layer.group(1)) in self.family.crossing else super().part_of(name)

    def block_number(self, name: str) -> int | None:
        """The tower's global layers stand behind its others; of the language model, layers that read pictures are not counted."""
        if tower := TOWER.match(name):
            return int(tower.group(2)) + (self.family.depth if tower.group(1) else 0)
        layer = LAYER.match(name)
        if layer is None or int(layer.group(1)) in self.family.crossing:
            return None
        return int(layer.group(1)) - sum(number < int(layer.group(1)) for number in self.family.crossing)

    def blocks_of(self, model: Any, part: PartName) -> list[Any]:
        if part == "vision":
            tower = self.vision(model)
            return [*tower.transformer.layers, *tower.global_transformer.layers]
        if part == "language":
            return [layer for number, layer in enumerate(self.language(model).layers) if number not in self.family.crossing]
        return []

    def position_tables(self, names: Any) -> list[str]:
        return []

    def image_id(self, config: Any) -> int:
        return int(config.image_token_id)

    def vision(self, model: Any) -> Any:
        return model.model.vision_model

    # ------------------------------------------------------------ pictures

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        """Tiles in their places of each picture's canvas; blank ones behind them."""
        side, most = self.family.side, self.family.most_tiles
        counts = images.facts.prod(dim=1)
        there = (torch.arange(most)[None] < counts[:, None]).to(values.device)  # [I, T]
        tiles = values.new_zeros(len(counts), most, 3, side, side)
        tiles[there] = values.reshape(-1, 3, side, side)
        numbers = torch.tensor([[self.family.number(*facts)] for facts in images.facts.tolist()], device=values.device)
        return {"pixel_values": tiles[:, None], "aspect_ratio_ids": numbers, "aspect_ratio_mask": there[:, None].long()}

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        seen = model.model.vision_model(**self.inputs(values, images)).last_hidden_state  # [I, 1, T, n, given]
        return Features(model.model.multi_modal_projector(seen[:, 0].flatten(1, 2)))

    def crossing(self, states: torch.Tensor, batch: DeviceBatch, ids: np.ndarray, image_id: int) -> Crossing:
        facts = batch.image_facts
        tiles = facts.facts.prod(dim=1).tolist() if facts is not None else []
        runs, open_, fed = [], np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32)
        for start, end, first, last, before in rows_of(ids, image_id, batch.boundaries):
            whole = self.family.most_tiles * self.family.vectors
            if first == last:
                open_[start:end] = 0.0
                runs.append(Run(start, end, ((0, 1),)))
            elif before:
                runs.append(Run(start, end, ((first * whole, last * whole),)))
            else:
                fed[start:end] = 1.0
                each = ((number * whole, number * whole + tiles[number] * self.family.vectors) for number in range(first, last))
                runs.append(Run(start, end, tuple(each)))
        gates = torch.from_numpy(np.stack([fed, open_])).to(batch.device)
        return Crossing(states, runs, gates[:1], None if open_.all() else gates[1])

    # ------------------------------------------------------------ the language model

    def run_language(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        options, inner, hidden = dict(options), self.language(model), embeddings
        crossing, states, past = options.pop("crossing", None), None, None
        if crossing is None:
            crossing, past = self.beside(options["decode"].beside, embeddings.shape[1])
        else:
            states = crossing.states.flatten(0, 1)[None].to(hidden.dtype)
        keep = options.get("keep")
        crossing.kept = None if keep is None else []
        turned = inner.rotary_emb(hidden, position_ids=positions[0])
        fed = crossing.gate[:, None, :, None].to(hidden.dtype)
        for number, layer in enumerate(inner.layers):
            if number in self.family.crossing:
                hidden = layer(
                    hidden, cross_attention_states=states, cross_attention_mask=None, attention_mask=None,
                    full_text_row_masked_out_mask=fed, past_key_values=past, crossing=crossing,
                )  # fmt: skip
            else:
                hidden = layer(hidden, attention_mask=None, position_ids=positions[0], position_embeddings=turned, **options)
        if keep is not None:
            keep[BESIDE] = _kept_beside(crossing, prompt_ends(options))
        return inner.norm(hidden)[0]

    def beside(self, rows: Any, tokens: int) -> tuple[Crossing, Any]:
        """While decoding: what the layers are told, and in place of a cache of the class their keys and values of the prompts' pictures.

        `rows` are the cache's: keys and values [B, n, K, D] of each layer in turn, vectors and gate of each prompt [B], and the prompt of
        each row [R]."""
        *blocks, counts, gates, prompts = rows
        room, known = blocks[0].shape[1], counts.tolist()
        runs = [Run(start, end, ((one * room, one * room + known[one]),)) for start, end, one in runs_of_rows(prompts, tokens)]
        gate = gates.to(prompts.device)[prompts].repeat_interleave(tokens // len(prompts))
        flat = [block.flatten(0, 1).transpose(0, 1)[None] for block in blocks]  # [1, K, B * n, D]
        layers = zip(self.family.crossing, flat[::2], flat[1::2])
        past = SimpleNamespace(layers={number: SimpleNamespace(keys=keys, values=values) for number, keys, values in layers})
        return Crossing(blocks[0], runs, gate[None], gate), past


def _kept_beside(crossing: Crossing, ends: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Of each prompt's last token: keys and values [B, n, K, D] that it sees in each layer, filled up, how many, and its gate."""
    runs, parts = runs_at(crossing.runs, ends), []
    for key, value in crossing.kept or ():
        for block in (key, value):
            seen = [torch.cat([block[0, :, start:end] for start, end in run.spans], dim=1).transpose(0, 1) for run in runs]
            parts.append(pad_sequence(seen, batch_first=True))
    gate = crossing.gate[0, list(ends)]
    return *parts, torch.tensor([sum(end - start for start, end in run.spans) for run in runs]), gate.cpu()


def rows_of(ids: np.ndarray, image_id: int, boundaries: Sequence[int]) -> Iterator[tuple[int, int, int, int, bool]]:
    """(start, end, first, last, before): tokens [start, end) see the pictures [first, last) of the pack, none where these are equal;
    `before`: they stand in front of the first picture of their sample."""
    shown = 0
    for start, end in itertools.pairwise(boundaries):
        places = (start + np.flatnonzero(ids[start:end] == image_id)).tolist()
        if (until := places[0] if places else end) > start:
            yield start, until, shown, shown + len(places), True
        first = shown
        for number, (place, behind) in enumerate(itertools.pairwise([*places, end])):
            if number and place > places[number - 1] + 1:
                first = shown + number
            yield place, behind, first, shown + number + 1, False
        shown += len(places)


MODEL = MllamaModel
