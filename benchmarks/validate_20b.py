"""Validates an artifact of a random 20b-shaped checkpoint over 512 tokens: time and memory, and the report.

    python benchmarks/validate_20b.py /fast/disk --target ort-cpu

Needs 14 GB there for the checkpoint; the artifact's weights are hard links. The default probes are 320 tokens, the
other 192 come from a file of prompts. The first run computes the reference, the second takes it out of the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measure import machine, run

GPTOSS = Path(sys.executable).parent / "gptoss-export"
INTERVAL = 0.2
LONG_INTERVAL = 5.0
"""Of what the kernel adds up from all page tables, which takes it a while."""
TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--runs", type=int, default=2)
    arguments = parser.parse_args()
    checkpoint, output = arguments.folder / f"random-20b-{arguments.layers}", arguments.folder / "out-validate"
    if not checkpoint.exists():
        run([GPTOSS, "synth", checkpoint, "--preset", "20b", "--layers", str(arguments.layers)])
    for folder in (output, cache := arguments.folder / "reference-cache"):
        shutil.rmtree(folder, ignore_errors=True)
    export = [GPTOSS, "--target", arguments.target, "--model", checkpoint, "--output", output]
    run([*export, "--weights", "hardlink", "--parity", "off"])
    prompts = arguments.folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"name": "more", "ids": [7919 * i % 200_000 for i in range(TOKENS - 320)]}) + "\n")
    print(machine())
    for number in range(arguments.runs):
        measured = validate(output, prompts, cache)
        print(f"run {number + 1}: {measured}")
        report = json.loads((output / "parity.json").read_text())
        assert sum(probe["tokens"] for probe in report["probes"]) == TOKENS
    print((output / "parity.md").read_text(encoding="utf-8"))
    for folder in (output, cache):
        shutil.rmtree(folder)


def validate(output: Path, prompts: Path, cache: Path) -> str:
    """Time and peak memory of one validation: private pages, and with those of mapped files, which can be dropped.

    Two sessions map the weights: a page is counted once in the proportional set size, and twice in the resident one.
    """
    command = [GPTOSS, "validate", output, "--prompts", prompts, "--allow-unexecuted"]
    started, private, resident, proportional, looked = time.perf_counter(), 0, 0, 0, 0.0
    process = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "GPTOSS_EXPORT_CACHE": str(cache)})
    while process.poll() is None:
        private = max(private, pages(process.pid, "status", "RssAnon:"))
        resident = max(resident, pages(process.pid, "status", "VmRSS:"))
        if (now := time.perf_counter()) - looked > LONG_INTERVAL:
            looked, proportional = now, max(proportional, pages(process.pid, "smaps_rollup", "Pss:"))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - started
    memory = (
        f"peak {private / 2**30:.2f} GiB private, with mapped files {proportional / 2**30:.2f} GiB proportional and "
        f"{resident / 2**30:.2f} GiB resident"
    )
    return f"{seconds:.0f} s, exit code {process.returncode}, {memory}"


def pages(pid: int, file: str, name: str) -> int:
    """Bytes, 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
