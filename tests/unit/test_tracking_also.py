"""Trackers beside MLflow: what TensorBoard's and W&B's own readers find of a run that was killed, resumed and sent again."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report_run import write_run

from terrace import cli
from terrace.curriculum.validate_inputs import missing_inputs
from terrace.errors import InputError
from terrace.recipe.loading import load_recipe
from terrace.track import also
from terrace.track.series import RunSpec, Series
from terrace.track.tracking import Trackers, Tracking, open_tracking


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "learning_rate": {"language": 1e-3}, "time": 1000.0 + step, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """(step, value, when) of every point, as TensorBoard's own loader reads them: all files of a run, none of its points left out."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[tuple[int, float, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    return found


def told(folder: Path, rows: list[dict[str, Any]], status: str, warnings: list[str], kind: str = "tensorboard") -> None:
    """One process: it opens both runs, sends the file's rows, an evaluation after the last step, and ends."""
    path = folder / "metrics.jsonl"
    write(path, rows)
    tracking = Trackers([Tracking(also.open_also(kind, folder, "terrace", warnings.append), warnings.append)])
    tracking.open_run(RunSpec("parent", "mine", {"name": "mine"}, {}))
    tracking.open_run(RunSpec("stage", "01-sft", {"budget": {"steps": 6}}, {}, parent="parent"))
    tracking.log_rows("stage", Series(path))
    tracking.log_rows("parent", Series(path, stage=2, offset=100))
    tracking.log_evaluation("stage", [("eval/caption/loss", 2.0)], 0, 1000.0)
    tracking.log_evaluation("stage", [("eval/caption/loss", 1.0)], 6, 1006.0)
    tracking.end_run("stage", status)
    tracking.end_run("parent", status)
    assert tracking.flush(60)
    tracking.close()
    assert tracking.failed == 0


