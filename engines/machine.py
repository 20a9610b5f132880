"""What the operating system says of this machine and process: processor, memory, CPU time, energy.

Everything that a platform does not report is None; nothing is estimated.
"""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

from gptoss_export.engines.bandwidth import Bandwidth, measure_read_bandwidth

_ROUNDING_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "sve",
)
_ROUNDING_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")

_STATUS_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Machine:
    """Where something was measured; no host name. usable_cores: those that this process may run on."""

    platform: str
    cpu: str
    cores: int
    usable_cores: int
    memory_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """Resident bytes of this process. anonymous: without the pages of mapped files, the weights' among them."""

    resident: int
    anonymous: int
    peak_resident: int


@dataclass(frozen=True)
class Reading:
    """A moment: seconds of the wall clock, CPU seconds of all threads of this process, joules of the machine.

    Only differences mean something.
    """

    wall: float
    cpu: float
    joules: float | None


class HostMeter:
    """The instruments of this machine, for `engines.bench`."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or usable_cores()
        self._energy = EnergyCounter()
        self.energy_source = self._energy.source

    def clock(self) -> float:
        """Seconds, cheap to ask for."""
        return time.perf_counter()

    def read(self) -> Reading:
        return Reading(time.perf_counter(), time.process_time(), self._energy.joules())

    def memory(self) -> Memory | None:
        return process_memory()

    def bandwidth(self) -> Bandwidth | None:
        return measure_read_bandwidth(self._threads)


class EnergyCounter:
    """RAPL: what the processor packages, and the memory where it is counted apart, have taken since this was made.

    Linux, https://docs.kernel.org/power/powercap/powercap.html; most systems let only root read it.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        # `core` and `uncore` are parts of a package, `psys` holds the packages, intel-rapl-mmio is the same again.
        self._zones = [
            (zone, name)
            for zone in sorted(root.glob("intel-rapl:*"))
            if (name := _read(zone / "name")).startswith("package") or name == "dram"
        ]
        self._joules = 0.0
        self._last = self._raw() if any(name.startswith("package") for _, name in self._zones) else None
        self.source = None if self._last is None else "RAPL: " + ", ".join(name for _, name in self._zones)

    def joules(self) -> float | None:
        """Joules so far; has to be asked more often than the counters wrap around, which takes many minutes."""
        if self._last is None:
            return None
        now = self._raw()
        if now is not None:
            for (before, _), (after, wrap) in zip(self._last, now, strict=True):
                self._joules += (after - before if after >= before else after - before + wrap) / 1e6
        self._last = now
        return None if now is None else self._joules

    def _raw(self) -> list[tuple[int, int]] | None:
        """Microjoules and where they wrap, of each zone; None as soon as one of them cannot be read."""
        try:
            return [
                (int(_read(zone / "energy_uj")), int(_read(zone / "max_energy_range_uj"))) for zone, _ in self._zones
            ]
        except ValueError:
            return None


def describe_machine() -> Machine:
    """This machine."""
    total = dict(_STATUS_LINE.findall(_read(Path("/proc/meminfo")))).get("MemTotal")
    return Machine(
        platform=platform.platform(),
        cpu=_cpu_name(_read(Path("/proc/cpuinfo"))),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=None if total is None else int(total) * 1024,
    )


def floating_point(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the last bits of matrix products on this processor depend on, in one line: its name, those of its
    instructions that libraries choose kernels by, and the environment variables that forbid them some."""
    text = _read(cpuinfo)
    lines = (line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = set(next(lines, ()))
    found = [flag for flag in _ROUNDING_FLAGS if flag in flags]
    asked = [f"{name}={value}" for name in _ROUNDING_VARIABLES if (value := os.environ.get(name))]
    return ", ".join([_cpu_name(text), *found, *asked])


def _cpu_name(cpuinfo: str) -> str:
    names = (line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if _names_cpu(line))
    return next(names, platform.machine())


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a new process can have without swapping; None where the platform does not say."""
    free = dict(_STATUS_LINE.findall(_read(meminfo))).get("MemAvailable")
    return None if free is None else int(free) * 1024


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_memory(status: Path = Path("/proc/self/status")) -> Memory | None:
    """Of this process, as Linux counts it; None elsewhere."""
    sizes = {name: int(kilobytes) * 1024 for name, kilobytes in _STATUS_LINE.findall(_read(status))}
    if not {"VmRSS", "RssAnon", "VmHWM"} <= sizes.keys():
        return None
    # The kernel brings the high-water mark up to date only now and then.
    return Memory(sizes["VmRSS"], sizes["RssAnon"], max(sizes["VmHWM"], sizes["VmRSS"]))


def _names_cpu(line: str) -> bool:
    return line.startswith("model name") and ":" in line


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
