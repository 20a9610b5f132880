"""Compiles the kernels ahead of time, on any machine: Triton brings NVIDIA's assembler with it.

    bundle = compile_bundle(MoEShape(32, 2880, 2880, 4, "fp16", 1.702, 7.0))
    data = bundle.to_bytes()        # into the plugin's fields
    KernelBundle.from_bytes(data)   # where the engine is loaded; needs no Triton

What is shipped is machine code (cubins), not PTX: a driver may be older than the PTX that Triton emits.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptoss_export.engines.tensorrt.kernels.bundle import CompiledKernel, KernelBundle, parameter_kinds
from gptoss_export.engines.tensorrt.kernels.launch import KernelSpec, MoEShape, kernel_specs
from gptoss_export.exporter.errors import EngineBuildError, TargetUnavailableError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["ARCHS", "CompiledKernel", "KernelBundle", "compile_bundle"]

ARCHS = (80, 89, 90, 100, 120)
"""A100 (and 8.6 of the same generation), Ada, Hopper, Blackwell for data centres and for workstations."""

_PACKAGE = "gptoss_export.engines.tensorrt.kernels"


def compile_bundle(shape: MoEShape, archs: tuple[int, ...] = ARCHS) -> KernelBundle:
    """Every kernel of the shape for every architecture: about a second each, no GPU. The same bytes every time.

    Raises TargetUnavailableError without Triton, EngineBuildError where it does not compile.
    """
    triton = _triton()
    specs = kernel_specs(shape)
    with _own_settings(triton):
        kernels = {name: {arch: _compile(triton, spec, arch) for arch in archs} for name, spec in specs.items()}
    return KernelBundle(shape, triton.__version__, archs, kernels)


def _triton() -> ModuleType:
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.compiler")
    except (ImportError, OSError) as error:
        raise TargetUnavailableError(f"Triton cannot be imported: {error}", "pip install triton==3.9.0") from error
    if triton.knobs.runtime.interpret:
        raise EngineBuildError(
            "TRITON_INTERPRET is set, so Triton interprets kernels and compiles none", "unset TRITON_INTERPRET"
        )
    return triton


@contextmanager
def _own_settings(triton: Any) -> Iterator[None]:
    """No line tables, which hold this machine's paths, and no cache that someone else may have filled."""
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.compilation.scope(), knobs.cache.scope():
        knobs.compilation.disable_line_info = True
        knobs.cache.dir = cache
        yield


def _compile(triton: Any, spec: KernelSpec, arch: int) -> CompiledKernel:
    function = getattr(importlib.import_module(f"{_PACKAGE}.{spec.module}"), spec.function)
    signature = dict(spec.parameters) | {name: "constexpr" for name, _ in spec.constants}
    # Buffers lie on 16 bytes, so that rows can be read 16 bytes at a time.
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, (_, kind) in enumerate(spec.parameters) if kind.startswith("*")
    }
    ordered = {name: signature[name] for name in function.arg_names}
    source = triton.compiler.ASTSource(function, ordered, dict(spec.constants), attributes)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True}
    try:
        target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        # Triton raises what its passes and assembler raise: RuntimeError, its own classes, subprocess errors.
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise EngineBuildError(
            f"Triton could not compile {spec.function} for compute capability {arch / 10}: {line}",
            "install the pinned triton==3.9.0, and report the line above if it stays",
        ) from error
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise EngineBuildError(
            f"{spec.function} wants scratch memory of its own for compute capability {arch / 10}",
            "install the pinned triton==3.9.0",
        )
    return CompiledKernel(
        compiled.metadata.name, spec.warps, compiled.metadata.shared, parameter_kinds(spec), compiled.asm["cubin"]
    )
