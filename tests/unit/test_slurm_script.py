"""The Slurm script: its options are Slurm's, and it brings ranks together as srun would start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "jobs" / "slurm.sbatch"
# Of sbatch's and srun's manual pages (22.05 to 25.05), with the form of what each takes.
OPTIONS = {
    "job-name": r"\S+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "gpus-per-node": r"(\w+:)?\d+", "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+(:\d\d){0,2}", "signal": r"([RB]+:)?\w+(@\d+)?", "requeue": "", "open-mode": "append|truncate", "output": r"\S+",
}  # fmt: skip
# As strict as srun: an option it does not have ends it; tasks get its variables, and the highest status is its own.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
given = sys.argv[1:]
while given[0].startswith("-"):
    name, _, value = given.pop(0).partition("=")
    allowed = {{"--kill-on-bad-exit": ("0", "1"), "--distribution": ("block", "cyclic"), "--cpus-per-task": None}}
    if name not in allowed or (allowed[name] and value not in allowed[name]) or not value:
        sys.exit(f"srun: error: unrecognized option {{name}}={{value}}")
tasks = int(os.environ["SLURM_NTASKS"])
started = [subprocess.Popen(given, env={{**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}}) for n in range(tasks)]
sys.exit(max(one.wait() for one in started))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") echo localhost; echo node-2 ;;
  "requeue 31007") echo "requeued $2" ;;
  *) echo "scontrol: error: $*" >&2; exit 1 ;;
esac
"""


def test_the_script_is_bash_and_its_options_are_slurms():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True).stderr == ""
    lines = SCRIPT.read_text().splitlines()
    given = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines if line.startswith("#SBATCH")]
    assert len(given) == 10
    assert all(given), "a line that sbatch would not read"
    for one in given:
        assert re.fullmatch(OPTIONS[one[1]], one[2] or ""), one[0]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch reads none after the first command"


def script(folder: Path, *arguments: str, python: str | None = None) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python or f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_ID": "31007", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    environment = {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_run_that_saved_a_checkpoint_queues_itself_and_no_other(tmp_path: Path):
    """`python` is a stand-in that says what it was given and ends as told."""
    told = '#!/bin/sh\necho "$SLURM_PROCID $MASTER_ADDR:$MASTER_PORT $*"\nexit '
    for status, queued in ((143, True), (0, False), (2, False)):
        done = script(tmp_path, "r.yaml", "run dir", "a.b=1", python=f"{told}{status}\n")
        assert done.returncode == status, done.stderr
        lines = sorted(done.stdout.splitlines())
        assert [line for line in lines if line[0].isdigit()] == [
            f"{rank} localhost:31007 -m terrace.cli run r.yaml --run-dir run dir --launcher ranks a.b=1" for rank in (0, 1)
        ]
        assert ("requeued 31007" in lines) is queued
    assert "usage: sbatch jobs/slurm.sbatch RECIPE RUN_DIR" in script(tmp_path, "r.yaml").stderr


@pytest.mark.slow
def test_the_ranks_it_starts_agree_on_one_answer(tmp_path: Path):
    """A recipe that is not there: one line by one rank, and both end with its status."""
    done = script(tmp_path, "missing.yaml", "run")
    assert done.returncode == 2
    assert done.stderr.count("terrace:") == 1, done.stderr
    assert "missing.yaml" in done.stderr
