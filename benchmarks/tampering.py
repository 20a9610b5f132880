"""Signs a copy of an artifact and flips one bit in each of its files in turn, then tries an extra and a missing file.

    gptoss-export --target ort-cpu --model tests/data/tiny-gpt-oss --output release
    python benchmarks/tampering.py release

Prints a Markdown table with the exit code and the first words of `gptoss-export verify` for each, and exits with 1 when
one of them was accepted. Needs the extra [sign].
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GPTOSS = Path(sys.executable).parent / "gptoss-export"


def make_key(folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, (private, public) = ec.generate_private_key(ec.SECP256R1()), (folder / "key.pem", folder / "key.pub")
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, accepted = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(arguments.artifact, Path(name) / "release")
        private, public = make_key(Path(name))
        subprocess.run([GPTOSS, "-q", "sign", folder, "--key", private], check=True, stdout=subprocess.DEVNULL)

        def verify() -> tuple[int, str]:
            command = [GPTOSS, "-q", "verify", folder, "--require-signature", "--public-key", public]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = (done.stderr.strip() or "accepted").splitlines()[0].removeprefix("error: ")
            said = said.replace(f"{folder}/", "").replace(str(folder), "OUT")
            return done.returncode, re.sub("([0-9a-f]{8})[0-9a-f]{56}", r"\1...", said)

        def row(what: str) -> int:
            code, said = verify()
            print(f"| {what} | {code} | {said} |", flush=True)
            return code

        print("| change | exit code | error |\n|---|---|---|")
        if row("none") != 0:
            sys.exit("the artifact does not verify as it is")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            bit = draw.randrange(8 * path.stat().st_size)
            flip(path, bit)
            accepted += row(f"`{path.relative_to(folder)}`, bit {bit}") == 0
            flip(path, bit)
        extra = folder / "weights" / "extra.safetensors"
        extra.touch()
        accepted += row("`weights/extra.safetensors` added") == 0
        extra.unlink()
        (folder / "parity.html").unlink()
        accepted += row("`parity.html` removed") == 0
    sys.exit(1 if accepted else 0)


if __name__ == "__main__":
    main()
