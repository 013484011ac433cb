"""What a model family answers without torch: the one place where training, index, planner, rollouts and evaluation ask.

A family is a small frozen value made from a transformers configuration map, so it travels with every decode task. It
says four things of an image: how many placeholder tokens stand for it, how many rows of uint8 pixels it brings, what
the device must know of it (`facts`), and in which units coordinates of it are written. It says how a conversation
reads (pieces: marks, text, images), which positions tokens have, and what the planner counts. What nearly all
families share has a default; what a family must say itself is abstract, and one that leaves it out is refused by name.
A file here has its counterpart under the same name in `models/families`; together they are all that the platform knows
of a model.

Shape letters: I images, L tokens of a sample, R rows of position ids, C coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.errors import InputError
from terrace.families.coordinates import count_digits, scaled_coordinate, scaled_coordinates
from terrace.families.shapes import ModelShape
from terrace.families.tools import refuse_tools

# A piece of a sample is (kind, value, supervised): text (str), mark (role of a special token), image or video
# ({"frames", "timestamps"}), coordinates ({"image", "values"}), which become text once the resolution is known, or
# cut: the text before it and after it are encoded separately.
Piece = tuple[str, Any, bool]
Bounds = tuple[int, int]  # (min, max) pixels of a resized image
Finding = tuple[tuple[str, ...], str]  # where in the configuration, and what is wrong with it

MAX_ASPECT_RATIO = 200  # of any image: the published processors refuse longer ones


@dataclass(frozen=True)
class View:
    """One image at one resolution."""

    tokens: int  # placeholders in the text = features that the model gives for it
    rows: int  # rows of uint8 pixels
    facts: tuple[int, ...]  # for the device side; the same number of them for every image of a family
    size: tuple[int, int]  # (height, width) of the resized picture, all tiles together
    scale: tuple[int, int]  # (height, width) of the units in which coordinates are written
    inner: int = 0  # tokens that stand among the placeholders: marks of tiles, ends of rows (`Family.written`)

    @property
    def length(self) -> int:
        """Tokens from the first that belongs to the image to the last, without the marks around it."""
        return self.tokens + self.inner


@dataclass(frozen=True)
class Sight:
    """How a model sees images: its family, and (min, max) pixels of a resized one."""

    family: Family
    pixels: Bounds

    def view(self, size: tuple[int, int]) -> View:
        """`size` is (width, height)."""
        return self.family.view(*size, self.pixels)

    def scale(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the units in which coordinates of an image of this (width, height) are written."""
        height, width = self.view(size).scale
        return width, height

    def coordinates(self, values: Sequence[float], size: tuple[int, int]) -> tuple[int, ...]:
        """x and y in turn, in those units."""
        view = self.view(size)
        return tuple(self.family.coordinate(value, axis % 2, size, view) for axis, value in enumerate(values))


@dataclass(frozen=True)
class Costs:
    """`View`s of many images as columns, int64 [I] each."""

    tokens: np.ndarray
    rows: np.ndarray
    scale_heights: np.ndarray
    scale_widths: np.ndarray
    inner: np.ndarray | None = None  # None: nothing stands among the placeholders of any image

    def __getitem__(self, images: np.ndarray) -> Costs:
        """Those of some images."""
        inner = None if self.inner is None else self.inner[images]
        return Costs(self.tokens[images], self.rows[images], self.scale_heights[images], self.scale_widths[images], inner)

    @property
    def lengths(self) -> np.ndarray:
        """`View.length` of each, int64 [I]."""
        return self.tokens if self.inner is None else self.tokens + self.inner


@dataclass(frozen=True)
class Visual:
    """The placeholder tokens of one image or video of a sample: where they start, how many, and its facts.

    `seconds` is None for an image; for a video it is the time of each temporal patch, from the first one. `inner` further tokens
    stand among the placeholders, so the image ends at `start + length`.
    """

    start: int
    tokens: int
    facts: tuple[int, ...]
    seconds: tuple[float, ...] | None = None
    inner: int = 0

    @property
    def length(self) -> int:
        return self.tokens + self.inner


