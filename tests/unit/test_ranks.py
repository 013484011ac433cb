"""What torchrun and srun say of a process, what is refused of it, and real processes that count without Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fakes import tiny_recipe
from waiting import eventually

from terrace.cluster.process_launcher import ranks_here
from terrace.cluster.ranks import Ranks, by_torchrun, is_follower, ranks_of
from terrace.cluster.ranks_launcher import without_ray, workers_of
from terrace.curriculum.journal import read_journal
from terrace.errors import InputError

HERE = Path(__file__).resolve().parent
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "MASTER_ADDR": "node-1", "MASTER_PORT": "20123"}


def test_what_torchrun_and_srun_say():
    assert ranks_of(TORCHRUN) == Ranks(3, 4, 1, "host", 29500, "terrace/2", hosted=True)
    assert ranks_of(SLURM) == Ranks(0, 8, 0, "node-1", 20123, "terrace/0", hosted=False)
    assert ranks_of({**SLURM, **TORCHRUN}).world_size == 4, "torchrun inside a job step"
    assert (by_torchrun(TORCHRUN), by_torchrun(SLURM)) == (True, False)


@pytest.mark.parametrize(("environment", "words"), [
    ({}, "neither RANK nor SLURM_PROCID is set"),
    ({"RANK": "0"}, "neither WORLD_SIZE nor SLURM_NTASKS"),
    ({**SLURM, "MASTER_ADDR": ""}, "MASTER_ADDR and MASTER_PORT"),
    ({**SLURM, "MASTER_PORT": "http"}, "scontrol show hostnames"),
])  # fmt: skip
def test_what_nobody_said_is_named(environment: dict[str, str], words: str):
    with pytest.raises(InputError, match=words.replace("(", "\\(")):
        ranks_of(environment)


def test_stages_and_ranks(monkeypatch: pytest.MonkeyPatch):
    for workers, world, expected in ((2, 2, 2), (1, 4, 1), ([1, 6], 4, 3), ([2, 3], 4, 3), ([3, 6], 8, 6)):
        recipe = tiny_recipe(1, resources={"workers": workers}, batch={"packs": 6})
        assert workers_of(recipe.stages[0], world) == expected
    with pytest.raises(InputError, match=r"resources.workers is 2, .* is 1: start 2, or set stages.stage-a.resources.workers=1"):
        workers_of(tiny_recipe(1, resources={"workers": 2}).stages[0], 1)
    for workers, cores, expected in ((2, 1, 2), (1, 8, 1), ([1, 64], 2, 2), ([4, 64], 2, 4)):
        assert ranks_here(tiny_recipe(1, resources={"workers": workers}, batch={"packs": 64}).stages[0], cores) == expected
    assert without_ray(tiny_recipe(2)).stages[1].data_loading.engine == "inline"
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert (is_follower("ranks"), is_follower("local")) == (True, False)


# ---------------------------------------------------------------- real processes, as srun starts them


def start(run_dir: Path, world: int, steps: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            **os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world), "SLURM_LOCALID": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TERRACE_FAKE_STEP_SECONDS": "0.2",
        }  # fmt: skip
        command = [sys.executable, str(HERE / "ranks_counting.py"), str(run_dir), str(steps), str(world)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return processes


def ended(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=200) for process in processes]


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "stages/01-stage-a/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_ranks_count_stop_on_a_signal_survive_a_death_and_go_on(tmp_path: Path):
    """SIGTERM to every process, as Slurm sends it: a checkpoint and 143. A rank that dies costs an attempt, not the job."""
    (tmp_path / "hold-stage-a").write_text("4")  # there it waits, and listens
    processes = start(tmp_path, 2, 12)
    assert eventually(lambda: (tmp_path / "stages/01-stage-a/metrics.jsonl").exists(), 100)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert ended(processes) == [143, 143], [process.stdout.read() for process in processes]
    assert steps_of(tmp_path) == [1, 2, 3]
    (tmp_path / "hold-stage-a").unlink()
    (tmp_path / "fail-stage-a-2").write_text("die")
    processes = start(tmp_path, 2, 12)
    assert eventually(lambda: any(event["event"] == "stage_attempt_failed" for event in read_journal(tmp_path).events), 100)
    assert ended(processes) == [0, 0], [process.stdout.read() for process in processes]
    assert steps_of(tmp_path) == list(range(1, 13)), "every step once"
    failed = [event for event in read_journal(tmp_path).events if event["event"] == "stage_attempt_failed"]
    assert [(event["kind"], event["reason"]) for event in failed] == [("infrastructure", "RankDied")]
    assert [event["launcher"] for event in read_journal(tmp_path).events if "launcher" in event] == ["ranks", "ranks"]


@pytest.mark.slow
def test_wrong_input_and_a_first_rank_that_is_killed(tmp_path: Path):
    for name in ("wrong", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed/hold-stage-a").write_text("4")
    (tmp_path / "wrong/fail-stage-a-1").write_text("input")
    processes = start(tmp_path / "wrong", 2, 12)
    assert ended(processes) == [2, 2]
    said = [process.stdout.read() for process in processes]
    assert "told to fail at step 1" in said[0]
    assert "Traceback" not in said[0]
    assert said[1] == "", "one process speaks"
    processes = start(tmp_path / "killed", 2, 50)
    assert eventually(lambda: (tmp_path / "killed/stages/01-stage-a/metrics.jsonl").exists(), 100)
    processes[0].kill()
    assert processes[1].wait(timeout=60) == 1, "nobody waits for a rank 0 that is gone"
    assert "rank 0 is gone" in processes[1].stdout.read()
    time.sleep(1.0)
    before = steps_of(tmp_path / "killed")
    time.sleep(1.0)
    assert steps_of(tmp_path / "killed") == before, "no process of the attempt is left"


@pytest.mark.slow
def test_one_command_starts_its_workers_stops_on_a_signal_survives_a_death_and_goes_on(tmp_path: Path):
    """`--launcher process`: the same with processes that this one starts, of which SIGTERM to it ends none before its checkpoint."""
    run_dir, temporary = tmp_path / "run", tmp_path / "temporary"
    run_dir.mkdir()
    temporary.mkdir()

    def start_alone() -> subprocess.Popen:
        environment = {**os.environ, "TERRACE_FAKE_STEP_SECONDS": "0.2", "TMPDIR": str(temporary)}
        command = [sys.executable, str(HERE / "ranks_counting.py"), str(run_dir), "12", "2", "process"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    (run_dir / "hold-stage-a").write_text("4")
    process = start_alone()
    assert eventually(lambda: (run_dir / "stages/01-stage-a/metrics.jsonl").exists(), 100)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 143, process.stdout.read()
    assert steps_of(run_dir) == [1, 2, 3]
    (run_dir / "hold-stage-a").unlink()
    (run_dir / "fail-stage-a-2").write_text("die")
    process = start_alone()
    assert process.wait(200) == 0, process.stdout.read()
    assert steps_of(run_dir) == list(range(1, 13)), "every step once"
    failed = [event for event in read_journal(run_dir).events if event["event"] == "stage_attempt_failed"]
    assert [(event["kind"], event["reason"]) for event in failed] == [("infrastructure", "RankDied")]
    assert [event["launcher"] for event in read_journal(run_dir).events if "launcher" in event] == ["process", "process"]
    assert not list(temporary.glob("terrace-process-*"))
