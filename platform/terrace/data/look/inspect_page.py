"""The page of `terrace inspect`: how long samples are, what was refused, and samples and packs as the model reads them.

One file without scripts: pictures are embedded, boxes, points and histograms are inline SVG, and the two switches are check boxes that
the style sheet looks at. What is supervised has a colour and an underline, so that it can be told on paper and without seeing colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import accumulate

import numpy as np
from PIL import Image

from terrace.data.look.samples import Inspection, Mark, Picture, Run, ShownPack, ShownSegment, SourceFacts
from terrace.data.order.eligible import told_changes
from terrace.data.sources.refusals import REASONS
from terrace.page import document, facts, picture_address
from terrace.recipe.objectives import OBJECTIVES

SOURCE_COLOURS = ("#3f6fd8", "#c2630a", "#0f8b8d", "#8b4fc8", "#b8336a", "#6b7f1e", "#a5702a", "#5a6b86")
BINS = 44
CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}

STYLE = """
:root { --said: #0a6b52; --tint: #d9f2e8; --mark: #7a5ea8; --chip: #e6ecfb; --chip-ink: #2b4a95; --answer: #00a37a; --question: #3f6fd8; }
@media (prefers-color-scheme: dark) { :root { --said: #8fe6c6; --tint: #123f33; --mark: #b59be0; --chip: #253252; --chip-ink: #b9cbf7; } }
.legend { display: flex; flex-wrap: wrap; gap: 8px 26px; align-items: center; font-size: 13px; color: var(--muted); margin-top: 24px; }
.legend label { cursor: pointer; }
.legend svg { width: 18px; height: 14px; vertical-align: -2px; margin-right: 4px; }
.legend .strip { display: inline-flex; width: 34px; height: 15px; margin: 0 6px 0 0; vertical-align: -3px; }
.legend .strip a { flex: 1; background: #3f6fd8; }
.legend .strip s { left: 0; width: 100%; }
.sources { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 18px; }
.sources h3, .segment h3 { font-size: 15px; margin: 0; }
.sources .panel { padding: 18px 20px; }
.uri { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; margin-bottom: 8px; }
.histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px 36px; margin-top: 14px; }
.histogram { display: block; width: 100%; max-width: 580px; height: auto; }
.histogram text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.histogram .axis { stroke: var(--line); }
.histogram .limit { stroke: var(--wrong); stroke-dasharray: 4 3; }
.share { position: relative; min-width: 150px; }
.share i { position: absolute; left: 12px; bottom: 3px; height: 3px; border-radius: 2px; max-width: calc(100% - 24px); }
.refused td:nth-child(2) { text-align: right; }
.refused td:last-child, .refused th:last-child { text-align: left; white-space: normal; }
.refused small { display: block; color: var(--muted); overflow-wrap: anywhere; }
.pack { margin-bottom: 30px; }
.pack > header { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; }
.pack > header b { font-size: 16px; }
.pack > header span, .segment header span { color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; }
.strip { display: flex; height: 30px; margin: 10px 0 14px; border-radius: 7px; overflow: hidden; background:
  repeating-linear-gradient(135deg, var(--soft) 0 5px, var(--page) 5px 10px); border: 1px solid var(--line); }
.strip a { position: relative; min-width: 0; color: #fff; font: 600 12px/28px system-ui, sans-serif; text-align: center; overflow: hidden;
  border-right: 2px solid var(--page); text-decoration: none; }
.strip s { position: absolute; top: 0; bottom: 0; background: repeating-linear-gradient(135deg, #0000 0 3px, #fff4 3px 6px); }
.strip b { position: relative; text-shadow: 0 0 3px #0009; }
.segment { background: var(--panel); border: 1px solid var(--line); border-left: 5px solid var(--own); border-radius: 10px;
  padding: 14px 18px 16px; margin-bottom: 12px; }
.segment header { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin-bottom: 10px; }
.segment h3 { overflow-wrap: anywhere; }
.segment h3 em { font-style: normal; color: color-mix(in srgb, var(--own) 65%, var(--ink)); }
.body { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; }
.body.beside { grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); }
@media (max-width: 800px) { .body.beside { grid-template-columns: minmax(0, 1fr); } }
.body.many figure svg { height: 180px; width: auto; object-fit: contain; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; align-content: flex-start; }
figure { margin: 0; max-width: 100%; min-width: 0; }
figure svg { display: block; max-width: 100%; height: auto; border-radius: 4px; outline: 1px solid var(--line); }
figure .halo { fill: none; stroke: #fff; stroke-width: 4.5; vector-effect: non-scaling-stroke; }
figure .line { fill: none; stroke: var(--question); stroke-width: 2.2; stroke-dasharray: 6 4; vector-effect: non-scaling-stroke; }
figure .answer.line { stroke: var(--answer); stroke-dasharray: none; }
figure .dot { fill: var(--question); stroke: #fff; vector-effect: non-scaling-stroke; stroke-width: 2; }
figure .answer.dot { fill: var(--answer); }
figure .number { font-family: system-ui, sans-serif; font-weight: 700; fill: #fff; stroke: #0c3b30; stroke-width: 3; paint-order: stroke; }
figure .cells { display: none; fill: none; stroke: #fff; stroke-opacity: 0.55; stroke-width: 1; vector-effect: non-scaling-stroke; }
main:has(#cells:checked) .cells { display: inline; }
figcaption { color: var(--muted); font-size: 12px; margin-top: 5px; font-variant-numeric: tabular-nums; }
.text { font: 13px/1.65 ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono CJK SC", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: plaintext; max-height: 460px; overflow-y: auto; tab-size: 4; }
.text ins { color: var(--said); background: var(--tint); text-decoration: underline; text-decoration-thickness: 2px;
  text-underline-offset: 3px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.text i { font-style: normal; }
main:has(#borders:checked) .text i { box-shadow: inset -1px 0 var(--faint); }
.special { color: var(--mark); font-size: 11px; }
ins .special { color: inherit; }
.newline { color: var(--faint); user-select: none; }
.chip { display: inline-block; background: var(--chip); color: var(--chip-ink); border-radius: 20px; padding: 0 9px; font-size: 12px;
  border: 1px solid var(--chip-ink); white-space: nowrap; }
.rest, .damage { color: var(--wrong); }
@media print { :root { --said: #064c3a; --tint: #e4f5ee; --mark: #555; --chip: #fff; --chip-ink: #222; } .text { max-height: none; }
  .sources .panel, .segment, header, figure { break-inside: avoid; } .pack > header, .segment header, .strip { break-after: avoid; }
  .strip, .segment, figure { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .legend label { display: none; } }
"""


def inspection_page(found: Inspection, title: str, subtitle: str, notes: Sequence[str] = ()) -> str:
    """The whole page as HTML. `notes`: sentences on how it came about, for example where the tokenizer is from."""
    colours = {source.name: SOURCE_COLOURS[place % len(SOURCE_COLOURS)] for place, source in enumerate(found.sources)}
    samples, tokens = sum(len(source.lengths) for source in found.sources), sum(int(source.lengths.sum()) for source in found.sources)
    visual = sum(int(source.visual_tokens.sum()) for source in found.sources)
    figures = [
        (f"{samples:,}", "training samples"),
        (_large(tokens), f"tokens at {found.pixels[1]:,} pixels an image"),
        (f"{tokens / max(1, samples):,.0f}", "tokens a sample"),
        (f"{100 * visual / max(1, tokens):.0f} %", "of them from images"),
        (f"{sum(sum(source.refused.values()) for source in found.sources):,}", "refused"),
    ]
    if found.fills:
        figures.append((_percent(sum(found.fills) / len(found.fills)), f"fill of {found.sequence_length:,} tokens"))
    body = [
        f'<h1>{_safe(title)}</h1>\n<p class="lead">{_safe(subtitle)}</p>{facts(figures)}',
        "".join(f'<p class="note">{_safe(note)}</p>' for note in notes),
        _shares(found, colours),
        f'<h2>Lengths</h2><div class="sources">{"".join(_source(source, found, colours) for source in found.sources)}</div>',
        _refused(found.sources),
        _legend(),
        _packs(found, colours),
    ]
    if found.samples:
        shown = "".join(_segment(segment, None, "", colours) for segment in found.samples)
        body.append(f"<h2>Samples</h2>{shown}")
    body.append("<footer>Written by <code>terrace inspect</code>. Pictures and texts are decoded from the model's input.</footer>")
    return document(title, "\n".join(body), STYLE)


# ---------------------------------------------------------------- sources


def _shares(found: Inspection, colours: dict[str, str]) -> str:
    """Planned shares of the mixture beside what the planned packs really hold."""
    if len(found.sources) < 2 or not found.fills:
        return ""
    samples = max(1, sum(source.packed_samples for source in found.sources))
    tokens = max(1, sum(source.packed_tokens for source in found.sources))
    rows = ""
    for source in found.sources:
        shares = (source.weight, source.packed_samples / samples, source.packed_tokens / tokens)
        colour = colours[source.name]
        cells = "".join(
            f'<td class="share">{100 * share:.2f} %<i style="width:{100 * share:.1f}%;background:{colour}"></i></td>' for share in shares
        )
        told = _safe(told_changes(source.changes)) or "–"
        rows += f"<tr><td>{_safe(source.name)}</td>{cells}<td>{len(source.lengths):,}</td><td>{told}</td></tr>"
    return (
        '<h2>Shares of the sources</h2><div class="panel"><table><tr><th>source</th><th>samples, planned</th>'
        f"<th>samples, packed</th><th>tokens, packed</th><th>samples an epoch</th><th>left out or changed</th></tr>{rows}</table></div>"
        f'<p class="note">Packed: in the first {len(found.fills):,} packs of the stage. The fullest is {_percent(max(found.fills))} full,'
        f" the emptiest {_percent(min(found.fills))}. Packs are shuffled in windows, over which the shares are those planned.</p>"
    )


def _source(source: SourceFacts, found: Inspection, colours: dict[str, str]) -> str:
    lengths = source.lengths
    parts = [f"{source.samples:,} samples", f"{source.held_out:,} held out"] if source.held_out else [f"{source.samples:,} samples"]
    parts += [f"{count:,} {kind}" for kind, count in source.kinds.items() if len(source.kinds) > 1]
    parts += [_safe(told)] if (told := told_changes(source.changes)) else []
    quantiles = np.quantile(lengths, (0, 0.5, 0.95, 1)).astype(int) if len(lengths) else (0, 0, 0, 0)
    fitting = _percent(float((lengths <= found.sequence_length).mean())) if len(lengths) else "–"
    cells = "".join(f"<td>{value:,}</td>" for value in quantiles)
    mean = f"{float(lengths.mean()) if len(lengths) else 0:,.0f}"
    drawn = histogram(lengths, "tokens a sample", colours[source.name], found.sequence_length)
    if source.visual_tokens.any():
        drawn += histogram(source.visual_tokens, "of them from images", colours[source.name], None)
    return (
        f'<div class="panel"><h3>{_safe(source.name)}</h3><p class="uri">{_safe(source.uri)} · {", ".join(parts)}</p>'
        "<table><tr><th>tokens</th><th>shortest</th><th>median</th><th>95 %</th><th>longest</th>"
        f"<th>fit {found.sequence_length:,}</th></tr><tr><td>{mean} on average</td>{cells}<td>{fitting}</td></tr></table>"
        f'<div class="histograms">{drawn}</div></div>'
    )


def histogram(values: np.ndarray, label: str, colour: str, limit: int | None) -> str:
    """Counts of `values` in equal bins as SVG. The last bin holds everything beyond the 99th percentile, where that is far beyond."""
    if not len(values):
        return ""
    width, height, bottom, top = 520, 132, 22, 18
    longest, usual = int(values.max()), float(np.quantile(values, 0.99))
    end = longest if longest <= 1.5 * usual else int(usual)
    step = max(1, -(-(end + 1) // BINS))
    bins = end // step + 1
    counts = np.bincount(np.minimum(values // step, bins), minlength=bins + 1)
    columns = len(counts) if counts[bins] else bins
    highest = max(1, int(counts.max()))
    one = width / columns
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{height - bottom}" y2="{height - bottom}"/>']
    for place, count in enumerate(counts[:columns].tolist()):
        if count:
            tall = max(1.0, (height - bottom - top) * count / highest)
            what = f"{place * step:,} to {(place + 1) * step - 1:,}" if place < bins else f"{bins * step:,} to {longest:,}"
            faint = ' opacity="0.55"' if place == bins else ""
            parts.append(
                f'<rect x="{place * one:.1f}" y="{height - bottom - tall:.1f}" width="{max(0.8, one - 1.2):.1f}" height="{tall:.1f}"'
                f' fill="{colour}"{faint}><title>{what}: {count:,}</title></rect>'
            )
    marks = _round_marks(bins * step)
    for mark in marks:
        x = mark / step * one
        if x < width - 60 or columns == bins:
            anchor = "start" if mark == 0 else "end" if x > width - 20 else "middle"
            parts.append(f'<text x="{min(x, width):.1f}" y="{height - 6}" text-anchor="{anchor}">{mark:,}</text>')
    if columns > bins:
        parts.append(f'<text x="{width}" y="{height - 6}" text-anchor="end">to {longest:,}</text>')
    if limit is not None and limit <= bins * step:
        x = limit / step * one
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
    parts.append(f'<text x="0" y="11">{escape(label)}</text><text x="{width}" y="11" text-anchor="end">highest bar {highest:,}</text>')
    return f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _round_marks(end: int) -> list[int]:
    """Four to eight round numbers from 0 to `end`."""
    size = 1
    while end / size > 8:
        size = size * 5 // 2 if str(size)[0] == "2" else size * 2
    return list(range(0, end + 1, size))


def _refused(sources: Sequence[SourceFacts]) -> str:
    rows = ""
    for source in sources:
        for reason, count in sorted(source.refused.items(), key=lambda item: -item[1]):
            examples = "".join(
                f"<small>{_safe(line.origin)} ({_safe(line.id)}): {_safe(line.detail[:300])}</small>"
                for line in source.refusals
                if line.reason == reason
            )
            meaning = escape(REASONS.get(reason, ""))
            rows += f"<tr><td>{_safe(source.name)}</td><td>{count:,}</td><td><code>{escape(reason)}</code> {meaning}{examples}</td></tr>"
    if not rows:
        return '<h2>Refused</h2><p class="lead">No sample was refused.</p>'
    return (
        '<h2>Refused</h2><div class="panel"><table class="refused"><tr><th>source</th><th>samples</th>'
        f"<th>reason, with the first of them</th></tr>{rows}</table></div>"
    )


# ---------------------------------------------------------------- packs and samples


def _legend() -> str:
    box = '<svg viewBox="0 0 18 14"><rect x="1" y="1" width="16" height="12" fill="none" stroke-width="2" stroke="var(--{})"{}/></svg>'
    dashed = ' stroke-dasharray="4 2.5"'
    return (
        '<div class="legend"><span class="text"><ins>supervised token</ins></span><span class="text"><span class="special">&lt;|mark|&gt;'
        '</span></span><span class="text"><span class="chip">image 12×9 = 108 tokens</span></span>'
        '<span><span class="strip"><a><s></s></a></span>image tokens in a pack</span>'
        f"<span>{box.format('answer', '')}in the answer</span>"
        f"<span>{box.format('question', dashed)}in the question</span>"
        '<label><input type="checkbox" id="borders"> borders of tokens</label>'
        '<label><input type="checkbox" id="cells"> cells of image tokens</label></div>'
    )


def _packs(found: Inspection, colours: dict[str, str]) -> str:
    if not OBJECTIVES[found.objective].reads_packs:
        return f'<p class="note">A stage of objective {escape(found.objective)} has no packs that are known before it runs.</p>'
    if not found.packs:
        return ""
    return f"<h2>Packs</h2>{''.join(_pack(pack, colours) for pack in found.packs)}"


def _pack(pack: ShownPack, colours: dict[str, str]) -> str:
    """A pack: its segments to scale (image tokens striped), then each of them."""
    strip, cards = "", ""
    for number, segment in enumerate(pack.segments, start=1):
        anchor = f"pack-{pack.pack}-{number}"
        starts = accumulate((run.tokens for run in segment.runs), initial=0)
        stripes = "".join(
            f'<s style="left:{100 * start / segment.tokens:.2f}%;width:{100 * run.tokens / segment.tokens:.2f}%"></s>'
            for start, run in zip(starts, segment.runs)
            if run.kind in ("image", "video")
        )
        strip += (
            f'<a href="#{anchor}" style="flex:{segment.tokens} 0 0;background:{colours[segment.source]}"'
            f' title="{_safe(segment.source)}/{_safe(segment.id)}: {segment.tokens:,} tokens">{stripes}<b>{number}</b></a>'
        )
        cards += _segment(segment, number, anchor, colours)
    rest = pack.sequence_length - pack.tokens
    supervised = sum(segment.supervised_tokens for segment in pack.segments)
    told = [
        f"step {pack.step:,}", f"window {pack.window:,}", f"{len(pack.segments)} segment{'' if len(pack.segments) == 1 else 's'}",
        f"{pack.tokens:,} of {pack.sequence_length:,} tokens", f"fill {_percent(pack.tokens / pack.sequence_length)}",
        f"{sum(segment.visual_tokens for segment in pack.segments):,} from images", f"{supervised:,} supervised",
    ]  # fmt: skip
    empty = f'<span style="flex:{rest} 0 0" title="{rest:,} places without a token"></span>' if rest > 0 else ""
    return (
        f'<section class="pack"><header><b>Pack {pack.pack}</b>{"".join(f"<span>{part}</span>" for part in told)}</header>'
        f'<div class="strip">{strip}{empty}</div>{cards}</section>'
    )


def _segment(segment: ShownSegment, number: int | None, anchor: str, colours: dict[str, str]) -> str:
    told = [segment.kind, f"{segment.tokens:,} tokens"]
    if segment.visual_tokens:
        told.append(f"{segment.visual_tokens:,} from images")
    if not segment.damage:
        told.append(f"{segment.supervised_tokens:,} supervised")
    if number is not None:
        told.append(f"places {segment.start:,} to {segment.start + segment.tokens - 1:,}")
    place = f"{number} · " if number is not None else ""
    name = f"{place}<em>{_safe(segment.source)}</em>/{_safe(segment.id)}"
    header = f"<header><h3>{name}</h3>{''.join(f'<span>{_safe(part)}</span>' for part in (*told, *segment.notes))}</header>"
    pictures = "".join(_figure(picture) for picture in segment.pictures)
    text = f'<div class="text">{"".join(_run(run) for run in segment.runs)}</div>'
    if segment.damage:
        text = f'<p class="damage">Damaged: {_safe(segment.damage)}</p>'
    layout = " beside" if 1 <= len(segment.pictures) <= 2 else " many" if segment.pictures else ""
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    own = f'id="{anchor}" ' if anchor else ""
    return (
        f'<article {own}class="segment" style="--own:{colours[segment.source]}">{header}'
        f'<div class="body{layout}">{shown}{text}</div></article>'
    )


def _run(run: Run) -> str:
    if run.kind in ("image", "video"):
        time, rows, columns = run.grid
        name = f"image {run.images[0] + 1}" if run.kind == "image" else f"video of {len(run.images)} frames"
        grid = f"{time}×{columns}×{rows}" if run.kind == "video" else f"{columns}×{rows}"
        return f'<span class="chip">{name} {grid} = {run.tokens:,} tokens</span>'
    if run.kind == "rest":
        return f'<span class="rest"> … {run.tokens:,} more tokens</span>'
    text = "".join(f"<i>{_visible(piece)}</i>" for piece in run.pieces)
    if run.kind == "mark":
        text = f'<span class="special">{text}</span>'
    return f"<ins>{text}</ins>" if run.supervised else text


def _figure(picture: Picture) -> str:
    height, width, _ = picture.pixels.shape
    size = max(12, round(width / 34))
    cells = "".join(f"M{x} 0V{height}" for x in range(picture.grid, width, picture.grid or 1))
    cells += "".join(f"M0 {y}H{width}" for y in range(picture.grid, height, picture.grid or 1))
    numbered = len(picture.marks) > 1
    marks = "".join(_mark(mark, place if numbered else None, size) for place, mark in enumerate(picture.marks, start=1))
    told = f"image {picture.number + 1} · {width}×{height} of {picture.original[0]}×{picture.original[1]} pixels"
    told = f"view: {picture.made}" if picture.made else told
    for place, mark in enumerate(picture.marks, start=1):
        told += f" · {place} [{', '.join(map(str, mark.values))}]" if numbered else f" · [{', '.join(map(str, mark.values))}]"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="image {picture.number + 1}">'
        f'<image width="{width}" height="{height}" href="{picture_address(Image.fromarray(picture.pixels))}"/>'
        f'<path class="cells" d="{cells}"/>{marks}</svg><figcaption>{told}</figcaption></figure>'
    )


def _mark(mark: Mark, number: int | None, size: int) -> str:
    whose = " answer" if mark.answer else ""
    x, y = mark.values[:2]
    if len(mark.values) == 4:
        x, x2 = sorted((x, mark.values[2]))
        y, y2 = sorted((y, mark.values[3]))
        shape = f'x="{x}" y="{y}" width="{x2 - x}" height="{y2 - y}"'
        drawn = f'<rect class="halo" {shape}/><rect class="line{whose}" {shape}/>'
    else:
        drawn = f'<circle class="halo" cx="{x}" cy="{y}" r="{size}"/><circle class="line{whose}" cx="{x}" cy="{y}" r="{size}"/>'
        drawn += f'<circle class="dot{whose}" cx="{x}" cy="{y}" r="{size / 4:.1f}"/>'
    if number is None:
        return drawn
    return drawn + f'<text class="number" x="{x + 4}" y="{max(y + size, size)}" font-size="{size}">{number}</text>'


# ---------------------------------------------------------------- words and numbers


def _safe(text: str) -> str:
    return escape(text.translate(CONTROL))


def _visible(piece: str) -> str:
    """A token's text: line ends shown and kept, other control characters as pictures of them."""
    return _safe(piece).replace("\n", '<span class="newline">↵</span>\n')


def _percent(share: float) -> str:
    """Rounded down, so that only what is full or whole is 100 %."""
    return "100 %" if share >= 1 else f"{int(share * 10_000) / 100:.2f} %"


def _large(count: int) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)
