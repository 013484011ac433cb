"""Numbers as people read them in the report."""

from __future__ import annotations

import math
import time

from terrace.track.progress import duration


def short_number(value: float | None) -> str:
    """Three significant digits with k, M, G, T: `12.4 k`; `3e-04` below a thousandth; `–` for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit * 0.9995:
            return f"{_digits(value / (1e3 if letter == 'k' else limit))} {letter}"
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return _digits(value)


def _digits(value: float) -> str:
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """`0.984` -> `98.4 %`."""
    return "–" if value is None else f"{_digits(100 * value)} %"


def file_size(count: float | None) -> str:
    """Decimal units, as disks are sold: `13.3 MB`."""
    if count is None:
        return "–"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{_digits(count / limit)} {unit}"
    return f"{count:.0f} B"


def span(seconds: float | None) -> str:
    """`75` -> `1m15s`; fractions of a second below ten seconds."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 0.001:
        return "under 1ms"
    return f"{_digits(seconds)}s" if 0 < seconds < 10 else duration(seconds)


def clock(seconds: float | None) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
