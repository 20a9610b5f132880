"""The kernels' own test program: as it is, with sanitizers, and for aarch64."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "engines" / "ort" / "kernels"
BIN = Path(sys.executable).parent
PACKAGE_MISSING = 77


def build(folder: Path, sanitize: str) -> Path:
    configure = [BIN / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}", "-S", SOURCES, "-B", folder]
    subprocess.run([*configure, f"-DGPTOSS_SANITIZE={sanitize}"], check=True, capture_output=True)
    subprocess.run([BIN / "cmake", "--build", folder, "--target", "kernels_test"], check=True, capture_output=True)
    return folder / "kernels_test"


def run(*command: str | Path) -> str:
    """The program's output, after its closing line `N passed, M failed` was found good."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    passed, failed = (int(part.split()[0]) for part in done.stdout.splitlines()[-1].split(", "))
    assert passed > 0 and failed == 0
    return done.stdout


def test_every_instruction_set_of_this_processor(tmp_path: Path) -> None:
    run(build(tmp_path, "OFF"))


def test_the_one_that_is_chosen_under_sanitizers(tmp_path: Path) -> None:
    """Address and undefined behaviour. One of them only: all of them take five minutes, without arguments."""
    program = build(tmp_path, "ON")
    chosen = re.search(r"select\(\): (\w+)", run("env", "-u", "GPTOSS_EXPORT_ISA", program, "scalar"))
    assert chosen is not None
    if chosen[1] != "scalar":
        run(program, chosen[1])


def test_for_aarch64(tmp_path: Path) -> None:
    """NEON under qemu-user, and the op library as far as the linker."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    script = [ROOT / "benchmarks" / "aarch64_test.sh", tmp_path]
    done = subprocess.run(["sh", *script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    if done.returncode == PACKAGE_MISSING:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    passed = re.search(r"neon chosen, (\d+) passed, 0 failed; .* scalar chosen, (\d+) passed, 0 failed", done.stdout)
    assert passed is not None and int(passed[1]) > int(passed[2]) > 0
