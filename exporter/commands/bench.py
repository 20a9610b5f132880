"""`bench`: how fast an artifact is on this machine, and how much of the machine it uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_export.exporter.commands.artifact import ARTIFACT
from gptoss_export.exporter.commands.settings import (
    SCHEMA_VERSION,
    Settings,
    common_options,
    json_option,
    threads_option,
)
from gptoss_export.exporter.progress import format_bytes

if TYPE_CHECKING:
    from gptoss_export.engines.bandwidth import Bandwidth, Spread
    from gptoss_export.engines.bench import BenchPlan, BenchResult
    from gptoss_export.engines.machine import Machine, Memory
    from gptoss_export.engines.token_bytes import TokenBytes
    from gptoss_export.exporter.artifact import Manifest

# A target that is none of these gets no figures that rest on the bytes of its weights.
_STORED_TARGETS = ("onnx", "ort-cpu")
_INT8_TARGETS = ("ort-cpu-int8",)
_LIBRARIES = ("gptoss-export", "numpy", "onnxruntime")
_MAX_SIZE = 1 << 30


class Sizes(click.ParamType[tuple[int, ...]]):
    """Integers between commas, each at least `lowest`; a value that is repeated counts once."""

    name = "sizes"

    def __init__(self, lowest: int) -> None:
        self._lowest = lowest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[0-9]{1,10}(,[0-9]{1,10})*", value):
            self.fail(f"{value[:80]!r} are no integers between commas, such as 32,128", param, ctx)
        sizes = tuple(dict.fromkeys(int(part) for part in value.split(",")))
        if not all(self._lowest <= size <= _MAX_SIZE for size in sizes):
            self.fail(f"{value[:80]!r}: each has to be {self._lowest} to {_MAX_SIZE}", param, ctx)
        return sizes


@dataclass(frozen=True)
class BenchReport:
    """A result with all that is needed to read it later. threads: as asked for, None for one a core."""

    manifest: Manifest
    machine: Machine
    versions: Mapping[str, str]
    plan: BenchPlan
    threads: int | None
    energy_source: str | None
    weights: TokenBytes | None
    result: BenchResult
    created_at: str


@click.command("bench")
@ARTIFACT
@click.option(
    "--prompt-lengths",
    type=Sizes(1),
    default="32,128,512",
    show_default=True,
    metavar="N,N",
    help="Prompts to read, in tokens.",
)
@click.option(
    "--past",
    type=Sizes(0),
    default="128",
    show_default=True,
    metavar="N,N",
    help="Tokens in the cache when decoding begins.",
)
@click.option("--batch", type=Sizes(1), default="1", show_default=True, metavar="N,N", help="Rows to decode at a time.")
@click.option(
    "--decode-tokens", type=click.IntRange(1, _MAX_SIZE), default=64, show_default=True, help="A row and repetition."
)
@click.option(
    "--repetitions", type=click.IntRange(1, 10_000), default=3, show_default=True, help="Of every measurement."
)
@threads_option
@json_option
@common_options
@click.pass_obj
def bench(
    settings: Settings,
    folder: Path,
    prompt_lengths: tuple[int, ...],
    past: tuple[int, ...],
    batch: tuple[int, ...],
    decode_tokens: int,
    repetitions: int,
    threads: int | None,
) -> None:
    """Measure the speed of the artifact in OUT.

    Reads prompts and decodes pseudo-random tokens, and measures in the same run how fast this machine reads
    memory, which is the limit of decoding. Hashes are not checked.

    \b
    Examples:
      gptoss-export bench ./release
      gptoss-export bench ./release --past 128,2048,8192 --batch 1,4 --json
    """
    from gptoss_export.engines.bench import BenchPlan, run_bench
    from gptoss_export.engines.machine import HostMeter, describe_machine
    from gptoss_export.exporter.artifact import read_manifest
    from gptoss_export.exporter.clock import now
    from gptoss_export.exporter.commands.show import warn_unless_clean
    from gptoss_export.exporter.pipeline import find_target

    manifest = read_manifest(folder)
    plan = BenchPlan(prompt_lengths, past, batch, decode_tokens, repetitions)
    plan.check(manifest.model.max_positions)
    target = find_target(manifest)
    target.check_available()
    warn_unless_clean(folder, manifest)
    meter = HostMeter(threads)
    with settings.working() as progress:
        result = run_bench(lambda: target.open_runner(folder, threads), plan, meter, progress.note)
    report = BenchReport(
        manifest=manifest,
        machine=describe_machine(),
        versions=_versions(),
        plan=plan,
        threads=threads,
        energy_source=meter.energy_source,
        weights=count_weights(manifest),
        result=result,
        created_at=now(),
    )
    if settings.as_json:
        settings.document = report_as_json(report)
    else:
        echo_report(report)


def count_weights(manifest: Manifest) -> TokenBytes | None:
    """What a token reads of this artifact, where its target keeps the weights in a known form."""
    from gptoss_export.engines.ort.quantize import first_int8_layer
    from gptoss_export.engines.token_bytes import token_bytes

    if manifest.target in _INT8_TARGETS:
        return token_bytes(manifest.model, manifest.layout, first_int8_layer(manifest.model.num_layers))
    return token_bytes(manifest.model, manifest.layout) if manifest.target in _STORED_TARGETS else None


def report_as_json(report: BenchReport) -> dict[str, object]:
    """The report for machines, as docs/bench.schema.json describes it; seconds, bytes and joules."""
    manifest, result, weights = report.manifest, report.result, report.weights
    total = None if weights is None else weights.total
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": report.created_at,
        "artifact": {
            "content_sha256": manifest.content_sha256,
            "target": manifest.target,
            "engine": manifest.engine,
            "provider": manifest.provider,
            "verdict": manifest.parity.verdict,
        },
        "versions": dict(report.versions),
        "machine": asdict(report.machine),
        "settings": asdict(report.plan) | {"threads": report.threads},
        "energy_source": report.energy_source,
        "token_bytes": None if weights is None else asdict(weights) | {"total": total},
        "load": asdict(result.load),
        "memory": asdict(result.memory),
        "bandwidth": {"before": _optional(result.bandwidth_before), "after": _optional(result.bandwidth_after)},
        "prefill": [asdict(speed) for speed in result.prefill],
        "decode": [
            asdict(speed) | {"bandwidth_fraction": result.bandwidth_fraction(speed, total)} for speed in result.decode
        ],
    }


def echo_report(report: BenchReport) -> None:
    """The report for people."""
    manifest, result, weights = report.manifest, report.result, report.weights
    machine, memory = report.machine, result.memory
    threads = "one thread a core" if report.threads is None else f"{report.threads} threads"
    rows = [
        ("artifact", f"{manifest.target} {manifest.content_sha256[:12]}, {manifest.engine}, {threads}"),
        ("machine", f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores"),
        (
            "load",
            f"ready in {result.load.ready_seconds:.2f} s, then {result.load.first_token_seconds:.2f} s to a token",
        ),
        ("memory", f"{_memory(memory.after_load)} when loaded, {_memory(memory.end)} at the end"),
        (
            "reads",
            f"{_bandwidth(result.bandwidth_before)} before decoding, {_bandwidth(result.bandwidth_after)} after it",
        ),
        ("weights", "unknown" if weights is None else f"{_weights(weights)} a token"),
        ("energy", report.energy_source or "not reported by this system"),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
    click.echo(f"\n{'prompt':>7} {'tokens/s':>24} {'first token':>12} {'cores':>6} {'J/token':>8}")
    for p in result.prefill:
        click.echo(
            f"{p.prompt_length:>7} {_speed(p.tokens_per_second):>24} {p.first_token_seconds.median:>10.3f} s "
            f"{p.cores_used:>6.2f} {_number(p.joules_per_token, '.2f'):>8}"
        )
    click.echo(
        f"\n{'past':>7} {'batch':>5} {'tokens/s':>24} {'p50, p90, p99 of a step':>26} {'cores':>6} "
        f"{'of reads':>8} {'J/token':>8}"
    )
    for d in result.decode:
        latency = d.latency_seconds
        steps = ", ".join(f"{1000 * seconds:.1f}" for seconds in (latency.p50, latency.p90, latency.p99)) + " ms"
        fraction = result.bandwidth_fraction(d, None if weights is None else weights.total)
        click.echo(
            f"{d.past:>7} {d.batch:>5} {_speed(d.tokens_per_second):>24} {steps:>26} {d.cores_used:>6.2f} "
            f"{_number(fraction, '.0%'):>8} {_number(d.joules_per_token, '.2f'):>8}"
        )


def _optional(bandwidth: Bandwidth | None) -> dict[str, object] | None:
    return None if bandwidth is None else asdict(bandwidth)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in _LIBRARIES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an artifact of another engine needs none of them
            continue
    return found


def _memory(memory: Memory | None) -> str:
    if memory is None:
        return "unknown"
    resident, anonymous, peak = (format_bytes(n) for n in (memory.resident, memory.anonymous, memory.peak_resident))
    return f"{resident} resident ({anonymous} anonymous, peak {peak})"


def _bandwidth(bandwidth: Bandwidth | None) -> str:
    if bandwidth is None:
        return "unknown"
    return f"{bandwidth.bytes_per_second.median / 1e9:.1f} GB/s ({bandwidth.cores_used:.1f} cores)"


def _weights(weights: TokenBytes) -> str:
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(nbytes)}" for name, nbytes in asdict(weights).items())
    return f"{format_bytes(weights.total)} ({parts})"


def _speed(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.min:.2f} to {spread.max:.2f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
