"""The benchmark of objectives: no table of a machine that others use, or of two sides that do not do the same; and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import bench_objectives
import machine_load
import objective_clip

ROWS = [["`clip`, tiny", "0.100", "0.110", "0.91", "at most 1.05"]]


@pytest.mark.parametrize(("before", "others_before", "others_during", "quiet"), [
    (0.1, 0.01, 0.02, True), (1.9, 0.0, 0.0, False), (0.1, 0.4, 0.0, False), (0.1, 0.0, 0.3, False),
])  # fmt: skip
def test_a_table_is_written_on_a_quiet_machine_alone(before, others_before, others_during, quiet, tmp_path, monkeypatch, capsys):
    load = machine_load.Load(before, others_before, others_during)
    monkeypatch.setattr(machine_load, "Watch", lambda: type("Watch", (), {"end": lambda self: load})())
    monkeypatch.setattr(bench_objectives, "clip_rows", lambda args: ROWS)
    table = tmp_path / "table.md"
    arguments = ["--only", "clip", "--threads", "1", "--table", str(table)]
    if quiet:
        assert bench_objectives.main(arguments) == ROWS
        assert table.read_text().splitlines()[-1] == "| `clip`, tiny | 0.100 | 0.110 | 0.91 | at most 1.05 |"
    else:
        with pytest.raises(SystemExit, match="is not written"):
            bench_objectives.main(arguments)
        assert not table.exists()
    told = capsys.readouterr().out
    assert f"{others_during:.1%} during" in told
    assert ("| 0.100 |" in told) == quiet


def test_losses_that_differ_are_no_comparison():
    bench_objectives.checked("clip", 1e-7, 1e-5)
    for difference in (1e-3, float("nan")):
        with pytest.raises(SystemExit, match="do not do the same"):
            bench_objectives.checked("clip", difference, 1e-5)


def test_other_processes_are_counted_and_own_ones_are_not(monkeypatch):
    monkeypatch.setattr(machine_load.os, "cpu_count", lambda: 2)
    assert machine_load._share((0.0, 100.0, 20.0), (10.0, 112.0, 26.0)) == pytest.approx((12 - 6) / 20)
    assert machine_load._share((0.0, 100.0, 20.0), (10.0, 104.0, 25.0)) == 0.0


def test_a_daemon_that_outlives_the_measured_command_is_no_other_process(monkeypatch):
    monkeypatch.setattr(machine_load, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(machine_load, "LOOK_SECONDS", 0.02)
    burn = "import time\nwhile time.process_time() < 0.3: pass"  # its parent ends at once, and nobody ever waits for it
    start = f"import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', {burn!r}], start_new_session=True).pid)"
    watch = machine_load.Watch()
    daemon = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True).stdout)
    for _ in range(500):
        if (Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[0]) == "Z":
            break
        time.sleep(0.02)
    watch.end()
    assert [seconds for (process, _), seconds in watch._below.items() if process == daemon] == [pytest.approx(0.31, abs=0.06)]
    os.waitpid(daemon, 0)


@pytest.mark.slow
def test_both_benchmarks_run_without_what_they_compare_with(capsys):
    torch.set_num_threads(1)
    found = objective_clip.measure("tiny", None, 1, 2)
    assert len(found["losses"]) == 4
    assert found["terrace_seconds"] > 0
    bench_objectives.main(["--only", "dpo", "--steps", "2", "--pairs", "2", "--rounds", "1", "--threads", "1", "--words", "4"])
    assert '"reference_seconds_per_step"' in capsys.readouterr().out
