"""What the rewards of RL stages said, for a person to audit: responses at random, with what was read and what decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from terrace.track.calibration import Calibration, Shown, calibration_from, shortened
from terrace.track.report.read import RunReport
from terrace.track.report.tables import table

HEAD = ("prompt", "response", "solution", "reward", "read, and decided by")


def judgements_part(run: RunReport) -> str:
    """A folded table per task of every stage that has judged; '' where none has."""
    return "".join(
        stage_judgements(stage.name, calibration_from(stage.judgements), stage.judgements.get("pictures") or {})
        for stage in run.stages
        if stage.judgements
    )


def stage_judgements(stage: str, calibration: Calibration, pictures: Mapping[str, Sequence[str]]) -> str:
    """HTML. `pictures`: prompt id, or `Shown.seen`, -> image URLs (`data:` ones for a page of its own).

    All text is escaped; URLs other than `data:image/` and relative ones are left out.
    """
    parts = []
    for task in sorted(calibration.shown):
        kept = sorted(calibration.shown[task], key=lambda one: (one.iteration, one.prompt_id))
        told = f"{escape(stage)}, {escape(task)}: {len(kept)} of {calibration.seen[task]:,} judgements, drawn at random"
        rows = [_row(one, pictures.get(one.prompt_id, ()), pictures.get(one.seen, ())) for one in kept]
        parts.append(f"<details><summary>{told}</summary>{table(HEAD, rows, texts=(0, 1, 2, 4), kind='judgements')}</details>")
    return "".join(parts)


def _row(one: Shown, pictures: Sequence[str], observed: Sequence[str]) -> list[str]:
    images, shown = (
        "".join(f'<img src="{escape(url, quote=True)}" alt="" width="96">' for url in urls if _is_safe(url))
        for urls in (pictures, observed)
    )
    prompt = one.prompt.replace("<image>", "").strip() if images else one.prompt
    value = "none" if one.value is None else f"{one.value:.3f}"
    reasons = "; ".join(f"{rule}: {said}" for rule, said in one.reasons.items()) or one.failure or ""
    response = escape(shortened(one.response)).replace("\n", "<br>" if one.seen else "\n")  # of a conversation, a line for each turn
    said = (f"{shown}{response}", *(escape(shortened(str(text))) for text in (one.solution, value, reasons)))
    return [f"{images}{escape(shortened(prompt))}<small>iteration {one.iteration}</small>", *said]


def _is_safe(url: str) -> bool:
    return url.startswith("data:image/") or not (":" in url or url.startswith("//"))
