"""The sample of judgements that a person audits: fair, the same after a resume, and harmless as a page."""

from __future__ import annotations

import json

from terrace.track.calibration import SHOWN_PER_TASK, Calibration, Shown, calibration_from
from terrace.track.report.judgements import stage_judgements


def judgement(number: int, task: str = "count") -> Shown:
    return Shown(task, f"p{number}", "How many?", f"response {number}", "4", float(number % 2), None, {"counting": "'4': count"}, number)


def test_every_judgement_is_as_likely_to_be_shown():
    counts = [0, 0, 0, 0]
    for seed in range(60):
        calibration = Calibration(seed)
        calibration.add(judgement(number) for number in range(200))
        assert len(calibration.shown["count"]) == SHOWN_PER_TASK
        for one in calibration.shown["count"]:
            counts[one.iteration // 50] += 1
    assert all(240 < count < 360 for count in counts), counts  # 300 expected in each quarter


def test_a_resumed_stage_shows_the_same():
    whole, first = Calibration(7), Calibration(7)
    whole.add(judgement(number, "ab"[number % 2]) for number in range(300))
    first.add(judgement(number, "ab"[number % 2]) for number in range(111))
    resumed = calibration_from(json.loads(json.dumps(first.state())))
    resumed.add(judgement(number, "ab"[number % 2]) for number in range(111, 300))
    assert resumed == whole
    assert whole.seen == {"a": 150, "b": 150}


def test_the_page_escapes_text_and_takes_no_foreign_pictures():
    calibration = Calibration(0)
    calibration.add([Shown("t", "p", "<script>1</script>", "x" * 5000, {"bbox": [1]}, None, "m: time limit of 5 s", {}, 3)])
    pictures = {"p": ["data:image/png;base64,AAAA", "http://elsewhere/a.png", "javascript:alert(1)", "//elsewhere/a", "images/a.png"]}
    page = stage_judgements("morl", calibration, pictures)
    assert "<script>" not in page
    assert page.count("<img") == 2
    assert "elsewhere" not in page
    assert "javascript" not in page
    assert "time limit of 5 s" in page
    assert "1 of 1 judgements" in page
    assert len(page) < 4000
