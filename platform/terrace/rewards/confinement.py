"""What keeps a rule from reaching beyond its answer: limits, namespaces, a system call filter. Linux; each step on its own.

A rule reads what a model wrote, and a custom rule may run it. `confine` is called once in a process of its own, before any
request is read. It takes every protection that the kernel grants and returns the names of those that hold; it never fails
because one is refused (an ordinary pod may create no namespaces). What holds where stands in docs/rl.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
from pathlib import Path

FILE_BYTES = 16 * 2**20  # of one file
SCRATCH_BYTES = 64 * 2**20  # of all files in the scratch folder, where it is a file system of its own
OPEN_FILES = 128
PROCESSES = 32  # at one time, threads included

_CLONE = {"mount": 0x00020000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000, "network": 0x40000000}
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = (
    1,
    38,
    22,
    36,
    24,
    47,
)
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SETUID = 1, 2, 7
_SANDBOX_USER = 2_000_000  # plus the process id: a user of its own, so that its processes can be counted
# socket, ptrace, process_vm_readv and _writev, mount, umount, pivot_root, unshare, setns, keyctl, userfaultfd, bpf, io_uring_setup
_REFUSED_CALLS = {
    "x86_64": (0xC000003E, (41, 101, 310, 311, 165, 166, 155, 272, 308, 250, 323, 321, 425)),
    "aarch64": (0xC00000B7, (198, 117, 270, 271, 40, 39, 41, 97, 268, 219, 282, 280, 425)),
}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same numbers on both
_LANDLOCK_WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))  # write, remove, make of every kind
_STARTED_AS_ROOT = os.geteuid() == 0
_libc = ctypes.CDLL(None, use_errno=True)


def unshared() -> list[str]:
    """Move this process into namespaces of its own and return their names. Its children see them whole (a process id namespace
    begins with the next fork). Without the right to do so as it is, a user namespace is tried, then fewer namespaces; not by root that
    can become a user of its own, whose processes are counted (those of root in a user namespace are not)."""
    wanted = ["mount", "pid", "network", "ipc"]
    tries = [wanted] if os.geteuid() == 0 else []
    if os.geteuid() != 0 or not (_permitted(_CAP_SETUID) and _reading_right() is not None):
        tries += [["user", *wanted], ["user", "pid", "network"], ["user", "network"]]
    user, group = os.geteuid(), os.getegid()
    for names in tries:
        if _libc.unshare(sum(_CLONE[name] for name in names)) == 0:
            if "user" in names:
                _write("/proc/self/setgroups", "deny")
                _write("/proc/self/uid_map", f"{user} {user} 1")
                _write("/proc/self/gid_map", f"{group} {group} 1")
            return names
    return []


def read_only(scratch: str) -> list[str]:
    """In a mount namespace: every file system read-only, a small one in memory at `scratch`, and a /proc of the own processes."""
    held = []
    private = 1 << 18
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(private | 1 << 14), None) != 0:
        return held
    attributes = struct.pack("QQQQ", 1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    if _libc.syscall(_MOUNT_SETATTR, -100, b"/", 0x8000, attributes, len(attributes)) == 0:
        held.append("read-only files")
    options = f"size={SCRATCH_BYTES},mode=0777".encode()
    if _libc.mount(b"tmpfs", scratch.encode(), b"tmpfs", ctypes.c_ulong(2 | 4), options) == 0:
        held.append("scratch in memory")
    return held


def own_proc() -> None:
    """In the first process of a process id namespace: /proc shows this namespace alone."""
    _libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(2 | 4 | 8), None)


def be_subreaper() -> bool:
    """Orphans of this process' children become its own children, so that it can end them."""
    return _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def limit(memory_bytes: int) -> list[str]:
    """Memory, size of a file, open files, processes; no core dumps."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too large is an error, not the end
    return ["memory", "file size", "open files"]


def limit_cpu(seconds: float) -> None:
    """CPU seconds from now until the kernel ends the process; called before every item."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def drop_rights(in_user_namespace: bool, number: int) -> list[str]:
    """No new privileges, no capabilities; root becomes a user of its own that may read but not write what is
    root's. `number` tells this sandbox' user from another's."""
    held = []
    user = _SANDBOX_USER + number % 1_000_000
    # Without a right to read what is root's, a user of its own could not even import its rule. The second one also writes, as root
    # does anyway; Landlock and read-only file systems hold against both.
    reading = _reading_right()
    as_root = os.geteuid() == 0 and not in_user_namespace and reading is not None
    processes = PROCESSES if as_root or in_user_namespace else PROCESSES + _tasks_of_user()
    if as_root:
        _libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS across the change of user
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            held.append("own user")
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    keep = 1 << reading if as_root and reading is not None else 0
    if _set_capabilities(keep) or (keep and _set_capabilities(0)):
        held.append("no capabilities")
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    if as_root or not _STARTED_AS_ROOT:
        held.append("processes")  # the kernel does not count those of root, in a user namespace neither
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        held.append("no new privileges")
    return held


