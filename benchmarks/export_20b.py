"""Exports a random 20b-shaped checkpoint (13.8 GB) and compares with `cp` + `sha256sum` of the same files.

    python benchmarks/export_20b.py /fast/disk --runs 3

Needs 28 GB there. Baseline and export take turns; before each the page cache is emptied where the system allows it, and
both end with their bytes on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from measure import cold, machine, run

GPTOSS = Path(sys.executable).parent / "gptoss-export"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    checkpoint, output = arguments.folder / f"random-20b-{arguments.layers}", arguments.folder / "out"
    if not checkpoint.exists():
        run([GPTOSS, "synth", checkpoint, "--preset", "20b", "--layers", str(arguments.layers)])
    copy_and_hash = f"cp -r '{checkpoint}' '{output}' && sync -f '{output}' && sha256sum '{output}'/*"

    baselines, exports, rss = [], [], 0
    print(f"{machine()}; {sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e9:.2f} GB", flush=True)
    for _ in range(arguments.runs):
        emptied = cold()
        baselines.append(run(["sh", "-c", copy_and_hash]).seconds)
        shutil.rmtree(output)
        cold()
        cost = run([GPTOSS, "--target", "ort-cpu", "--model", checkpoint, "--output", output, "--parity", "off"])
        exports.append(cost.seconds)
        rss = max(rss, cost.peak_rss)
        shutil.rmtree(output)
        print(
            f"cp + sha256sum {baselines[-1]:.1f} s, export {exports[-1]:.1f} s, "
            f"ratio {exports[-1] / baselines[-1]:.2f}, peak RSS {rss / 2**30:.2f} GiB, page cache emptied: {emptied}",
            flush=True,
        )
    ratios = [e / b for e, b in zip(exports, baselines, strict=True)]
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
