"""Sample to tokens: conversations as Qwen2.5-VL writes them, running text, images, coordinates, and what is supervised.

The one place that knows how a sample reads. `measure_sample` says how many tokens it has at *any* resolution from two
facts: an image of h x w resized pixels is h * w / 784 tokens, and a coordinate is one token per digit. The index stores
that `Measure`, so a plan over billions of samples is arithmetic and a pack's length is known before an image is opened.

Text between two marks is encoded as one string, as Hugging Face tools do, so the ids equal the reference; only the
assistant's header is cut off, because generation starts there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from terrace.data.positions import TEMPORAL_PATCH_SIZE, TOKENS_PER_SECOND, Visual, rope_positions, temporal_seconds
from terrace.data.resize import resized_coordinate, resized_coordinate_many, smart_resize
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import GRID_PIXELS, PATCH_SIZE, Sample
from terrace.errors import InputError

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
RUNNING_TEXT = "text"  # the role of a caption, a document or plain text
Size = tuple[int, int]  # (width, height) of an original image


@dataclass(frozen=True)
class Encoded:
    """One sample as the model reads it at one resolution."""

    input_ids: np.ndarray  # int32 [L]
    supervised: np.ndarray  # bool [L]: this token is a target
    grids: np.ndarray  # int32 [I, 3]: (t, h, w) in patches, in token order
    positions: np.ndarray  # int32 [4, L]
    images: tuple[tuple[int, ...], ...]  # per grid the sample's image numbers: one for an image, the frames of a video


@dataclass(frozen=True)
class Measure:
    """What the index stores of a sample: its token length at any resolution is arithmetic on this and the image sizes.

    length = fixed_tokens + sum over visuals of their tokens + sum over coordinates of their digits.
    """

    fixed_tokens: int  # tokens that no resolution changes: text, marks, vision_start and vision_end
    supervised_tokens: int  # of them, targets
    visuals: tuple[tuple[int, int, int], ...]  # (image number, frames: 0 for an image, fixed tokens before its pads)
    coordinates: tuple[tuple[int, int, float], ...]  # (image number, axis: 0 is x and 1 is y, pixels of the original)
    cuts: tuple[int, ...]  # running text: fixed tokens before each place where the text may be split well (line ends)

    def length(self, sizes: Sequence[Size], pixels: tuple[int, int]) -> int:
        """Tokens of the sample when its images are resized within `pixels` = (min, max)."""
        resized = [smart_resize(height, width, *pixels) for width, height in sizes]
        tokens = self.fixed_tokens
        for image, frames, _ in self.visuals:
            height, width = resized[image]
            tokens += temporal_patches(frames) * (height // GRID_PIXELS) * (width // GRID_PIXELS)
        for image, axis, value in self.coordinates:
            old, new = sizes[image][axis], resized[image][1 - axis]
            tokens += len(str(resized_coordinate(value, old, new)))
        return tokens


def temporal_patches(frames: int) -> int:
    """Temporal patches of a video of `frames` frames (pairs; 1 for an image, whose `frames` is 0)."""
    return max(1, -(-frames // TEMPORAL_PATCH_SIZE))


# Pixels of the original image to whole pixels of the resized one: (values, old sides, new sides), elementwise; int64.
scale_coordinates = resized_coordinate_many


def count_digits(values: np.ndarray) -> np.ndarray:
    """Decimal digits of non-negative whole numbers below a million. Elementwise; int64."""
    values = np.asarray(values)
    return 1 + sum((values >= 10**power).astype(np.int64) for power in range(1, 6))


def encode_sample(
    sample: Sample,
    sizes: Sequence[Size],
    tokenizer: TextTokenizer,
    pixels: tuple[int, int],
    supervise: str = "auto",
    tokens_per_second: float = TOKENS_PER_SECOND,
) -> Encoded:
    """Encode a sample whose images measure `sizes`, resized within `pixels` = (min, max).

    `supervise`: `auto` (running text on its text, conversations on assistant turns), `all_text`, or `assistant`.
    Raises InputError, naming the sample, when text and images disagree.
    """
    return _encode(sample, sizes, tokenizer, pixels, _pieces(sample, supervise), tokens_per_second)


def encode_prompt(
    sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, pixels: tuple[int, int]
) -> Encoded:
    """The sample up to the assistant's last turn, ending in `<|im_start|>assistant` and a line end, ready to generate.

    Running text becomes its own beginning: everything up to and including the last image.
    """
    return _encode(sample, sizes, tokenizer, pixels, _prompt_pieces(sample), TOKENS_PER_SECOND)


def measure_sample(sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer) -> Measure:
    """The resolution-independent size of a sample. InputError, naming the sample, when it cannot be trained on."""
    _check_references(sample, len(sizes))
    running_text = sample.messages[0]["role"] == RUNNING_TEXT
    ids = supervised_tokens = 0
    text_to_learn = False
    visuals: list[tuple[int, int, int]] = []
    coordinates: list[tuple[int, int, float]] = []
    cuts: list[int] = []

    def one_digit(image: int, axis: int, value: float) -> str:
        coordinates.append((image, axis, float(value)))
        return "0"

    for kind, value, supervised in _joined(_pieces(sample, "auto"), one_digit):
        if kind == "text":
            tokens, offsets = tokenizer.encode_with_offsets(value)
            if running_text:
                cuts += [ids + place + 1 for place, (_, end) in enumerate(offsets[:-1]) if value[end - 1] == "\n"]
            ids += len(tokens)
            supervised_tokens += len(tokens) if supervised else 0
            text_to_learn |= supervised and bool(value.strip())
        elif kind == "mark":
            ids += 1
            supervised_tokens += 1 if supervised else 0
        else:
            frames = 0 if kind == "image" else len(value["frames"])
            visuals.append((value["frames"][0], frames, ids))
            cuts.append(ids + 1)  # behind the vision_end that follows
    if coordinates and not tokenizer.splits_digits:
        raise InputError(
            f"sample {sample.id}: it has boxes or points, and this tokenizer merges digits, so its length"
            " would depend on them; use a tokenizer that writes one token per digit"
        )
    if not text_to_learn and sample.kind != "prompt":
        raise InputError(f"sample {sample.id}: it has no text to learn from (empty answer or empty caption)")
    good_cuts = tuple(cut for cut in cuts if cut < ids) if running_text and not coordinates else ()
    return Measure(ids - len(coordinates), supervised_tokens, tuple(visuals), tuple(coordinates), good_cuts)


# ---------------------------------------------------------------- how a sample reads

# A piece is (kind, value, supervised): text (str), mark (name of a special token), image or video ({"frames",
# "timestamps"}), coordinates ({"image", "values"}), which become text once the resolution is known, or cut: the text
# before it and after it are encoded separately.
Piece = tuple[str, Any, bool]


def _pieces(sample: Sample, supervise: str) -> Iterator[Piece]:
    messages = sample.messages
    if messages[0]["role"] == RUNNING_TEXT:
        if len(messages) != 1:
            raise InputError(f"sample {sample.id}: running text is one message, found {len(messages)} messages")
        supervised = supervise != "assistant"
        yield from _content(sample, messages[0]["content"], supervised)
        yield "mark", "endoftext", supervised
        return
    if messages[0]["role"] != "system":
        yield from _turn(sample, "system", [{"type": "text", "text": DEFAULT_SYSTEM_PROMPT}], False)
    for message in messages:
        supervised = message["role"] == "assistant" or supervise == "all_text"
        yield from _turn(sample, message["role"], message["content"], supervised)


def _turn(sample: Sample, role: str, content: list[dict[str, Any]], supervised: bool) -> Iterator[Piece]:
    if role == RUNNING_TEXT:
        raise InputError(f"sample {sample.id}: a message of role `text` cannot stand in a conversation")
    yield "mark", "im_start", False
    yield "text", f"{role}\n", False
    if role == "assistant":
        yield "cut", None, False
    yield from _content(sample, content, supervised)
    yield "mark", "im_end", supervised
    yield "text", "\n", False


def _content(sample: Sample, content: list[dict[str, Any]], supervised: bool) -> Iterator[Piece]:
    for item in content:
        kind = item.get("type")
        if kind == "text":
            yield "text", item["text"], supervised
        elif kind == "image":
            yield "mark", "vision_start", False
            yield "image", {"frames": [item["image"]], "timestamps": None}, False
            yield "mark", "vision_end", False
        elif kind == "video":
            if not item["frames"] or len(item["frames"]) != len(item["timestamps"]):
                raise InputError(f"sample {sample.id}: a video needs frames, and one timestamp for each")
            yield "mark", "vision_start", False
            yield "video", {"frames": list(item["frames"]), "timestamps": list(item["timestamps"])}, False
            yield "mark", "vision_end", False
        elif kind in ("box", "point"):
            values, count = item[kind], 4 if kind == "box" else 2
            if len(values) != count:
                raise InputError(f"sample {sample.id}: a {kind} has {count} numbers, found {len(values)}")
            yield "coordinates", {"image": item["image"], "values": values}, supervised
        else:
            raise InputError(f"sample {sample.id}: unknown content item type {kind!r}")


def _prompt_pieces(sample: Sample) -> Iterator[Piece]:
    if sample.messages[0]["role"] == RUNNING_TEXT:
        pieces = list(_pieces(sample, "auto"))
        last = max((place for place, piece in enumerate(pieces) if piece[1] == "vision_end"), default=-1)
        yield from pieces[: last + 1]
        return
    messages = sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages
    yield from _pieces(Sample(sample.id, sample.kind, messages, sample.metadata), "auto")
    yield "mark", "im_start", False
    yield "text", "assistant\n", False


def _joined(pieces: Iterator[Piece], render: Any) -> Iterator[Piece]:
    """Join neighbouring text of equal supervision, with coordinates rendered by `render(image, axis, value)`."""
    text, text_supervised = "", False
    for kind, value, supervised in pieces:
        if kind == "coordinates":
            numbers = [render(value["image"], axis % 2, number) for axis, number in enumerate(value["values"])]
            kind, value = "text", f"[{', '.join(numbers)}]"
        if kind == "text" and supervised == text_supervised:
            text += value
            continue
        if text:
            yield "text", text, text_supervised
        text, text_supervised = (value, supervised) if kind == "text" else ("", False)
        if kind not in ("text", "cut"):
            yield kind, value, supervised
    if text:
        yield "text", text, text_supervised


def _encode(
    sample: Sample,
    sizes: Sequence[Size],
    tokenizer: TextTokenizer,
    pixels: tuple[int, int],
    pieces: Iterator[Piece],
    tokens_per_second: float,
) -> Encoded:
    _check_references(sample, len(sizes))
    resized = [smart_resize(height, width, *pixels) for width, height in sizes]

    def in_resized_pixels(image: int, axis: int, value: float) -> str:
        return str(resized_coordinate(value, sizes[image][axis], resized[image][1 - axis]))

    ids: list[int] = []
    supervised_runs: list[tuple[int, bool]] = []
    visuals: list[Visual] = []
    images: list[tuple[int, ...]] = []
    for kind, value, supervised in _joined(pieces, in_resized_pixels):
        before = len(ids)
        if kind == "text":
            ids += tokenizer.encode(value)
        elif kind == "mark":
            ids.append(getattr(tokenizer.special, value))
        else:
            frames, stamps = value["frames"], value["timestamps"]
            height, width = resized[frames[0]]
            grid = (1 if stamps is None else temporal_patches(len(frames)), height // PATCH_SIZE, width // PATCH_SIZE)
            visual = Visual(len(ids), grid, None if stamps is None else temporal_seconds(stamps))
            ids += [tokenizer.special.image_pad if stamps is None else tokenizer.special.video_pad] * visual.tokens
            visuals.append(visual)
            images.append(tuple(frames))
        supervised_runs.append((len(ids) - before, supervised))
    counts, flags = zip(*supervised_runs)
    return Encoded(
        input_ids=np.asarray(ids, dtype=np.int32),
        supervised=np.repeat(np.asarray(flags, dtype=bool), counts),
        grids=np.asarray([visual.grid for visual in visuals], dtype=np.int32).reshape(-1, 3),
        positions=rope_positions(len(ids), visuals, tokens_per_second),
        images=tuple(images),
    )


def _check_references(sample: Sample, image_count: int) -> None:
    """Every item's image exists and every image is shown exactly where the text says; otherwise InputError."""
    if not sample.messages:
        raise InputError(f"sample {sample.id}: it has no messages")
    shown: list[int] = []
    for message in sample.messages:
        for item in message["content"]:
            referred = item["frames"] if item.get("type") == "video" else [item["image"]] if "image" in item else []
            for image in referred:
                if not 0 <= image < image_count:
                    raise InputError(f"sample {sample.id}: it refers to image {image} and has {image_count} images")
            if item.get("type") in ("image", "video"):
                shown += referred
    if sorted(set(shown)) != list(range(image_count)):
        raise InputError(f"sample {sample.id}: it has {image_count} images, its text shows {sorted(set(shown))}")
