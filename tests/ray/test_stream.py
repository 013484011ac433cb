"""The stream through Ray Data: the same packs as in this process, from any step, whatever dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from ray.data.datasource import ReadTask

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stream_rows import contents, open_all, recipe_of, write_rows

from terrace.data.order.plan import StagePlan
from terrace.data.stream import ray_stream
from terrace.data.stream.held_out import held_out_packs
from terrace.data.stream.rank_stream import open_stream
from terrace.errors import DamagedData

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    return open_all(folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def expected(data):
    _, prepared, plan = data
    return [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "inline")]


def test_inline_holds_every_step_in_order(expected):
    assert len(expected) == 12
    assert [[pack[0] for pack in step] for step in expected] == [list(range(4 * s, 4 * s + 4)) for s in range(12)]


def test_ray_gives_the_same_packs(ray_cluster, data, expected, monkeypatch):
    _, prepared, plan = data
    monkeypatch.setattr(ray_stream, "PIPELINE_TASKS", (5, 4))  # several executions, one after another
    found = list(open_stream(plan, prepared, 0, 1, 0, "ray"))
    assert [step.step for step in found] == list(range(12))
    assert [contents(step.packs) for step in found] == expected
    assert all(step.wait_seconds >= 0 for step in found)


def test_every_task_asks_for_room_before_it_starts(ray_cluster, data, expected, monkeypatch):
    _, prepared, plan = data
    asked: list[bool] = []
    allows = ray_stream.Ahead.allows

    def recorded(self, active_tasks, waiting_bytes):
        asked.append(allows(self, active_tasks, waiting_bytes))
        assert not asked[-1] or (active_tasks + 1) * self.task_bytes + waiting_bytes <= self.store_bytes
        return asked[-1]

    monkeypatch.setattr(ray_stream.Ahead, "allows", recorded)
    assert [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "ray")] == expected
    assert asked.count(True) >= 12 * 4 / plan.stage.data_loading.packs_per_task
    assert False in asked  # it was full while tasks ran


@pytest.mark.parametrize(("workers", "start"), [(2, 5), (4, 11)])
def test_workers_share_them_from_any_step(ray_cluster, data, expected, workers, start):
    _, prepared, plan = data
    engine = "ray" if workers == 2 else "inline"
    ranks = [list(open_stream(plan, prepared, rank, workers, start, engine)) for rank in range(workers)]
    for turn, step in enumerate(range(start, 12)):
        shared = sorted(pack for rank in ranks for pack in contents(rank[turn].packs))
        assert shared == sorted(expected[step])


def test_closing_early_leaves_nothing_running(ray_cluster, data):
    _, prepared, plan = data
    before = {thread.ident for thread in threading.enumerate()}
    for engine in ("ray", "inline"):
        stream = open_stream(plan, prepared, 0, 1, 2, engine)
        assert next(stream).step == 2
        stream.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [thread.name for thread in threading.enumerate() if thread.ident not in before]
        if not any("Executor" in name or "terrace" in name for name in left):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"still running: {left}")


def test_a_killed_decode_worker_changes_nothing(ray_cluster, data, expected, tmp_path, monkeypatch):
    _, prepared, plan = data
    mark = tmp_path / "killed"
    plain = ray_stream._read_task

    def dying_task(task, settings):
        """The task that makes pack 16 dies with its process after its first pack, the first time."""
        made = plain(task, settings)
        if 16 not in [part.spec.pack for part in task.parts]:
            return made

        def read():
            for table in made.read_fn():
                yield table
                if not mark.exists():
                    mark.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)

        return ReadTask(read, made.metadata, schema=made.schema)

    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_stream, "_read_task", dying_task)
    found = [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "ray")]
    assert int(mark.read_text()) != os.getpid()
    assert found == expected


def test_a_flipped_byte_names_shard_and_sample_or_is_skipped(ray_cluster, folder, tmp_path):
    _, prepared, plan = open_all(folder, tmp_path, "stages.0.mixture={weights: {captions: 1.0}}")
    ref = plan.packs_of_step(1)[0].samples[0]
    location = prepared.indexes[ref.source].location(ref.row)
    _, offset, size, _ = max(location.members, key=lambda member: member[2])
    with open(location.shard.removeprefix("file://"), "r+b") as shard:
        shard.seek(offset + size // 2)
        byte = shard.read(1)
        shard.seek(offset + size // 2)
        shard.write(bytes([byte[0] ^ 0xFF]))
    for engine in ("inline", "ray"):
        with pytest.raises(DamagedData, match=rf"(?s){ref.id}.*\.tar"):
            list(open_stream(plan, prepared, 0, 1, 0, engine))
    recipe = recipe_of(folder, "stages.0.mixture={weights: {captions: 1.0}}", "data.sources.captions.on_damage=skip")
    tolerant = StagePlan.build(recipe, 0, prepared)
    runs = [
        [(pack.pack, pack.damaged, tuple(pack.sample_ids)) for step in open_stream(tolerant, prepared, 0, 1, 0, engine)
         for pack in step.packs]
        for engine in ("inline", "ray")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert any(f"captions/{ref.id}" in damaged for _, damaged, _ in runs[0])


def test_held_out_packs_are_no_training_samples(data):
    recipe, prepared, plan = data
    held = held_out_packs(recipe, 0, prepared, 3)
    assert set(held) == {"caption", "text"}
    kept = {(source, name) for packs in held.values() for pack in packs for source, name in zip(pack.sources, pack.sample_ids)}
    trained = {(ref.source, ref.id) for _, packs in plan.steps() for pack in packs for ref in pack.samples}
    assert not kept & trained
    assert [len(pack.sample_ids) for pack in held["caption"]] == [3]


def test_the_first_step_does_not_wait_for_ray(ray_cluster, data, expected, monkeypatch):
    _, prepared, plan = data
    taken, blocks = threading.Event(), ray_stream._blocks

    def late(*given):
        assert taken.wait(60), "Ray Data was waited for before the first pack was given"
        yield from blocks(*given)

    monkeypatch.setattr(ray_stream, "_blocks", late)
    stream = open_stream(plan, prepared, 0, 1, 0, "ray")
    found = [contents(next(stream).packs)]
    taken.set()
    assert found + [contents(step.packs) for step in stream] == expected
