"""The plan of the MoE kernels, and what the launcher hands to the CUDA driver: with a driver that only writes down."""

import ctypes
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_export.engines.tensorrt.kernels import driver
from gptoss_export.engines.tensorrt.kernels.bundle import CompiledKernel, KernelBundle, parameter_kinds
from gptoss_export.engines.tensorrt.kernels.launch import (
    BUFFERS,
    DECODE_TOKENS,
    Buffer,
    Launch,
    MoEShape,
    Workspace,
    kernel_specs,
    max_tokens,
    plan,
    workspace_bytes,
)
from gptoss_export.exporter.errors import (
    EngineMismatchError,
    OutOfMemoryError,
    SessionError,
    TargetUnavailableError,
)

SHAPE = MoEShape(32, 2880, 2880, 4, "fp16", 1.702, 7.0)
ODD = MoEShape(5, 96, 160, 3, "fp32", 1.702, 7.0)
TOKENS = [1, 2, DECODE_TOKENS, DECODE_TOKENS + 1, 63, 512]
SHARED = 100 << 10


def ends(launch: Launch, shape: MoEShape, tokens: int) -> dict[int, int]:
    """Where each region of the workspace that a launch names ends."""
    assignments = tokens * shape.top_k
    sizes = {
        "a": assignments * shape.intermediate * (4 if shape.dtype == "fp32" else 2),
        "parts": assignments * shape.hidden * 4,
        "counts": shape.experts * 4,
        "lists": shape.experts * tokens * 4,
    }
    parameters = kernel_specs(shape)[launch.kernel].parameters
    return {
        argument.offset: argument.offset + sizes[name]
        for argument, (name, _) in zip(launch.arguments, parameters, strict=True)
        if isinstance(argument, Workspace)
    }


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["20b", "odd"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_arguments_are_the_kernels_parameters(shape: MoEShape, tokens: int) -> None:
    """Same number, same kinds, and a buffer goes where its name says."""
    for launch in plan(shape, tokens):
        spec = kernel_specs(shape)[launch.kernel]
        for argument, (name, kind) in zip(launch.arguments, spec.parameters, strict=True):
            assert isinstance(argument, int) == (kind == "i32")
            if isinstance(argument, Buffer):
                projection = "gate_up_" if "gate_up" in launch.kernel else "down_"
                assert argument.name == (projection + name if name in ("blocks", "scales", "bias") else name)
        assert all(0 < size <= limit for size, limit in zip(launch.grid, (2**31 - 1, 65535, 65535), strict=True))


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["20b", "odd"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_regions_of_the_workspace_do_not_meet(shape: MoEShape, tokens: int) -> None:
    regions: dict[int, int] = {}
    for launch in plan(shape, tokens):
        regions |= ends(launch, shape, tokens)
    assert all(offset % 256 == 0 for offset in regions)
    offsets = [*sorted(regions), workspace_bytes(shape, tokens)]
    assert all(regions[offset] <= following for offset, following in pairwise(offsets))


def test_the_workspace_never_shrinks() -> None:
    """TensorRT asks once, for the largest profile."""
    sizes = [workspace_bytes(SHAPE, tokens) for tokens in range(1, 70)]
    assert sizes == sorted(sizes)


def test_every_row_and_tile_has_a_program() -> None:
    for shape in (SHAPE, ODD):
        for tokens in TOKENS:
            launches = {launch.kernel: launch for launch in plan(shape, tokens)}
            for name, launch in launches.items():
                sizes = dict(kernel_specs(shape)[name].constants)
                rows = {"gate_up": 2 * shape.intermediate, "down": shape.hidden}
                if name.startswith("decode"):
                    assert launch.grid[1] * sizes["ROWS"] == rows[name.removeprefix("decode_")]
                if name.startswith("prefill"):
                    assert launch.grid[0] * sizes["ROWS"] >= rows[name.split("_", 1)[1].rsplit("_", 1)[0]]
                    hit = min(shape.experts, tokens * shape.top_k)
                    worst = hit - 1 + -(-(tokens * shape.top_k - hit + 1) // sizes["TILE"])
                    assert launch.grid[1] >= worst


def test_grids_say_nothing_of_routing() -> None:
    assert plan(SHAPE, 100) == plan(SHAPE, 100)
    assert [launch.kernel for launch in plan(SHAPE, 1)] == ["decode_gate_up", "decode_down"]
    assert plan(SHAPE, 512)[1].kernel == "prefill_gate_up_large"
    assert plan(SHAPE, 32)[1].kernel == "prefill_gate_up_small"


@pytest.mark.parametrize("tokens", [0, -1, max_tokens(SHAPE) + 1])
def test_impossible_token_counts(tokens: int) -> None:
    with pytest.raises(ValueError, match="tokens"):
        plan(SHAPE, tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 100},
        {"intermediate": 0},
        {"experts": True},
        {"top_k": 33},
        {"dtype": "int8"},
        {"swiglu_limit": float("nan")},
        {"swiglu_alpha": 2},
        {"hidden": 1 << 20},
    ],
)
def test_shapes_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"hidden|intermediate|experts|top_k|dtype|swiglu"):
        MoEShape(**(SHAPE.__dict__ | change))


