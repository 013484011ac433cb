"""Line charts as inline SVG: one quantity per chart, the curriculum's stages side by side on its x axis, one or two runs.

A stage's width grows with the root of its steps, so that a short warm-up beside a long stage can still be read. Every chart
holds at most two points per pixel column, whatever the run's length: a bucket of steps becomes its smallest and largest value
(the light band) and its mean (the line, smoothed over a fortieth of the stage where the quantity is noisy). A chart of a million
steps takes about 20 kB. Runs differ in their dash and their label as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from terrace.track.report.numbers import short_number

Point = tuple[float, float | None]  # step, value; None or NaN: not finite
DASHES = ("", ' stroke-dasharray="7 4"')


@dataclass(frozen=True)
class Facet:
    """A stage's piece of the x axis. `label` is its short name, `steps` its last step."""

    number: int
    label: str
    steps: float


@dataclass(frozen=True)
class Line:
    """One run's values: points per facet, in the facets' order, [] where it has none. `name` '' for a single run."""

    name: str
    points: list[list[Point]]


@dataclass(frozen=True)
class Look:
    """`scale` log or linear (from zero if `zero`); `smooth` for noisy quantities; `dots` marks each point (few of them)."""

    width: int = 520
    height: int = 190
    scale: str = "linear"
    zero: bool = True
    smooth: bool = True
    dots: bool = False
    unit: Callable[[float], str] = short_number
    empty: str = ""  # written into a facet where no run has a value, for example "frozen"