def test_a_resumed_run_is_in_tensorboard_once_and_a_deleted_folder_is_filled_again(tmp_path: Path):
    warnings: list[str] = []
    last = row(6, evaluation={"caption": 1.0})
    told(tmp_path, [row(1), row(2, loss=None), row(3)], "SCHEDULED", warnings)
    told(tmp_path, [row(1), row(2, loss=None), *(row(step, time=5000.0) for step in (3, 4, 5)), last], "FINISHED", warnings)
    for _ in range(2):
        found = scalars(tmp_path / "tensorboard" / "01-sft")
        assert [step for step, _, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
        assert found["loss"][0][1:] == (1.0, 1001.0)
        assert math.isnan(found["loss"][1][1])
        assert sorted(step for step, _, _ in found["eval/caption/loss"]) == [0, 6], "an evaluation in the last row and after it is one"
        parent = scalars(tmp_path / "tensorboard" / "mine")
        assert [step for step, _, _ in parent["loss"]] == [101, 103, 104, 105, 106]
        assert [step for step, _, _ in parent["stage"]] == [101, 102, 103, 104, 105, 106]
        assert {value for _, value, _ in parent["stage"]} == {2.0}
        shutil.rmtree(tmp_path / "tensorboard")
        told(tmp_path, [row(1), row(2, loss=None), row(3), row(4), row(5), last], "FINISHED", warnings)
    assert warnings == []


@pytest.mark.slow
def test_terrace_track_fills_tensorboard_from_a_run_directory(tmp_path: Path, capfd: pytest.CaptureFixture):
    run_dir = write_run(tmp_path / "made", steps=40)
    for _ in range(2):
        assert cli.main(["track", str(run_dir), "--also", "tensorboard"]) == 0
    assert f"{run_dir} is in {run_dir}/tensorboard" in capfd.readouterr().out
    folders = sorted(path.name for path in (run_dir / "tensorboard").iterdir() if path.is_dir())
    assert folders[-1] == "made"
    assert len(folders) == 4
    for name in folders[:3]:
        assert [step for step, _, _ in scalars(run_dir / "tensorboard" / name)["loss"]] == list(range(1, 41)), name
    assert [step for step, _, _ in scalars(run_dir / "tensorboard" / "made")["stage"]] == list(range(1, 121))


def test_a_tracker_without_its_client_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    tiny = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
    monkeypatch.setitem(also.ALSO, "nothing_of_that_name", "terrace.track.nothing")
    monkeypatch.setitem(also.INSTALL, "nothing_of_that_name", "it")
    with pytest.raises(InputError, match="nothing_of_that_name is not installed here; `pip install it`"):
        open_tracking(tmp_path, None, "terrace", print, ["nothing_of_that_name"])
    monkeypatch.setattr(also, "_installed", lambda kind: False)
    problems = [problem for problem in missing_inputs(load_recipe(tiny, ["tracking.also=[wandb]"])) if problem.path[0] == "tracking"]
    assert [problem.message for problem in problems] == ["wandb is not installed here; `pip install 'terrace[wandb]'` installs its client"]
    assert cli.main(["run", str(tiny), "--run-dir", str(tmp_path / "run"), "tracking.also=[wandb]"]) == 2
    assert "tracking.also: wandb is not installed here; `pip install 'terrace[wandb]'`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "refused before anything is prepared"
    with pytest.raises(InputError, match="tensorboard"):
        load_recipe(tiny, ["tracking.also=[tensorbord]"])


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KiB of pieces (checksum, length, kind) as LevelDB's log has."""
    content, place, record = file.read_bytes(), 7, b""
    while place < len(content):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_has_every_step_once_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """W&B itself, offline: its own reader finds the steps of both processes, and nothing of keys, user, host or command line."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    secret = "s3cr3t-of-the-environment-0123456789abcdef"
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--password={secret}"])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    warnings: list[str] = []
    told(tmp_path, [row(1), row(2), row(3)], "SCHEDULED", warnings, "wandb")
    told(tmp_path, [row(step) for step in range(1, 7)], "FINISHED", warnings, "wandb")
    assert warnings == []
    steps: dict[str, list[int]] = {}
    parents = set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        assert secret.encode() not in file.read_bytes()
        key = ""
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                key = record.run.run_id
                parents.add(record.run.run_group)
                assert record.run.project == "terrace"
            items = {item.key or item.nested_key[-1]: json.loads(item.value_json) for item in record.history.item}
            if "loss" in items:
                steps.setdefault(key, []).append(items["step"])
    assert steps == {"stage": [1, 2, 3, 4, 5, 6], "parent": [101, 102, 103, 104, 105, 106]}
    assert parents == {"parent"}
    for file in (tmp_path / "wandb").rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_swanlab_has_every_step_once_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SwanLab itself, offline: its own reader finds the steps of both processes under one id, stages as sections, and nothing else."""
    pytest.importorskip("swanlab", reason="swanlab is not installed")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    secret = "s3cr3t-of-the-environment-0123456789abcdef"
    for name in ("SWANLAB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--password={secret}"])
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    warnings: list[str] = []
    told(tmp_path, [row(1), row(2, loss=None), row(3)], "SCHEDULED", warnings, "swanlab")
    told(tmp_path, [row(1), row(2, loss=None), *(row(step) for step in range(3, 7))], "FINISHED", warnings, "swanlab")
    assert warnings == []
    steps: dict[str, list[int]] = {}
    starts = []
    for file in sorted(tmp_path.glob("swanlab/run-*/*.swanlab")):
        reader = DataStoreReader()
        reader.open(str(file))
        for data in reader:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("start"):
                starts.append((record.start.project, record.start.id, record.start.name))
            if record.HasField("scalar"):
                steps.setdefault(record.scalar.key, []).append(record.scalar.step)
    assert starts == [("terrace", "parent", "mine")] * 2, "joined by their id"
    assert (steps["01-sft/loss"], steps["loss"]) == ([1, 2, 3, 4, 5, 6], [101, 103, 104, 105, 106])
    assert steps["01-sft/eval/caption/loss"] == [0, 6]
    assert len(list(tmp_path.glob("swanlab/run-*/files/*"))) == 4, "metadata without content, and the parameters, of each process"
    for file in (tmp_path / "swanlab").rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file
