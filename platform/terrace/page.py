"""What Terrace's HTML pages share: the frame, the look, embedded pictures. A page is one file without scripts or addresses.

Its own policy forbids the browser to load or run anything, so data that is shown can do nothing even if it were not escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2028; --muted: #626979; --line: #e4e7ec; --page: #f6f7f9; --panel: #fff;
  --soft: #edeff3; --faint: #a3a9b5; --right: #168f52; --wrong: #d0343a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --muted: #9aa2b1; --line: #2c323d; --page: #14171c; --panel: #1b1f26;
  --soft: #262b34; --faint: #6b7382; --right: #3fbf7f; --wrong: #f0676c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 14px; }
p { margin: 0; }
.lead, .note { color: var(--muted); }
.note { font-size: 13px; margin-top: 10px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin-top: 22px; }
.facts div { min-width: 92px; }
.facts b { display: block; font-size: 24px; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.facts span { color: var(--muted); font-size: 13px; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
footer { margin-top: 40px; color: var(--muted); font-size: 13px; }
code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { @page { margin: 12mm; } * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  :root { color-scheme: light; --ink: #000; --muted: #555; --line: #ccc; --page: #fff; --panel: #fff; --soft: #eee;
  --faint: #888; } main { max-width: none; padding: 0; } h2 { break-after: avoid; } .panel { overflow: visible; } }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; `style` is what this page adds to the shared look."""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · Terrace</title>\n<style>{STYLE}{style}</style>\n<main>{body}\n</main>\n</html>\n"
    )


def facts(items: Iterable[tuple[str, str]]) -> str:
    """The row of large figures below a title, from (value, name) pairs."""
    return f'<div class="facts">{"".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in items)}</div>'


def picture_address(picture: Image.Image) -> str:
    """The picture itself as an address: a JPEG of quality 90."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
