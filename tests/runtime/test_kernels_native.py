"""The kernels' own test program, as it is and under the address and undefined-behaviour sanitizers."""

import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "engines" / "ort" / "kernels"
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("sanitize", ["OFF", "ON"])
def test_native(sanitize: str, tmp_path: Path) -> None:
    configure = [BIN / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}", "-S", SOURCES, "-B", tmp_path]
    subprocess.run([*configure, f"-DGPTOSS_SANITIZE={sanitize}"], check=True, capture_output=True)
    subprocess.run([BIN / "cmake", "--build", tmp_path, "--target", "kernels_test"], check=True, capture_output=True)
    done = subprocess.run([tmp_path / "kernels_test"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    passed, failed = (int(part.split()[0]) for part in done.stdout.splitlines()[-1].split(", "))
    assert passed > 0 and failed == 0
