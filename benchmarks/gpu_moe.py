"""The MoE kernels at 20b's shape on the GPU of this machine: time, bytes of weights and the fraction of its memory.

    python benchmarks/gpu_moe.py --dtype fp16

One layer: hidden and intermediate 2880, 32 experts (423 MB, more than any level-2 cache), 4 a token. A repetition is
eight calls; for one token they take all 32 experts in turn, so that weights come from memory and not from a cache (with
a few tokens some do). The calls are recorded in a CUDA graph, as a runner would. Bandwidth is that of a device to
device copy in the same process, bytes read and written. MB are the weights of the experts that are chosen, each once:
the least that any kernel must read.
"""

from __future__ import annotations

import argparse
from typing import Any

import cuda.bindings.driver as cuda
import numpy as np
from measure import machine

from gptoss_export.engines.tensorrt.kernels.aot import compile_bundle
from gptoss_export.engines.tensorrt.kernels.driver import MoELauncher
from gptoss_export.engines.tensorrt.kernels.launch import DTYPE_BYTES, MoEShape, plan, workspace_bytes

EXPERTS, SIZE, TOP_K = 32, 2880, 4
TOKENS = (1, 2, 4, 8, 9, 16, 32, 64, 128, 256, 512, 1024, 2048)
CALLS = 8
REPETITIONS = 30
COPY_BYTES = 1 << 30


def call(name: str, *arguments: Any) -> Any:
    code, *values = getattr(cuda, name)(*arguments)
    if code != cuda.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"{name}: {code!r}")
    return values[0] if values else None


def upload(array: np.ndarray) -> int:
    array = np.ascontiguousarray(array)
    pointer = call("cuMemAlloc", array.nbytes)
    call("cuMemcpyHtoD", pointer, array.ctypes.data, array.nbytes)
    return int(pointer)


def seconds(stream: Any, work: Any) -> float:
    """Median of REPETITIONS after three to warm up."""
    begin, end = call("cuEventCreate", 0), call("cuEventCreate", 0)
    times = []
    for _ in range(REPETITIONS + 3):
        call("cuEventRecord", begin, stream)
        work()
        call("cuEventRecord", end, stream)
        call("cuEventSynchronize", end)
        times.append(call("cuEventElapsedTime", begin, end) / 1e3)
    return float(np.median(times[3:]))


def copy_bandwidth(stream: Any) -> float:
    """Bytes read and written per second."""
    source, target = call("cuMemAlloc", COPY_BYTES), call("cuMemAlloc", COPY_BYTES)
    took = seconds(stream, lambda: call("cuMemcpyDtoDAsync", target, source, COPY_BYTES, stream))
    call("cuMemFree", source)
    call("cuMemFree", target)
    return 2 * COPY_BYTES / took


def layer(rng: np.random.Generator) -> dict[str, int]:
    """Pointers to one layer's experts: random codes, scales and biases of a usual size."""
    pointers = {}
    for name, rows in (("gate_up", 2 * SIZE), ("down", SIZE)):
        blocks = rng.integers(0, 256, (EXPERTS, rows, SIZE // 32, 16), dtype=np.uint8)
        pointers[f"{name}_blocks"] = upload(blocks)
        pointers[f"{name}_scales"] = upload(np.full((EXPERTS, rows, SIZE // 32), 120, np.uint8))
        pointers[f"{name}_bias"] = upload(np.zeros((EXPERTS, rows), np.uint16))
    return pointers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="fp16")
    dtype = parser.parse_args().dtype
    try:
        call("cuInit", 0)
    except RuntimeError as error:
        raise SystemExit(f"no CUDA driver: {error}") from error
    device = call("cuDeviceGet", 0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device))
    stream = call("cuStreamCreate", 0)
    attribute = cuda.CUdevice_attribute
    major = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    gpu = call("cuDeviceGetName", 256, device).split(b"\0")[0].decode()

    shape = MoEShape(EXPERTS, SIZE, SIZE, TOP_K, dtype, 1.702, 7.0)
    launcher = MoELauncher(compile_bundle(shape, (10 * major + minor,)))
    rng = np.random.default_rng(0)
    weights_of_layer = layer(rng)
    expert_bytes = 3 * SIZE * (SIZE // 2 + SIZE // 32 + 2)
    bandwidth = copy_bandwidth(stream)
    print(f"{machine()}; {gpu}, compute capability {major}.{minor}; {dtype}; copy {bandwidth / 1e12:.2f} TB/s")
    print("| tokens | kernels | us a layer | experts | MB | TB/s | of copy | TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in TOKENS:
        if tokens * TOP_K * CALLS <= EXPERTS:
            experts = rng.permutation(EXPERTS)[: CALLS * tokens * TOP_K].reshape(CALLS, tokens, TOP_K)
        else:
            experts = np.argsort(rng.random((CALLS, tokens, EXPERTS)), axis=-1)[..., :TOP_K]
        chosen = [upload(e.astype(np.int32)) for e in experts]
        x = rng.standard_normal((tokens, SIZE)).astype(np.float32)
        stored = x if dtype == "fp32" else x.astype(np.float16) if dtype == "fp16" else bf16_bits(x)
        pointers = weights_of_layer | {
            "x": upload(stored),
            "weights": upload(np.full((tokens, TOP_K), 0.25, np.float32)),
            "y": int(call("cuMemAlloc", tokens * SIZE * 4)),
            "workspace": int(call("cuMemAlloc", workspace_bytes(shape, tokens))),
        }
        call("cuStreamBeginCapture", stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        for experts_of_call in chosen:
            launcher.launch(tokens, **pointers, experts=experts_of_call, stream=int(stream))
        graph = call("cuGraphInstantiate", call("cuStreamEndCapture", stream), 0)
        took = seconds(stream, lambda graph=graph: call("cuGraphLaunch", graph, stream)) / CALLS
        distinct = float(np.mean([len(np.unique(e)) for e in experts]))
        nbytes, flops = distinct * expert_bytes, 2 * tokens * TOP_K * 3 * SIZE * SIZE
        kernels = " ".join(launch.kernel for launch in plan(shape, tokens))
        print(
            f"| {tokens} | {kernels} | {took * 1e6:.1f} | {distinct:.1f} | {nbytes / 1e6:.1f} "
            f"| {nbytes / took / 1e12:.2f} | {nbytes / took / bandwidth:.2f} | {flops / took / 1e12:.1f} |",
            flush=True,
        )
        for pointer in (*chosen, *(pointers[name] for name in ("x", "weights", "y", "workspace"))):
            call("cuMemFree", pointer)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32: bfloat16 cut off, good enough to take time with."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
