"""The CUDA driver, as much of it as running an engine takes, every result checked.

    if (why := device_missing()) is None:
        device = Device()
        stream = device.stream()
        memory, staging = device.allocate(1 << 20), device.pin(1 << 20)
        stream.upload(memory.pointer, staging, 1 << 20)
        stream.synchronize()

Pointers are integers. Whatever fails is one line: OutOfMemoryError, or SessionError with the driver's own name for it.
Everything is freed by `close`, which may be called twice, and at the latest when it is collected.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.tensorrt.flavor import gpu_problem
from gptoss_export.exporter.errors import GptossExportError, OutOfMemoryError, SessionError, TargetUnavailableError

ALIGNMENT = 256
"""Bytes; what TensorRT wants of every address, and what the driver's allocations have."""


def device_missing() -> str | None:
    """Why this host cannot execute an engine, in a few words; None if it can. Takes milliseconds, raises nothing."""
    try:
        found = find_spec("cuda.bindings.driver")
    except ImportError:  # not even the package `cuda`
        found = None
    return "cuda-bindings is not installed" if found is None else gpu_problem()


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU. compute_capability: (major, minor). total_bytes: of its memory."""

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int


class Device:
    """The first GPU that CUDA shows to this process, by its primary context, which TensorRT uses as well.

    driver: the module cuda.bindings.driver, or what answers like it. Raises TargetUnavailableError where there is none.
    """

    def __init__(self, driver: Any = None) -> None:
        self._open = False
        if driver is None:
            if why := device_missing():
                raise TargetUnavailableError(
                    f"this host cannot execute an engine: {why}", "run it on a host with an NVIDIA GPU and its driver"
                )
            driver = import_module("cuda.bindings.driver")
        self.driver = driver
        self.call(driver.cuInit, 0)
        self._device = self.call(driver.cuDeviceGet, 0)
        self._context = self.call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._open = True
        self.activate()
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(self.call(driver.cuDeviceGetAttribute, which, self._device))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self.call(driver.cuDeviceGetName, 256, self._device).split(b"\0")[0].decode(errors="replace").strip()
        self.info = DeviceInfo(name, (major, minor), int(self.call(driver.cuMemGetInfo)[1]))

    def activate(self) -> None:
        """Makes the context that of the calling thread."""
        self.call(self.driver.cuCtxSetCurrent, self._context)

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        return int(self.call(self.driver.cuMemGetInfo)[0])

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Memory of the device, at least one byte, contents undefined. Raises OutOfMemoryError."""
        return DeviceMemory(self, nbytes)

    def pin(self, nbytes: int) -> PinnedMemory:
        """Page-locked memory of the host, which copies need to be asynchronous. Raises OutOfMemoryError."""
        return PinnedMemory(self, nbytes)

    def stream(self) -> Stream:
        """A stream that does not wait for stream 0."""
        return Stream(self)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a driver function answers: nothing, a value or a tuple. Raises OutOfMemoryError or SessionError."""
        result, *values = function(*arguments)
        if result != self.driver.CUresult.CUDA_SUCCESS:
            raise self._error(getattr(function, "__name__", "a call"), result)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def release(self, function: Callable[..., Any], handle: Any) -> None:
        """Frees something, from any thread. There is nothing to be done about a failure, so it is not looked at."""
        if self._open and not sys.is_finalizing():
            self.driver.cuCtxSetCurrent(self._context)
            function(handle)

    def close(self) -> None:
        """Lets go of the context; the driver frees what is left in it with its last user."""
        if self._open:
            self._open = False
            if not sys.is_finalizing():
                self.driver.cuDevicePrimaryCtxRelease(self._device)

    def __del__(self) -> None:
        self.close()

    def _error(self, function: str, result: Any) -> GptossExportError:
        _, name = self.driver.cuGetErrorName(result)
        text = name.decode() if isinstance(name, bytes) else str(result)
        if result == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return OutOfMemoryError(
                f"{function}: the GPU's memory, or what the host may pin, was not enough ({text})",
                "end other processes on the GPU, use a smaller batch or a shorter text",
            )
        return SessionError(
            f"CUDA: {function} failed with {text}", "run it again; if it stays, look into the driver's log (dmesg)"
        )


class DeviceMemory:
    """An allocation on the device."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self.pointer, self.nbytes = device, 0, max(nbytes, 1)
        self.pointer = int(device.call(device.driver.cuMemAlloc, self.nbytes))

    def close(self) -> None:
        if self.pointer:
            self._device.release(self._device.driver.cuMemFree, self.pointer)
            self.pointer = 0

    def __del__(self) -> None:
        self.close()


