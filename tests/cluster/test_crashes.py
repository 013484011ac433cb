"""The operator dies at every single write, or there are two of it: nothing is lost, nothing happens twice."""

from __future__ import annotations

from cluster_world import tiny_curriculum, tiny_stage

FIVE = [tiny_stage(name) for name in ("warmup", "align", "pretrain", "long-sft", "rl")]


def test_operator_killed_at_every_write_changes_nothing(bench, crd):
    """kill -9 after each single API write of the operator, in every phase of a run with a failure, a suspend and a resume."""
    from cluster_world import Bench

    def one_run(kill_at: int | None) -> tuple[list, int]:
        here = Bench(crd)
        here.store.create(tiny_curriculum(behaviour={"stages": {"align": {"attempts": {"1": {"exit": 1}}}}}))
        writes = 0

        class Killed(BaseException):
            pass

        class Api:
            namespace = "default"

            def __getattr__(self, name):
                call = getattr(here.store, name)

                def counted(*args, **kwargs):
                    nonlocal writes
                    result = call(*args, **kwargs)
                    if name in ("create", "replace_status", "patch", "delete"):
                        writes += 1
                        if writes == kill_at:
                            raise Killed
                    return result

                return counted

        here.controller.api = Api()
        for _ in range(400):
            try:
                here.run(0.1)
            except Killed:
                here.restart()
                here.controller.api = Api()
            if here.status().get("phase") == "Succeeded":
                break
        stages = [(s["name"], s["phase"], s["attempt"], s["restarts"], s["infraRestarts"]) for s in here.status()["stages"]]
        return [stages, here.jobs(), [launch[0] for launch in here.cluster.launches]], writes

    expected, writes = one_run(None)
    assert expected[0][1] == ("align", "Succeeded", 2, 1, 0)
    assert writes > 25
    for kill_at in range(1, writes + 1):
        assert one_run(kill_at)[0] == expected, f"killed after write {kill_at}"


def test_two_operators_at_once_do_no_harm(bench):
    from terrace_operator.controller import Controller

    bench.store.create(tiny_curriculum(stages=FIVE, behaviour={"stages": {"align": {"attempts": {"1": {"exit": 1}}}}}))
    other = Controller(bench.store, clock=bench.clock.wall, monotonic=bench.clock.monotonic)
    other.resync()
    for _ in range(200):
        bench.run(0.1)
        if len(bench.store.changes.get("RayJob", ())) % 3 == 0:
            other.resync()  # the second sees old things most of the time
        for name in other.cache.names():
            other.handle(name)
    assert bench.status()["phase"] == "Succeeded"
    assert sorted(name for name, _, _ in bench.cluster.launches) == sorted(
        ["tiny-s0-1", "tiny-s1-1", "tiny-s1-2", "tiny-s2-1", "tiny-s3-1", "tiny-s4-1"])  # fmt: skip
