"""Puts this folder on the path and its fixtures at hand; their code is in e2e_runs.py, whose name no other folder has."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

from e2e_runs import overrides  # noqa: E402, F401
