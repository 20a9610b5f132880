"""Each reader of untrusted files on documents that are nearly right: a typed error or a valid result, in bounded memory
and time. What it should be tried on first lies in corpus/<reader>/; `benchmarks/fuzz.py` goes on for as long as wanted.
"""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SECONDS = 5.0
PEAK_BYTES = 48 << 20
"""What numpy, protobuf and a million JSON values do not reach for the small documents of these tests."""

sys.path.insert(0, str(Path(__file__).parent))
try:
    from mutate import MUTATIONS, mutate_bytes
    from readers import CORPUS, Reader, make_readers
finally:
    sys.path.pop(0)

NAMES = sorted(path.name for path in CORPUS.iterdir())


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return make_readers(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def reader(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Iterator[Reader]:
    """The reader, with its valid document in place before and after."""
    found = readers[request.param]
    assert found.check(found.seed)
    yield found
    assert found.check(found.seed)


def bounded(reader: Reader, data: bytes) -> bool:
    """`Reader.check` within SECONDS of this process' time and PEAK_BYTES of Python's memory."""
    tracemalloc.start()
    started = time.process_time()
    try:
        read = reader.check(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < SECONDS
    assert peak < PEAK_BYTES, peak
    return read


def test_every_reader_has_a_corpus(readers: dict[str, Reader]) -> None:
    assert sorted(readers) == NAMES
    assert all(len(reader.corpus()) >= 3 for reader in readers.values())


@pytest.mark.parametrize("reader", NAMES, indirect=True)
def test_the_corpus(reader: Reader) -> None:
    for path in reader.corpus():
        read = bounded(reader, path.read_bytes())
        assert read is path.name.startswith("valid"), path.name


@pytest.mark.parametrize("reader", NAMES, indirect=True)
def test_what_is_nearly_right(reader: Reader) -> None:
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
    @given(random=st.randoms(use_true_random=False), raw=st.just(b"") | st.just(b"") | st.binary(max_size=200))
    def run(random: Random, raw: bytes) -> None:
        mutate: Any = MUTATIONS[reader.kind] if random.random() < 0.9 else mutate_bytes
        bounded(reader, raw or mutate(random, reader.seed))

    run()
