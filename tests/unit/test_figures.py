"""One run seen from everywhere: status, report, MLflow and metrics.jsonl tell the same measured figures of it."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report_run import START, write_run  # a run with a kill, a failure and an RL stage

from terrace.curriculum.report_command import collect_run
from terrace.curriculum.status import print_status, run_status
from terrace.track.figures import evaluation_mean, last_measured, measure_of, parameters_of, stage_figures
from terrace.track.points import stage_points
from terrace.track.report.page import write_page


def test_figures_are_measured_or_absent():
    rows = [
        {"step": 1, "loss": 3.0, "tokens": 100, "samples": 4, "step_seconds": 2.0, "memory_peak_bytes": 5e9, "model_flops": 6e9},
        {"step": 2, "loss": None, "tokens": 50, "samples": 2, "step_seconds": 1.0, "memory_peak_bytes": 7e9},
        {"step": 3, "loss": 2.0, "tokens": 150, "samples": 6, "step_seconds": 1.0, "model_flops": 3e9},
    ]
    found = stage_figures(rows)
    assert (found.steps, found.tokens, found.samples, found.seconds, found.last) == (3, 300, 12, 4.0, 2.0)
    assert (found.tokens_per_second, found.flops, found.flops_per_second) == (75.0, 9e9, 3e9)
    assert found.memory_peak_bytes == 7_000_000_000
    bare = stage_figures([{"step": 1, "loss": 1.0, "tokens": 5, "step_seconds": 1.0}])
    assert (bare.flops_per_second, bare.flops, bare.memory_peak_bytes) == (None, None, None)
    assert stage_figures([]).last is None
    assert stage_figures(rows[:2]).last is None  # the newest loss was not finite


def test_parameters_are_those_that_lie_there(tmp_path):
    import torch
    from safetensors.torch import save_file

    assert parameters_of(tmp_path) is None
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model-1.safetensors", {"format": "pt"})
    save_file({"c": torch.zeros(2, 2, 2, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    assert parameters_of(tmp_path) == 15 + 7 + 8
    (tmp_path / "model-3.safetensors").write_bytes(b"\0" * 100)
    assert parameters_of(tmp_path) is None


def test_losses_and_rewards_are_not_averaged_with_each_other():
    assert evaluation_mean({"caption": 1.0, "qa": 3.0}) == 2.0
    assert evaluation_mean({"reward/a": 0.2, "reward/b": 0.4, "greedy_reward/a": 1.0}) == pytest.approx(0.3)
    assert evaluation_mean({"caption": 1.0, "reward/a": 0.0}) == 1.0
    assert evaluation_mean({}) is None
    assert (measure_of({"loss": 0.1, "reward": 0.5}), last_measured({"loss": 0.1, "reward": 0.5})) == ("reward", 0.5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("figures") / "run")


def test_every_view_shows_the_same_figures(run_dir, capsys):
    status, report = run_status(run_dir), collect_run(run_dir, now=START + 90_000)
    page = write_page([report], run_dir.parent / "page.html").read_text(encoding="utf-8")
    compared = 0
    for shown, stage in zip(status["stages"], report.stages, strict=True):
        file = run_dir / "stages" / f"{stage.number:02d}-{stage.name}" / "metrics.jsonl"
        if not file.is_file():
            assert shown["last"] is None
            assert stage.figures.last is None
            continue
        rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]  # the last line may be torn
        expected = stage_figures(rows)
        assert stage.figures == expected
        assert (shown["step"], shown["last"], shown["measure"]) == (expected.steps, expected.last, expected.measure)
        name = expected.measure
        points = dict(stage_points(next(row for row in reversed(rows) if name in row)))
        if expected.last is not None:
            assert points[name] == expected.last
            assert f"{expected.last:.4f}" in page
        else:
            assert math.isnan(points["loss"])
        assert f"{expected.tokens:,}" in page
        for when in ("before", "after"):
            mean = evaluation_mean(shown["evaluation"].get(when))
            assert mean == evaluation_mean(((stage.result or {}).get("evaluation") or {}).get(when))
        compared += 1
    assert compared >= 2
    assert "do not record" not in page
    print_status(status)
    told = capsys.readouterr().out
    for shown in status["stages"]:
        if shown["last"] is not None:
            assert f"{shown['last']:.4f}" in told


def test_the_clock_of_a_run_that_rests_stands_still(run_dir, monkeypatch):
    import time

    from terrace.curriculum import status as status_module

    first = run_status(run_dir)
    if first["phase"] == "running":
        pytest.skip("the run of this test is under way")
    now = time.time()
    before = [status_module._times(first), *(status_module._stage_time(stage, first["seen_at"]) for stage in first["stages"])]
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    later = run_status(run_dir)
    assert before == [status_module._times(later), *(status_module._stage_time(stage, later["seen_at"]) for stage in later["stages"])]


def test_narrow_windows_cut_no_figure(run_dir, monkeypatch, capsys):
    import rich.console

    real = rich.console.Console

    def narrow(*given, **more):
        return real(*given, **{**more, "width": more["width"] if more.get("width", 0) > 1000 else 60})

    monkeypatch.setattr(rich.console, "Console", narrow)
    print_status(run_status(run_dir))
    told = capsys.readouterr().out
    assert "…" not in told
    for stage in run_status(run_dir)["stages"]:
        assert stage["name"] in told
        if stage["last"] is not None:
            assert re.search(rf"{stage['last']:.4f}", told)
