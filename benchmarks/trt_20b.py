"""Builds TensorRT engines of a random 20b-shaped checkpoint: time, memory of all processes together, sizes.

    python benchmarks/trt_20b.py /fast/disk --target trt-fp16

Needs 14 GB there for the checkpoint and 5 GB for the artifact, whose weights are hard links. No GPU is needed, and
nothing is executed.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measure import machine, run

GPTOSS = Path(sys.executable).parent / "gptoss-export"
INTERVAL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--target", default="trt-fp16")
    arguments, rest = parser.parse_known_args()
    checkpoint, output = arguments.folder / f"random-20b-{arguments.layers}", arguments.folder / "out-trt"
    if not checkpoint.exists():
        run([GPTOSS, "synth", checkpoint, "--preset", "20b", "--layers", str(arguments.layers)])
    shutil.rmtree(output, ignore_errors=True)
    command = [GPTOSS, "--target", arguments.target, "--model", checkpoint, "--output", output, "--parity", "off"]
    command += ["--weights", "hardlink", *rest]
    print("$", shlex.join(map(str, command)), file=sys.stderr, flush=True)
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=sys.stderr)
    while process.poll() is None:
        peak = max(peak, sum(resident(pid) for pid in tree(process.pid)))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"exit code {process.returncode}")
    print(f"{machine()}; {arguments.target}, {arguments.layers} layers {' '.join(rest)}")
    print(f"{seconds:.0f} s, peak RSS of all processes together {peak / 2**30:.2f} GiB (sampled every {INTERVAL} s)")
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(output)}: {path.stat().st_size / 1e9:.3f} GB")
    shutil.rmtree(output)


def tree(pid: int) -> list[int]:
    """A process and its descendants, as far as they still live."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def resident(pid: int) -> int:
    """Bytes, pages of mapped files included."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


if __name__ == "__main__":
    main()
