"""Checkpoints without a model: which stay, and on S3: complete by one write, fenced, fetched by machines that share nothing else."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stored_run import BUCKET, Machines

from terrace.cluster.attempt_outcome import newest_checkpoint_step
from terrace.errors import TerraceError
from terrace.models.tensor_files import Stretch
from terrace.recipe.schema import Checkpoint
from terrace.storage import conditional, mirror
from terrace.storage.run_storage import run_storage
from terrace.train import checkpoint as module
from terrace.train.checkpoint import CheckpointWriter, Superseded
from terrace.train.metrics import measured
from terrace.train.restore import CheckpointReader, FoundCheckpoint, find_fault, newest_complete
from terrace.train.retention import superfluous
from terrace.train.strategies.shards import divided, whole_shard
from terrace.worker.context import WorkerContext


class Strategy:
    """Tensors whose value is the step, on as many ranks as there are."""

    def __init__(self, step: int, rank: int = 0, ranks: int = 1) -> None:
        self.step, self.place = step, (rank, ranks)

    def shards(self, kind: str) -> Any:
        whole = (whole_shard(name, torch.full((3, 4), float(self.step))) for name in ("a", "b", "c"))
        return divided(whole, *self.place)

    def optimizer_steps(self) -> dict[str, int]:
        return {"a": self.step}


def save(writer: CheckpointWriter, step: int, **line: Any) -> None:
    stage, line = writer._folder.parent, {"step": step, **line}
    with open(stage / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    writer.save(Strategy(step), {"step": step}, measured(line))
    writer.wait()


def writer_in(stage: Path, attempt: int = 1, **options: Any) -> CheckpointWriter:
    stage.mkdir(parents=True, exist_ok=True)
    return CheckpointWriter(stage / "checkpoints", Checkpoint(**options), WorkerContext(), attempt, run_storage(stage))


def newest(folder: Path) -> FoundCheckpoint:
    return newest_complete(folder, run_storage(folder))


def reader_of(path: Path) -> CheckpointReader:
    return CheckpointReader(path, run_storage(path))


def test_whichever_file_is_damaged_one_of_the_ranks_that_compare_them_finds_it(tmp_path: Path):
    save(writer_in(tmp_path), 10)
    folder = tmp_path / "checkpoints" / "step-000010"
    names = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    assert len(names) >= 3
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        faults = [find_fault(folder, share=(rank, 2)) for rank in range(2)]
        assert [fault for fault in faults if fault] == [f"{name} does not match its checksum"]
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------- what stays


@pytest.mark.parametrize(
    ("options", "values", "kept"),
    [
        ({"keep_last": 2}, {}, [50, 60]),
        ({"keep_last": 1, "keep_every_steps": 20}, {}, [20, 40, 60]),
        ({"keep_last": 1, "best_metric": "eval/loss"}, {10: 3.0, 20: 1.0, 30: 2.0}, [20, 60]),
        ({"keep_last": 1, "best_metric": "eval/loss", "best_is": "highest"}, {10: 3.0, 20: 1.0, 30: 2.0}, [10, 60]),
        ({"keep_last": 1, "best_metric": "eval/loss"}, {10: 1.0, 30: 1.0}, [30, 60]),
        ({"keep_last": 1, "best_metric": "eval/loss"}, {}, [60]),
        ({"keep_last": 3, "keep_every_steps": 30, "best_metric": "eval/loss"}, {10: 1.0, 60: 2.0}, [10, 30, 40, 50, 60]),
    ],
)
def test_the_last_every_nth_and_the_best_stay(options: dict[str, Any], values: dict[int, float], kept: list[int]):
    metrics = {step: {"eval/loss": values[step]} if step in values else {} for step in range(10, 70, 10)}
    gone = superfluous(metrics, Checkpoint(**options), newest=60)
    assert [step for step in metrics if step not in gone] == kept


def test_a_checkpoint_behind_older_ones_is_not_the_one_that_goes():
    """After a rewind to step 2 the newest is not the highest."""
    assert superfluous({2: {}, 4: {}, 6: {}}, Checkpoint(keep_last=1), newest=2) == [4]


def test_metrics_are_named_as_in_gates():
    line = {"step": 3, "loss": 1.5, "grad_norm": float("inf"), "skipped": True, "evaluation": {"caption": 2.0, "text": 4.0}}
    assert measured(line) == {"train/loss": 1.5, "eval/caption/loss": 2.0, "eval/text/loss": 4.0, "eval/loss": 3.0}


def test_on_disk_the_best_outlives_the_newer(tmp_path: Path):
    writer = writer_in(tmp_path, keep_last=1, best_metric="eval/caption/loss")
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 4.0)):
        save(writer, step, loss=9.0, evaluation={"caption": loss})
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-000004", "step-000008"]
    manifest = json.loads((tmp_path / "checkpoints/step-000004/manifest.json").read_text())
    assert manifest["metrics"] == {"train/loss": 9.0, "eval/caption/loss": 1.0, "eval/loss": 1.0}


def test_on_disk_an_older_attempt_that_wakes_up_in_the_middle_of_a_write_completes_nothing(tmp_path: Path, monkeypatch):
    old = writer_in(tmp_path)
    save(old, 2, loss=1.0)
    real = module.write_durably

    def overtaken(path: Path, content: bytes) -> None:
        real(path, content)
        if path.name == "manifest.json":
            monkeypatch.setattr(module, "write_durably", real)
            writer_in(tmp_path, attempt=2)

    monkeypatch.setattr(module, "write_durably", overtaken)
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        save(old, 4, loss=1.0)
    assert newest(tmp_path / "checkpoints").path.name == "step-000002"


def test_what_is_written_in_the_background_is_what_was_there_when_it_was_saved(tmp_path: Path, monkeypatch):
    """Training goes on with the same tensors while the thread writes: the optimizer's next step must not be in the files."""
    weights, own = torch.ones(8), torch.ones(3)
    strategy = Strategy(2)
    strategy.shards = lambda kind: iter([whole_shard("a", weights)])
    go_on, real = threading.Event(), module.save_file

    def late(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert go_on.wait(30)
        real(tensors, path)

    monkeypatch.setattr(module, "save_file", late)
    writer = writer_in(tmp_path, asynchronous=True)
    writer.save(strategy, {"step": 2}, {}, [("running", own)])
    weights.add_(1.0)
    own.add_(1.0)
    go_on.set()
    writer.wait()
    saved = tmp_path / "checkpoints" / "step-000002"
    for kind, name in (("weights", "a"), ("exp_avg", "a"), ("exp_avg_sq", "a"), ("objective", "running")):
        assert set(load_file(saved / f"{kind}-00000.safetensors")[name].tolist()) == {1.0}, kind


# ---------------------------------------------------------------- on S3


def stage_on(machines: Machines, name: str, run: str) -> Path:
    """The stage's folder on one of the machines; it exists after this."""
    with machines.on(name):
        stage = mirror.open_run(run) / "stages" / "01-warm"
    stage.mkdir(parents=True, exist_ok=True)
    return stage


def stored_names(run: str) -> list[str]:
    return [entry.name for entry in conditional.list_objects(f"{run}/stages/01-warm/checkpoints")]


def test_another_machine_goes_on_from_what_this_one_stored(machines: Machines, run: str):
    here = stage_on(machines, "a", run)
    writer = writer_in(here, keep_last=2, keep_every_steps=2)
    for step in (2, 4, 5, 7):
        save(writer, step, loss=float(step))
    assert not list((here / "checkpoints").glob("*step-*")), "the disk keeps none"
    assert {name.split("/")[0] for name in stored_names(run)} == {"attempt.json", *(f"step-00000{step}" for step in (2, 4, 5, 7))}
    save(writer, 8, loss=1.0)
    assert not any(name.startswith("step-000005") for name in stored_names(run)), "not among the last two, nor a multiple of 2"
    mirror.flush(here)
    there = stage_on(machines, "b", run)
    assert newest_checkpoint_step(there) == 8, "`terrace status` needs no checkpoint here to know it"
    found = newest(there / "checkpoints")
    assert (found.path.name, found.passed_over) == ("step-000008", ())
    reader = reader_of(found.path)
    assert reader.state["step"] == 8
    assert torch.equal(reader.read("exp_avg", "b"), torch.full((3, 4), 8.0))
    assert (there / "metrics.jsonl").read_text() == (here / "metrics.jsonl").read_text(), "metrics up to it were there before it"


def test_ranks_without_a_common_disk_write_one_checkpoint(machines: Machines, run: str):
    stages = [stage_on(machines, name, run) for name in ("a", "b")]
    contexts = [WorkerContext(rank=rank, world_size=2) for rank in range(2)]
    writers = [
        CheckpointWriter(stage / "checkpoints", Checkpoint(), context, 1, run_storage(stage))
        for stage, context in zip(stages, contexts)
    ]
    for rank, writer in enumerate(writers):
        writer.save(Strategy(6, rank, 2), {"step": 6}, {})
    for writer in writers:
        writer.wait()
    path = newest(stage_on(machines, "c", run) / "checkpoints").path
    reader = reader_of(path)
    assert reader.names("weights") == reader.names("exp_avg_sq") == {"a", "b", "c"}
    assert torch.equal(reader.read("exp_avg", "b"), torch.full((3, 4), 6.0)), "half of it from each"
    assert len([name for name in stored_names(run) if "/weights-" in name]) == 2, "each rank wrote its part"
    assert {file.name for file in path.iterdir()} == {"manifest.json", "index.json", "state.json"}, "no copy of the tensors"


@pytest.mark.parametrize("fault", ["not committed", "no manifest", "another manifest", "changed byte", "torn file", "file is gone"])
def test_incomplete_ones_are_passed_over_by_name(machines: Machines, run: str, fault: str, caplog: pytest.LogCaptureFixture):
    run = f"s3://{BUCKET}/{fault.replace(' ', '-')}"
    here = stage_on(machines, "a", run)
    writer = writer_in(here)
    save(writer, 2, loss=1.0)
    if fault == "not committed":
        writer._stored.commit = lambda *_: None
    save(writer, 4, loss=1.0)
    prefix = f"{run}/stages/01-warm/checkpoints/step-000004/attempt-001"
    name = f"{prefix}/exp_avg-00000.safetensors"
    content = conditional.read_versioned(name)[0]
    if fault == "no manifest":
        conditional.remove([f"{prefix}/manifest.json"])
    elif fault == "another manifest":
        conditional.swap(f"{prefix}/manifest.json", lambda content: content.replace(b'"step": 4', b'"step": 5'))
    elif fault == "changed byte":
        conditional.swap(name, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "torn file":
        conditional.swap(name, lambda content: content[:-100])
    elif fault == "file is gone":
        conditional.remove([name])
    assert content
    caplog.set_level(logging.WARNING)
    found = newest(stage_on(machines, "b", run) / "checkpoints")
    assert found.path.name == "step-000002"
    assert found.passed_over[0][0].name == "step-000004"
    assert "step-000004 is passed over" in caplog.text


def test_an_older_attempt_that_wakes_up_anywhere_completes_nothing(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    """Another machine takes over between the upload of the manifest and the fence, the last moment there is."""
    here, there = stage_on(machines, "a", run), stage_on(machines, "b", run)
    old = writer_in(here)
    save(old, 2, loss=1.0)
    real = old._stored.upload

    def overtaken(file: Path, step: int, attempt: int) -> None:
        real(file, step, attempt)
        if file.name == "manifest.json":
            save(writer_in(there, attempt=2), 4, loss=2.0)

    monkeypatch.setattr(old._stored, "upload", overtaken)
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        save(old, 4, loss=1.0)
    found = newest(stage_on(machines, "c", run) / "checkpoints")
    assert json.loads((found.path / "manifest.json").read_text())["attempt"] == 2
    with pytest.raises(Superseded):
        writer_in(here, attempt=1)
    writer_in(there, attempt=3)
    assert not any("step-000004/attempt-001" in name for name in stored_names(run)), "what it had uploaded is removed"
    assert any("step-000004/attempt-002" in name for name in stored_names(run))


def test_ranks_of_one_machine_fetch_the_small_files_once_and_read_the_ranges_that_they_hold(machines: Machines, run: str):
    save(writer_in(stage_on(machines, "a", run)), 2, loss=1.0)
    there = stage_on(machines, "b", run) / "checkpoints" / "step-000002"
    machines.server.requests.clear()
    found: dict[int, list[torch.Tensor]] = {}

    def read(rank: int) -> None:
        wanted = [Stretch(name, 4 * rank, 4 * rank + 4) for name in ("a", "b", "c")]
        found[rank] = list(reader_of(there).source("exp_avg").stretches(wanted))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {rank: [tensor.tolist() for tensor in tensors] for rank, tensors in found.items()} == dict.fromkeys(range(3), [[2.0] * 4] * 3)
    asked = [path.rpartition("/")[2] for method, path, _ in machines.server.requests if method == "GET" and "attempt-001/" in path]
    assert sorted(name for name in asked if name.endswith(".json")) == ["index.json", "manifest.json", "state.json"]
    assert {name for name in asked if not name.endswith(".json")} == {"exp_avg-00000.safetensors"}, "no other kind's file is opened"
    assert {file.name for file in there.iterdir()} == {"index.json", "manifest.json", "state.json"}
    shutil.rmtree(there)
    with pytest.raises(TerraceError, match="the fence does not list it"):
        reader_of(there.with_name("step-000009"))


def test_a_storage_that_fails_now_and_then_costs_nothing_but_time(machines: Machines, run: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("terrace.storage.s3.BACKOFF_BASE_SECONDS", 0.01)
    writer = writer_in(stage_on(machines, "a", run))
    machines.server.fault = lambda number, method: 503 if number % 4 == 0 else None
    try:
        save(writer, 2, loss=1.0)
        found = newest(stage_on(machines, "b", run) / "checkpoints")
    finally:
        machines.server.fault = None
    assert machines.server.failed > 0
    assert reader_of(found.path).read("weights", "a")[0, 0] == 2.0


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("answer", [503, (403, "AccessDenied"), (400, "ExpiredToken")])
def test_a_checkpoint_waits_for_a_storage_that_is_away_longer_than_a_request_tries(machines: Machines, run: str, answer):
    writer = writer_in(stage_on(machines, "a", run))
    save(writer, 2, loss=1.0)
    machines.server.requests.clear()
    machines.server.fault = lambda number, method: answer if len(machines.server.requests) < 35 else None  # three times ten tries
    save(writer, 4, loss=1.0)
    assert len(machines.server.requests) > 35
    assert reader_of(newest(stage_on(machines, "b", run) / "checkpoints").path).read("weights", "a")[0, 0] == 4.0
