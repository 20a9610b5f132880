"""Fuzzes every reader of untrusted files for as long as wanted: the same readers and mutations as tests/fuzz.

    python benchmarks/fuzz.py --minutes 8                 # all readers, in turn, by structure
    python benchmarks/fuzz.py --minutes 60 --atheris config

--atheris gives one reader to atheris (pip install atheris), which is led by the coverage of our Python code. Prints how
often each reader ran, how often it took what it was given, the slowest run and the peak of memory. Ends at the first
input that gives anything but a typed error or a result, writes it to crash-<reader>, and exits 1: such a file belongs
into tests/fuzz/corpus/<reader>/.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import FunctionType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))
SLOWEST_SECONDS = 10.0


def nearly_right(reader: Any, random: Random) -> bytes:
    from mutate import MUTATIONS, mutate_bytes  # type: ignore[import-not-found]

    mutate = MUTATIONS[reader.kind] if random.random() < 0.9 else mutate_bytes
    found: bytes = mutate(random, reader.seed)
    return found


def run_once(reader: Any, data: bytes) -> bool:
    """Whether the reader took it. Exits 1 where it did neither that nor raise a typed error in time."""
    started = time.process_time()
    try:
        read: bool = reader.check(data)
        if (seconds := time.process_time() - started) > SLOWEST_SECONDS:
            raise TimeoutError(f"{seconds:.1f} s")
    except Exception:
        Path(f"crash-{reader.name}").write_bytes(data)
        print(f"crash-{reader.name} is what {reader.name} could not take", file=sys.stderr, flush=True)
        raise
    return read


def fuzz(reader: Any, seconds: float, seed: int) -> str:
    """One line on `seconds` of one reader."""
    for path in reader.corpus():
        run_once(reader, path.read_bytes())
    runs = taken = 0
    slowest = 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = nearly_right(reader, Random(f"{seed} {reader.name} {runs}"))
        started = time.process_time()
        taken += run_once(reader, data)
        slowest = max(slowest, time.process_time() - started)
        runs += 1
    reader.path.write_bytes(reader.seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"| {reader.name} | {runs} | {taken} | {slowest:.2f} s | {peak:.0f} MB |"


def by_coverage(name: str, folder: Path, seconds: float) -> None:
    """atheris on one reader: half of the inputs are its own bytes, half are mutations that its bytes decide."""
    import atheris  # type: ignore[import-not-found]
    from readers import make_readers  # type: ignore[import-not-found]

    reader = make_readers(folder)[name]
    # Its import hook does not see an editable installation.
    for module in [module for key, module in sys.modules.items() if key.startswith("gptoss_export.")]:
        for value in list(vars(module).values()):
            for function in [value, *(vars(value).values() if isinstance(value, type) else ())]:
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)

    def one(data: bytes) -> None:
        run_once(reader, data[1:] if data[:1] < b"\x80" else nearly_right(reader, Random(data)))

    grown = folder / "corpus"
    grown.mkdir()
    options = [f"-max_total_time={int(seconds)}", "-max_len=65536", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(grown), str(reader.corpus()[0].parent)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", metavar="READER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.atheris:
            by_coverage(options.atheris, Path(folder), options.minutes * 60)
            return
        from readers import make_readers

        readers = make_readers(Path(folder))
        print("| reader | runs | taken | slowest | peak of the process |\n|---|---|---|---|---|")
        for reader in readers.values():
            print(fuzz(reader, options.minutes * 60 / len(readers), options.seed), flush=True)


if __name__ == "__main__":
    main()
