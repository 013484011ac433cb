"""The tutorial's commands, one after the other, as they are printed there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from e2e_runs import REPOSITORY, environment

TUTORIAL = (REPOSITORY / "docs" / "tutorial.md").read_text(encoding="utf-8")
ELSEWHERE = ("make ", "source ", "terrace status runs/demo")  # the demo itself has tests of its own


def tutorial_commands() -> list[tuple[str, int]]:
    """(command, expected exit status) of every bash block."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", TUTORIAL, re.DOTALL):
        for line in block.strip().split("\n"):
            if not line.startswith(ELSEWHERE):
                status = re.search(r"# exits with status (\d+)", line)
                found.append((line, int(status[1]) if status else 0))
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_every_command_of_the_tutorial_does_what_it_says(tmp_path: Path):
    from terrace.demo.corpus import write_corpus

    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    write_corpus(tmp_path / "runs" / "demo-corpus", samples={"captions": 200, "ocr": 120}, workers=1)
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", TUTORIAL, re.DOTALL)[1])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "terrace").write_text(f'#!/bin/sh\nexec {sys.executable} -m terrace.cli "$@"\n')
    (tmp_path / "bin" / "terrace").chmod(0o755)
    variables = environment(PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    commands = tutorial_commands()
    assert len(commands) >= 14
    seen = []
    for command, expected in commands:
        ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=400)
        assert ended.returncode == expected, f"{command}\n{ended.stdout}\n{ended.stderr}"
        seen.append(ended.stdout + ended.stderr)
    assert any("missed its gate on eval/caption/loss" in output for output in seen)
    assert (tmp_path / "report.html").stat().st_size > 20_000
    assert (tmp_path / "captions.html").is_file()
    script = re.search(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)[1]
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert loaded.returncode == 0, loaded.stderr