def filter_calls() -> list[str]:
    """Refuse sockets, tracing, mounting and new namespaces by a seccomp filter; needs `no new privileges`."""
    known = _REFUSED_CALLS.get(platform.machine())
    if known is None:
        return []
    architecture, numbers = known

    def statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refuse = len(numbers)
    program = [
        statement(load, 4),
        statement(equal, architecture, 0, refuse + 3),
        statement(load, 0),
        statement(at_least, 0x40000000, refuse + 1),
    ]
    program += [statement(equal, number, refuse - place) for place, number in enumerate(numbers)]
    program += [statement(answer, 0x7FFF0000), statement(answer, 0x00050000 | 13)]  # allow; refuse with EACCES
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    return ["no sockets"] if _libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0 else []


def fence_off(scratch: str) -> list[str]:
    """Landlock: nothing is written outside `scratch`, no TCP, and no signal to or look into a process outside; needs `no new
    privileges`. It asks for no rights, so it also holds in an ordinary pod."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return []
    writes = _LANDLOCK_WRITES | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    attributes = struct.pack("QQQ", writes, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = _libc.syscall(_LANDLOCK_CREATE, attributes, 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    if rules < 0:
        return []
    try:
        for path, allowed in ((scratch, writes), ("/dev/null", 1 << 1)):
            folder = os.open(path, os.O_PATH)
            try:
                _libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, folder), 0)
            finally:
                os.close(folder)
        if _libc.syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
            return []
    finally:
        os.close(rules)
    return ["writes only to scratch", *(["no TCP"] if version >= 4 else []), *(["no signals outside"] if version >= 6 else [])]


def children_of(process: int) -> list[int]:
    """Process ids of the direct children, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue
            if int(status.rpartition(")")[2].split()[1]) == process:
                found.append(int(entry.name))
    return found


def _tasks_of_user() -> int:
    """Threads that this user already has: where processes are counted per user and not per namespace."""
    total, user = 0, os.geteuid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                total += len(os.listdir(entry / "task")) if entry.stat().st_uid == user else 0
            except OSError:
                continue
    return total


def _reading_right() -> int | None:
    return next((one for one in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE) if _permitted(one)), None)


def _permitted(capability: int) -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    return bool(int(status.split("CapPrm:")[1].split()[0], 16) >> capability & 1)


def _set_capabilities(bits: int) -> bool:
    header = struct.pack("Ii", 0x20080522, 0)
    low = bits & 0xFFFFFFFF
    done = _libc.capset(header, struct.pack("IIIIII", low, low, low, 0, 0, 0)) == 0
    if done and bits:  # a program that the rule starts keeps it too, or it could not read its own interpreter
        _libc.prctl(_PR_CAP_AMBIENT, 2, bits.bit_length() - 1, 0, 0)
    return done


def _write(path: str, text: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).write_text(text)
