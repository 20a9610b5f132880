"""What is left to a child process that runs somebody else's native code: no network, low limits, little environment.

    Popen(command, env=child_environment(os.environ))       # in the parent
    for problem in confine(Limits(file_bytes=1 << 30)): ...  # first thing in the child

The network goes by a seccomp filter, which needs no privilege and holds for whatever the process starts: sockets of
other kinds than Unix and netlink, and io_uring, which could make them, are refused with EACCES
(https://docs.kernel.org/userspace-api/seccomp_filter.html).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

OPEN_FILES = 1024

_KEPT = {"HOME", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "PYTHONPATH", "USER", "VIRTUAL_ENV"}
_KEPT |= {"LANG", "LANGUAGE", "SOURCE_DATE_EPOCH", "TEMP", "TMP", "TMPDIR", "TZ"}
_KEPT_PREFIXES = ("CUDA_", "LC_", "NVIDIA_", "OMP_", "TRITON_")

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _TSYNC = 1, 1
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13  # SECCOMP_RET_ERRNO with EACCES
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
_X32 = 0x40000000
_IO_URING_SETUP = 425
_AF_UNIX, _AF_NETLINK = 1, 16


@dataclass(frozen=True)
class _System:
    """audit: AUDIT_ARCH_*. The numbers of the system calls."""

    audit: int
    socket: int
    seccomp: int


_SYSTEMS = {"x86_64": _System(0xC000003E, 41, 317), "aarch64": _System(0xC00000B7, 198, 277)}


@dataclass(frozen=True)
class Limits:
    """file_bytes: of the largest file that may be written. memory_bytes: that may be written to; None: as much as is.

    Memory is RLIMIT_DATA and not RLIMIT_AS: CUDA reserves address space by the hundred gigabytes, and weights are
    mapped, so what bounds the address space would bound the model and not what it takes.
    """

    file_bytes: int
    memory_bytes: int | None = None


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that building an engine can need; no tokens, no credentials, no proxies, nothing preloaded."""
    return {name: value for name, value in environment.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


def confine(limits: Limits) -> tuple[str, ...]:
    """Takes from this process, for good, what it does not need. Returns what could not be taken, in a line each."""
    wanted = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
    ]
    if limits.memory_bytes is not None:
        wanted.append((resource.RLIMIT_DATA, limits.memory_bytes))
    for number, most in wanted:
        _, hard = resource.getrlimit(number)
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (value, value))
    problem = _no_network()
    return () if problem is None else (f"the process that builds has the network: {problem}",)


def _no_network() -> str | None:
    """None, or why the filter is not there."""
    system = _SYSTEMS.get(platform.machine())
    if sys.platform != "linux" or system is None:
        return f"no filter for {sys.platform} on {platform.machine()}"
    program = _program(system)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return f"no_new_privs: {os.strerror(ctypes.get_errno())}"
    filters = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count of 16 bits and, aligned, a pointer
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(filters)))
    # Threads that a library started while it was imported are to have it as well.
    if code := libc.syscall(system.seccomp, _SECCOMP_SET_MODE_FILTER, _TSYNC, header):
        return f"seccomp: {os.strerror(ctypes.get_errno()) if code < 0 else f'thread {code} cannot have it'}"
    return None


def _program(system: _System) -> bytes:
    """struct sock_filter[]; a jump counts the instructions that it skips if the comparison holds, and if not."""
    instructions = (
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 9, system.audit),  # another system's calls have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 7, 0, _X32),
        (_EQUAL, 6, 0, _IO_URING_SETUP),
        (_EQUAL, 1, 0, system.socket),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, _AF_UNIX),
        (_EQUAL, 0, 1, _AF_NETLINK),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    )
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
