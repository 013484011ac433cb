"""BLIP's key encoder and its queue: vectors that contrast compares with, which change slowly and come from earlier batches too.

The encoder is a running average of the whole model, in float32 on every rank: 4 bytes per parameter. The queue holds 4 (Q + 1) D bytes
per pair, in the order of the global batch, whatever ranks held the pairs; it starts with random directions. Both are state of
checkpoints.

Shape letters: n pairs of a rank, N pairs of all ranks, Q queries, D common width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from terrace.data.order.permutation import seed_of
from terrace.models.attention import use_attention
from terrace.models.build import meta_model, restore_buffers
from terrace.models.families.registry import family_of_model
from terrace.models.precision import compute_context
from terrace.objectives.interface import Opening
from terrace.objectives.self_supervised import newest, unit
from terrace.objectives.teacher import Follower
from terrace.objectives.two_towers import wide
from terrace.recipe.schema_pairs import MatchingOptions

UNUSED = ("itm_head.", "text_head.", "temperature")  # tensors that no vector comes from


class Keys:
    def __init__(self, options: MatchingOptions, opening: Opening) -> None:
        self.options, self._opening = options, opening
        config, rng = opening.feed.config, np.random.default_rng(seed_of("queue", opening.stage.seed))
        shapes = {"images": (options.queue, config.num_query_tokens, config.image_text_hidden_size)}
        shapes["texts"] = (options.queue, config.image_text_hidden_size)
        device = opening.context.device
        self.queue = {
            name: unit(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(device)) for name, shape in shapes.items()
        }
        self._encoder: Follower | None = None

    def encoder(self, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> Follower:
        """Begins as a copy of the model where no checkpoint brought it."""
        if self._encoder is None:
            self._encoder = self._new_encoder()
            self._encoder.copy(weights())
        return self._encoder

    def _new_encoder(self) -> Follower:
        model = meta_model(self._opening.feed.config)
        use_attention(model, "sdpa")
        model.to_empty(device=self._opening.context.device)
        restore_buffers(model)
        model.requires_grad_(False).eval()
        return Follower(model, {name: one for name, one in model.named_parameters() if not name.startswith(UNUSED)})

    def vectors(self, batches: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, Q, D] of pictures and [n, D] of texts. The encoder is there by now."""
        assert self._encoder is not None
        model, found = self._encoder.model, []
        family = family_of_model(model)
        with torch.no_grad(), compute_context(self._opening.stage.precision, self._opening.context.device):
            for batch in batches:
                if batch.pixels is None:
                    continue
                pixels = family.inputs(family.normalised(batch.pixels, batch.dtype), batch.images)["pixel_values"]
                images = family.query_vectors(model, family.seen(model, pixels))
                found.append((wide(images), wide(family.caption_vectors(model, batch.ids, batch.mask))))
        empty = [values[:0] for values in self.queue.values()]
        return tuple(torch.cat([empty[side], *(one[side] for one in found)]) for side in (0, 1))

    def with_queue(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([images, self.queue["images"].to(images)]), torch.cat([texts, self.queue["texts"].to(texts)])

    def weight(self, step: int) -> float:
        """Share of the target that the encoder has in step `step` (from 0)."""
        rising = self.options.distillation_warmup
        return self.options.distillation * (min(1.0, step / rising) if rising else 1.0)

    def remember(self, images: torch.Tensor, texts: torch.Tensor, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """After the optimizer's step: the batch's keys, in the order of the data, enter the queue, and the encoder follows."""
        assert self._encoder is not None
        if self.options.queue:
            for name, rows in (("images", images), ("texts", texts)):
                self.queue[name] = newest(self.queue[name], rows, self.options.queue)
        self._encoder.follow(weights, float(self.options.momentum or 0.0))

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.options.queue:
            yield from ((f"queue.{name}", rows) for name, rows in self.queue.items())
        if self._encoder is not None:
            yield from self._encoder.state()

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        if self.options.queue:
            device = self._opening.context.device
            self.queue = {name: source(f"queue.{name}").to(device).clone() for name in self.queue}
        self._encoder = self._new_encoder()
        self._encoder.load(source)
