"""The report: what it reads of a run directory, what it draws, what it refuses, and how it looks to a browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report_run import MADE_PICTURE, START, write_run

from terrace.cli import main
from terrace.curriculum.journal import Journal
from terrace.curriculum.report_command import collect_run
from terrace.errors import InputError
from terrace.track.report.charts import Facet, Line, Look, buckets_of, chart, smoothed
from terrace.track.report.numbers import file_size, percent, short_number, span
from terrace.track.report.read import RunReport

CHARTS = (
    "Training loss", "Learning rate, vision", "Learning rate, projector", "Learning rate, language", "Gradient norm", "Visual tokens",
    "Tokens per second", "Waiting for data", "Fill", "Step", "caption", "document", "reward", "pass rate", "response length", "entropy",
    "failed rewards", "rollout", "KL to the start",
)  # fmt: skip
SECTIONS = (
    "timeline", "stages", "loss", "held-out", "suites", "tasks", "iteration", "judgements", "answers", "throughput", "data", "plan",
    "checkpoints", "events", "recipe",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "made")


@pytest.fixture(scope="module")
def run(run_dir: Path) -> RunReport:
    return collect_run(run_dir, now=START + 90_000)


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    out = run_dir.parent / "made.html"
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


# ---------------------------------------------------------------- reading


def test_attempts_know_how_they_ended_and_where_they_went_on(run: RunReport) -> None:
    told = [[(attempt.outcome, attempt.first_step) for attempt in stage.attempts] for stage in run.stages]
    assert told == [[("failed", 0), ("completed", 100)], [("preempted", 0), ("completed", 200)], [("unknown", 0)]]
    assert [stage.phase for stage in run.stages] == ["completed", "completed", "stopped"]
    assert run.phase == "stopped"
    assert run.torn


def test_while_a_controller_works_the_run_is_told_as_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=8)
    with Journal(folder):
        run = collect_run(folder)
    assert (run.phase, run.stages[2].phase, run.stages[2].attempts[0].outcome) == ("running", "running", "running")


def test_only_whole_lines_and_complete_checkpoints_are_read(run: RunReport) -> None:
    assert [stage.steps for stage in run.stages] == [400, 400, 40]
    assert [[checkpoint.step for checkpoint in stage.checkpoints] for stage in run.stages] == [[200, 400], [200, 400], [20, 40]]
    assert run.stages[0].checkpoints[0].bytes == 4_000_300
    assert run.stages[1].starts_from == "projector-warmup"
    assert run.data_mark == "abcdef0123456789"


def test_plan_stands_beside_every_stage(run: RunReport) -> None:
    assert [stage.plan["steps"] for stage in run.stages] == [400, 400, 60]
    assert run.stages[0].plan["trainable_parameters"] > 0


def test_answers_come_out_of_the_gallery_without_anything_that_could_run(run: RunReport) -> None:
    first, second = run.answers
    assert (first.verdict, first.question, first.answer, first.expected) == ("wrong", "Where is <it>?", "[1, 2, 30, 40]", "[5, 6, 70, 80]")
    assert 'stroke="#d0343a"' in first.picture
    assert "onload" not in first.picture
    assert "script" not in first.picture
    assert (second.verdict, second.answer, second.picture) == ("right", "four", "")


def test_a_rerun_stage_forgets_its_earlier_attempts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    journal = folder / "journal.jsonl"
    lines = journal.read_text().split("\n")[:-1]
    more = [
        {"event": "rerun_requested", "stage": "alignment"},
        {"event": "stage_cleared", "stage": "alignment"},
        {"event": "stage_attempt_started", "stage": "alignment", "attempt": 3},
    ]
    lines += [json.dumps({"sequence": 90 + at, "time": START + 100_000 + at, **event}) for at, event in enumerate(more)]
    journal.write_text("\n".join(lines) + "\n")
    assert [attempt.number for attempt in collect_run(folder).stages[1].attempts] == [3]


# ---------------------------------------------------------------- refusing


def _write(run_dir: Path, name: str, text: str) -> None:
    (run_dir / name).write_text(text)


METRICS = "stages/01-projector-warmup/metrics.jsonl"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: shutil.rmtree(run), "is no folder"),
        (lambda run: (run / "recipe.yaml").unlink(), "no run directory"),
        (lambda run: _write(run, "recipe.yaml", "name: [1"), "recipe.yaml"),
        (lambda run: (run / "journal.jsonl").unlink(), "nothing has run in it yet"),
        (lambda run: _write(run, "journal.jsonl", "{}\nnot json\n{}\n"), "journal.jsonl, line 2"),
        (lambda run: _write(run, "journal.jsonl", '{"event": "run_started"}\n'), "journal.jsonl, line 1: no 'time' in it"),
        (lambda run: _write(run, METRICS, '{"step": 1}\n{"step": \n{"step": 3}\n'), "metrics.jsonl, line 2"),
        (lambda run: _write(run, METRICS, '{"loss": 1}\n'), "no 'step' in it"),
        (lambda run: _write(run, "stages/02-alignment/result.json", "[]"), "result.json: not a JSON object"),
        (lambda run: _write(run, "stages/02-alignment/checkpoints/step-000004/manifest.json", "{"), "manifest.json: not a JSON object"),
        (lambda run: _write(run, "data/prepared.json", "{"), "prepared.json: not a JSON object"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_refused_by_the_file_s_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, named: str) -> None:
    folder = write_run(tmp_path / "run", steps=8)
    damage(folder)
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") <= 3


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory"):
        collect_run(tmp_path)


# ---------------------------------------------------------------- page


def test_every_section_and_chart_is_there(page: str) -> None:
    assert re.findall(r'<section id="([^"]+)">', page) == list(SECTIONS)
    drawn = re.findall(r"<figcaption><b>([^<]+)</b>", page)
    assert set(CHARTS) <= set(drawn)
    assert drawn.count("reward") == 2  # one per task


def test_suites_show_every_stage_s_score_and_right_and_wrong_answers(page: str) -> None:
    part = re.search(r'<section id="suites">.*?</section>', page, re.DOTALL)[0]
    assert "<b>0.333</b><small>0.100 to 0.900, n 6</small>" in part
    assert "<b>0.667</b>" in part
    assert part.count("✓") == 3
    assert part.count("✗") == 2  # of the last stage: four of six are right
    assert "How many &lt;b&gt;shapes&lt;/b&gt;, 5?" in part


def test_an_iteration_shows_who_waited_for_what(page: str) -> None:
    part = re.search(r'<section id="iteration">.*?</section>', page, re.DOTALL)[0]
    assert "<h3>morl, iteration 7</h3>" in part
    assert re.findall(r'text-anchor="end">(\w+)</text>', part) == ["decoding", "rewards", "training"]
    assert re.findall(r">(\d+%)</text>", part) == ["38%", "50%", "25%"]  # what lies on each other counts once
    assert "25% of the engine's places idle" in part
    heights = [float(one) for one in re.findall(r'<rect class="bar"[^>]* height="([\d.]+)"', part)]
    assert heights[1] == heights[0] / 2


def test_judgements_show_what_was_read_beside_the_picture_and_nothing_unescaped(page: str) -> None:
    part = re.search(r'<section id="judgements">.*?</section>', page, re.DOTALL)[0]
    assert "<summary>morl, counting: 2 of 2 judgements, drawn at random</summary>" in part
    assert part.count("<tr>") == 3
    assert "counting: &#x27;4&#x27;: number" in part
    assert "the service said no" in part
    assert "&lt;img src=x&gt;" in part
    assert "<img src=x" not in part
    assert part.count(f'<img src="{MADE_PICTURE}"') == 1


def test_a_policy_loss_about_zero_does_not_stretch_the_loss_of_other_stages(page: str) -> None:
    loss = re.search(r"<b>Training loss</b>.*?</svg>", page, re.DOTALL)
    assert loss
    assert loss[0].count('<polyline class="line"') == 2
    assert ">see per task<" in loss[0]
    assert "<b>policy loss</b>" in page


def test_every_chart_is_well_formed_and_has_a_line_inside_its_frame(page: str) -> None:
    charts = re.findall(r'<figure class="chart">.*?(<svg .*?</svg>)', page, re.DOTALL)
    for text in charts:
        svg = ElementTree.fromstring(text)
        width, height = (float(value) for value in svg.get("viewBox", "").split()[2:])
        places = [
            tuple(float(value) for value in point.split(","))
            for line in svg.iter()
            if line.tag in ("polyline", "polygon")
            for point in line.get("points", "").split()
        ]
        assert places
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_timeline_shows_attempts_gates_hand_overs_and_the_pause(page: str) -> None:
    drawn = re.search(r'<svg class="timeline".*?</svg>', page, re.DOTALL)
    assert drawn
    ElementTree.fromstring(drawn[0])
    assert [drawn[0].count(f'class="bar {outcome}"') for outcome in ("failed", "preempted", "completed", "unknown")] == [1, 1, 2, 1]
    assert drawn[0].count('class="handover"') == 2
    assert drawn[0].count('class="gate passed"') == drawn[0].count('class="gate missed"') == 1
    assert ">paused</text>" in drawn[0]
    assert "…1d00h" in drawn[0]  # the day that it was paused is cut short


def test_page_holds_no_address_no_script_and_no_markup_from_the_data(page: str) -> None:
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)|<script|<link|<iframe|onload", page)
    assert set(re.findall(r'(?:src|href)="([^"#][^",]*)', page)) <= {"data:image/png;base64"}
    assert "division by zero <b>" not in page
    assert "division by zero &lt;b&gt;" in page
    assert "answer &lt;i&gt;20&lt;/i&gt;" in page


def test_failures_gates_and_lineage_are_told(page: str) -> None:
    troubles = ("ZeroDivisionError", "GateMissed", "below 0.5", "attempt preempted", "resume requested", "a&lt;b")
    for told in (*troubles, "feedc0de12", "zero2 × 4", "not the present one"):
        assert told in page, told


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    out = tmp_path / "long.html"
    assert main(["report", str(write_run(tmp_path / "run", steps=6000)), "--out", str(out)]) == 0
    assert out.stat().st_size < 600_000


def test_two_runs_share_the_charts_and_differ_by_dash_and_label(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.html"
    assert main(["report", str(run_dir), str(write_run(tmp_path / "other", steps=200, gallery=False)), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    loss = re.search(r"<b>Training loss</b>.*?</svg>", page, re.DOTALL)
    assert loss
    assert loss[0].count('<g class="run1">') == loss[0].count('<g class="run2">') == 1
    second = loss[0].split('<g class="run2">')[1]
    assert 'stroke-dasharray="7 4"' in second
    assert ">A 0." in loss[0]
    assert ">B 0." in loss[0]
    assert page.count('<svg class="timeline"') == 2
    ids = re.findall(r'<pattern id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) == 4


def test_reading_a_run_changes_nothing_in_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=8)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["report", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# ---------------------------------------------------------------- charts and numbers


def test_buckets_keep_the_extremes_and_the_mean() -> None:
    points = [(step, 100.0 if step == 77 else 1.0) for step in range(1000)]
    buckets = buckets_of(points, 50)
    assert len(buckets) == 50
    assert max(bucket.high for bucket in buckets) == 100.0
    assert sum(bucket.mean for bucket in buckets) / 50 == pytest.approx(sum(value for _, value in points) / 1000)


def test_smoothing_keeps_a_straight_line_and_both_ends() -> None:
    line = [float(step) for step in range(200)]
    assert smoothed(line) == pytest.approx(line)


def test_values_that_are_not_finite_are_marked_and_leave_the_scale_alone() -> None:
    drawn = chart("loss", "", [Facet(1, "a", 3)], [Line("", [[(1, 2.0), (2, math.nan), (3, 1.0)]])], Look())
    assert drawn.count('class="bad"') == 1
    assert chart("loss", "", [Facet(1, "a", 3)], [Line("", [[(2, None)]])], Look()) == ""


def test_constant_zero_and_single_values_can_be_drawn() -> None:
    for points in ([(1, 0.0), (2, 0.0)], [(1, 5.0)], [(1, -3.0), (2, -3.0)]):
        for scale in ("linear", "log"):
            if scale == "log" and points[0][1] <= 0:
                continue
            drawn = chart("x", "", [Facet(1, "a", 2)], [Line("", [points])], Look(scale=scale, zero=False))
            ElementTree.fromstring(re.search(r"<svg.*</svg>", drawn)[0])


def test_numbers_are_short_and_have_units() -> None:
    assert [short_number(value) for value in (0, 0.4417, 1300, 20253, 1.2e6, 3e-5, float("nan"))] == [
        "0", "0.442", "1,300", "20.3 k", "1.2 M", "3e-5", "–",
    ]  # fmt: skip
    assert (percent(0.9841), file_size(13_250_000), span(0.149), span(75), span(2e-5)) == (
        "98.4 %",
        "13.2 MB",
        "0.149s",
        "1m15s",
        "under 1ms",
    )


# ---------------------------------------------------------------- browser


@pytest.mark.slow
def test_a_browser_draws_every_chart_and_reports_no_error(page: str, run_dir: Path, tmp_path: Path) -> None:
    """Chromium loads the file without network: nothing on its console, every chart has a size, nothing is wider than a laptop."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    # The page itself forbids scripts, so the measuring is done from a copy that allows one.
    probe = """<script>addEventListener("load", () => {
      const boxes = [...document.querySelectorAll("svg.timeline, .chart svg")].map(svg => svg.getBoundingClientRect());
      const wide = [...document.querySelectorAll(".panel")].filter(panel => panel.scrollWidth > panel.clientWidth + 1).length;
      document.title = JSON.stringify({drawn: boxes.filter(box => box.width > 200 && box.height > 80).length, all: boxes.length, wide,
        page: document.documentElement.scrollWidth});
    })</script></html>"""
    probed = tmp_path / "probe.html"
    probed.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</html>", probe), encoding="utf-8")
    environment = {**os.environ, "HOME": str(tmp_path)}

    def browse(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([browser, *flags, *more], capture_output=True, text=True, timeout=120, env=environment)

    dumped = browse("--window-size=1280,900", "--dump-dom", probed.as_uri())
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", dumped.stdout)[1])
    assert found["drawn"] == found["all"] == page.count('<figure class="chart">') + page.count('<svg class="timeline')
    assert found["wide"] == 0
    assert found["page"] <= 1280

    shot = tmp_path / "report.png"
    loaded = browse("--window-size=1280,2000", f"--screenshot={shot}", (run_dir.parent / "made.html").as_uri())
    assert "CONSOLE" not in loaded.stderr, loaded.stderr
    assert shot.stat().st_size > 50_000
