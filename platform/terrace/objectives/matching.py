"""BLIP-2's first stage: contrast, matching and writing over pairs of a picture and its caption, weighted and mixed in one step.

The formulas stand in `matching_losses`; the loop divides by the pairs of the global batch. Contrast and the choice of hard negatives
need the vectors of all pairs, so a step first runs every pack without gradient; the ranks exchange vectors, texts and the pictures
that somebody draws as a negative; then each pack runs again with gradient, with its slopes and its negatives. Neither the size of
packs nor the number of ranks changes the loss, a gradient or a draw: a negative is drawn with (stage seed, source, sample, epoch)
over the pairs in the order of the data.

Shape letters: B pairs of a pack, n pairs of a rank, N pairs of all ranks, L tokens, Q queries, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from terrace.data.types import PackedExample
from terrace.models.batch import ImageFacts, image_facts
from terrace.models.families.registry import family_model, family_of_model
from terrace.objectives.chance import generator_of
from terrace.objectives.interface import Opening
from terrace.objectives.matching_losses import Share, contrast, drawn_negatives, similarities, smoothed
from terrace.objectives.packs import PackObjective
from terrace.objectives.retrieval import recalls_of_scores
from terrace.objectives.two_towers import wide
from terrace.recipe.schema_pairs import MatchingOptions
from terrace.worker.collectives import gather_objects, gather_rows, gather_tensors

TERMS = ("itc", "itm", "itg")


@dataclass
class Negatives:
    """What a pack's pairs are told apart from: a text each and a picture each; a weight of 0 where there is no other."""

    ids: torch.Tensor  # int64 [B, L]
    mask: torch.Tensor  # int64 [B, L]
    pixels: torch.Tensor  # uint8 [B, values]
    weights: torch.Tensor  # float32 [B, 2]


@dataclass
class MatchBatch:
    """Pairs on the device. `results` is filled by the loss."""

    pairs: int
    ids: torch.Tensor  # int64 [B, L]
    mask: torch.Tensor  # int64 [B, L]
    pixels: torch.Tensor | None  # uint8 [B, values]; None where there is no pair
    images: ImageFacts
    dtype: torch.dtype
    share: Share | None = None
    negatives: Negatives | None = None
    vectors_only: bool = False
    results: dict[str, torch.Tensor] = field(default_factory=dict)


