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


def compiled() -> Path | None:
    """The package's own kernels, where they are in its build tree and of these very sources."""
    newest = max(path.stat().st_mtime for path in (*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")))
    found = [path for path in (ROOT / "build").glob("*/libgptoss_kernels.a") if path.stat().st_mtime > newest]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def build(folder: Path, *options: str) -> Path:
    configure = [BIN / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}", "-S", SOURCES, "-B", folder]
    command = [BIN / "cmake", "--build", folder, "--target", "kernels_test"]
    for step in ([*configure, *options], command):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "kernels_test"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the kernels that the package has; where they are not at hand, compiled for this."""
    given = compiled()
    return build(tmp_path_factory.mktemp("plain"), *([f"-DGPTOSS_COMPILED={given}"] if given else []))


def run(*command: str | Path) -> str:
    """The program's output, after its closing line `N passed, M failed` was found good."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    passed, failed = (int(part.split()[0]) for part in done.stdout.splitlines()[-1].split(", "))
    assert passed > 0 and failed == 0
    return done.stdout


def test_every_instruction_set_of_this_processor(plain: Path) -> None:
    run(plain)


def test_the_one_that_is_chosen_under_sanitizers(plain: Path, tmp_path: Path) -> None:
    """Address and undefined behaviour. One of them only: all of them take five minutes, without arguments."""
    found = re.search(r"^select\(\): (\w+)$", run("env", "-u", "GPTOSS_EXPORT_ISA", plain, "scalar"), re.MULTILINE)
    assert found is not None
    tables = dict.fromkeys(("scalar", found[1]))
    options = ["-DGPTOSS_SANITIZE=ON"]
    if given := compiled():
        anew = ";".join(("dispatch.cc", *(f"kernels_{table}.cc" for table in tables)))
        options += [f"-DGPTOSS_COMPILED={given}", f"-DGPTOSS_ANEW={anew}"]
    run(build(tmp_path, *options), *tables)


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
