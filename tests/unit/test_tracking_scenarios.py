"""What befalls tracking in a run of weeks, each on a real `mlflow server`: away, frozen, deleted, exchanged, full of odd names, on S3."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mlflow_server import MlflowServer, mlflow_server, runs_by_name, steps
from report_run import write_run
from stored_run import BUCKET, Machines
from waiting import eventually

from terrace import cli
from terrace.storage.conditional import list_objects
from terrace.track.mlflow_store import Store
from terrace.track.series import RunSpec, Series
from terrace.track.tracking import LARGEST_WAIT_SECONDS, Tracking, open_tracking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HOUR = 3600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr("terrace.track.tracking.TRY_SECONDS", 0.05)


class Clock:
    """Virtual time: waits of the tracking thread pass at once, and `passes(seconds)` is what the world does meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seconds, self.waits = 0.0, list[float]()
        self.passes: Callable[[float], None] = lambda seconds: None

        def closed(tracking: Tracking, seconds: float) -> bool:
            if not tracking._closing:
                self.seconds += seconds
                self.waits.append(seconds)
                self.passes(seconds)
            return tracking._closing

        monkeypatch.setattr(Tracking, "_closed", closed)


class Training:
    """A stage that writes rows, and what its controller says of it."""

    def __init__(self, folder: Path, uri: str, experiment: str):
        self.path, self.step, self.ids, self.said = folder / "metrics.jsonl", 0, {}, []
        self.tracking = open_tracking(folder, uri, experiment, self.said.append)

    def spec(self, name: str, **more: Any) -> RunSpec:
        more = {"parameters": {"budget": {"steps": 6}}, "tags": {}, **more}
        return RunSpec(f"key-{name}", name, run_id=self.ids.get(name), done=lambda run: self.ids.update({name: run}), **more)

    def begin(self) -> None:
        self.tracking.open_run(self.spec("run"))
        self.tracking.open_run(self.spec("stage", parent="key-run"))

    def rows(self, count: int, **more: Any) -> None:
        with open(self.path, "a") as file:
            for step in range(self.step + 1, self.step + count + 1):
                file.write(json.dumps({"step": step, "loss": 1 / step, "time": 1000.0 + step, **more}) + "\n")
        self.step += count
        self.tracking.log_rows("key-stage", Series(self.path))
        self.tracking.log_rows("key-run", Series(self.path, 1, 2, 100))

    def end(self) -> None:
        for key in ("key-stage", "key-run"):
            self.tracking.end_run(key, "FINISHED")
        assert eventually(lambda: self.tracking.flush(60), 120)
        self.tracking.close()


def assert_whole(client: Any, training: Training, experiment: str) -> None:
    runs = runs_by_name(client, experiment)
    assert set(runs) == {"run", "stage"}, "each run once"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert steps(client, runs["stage"].info.run_id, "loss") == list(range(1, training.step + 1))
    assert steps(client, runs["run"].info.run_id, "loss") == list(range(101, training.step + 101))
    assert runs["stage"].data.tags["mlflow.parentRunId"] == runs["run"].info.run_id
    assert runs["stage"].data.params["budget.steps"] == "6"
    assert training.ids == {name: run.info.run_id for name, run in runs.items()}, "and the journal knows them"


