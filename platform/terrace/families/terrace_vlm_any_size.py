"""A model of parts whose tower sees pictures of any size: LLaVA-UHD, MiniCPM-V 2.5 and 2.6 (slices), CogVLM (a square that grows).

The map `pictures` of the configuration says how. `layout: slices` cuts a picture into slices at its own aspect beside an overview;
`model.connector` is then a resampler: as many tokens stand for each as it has queries, whatever its sides. `layout: square` stretches it
into one square of `sqrt(pixels.max)`. `scale` is the side in pixels of the square, at most, or of a square slice, whose area every slice
keeps; `sides`, whether those are rounded to the nearest patch or down; `positions` of the tower's patches, its table stretched over the
picture (`interpolated`) or read at the nearest places (`bucketed`); whether the `overview` stands `first` or `last`; `text`, what is
written around the pictures: `numbered` as in MiniCPM-V 2.6, `marked` as in 2.5, `separated` as in LLaVA-UHD; `text_positions`, whether
the tokens of a square have a position `each` in the language model, or `one` together (CogVLM). A stage's `pixels.max`
bounds the slices: `max / scale^2`, at least one, which has `max` pixels where that is less. Coordinates are thousandths of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.errors import nearest
from terrace.families.chatml import chat_template
from terrace.families.connector import Connector, checked
from terrace.families.interface import Bounds, Family, Finding, Piece, View, Visual
from terrace.families.minicpmv4_6 import COORDINATE_SCALE, MOST_SLICES, MiniCPMV
from terrace.families.shapes import ModelShape
from terrace.families.slices import Slices
from terrace.families.slicing import sliced
from terrace.families.terrace_vlm import TerraceVlm, projector_shape, visual_expert

PROCESSOR, PROCESSOR_FILE = "SliceImageProcessor", "image_processing_slices"  # which goes into an export
CHOICES = {
    "layout": ("slices", "square"), "text": ("numbered", "marked", "separated"), "sides": ("nearest", "down"),
    "positions": ("interpolated", "bucketed"), "overview": ("first", "last"), "text_positions": ("each", "one"),
}  # fmt: skip
BY_PATCH = ("linear", "mlp", "mlp_layer_norm", "glu")  # connectors that give one token per patch, wherever it stands


def picture_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """`pictures` of a configuration with its defaults: the first of each choice, pictures as large as the tower's square."""
    given, side = config.get("pictures"), (config.get("vision_config") or {}).get("image_size", 224)
    return {"scale": side, **{name: values[0] for name, values in CHOICES.items()}, **(given if isinstance(given, dict) else {})}


