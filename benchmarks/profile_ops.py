"""Where the time of a decode step or of a prompt goes, operator by operator, from ONNX Runtime's own profile.

    python benchmarks/profile_ops.py OUT                  # decode steps after 128 positions
    python benchmarks/profile_ops.py OUT --past 4096
    python benchmarks/profile_ops.py OUT --prefill 512

OUT is an artifact of any target that ONNX Runtime runs. Linear layers are told apart by their weight's shape. GB/s is
the weights that an operator needs, biases and scales included, over its time; of the experts these are
min(tokens * top_k, experts), right for one token and for hundreds, too many between. What an operator runs in a body of
its own (Loop, If) counts for the inner ones. Profiling costs some microseconds an operator: for speeds there is
`gptoss-export bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime as ort
from measure import machine

from gptoss_export.engines.bench import WARMUP_STEPS, random_ids
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.artifact import read_manifest

NODE = "_kernel_time"
SMALL = 0.001
"""Share below which operators are summed up in one row."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The last part of a profile. calls: of the session, None for as many as there were before it."""

    what: str
    steps: int
    calls: int | None
    seconds: float


@dataclass
class Row:
    """Sums over the steps; microseconds, bytes of weights."""

    count: int = 0
    time: int = 0
    nbytes: float = 0.0

    def add(self, count: int, time: int, nbytes: float) -> None:
        self.count += count
        self.time += time
        self.nbytes += nbytes


@contextmanager
def profiled(folder: Path) -> Iterator[list[ort.InferenceSession]]:
    """Sessions opened inside write a profile into `folder` when they are told to end it; yields the list of them."""
    sessions: list[ort.InferenceSession] = []
    open_session = ort.InferenceSession

    def open_profiled(model: Any, options: ort.SessionOptions, **keywords: Any) -> ort.InferenceSession:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        sessions.append(open_session(model, options, **keywords))
        return sessions[-1]

    with mock.patch.object(ort, "InferenceSession", open_profiled):
        yield sessions


def decode(runner: Runner, past: int, steps: int) -> Measured:
    """Decodes `steps` tokens one by one; the last few before `past` too, as a warm-up."""
    ids = random_ids(runner.vocab_size, 1, past + steps)
    step = runner.forward(ids[:, : past - WARMUP_STEPS])
    for at in range(past - WARMUP_STEPS, past):
        step = runner.forward(ids[:, at : at + 1], cache=step.cache)
    started = time.perf_counter()
    for at in range(past, past + steps):
        step = runner.forward(ids[:, at : at + 1], cache=step.cache)
    return Measured(f"{steps} decode steps after {past} positions", steps, steps, time.perf_counter() - started)


def prefill(runner: Runner, length: int) -> Measured:
    """One prompt, after the same one as a warm-up."""
    ids = random_ids(runner.vocab_size, 1, length)
    runner.forward(ids)
    started = time.perf_counter()
    runner.forward(ids)
    return Measured(f"a prompt of {length} tokens", 1, None, time.perf_counter() - started)


def kind(node: Event) -> str:
    """What a node is summed up with: its operator, and for a linear layer the weight's shape."""
    name: str = node["args"]["op_name"]
    return f"{name} {shapes(node)[1]}" if name.startswith("Linear") else name


def weight_bytes(node: Event) -> float:
    """Bytes of weights that a call needs, 0 for operators that are not about weights."""
    name: str = node["args"]["op_name"]
    nbytes = float(node["args"]["parameter_size"])  # of all inputs that are initializers
    if name == "MoEExperts":
        chosen, (experts, *_) = shapes(node)[2:4]
        return nbytes * min(math.prod(chosen), experts) / experts
    return nbytes if name.startswith(("Linear", "MatMul", "MoERouter")) else 0.0


def shapes(node: Event) -> list[list[int]]:
    """Of the inputs in turn; the profile has a mapping from type to shape for each."""
    return [next(iter(tensor.values())) for tensor in node["args"]["input_type_shape"]]


def own_times(nodes: Sequence[Event]) -> Iterator[tuple[Event, int]]:
    """Each node with its microseconds without those of the nodes that ran inside of it."""
    own = {id(node): int(node["dur"]) for node in nodes}
    around: list[Event] = []
    for node in sorted(nodes, key=lambda n: (n["ts"], -n["dur"])):
        end = node["ts"] + node["dur"]
        while around and end > around[-1]["ts"] + around[-1]["dur"]:
            around.pop()
        if around:
            own[id(around[-1])] -= node["dur"]
        around.append(node)
    return ((node, own[id(node)]) for node in nodes)


def table(events: Sequence[Event], measured: Measured) -> Iterator[str]:
    """The lines of the report, markdown."""
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: int(e["ts"]))
    runs = runs[-(measured.calls or len(runs) // 2) :]
    nodes = [e for e in events if e["cat"] == "Node" and e["name"].endswith(NODE) and e["ts"] >= runs[0]["ts"]]
    total = measured.seconds * 1e6
    rows: defaultdict[str, Row] = defaultdict(Row)
    for node, spent in own_times(nodes):
        rows[kind(node)].add(1, spent, weight_bytes(node))
    nbytes = sum(row.nbytes for row in rows.values())
    small = [name for name, row in rows.items() if row.time < SMALL * total]
    others = Row()
    for name in small:
        row = rows.pop(name)
        others.add(row.count, row.time, 0)
    ordered = sorted(rows.items(), key=lambda item: -item[1].time)
    in_nodes, in_runs = sum(row.time for row in rows.values()) + others.time, sum(int(r["dur"]) for r in runs)
    if small:
        ordered.append((f"{len(small)} others", others))
    ordered += [
        ("between operators", Row(time=in_runs - in_nodes)),
        ("outside of ONNX Runtime", Row(time=round(total) - in_runs)),
        ("all", Row(len(nodes), round(total), nbytes)),
    ]
    yield "| operator | calls a step | ms a step | share | GB/s of weights |\n|---|---|---|---|---|"
    for name, row in ordered:
        calls = f"{row.count / measured.steps:.0f}" if row.count else ""
        rate = f"{row.nbytes / row.time / 1e3:.1f}" if row.nbytes else ""
        yield f"| {name} | {calls} | {row.time / measured.steps / 1e3:.3f} | {row.time / total:.1%} | {rate} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the artifact")
    parser.add_argument("--past", type=int, default=128, help="positions before the first decode step [default: 128]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--steps", type=int, default=16, help="decode steps [default: 16]")
    what.add_argument("--prefill", type=int, help="tokens of a prompt, instead of decoding")
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    if a.past <= WARMUP_STEPS or min(a.steps, a.prefill or 1) < 1:
        parser.error(f"--past has to be more than {WARMUP_STEPS}, the others at least 1")
    target = read_manifest(a.out).target
    with tempfile.TemporaryDirectory() as folder:
        with profiled(Path(folder)) as sessions:
            runner = TARGETS[target].open_runner(a.out, a.threads)
        if len(sessions) != 1:
            parser.error(f"target {target} has {len(sessions)} sessions of ONNX Runtime, not one")
        measured = prefill(runner, a.prefill) if a.prefill else decode(runner, a.past, a.steps)
        events = json.loads(Path(sessions[0].end_profiling()).read_text(encoding="utf-8"))
    threads = "one thread a core" if a.threads is None else f"{a.threads} threads"
    print(f"{machine()}; {target}, {threads}; {measured.what}\n")
    for line in table(events, measured):
        print(line)


if __name__ == "__main__":
    main()
