"""One execution of the engine: its inputs packed and sent, the right profile run, its logits fetched.

One new column a row is the decode profile, in a context that belongs to the cache's slots and to how many are read.
TensorRT wants an execution context for every captured graph, and a plain execution of the same shapes before the
capture: so the first step of a size is plain, the second is captured and launched, and all later ones are launched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits
from gptoss_export.engines.tensorrt.cache import EngineCall, Limits, slots_for
from gptoss_export.engines.tensorrt.cuda import Device, DeviceMemory, Graph, Stream, aligned
from gptoss_export.engines.tensorrt.execution import DECODE, LOGITS, PAST, PREFILL, PRESENT, Context, LoadedEngine
from gptoss_export.engines.tensorrt.slots import Decoding, Slots
from gptoss_export.exporter.errors import GptossExportError

STAGING_BYTES = 8 << 20
"""Pinned memory for what an execution sends and receives; logits of more come in pieces."""

_ITEM = 8  # all inputs of a call are int64


class StepExecutor:
    """Executes calls one after the other. graphs_refused: why decoding goes without CUDA graphs, None if it does not.

    weights: device memory of the engine's external weights.
    """

    def __init__(
        self, engine: LoadedEngine, device: Device, stream: Stream, limits: Limits, weights: Mapping[str, DeviceMemory]
    ) -> None:
        self._engine, self._stream, self._weights = engine, stream, weights
        self._vocab_size = engine.interface.vocab_size
        self._inputs = device.allocate(_input_bytes(limits))
        self._logits = device.allocate(_logit_bytes(limits, self._vocab_size))
        self._scratch = device.allocate(engine.scratch_bytes)
        self._staging = device.pin(max(STAGING_BYTES, self._inputs.nbytes, 4 * self._vocab_size))
        self._prefill: Context | None = None
        self.graphs_refused: str | None = None

    def execute(self, call: EngineCall, slots: Slots) -> Logits:
        """Runs the call on the slots that hold the columns before it. Raises SessionError.

        Returns logits [R, V] float32, none of them if nobody asked for any.
        """
        rows, new = call.input_ids.shape
        decode = new == 1
        # Nobody asked for the logits of a chunk's only column: they are made all the same, so that shapes stay.
        logit_rows = np.arange(rows, dtype=np.int64) if decode else call.logit_rows
        arrays = {
            "input_ids": call.input_ids,
            "query_positions": call.query_positions,
            "key_positions": call.key_positions,
            "write_index": call.write_index,
            "logit_rows": logit_rows,
        }
        pointers = self._send(arrays)
        if decode:
            self._decode(call.capacity, arrays, pointers, slots)
        else:
            if self._prefill is None:
                self._prefill = self._context(PREFILL)
            self._bind(self._prefill, arrays, pointers, slots)
            self._prefill.enqueue(self._stream)
        logits = self._fetch(len(logit_rows) if call.kept else 0)
        self._stream.synchronize()  # the staging memory is written again by the next call
        return logits

    def close(self) -> None:
        self._prefill = None
        for memory in (self._inputs, self._logits, self._scratch, self._staging):
            memory.close()

    def _send(self, arrays: Mapping[str, NDArray[np.int64]]) -> dict[str, int]:
        """Copies the arrays in one piece; where each lies depends on the shapes alone, which graphs rely on."""
        pointers, at = {}, 0
        for name, array in arrays.items():
            self._staging.array[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
            pointers[name] = self._inputs.pointer + at
            at += aligned(array.nbytes)
        self._stream.upload(self._inputs.pointer, self._staging, at)
        return pointers

    def _decode(
        self, read: int, arrays: Mapping[str, NDArray[np.int64]], pointers: Mapping[str, int], slots: Slots
    ) -> None:
        decoding = slots.decoding.get(read)
        if decoding is None:
            decoding = slots.decoding[read] = Decoding(self._context(DECODE))
            self._bind(decoding.context, arrays, pointers, slots)
        elif decoding.graph is None:
            decoding.graph = self._capture(decoding.context)
        if decoding.graph is not None:
            self._stream.launch(decoding.graph)
        else:
            decoding.context.enqueue(self._stream)

    def _capture(self, context: Context) -> Graph | None:
        """A decode step as a graph; None where that was refused, or TensorRT says that it is not ready."""
        if self.graphs_refused is not None or not context.can_capture(self._stream):
            return None
        try:
            return self._stream.capture(lambda: context.enqueue(self._stream))
        except GptossExportError as error:
            self.graphs_refused = error.what
            return None

    def _bind(
        self,
        context: Context,
        arrays: Mapping[str, NDArray[np.int64]],
        pointers: Mapping[str, int],
        slots: Slots,
    ) -> None:
        for name, array in arrays.items():
            context.bind(name, pointers[name], array.shape)
        interface = self._engine.interface
        shape = (slots.rows, interface.kv_heads, interface.slots, interface.head_dim)
        for index, name in enumerate(interface.cache_names):
            # One memory for both: the engine writes the new columns into the slots that it reads.
            context.bind(name, slots.pointer(index), shape)
            context.bind(name.replace(PAST, PRESENT), slots.pointer(index))

    def _context(self, profile: int) -> Context:
        context = self._engine.context(profile, self._stream, self._scratch)
        for name, memory in self._weights.items():
            context.bind(name, memory.pointer)
        context.bind(LOGITS, self._logits.pointer)
        return context

    def _fetch(self, rows: int) -> Logits:
        """Logits [rows, V]: from the device by way of pinned memory, as many rows at a time as that holds."""
        logits = np.empty((rows, self._vocab_size), np.float32)
        row_bytes = 4 * self._vocab_size
        at_once = self._staging.nbytes // row_bytes
        for begin in range(0, rows, at_once):
            part = logits[begin : begin + at_once]
            self._stream.download(self._staging, self._logits.pointer + begin * row_bytes, part.nbytes)
            self._stream.synchronize()
            part[:] = self._staging.array[: part.nbytes].view(np.float32).reshape(part.shape)
        return logits


def working_bytes(engine: LoadedEngine, limits: Limits) -> int:
    """Device memory that an executor takes beside weights and caches."""
    return engine.scratch_bytes + _input_bytes(limits) + _logit_bytes(limits, engine.interface.vocab_size)


def _input_bytes(limits: Limits) -> int:
    rows = limits.max_batch
    counts = (rows * limits.max_prompt, rows * limits.max_prompt, rows * slots_for(limits.max_context), rows)
    return sum(aligned(_ITEM * count) for count in (*counts, limits.max_logits))


def _logit_bytes(limits: Limits, vocab_size: int) -> int:
    return 4 * limits.max_logits * vocab_size
