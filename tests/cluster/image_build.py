"""Builds a Dockerfile without a container engine: each stage is an overlay over this machine's root file system, each RUN a chroot into it.

What the base image lacks and this machine has is not noticed; everything that the Dockerfile itself does is: paths that are copied,
packages that are resolved and installed under the constraints, the user, the environment, the entry point. Root and overlay mounts are
needed. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# How this machine reaches its registries.
PASSED_ON = ("PIP_", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "http", "HTTP", "no_proxy", "NO_PROXY")


class BuildError(AssertionError):
    """A step failed; the message has the step and the end of what it printed."""


@dataclass
class Image:
    """A stage as built so far."""

    root: Path
    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, words: list[str], timeout: float = 3000.0, as_root: bool = False) -> str:
        """The output of a command in the image, as its user; BuildError where it fails."""
        inherited = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
        base = {"PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp"}
        values = inherited | base | self.arguments | self.environment
        values["PATH"] = values["PATH"].replace("$PATH", base["PATH"])
        user = [] if as_root else [f"--userspec={self.user}"]
        inside = ["/bin/sh", "-c", f"cd {shlex.quote(self.folder)} && exec \"$@\"", "sh", *words]
        done = subprocess.run(["chroot", *user, str(self.root), *inside], env=values, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise BuildError(f"{shlex.join(words)[:300]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        return done.stdout


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Word and rest of each instruction, lines that go on joined, comments left out."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        yield word.upper(), rest.strip()


@contextlib.contextmanager
def built(dockerfile: Path, context: Path, work: Path, arguments: dict[str, str] | None = None) -> Iterator[Image]:
    """The last stage of the Dockerfile, built; everything is unmounted and removed afterwards."""
    stages: list[Image] = []
    given = arguments or {}
    try:
        for word, rest in instructions(dockerfile.read_text()):
            if word == "FROM":
                stages.append(Image(_overlay(work / str(len(stages))), rest.partition(" AS ")[2] or str(len(stages))))
            elif stages:
                _step(stages, word, rest, context, given)
        yield stages[-1]
    finally:
        for image in stages:
            subprocess.run(["umount", "--lazy", str(image.root)], check=False)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def machine_files(image: Image) -> Iterator[None]:
    """/proc, /dev with its shared memory, and /sys inside the image while the block runs, as a container engine gives them."""
    names = ("proc", "dev", "dev/shm", "sys")
    try:
        for name in names:
            subprocess.run(["mount", "--bind", f"/{name}", str(image.root / name)], check=True)
        yield
    finally:
        for name in reversed(names):
            subprocess.run(["umount", "--lazy", str(image.root / name)], check=False)


def _overlay(folder: Path) -> Path:
    parts = {name: folder / name for name in ("upper", "work", "root")}
    subprocess.run(["mkdir", "-p", *map(str, parts.values())], check=True)
    options = f"lowerdir=/,upperdir={parts['upper']},workdir={parts['work']}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(parts["root"])], check=True, capture_output=True)
    for reach in Path(sys.base_prefix).parents:  # this machine's Python may lie in root's home, which an image's user cannot enter
        (parts["root"] / str(reach).lstrip("/")).chmod(0o755)
    for name in ("passwd", "group"):  # a base image has no accounts of people, whose numbers an image's own user may take
        file = parts["root"] / "etc" / name
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not 1000 <= int(line.split(":")[2]) < 65000))
    return parts["root"]


def _step(stages: list[Image], word: str, rest: str, context: Path, given: dict[str, str]) -> None:
    image = stages[-1]
    match word:
        case "ARG":
            name, _, default = rest.partition("=")
            image.arguments[name] = given.get(name, default)
        case "ENV":
            for name, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                image.environment[name] = value
        case "WORKDIR":
            image.folder = rest
            (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            image.user = rest
        case "COPY":
            _copy(stages, rest, context)
        case "RUN":
            with machine_files(image):  # apt checks signatures as a user of its own, who has to write to /dev/null
                image.run(["/bin/sh", "-c", rest], as_root=True)
        case "ENTRYPOINT":
            image.entrypoint = [part.strip().strip('"') for part in rest.strip("[]").split(",")]
        case "CMD":
            image.command = [part.strip().strip('"') for part in rest.strip("[]").split(",")]
        case _:
            raise BuildError(f"{word} is not known here")


def _copy(stages: list[Image], rest: str, context: Path) -> None:
    """COPY of files and folders; of a folder its content goes to the target, as Docker has it."""
    image, words = stages[-1], shlex.split(rest)
    source = context
    if words[0].startswith("--from="):
        name = words.pop(0).removeprefix("--from=")
        source = next(stage.root for stage in stages if stage.name == name)
    *files, target = words
    goal = image.root / (target if target.startswith("/") else f"{image.folder}/{target}").lstrip("/")
    for file in files:
        path = source / file.lstrip("/")
        if not path.exists():
            raise BuildError(f"COPY {rest}: there is no {file}")
        if path.is_dir():
            shutil.copytree(path, goal, symlinks=True, dirs_exist_ok=True)
        else:
            (goal if target.endswith("/") else goal.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, goal / path.name if target.endswith("/") else goal)
