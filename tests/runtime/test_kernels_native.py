"""The kernels' own test program, as it is and with sanitizers."""

import re
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "engines" / "ort" / "kernels"
BIN = Path(sys.executable).parent


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
