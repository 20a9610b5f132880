"""Where the time of a run went.

watch = Stopwatch()
with watch.stage("graph"):
    ...
watch.read().graph      # seconds
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Shared = Literal["hashes", "weights", "graph", "reference"]


@dataclass(frozen=True)
class RunSeconds:
    """Seconds of one run. total: from its beginning to the finished artifacts.

    The others: stages that its targets share, None for one that this run had no need of. hashes: of a delivered
    artifact, checked. weights: placed and hashed, while the graph is made: these two overlap. reference: with the noise
    floors, or their way out of the cache.
    """

    total: float
    hashes: float | None
    weights: float | None
    graph: float | None
    reference: float | None


class Stopwatch:
    """Runs from its making on. Stages may be in several threads."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stages: dict[Shared, float] = {}

    @contextmanager
    def stage(self, name: Shared) -> Iterator[None]:
        """A block that is the stage, whole."""
        started = time.monotonic()
        yield
        self._stages[name] = rounded(time.monotonic() - started)

    def read(self) -> RunSeconds:
        """What has passed until now."""
        found = self._stages.get
        total = rounded(time.monotonic() - self._started)
        return RunSeconds(total, found("hashes"), found("weights"), found("graph"), found("reference"))


def rounded(seconds: float) -> float:
    """To the millisecond, as they go on record."""
    return round(seconds, 3)
