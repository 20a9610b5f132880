"""Decode and prefill of ours and of llama.cpp on the same random 20b-shaped checkpoint, taking turns in one run.

    sh benchmarks/peers/build.sh ~/peers-venv
    python benchmarks/peers/compare.py /fast/disk --peers ~/peers-venv --layers 24 --target ort-cpu

Makes in the folder random-20b-24 (13.8 GB) and gguf/random-20b-24.gguf (12 GB) where they are not there, and, every
time, artifact-ort-cpu-24 (hard links to the checkpoint). Every turn is a process of its own (child.py) that finds its
files in the page cache; where memory is too small for both models' files, the other's are dropped from it first. In
each round the memory's bandwidth is measured and every model has one turn, in the same order. Ratios are of the same
round; printed are their median and range. With --agree nothing is timed: the logits of 192 positions are compared, to
show that it is the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agree import agreement
from to_gguf import Stored, read_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))
from measure import machine, run

from gptoss_export.engines.bandwidth import measure_read_bandwidth
from gptoss_export.engines.ort.quantize import first_int8_layer

HERE = Path(__file__).resolve().parent
GPTOSS = Path(sys.executable).parent / "gptoss-export"
GIB = 2**30
FEW_FAULTS = 100


@dataclass(frozen=True)
class Model:
    """One that takes turns. read: bytes of weights that decoding a token reads; files: what it maps."""

    name: str
    command: tuple[str, ...]
    read: float
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Turn:
    """What one process took. Rates in tokens/s; load in s; bandwidth in bytes/s, measured in the same round; memory in
    bytes: peak_rss with the mapped weights, peak_anonymous without."""

    model: str
    decode: float
    token_p50: float
    token_p95: float
    prefill: float
    load: float
    peak_rss: int
    peak_anonymous: int
    major_faults: int
    bandwidth: float


def bytes_read(config: dict[str, Any], tensors: dict[str, Stored], eight_bits_from: int | None) -> float:
    """Bytes a token: the chosen experts and every other matrix save the embedding.

    eight_bits_from: the first layer whose matrices have 34 bytes for 32 weights, as lm_head then has; None: all 64.
    """
    chosen = config["num_experts_per_tok"] / config["num_local_experts"]
    total = 0.0
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if ".mlp.experts." in name:
            total += tensor.nbytes * chosen
        elif name != "model.embed_tokens.weight":
            short = eight_bits_from is not None and (layer is None or int(layer[1]) >= eight_bits_from)
            total += tensor.nbytes * (34 / 64 if short else 1)
    return total


def prepare(a: argparse.Namespace) -> list[Model]:
    """Ours first, then the peers. The artifact is made anew, so that it is of this version of the exporter."""
    checkpoint = a.folder / f"random-20b-{a.layers}"
    gguf = a.folder / "gguf" / f"random-20b-{a.layers}.gguf"
    if not checkpoint.exists():
        run([GPTOSS, "synth", checkpoint, "--preset", "20b", "--layers", str(a.layers)])
    if not gguf.exists():
        run([a.peers / "bin" / "python", HERE / "to_gguf.py", checkpoint, gguf])
    config, tensors = read_checkpoint(checkpoint)
    models = []
    threads = ("--threads", str(a.threads))
    for target in a.target or ["ort-cpu"]:
        artifact = a.folder / f"artifact-{target}-{a.layers}"
        made = ["--target", target, "--model", checkpoint, "--output", artifact, "--force"]
        run([GPTOSS, *made, "--parity", "off", "--weights", "hardlink"])
        command = (sys.executable, str(HERE / "child.py"), "ours", str(artifact), "--target", target, *threads)
        read = bytes_read(config, tensors, first_int8_layer(a.layers) if "int8" in target else None)
        models.append(Model(target, command, read, tuple(f for f in artifact.rglob("*") if f.is_file())))
    peer = (str(a.peers / "bin" / "python"), str(HERE / "child.py"), "llama", str(gguf), *threads)
    read = bytes_read(config, tensors, 0)
    models.append(Model("llama.cpp", peer, read, (gguf,)))
    if not a.repack_only:
        models.append(Model("llama.cpp, no repack", (*peer, "--no-repack"), read, (gguf,)))
    return models


def settle(model: Model, models: Sequence[Model]) -> None:
    """Brings the model's files into the page cache, and the others' out of it where memory cannot hold them all."""
    every = {f.resolve() for m in models for f in m.files}
    mine = {f.resolve() for f in model.files}
    if available() < 2 * sum(f.stat().st_size for f in every):
        for file in every - mine:
            with file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(16 << 20)
    for file in mine:
        with file.open("rb", buffering=0) as raw:
            while raw.readinto(buffer):
                pass


def available() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def watch(command: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Runs a child; its output, and the highest VmHWM and RssAnon seen in bytes. Exits when it fails."""
    peaks = {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for name, kilobytes in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.MULTILINE):
            peaks[name] = max(peaks[name], int(kilobytes) * 1024)
        time.sleep(0.25)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
    return output, peaks