def chart(
    title: str, note: str, facets: Sequence[Facet], lines: Sequence[Line], look: Look, resumes: Sequence[tuple[int, int]] = ()
) -> str:
    """A figure with its title. `resumes` are (facet place, step) where an attempt went on. '' where nothing was measured."""
    lines = [replace(line, points=[[(step, _finite_or_none(value)) for step, value in points] for points in line.points]) for line in lines]
    values = [value for line in lines for value in _finite(line)]
    if look.scale == "log":
        values = [value for value in values if value > 0]
    if not values or not facets:
        return ""
    frame = _Frame(facets, look, values)
    parts = [*frame.axes(lines)]
    for place, step in resumes:
        x = frame.x(place, step)
        parts.append(f'<line class="resume" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
        parts.append(f'<text class="resume" x="{x:.1f}" y="{frame.top + 9}" text-anchor="middle">↻</text>')
    for order, line in enumerate(lines):
        parts.append(f'<g class="run{order + 1}">{"".join(_curve(frame, line, order))}</g>')
    parts += _end_labels(frame, lines)
    summary = "; ".join(f"{line.name + ': ' if line.name else ''}{_summary(line, look)}" for line in lines if _finite(line))
    if frame.above is not None:
        note = f"{note}, single steps up to {look.unit(frame.above)}".removeprefix(", ")
    caption = f"<figcaption><b>{escape(title)}</b>{f' <span>{escape(note)}</span>' if note else ''}</figcaption>"
    return (
        f'<figure class="chart">{caption}<svg viewBox="0 0 {look.width} {look.height}" role="img" '
        f'aria-label="{escape(title)}: {escape(summary)}"><title>{escape(title)}: {escape(summary)}</title>{"".join(parts)}</svg></figure>'
    )


# ---------------------------------------------------------------- frame


class _Frame:
    """Pixels of steps and values."""

    left, right, top = 46, 46, 22

    def __init__(self, facets: Sequence[Facet], look: Look, values: Sequence[float]):
        self.facets, self.look = facets, look
        self.bottom = look.height - 20
        self.log = look.scale == "log" and max(values) / min(values) > 1.5
        low, high, self.above = _range(values, self.log, look)
        self.low, self.high, self.ticks = low, high, _ticks(low, high, self.log, 4 if look.height < 180 else 5)
        widths = _facet_widths(facets, look.width - self.left - self.right)
        self.starts = [self.left + sum(widths[:place]) for place in range(len(facets))]
        self.widths = widths

    def x(self, place: int, step: float) -> float:
        return self.starts[place] + 2 + (self.widths[place] - 4) * min(1.0, step / max(1.0, self.facets[place].steps))

    def y(self, value: float) -> float:
        if self.log:
            share = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * min(1.0, max(0.0, share))

    def axes(self, lines: Sequence[Line]) -> list[str]:
        end = self.look.width - self.right
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(f'<line class="rule" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(self.look.unit(tick))}</text>')
        for place, (facet, start, width) in enumerate(zip(self.facets, self.starts, self.widths)):
            if place:
                parts.append(f'<line class="border" x1="{start:.1f}" x2="{start:.1f}" y1="{self.top - 14}" y2="{self.bottom}"/>')
            name = f"{facet.number} {facet.label}"
            name = name if len(name) * 6.2 < width - 6 else str(facet.number)
            parts.append(f'<text class="stage" x="{start + 4:.1f}" y="{self.top - 9}">{escape(name)}</text>')
            steps = short_number(facet.steps)
            if len(steps) * 6.5 < width - 2:
                parts.append(f'<text x="{start + width - 2:.1f}" y="{self.bottom + 14}" text-anchor="end">{steps}</text>')
            if self.look.empty and not any(line.points[place] for line in lines):
                middle = start + width / 2
                if len(self.look.empty) * 6.2 < width:
                    text = f'<text class="empty" x="{middle:.1f}" y="{(self.top + self.bottom) / 2 + 4:.1f}" text-anchor="middle">'
                    parts.append(f"{text}{escape(self.look.empty)}</text>")
        parts.append(f'<line class="axis" x1="{self.left}" x2="{end}" y1="{self.bottom}" y2="{self.bottom}"/>')
        return parts


def _facet_widths(facets: Sequence[Facet], width: float) -> list[float]:
    roots = [math.sqrt(max(1.0, facet.steps)) for facet in facets]
    least = 0.35 / len(facets)
    shares = [max(least, root / sum(roots)) for root in roots]
    return [width * share / sum(shares) for share in shares]


def _range(values: Sequence[float], log: bool, look: Look) -> tuple[float, float, float | None]:
    """Lowest and highest value of the axis, and the largest value where it lies far above the rest (a first step)."""
    low, high = min(values), max(values)
    if log:
        return low * 0.92, high * 1.08, None
    above = None
    usual = sorted(values)[-1 - max(4, len(values) // 200)] if len(values) >= 20 else high
    if look.zero and high > 2.5 * usual > 0:
        high, above = usual * 1.3, high
    low = min(0.0, low) if look.zero else low
    if high == low:
        return (low, low + 1.0, above) if low == 0 else (low - abs(low) * 0.5, low + abs(low) * 0.5, above)
    margin = 0.08 * (high - low)
    return (low if low == 0 else low - margin), high + margin, above


def _ticks(low: float, high: float, log: bool, count: int) -> list[float]:
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for marks in ((1, 2, 5), (1, 3), (1,)):
            ticks = [mark * 10.0**exponent for exponent in exponents for mark in marks if low <= mark * 10.0**exponent <= high]
            if len(ticks) <= count + 2:
                break
        if len(ticks) >= 2:
            return ticks
    size = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(size))
    step = next(mark * power for mark in (1, 2, 2.5, 5, 10) if mark * power >= size * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class _Bucket:
    step: float
    low: float
    mean: float
    high: float


def _curve(frame: _Frame, line: Line, order: int) -> list[str]:
    parts = []
    dash = DASHES[order % len(DASHES)]
    for place, points in enumerate(line.points):
        for step, value in points:
            if value is None:
                parts.append(f'<text class="bad" x="{frame.x(place, step):.1f}" y="{frame.bottom - 3}" text-anchor="middle">×</text>')
        buckets = buckets_of(points, max(8, int(frame.widths[place])))
        if not buckets:
            continue
        noisy = frame.look.smooth and len(buckets) > 24
        if noisy:
            upper = [(frame.x(place, bucket.step), frame.y(bucket.high)) for bucket in buckets]
            lower = [(frame.x(place, bucket.step), frame.y(bucket.low)) for bucket in reversed(buckets)]
            parts.append(f'<polygon class="band" points="{_coordinates(upper + lower)}"/>')
        means = smoothed([bucket.mean for bucket in buckets]) if noisy else [bucket.mean for bucket in buckets]
        places = [(frame.x(place, bucket.step), frame.y(mean)) for bucket, mean in zip(buckets, means)]
        if len(places) > 1:
            parts.append(f'<polyline class="line" points="{_coordinates(places)}"{dash}/>')
        if len(places) == 1 or frame.look.dots:
            parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return parts


def buckets_of(points: Sequence[Point], most: int) -> list[_Bucket]:
    """At most `most` buckets of neighbouring finite points, each with its smallest, mean and largest value."""
    finite = [(step, value) for step, value in points if value is not None]
    size = max(1, math.ceil(len(finite) / most))
    found = []
    for start in range(0, len(finite), size):
        part = finite[start : start + size]
        values = [value for _, value in part]
        found.append(_Bucket(sum(step for step, _ in part) / len(part), min(values), sum(values) / len(values), max(values)))
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over about a fortieth of the values, seven at least; shorter at both ends, so that the ends do not lag."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = max(3, len(values) // 80)
    found = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        found.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return found


def _coordinates(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _end_labels(frame: _Frame, lines: Sequence[Line]) -> list[str]:
    """The last value of each line beside its end; pushed apart where two would lie on each other."""
    found = []
    for order, line in enumerate(lines):
        for place in reversed(range(len(line.points))):
            if buckets := buckets_of(line.points[place], max(8, int(frame.widths[place]))):
                means = smoothed([b.mean for b in buckets]) if frame.look.smooth and len(buckets) > 24 else [b.mean for b in buckets]
                found.append((frame.y(means[-1]), frame.x(place, buckets[-1].step), order, means[-1], line.name))
                break
    found.sort()
    parts, last = [], -math.inf
    for y, x, order, value, name in found:
        place = max(y + 4, last + 12)
        last = place
        text = f"{name} {frame.look.unit(value)}" if name else frame.look.unit(value)
        parts.append(f'<text class="end run{order + 1}" x="{x + 6:.1f}" y="{place:.1f}">{escape(text)}</text>')
    return parts


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite(line: Line) -> list[float]:
    return [value for points in line.points for _, value in points if value is not None]


def _summary(line: Line, look: Look) -> str:
    values = _finite(line)
    return f"from {look.unit(values[0])} to {look.unit(values[-1])}, lowest {look.unit(min(values))}, highest {look.unit(max(values))}"
