"""What an export takes, estimated from the checkpoint's header alone: memory and time of every stage.

    lengths = probe_lengths(checkpoint, request)
    for need in stage_needs(checkpoint, request, builds, copied, lengths): ...

Every figure rests on something measured (benchmarks/RESULTS.md), scaled by bytes and positions; `basis` says on what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_export.exporter.checkpoint.tensors import Checkpoint

if TYPE_CHECKING:
    from gptoss_export.exporter.planning.request import ExportRequest
    from gptoss_export.validators.floor import FloorDtype

MACHINE = "2 cores at 2.5 GHz, 0.5 GB/s disk"

_PROGRAM_BYTES = 600 << 20
"""This program with torch and ONNX Runtime loaded; 0.45 to 0.50 GiB were measured with the graph of 20b."""

_SESSION_BYTES = 512 << 20
_ACTIVATIONS = 24
"""Copies of a batch's hidden states that live at a time in a layer of the reference."""
_EXPERT_COPIES = 4
"""Of one expert's weights in float32, while it is decoded from MXFP4."""
_BLOCKS = 6
"""Blocks of logits that are held at a time: the reference's, the engine's and float64 slices of both."""

_COPY_RATE, _HASH_RATE = 0.32e9, 0.5e9
_GRAPH_SECONDS, _ENGINE_SECONDS, _SESSION_SECONDS, _TORCH_SECONDS = 12.0, 75.0, 3.0, 10.0
_OWN_RATE = 0.12e9
_DECODE_RATE = 55e6
_REFERENCE_RATE, _FLOOR_SLOWDOWN = 17e9, 4.0
_ENGINE_RATE, _BODIES_RATE, _LOGIT_SECONDS = 18e9, 0.2e9, 2e-7
_RUNS_QUICK, _RUNS_FULL = 4, 5
"""How often an engine sees a probe's positions, over all scenarios."""


@dataclass(frozen=True)
class Build:
    """A target to be built. own: bytes of weights that it writes. ram: bytes of its child process. kernels: whether it
    runs by ours.
    """

    target: str
    own: int
    ram: int
    kernels: bool


@dataclass(frozen=True)
class StageNeed:
    """One stage. memory: bytes beside pages of mapped files, which can be dropped; mapped: bytes of those. basis: what
    the estimate of the time rests on.
    """

    stage: str
    memory: int
    mapped: int
    seconds: float
    basis: str


def stage_needs(
    checkpoint: Checkpoint, request: ExportRequest, builds: Sequence[Build], copied: int, lengths: Sequence[int]
) -> tuple[StageNeed, ...]:
    """The stages of an export in order. copied: bytes of weights to be written, over all targets. lengths: of the
    probes; none of them without parity.
    """
    nbytes = checkpoint.nbytes
    placed = max(copied / _COPY_RATE, nbytes / _HASH_RATE)
    stages = [
        StageNeed("weights and graph", _PROGRAM_BYTES, nbytes, max(placed, _GRAPH_SECONDS), "bytes copied and hashed")
    ]
    for build in builds:
        engine = build.ram > 0
        seconds = (_ENGINE_SECONDS if engine else _SESSION_SECONDS) + build.own / _OWN_RATE
        basis = "kernels compiled, bytes of the engine written" if engine else "bytes of its own weights written"
        memory = _PROGRAM_BYTES + (build.ram or _SESSION_BYTES)
        stages.append(StageNeed(f"build {build.target}", memory, nbytes, seconds, basis))
    if not lengths:
        return tuple(stages)
    return (*stages, _reference(checkpoint, request, lengths), *_parities(checkpoint, request, lengths, builds))


def probe_lengths(checkpoint: Checkpoint, request: ExportRequest) -> tuple[int, ...]:
    """Tokens of every probe that parity will be measured on. Raises PromptError, TokenizerError."""
    from gptoss_export.validators.probes import default_lengths
    from gptoss_export.validators.prompts import read_prompts

    if request.parity == "off":
        return ()
    lengths = default_lengths(checkpoint.config, request.parity)
    if request.measure.prompts is not None:
        lengths += [len(probe.ids) for probe in read_prompts(request.measure.prompts, checkpoint)]
    return tuple(lengths)


def trace_bytes(checkpoint: Checkpoint, request: ExportRequest, lengths: Sequence[int]) -> int:
    """What the reference and the noise floors write of their states, at most: nothing if they are cached already."""
    from gptoss_export.validators.trace import TraceShape

    if not lengths:
        return 0
    config = checkpoint.config
    shape = TraceShape(tuple(lengths), config.num_layers, config.hidden_size, config.num_experts)
    return shape.nbytes("states") + shape.nbytes("routing") * len(floor_dtypes(request))


