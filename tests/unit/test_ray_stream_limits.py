"""How far decode tasks run ahead: what one rank may hold in the object store, and when its next task may start."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from terrace.data.stream.ray_stream import Ahead

MB = 2**20


def test_one_task_waits_in_the_queue_and_no_more():
    ahead = Ahead(cpus=1.0, at_once=2, queued=1, task_bytes=10 * MB, store_bytes=1000 * MB)
    assert [ahead.allows(active, 0) for active in range(5)] == [True, True, True, False, False]


def test_a_trainer_that_takes_nothing_stops_the_decoding():
    """Finished blocks and those that running tasks will make never exceed two rounds of tasks, whatever the store could hold."""
    ahead = Ahead(cpus=1.0, at_once=2, queued=1, task_bytes=10 * MB, store_bytes=1000 * MB)
    assert ahead.allows(0, 50 * MB)
    assert not ahead.allows(0, 51 * MB)
    assert not ahead.allows(2, 31 * MB)


@given(st.integers(1, 64), st.integers(0, 1), st.integers(1, 10**9), st.integers(1, 10**11), st.integers(0, 64), st.integers(0, 10**11))
def test_what_is_allowed_always_has_room(at_once: int, queued: int, task: int, store: int, active: int, waiting: int):
    ahead = Ahead(1.0, at_once, queued, task, store)
    if ahead.allows(active, waiting):
        assert waiting + (active + 1) * task <= store
        assert active + 1 <= at_once + queued
