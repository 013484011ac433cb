"""What a stage's data looks like to the model, as plain values for a page: samples and packs with their pictures and tokens.

Nothing is drawn from the raw rows. Packs come from the stage's own plan, and every segment goes through `collate.make_segment`
like in training: pictures are put back together from its patches, text is decoded from its token ids, and a token counts as
supervised exactly when the loss has a target for it. What the page shows is therefore what training reads, faults included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from terrace.data.index.source_index import SourceIndex
from terrace.data.order.eligible import source_pixels
from terrace.data.order.fixed import plan_of
from terrace.data.order.permutation import permute, seed_of
from terrace.data.order.plan import PADDING_WINDOW, StagePlan
from terrace.data.pieces import RUNNING_TEXT
from terrace.data.sources.ingest import iter_refused
from terrace.data.sources.refusals import RefusedSample
from terrace.data.stream.collate import NO_TARGET, CollateSettings, LoadedSample, Segment, image_pixels, make_segment
from terrace.data.stream.read import read_located
from terrace.data.stream.tasks import TaskSettings
from terrace.data.template import encode_prompt
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import PackSpec, Sample, SampleRef
from terrace.errors import DamagedData
from terrace.families.interface import Family, View
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe, Stage

PLANNED_PACKS = 256  # packs whose fill and shares are counted: planned, not decoded
SHOWN_TOKENS = 6_000  # of one segment; the rest is counted
REFUSALS_PER_REASON = 3


@dataclass(frozen=True)
class Mark:
    """A box (x1, y1, x2, y2) or point (x, y) in whole pixels of the resized picture."""

    values: tuple[int, ...]
    answer: bool  # in what the model is to say, not in the question


@dataclass(frozen=True)
class Picture:
    """One image or video frame after resizing."""

    number: int  # of the image in its sample, from 0
    pixels: np.ndarray  # uint8 [H, W, 3]
    original: tuple[int, int]  # (width, height)
    marks: tuple[Mark, ...]
    grid: int = 0  # pixels between the lines that show its tokens or tiles; 0: none
    made: str = ""  # of a view: how it comes about


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one sort. `text`: one string per token (several where only together they are characters)."""

    kind: str  # text, mark (a special token), image, video, or rest: tokens that are not shown
    pieces: tuple[str, ...]
    supervised: bool
    tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)  # image and video: temporal patches, rows, columns of tokens
    images: tuple[int, ...] = ()  # and the sample's image numbers, several for a video


