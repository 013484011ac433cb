"""A folder for sockets: a socket's name has at most 107 bytes, and on clusters the folder for temporary files may take all of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

LONGEST_NAME = 107  # bytes (unix(7))
SHORT = "/tmp"


def socket_folder(prefix: str) -> Path:
    """A new folder of this user alone (mode 0700) in which sockets with names of a few letters fit: below `TMPDIR`, else in /tmp."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place_for(f"/{prefix}12345678/server")))


def place_for(below: str) -> str:
    """The folder for temporary files where a socket of the path `below` in it has a name that is short enough, else /tmp."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder + below)) <= LONGEST_NAME else SHORT
