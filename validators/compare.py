"""A probe's logits against the reference's, a few rows at a time."""

from __future__ import annotations

from gptoss_export.engines.runner import Logits
from gptoss_export.validators.metrics import Accumulator, Where
from gptoss_export.validators.reference import BLOCK_POSITIONS, Reference


def compare_rows(reference: Reference, probe: int, position: int, candidate: Logits, accumulator: Accumulator) -> None:
    """Adds rows [n, vocab] of the probe of that index, from that position on, each with the text's next token."""
    ids: tuple[int | None, ...] = (*reference.probes[probe].ids, None)
    for start in range(0, len(candidate), BLOCK_POSITIONS):
        rows = candidate[start : start + BLOCK_POSITIONS]
        at = position + start
        places = range(at, at + len(rows))
        accumulator.add(
            reference.logits(probe, at, at + len(rows)),
            rows,
            where=[Where(probe, place) for place in places],
            following=[ids[place + 1] for place in places],
        )