def floor_dtypes(request: ExportRequest) -> tuple[FloorDtype, ...]:
    """The types that the reference is run in once more."""
    from gptoss_export.exporter.measure import floors_of

    return () if request.parity == "off" else floors_of(request.parity, request.targets)


def _reference(checkpoint: Checkpoint, request: ExportRequest, lengths: Sequence[int]) -> StageNeed:
    from gptoss_export.validators.reference import SCORE_BYTES

    config, longest = checkpoint.config, max(lengths)
    scores = SCORE_BYTES * len(lengths) * config.num_heads * longest**2
    states = 4 * _ACTIVATIONS * len(lengths) * longest * config.hidden_size
    # A layer's dense weights as stored and in float32, and an expert while it is decoded.
    weights = 3 * _layer_bytes(checkpoint) + _EXPERT_COPIES * _expert_bytes(checkpoint)
    memory = _PROGRAM_BYTES + scores + states + weights
    once = checkpoint.nbytes / _DECODE_RATE + sum(lengths) * _active_bytes(checkpoint) / _REFERENCE_RATE
    floors = len(floor_dtypes(request))
    basis = f"weights decoded, {sum(lengths)} positions" + (f", {floors} more in 16 bits" if floors else "")
    seconds = _TORCH_SECONDS + once * (1 + _FLOOR_SLOWDOWN * floors)
    return StageNeed("reference", memory + _logits(checkpoint), checkpoint.nbytes, seconds, basis)


def _parities(
    checkpoint: Checkpoint, request: ExportRequest, lengths: Sequence[int], builds: Sequence[Build]
) -> list[StageNeed]:
    from gptoss_export.validators.reference import SCORE_BYTES

    config = checkpoint.config
    positions = sum(lengths) * (_RUNS_FULL if request.parity == "full" else _RUNS_QUICK)
    stages = []
    for build in builds:
        memory = _PROGRAM_BYTES + _SESSION_BYTES + 2 * _logits(checkpoint) + _layer_bytes(checkpoint)
        if not build.kernels:  # scores of a whole prompt, and experts decoded to float32
            memory += SCORE_BYTES * config.num_heads * max(lengths) ** 2
            memory += 2 * _EXPERT_COPIES * _expert_bytes(checkpoint)
        dense, experts = _dense_bytes(checkpoint), _active_bytes(checkpoint) - _dense_bytes(checkpoint)
        # The embedding is looked up, not read.
        engine = (dense - _embedding_bytes(checkpoint)) / _ENGINE_RATE
        engine += experts / (_ENGINE_RATE if build.kernels else _BODIES_RATE)
        seconds = _SESSION_SECONDS + positions * (engine + _LOGIT_SECONDS * config.vocab_size)
        how = "by kernels" if build.kernels else "by function bodies"
        basis = f"about {positions} positions {how}"
        stages.append(StageNeed(f"parity {build.target}", memory, 2 * checkpoint.nbytes, seconds, basis))
    return stages


def _logits(checkpoint: Checkpoint) -> int:
    from gptoss_export.validators.reference import BLOCK_POSITIONS

    return 4 * _BLOCKS * BLOCK_POSITIONS * checkpoint.config.vocab_size


def _layer_bytes(checkpoint: Checkpoint) -> int:
    """The largest layer's weights in bfloat16 without its experts."""
    sizes: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        if ref.name.startswith("model.layers.") and ".experts." not in ref.name:
            layer = ref.name.split(".")[2]
            sizes[layer] = sizes.get(layer, 0) + ref.nbytes
    return max(sizes.values(), default=0)


def _expert_bytes(checkpoint: Checkpoint) -> int:
    """One expert's two matrices in float32."""
    config = checkpoint.config
    return 4 * 3 * config.hidden_size * config.intermediate_size


def _active_bytes(checkpoint: Checkpoint) -> float:
    """Stored bytes that one position needs: all dense weights, and top_k of the experts."""
    dense = _dense_bytes(checkpoint)
    return dense + (checkpoint.nbytes - dense) * checkpoint.config.top_k / checkpoint.config.num_experts


def _dense_bytes(checkpoint: Checkpoint) -> int:
    return sum(ref.nbytes for ref in checkpoint.tensors.values() if ".experts." not in ref.name)


def _embedding_bytes(checkpoint: Checkpoint) -> int:
    return checkpoint.tensors["model.embed_tokens.weight"].nbytes
