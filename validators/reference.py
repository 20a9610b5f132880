"""What the model answers: transformers' GptOss in float32, with one layer in RAM at a time.

    reference = run_reference(open_checkpoint(folder), default_probes(checkpoint, "quick"))
    reference.logits(0, 0, 32)          # [32, vocab] float32, of the first probe's first 32 positions
    reference.trace.hidden(3, 0)        # [n, hidden] float32, what entered layer 3

In bfloat16 or float16 it is what `from_pretrained(dtype=...)` computes: no reference, but what rounding costs.

The mathematics is transformers' alone: its GptOssModel.forward runs once over all probes, its eager
attention and eager experts, its MXFP4 decoding and, for Hugging Face layouts, its reading of config.json.
What is ours is only where the numbers lie (`streamed_layers`) and hooks that write them down (`trace`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.open import read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import PromptError
from gptoss_export.exporter.progress import Progress, SilentProgress, format_bytes
from gptoss_export.validators.layer_hooks import watch_expert_parts, watch_ops, watch_router
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.streamed_layers import (
    Batch,
    Dtype,
    Loader,
    as_torch,
    pad,
    stream_layer,
    streamed_model,
    torch_dtype,
)
from gptoss_export.validators.trace import Extent, Peak, Trace, TraceShape, TraceWriter, disk_errors

if TYPE_CHECKING:
    import torch

SCORE_BYTES = 20
"""What eager attention holds of a pair of positions and a head: scores, mask, softmax and its copies."""

MOST_SCORE_BYTES = 6 << 30

BLOCK_POSITIONS = 64
BLOCKS_KEPT = 3
VOCABULARY_ROWS = 2048


class Reference:
    """One run over the probes: its trace, and its logits on demand.

    The trace is float32, exact whatever the dtype; of a run in 16 bits it is of routing alone. Logits are
    computed in dtype from its last states, in blocks of positions with the head read by slices of the
    vocabulary from its file, so that a head of 2.3 GB in float32 is never whole in RAM; the last few blocks are
    kept, because parity reads positions in order.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        config: ModelConfig,
        trace: Trace,
        lm_head: TensorRef,
        dtype: Dtype = "float32",
    ) -> None:
        self.probes = tuple(probes)
        self.config = config
        self.trace = trace
        self.dtype = dtype
        self.description = f"transformers {version('transformers')} GptOss, {dtype}, eager, one layer at a time"
        self._lm_head = lm_head
        self._blocks: OrderedDict[tuple[int, int], Logits] = OrderedDict()

    @property
    def vocab_size(self) -> int:
        return self._lm_head.shape[0]

    def logits(self, probe: int, start: int, stop: int) -> Logits:
        """Logits [stop - start, vocab] float32 of positions start to stop of the probe of that index.

        Row i says what follows the probe's first start + i + 1 tokens. Raises IndexError outside of the
        probe.
        """
        if not 0 <= start < stop <= len(self.probes[probe].ids):
            raise IndexError(f"positions {start} to {stop} of a probe of {len(self.probes[probe].ids)}")
        parts = []
        for block in range(start // BLOCK_POSITIONS, (stop - 1) // BLOCK_POSITIONS + 1):
            base = block * BLOCK_POSITIONS
            parts.append(self._block(probe, block)[max(start - base, 0) : stop - base])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def router_logits(self, layer: int, probe: int) -> NDArray[np.float32]:
        """Logits [n, E] float32 of the layer's router, memory-mapped; IndexError as in `Trace`."""
        return self.trace.router_logits(layer, probe)

    def _block(self, probe: int, block: int) -> Logits:
        key = (probe, block)
        if key not in self._blocks:
            while len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            base = block * BLOCK_POSITIONS
            self._blocks[key] = self._head(self.trace.final(probe)[base : base + BLOCK_POSITIONS])
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _head(self, hidden: NDArray[np.float32]) -> Logits:
        import torch

        kind = torch_dtype(self.dtype)
        x = as_torch(kind, hidden)
        out = np.empty((len(hidden), self.vocab_size), np.float32)
        with torch.inference_mode():
            for row in range(0, self.vocab_size, VOCABULARY_ROWS):
                # Mapped anew each time: pages of a map count as resident for as long as it lives.
                weight = as_torch(kind, read_tensor(self._lm_head)[row : row + VOCABULARY_ROWS])
                out[:, row : row + VOCABULARY_ROWS] = torch.nn.functional.linear(x, weight).float().numpy()
        return out


def trace_shape(config: ModelConfig, probes: Sequence[Probe]) -> TraceShape:
    """The sizes of what a run over these probes records."""
    lengths = tuple(len(probe.ids) for probe in probes)
    return TraceShape(lengths, config.num_layers, config.hidden_size, config.num_experts)


def trace_extent(dtype: Dtype) -> Extent:
    return "states" if dtype == "float32" else "routing"


def check_probes(probes: Sequence[Probe], config: ModelConfig) -> None:
    """Raises PromptError for probes that are none, empty, too long for eager attention, or of another vocabulary."""
    vocab_size = config.vocab_size
    if not probes or not all(probe.ids for probe in probes):
        raise PromptError("a probe without tokens cannot be run", "Give every probe at least one token.")
    for probe in probes:
        if not all(0 <= token < vocab_size for token in probe.ids):
            raise PromptError(
                f"probe {probe.name!r} has token ids outside of the vocabulary of {vocab_size}",
                "Use the tokenizer of this checkpoint.",
            )
    longest = max(len(probe.ids) for probe in probes)
    scores = SCORE_BYTES * len(probes) * config.num_heads * longest**2
    if scores > MOST_SCORE_BYTES:
        raise PromptError(
            f"attention over {len(probes)} probes of up to {longest} tokens would take {format_bytes(scores)} in the "
            f"reference, and {format_bytes(MOST_SCORE_BYTES)} is the most",
            "Give fewer prompts at a time, or shorter ones.",
        )


def run_reference(
    checkpoint: Checkpoint,
    probes: Sequence[Probe],
    *,
    dtype: Dtype = "float32",
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Reference:
    """Runs transformers' GptOss in `dtype` over all probes, as one batch padded on the right.

    The trace is written into `folder`, which is empty, or else into a temporary one that nothing is left of.
    Eager attention takes SCORE_BYTES * probes * heads * longest**2, which `default_probes` keeps small.
    Raises ConfigError when transformers refuses the config, PromptError for tokens that are none, or none of
    this vocabulary, DiskSpaceError or AccessError when the trace cannot be written.
    """
    check_probes(probes, checkpoint.config)
    if folder is not None:
        return _run(checkpoint, probes, dtype, folder, progress or SilentProgress())
    with disk_errors():
        temporary = TemporaryDirectory(prefix="gptoss-export-", ignore_cleanup_errors=True)
    with temporary as name:
        return _run(checkpoint, probes, dtype, Path(name), progress or SilentProgress())


def _run(checkpoint: Checkpoint, probes: Sequence[Probe], dtype: Dtype, folder: Path, progress: Progress) -> Reference:
    import torch

    load = Loader(checkpoint, dtype)
    model = streamed_model(checkpoint, load)
    table = read_tensor(checkpoint.tensors["model.embed_tokens.weight"])
    batch = pad([table[list(probe.ids)] for probe in probes], load.dtype)
    shape, extent = trace_shape(checkpoint.config, probes), trace_extent(dtype)
    label = "reference" if dtype == "float32" else f"noise floor {dtype}"
    with progress.task(label, total=len(model.layers)) as done, closing(TraceWriter(folder, shape, extent)) as writer:
        recorder = _Recorder(writer, batch)
        for index, layer in enumerate(model.layers):
            stream_layer(load, index, layer, partial(done.advance, 1))
            if extent == "routing":
                watch_router(layer, partial(recorder.see, index))
                continue
            watch_ops(layer, partial(recorder.see, index))
            watch_expert_parts(layer, partial(recorder.see_part, index))
        if extent == "states":
            entered = partial(recorder.see, len(model.layers), "hidden")
            model.norm.register_forward_pre_hook(lambda _m, args: entered(args[0]))
        with torch.inference_mode():
            output = model(inputs_embeds=batch.values, attention_mask=batch.mask, use_cache=False)
            writer.append("final", batch.rows(output.last_hidden_state).float().numpy())
        writer.finish(recorder.peaks())
        trace = Trace(folder, shape, extent)
    return Reference(probes, checkpoint.config, trace, checkpoint.tensors["lm_head.weight"], dtype)


class _Recorder:
    """Takes what the hooks see: rows of tokens, without padding, go to the writer, their extremes are kept."""

    def __init__(self, writer: TraceWriter, batch: Batch) -> None:
        self._writer, self._batch = writer, batch
        self._real = batch.mask.flatten().bool()
        self._peaks: dict[str, list[Peak]] = {}

    def see(self, layer: int, name: str, value: torch.Tensor) -> None:
        rows = self._batch.rows(value).float()
        self._writer.append("router_logits" if name == "router" else name, rows.numpy())
        self._note(layer, name, rows)

    def see_part(self, layer: int, name: str, value: torch.Tensor, rows: torch.Tensor) -> None:
        self._note(layer, name, value[self._real[rows]])

    def _note(self, layer: int, name: str, rows: torch.Tensor) -> None:
        peaks = self._peaks.setdefault(name, [])
        peaks.extend(Peak(0.0, 0) for _ in range(layer + 1 - len(peaks)))
        peaks[layer] = peaks[layer].merge(_peak(rows))

    def peaks(self) -> dict[str, tuple[Peak, ...]]:
        return {name: tuple(row) for name, row in self._peaks.items()}


def _peak(rows: torch.Tensor) -> Peak:
    if rows.numel() == 0:
        return Peak(0.0, 0)
    size = rows.abs()
    largest = float(size.max())
    if math.isfinite(largest):
        return Peak(largest, 0)
    finite = size[size.isfinite()]
    return Peak(float(finite.max()) if finite.numel() else 0.0, size.numel() - finite.numel())