class FakeDriver:
    """The part of cuda.bindings.driver that is used; writes down calls, and fails where it is told to."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_OUT_OF_MEMORY=2)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self.failures:
                return (self.failures[name],)
            if name == "cuDeviceGetAttribute":
                return 0, self.capability[arguments[0] - 75]
            results = {"cuCtxGetDevice": 0, "cuModuleLoadData": f"module {len(self.calls)}"}
            if name == "cuModuleGetFunction":
                return 0, f"{arguments[1].decode()} of {arguments[0]}"
            return (0, results[name]) if name in results else (0,)

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def bundle(shape: MoEShape, archs: tuple[int, ...] = (80, 90)) -> KernelBundle:
    kernels = {
        name: {
            arch: CompiledKernel(
                spec.function,
                spec.warps,
                SHARED if "large" in name else 512,
                parameter_kinds(spec),
                b"\x7fELF%d" % arch,
            )
            for arch in archs
        }
        for name, spec in kernel_specs(shape).items()
    }
    return KernelBundle(shape, "3.9.0", archs, kernels)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    cuda = FakeDriver()
    monkeypatch.setattr(driver, "_driver", lambda: cuda)
    return cuda


POINTERS = {name: 0x10000 * (place + 1) for place, name in enumerate(BUFFERS)}
WORKSPACE = 0x7F0000000000


def test_everything_is_loaded_before_the_first_launch(fake: FakeDriver) -> None:
    launcher = driver.MoELauncher(bundle(SHAPE))
    assert launcher.arch == 90
    assert len(fake.named("cuModuleLoadData")) == len(kernel_specs(SHAPE))
    assert {cubin for (cubin,) in fake.named("cuModuleLoadData")} == {b"\x7fELF90"}
    # Only what needs more than 48 KiB asks for it.
    assert [call[1:] for call in fake.named("cuFuncSetAttribute")] == [(8, SHARED)] * 2
    fake.calls.clear()
    launcher.launch(1, **POINTERS, workspace=WORKSPACE, stream=77)
    launcher.launch(512, **POINTERS, workspace=WORKSPACE, stream=77)
    assert {call[0] for call in fake.calls} == {"cuLaunchKernel"}


@pytest.mark.parametrize("tokens", [1, 40, 512])
def test_launches_are_packed_as_cuda_takes_them(tokens: int, fake: FakeDriver) -> None:
    launcher = driver.MoELauncher(bundle(SHAPE))
    launcher.launch(tokens, **POINTERS, workspace=WORKSPACE, stream=77)
    calls = fake.named("cuLaunchKernel")
    specs = kernel_specs(SHAPE)
    for call, launch in zip(calls, plan(SHAPE, tokens), strict=True):
        function, grid, block, shared, stream, (values, types), extra = (
            call[0],
            call[1:4],
            call[4:7],
            *call[7:],
        )
        spec = specs[launch.kernel]
        assert function.startswith(spec.function)
        assert grid == launch.grid
        assert block == (32 * spec.warps, 1, 1)
        assert shared == (SHARED if "large" in launch.kernel else 512)
        assert (stream, extra) == (77, 0)
        expected = [
            POINTERS[a.name] if isinstance(a, Buffer) else WORKSPACE + a.offset if isinstance(a, Workspace) else tokens
            for a in launch.arguments
        ]
        assert values == (*expected, 0, 0)
        kinds = [ctypes.c_void_p if kind.startswith("*") else ctypes.c_int32 for _, kind in spec.parameters]
        assert types == (*kinds, ctypes.c_void_p, ctypes.c_void_p)


def test_no_token_is_no_launch(fake: FakeDriver) -> None:
    launcher = driver.MoELauncher(bundle(SHAPE))
    launcher.launch(0, **POINTERS, workspace=WORKSPACE, stream=0)
    assert not fake.named("cuLaunchKernel")


@pytest.mark.parametrize("name", [*BUFFERS, "workspace"])
@pytest.mark.parametrize("pointer", [0, 0x10008])
def test_pointers_that_cannot_be(name: str, pointer: int, fake: FakeDriver) -> None:
    launcher = driver.MoELauncher(bundle(SHAPE))
    with pytest.raises(ValueError, match=name):
        launcher.launch(1, **(POINTERS | {"workspace": WORKSPACE, name: pointer}), stream=0)
    assert not fake.named("cuLaunchKernel")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 0), 120)],
)
def test_architectures_that_run(capability: tuple[int, int], arch: int) -> None:
    assert driver.matching_arch(capability, (80, 89, 90, 100, 120)) == arch


@pytest.mark.parametrize("capability", [(7, 5), (10, 3), (12, 1), (11, 0)])
def test_architectures_that_do_not(capability: tuple[int, int]) -> None:
    with pytest.raises(EngineMismatchError, match=r"this GPU has compute capability .* for 8\.0, "):
        driver.matching_arch(capability, (80, 89, 90, 100, 120))


def test_what_cuda_refuses_is_named(fake: FakeDriver) -> None:
    fake.failures = {"cuCtxGetDevice": 201}
    with pytest.raises(TargetUnavailableError, match="no CUDA context"):
        driver.MoELauncher(bundle(SHAPE))
    fake.failures = {"cuModuleGetFunction": 500}
    with pytest.raises(SessionError, match="cuModuleGetFunction: 500"):
        driver.MoELauncher(bundle(SHAPE))
    assert len(fake.named("cuModuleUnload")) == 1
    fake.failures = {}
    launcher = driver.MoELauncher(bundle(SHAPE))
    fake.failures = {"cuLaunchKernel": 2}
    with pytest.raises(OutOfMemoryError):
        launcher.launch(1, **POINTERS, workspace=WORKSPACE, stream=0)


def test_a_host_without_a_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(TargetUnavailableError, match="CUDA driver cannot be used"):
        driver.MoELauncher(bundle(SHAPE))