def take_turn(model: Model, sizes: Sequence[str], bandwidth: float) -> Turn:
    output, peaks = watch([*model.command, *sizes])
    times = json.loads(output.splitlines()[-1])
    steps = sorted(times["decode"])
    return Turn(
        model=model.name,
        decode=len(steps) / sum(steps),
        token_p50=statistics.median(steps),
        token_p95=steps[int(len(steps) * 0.95)],
        prefill=times["prefill_tokens"] / statistics.median(times["prefill"]),
        load=times["load"],
        peak_rss=peaks["VmHWM"],
        peak_anonymous=peaks["RssAnon"],
        major_faults=times["major_faults"],
        bandwidth=bandwidth,
    )


def spread(values: Sequence[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def report(models: Sequence[Model], turns: Sequence[Turn]) -> None:
    by_name = {m.name: [t for t in turns if t.model == m.name] for m in models}
    titles = ["", "decode, tokens/s", "a token p50 / p95, ms", "GB a token", "of the bandwidth", "prefill, tokens/s"]
    titles += ["load, s", "peak RSS / anonymous, GiB"]
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for model in models:
        mine = by_name[model.name]
        fraction = statistics.median(t.decode * model.read / t.bandwidth for t in mine)
        p50, p95 = (1000 * statistics.median(getattr(t, p) for t in mine) for p in ("token_p50", "token_p95"))
        rss, anonymous = max(t.peak_rss for t in mine) / GIB, max(t.peak_anonymous for t in mine) / GIB
        print(
            f"| {model.name} | {spread([t.decode for t in mine])} | {p50:.0f} / {p95:.0f} | {model.read / 1e9:.2f} "
            f"| {fraction:.2f} | {spread([t.prefill for t in mine], '.1f')} "
            f"| {statistics.median(t.load for t in mine):.1f} | {rss:.2f} / {anonymous:.2f} |"
        )
    peers = [m for m in models if m.name.startswith("llama.cpp")]
    print("\n| ratio in the same round | decode | prefill |\n|---|---|---|")
    for model in models:
        for peer in peers:
            if model in peers:
                continue
            pairs = list(zip(by_name[model.name], by_name[peer.name], strict=True))
            decode, prefill = ([getattr(o, k) / getattr(p, k) for o, p in pairs] for k in ("decode", "prefill"))
            print(f"| {model.name} against {peer.name} | {spread(decode)} | {spread(prefill)} |")
    faults = sum(t.major_faults for t in turns)
    if faults > FEW_FAULTS:
        print(f"\nWARNING: {faults} pages were read from the disk while something was timed: memory is too small.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="the environment that build.sh made")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--target", action="append", help="ours; may be repeated [default: ort-cpu]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=1, help="of the prefill, in a turn")
    parser.add_argument("--repack-only", action="store_true", help="leave out llama.cpp without its repacked copy")
    parser.add_argument("--agree", action="store_true", help="compare logits instead of times")
    parser.add_argument("--json", type=Path, help="write every turn there")
    a = parser.parse_args()
    models = prepare(a)
    if a.agree:
        agreement([(m.name, m.command) for m in models])
        return
    print(f"{machine()}; {a.layers} layers, {a.threads} threads, {a.rounds} rounds", flush=True)
    sizes = ["--decode", str(a.decode), "--prefill", str(a.prefill), "--repetitions", str(a.repetitions)]
    turns = []
    for number in range(a.rounds):
        measured = measure_read_bandwidth(a.threads)
        if measured is None:
            sys.exit("The memory's bandwidth cannot be measured: too little memory is free.")
        bandwidth = measured.bytes_per_second.median
        print(f"round {number + 1}: memory {bandwidth / 1e9:.1f} GB/s", flush=True)
        for model in models:
            settle(model, models)
            turn = take_turn(model, sizes, bandwidth)
            turns.append(turn)
            print(
                f"  {model.name}: decode {turn.decode:.2f}, prefill {turn.prefill:.1f} tokens/s, "
                f"load {turn.load:.1f} s",
                flush=True,
            )
    report(models, turns)
    if a.json:
        a.json.write_text(json.dumps([asdict(t) for t in turns], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