def test_away_at_the_start_and_for_an_hour_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two outages, each of an hour of virtual time with a step every second: it is said once each, and every step arrives once."""
    clock = Clock(monkeypatch)
    with mlflow_server(tmp_path / "server", started=False) as server:
        training = Training(tmp_path, server.uri, "away")
        queues, came_back = [], clock.seconds + HOUR

        def passes(seconds: float) -> None:
            training.rows(int(seconds))
            queues.append(sum(isinstance(work, tuple) for work in list(training.tracking._each[0]._works)))
            if clock.seconds >= came_back:
                server.start()

        clock.passes = passes
        training.begin()
        training.rows(5)
        assert eventually(lambda: training.tracking.flush(60), 300)
        first = training.step
        assert first > HOUR
        server.kill()
        came_back = clock.seconds + HOUR
        training.rows(5)
        assert eventually(lambda: training.step > first + HOUR and training.tracking.flush(60), 300)
        training.end()
        assert_whole(server.client(), training, "away")
    assert max(clock.waits) == LARGEST_WAIT_SECONDS, "it is tried every few minutes, not for ever less often"
    assert len(clock.waits) < 60
    assert max(queues) < 8, "an outage keeps no steps in memory"
    assert [line.partition(f"{server.uri} is ")[2][:10] for line in training.said] == ["not reache", "back"] * 2


def test_a_server_that_takes_connections_and_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    with mlflow_server(tmp_path / "server") as server:
        training = Training(tmp_path, server.uri, "frozen")
        training.begin()
        training.rows(5)
        assert training.tracking.flush(60)
        server.signal(signal.SIGSTOP)

        def passes(seconds: float) -> None:
            training.rows(5)
            if len(clock.waits) == 3:
                server.signal(signal.SIGCONT)

        clock.passes = passes
        training.rows(5)
        assert eventually(lambda: len(clock.waits) >= 3 and training.tracking.flush(60), 120)
        training.end()
        found = server.client()
        # What it had received when the client gave up, it does once it goes on: such a step may be there twice, none is missing.
        assert set(steps(found, training.ids["stage"], "loss")) == set(range(1, training.step + 1))
        assert runs_by_name(found, "frozen")["stage"].info.status == "FINISHED"
    assert [line.partition(f"{server.uri} is ")[2][:10] for line in training.said] == ["not reache", "back"]


@pytest.mark.parametrize("which", ["stage", "run", "both", "for ever"])
def test_runs_that_somebody_deleted_are_made_anew_and_full(which: str, server: MlflowServer, tmp_path: Path):
    found, experiment = server.client(), f"deleted {which}"
    training = Training(tmp_path, server.uri, experiment)
    training.begin()
    training.rows(5)
    assert training.tracking.flush(60)
    for name in ("run", "stage"):
        if which in (name, "both", "for ever"):
            found.delete_run(training.ids[name])
        if which == "for ever":  # what `mlflow gc` does
            store = f"sqlite:///{server.folder}/server.db"
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(store, str(server.folder / "artifacts"))._hard_delete_run(training.ids[name])
    training.rows(5)
    training.end()
    assert_whole(found, training, experiment)
    assert training.said == []


def test_an_experiment_that_somebody_deleted_is_waited_for_by_name(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    found, clock = server.client(), Clock(monkeypatch)
    training = Training(tmp_path, server.uri, "deleted")
    training.begin()
    training.rows(5)
    assert training.tracking.flush(60)
    identifier = found.get_experiment_by_name("deleted").experiment_id
    found.delete_experiment(identifier)
    run_dir = write_run(tmp_path / "made", steps=8)
    assert cli.main(["track", str(run_dir), "--uri", server.uri, "--experiment", "deleted"]) == 1
    assert f"{server.uri} takes nothing: the experiment `deleted` was deleted there; restore it" in capsys.readouterr().err
    clock.seconds, clock.waits = 0.0, []
    clock.passes = lambda seconds: found.restore_experiment(identifier) if clock.seconds > HOUR else training.rows(1)
    training.rows(5)
    assert eventually(lambda: clock.seconds > HOUR and training.tracking.flush(60), 120)
    training.end()
    assert_whole(found, training, "deleted")
    assert [line.partition(f"{server.uri} ")[2][:11] for line in training.said] == ["takes nothi", "is back"]
    assert f"restore --experiment-id {identifier}`" in training.said[0]


def test_another_server_gets_the_whole_and_the_first_one_the_rest(server: MlflowServer, tmp_path: Path):
    """`tracking.uri` is changed and changed back; ids that the journal has of one mean nothing to the other."""
    with mlflow_server(tmp_path / "other") as other:
        training = Training(tmp_path, server.uri, "moved")
        training.begin()
        training.rows(5)
        assert training.tracking.flush(60)
        training.tracking.close()
        first = dict(training.ids)
        for uri in (other.uri, server.uri):
            training.tracking = open_tracking(tmp_path, uri, "moved", training.said.append)
            training.begin()
            training.rows(5)
            training.end()
            assert_whole((other if uri == other.uri else server).client(), training, "moved")
            assert (training.ids == first) is (uri == server.uri)
    assert training.said == []


def test_a_server_that_lost_everything_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    with mlflow_server(tmp_path / "server") as server:
        training = Training(tmp_path, server.uri, "lost")
        training.begin()
        training.rows(5)
        assert training.tracking.flush(60)
        server.kill()
        for file in (tmp_path / "server").glob("server.db*"):
            file.unlink()
        clock.passes = lambda seconds: server.start() if len(clock.waits) == 2 else None
        training.rows(5)
        assert eventually(lambda: len(clock.waits) >= 2 and training.tracking.flush(60), 300)
        training.end()
        assert_whole(server.client(), training, "lost")


def test_odd_names_and_values_cost_no_other(server: MlflowServer, tmp_path: Path):
    """Metrics, parameters, tags and datasets that a server would refuse: the rest is there, and what is not is named."""
    training = Training(tmp_path, server.uri, "odd")
    parameters = {
        "a?b": 1, "a_b": 2, "x" * 400: "long", "text": "y" * 20_000, "": "no name", "../up": 3, "größe": 4, "none": None,
        "many": {str(number): number for number in range(300)}, "lines": "a\nb\0c", "true": True, "budget": {"steps": 6},
    }  # fmt: skip
    tags = {"mlflow.note.content": "z" * 200_000, "terrace.run_dir": "/tmp/größe"}
    datasets = ({"name": "d" * 600, "digest": "e" * 60, "source": "f" * 100_000, "source_type": "local"},)
    training.tracking.open_run(training.spec("run", parameters=parameters, tags=tags, datasets=datasets))
    training.tracking.open_run(training.spec("stage", parent="key-run"))
    names = ("größe|x", "a/../b", "/", "", "x" * 300, "a\nb", "per cent %", "../../up", "q" * 249 + "/r")
    tasks = {name: {"reward": 0.5} for name in names}
    tasks |= {"nan": {"reward": math.nan}, "large": {"reward": 1e308}, "inf": {"reward": math.inf}, "text": {"reward": "high"}}
    training.rows(5, tasks=tasks)
    training.tracking.log_evaluation("key-stage", [("eval/caption/loss", 1.5), ("no|name", 2.0)], 5, 1000.0)
    training.end()
    found = server.client()
    assert_whole(found, training, "odd")
    run = found.get_run(training.ids["run"])
    assert {"reward/large", "reward/gr__e_x", "reward/a/b", "reward/per cent _"} <= set(run.data.metrics)
    assert run.data.metrics["reward/large"] == 1e308
    assert not {"reward/nan", "reward/inf", "reward/text"} & set(run.data.metrics)
    assert {"text", "many.299", "lines", "true", "budget.steps", "up"} <= set(run.data.params)
    assert len(run.data.params["text"]) <= 6000
    assert run.data.tags["terrace.run_dir"] == "/tmp/größe"
    assert steps(found, training.ids["stage"], "eval/caption/loss") == [5]
    assert run.data.params["a_b"] == "1"
    assert run.data.params["a_b_"] == "2"
    assert [line.partition(" does not take ")[2][:11] for line in training.said] == ["the dataset", "no|name (IN"], training.said
    assert all("\n" not in line and len(line) < 1000 for line in training.said)


def test_a_run_that_was_cut_off_while_it_was_made_is_completed(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed between the run and its parameters: whoever finds it by its key gives it what it lacks, and only that."""
    from mlflow.tracking import MlflowClient

    spec = RunSpec(
        "key-cut", "cut", {"a": 1, "b": 2}, {}, datasets=({"name": "rows", "digest": "1", "source": "{}", "source_type": "local"},)
    )

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(server.uri, "cut").open_run(spec)
    for _ in range(2):
        Store(server.uri, "cut", warn=pytest.fail).open_run(spec)
    runs = runs_by_name(server.client(), "cut")
    assert runs["cut"].data.params == {"a": "1", "b": "2"}
    assert [item.dataset.name for item in runs["cut"].inputs.dataset_inputs] == ["rows"]


