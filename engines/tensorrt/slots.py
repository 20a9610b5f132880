"""Device memory for caches, used again and again.

A cache lies in one `Slots`, which also has the contexts and CUDA graphs that decode on those addresses. When a cache is
dropped, its slots wait for the next one, so a graph is captured once for a size and not once for a text.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from gptoss_export.engines.tensorrt.cuda import Device, DeviceMemory, Graph, Stream, aligned
from gptoss_export.engines.tensorrt.execution import Context, Interface
from gptoss_export.exporter.errors import OutOfMemoryError

MAX_IDLE = 2
"""Slots that wait for a cache."""


@dataclass
class Decoding:
    """What decodes with so many slots to read. graph: None until a step was run plainly, for which see `steps`."""

    context: Context
    graph: Graph | None = None


@dataclass(eq=False)
class Slots:
    """Keys and values [rows, kv_heads, C, D] of each layer in turn, in one allocation, `stride` bytes apart.

    decoding: by the number of slots that are read.
    """

    rows: int
    stride: int
    memory: DeviceMemory
    decoding: dict[int, Decoding] = field(default_factory=dict)

    def pointer(self, index: int) -> int:
        """Of the tensor of that index in Interface.cache_names."""
        return self.memory.pointer + index * self.stride

    def close(self) -> None:
        for decoding in self.decoding.values():
            if decoding.graph is not None:
                decoding.graph.close()
        self.decoding.clear()
        self.memory.close()


class SlotPool:
    """Makes `Slots` and takes them back."""

    def __init__(self, device: Device, stream: Stream, interface: Interface) -> None:
        self._device, self._stream, self._interface = device, stream, interface
        self._idle: list[Slots] = []
        self._all: weakref.WeakSet[Slots] = weakref.WeakSet()

    def acquire(self, rows: int) -> Slots:
        """Slots that hold zeros: the sink's key and value are that, and a masked NaN would still be one.

        Raises OutOfMemoryError.
        """
        slots = self._take(rows) or self._make(rows)
        self._stream.fill(slots.memory.pointer, 0, slots.memory.nbytes)
        return slots

    def release(self, slots: Slots) -> None:
        """Takes slots back, whose cache is no longer needed."""
        if slots in self._all:
            self._idle.append(slots)
            if len(self._idle) > MAX_IDLE:
                self._discard(self._idle.pop(0))

    def nbytes(self, rows: int) -> int:
        """Device memory of such slots."""
        return len(self._interface.cache_names) * self._stride(rows)

    def close(self) -> None:
        """Frees all slots, those of living caches too."""
        self._idle.clear()
        for slots in list(self._all):
            self._discard(slots)

    def _take(self, rows: int) -> Slots | None:
        # The last ones first, so that those that nobody asks for come to the front and are dropped.
        for index in reversed(range(len(self._idle))):
            if self._idle[index].rows == rows:
                return self._idle.pop(index)
        return None

    def _make(self, rows: int) -> Slots:
        nbytes = self.nbytes(rows)
        try:
            memory = self._device.allocate(nbytes)
        except OutOfMemoryError:
            while self._idle:
                self._discard(self._idle.pop())
            memory = self._device.allocate(nbytes)
        slots = Slots(rows, self._stride(rows), memory)
        self._all.add(slots)
        return slots

    def _discard(self, slots: Slots) -> None:
        self._all.discard(slots)
        slots.close()

    def _stride(self, rows: int) -> int:
        shape = self._interface
        return aligned(rows * shape.kv_heads * shape.slots * shape.head_dim * shape.item_bytes)
