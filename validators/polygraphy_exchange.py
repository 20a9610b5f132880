"""Our measurements for those who live in Polygraphy, and theirs for us.

    write_inputs(probes, config, folder / "inputs")            # polygraphy run --load-inputs
    write_reference(reference, folder / "reference")           # polygraphy run --load-outputs
    write_accuracy(report, folder / "accuracy.json")           # AccuracyResults, as Comparator.compare_accuracy returns
    measure_results(read_logits(path), reference)              # what polygraphy run --save-outputs wrote

Folders hold one file an iteration, which is a probe, because Polygraphy then streams them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.errors import PromptError
from gptoss_export.validators.compare import compare_rows
from gptoss_export.validators.metrics import Accumulator, Metrics
from gptoss_export.validators.polygraphy_json import CLASS, encode_array, write_results
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import BLOCK_POSITIONS, Reference
from gptoss_export.validators.report.schema import ParityReport

RUNNER = "transformers"


def feeds(probe: Probe, config: ModelConfig) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
    """What the graph of target `onnx` takes for a whole prefill of the probe: an empty cache, nothing masked."""
    ids = np.array([probe.ids], np.int64)
    empty = np.zeros((1, config.num_kv_heads, 0, config.head_dim), np.float32)
    pasts = {
        f"past_key_values.{layer}.{part}": empty for layer in range(config.num_layers) for part in ("key", "value")
    }
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **pasts}


def write_inputs(probes: Sequence[Probe], config: ModelConfig, folder: Path) -> None:
    """A feed dictionary a probe, in a new folder."""
    folder.mkdir()
    for index, probe in enumerate(probes):
        content = {name: encode_array(array) for name, array in feeds(probe, config).items()}
        (folder / f"{index:010}.json").write_text(json.dumps(content), encoding="ascii")


def write_reference(reference: Reference, folder: Path) -> None:
    """The reference's logits of every probe, in a new folder; a few positions are in memory at a time."""
    folder.mkdir()
    for index, probe in enumerate(reference.probes):
        n = len(probe.ids)
        blocks = (
            reference.logits(index, start, min(start + BLOCK_POSITIONS, n)) for start in range(0, n, BLOCK_POSITIONS)
        )
        with (folder / f"{index:010}.json").open("w", encoding="ascii") as file:
            write_results(file, RUNNER, (1, n, reference.vocab_size), blocks)


def write_accuracy(report: ParityReport, path: Path) -> None:
    """AccuracyResults: of our figures those that Polygraphy has a name for, an output a scenario.

    Differences are of logits after each row's mean difference is removed, and what they are held to is our gate.
    A scenario without finite figures is False, as a shape that differs is to Polygraphy.
    """

    def result(m: Metrics) -> dict[str, object] | bool:
        if m.logit_diff_max is None:
            return False
        unknown = dict.fromkeys(
            ("max_reldiff", "mean_reldiff", "median_absdiff", "median_reldiff", "quantile_absdiff", "quantile_reldiff")
        )
        limit = {"check_error_stat": "max", "atol": report.gates.max_logit_diff, "rtol": 0.0, CLASS: "SimpleThreshold"}
        known = {"max_absdiff": m.logit_diff_max, "mean_absdiff": m.logit_diff_mean}
        passed = m.non_finite == 0 and m.logit_diff_max <= report.gates.max_logit_diff
        return {**unknown, **known, "thresholds": limit, "passed": passed, CLASS: "OutputCompareResult"}

    outputs = {f"logits ({s.name})": result(s.metrics) for s in report.evidence.scenarios}
    pair = [RUNNER, f"{report.engine.name} {report.engine.version}"]
    accuracy = {"lst": [[pair, [outputs]]], "aggregation": "per_sample", CLASS: "AccuracyResult"}
    path.write_text(json.dumps({"lst": [accuracy], CLASS: "AccuracyResults"}, allow_nan=False), encoding="ascii")


def measure_results(results: Iterable[tuple[str, NDArray[np.float32]]], reference: Reference) -> Mapping[str, Metrics]:
    """Metrics of every runner in the results, over the reference's probes in their order.

    Raises PromptError when a runner has more or fewer iterations than there are probes, or logits of another shape.
    """
    accumulators: dict[str, Accumulator] = {}
    seen: dict[str, int] = {}
    again = "Run Polygraphy with --load-inputs of `gptoss-export polygraphy export`, of the same checkpoint and effort."
    for runner, logits in results:
        index = seen.get(runner, 0)
        seen[runner] = index + 1
        if index >= len(reference.probes):
            raise PromptError(f"the results have more iterations than the {len(reference.probes)} probes", again)
        ids = reference.probes[index].ids
        expected = (1, len(ids), reference.vocab_size)
        if logits.shape != expected:
            raise PromptError(
                f"logits of iteration {index} are {list(logits.shape)}, those of probe {reference.probes[index].name!a}"
                f" {list(expected)}",
                again,
            )
        accumulator = accumulators.setdefault(runner, Accumulator())
        compare_rows(reference, index, 0, logits[0], accumulator)
    if short := [runner for runner, count in seen.items() if count < len(reference.probes)]:
        raise PromptError(
            f"the results of {short[0][:80]!a} have {seen[short[0]]} iterations, and there are "
            f"{len(reference.probes)} probes",
            again,
        )
    if not accumulators:
        raise PromptError("the results are of no runner", again)
    return {runner: accumulator.metrics() for runner, accumulator in accumulators.items()}