class PinnedMemory:
    """Page-locked memory. array: all of it, as bytes; not to be used after `close`."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self.pointer, self.nbytes = device, 0, max(nbytes, 1)
        self.pointer = int(device.call(device.driver.cuMemAllocHost, self.nbytes))
        # ctypes exports memory that it does not own, and numpy a view of that: no copy, and none to free.
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.pointer))

    def close(self) -> None:
        if self.pointer:
            self._device.release(self._device.driver.cuMemFreeHost, self.pointer)
            self.pointer = 0

    def __del__(self) -> None:
        self.close()


class Graph:
    """Work that was captured once and can be launched again as it was, addresses included."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self.handle = device, handle

    def close(self) -> None:
        if self.handle is not None:
            self._device.release(self._device.driver.cuGraphExecDestroy, self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.close()


class Stream:
    """Work in order. Everything but `synchronize` returns before it is done: host memory must stay until then."""

    def __init__(self, device: Device) -> None:
        self._device, self._driver = device, device.driver
        self._handle: Any = None
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._handle = device.call(self._driver.cuStreamCreate, int(flags))

    @property
    def handle(self) -> int:
        """For TensorRT."""
        return int(self._handle)

    def upload(self, target: int, source: PinnedMemory, nbytes: int) -> None:
        """The first bytes of pinned memory to the device."""
        self._device.call(self._driver.cuMemcpyHtoDAsync, target, source.pointer, nbytes, self._handle)

    def download(self, target: PinnedMemory, source: int, nbytes: int) -> None:
        """From the device to the first bytes of pinned memory."""
        self._device.call(self._driver.cuMemcpyDtoHAsync, target.pointer, source, nbytes, self._handle)

    def fill(self, target: int, byte: int, nbytes: int) -> None:
        self._device.call(self._driver.cuMemsetD8Async, target, byte, nbytes, self._handle)

    def synchronize(self) -> None:
        """Waits, and raises SessionError for whatever went wrong on the device since the last time."""
        self._device.call(self._driver.cuStreamSynchronize, self._handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` puts into this stream, as a graph; nothing of it runs. Raises SessionError or what `work` raises.

        Only the calls of this thread are held to the rules of a capture: others may go on allocating.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._device.call(self._driver.cuStreamBeginCapture, self._handle, mode)
        try:
            work()
        except BaseException:
            # Ends the capture whatever it answers, so that the stream is as before.
            _, graph = self._driver.cuStreamEndCapture(self._handle)
            self._destroy(graph)
            raise
        graph = self._device.call(self._driver.cuStreamEndCapture, self._handle)
        try:
            return Graph(self._device, self._device.call(self._driver.cuGraphInstantiate, graph, 0))
        finally:
            self._destroy(graph)

    def launch(self, graph: Graph) -> None:
        self._device.call(self._driver.cuGraphLaunch, graph.handle, self._handle)

    def close(self) -> None:
        if self._handle is not None:
            self._device.release(self._driver.cuStreamDestroy, self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def _destroy(self, graph: Any) -> None:
        if graph is not None and int(graph):
            self._device.release(self._driver.cuGraphDestroy, graph)
