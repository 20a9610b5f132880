"""How often a correct artifact fails by luck: other texts, threads, instruction sets and batches, again and again.

    python benchmarks/verdicts.py FOLDER --draws 200

Exports the small checkpoint for every target into FOLDER once. A draw is other texts out of its held-out text, in the
lengths of a quick validation and up to two more beside them, which changes how the reference's batch is cut; a worker
is a process whose environment allows torch, oneDNN and MKL other instructions, with 1 or 2 threads. Of each draw the
reference, both noise floors and of each target scenarios, routing, replay and the engine against itself are measured,
and judged with layers, ends and ranges of the worker's first draw, which are no matter of luck. FOLDER/draws.jsonl
keeps what was found, so a call that was cut off goes on; the table is of all that is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import machine, run

from gptoss_export.engines.targets import TARGETS as KNOWN
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.validators.consistency import measure_consistency
from gptoss_export.validators.ends import measure_ends
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.floor import measure_floor
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.layers import measure_layers
from gptoss_export.validators.positions import Texts
from gptoss_export.validators.probes import Probe, default_lengths, encode, load_tokenizer, long_probe
from gptoss_export.validators.ranges import RangeMeter
from gptoss_export.validators.reference import Reference, run_reference
from gptoss_export.validators.replay import measure_routing
from gptoss_export.validators.scenario_run import live_rows, run_scenarios
from gptoss_export.validators.verdict import Case, cases

TINY = Path(__file__).parent.parent / "tests" / "data" / "tiny-gpt-oss"
GPTOSS = Path(sys.executable).parent / "gptoss-export"
TARGETS = tuple(GATES)
LEVELS = {
    "AVX2": "avx2",
    "AVX512_CORE": "avx512bw",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_AMX": "amx_bf16",
}
MOST_EXTRA = 2
EXTRA_TOKENS = 50


def environments() -> list[dict[str, str]]:
    """What workers are told: every level that this processor has, other code paths of torch and MKL, two threads."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    levels: list[dict[str, str]] = [{"ONEDNN_MAX_CPU_ISA": level} for level, flag in LEVELS.items() if flag in flags]
    levels += [{"ATEN_CPU_CAPABILITY": "default"}, {"MKL_CBWR": "COMPATIBLE"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, {}]
    return [{**level, "OMP_NUM_THREADS": "1"} for level in levels] + [{"OMP_NUM_THREADS": "2"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--at-once", type=int, default=1, help="workers at a time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        job = json.loads(arguments.worker)
        work(arguments.folder, arguments.targets, job["environment"], job["draws"])
        return
    artifacts, log = arguments.folder / "artifacts", arguments.folder / "draws.jsonl"
    if not artifacts.exists():
        targets = [word for name in TARGETS for word in ("--target", name)]
        export = [GPTOSS, *targets, "--model", TINY, "--output", artifacts, "--parity", "off", "--allow-unexecuted"]
        run(export)
    done = {(row["draw"], row["target"]) for row in rows(log)}
    given = environments()
    jobs: dict[int, list[int]] = defaultdict(list)
    for draw in range(arguments.draws):
        if any((draw, target) not in done for target in arguments.targets):
            jobs[draw % len(given)].append(draw)
    waiting = [(given[k], draws) for k, draws in jobs.items()]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < arguments.at_once:
            environment, draws = waiting.pop(0)
            command = [sys.executable, __file__, arguments.folder, "--targets", *arguments.targets]
            job = json.dumps({"environment": environment, "draws": draws})
            running.append(subprocess.Popen([*command, "--worker", job], env={**os.environ, **environment}))
        running.pop(0).wait()
    print(machine())
    print("\n".join(table(list(rows(log)))))


def rows(log: Path) -> Iterator[dict[str, object]]:
    if log.exists():
        yield from map(json.loads, log.read_text().splitlines())


def table(found: list[dict[str, object]]) -> list[str]:
    """A row a target, and of each gate how much of its limit the worst draw used up."""
    lines = ["| target | draws | failed | what failed |", "|---|---|---|---|"]
    used: dict[str, dict[str, float]] = defaultdict(dict)
    for target in TARGETS:
        mine = [row for row in found if row["target"] == target]
        failed = [row for row in mine if row["failures"]]
        names = Counter(f"{gate} in {where}" for row in failed for where, gate, *_ in row["failures"])
        named = ", ".join(f"{name} ({count})" for name, count in names.most_common(4))
        lines.append(f"| `{target}` | {len(mine)} | {len(failed)} | {named or '-'} |")
        for row in mine:
            for gate, share in row["used"].items():
                used[gate][target] = max(share, used[gate].get(target, 0.0))
    lines += ["", f"| largest share of the limit | {' | '.join(TARGETS)} |", f"|---|{'---|' * len(TARGETS)}"]
    for gate, shares in used.items():
        lines.append(f"| {gate} | {' | '.join(f'{shares.get(target, 0.0):.2g}' for target in TARGETS)} |")
    worlds = Counter(row["environment"] for row in found)
    return [*lines, "", *(f"{name}: {count} verdicts" for name, count in sorted(worlds.items()))]


def work(folder: Path, targets: Sequence[str], environment: Mapping[str, str], draws: Sequence[int]) -> None:
    """The draws of one worker, appended as they are found."""
    threads = int(environment["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(TINY)
    text = encode(load_tokenizer(checkpoint), (TINY / "heldout.txt").read_text())
    opened = {name: Opened(folder / "artifacts" / name, name, checkpoint, threads) for name in targets}
    name = " ".join(f"{key}={value}" for key, value in environment.items())
    done = {(row["draw"], row["target"]) for row in rows(folder / "draws.jsonl")}
    for draw in draws:
        random = np.random.default_rng(draw)
        lengths = default_lengths(checkpoint.config, "quick")
        lengths += random.integers(2, EXTRA_TOKENS, random.integers(0, MOST_EXTRA + 1)).tolist()
        starts = [int(random.integers(0, len(text) - n)) for n in lengths]
        cut = [tuple(text[at : at + n]) for at, n in zip(starts, lengths, strict=True)]
        reference = run_reference(checkpoint, [Probe(f"text-{k}", ids) for k, ids in enumerate(cut)])
        floors = {dtype: measure_floor(checkpoint, reference, dtype) for dtype in ("bfloat16", "float16")}
        for target, artifact in opened.items():
            if (draw, target) in done:
                continue
            gates = GATES[target].resolve(floors.get(GATES[target].floor_dtype or ""))
            judged = cases(artifact.evidence(reference), gates)
            row = {
                "draw": draw,
                "target": target,
                "environment": name,
                "failures": [(c.where, c.gate, c.measured, c.limit) for c in judged if not c.kept],
                "used": used(judged),
            }
            with (folder / "draws.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")


def used(judged: Sequence[Case]) -> dict[str, float]:
    """The largest share of its limit by gate; of an agreement, what is lacking of what may be."""
    found: dict[str, float] = {}
    for case in judged:
        measured, limit = case.measured or 0.0, case.limit
        if case.gate.startswith("min_top1"):
            measured, limit = 1 - measured, 1 - limit
        if not case.gate.startswith("min_headroom") and limit:
            found[case.gate] = max(found.get(case.gate, 0.0), measured / limit)
    return found


class Opened:
    """An artifact whose layers, ends and ranges are measured once."""

    def __init__(self, folder: Path, name: str, checkpoint: Checkpoint, threads: int) -> None:
        target = KNOWN[name]
        self._limits = target.execution(folder)
        opener = target.open_runner if self._limits.not_executed_reason is None else target.stand_in
        self._runner, self._inspector = opener(folder, threads), target.inspect(folder, threads)
        self._checkpoint = checkpoint
        self._still: Evidence | None = None

    def evidence(self, reference: Reference) -> Evidence:
        """All that a verdict is about."""
        still, live = self._still, live_rows(reference.vocab_size)
        if still is None:
            meter = RangeMeter(reference.trace.peaks)
            layers = measure_layers(self._inspector, reference, meter.add)
            ends = measure_ends(self._inspector, reference, live)
            ranges = meter.records(self._checkpoint)
            still = self._still = Evidence(len(layers), (), None, None, layers, ends, ranges, (), "")
        run_ = run_scenarios(self._runner, reference, effort="quick", max_batch=self._limits.max_batch)
        routing = measure_routing(self._inspector, reference, [layer.router for layer in still.layers], live)
        texts = Texts(reference, [row.replay_error for row in routing.layers])
        long = long_probe(self._checkpoint)
        checks = measure_consistency(
            self._runner,
            [probe.ids for probe in reference.probes],
            reference.config,
            "quick",
            long=None if long is None else long.ids,
            max_batch=self._limits.max_batch,
            max_context=self._limits.max_context,
            live=live,
        )
        scenarios, pooled = run_.results(texts), run_.pooled(texts)
        return replace(still, scenarios=scenarios, texts=pooled, routing=routing, consistency=checks)


if __name__ == "__main__":
    main()
