"""What the rewards of RL stages said, for a person to audit: responses at random, with what was read and what decided."""

from __future__ import annotations

from html import escape

from terrace.track.calibration import calibration_from, calibration_html
from terrace.track.report.read import RunReport


def judgements_part(run: RunReport) -> str:
    """A table per task of every stage that has judged; '' where none has."""
    parts = []
    for stage in run.stages:
        if stage.judgements:
            shown = calibration_html(calibration_from(stage.judgements), stage.judgements.get("pictures"))
            parts.append(f'<h3>Stage {escape(stage.name)}</h3><div class="judgements">{shown}</div>' if shown else "")
    return "".join(parts)