@dataclass(frozen=True)
class Family(ABC):
    """Defaults: one image, one or more equal tiles; text positions; no videos. Made by `of`."""

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1  # part of every index: raise it when a sample's length changes
    parts: ClassVar[tuple[str, ...]] = ("vision", "projector", "language")  # that it has; a stage that trains another is refused
    untrained: ClassVar[tuple[str, ...]] = ()  # of those, what nothing trains: refused, too
    marks: ClassVar[Mapping[str, str]] = {}  # role -> special token; `image` is the placeholder
    before: ClassVar[tuple[str, ...]] = ()  # roles of the marks in front of an image's placeholders, and behind them
    after: ClassVar[tuple[str, ...]] = ()
    inside: ClassVar[Mapping[str, str]] = {}  # name -> ordinary text that `written` puts among an image's placeholders
    beginning: ClassVar[tuple[str, ...]] = ()  # with which every sample begins
    begin_of_text: ClassVar[str] = "end_of_text"  # roles: bos_token_id, what ends an answer, and what ends a running text
    end_of_turn: ClassVar[str] = "end_of_turn"
    end_of_text: ClassVar[str] = "end_of_text"
    never: ClassVar[tuple[str, ...]] = ()  # roles of marks that are never sampled
    answer_prefix: ClassVar[str] = ""  # text that an answer begins with in its turn
    position_rows: ClassVar[int] = 1
    fact_count: ClassVar[int] = 1
    videos: ClassVar[bool] = False
    images_both_ways: ClassVar[bool] = False  # tokens of an image see each other in both directions in the language model
    experts: ClassVar[bool] = False  # its language model is a mixture of experts
    balances_sequences: ClassVar[bool] = False  # whose load-balancing loss is that of each sequence, not of the whole batch
    refused_objectives: ClassVar[Mapping[str, str]] = {}  # objective -> why the model cannot be trained with it here
    whole_pictures: ClassVar[bool] = True  # of what `pictures_of` shows, the published processor makes the same rows again
    connects: ClassVar[bool] = False  # tower and language model of different origin, with the recipe's connector between them
    chat_template: ClassVar[str] = ""  # Jinja, the same tokens as `conversation`: for tokenizers trained here
    token_names: ClassVar[Mapping[str, str]] = {}  # attributes that transformers' processor asks its tokenizer for -> role, likewise
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_id": "image"}  # configuration field -> role
    text_fields: ClassVar[Mapping[str, str]] = {}  # further fields of `text_config` -> role
    flat: ClassVar[bool] = False  # the configuration holds the language model's fields itself, not in `text_config`
    crosses: ClassVar[bool] = False  # pictures stay beside the sequence, whose tokens read them by cross-attention
    asks_kinds: ClassVar[bool] = False  # layers ask whether a token's sample has pictures; a conversation is then read again in each turn
    spare_rows: ClassVar[int] = 0  # of the embedding behind the vocabulary: marks that no answer has may stand there
    looks_ahead: ClassVar[bool] = False  # tokens of pictures or prompts see later ones: attention is not causal alone
    unshared: ClassVar[str] = ""  # why ranks cannot share a pack (sequence parallelism); empty: they can
    gives: ClassVar[str] = "text"  # what it gives: text, `vectors` of pictures and texts, `pictures`, `matches` of both, masked `tokens`
    keeps_end: ClassVar[bool] = False  # a sample that is cut keeps its last token
    reads_pictures: ClassVar[bool] = True  # else those of a sample are left out of what it reads
    reads_questions: ClassVar[bool] = False  # a question is read with each picture of its sample, beside the language model: `asked`

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Family:
        """The family for a transformers configuration map."""
        return cls()

    @classmethod
    def trainable(cls) -> tuple[str, ...]:
        """The parts that a stage may train."""
        return tuple(part for part in cls.parts if part not in cls.untrained)

    # ------------------------------------------------------------ an image

    @property
    @abstractmethod
    def row_values(self) -> int:
        """uint8 values of one row of pixels, channel-major: 3 colours of a patch or of a tile."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Pixels that one more visual token takes: what limits in visual tokens mean in pixels."""

    @property
    def shown_grid(self) -> int:
        """Pixels between the lines of the grid that a shown picture gets: a token's or a tile's side; 0: none."""
        return 0

    @property
    def fewest_pixels(self) -> int:
        """`reduce_resolution` stops here."""
        return 4 * self.unit

    @abstractmethod
    def view(self, width: int, height: int, pixels: Bounds) -> View:
        """What an image of this size becomes when it is resized within `pixels`. Raises ValueError for an empty one."""

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        """`view` of many images. This default asks once for each size that occurs."""
        sizes, back = np.unique(np.stack([widths, heights]), axis=1, return_inverse=True)
        views = [self.view(int(width), int(height), pixels) for width, height in sizes.T]
        columns = np.asarray([(v.tokens, v.rows, *v.scale, v.inner) for v in views], np.int64).reshape(-1, 5)
        return Costs(*columns[back.reshape(-1)].T)

    def largest_image_tokens(self, most_pixels: int) -> int:
        """Placeholders of the largest image that `pixels.max` allows."""
        return most_pixels // self.unit

    def among(self, images: int) -> Family:
        """The family as it sees an image of a sample that has so many; this one where that changes nothing."""
        return self

    def fitted(self, count: Callable[[str], int]) -> Family:
        """The family as a tokenizer writes it: `count` gives the tokens of a text of `inside`, encoded alone."""
        return self

    def inside_tokens(self, name: str) -> int:
        """Tokens of a text of `inside`; a tokenizer that writes it with another number is refused by name."""
        return 1

    def asked(self, facts: tuple[int, ...], question: Sequence[int]) -> tuple[int, ...]:
        """The facts of an image whose sample asks a question, as token ids."""
        return facts

    def question(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """What a sample asks, of its pieces; this default: those before the first cut, which parts a question from its answer."""
        return pieces[: next((place for place, piece in enumerate(pieces) if piece[0] == "cut"), 0)]

    def heading(self, number: int) -> Iterator[Piece]:
        """What stands in front of a sample's image `number`, counted from 0 in the order of the text."""
        yield from (("mark", role, False) for role in self.before)

    def heading_tokens(self, number: int) -> int:
        """Tokens of `heading` at most: a document is not split there."""
        return len(self.before)

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        """What stands between `before` and `after`: ("image", placeholders), ("mark", role) or ("inside", name)."""
        yield "image", view.tokens

    @abstractmethod
    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [rows, row_values] of a picture, written into `out` if that is given."""

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        """The inverse, to look at: uint8 [frames, H, W, 3] of an image's (or video's) rows; this default shows square tiles one by one."""
        side = math.isqrt(self.row_values // 3)
        return np.ascontiguousarray(rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))

    @abstractmethod
    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        """(rows, columns) in patches of every picture that the tower sees of an image: what attention there costs."""

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of an image's placeholders, for people; this default: one for each patch."""
        pictures = self.tower_pictures(facts)
        return len(pictures), *pictures[0]

    # ------------------------------------------------------------ videos

    def frame_pairs(self, frames: Any) -> Any:
        """Temporal patches of a video of `frames` frames, elementwise; 1 for an image, whose `frames` is 0."""
        return np.maximum(1, np.asarray(frames))

    def video_rows(self, frames: Any) -> Any:
        """Rows of pixels of a video, in those of one frame, elementwise."""
        return self.frame_pairs(frames)

    def video_facts(self, view: View, frames: int) -> tuple[int, ...]:
        raise InputError(f"{self.name} reads no videos here: give single frames as images, or leave video samples out")

    def video_pixels(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        raise InputError(f"{self.name} reads no videos here")

    # ------------------------------------------------------------ coordinates

    def coordinate(self, value: float, axis: int, size: tuple[int, int], view: View) -> int:
        """A coordinate of the original image (axis 0 is x; `size` is (width, height)) in whole units of `view.scale`."""
        return scaled_coordinate(value, size[axis], view.scale[1 - axis])

    def coordinates(self, values: np.ndarray, axes: np.ndarray, widths: np.ndarray, heights: np.ndarray, costs: Costs) -> np.ndarray:
        """`coordinate` of many, each with its image's size and costs: int64 [C]."""
        new = np.where(axes == 0, costs.scale_widths, costs.scale_heights)
        return scaled_coordinates(values, np.where(axes == 0, widths, heights), new)

    def shown_coordinate(self, value: float, axis: int, size: tuple[int, int], shown: tuple[int, int]) -> int:
        """Where a coordinate lies in the picture that `pictures_of` shows, (width, height) `shown`."""
        return scaled_coordinate(value, size[axis], shown[axis])

    def coordinate_text(self, number: int) -> str:
        return str(number)

    def coordinate_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each coordinate where a digit is one token, int64 [C]; 1 counts what the shortest form has."""
        return count_digits(numbers)

    # ------------------------------------------------------------ text

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """A conversation as turns that `turn` writes: tools, calls and results as text. ValueError for what has no form."""
        return refuse_tools(messages, self.name)

    def ending(self) -> Iterator[Piece]:
        """What stands behind an image."""
        return (("mark", role, False) for role in self.after)

    def opening(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        """What stands before the first turn."""
        return iter(())

    def running(self, content: Iterable[Piece]) -> Iterator[Piece]:
        """A caption or a document, between `beginning` and the mark that ends it."""
        return iter(content)

    @abstractmethod
    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        """One turn: its header, its content, and its end."""

    @abstractmethod
    def generation(self) -> Iterator[Piece]:
        """The header after which an answer is generated."""

    def positions(self, length: int, visuals: Sequence[Visual]) -> np.ndarray:
        """int32 [R, length]; row 0 counts tokens, from which attention derives segments."""
        return np.arange(length, dtype=np.int32)[None]

    @classmethod
    @abstractmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        """What the planner counts. `vocabulary` is used where the configuration has none."""

    @classmethod
    def balance_weight(cls, config: Mapping[str, Any]) -> float:
        """Weight of the load-balancing loss that the configuration of a mixture of experts states; 0 for a dense model."""
        return 0.0

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        """What is wrong with a configuration that a recipe writes out."""
        return iter(())

    @classmethod
    def completed(cls, config: Mapping[str, Any], token_id: Callable[[str], int | None], size: int) -> dict[str, Any]:
        """A written configuration with what a tokenizer of `size` tokens decides beside `token_fields`."""
        return dict(config)

    @classmethod
    def unsaid(cls, config: Any) -> set[int]:
        """Token ids that are never sampled, beside those of `never`."""
        return set()

    @classmethod
    def resized(cls, config: Mapping[str, Any], side: int) -> dict[str, Any] | None:
        """The configuration of the same model for pictures of `side` pixels, whose learned positions are then stretched; None where
        the tower has none for one fixed size."""
        return None

    @classmethod
    def upcycled(cls, config: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The configuration with mixtures of `experts` (count, per_token, capacity_factor, auxiliary_loss, layers: `all` or
        `every_second`) in place of dense feed-forward layers; None where the family's class cannot have them."""
        return None

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        """What is wrong with a stage's `pixels`, whose configuration has nothing wrong."""
        if low > high:
            yield ("min",), f"{low} is more than pixels.max {high}"

    def check_length(self, tokens: int) -> Iterator[str]:
        """What is wrong with a stage's `sequence_length`, whose configuration has nothing wrong."""
        return iter(())

    @abstractmethod
    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        """preprocessor_config.json of an export: what transformers' processor must be told to give these pixels."""

    @abstractmethod
    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        """(min, max) pixels that a preprocessor_config.json says; KeyError or TypeError where it does not."""

    def processor(self) -> dict[str, Any]:
        """processor_config.json of an export; empty: none is written."""
        return {}


class Picture(ABC):
    """A decoded image that knows how to resize itself; `data.images.FilePicture` is the one that reads files."""

    height: int
    width: int

    @abstractmethod
    def planes(self, height: int, width: int, bilinear: bool = False) -> np.ndarray:
        """uint8 [3, height, width], antialiased; bicubic, or bilinear."""

    @abstractmethod
    def resampled(self, height: int, width: int) -> Picture:
        """The picture at another size, by Pillow's Lanczos filter."""

    @abstractmethod
    def padded_square(self, colour: tuple[int, int, int]) -> Picture:
        """The picture in the middle of a square of its longer side."""