@dataclass(frozen=True)
class ShownSegment:
    """One sample as it stands in a pack, or alone."""

    source: str
    id: str
    kind: str
    start: int  # first token within the pack
    tokens: int
    visual_tokens: int
    supervised_tokens: int = 0
    runs: tuple[Run, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    damage: str = ""


@dataclass(frozen=True)
class ShownPack:
    pack: int
    step: int
    window: int
    sequence_length: int
    segments: tuple[ShownSegment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True)
class SourceFacts:
    """One source of the stage: all its healthy samples, and what the planned packs take of it."""

    name: str
    uri: str
    samples: int
    held_out: int
    lengths: np.ndarray  # int32 [N]: tokens of each training sample at the stage's resolution
    visual_tokens: np.ndarray  # int32 [N]
    kinds: dict[str, int]
    refused: dict[str, int]
    refusals: tuple[RefusedSample, ...]  # a few per reason
    weight: float = 0.0  # planned share of the samples
    changes: dict[str, int] = field(default_factory=dict)  # see order.eligible.told_changes
    packed_samples: int = 0  # within the planned packs
    packed_tokens: int = 0


@dataclass(frozen=True)
class Inspection:
    """Everything the page shows."""

    stage: str
    objective: str
    sequence_length: int
    pixels: tuple[int, int]
    sources: tuple[SourceFacts, ...]
    samples: tuple[ShownSegment, ...]
    packs: tuple[ShownPack, ...]
    fills: tuple[float, ...]  # of the planned packs
    vocabulary_size: int


def inspect_stage(recipe: Recipe, stage_index: int, prepared: Any, samples: int, packs: int, seed: int = 0) -> Inspection:
    """Read `samples` samples (spread over the sources) and the first `packs` packs of a stage over its prepared data.

    Objectives that read no packs of the data path have samples here, grpo's up to the answer's first token, and no
    packs. A damaged sample is shown with its damage.
    """
    stage = recipe.stages[stage_index]
    settings = TaskSettings.of(recipe, stage_index, prepared)
    tokenizer = prepared.tokenizer()
    plan = plan_of(recipe, stage_index, prepared) if OBJECTIVES[stage.objective].reads_packs else None
    planned = _planned_packs(plan)
    facts = plan.explain()["sources"] if plan else {}
    taken = Counter(ref.source for spec in planned for ref in spec.samples)
    tokens: Counter[str] = Counter()
    for spec in planned:
        for ref, length in zip(spec.samples, spec.lengths):
            tokens[ref.source] += length
    sources, shown = [], []
    for name in stage.mixture.weights:
        index, source = prepared.indexes[name], recipe.data.sources[name]
        bounds = source_pixels(source, (stage.pixels.min, stage.pixels.max), prepared.family)
        sources.append(
            SourceFacts(
                name=name,
                uri=source.uri,
                samples=len(index),
                held_out=len(index.holdout_rows),
                lengths=index.lengths(bounds)[index.train_rows],
                visual_tokens=index.visual_tokens(bounds)[index.train_rows],
                kinds=dict(zip(index.kinds, np.bincount(index.kind_codes[:], minlength=len(index.kinds)).tolist())),
                refused=index.refused,
                refusals=_some_refusals(index),
                weight=facts.get(name, {}).get("share_of_samples", 0.0),
                changes=facts.get(name, {}).get("changes", {}),
                packed_samples=taken[name],
                packed_tokens=tokens[name],
            )
        )
        count = -(-samples // len(stage.mixture.weights))
        limit = bounds[1] if bounds[1] != stage.pixels.max else 0
        for row, note in choose_rows(index, bounds, count, seed):
            spec = _alone(index, row, bounds, limit)
            shown += _segments(spec, tokenizer, settings, (note,) if note else (), prompts=stage.objective == "grpo")
    return Inspection(
        stage=stage.name,
        objective=stage.objective,
        sequence_length=stage.sequence_length,
        pixels=(stage.pixels.min, stage.pixels.max),
        sources=tuple(sources),
        samples=tuple(shown),
        packs=tuple(_shown_pack(spec, stage, tokenizer, settings) for spec in planned[:packs]),
        fills=tuple(sum(spec.lengths) / stage.sequence_length for spec in planned),
        vocabulary_size=tokenizer.vocabulary_size,
    )


def choose_rows(index: SourceIndex, bounds: tuple[int, int], count: int, seed: int) -> list[tuple[int, str]]:
    """(row, note) of training samples to look at: a seeded draw, and from five on the shortest and the longest of all."""
    rows = index.train_rows
    count = min(count, len(rows))
    lengths = index.lengths(bounds)[rows]
    extremes = []
    if count >= 5:
        extremes = [(int(rows[lengths.argmin()]), "the shortest of the source"), (int(rows[lengths.argmax()]), "the longest of the source")]
    drawn = rows[permute(np.arange(count), len(rows), seed_of("inspect", seed))].tolist()
    known = {row for row, _ in extremes}
    return [(row, "") for row in drawn if row not in known][: count - len(known)] + extremes


def _planned_packs(plan: StagePlan | None) -> list[PackSpec]:
    """The stage's first packs, without the empty ones behind its last sample."""
    if plan is None:
        return []
    specs = plan.packs(0, min(PLANNED_PACKS, plan.total_steps * plan.stage.batch.packs))
    return [spec for spec in specs if spec.window != PADDING_WINDOW]


def _some_refusals(index: SourceIndex) -> tuple[RefusedSample, ...]:
    """The first few refused samples of each reason."""
    if not index.refused:
        return ()
    seen: Counter[str] = Counter()
    chosen = []
    for line in iter_refused(index.folder, index.storage):
        seen[line.reason] += 1
        if seen[line.reason] <= REFUSALS_PER_REASON:
            chosen.append(line)
    return tuple(sorted(chosen, key=lambda line: -index.refused.get(line.reason, 0)))


# ---------------------------------------------------------------- segments


def _alone(index: SourceIndex, row: int, bounds: tuple[int, int], limit: int) -> PackSpec:
    """A pack of one sample, whole, whatever the stage's sequence length."""
    return PackSpec(
        pack=0,
        samples=(SampleRef(index.name, row, str(index.ids[row])),),
        lengths=(int(index.lengths(bounds)[row]),),
        visual_tokens=(int(index.visual_tokens(bounds)[row]),),
        pixel_rows=int(index.pixel_rows(bounds)[row]),
        window=0,
        pixels_max=(limit,) if limit else (),
    )


def _shown_pack(spec: PackSpec, stage: Stage, tokenizer: TextTokenizer, settings: TaskSettings) -> ShownPack:
    segments = tuple(_segments(spec, tokenizer, settings))
    if OBJECTIVES[stage.objective].views:
        segments = tuple(_with_views(segment, stage, epoch) for segment, epoch in zip(segments, spec.epochs))
    return ShownPack(spec.pack, spec.pack // stage.batch.packs, spec.window, settings.collate.sequence_length, segments)


def _segments(
    spec: PackSpec, tokenizer: TextTokenizer, settings: TaskSettings, notes: tuple[str, ...] = (), prompts: bool = False
) -> Iterator[ShownSegment]:
    """The segments of a pack, each made as training makes it."""
    locations = [settings.indexes[ref.source].location(ref.row) for ref in spec.samples]
    start = 0
    for number, (ref, location, result) in enumerate(zip(spec.samples, locations, read_located(locations))):
        told = list(notes)
        if spec.spans and spec.spans[number]:
            told.append("tokens {} to {} of the sample".format(*spec.spans[number]))
        if spec.pixels_max and spec.pixels_max[number]:
            told.append(f"at most {spec.pixels_max[number]:,} pixels an image")
        facts = {
            "source": ref.source, "id": ref.id, "kind": location.kind, "start": start, "tokens": spec.lengths[number],
            "visual_tokens": spec.visual_tokens[number], "notes": tuple(told),
        }  # fmt: skip
        start += spec.lengths[number]
        try:
            if isinstance(result, DamagedData):
                raise result
            sample, images = result
            loaded = LoadedSample(sample, images, location.sizes)
            segment = (_prompt if prompts else make_segment)(spec, number, loaded, tokenizer, settings.collate)
        except DamagedData as damage:
            yield ShownSegment(**facts, damage=str(damage))
            continue
        supervise = settings.collate.supervise.get(ref.source, "auto")
        yield ShownSegment(
            **facts,
            supervised_tokens=int((segment.targets >= 0).sum()),
            runs=tuple(token_runs(segment, tokenizer, settings.collate.family)),
            pictures=tuple(_pictures(segment, loaded, supervise, settings.collate.family)),
        )


def _with_views(segment: ShownSegment, stage: Stage, epoch: int) -> ShownSegment:
    """With the views of its picture behind it."""
    from terrace.data.look.views import shown_views  # here, so that other stages need no torch

    views = tuple(
        Picture(picture.number, pixels, picture.original, (), made=made)
        for picture in segment.pictures
        for made, pixels in shown_views(picture.pixels, stage, segment.source, segment.id, epoch)
    )
    return replace(segment, pictures=segment.pictures + views)


def _prompt(spec: PackSpec, number: int, loaded: LoadedSample, tokenizer: TextTokenizer, settings: CollateSettings) -> Segment:
    """A sample up to its answer, as a rollout reads it."""
    encoded = encode_prompt(loaded.sample, loaded.sizes, tokenizer, settings.family, spec.bounds(number, settings.pixels))
    rows = [
        image_pixels(loaded, images, view, settings, spec.samples[number]) for images, view in zip(encoded.images, encoded.views)
    ]
    return Segment(encoded, np.full(len(encoded.input_ids), NO_TARGET, np.int32), rows)


def token_runs(segment: Segment, tokenizer: TextTokenizer, family: Family) -> Iterator[Run]:
    """The segment's tokens in order, cut where their sort or their supervision changes."""
    marks = {token: role for role, token in tokenizer.marks(family).items()}
    ids = segment.encoded.input_ids.tolist()
    supervised = [False, *(segment.targets[:-1] >= 0).tolist()]
    kinds = [role if (role := marks.get(token)) in ("image", "video") else ("mark" if role else "text") for token in ids]
    visuals = zip(segment.encoded.visuals, segment.encoded.images)
    place = 0
    while place < len(ids):
        kind, flag, end = kinds[place], supervised[place], place + 1
        if kind in ("image", "video"):
            visual, images = next(visuals)
            end = place + visual.tokens
            yield Run(kind, (), False, end - place, family.token_grid(visual.facts), images)
        elif kind == "mark":
            yield Run(kind, (tokenizer.decode([ids[place]]),), flag, 1)
        else:
            if place >= SHOWN_TOKENS:
                yield Run("rest", (), False, len(ids) - place)
                return
            while end < min(len(ids), max(SHOWN_TOKENS, place + 1)) and (kinds[end], supervised[end]) == (kind, flag):
                end += 1
            yield Run(kind, tuple(token_pieces(ids[place:end], tokenizer)), flag, end - place)
        place = end


def token_pieces(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """The text of each token; tokens that hold parts of one character come together. Joined, it is the text of `ids`."""
    pieces, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd") or len(waiting) == 4:  # four bytes are the longest character
            pieces.append(text)
            waiting = []
    if waiting:
        pieces.append(tokenizer.decode(waiting))
    whole = tokenizer.decode(ids)
    return pieces if "".join(pieces) == whole else [whole]  # tokenizers whose decoder looks at neighbours


def _pictures(segment: Segment, loaded: LoadedSample, supervise: str, family: Family) -> Iterator[Picture]:
    """The images and frames that the segment keeps, from its rows of pixels."""
    encoded = segment.encoded
    for visual, view, numbers, rows in zip(encoded.visuals, encoded.views, encoded.images, segment.pixels):
        for number, picture in zip(numbers, family.pictures_of(rows, visual.facts)):
            marks = tuple(_marks(loaded.sample, number, loaded.sizes[number], view, family, supervise))
            yield Picture(number, picture, tuple(loaded.sizes[number]), marks, family.shown_grid)


def _marks(
    sample: Sample, image: int, original: tuple[int, int], view: View, family: Family, supervise: str
) -> Iterator[Mark]:
    """Boxes and points that the sample's text says of an image, each once; in pixels of the shown picture."""
    found: dict[tuple[int, ...], bool] = {}
    shown = view.size[::-1]  # (width, height)
    for message in sample.messages:
        for item in message["content"]:
            if item["type"] not in ("box", "point") or item["image"] != image:
                continue
            values = tuple(
                family.shown_coordinate(value, axis % 2, original, shown) for axis, value in enumerate(item[item["type"]])
            )
            answer = message.get("train", supervise == "all_text" or message["role"] == "assistant") or (
                message["role"] == RUNNING_TEXT and supervise == "auto"
            )  # fmt: skip
            found[values] = found.get(values, False) or answer
    return (Mark(values, answer) for values, answer in found.items())
