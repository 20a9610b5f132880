"""Two layers of 20b's real shape (hidden 2880, 32 experts, vocabulary 201088), exported and validated.

    python benchmarks/real_layers.py /fast/disk --target onnx --target ort-cpu

Needs 9 GB there. Prints the parity report of each target.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from measure import machine, run

GPTOSS = Path(sys.executable).parent / "gptoss-export"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append", default=None)
    parser.add_argument("--parity", default="quick")
    arguments = parser.parse_args()
    targets = arguments.target or ["onnx", "ort-cpu"]
    checkpoint, output = arguments.folder / "random-20b-2", arguments.folder / "out-real"
    if not checkpoint.exists():
        run([GPTOSS, "synth", checkpoint, "--preset", "20b", "--layers", "2"])
    shutil.rmtree(output, ignore_errors=True)
    parity = ["--parity", arguments.parity, "--allow-unexecuted"]
    choice = [word for target in targets for word in ("--target", target)]
    cost = run([GPTOSS, *choice, "--model", checkpoint, "--output", output, *parity])
    print(f"{machine()}; export and validation: {cost.seconds:.0f} s, peak RSS {cost.peak_rss / 2**30:.2f} GiB")
    for report in sorted(output.rglob("parity.md")):
        print(report.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
