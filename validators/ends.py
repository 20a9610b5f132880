"""What is no layer: the embedding, the final norm and lm_head, each given what the reference's gets.

record = measure_ends(inspector, reference, rows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_export.engines.inspector import Inspector
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.deviation import Deviation
from gptoss_export.validators.reference import BLOCK_POSITIONS, Reference


@dataclass(frozen=True)
class EndsRecord:
    """The embedding, the final norm and lm_head over all positions of all probes.

    Errors are relative: root mean square of the difference over that of what it should be. embedding: of the tokens.
    norm: of the reference's last hidden state. lm_head: of the same, so that the norm's error is in it. An end that is
    not finite has no error, and is counted in non_finite.
    """

    tokens: int
    embedding: float | None
    norm: float | None
    lm_head: float | None
    non_finite: int

    @property
    def errors(self) -> Mapping[str, float | None]:
        """By name, in the order of computation."""
        return {"embedding": self.embedding, "norm": self.norm, "lm_head": self.lm_head}


def measure_ends(
    inspector: Inspector, reference: Reference, rows: int, *, progress: Progress | None = None
) -> EndsRecord:
    """rows: logits that one call may return. Raises what the inspector raises."""
    ends, trace = inspector.ends(), reference.trace
    embedding, norm, lm_head = Deviation(), Deviation(), Deviation()
    tokens = 0
    with (progress or SilentProgress()).task("ends", total=len(reference.probes)) as task:
        for number, probe in enumerate(reference.probes):
            first, final = trace.hidden(0, number), trace.final(number)
            last = trace.hidden(inspector.num_layers, number)
            for chunk in ends.run(np.array(probe.ids, np.int64), last, rows=rows):
                here = slice(chunk.start, chunk.start + len(chunk.logits))
                embedding.add(chunk.embedding, first[here])
                norm.add(chunk.norm, final[here])
                for row in range(0, len(chunk.logits), BLOCK_POSITIONS):
                    some = chunk.logits[row : row + BLOCK_POSITIONS]
                    start = chunk.start + row
                    lm_head.add(some, reference.logits(number, start, start + len(some)))
            tokens += len(probe.ids)
            task.advance(1)
    bad = embedding.non_finite + norm.non_finite + lm_head.non_finite
    return EndsRecord(tokens, embedding.relative, norm.relative, lm_head.relative, bad)


def failing_ends(record: EndsRecord, limit: float) -> Sequence[str]:
    """Which of embedding, final norm and lm_head are beyond the limit, in the order of computation."""
    return [name for name, error in record.errors.items() if error is None or not error <= limit]