@pytest.mark.parametrize("who", ["the server", "the client", "a bucket that is missing"])
def test_artifacts_on_s3(who: str, machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bucket behind the server, one that clients write to themselves, and one that is not there, which costs nothing but artifacts."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", machines.server.url)
    place = f"s3://{BUCKET}/{who.replace(' ', '-')}" if who != "a bucket that is missing" else "s3://nowhere/x"
    places = {"artifacts": place} if who == "the server" else {"root": place}
    variables = {**machines.environment("tracking"), "MLFLOW_S3_ENDPOINT_URL": machines.server.url}
    with mlflow_server(tmp_path / "server", environment=variables, **places) as server:
        training = Training(tmp_path, server.uri, "stored")
        training.begin()
        (tmp_path / "recipe.yaml").write_text("name: x")
        training.tracking.log_artifacts("key-run", [tmp_path / "recipe.yaml", tmp_path / "none.jsonl"])
        training.rows(5)
        training.end()
        assert_whole(server.client(), training, "stored")
    if who == "a bucket that is missing":
        [line] = training.said
        assert "artifact recipe.yaml was left out" in line
        assert "NoSuchBucket" in line
        assert "\n" not in line
    else:
        assert training.said == []
        assert [entry.name.rpartition("/")[2] for entry in list_objects(place)] == ["recipe.yaml"]
