"""How much memory this process may still have: by the machine, by its control group, by its own limits.

    least = min(rooms(), key=lambda room: room.nbytes)
    killed_before = oom_kills()

A limit that the platform does not have, or does not say, is not there; nothing is guessed.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptoss_export.exporter.errors import OutOfMemoryError
from gptoss_export.exporter.progress import format_bytes

_KB_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_NO_MEMORY = re.compile(
    r"bad_alloc|(can.?t|cannot|failed to|unable to|could not) allocate|not enough memory|can't start new thread", re.I
)
"""What torch, ONNX Runtime, numpy and Python's threads say in exceptions that are no MemoryError."""
_UNLIMITED = 1 << 60
"""Version 1 of control groups says "no limit" with a number near 2 ** 63."""


@dataclass(frozen=True)
class Room:
    """nbytes: what is left below one limit, `name`. address_space: mapped files count as well."""

    name: str
    nbytes: int
    address_space: bool = False


@dataclass(frozen=True)
class _Group:
    """One level of the control groups: its folder, and the names that its version gives to things."""

    folder: Path
    limit: str
    usage: str
    cache: str


def rooms(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> tuple[Room, ...]:
    """What every limit leaves: free memory, that of each control group above this process, RLIMIT_DATA, RLIMIT_AS.

    Pages of files that could be dropped count as free, as MemAvailable has it.
    """
    found = []
    if (free := _sizes(proc / "meminfo").get("MemAvailable")) is not None:
        found.append(Room("free memory", free))
    for group in _groups(proc, groups):
        limit, usage = _number(group.folder / group.limit), _number(group.folder / group.usage)
        if limit is not None and usage is not None and limit < _UNLIMITED:
            cached = _fields(group.folder / "memory.stat").get(group.cache, 0)
            found.append(Room("the control group's memory limit", max(limit - usage + cached, 0)))
    status = _sizes(proc / "self" / "status")
    for name, number, used, address_space in (
        ("the process's limit on data (ulimit -d)", resource.RLIMIT_DATA, "VmData", False),
        ("the process's limit on address space (ulimit -v)", resource.RLIMIT_AS, "VmSize", True),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and used in status:
            found.append(Room(name, max(soft - status[used], 0), address_space))
    return tuple(found)


def machine_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """All that processes here can ever have: RAM and swap, or the control group's limit; None if nothing says."""
    sizes = _sizes(proc / "meminfo")
    limits = [_number(group.folder / group.limit) for group in _groups(proc, groups)]
    known = [limit for limit in limits if limit is not None and limit < _UNLIMITED]
    if "MemTotal" in sizes:
        known.append(sizes["MemTotal"] + sizes.get("SwapTotal", 0))
    return min(known, default=None)


def oom_kills(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of our control groups the kernel has killed for their memory so far."""
    files = ("memory.events", "memory.oom_control")
    return sum(_fields(group.folder / name).get("oom_kill", 0) for group in _groups(proc, groups) for name in files)


def ran_out(error: BaseException) -> bool:
    """Whether an exception, of whatever library, says that memory could not be had."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, Exception) and _NO_MEMORY.search(str(error)) is not None


def out_of_memory() -> OutOfMemoryError:
    """What to tell whoever ran into that: what this process took, and which limit is the closest."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    closest = min(rooms(), key=lambda room: room.nbytes, default=None)
    left = f"; {closest.name} leaves {format_bytes(closest.nbytes)} now" if closest else ""
    return OutOfMemoryError(
        f"this machine's memory was not enough: this process had up to {format_bytes(peak)}{left}",
        "close other programs, raise the limit, or use a larger machine; --dry-run says what each stage takes",
    )


def _groups(proc: Path, root: Path) -> Iterator[_Group]:
    """The groups that limit this process, innermost first, in whichever version the machine has them."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            yield from _levels(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _levels(root / "memory", path, *names)


def _levels(root: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[_Group]:
    # In a container the path is often that of the host, which cannot be seen; the root is then the container's own.
    folder = Path(os.path.normpath(f"{root}/{path}"))
    for level in (folder, *folder.parents):
        if not level.is_relative_to(root):
            return
        yield _Group(level, limit, usage, cache)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _sizes(path: Path) -> dict[str, int]:
    return {name: int(kilobytes) * 1024 for name, kilobytes in _KB_LINE.findall(_read(path))}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
