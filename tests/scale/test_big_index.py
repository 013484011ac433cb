"""An index larger than memory is opened, planned and resumed at once, and its pages are shared by the processes of a machine."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def planned(root: Path, budget: dict[str, Any], pack: int, processes: int) -> list[dict[str, Any]]:
    """What so many processes say, which run at the same time."""
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "plan_once.py"), str(root), json.dumps(budget), str(pack)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(processes)]
    answers = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def check(tmp_path: Path, rows: int, pack: int, processes: int) -> None:
    from synthetic_index import recipe_of, write_prepared

    free = shutil.disk_usage(tmp_path).free
    if free < 6.5 * rows:
        pytest.skip(f"{6.5 * rows / 2**30:.0f} GiB on the disk are needed, {free / 2**30:.0f} are free")
    budget = {"epochs": 1.0}
    root = tmp_path / "data"
    root.mkdir()
    try:
        written = write_prepared(root, rows, recipe_of(budget))
        for found in planned(root, budget, pack, processes):
            print(json.dumps(found | {"disk_bytes_a_row": written / rows}))
            assert found["rows"] == rows
            assert found["start"]["cpu"] < 5  # by the clock as well, on a machine that does nothing else
            assert found["resume"]["cpu"] < 1
            assert found["mebibytes"]["resident"] < 200  # of one process; of those of a machine together `proportional`
            assert found["total_steps"] == math.ceil(math.ceil(rows / 11) / 512)
            assert found["last_row"] > rows // 50
        assert written < 8 * rows
    finally:
        shutil.rmtree(root)


def test_a_million_rows(tmp_path: Path) -> None:
    check(tmp_path, 1_000_000, 40_000, 1)


@pytest.mark.slow
def test_a_billion_rows_planned_by_two_processes(tmp_path: Path) -> None:
    check(tmp_path, int(os.environ.get("TERRACE_SCALE_ROWS", 1_000_000_000)), 10_000_000, 2)
