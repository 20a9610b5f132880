"""A GPU for the tests of this folder, through the CUDA driver alone; without one they are skipped."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


class Gpu:
    """Device 0, its primary context current, one stream. Memory lives until `free_all`."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.device = self.call("cuDeviceGet", 0)
        self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self.device))
        self.stream = self.call("cuStreamCreate", 0)
        self._allocated: list[Any] = []

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver function, None where it has none."""
        code, *values = getattr(self.cuda, name)(*arguments)
        assert code == self.cuda.CUresult.CUDA_SUCCESS, f"{name}: {code!r}"
        return values[0] if values else None

    @property
    def arch(self) -> int:
        """The compute capability, 90 for 9.0."""
        attribute = self.cuda.CUdevice_attribute
        major = self.call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self.device)
        minor = self.call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self.device)
        return 10 * int(major) + int(minor)

    def filled(self, nbytes: int, byte: int = 255) -> int:
        """A pointer to so many bytes of one value; 255 makes NaNs."""
        pointer = self.call("cuMemAlloc", nbytes)
        self._allocated.append(pointer)
        self.call("cuMemsetD8", pointer, byte, nbytes)
        return int(pointer)

    def upload(self, array: np.ndarray) -> int:
        """A pointer to a copy of the array."""
        array = np.ascontiguousarray(array)
        pointer = self.filled(array.nbytes)
        self.call("cuMemcpyHtoD", pointer, array.ctypes.data, array.nbytes)
        return pointer

    def download(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What lies there once the stream is done."""
        self.call("cuStreamSynchronize", self.stream)
        array = np.empty(shape, dtype)
        self.call("cuMemcpyDtoH", array.ctypes.data, pointer, array.nbytes)
        return array

    def free_all(self) -> None:
        self.call("cuCtxSynchronize")
        while self._allocated:
            self.call("cuMemFree", self._allocated.pop())


@pytest.fixture(scope="session")
def gpu_device() -> Gpu:
    """Skips where there is no driver or no device."""
    cuda = pytest.importorskip("cuda.bindings.driver")
    try:
        code, *_ = cuda.cuInit(0)
    except RuntimeError as error:
        pytest.skip(f"no CUDA driver: {str(error).splitlines()[0]}")
    if code != cuda.CUresult.CUDA_SUCCESS:
        pytest.skip(f"no CUDA device: {code.name}")
    return Gpu(cuda)


@pytest.fixture
def gpu(gpu_device: Gpu) -> Iterator[Gpu]:
    """The device; what a test allocates is freed behind it."""
    yield gpu_device
    gpu_device.free_all()
