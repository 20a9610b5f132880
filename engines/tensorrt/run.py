"""Runs an engine on a GPU: `engines.runner.Runner` for the TensorRT targets.

    with open_trt_runner(folder) as runner:
        step = runner.forward(ids)

Caches and weights stay on the device; a call copies a few numbers there and the logits back. One new column a row is
the decode profile, on a CUDA graph from the second step of a size on; everything longer is the prefill profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gptoss_export.engines.ort.session import check_call, foreign_cache
from gptoss_export.engines.runner import KVCache, Step, Tokens
from gptoss_export.engines.tensorrt.cache import SlotState, plan_call, run_calls
from gptoss_export.engines.tensorrt.cuda import Device, DeviceMemory, Stream
from gptoss_export.engines.tensorrt.execution import LoadedEngine, load_engine
from gptoss_export.engines.tensorrt.metadata import EngineMetadata, read_metadata
from gptoss_export.engines.tensorrt.preflight import check_device, check_files, check_memory, load_package, stored_bytes
from gptoss_export.engines.tensorrt.slots import SlotPool, Slots
from gptoss_export.engines.tensorrt.steps import StepExecutor, working_bytes
from gptoss_export.engines.tensorrt.upload import upload_weights
from gptoss_export.exporter.errors import SessionError


def open_trt_runner(folder: Path, threads: int | None = None, *, cuda_graphs: bool = True) -> TensorRTRunner:
    """The runner of the engine in `folder`.

    threads: taken because every target's runner takes it; the host does no arithmetic. cuda_graphs: False executes
    every decode step plainly, which is slower and gives the same.

    Raises TargetUnavailableError where there is no device or package, EngineMismatchError where the engine is not for
    them, IntegrityError, ManifestError, OutOfMemoryError.
    """
    metadata, device = read_metadata(folder), Device()
    trt = load_package(metadata)
    check_device(metadata, device.info)
    check_files(folder, metadata)
    check_memory(stored_bytes(metadata, folder), device)
    return TensorRTRunner(trt, folder, metadata, device, cuda_graphs=cuda_graphs)


class DeviceCache:
    """The columns in some `Slots`. Continued in place, so once: `slots` is None when its successor has them."""

    def __init__(self, pool: SlotPool, state: SlotState, slots: Slots) -> None:
        self.pool, self.state = pool, state
        self.slots: Slots | None = slots

    @property
    def length(self) -> int:
        return self.state.length

    def __del__(self) -> None:
        if self.slots is not None:
            self.pool.release(self.slots)


@dataclass(frozen=True)
class _Parts:
    """What an open runner holds, on the device for the most part."""

    engine: LoadedEngine
    stream: Stream
    pool: SlotPool
    weights: Mapping[str, DeviceMemory]
    executor: StepExecutor


class TensorRTRunner:
    """See `engines.runner.Runner`. For one thread at a time; `close` frees the device memory."""

    def __init__(
        self, trt: Any, folder: Path, metadata: EngineMetadata, device: Device, *, cuda_graphs: bool = True
    ) -> None:
        self._parts: _Parts | None = None
        engine = load_engine(trt, folder, metadata)
        self._device, self._limits, self._vocab_size = device, metadata.limits, engine.interface.vocab_size
        stream = device.stream()
        pool = SlotPool(device, stream, engine.interface)
        check_memory(metadata.input_bytes + working_bytes(engine, self._limits) + pool.nbytes(1), device)
        weights = upload_weights(folder, metadata, device)
        executor = StepExecutor(engine, device, stream, self._limits, weights)
        if not cuda_graphs:
            executor.graphs_refused = "not wanted"
        self._parts = _Parts(engine, stream, pool, weights, executor)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def graphs_refused(self) -> str | None:
        """Why decoding goes without CUDA graphs; None if it does not."""
        return self._open().executor.graphs_refused

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tokens | None = None,
        cache: KVCache | None = None,
        keep: int = 1,
    ) -> Step:
        """See `engines.runner.Runner`.

        Raises PromptError for ids, masks or caches that do not fit, or more than the engine was built for;
        OutOfMemoryError, SessionError.
        """
        parts = self._open()
        pool = parts.pool
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        check_call(input_ids, mask, keep, self.vocab_size)
        state, slots = SlotState.empty(len(input_ids)), None
        if cache is not None:
            if not isinstance(cache, DeviceCache) or cache.pool is not pool or cache.slots is None:
                raise foreign_cache()
            state, slots = cache.state, cache.slots
            if state.rows != len(input_ids):
                raise foreign_cache()
        calls = plan_call(state, input_ids, mask, keep, self._limits)
        self._device.activate()
        if slots is None:
            slots = pool.acquire(state.rows)
        if isinstance(cache, DeviceCache):
            cache.slots = None
        step = DeviceCache(pool, calls[-1].state, slots)
        return Step(run_calls(calls, lambda call: parts.executor.execute(call, slots)), step)

    def close(self) -> None:
        """Frees everything; caches of this runner are of no use after it."""
        parts, self._parts = self._parts, None
        if parts is not None:
            # Contexts before the engine, and the engine before what it runs on.
            parts.pool.close()
            parts.executor.close()
            parts.engine.close()
            for memory in parts.weights.values():
                memory.close()
            parts.stream.close()
            self._device.close()

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _open(self) -> _Parts:
        if self._parts is None:
            raise SessionError("the runner was closed", "open the artifact again")
        return self._parts
