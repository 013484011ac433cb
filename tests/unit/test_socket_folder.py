"""A folder for temporary files with a long name, as schedulers of clusters give one, is no obstacle to what needs sockets."""

from __future__ import annotations

import logging
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from terrace.cluster.start_ray import RAY_SOCKET, leave_long_folder
from terrace.data.stream.machine_plan import PlannerServer
from terrace.storage import socket_folder as module
from terrace.storage.socket_folder import LONGEST_NAME, place_for, socket_folder


@pytest.mark.parametrize("long", [True, False])
def test_sockets_fit_wherever_temporary_files_go(monkeypatch: pytest.MonkeyPatch, long: bool):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        place = Path(short) / ("x" * 120 if long else "x")
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        folder = socket_folder("terrace-test-")
        try:
            assert folder.parent == (Path("/tmp") if long else place)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(folder / "server"))
            (folder / "server").unlink()
        finally:
            folder.rmdir()
        PlannerServer(None, 0)  # which nobody asks anything  # type: ignore[arg-type]


def test_the_longest_name_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch):
    below = "/folder/server"
    for length, expected in ((LONGEST_NAME, True), (LONGEST_NAME + 1, False)):
        name = "/tmp/" + "é" * 3  # two bytes each
        name += "x" * (length - len(os.fsencode(name + below)))
        monkeypatch.setattr(tempfile, "tempdir", name)
        assert place_for(below) == (name if expected else module.SHORT)
        assert len(os.fsencode(name + below)) == length


def test_ray_is_told_where_its_sockets_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("RAY_TMPDIR", "as the user says")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 60)
    leave_long_folder()
    assert os.environ["RAY_TMPDIR"] == "as the user says"
    monkeypatch.delenv("RAY_TMPDIR")
    with caplog.at_level(logging.WARNING):
        leave_long_folder()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert "too long" in caplog.text
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 20)
    leave_long_folder()
    assert "RAY_TMPDIR" not in os.environ
    assert len(RAY_SOCKET) < LONGEST_NAME / 1.5
