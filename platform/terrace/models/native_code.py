"""C sources of this package, compiled on the machine that runs them and kept for the next process.

A compiler makes a shared library in a second or two. It lies in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`) under a name
that holds the source, the options, the compiler and what the processor can do, so that a home folder may be shared by different machines.
Whoever cannot write there compiles into a temporary folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

OPTIONS = ("-O3", "-march=native", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 120.0


class NotCompiled(Exception):
    """Why there is no library, in one line."""


def compiled(source: Path, definitions: dict[str, int]) -> ctypes.CDLL:
    """The library of `source` with these macros. Calls into it do not hold Python's lock. Raises NotCompiled."""
    compiler = shutil.which(os.environ.get("CC", "").split(" ")[0] or "") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NotCompiled(f"no C compiler was found (CC, {', '.join(COMPILERS)})")
    options = [*OPTIONS, *(f"-D{name}={value}" for name, value in sorted(definitions.items()))]
    told = (source.read_bytes(), " ".join(options).encode(), _version(compiler), _processor())
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(told)).hexdigest()[:24]}.so"
    try:
        kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "terrace" / "compiled"
        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (kept / name).is_file() and _ours(kept / name):
            return ctypes.CDLL(str(kept / name))
        return _made(source, compiler, options, kept / name)
    except (OSError, RuntimeError):  # no home, no room, a folder of another user
        with tempfile.TemporaryDirectory(prefix="terrace-compiled-") as folder:  # what is loaded stays when its file is gone
            return _made(source, compiler, options, Path(folder) / name)


def _made(source: Path, compiler: str, options: list[str], target: Path) -> ctypes.CDLL:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".so", delete=False) as file:
        made = Path(file.name)
    try:
        done = subprocess.run(
            [compiler, *options, str(source), "-o", str(made), "-lm"], capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
        if done.returncode:
            raise NotCompiled(f"{compiler} ended with {done.returncode}: {next(iter(done.stderr.splitlines()), 'without a word')}")
        os.replace(made, target)  # two processes may compile the same: each finds a whole file
        return ctypes.CDLL(str(target))
    except subprocess.TimeoutExpired:
        raise NotCompiled(f"{compiler} took more than {COMPILE_SECONDS:.0f} s") from None
    finally:
        made.unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    """Code of another user is not run."""
    return path.stat().st_uid == os.getuid()


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=False).stdout


def _processor() -> bytes:
    """What code for this machine may use: its kind, and where the kernel tells them, the first processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    told = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model", "cpu family", "CPU part")]
    return "\n".join([platform.machine(), *dict.fromkeys(told)]).encode()