@dataclass(frozen=True)
class TerraceVlmAnySize(Slices, TerraceVlm):
    name: ClassVar[str] = "terrace_vlm_any_size"
    marks: ClassVar[Mapping[str, str]] = MiniCPMV.marks
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    inside: ClassVar[Mapping[str, str]] = {"row_end": "\n", "comma": ","}
    never: ClassVar[tuple[str, ...]] = MiniCPMV.never
    token_names: ClassVar[Mapping[str, str]] = MiniCPMV.token_names
    fact_count: ClassVar[int] = 6
    whole_pictures: ClassVar[bool] = False  # the overview is shown
    chat_template: ClassVar[str] = chat_template("<|image_pad|>")

    queries: int = 0  # of a connector that gives every picture as many tokens; 0: one per patch
    scale: int = 224
    text: str = "numbered"
    exceeding: bool = True  # a slice may have a little more than scale x scale pixels
    overview_first: bool = True  # type: ignore[misc]
    one_position: bool = False  # for all tokens of a picture
    line_end: int = 1  # tokens of a line end and of a comma, encoded alone: the tokenizer's business
    comma: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TerraceVlmAnySize:
        options, connector = picture_options(config), checked(config) or Connector()
        return replace(
            super().of(config), layout=options["layout"], scale=options["scale"], text=options["text"],
            exceeding=options["sides"] == "nearest", overview_first=options["overview"] == "first",
            one_position=options["text_positions"] == "one", queries=0 if connector.kind in BY_PATCH else connector.queries,
        )  # type: ignore[return-value]

    def fitted(self, count: Callable[[str], int]) -> Family:
        return replace(self, line_end=count(self.inside["row_end"]), comma=count(self.inside["comma"]))

    @property
    def position_rows(self) -> int:  # type: ignore[override]
        return 2 if self.one_position else 1

    def positions(self, length: int, visuals: Sequence[Visual]) -> np.ndarray:
        """A second row says what the language model takes where the tokens of a picture share one position."""
        counted = super().positions(length, visuals)
        if not self.one_position:
            return counted
        steps = np.ones(length, np.int32)
        for visual in visuals:
            first = visual.start + (self.text != "separated")  # behind the mark in front
            steps[first + 1 : first + visual.tokens] = 0
        return np.concatenate([counted, (steps.cumsum(dtype=np.int32) - 1)[None]])

    def inside_tokens(self, name: str) -> int:
        return self.comma if name == "comma" else self.line_end

    # ------------------------------------------------------------ an image

    @property
    def unit(self) -> int:
        return max(1, self.scale * self.scale // self.queries) if self.queries else self.patch * self.patch

    @property
    def fewest_pixels(self) -> int:
        return self.scale * self.scale if self.layout == "slices" else 4 * self.unit

    @property
    def shown_grid(self) -> int:
        return 0

    def scale_within(self, most_pixels: int) -> int:
        """The side in pixels of the square, or of a square slice, in a stage of this `pixels.max`: whole patches."""
        return max(1, min(self.scale, math.isqrt(max(0, most_pixels))) // self.patch) * self.patch

    def most_slices(self, most_pixels: int) -> int:
        return max(1, min(MOST_SLICES, most_pixels // (self.scale * self.scale)))

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        side, most = self.scale_within(pixels[1]), self.most_slices(pixels[1])
        if self.layout == "slices":
            grid, overview, part = sliced(width, height, side, self.patch, most, self.exceeding)
        elif width < 1 or height < 1:
            raise ValueError(f"an image of {width}x{height} pixels is empty")
        else:
            grid, overview, part = (0, 0), (side, side), (0, 0)
        slices = grid[0] * grid[1]
        facts = (*grid, *(side // self.patch for side in (*overview, *part)))
        patches = facts[2] * facts[3] + slices * facts[4] * facts[5]
        size = (grid[0] * part[0], grid[1] * part[1]) if slices else overview
        tokens = (1 + slices) * self.queries or patches
        return View(tokens, patches, facts, size, (COORDINATE_SCALE, COORDINATE_SCALE), self._between(*grid))

    def _between(self, rows: int, columns: int) -> int:
        """Tokens among the placeholders of a picture in so many slices."""
        slices, row_ends = rows * columns, max(0, rows - 1) * self.line_end
        if self.text == "separated":
            return (rows * (columns - 1) * self.comma + row_ends + self.line_end) if slices else 0
        return 2 + (2 * slices + row_ends + (2 if self.text == "marked" else 0) if slices else 0)

    def written(self, view: View) -> Iterator[tuple[str, Any]]:
        slices, separated = [*self._slices(*view.facts[:2])], self.text == "separated"
        overview = [*self._marked("" if separated else "image", self.queries or view.tokens)]
        between = [("inside", "row_end")] if slices and separated else []
        yield from [*overview, *between, *slices] if self.overview_first else [*slices, *between, *overview]

    def _marked(self, mark: str, tokens: int) -> Iterator[tuple[str, Any]]:
        """The placeholders of one picture between two marks, or none."""
        yield from [("mark", f"{mark}_start")] if mark else []
        yield "image", tokens
        yield from [("mark", f"{mark}_end")] if mark else []

    def _slices(self, rows: int, columns: int) -> Iterator[tuple[str, Any]]:
        mark = {"separated": "", "marked": "image", "numbered": "slice"}[self.text]
        around = rows > 0 and self.text == "marked"
        yield from [("mark", "slice_start")] if around else []
        for place in range(rows * columns):
            if place and place % columns == 0:
                yield "inside", "row_end"
            elif place and not mark:
                yield "inside", "comma"
            yield from self._marked(mark, self.queries)
        yield from [("mark", "slice_end")] if around else []

    def heading(self, number: int) -> Iterator[Piece]:
        return MiniCPMV.heading(self, number) if self.text == "numbered" else iter(())  # type: ignore[arg-type]

    def heading_tokens(self, number: int) -> int:
        return MiniCPMV.heading_tokens(self, number) if self.text == "numbered" else 0  # type: ignore[arg-type]

    def largest_image_tokens(self, most_pixels: int) -> int:
        if self.layout == "square":
            return self.queries or (self.scale_within(most_pixels) // self.patch) ** 2
        slices = self.most_slices(most_pixels)
        return (slices + (slices > 1)) * self.queries

    def token_grid(self, facts: Any) -> tuple[int, int, int]:
        """A row of tokens for each picture where there are queries, which have no places."""
        return (1 + int(facts[0]) * int(facts[1]), 1, self.queries) if self.queries else (1, int(facts[2]), int(facts[3]))

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        shape, family = super().shape(config, vocabulary), cls.of(config)
        patches = (family.scale // family.patch) ** 2
        projector = projector_shape(checked(config) or Connector(), shape.vision.width, shape.language.width, patches)
        by_token = patches / family.queries if family.queries else 1
        vision = replace(shape.vision, patches_per_token=by_token, tile_patches=patches, tokens_per_picture=family.queries)
        return replace(shape, vision=vision, projector=projector.plus(*visual_expert(shape.language, family)))

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        if "image_layout" in config:
            yield ("image_layout",), f"is said by the architecture {cls.name}: leave it out, and write `pictures`"
        for name in ("modality_adapters", "window_adapters"):
            if config.get(name) is not None:
                yield (name,), f"and pictures of any size do not go together: write model.architecture: {TerraceVlm.name}"
        if picture_options(config)["text_positions"] == "one" and picture_options(config)["layout"] != "square":
            yield ("pictures", "text_positions"), "one is for a picture that is one square: layout: square"
        connector, kinds = checked(config), ("resampler",) if picture_options(config)["layout"] == "slices" else ("resampler", *BY_PATCH)
        if connector is not None and connector.kind not in kinds:
            yield ("connector", "kind"), f"must be {' or '.join(kinds)}, not {connector.kind}, with this layout of `pictures`"
        yield from _picture_findings(config)

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.patch * self.patch:
            yield ("max",), f"{high} pixels hold no patch of {self.patch} x {self.patch}"
        yield from Family.check_pixels(self, low, high)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": PROCESSOR,
            "auto_map": {"AutoImageProcessor": f"{PROCESSOR_FILE}.{PROCESSOR}"},
            "layout": self.layout,
            "scale": self.scale_within(pixels[1]),
            "most_slices": self.most_slices(pixels[1]),
            "patch_size": self.patch,
            "sides": "nearest" if self.exceeding else "down",
            "overview": "first" if self.overview_first else "last",
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.patch**2, int(values["scale"]) ** 2 * int(values["most_slices"])


def _picture_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with `pictures`."""
    given, at = config.get("pictures"), ("pictures",)
    if given is not None and not isinstance(given, dict):
        yield at, f"must be a map of scale, {', '.join(CHOICES)}"
        return
    for name, value in (given or {}).items():
        if name == "scale":
            patch = (config.get("vision_config") or {}).get("patch_size")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield (*at, name), f"must be a number of pixels, not {value!r}"
            elif isinstance(patch, int) and value % patch:
                yield (*at, name), f"{value} is no multiple of patch_size {patch}"
        elif name not in CHOICES:
            yield (*at, name), f"is no option: there are scale, {', '.join(CHOICES)}{nearest(name, ('scale', *CHOICES))}"
        elif value not in CHOICES[name]:
            yield (*at, name), f"must be one of {', '.join(CHOICES[name])}{nearest(str(value), CHOICES[name])}"


FAMILY = TerraceVlmAnySize