class Matching(PackObjective):
    coupled = True
    measured = True

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self.options = opening.stage.matching or MatchingOptions()
        self._family = family_model(opening.feed.config)
        self._shares: dict[int, Share] = {}  # by pack
        self._negatives: dict[int, Negatives] = {}
        self._of_matches, self._of_tokens = 1.0, 1.0  # to what a loss per pair makes of means over matches and over tokens
        self._sums: dict[str, float] = {}
        self._pairs = 1.0

    # ------------------------------------------------------------ a step

    def before(self, examples: Sequence[PackedExample], scale: float) -> None:
        context = self.opening.context
        self._shares, self._negatives, self._sums = {}, {}, dict.fromkeys((*TERMS, "right", "matches"), 0.0)
        batches = [self._batch(example) for example in examples]
        images, texts, temperature = self._vectors_of(batches)
        counts = [int(count) for count in gather_rows([float(len(images))], context)[:, 0]]
        first = sum(counts[: context.rank])
        own = slice(first, first + len(images))
        everything = gather_tensors(images, counts, context), gather_tensors(texts, counts, context)
        share, logits = contrast(*everything, temperature, self.options.label_smoothing, own)
        written = self._exchanged(examples)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(map(tuple, written.texts)))}
        which = np.asarray([numbers[tuple(text)] for text in written.texts], np.int64)
        text, picture = drawn_negatives(logits, which[:, None] == which[None], written.order, written.draws)
        matches = sum(counts) + int((text >= 0).sum() + (picture >= 0).sum())
        tokens = sum(len(one) - 1 for one in written.texts)
        self._of_matches, self._of_tokens = sum(counts) / max(1, matches), sum(counts) / max(1, tokens)
        pictures = self._pictures(batches, picture, counts)
        start = 0
        for example in examples:
            stop = start + len(example.sample_ids)
            if stop > start:
                self._shares[example.pack] = share.part(start, stop)
                rows = slice(first + start, first + stop)
                self._negatives[example.pack] = self._negative_rows(written.texts, text[rows], picture[rows], pictures)
            start = stop

    def _vectors_of(self, batches: Sequence[MatchBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[n, Q, D] of pictures, [n, D] of texts and the temperature, without gradient."""
        for batch in batches:
            batch.vectors_only = True
            self.strategy.loss(batch)
        images, texts = (torch.cat([batch.results[name] for batch in batches]) for name in ("images", "texts"))
        return images, texts, batches[0].results["temperature"]

    def _exchanged(self, examples: Sequence[PackedExample]) -> Written:
        """Of all ranks' pairs, in the order of ranks: their texts, their places in the data, and their draws."""
        rows: list[tuple[bytes, int, int, float, float]] = []
        for example in examples:
            for place, text in enumerate(_texts(example)):
                name = (self.opening.stage.seed, example.sources[place], example.sample_ids[place], int(example.epochs[place]))
                draws = [float(generator_of(*name, purpose).random()) for purpose in ("negative text", "negative picture")]
                rows.append((np.asarray(text, np.int32).tobytes(), example.pack, place, *draws))
        everyone = [row for rank in gather_objects(rows, self.opening.context) for row in rank]
        order = np.asarray(sorted(range(len(everyone)), key=lambda number: everyone[number][1:3]), np.int64)
        texts = [np.frombuffer(row[0], np.int32) for row in everyone]
        return Written([text.tolist() for text in texts], order, np.asarray([row[3:] for row in everyone], np.float64).reshape(-1, 2))

    def _pictures(self, batches: Sequence[MatchBatch], drawn: np.ndarray, counts: Sequence[int]) -> dict[int, torch.Tensor]:
        """The pictures that somebody draws, by the number of their pair; each travels once."""
        context = self.opening.context
        wanted = np.unique(drawn[drawn >= 0])
        starts = np.concatenate([[0], np.cumsum(counts)])
        mine = [torch.cat([batch.pixels for batch in batches if batch.pixels is not None])] if counts[context.rank] else []
        per_rank = [wanted[(wanted >= low) & (wanted < high)] for low, high in itertools.pairwise(starts)]
        width = self._family.family.row_values
        local = torch.as_tensor(per_rank[context.rank] - starts[context.rank], device=context.device)
        rows = mine[0][local] if mine else torch.zeros(0, width, dtype=torch.uint8, device=context.device)
        gathered = gather_tensors(rows, [len(one) for one in per_rank], context) if len(wanted) else rows
        return dict(zip((int(number) for one in per_rank for number in one), gathered))

    def _negative_rows(
        self, texts: Sequence[Sequence[int]], text: np.ndarray, picture: np.ndarray, pictures: dict[int, torch.Tensor]
    ) -> Negatives:
        ids, mask = self._family.text_rows([np.asarray(texts[max(0, place)]) for place in text], self.opening.feed.config)
        device = self.opening.context.device
        blank = torch.zeros(self._family.family.row_values, dtype=torch.uint8, device=device)
        rows = torch.stack([pictures.get(int(place), blank) for place in picture])
        weights = torch.from_numpy(np.stack([text >= 0, picture >= 0], axis=1).astype(np.float32))
        return Negatives(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), rows, weights.to(device))

    def batch(self, example: PackedExample) -> MatchBatch:
        batch = self._batch(example)
        batch.share, batch.negatives = self._shares.get(example.pack), self._negatives.get(example.pack)
        return batch

    def _batch(self, example: PackedExample) -> MatchBatch:
        device, pairs = torch.device(self.opening.context.device), len(example.sample_ids)
        ids, mask = self._family.text_rows(_texts(example) or [np.zeros(1, np.int64)], self.opening.feed.config)
        pixels = torch.from_numpy(example.pixels).to(device) if pairs else None
        return MatchBatch(
            pairs, torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), pixels, image_facts(example), self.opening.dtype
        )

    def loss(self, model: Any, batch: MatchBatch) -> torch.Tensor:
        family, options = family_of_model(model), self.options
        if batch.pixels is None:
            values, images = family.blank(batch.ids.device, family.compute_dtype(model))
        else:
            values, images = family.normalised(batch.pixels, batch.dtype), batch.images
        seen = family.seen(model, family.inputs(values, images)["pixel_values"])
        vectors, texts = wide(family.query_vectors(model, seen)), wide(family.caption_vectors(model, batch.ids, batch.mask))
        temperature = wide(model.temperature).reshape(())
        if batch.vectors_only:
            batch.results = {
                "images": vectors.detach()[: batch.pairs], "texts": texts.detach()[: batch.pairs], "temperature": temperature.detach(),
            }  # fmt: skip
            return vectors.detach().sum() * 0.0
        none = torch.zeros(len(batch.ids), 2, device=batch.ids.device)
        negatives = batch.negatives or Negatives(batch.ids, batch.mask, torch.zeros(0), none)
        matched = self._matches(model, family, seen, batch, negatives)
        written = self._writes(model, family, seen, batch)
        if batch.share is None or not batch.pairs:
            unused = (vectors.sum(), texts.sum(), temperature, matched[0], written)
            return sum((0.0 * one for one in unused), torch.zeros((), device=batch.ids.device))
        share = batch.share
        linear = (vectors * share.images).sum() + (texts * share.texts).sum() + temperature * share.temperature.sum()
        contrasted = share.loss.sum() + (linear - linear.detach())
        batch.results = {
            "itc": contrasted.detach(), "itm": matched[0].detach() * self._of_matches, "itg": written.detach() * self._of_tokens,
            "right": matched[1], "matches": batch.pairs + negatives.weights.sum(),
        }  # fmt: skip
        return options.itc * contrasted + options.itm * self._of_matches * matched[0] + options.itg * self._of_tokens * written

    def _matches(
        self, model: Any, family: Any, seen: torch.Tensor, batch: MatchBatch, negatives: Negatives
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy of three pairs for each, and how many are told apart rightly."""
        other = seen
        if negatives.pixels.numel():
            values = family.normalised(negatives.pixels, batch.dtype)
            other = family.seen(model, family.inputs(values, batch.images)["pixel_values"])
        longest = max(batch.ids.shape[1], negatives.ids.shape[1])
        ids = [F.pad(one, (0, longest - one.shape[1]), value=model.config.text_config.pad_token_id) for one in (batch.ids, negatives.ids)]
        masks = [F.pad(one, (0, longest - one.shape[1])) for one in (batch.mask, negatives.mask)]
        logits = wide(family.match_logits(
            model, torch.cat([seen, seen, other]), torch.cat([ids[0], ids[1], ids[0]]), torch.cat([masks[0], masks[1], masks[0]])
        ))  # fmt: skip
        pairs = len(batch.ids)
        labels = torch.cat([torch.ones(pairs, dtype=torch.int64), torch.zeros(2 * pairs, dtype=torch.int64)]).to(logits.device)
        weights = torch.cat([torch.ones(pairs, device=logits.device), negatives.weights[:, 0], negatives.weights[:, 1]])
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * weights).sum(), ((logits.argmax(1) == labels).float() * weights).sum()

    def _writes(self, model: Any, family: Any, seen: torch.Tensor, batch: MatchBatch) -> torch.Tensor:
        """Summed over the tokens behind the first."""
        ids = batch.ids.clone()
        ids[:, 0] = model.config.image_token_index
        logits = wide(family.written_logits(model, seen, ids, batch.mask))
        targets = batch.mask[:, 1:].bool()
        losses = smoothed(logits[:, :-1][targets], batch.ids[:, 1:][targets], self.options.label_smoothing)
        return losses.sum() + 0.0 * logits.sum()  # of a pack without a token, too

    # ------------------------------------------------------------ figures

    def seen(self, example: PackedExample, batch: MatchBatch) -> None:
        for name, value in batch.results.items():
            if name in self._sums:
                self._sums[name] += float(value)

    def values(self, ran: bool) -> dict[str, Any]:
        """The three losses as they are summed up, before their weights, and the share of matches that are told rightly."""
        if not ran:
            return {}
        names = (*TERMS, "right", "matches")
        sums = dict(zip(names, self.opening.total([self._sums[name] for name in names]).tolist()))
        return {f"{name}_loss": sums[name] / self._pairs for name in TERMS} | {"match_accuracy": sums["right"] / max(1.0, sums["matches"])}

    def mean(self, total: float, divisor: float) -> float:
        self._pairs = max(1.0, divisor)
        return super().mean(total, divisor)

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Of each kind of held-out pairs the contrast of all of them as one batch, and recalls both ways."""
        alive()
        found: dict[str, float] = {}
        self.strategy.model.eval()
        for kind, packs in sorted(self.opening.feed.held_out.items()):
            batches = []
            for pack in packs:  # held-out pairs are few: every rank looks at all of them
                batches.append(self._batch(pack))
                images, texts, temperature = self._vectors_of(batches[-1:])
                alive()
            images, texts = (torch.cat([batch.results[name] for batch in batches]) for name in ("images", "texts"))
            share, _ = contrast(images, texts, temperature, self.options.label_smoothing, slice(None))
            found[f"{kind}/loss"] = float(share.loss.double().mean())
            captions = [text.tobytes() for pack in packs for text in _texts(pack)]
            found |= {f"{kind}/{name}": value for name, value in recalls_of_scores(similarities(images, texts), captions).items()}
        self.strategy.model.train()
        return found


open_objective = Matching


@dataclass(frozen=True)
class Written:
    """Of the pairs of all ranks, in the order of ranks: token ids, numbers in the order of the data, and two draws each."""

    texts: list[list[int]]
    order: np.ndarray
    draws: np.ndarray


def _texts(example: PackedExample) -> list[np.ndarray]:
    return np.split(example.input_ids, example.segment_ends[:-1]) if example.sample_ids else []

