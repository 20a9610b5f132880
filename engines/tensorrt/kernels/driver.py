"""Launches the compiled kernels through the CUDA driver: no Triton, no torch, nothing but `cuda.bindings`.

    launcher = MoELauncher(KernelBundle.from_bytes(data))     # once, with a CUDA context current
    launcher.launch(tokens=1, x=..., ..., workspace=..., stream=...)

All kernels are loaded when the launcher is made, and a launch allocates and synchronises nothing, so CUDA graphs may
record it.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from gptoss_export.engines.tensorrt.kernels.bundle import INT32, CompiledKernel, KernelBundle
from gptoss_export.engines.tensorrt.kernels.launch import BUFFERS, Buffer, Launch, Workspace, max_tokens, plan
from gptoss_export.exporter.errors import (
    EngineMismatchError,
    OutOfMemoryError,
    SessionError,
    TargetUnavailableError,
)

_FREE_SHARED = 48 << 10
"""Bytes of dynamic shared memory that a kernel may have without asking."""

_ALIGNMENT = 16
_WARP = 32


class MoELauncher:
    """The kernels of one bundle on the current CUDA context's device."""

    def __init__(self, bundle: KernelBundle) -> None:
        """Raises TargetUnavailableError without a driver or context, EngineMismatchError where no cubin fits."""
        self._cuda = _driver()
        self._shape = bundle.shape
        self.arch = matching_arch(self._capability(), bundle.archs)
        compiled = {name: by_arch[self.arch] for name, by_arch in bundle.kernels.items()}
        self._compiled: Mapping[str, CompiledKernel] = compiled
        self._modules: list[Any] = []
        self._functions: dict[str, Any] = {}
        try:
            for name, kernel in compiled.items():
                self._functions[name] = self._load(kernel)
        except BaseException:
            self.close()
            raise
        # A generation meets few token counts, again and again.
        self._plan: Callable[[int], tuple[Launch, ...]] = lru_cache(maxsize=64)(lambda n: plan(bundle.shape, n))

    def launch(
        self,
        tokens: int,
        x: int,
        weights: int,
        experts: int,
        gate_up_blocks: int,
        gate_up_scales: int,
        gate_up_bias: int,
        down_blocks: int,
        down_scales: int,
        down_bias: int,
        y: int,
        workspace: int,
        stream: int,
    ) -> None:
        """Enqueues the experts of `tokens` tokens on the stream.

        Device pointers, aligned to 16 bytes, of the shapes and types in mxfp4_decode.py: x [T, H] of the bundle's
        dtype, weights [T, K] float32, experts [T, K] int32, blocks and scales as stored, bias bfloat16, y [T, H]
        float32, and at least `launch.workspace_bytes` of workspace. Raises ValueError for a pointer or a number of
        tokens that cannot be, SessionError where CUDA refuses.
        """
        values = (x, weights, experts, gate_up_blocks, gate_up_scales, gate_up_bias)
        pointers = dict(zip(BUFFERS, (*values, down_blocks, down_scales, down_bias, y), strict=True))
        for name, pointer in (*pointers.items(), ("workspace", workspace)):
            if pointer <= 0 or pointer % _ALIGNMENT:
                raise ValueError(f"{name} at {pointer:#x} is no device pointer aligned to {_ALIGNMENT} bytes")
        if not 0 <= tokens <= max_tokens(self._shape):
            raise ValueError(f"{tokens} tokens, at most {max_tokens(self._shape)}")
        if tokens == 0:
            return
        for launch in self._plan(tokens):
            kernel = self._compiled[launch.kernel]
            arguments = kernel_arguments(launch, kernel, pointers, workspace)
            block = (kernel.warps * _WARP, 1, 1)
            function = self._functions[launch.kernel]
            self._call("cuLaunchKernel", function, *launch.grid, *block, kernel.shared, stream, arguments, 0)

    def close(self) -> None:
        """Unloads the kernels; no launch may be under way."""
        self._functions.clear()
        while self._modules:
            self._call("cuModuleUnload", self._modules.pop())

    def _load(self, kernel: CompiledKernel) -> Any:
        # An eager load into this context: a library would load itself at the first launch, inside a graph's capture.
        (module,) = self._call("cuModuleLoadData", kernel.cubin)
        self._modules.append(module)
        (function,) = self._call("cuModuleGetFunction", module, kernel.symbol.encode())
        if kernel.shared > _FREE_SHARED:
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, kernel.shared)
        return function

    def _capability(self) -> tuple[int, int]:
        try:
            (device,) = self._call("cuCtxGetDevice")
        except SessionError as error:
            raise TargetUnavailableError(
                f"no CUDA context is current: {error.what}", "select a device first, as TensorRT's runtime does"
            ) from error
        attribute = self._cuda.CUdevice_attribute
        (major,) = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        (minor,) = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        return int(major), int(minor)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        code, *values = getattr(self._cuda, name)(*arguments)
        results = self._cuda.CUresult
        if code == results.CUDA_SUCCESS:
            return tuple(values)
        if code == results.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(
                f"the GPU's memory was not enough ({name})", "use a smaller batch, prompt or context"
            )
        raise SessionError(
            f"CUDA refused {name}: {getattr(code, 'name', code)}", "run `compute-sanitizer`, or build the engine again"
        )


def matching_arch(capability: tuple[int, int], archs: tuple[int, ...]) -> int:
    """The architecture whose cubins a device of this compute capability runs.

    Cubins run on later minor versions of their major one, except from 9.0 on, where Triton compiles for one exactly
    (sm_90a). Raises EngineMismatchError.
    """
    device = 10 * capability[0] + capability[1]
    fitting = [arch for arch in archs if arch == device or (device < 90 and arch // 10 == capability[0])]
    fitting = [arch for arch in fitting if arch <= device]
    if not fitting:
        held = ", ".join(str(arch / 10) for arch in archs)
        raise EngineMismatchError(
            f"this GPU has compute capability {device / 10}, the engine's kernels are for {held}",
            "build the engine for this GPU",
        )
    return max(fitting)


def kernel_arguments(
    launch: Launch, kernel: CompiledKernel, pointers: Mapping[str, int], workspace: int
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """(values, ctypes types) as cuLaunchKernel takes them, Triton's two null scratch pointers last."""
    values: list[int] = []
    for argument, kind in zip(launch.arguments, kernel.parameters, strict=True):
        match argument:
            case Buffer(name):
                value = pointers[name]
            case Workspace(offset):
                value = workspace + offset
            case _:
                value = argument
        if isinstance(argument, int) != (kind == INT32):
            raise ValueError(f"{launch.kernel}: {argument} is no {kind}")
        values.append(value)
    types = [ctypes.c_int32 if kind == INT32 else ctypes.c_void_p for kind in kernel.parameters]
    return (*values, 0, 0), (*types, ctypes.c_void_p, ctypes.c_void_p)


def _driver() -> Any:
    try:
        cuda: Any = importlib.import_module("cuda.bindings.driver")
        code, *_ = cuda.cuInit(0)
    except (ImportError, RuntimeError) as error:
        raise TargetUnavailableError(
            f"the CUDA driver cannot be used: {error}", "install NVIDIA's driver and pip install cuda-bindings"
        ) from error
    if code != cuda.CUresult.CUDA_SUCCESS:
        raise TargetUnavailableError(f"the CUDA driver finds no usable GPU: {code.name}", "run on a host with a GPU")
    return cuda
