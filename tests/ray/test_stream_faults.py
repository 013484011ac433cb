"""What goes wrong while a stage reads: the packs that arrive are those of a run where nothing did."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import s3_server
from stream_rows import STEPS, contents, open_all, write_rows

from terrace.data.order.plan import StagePlan
from terrace.data.stream.rank_stream import open_stream
from terrace.errors import DamagedData
from terrace.recipe.schema import Storage
from terrace.storage.s3 import s3

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    return open_all(folder, tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def expected(local) -> list:
    _, prepared, plan = local
    return [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "inline")]


@pytest.fixture(scope="module")
def server():
    with s3_server.serve_s3() as running:
        s3(Storage(endpoint_url=running.url)).mkdir("bucket")
        yield running


@pytest.fixture(scope="module")
def remote(ray_cluster, server, folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same data with its shards on S3."""
    where = ["data.cache_dir=s3://bucket/cache", f"data.storage.endpoint_url={server.url}"]
    return open_all(folder, tmp_path_factory.mktemp("remote"), *where)


def test_s3_refuses_every_fifth_request(remote, server, expected) -> None:
    _, prepared, plan = remote
    assert prepared.indexes["captions"].shards[0].startswith("s3://bucket/cache/captions/")
    draw, lock = random.Random(3), threading.Lock()

    def fault(number: int, method: str) -> int | None:
        with lock:
            return 503 if draw.random() < 0.2 else None

    server.requests.clear()
    server.fault, server.failed = fault, 0
    try:
        found = [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "ray")]
    finally:
        server.fault = None
    assert found == expected
    assert server.failed > 0.1 * len(server.requests) > 3


@pytest.mark.slow
def test_s3_is_gone_for_20_seconds(remote, server, expected) -> None:
    recipe, prepared, _ = remote
    [stage] = recipe.stages
    loading = stage.data_loading.model_copy(update={"packs_per_task": 1})  # so that most of the tasks come after the second step
    recipe = recipe.model_copy(update={"stages": [stage.model_copy(update={"data_loading": loading})]})
    plan = StagePlan.build(recipe, 0, prepared)
    found, returned = [], threading.Timer(20, server.start)
    for step in open_stream(plan, prepared, 0, 1, 0, "ray"):
        found.append(contents(step.packs))
        if step.step == 1:
            server.stop()
            begun = time.monotonic()
            returned.start()
    returned.join()
    assert found == expected
    assert time.monotonic() - begun > 20  # it had to wait


def test_a_full_object_store_spills_and_goes_on(ray_cluster, local, expected) -> None:
    _, prepared, plan = local
    held = [ray_cluster.put(np.full(40 * 2**20, number, np.uint8)) for number in range(7)]  # 280 of 300 MB
    assert [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "ray")] == expected
    assert [int(ray_cluster.get(ref)[7]) for ref in held] == list(range(7))


def test_a_shard_cut_after_indexing_stops_by_name_or_is_replaced(ray_cluster, folder: Path, tmp_path: Path) -> None:
    small = ["data.shard_bytes=262144"]
    _, prepared, plan = open_all(folder, tmp_path, *small)
    healthy = sum(pack.tokens for step in open_stream(plan, prepared, 0, 1, 0, "inline") for pack in step.packs)
    shard = Path(prepared.indexes["captions"].shards[1])
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(DamagedData, match=rf"sample c\d+, shard {shard}: .*the shard was cut"):
        list(open_stream(plan, prepared, 0, 1, 0, "ray"))
    skip = [f"data.sources.{name}.on_damage=skip" for name in ("captions", "text")]
    _, prepared, plan = open_all(folder, tmp_path, *small, *skip)
    steps = list(open_stream(plan, prepared, 0, 1, 0, "ray"))
    packs = [pack for step in steps for pack in step.packs]
    damaged = [name for pack in packs for name in pack.damaged]
    assert len(damaged) > 3
    assert sum(pack.replaced for pack in packs) == len(damaged)
    assert 0.99 * healthy < sum(pack.tokens for pack in packs) <= healthy
    found = [contents(step.packs) for step in steps]
    assert found == [contents(step.packs) for step in open_stream(plan, prepared, 0, 1, 0, "inline")]
    halves = [list(open_stream(plan, prepared, rank, 2, 7, "ray")) for rank in range(2)]
    for turn, step in enumerate(range(7, STEPS)):
        assert sorted(pack for half in halves for pack in contents(half[turn].packs)) == sorted(found[step])


NODE_DIES = """
import sys
sys.path.insert(0, {tests!r})
import hashlib, json, ray
from pathlib import Path
from ray.cluster_utils import Cluster
from stream_rows import contents, open_all
from terrace.data.stream.rank_stream import open_stream

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "object_store_memory": 200 * 2**20}})
node = cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20)
ray.init(address=cluster.address, log_to_driver=False, include_dashboard=False)
cluster.wait_for_nodes()
_, prepared, plan = open_all(Path({folder!r}), Path({run!r}), "stages.0.data_loading.packs_per_task=1", "stages.0.resources.decode_cpus=3")
found = []
for step in open_stream(plan, prepared, 0, 1, 0, "ray"):
    found.append(hashlib.sha256(repr(contents(step.packs)).encode()).hexdigest())
    if step.step == 1:
        cluster.remove_node(node, allow_graceful=False)
print("FOUND " + json.dumps([found, sum(one["Alive"] for one in ray.nodes())]), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_dies(folder: Path, expected, tmp_path: Path) -> None:
    import hashlib
    import json

    script = NODE_DIES.format(tests=str(Path(__file__).resolve().parents[1]), folder=str(folder), run=str(tmp_path / "run"))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False, env=environment)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
    assert line.startswith("FOUND "), line
    found, alive = json.loads(line.removeprefix("FOUND "))
    assert alive == 1
    assert found == [hashlib.sha256(repr(step).encode()).hexdigest() for step in expected]
