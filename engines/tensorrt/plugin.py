"""The experts as a TensorRT plugin: `MoEExpertsMXFP4` of the namespace `com.gptoss`, version 1.

    plugins = register(trt, bundle.to_bytes(), logger)     # before an engine is built or loaded
    ...
    plugins.require_no_failures()

A plugin is a thin thing: it says which types it takes, how much workspace it needs, and hands device pointers to the
kernels. An engine carries the compiled kernels in the plugin's fields, so it needs neither Triton nor a compiler where
it runs, only this class. For the op itself see `exporter/ops/moe_experts_mxfp4.py`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from gptoss_export.exporter.errors import EngineBuildError, GptossExportError

if TYPE_CHECKING:
    from gptoss_export.engines.tensorrt.kernels.driver import MoELauncher
    from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

NAME, VERSION, NAMESPACE = "MoEExpertsMXFP4", "1", "com.gptoss"
KERNELS_FIELD = "kernels"

_INPUTS = (
    "x", "weights", "experts",
    "gate_up_blocks", "gate_up_scales", "gate_up_bias",
    "down_blocks", "down_scales", "down_bias",
)  # fmt: skip
_X_TYPES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class Kernels:
    """What all plugins of a process share: compiled kernels, loaded once for each bundle, and what went wrong."""

    report: Callable[[str], None]
    failures: list[str] = field(default_factory=list)
    error: Exception | None = None
    _bundles: dict[bytes, tuple[bytes, MoEShape]] = field(default_factory=dict)
    _launchers: dict[bytes, MoELauncher] = field(default_factory=dict)

    def read(self, data: bytes) -> tuple[bytes, MoEShape]:
        """One copy of a serialised bundle, which every layer brings, and its shape. Checks what `from_bytes` checks."""
        from gptoss_export.engines.tensorrt.kernels.bundle import KernelBundle

        key = hashlib.sha256(data).digest()
        if key not in self._bundles:
            self._bundles[key] = data, KernelBundle.from_bytes(data).shape
        return self._bundles[key]

    def launcher(self, bundle: bytes) -> MoELauncher:
        """The kernels on the current device. Plugins of all layers and contexts share one launcher."""
        from gptoss_export.engines.tensorrt.kernels.bundle import KernelBundle
        from gptoss_export.engines.tensorrt.kernels.driver import MoELauncher

        key = hashlib.sha256(bundle).digest()
        if key not in self._launchers:
            self._launchers[key] = MoELauncher(KernelBundle.from_bytes(bundle))
        return self._launchers[key]

    def fail(self, where: str, error: Exception) -> None:
        """Keeps a failure and logs it. TensorRT prints exceptions of some callbacks and goes on as if all were well."""
        line = f"{NAME}.{where}: {type(error).__name__}: {error}"
        self.error = self.error or error
        self.failures.append(line)
        self.report(line)

    def require_no_failures(self) -> None:
        """Raises if a callback failed, whatever TensorRT made of that: the callback's own error where it has a next
        step, such as that of kernels that do not run on this GPU, otherwise EngineBuildError."""
        if isinstance(self.error, GptossExportError):
            raise self.error
        if self.failures:
            raise EngineBuildError(
                f"a plugin failed: {self.failures[0]}", "report this: the kernels do not fit the graph"
            )


def _reported(function: _Function) -> _Function:
    """Lets no exception of a callback get lost between Python and C++."""

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any) -> Any:
        try:
            return function(self, *args)
        except Exception as error:
            self.kernels.fail(function.__name__, error)
            raise

    return wrapper  # type: ignore[return-value]


class MoEPlugin:
    """What a plugin does; `make_moe_plugin` adds the base classes of one TensorRT package.

    trt: the module. kernels: shared by all plugins. bundle: compiled kernels, serialised; shape: what they are for.
    """

    def __init__(self, trt: Any, kernels: Kernels, bundle: bytes, shape: MoEShape) -> None:
        for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
            base.__init__(self)
        self.trt, self.kernels, self.bundle, self.shape = trt, kernels, bundle, shape
        self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
        self.num_outputs = 1
        self._launcher: MoELauncher | None = None

    def get_capability_interface(self, capability: Any) -> MoEPlugin:
        """One object answers for core, build and runtime."""
        return self

    @_reported
    def clone(self) -> MoEPlugin:
        twin = type(self)(self.trt, self.kernels, self.bundle, self.shape)
        twin._launcher = self._launcher
        return twin

    @_reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [self.trt.DataType.FLOAT]

    @_reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        return [self.trt.DimsExprs(inputs[0])]

    @_reported
    def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
        description = tensors[position].desc
        wanted = (*_input_types(self.shape), "FLOAT")[position]
        return bool(description.type.name == wanted and description.format == self.trt.TensorFormat.LINEAR)

    @_reported
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._check([tensor.desc for tensor in inputs])

    @_reported
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._check(inputs)

    @_reported
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        from gptoss_export.engines.tensorrt.kernels.launch import workspace_bytes

        return workspace_bytes(self.shape, int(inputs[0].max[0]))

    @_reported
    def get_fields_to_serialize(self) -> Any:
        import numpy as np

        trt = self.trt
        # Fields refer to the arrays' memory: TensorRT reads it after this call, so it has to live as the plugin does.
        self._fields = [
            trt.PluginField(name, np.array([getattr(self.shape, name)], np.float32), trt.PluginFieldType.FLOAT32)
            for name in ("swiglu_alpha", "swiglu_limit")
        ] + [trt.PluginField(KERNELS_FIELD, np.frombuffer(self.bundle, np.int8), trt.PluginFieldType.INT8)]
        return trt.PluginFieldCollection(self._fields)

    @_reported
    def attach_to_context(self, context: Any) -> MoEPlugin:
        """The plugin that runs in an execution context; kernels are loaded here, since `enqueue` may be captured."""
        twin = self.clone()
        twin._launcher = self.kernels.launcher(self.bundle)
        return twin

    @_reported
    def set_tactic(self, tactic: int) -> None:
        """There is one way to compute it."""

    @_reported
    def enqueue(
        self,
        input_descriptions: Sequence[Any],
        output_descriptions: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> int:
        """Launches the kernels on `stream`; pointers are the device's."""
        tokens = int(input_descriptions[0].dims[0])
        if tokens:
            if self._launcher is None:
                raise RuntimeError("the plugin was never attached to an execution context")
            pointers = dict(zip(_INPUTS, map(int, inputs), strict=True))
            self._launcher.launch(tokens, **pointers, y=int(outputs[0]), workspace=int(workspace), stream=int(stream))
        return 0

    def _check(self, inputs: Sequence[Any]) -> None:
        problem = input_problem(self.shape, [(tensor.type.name, tuple(tensor.dims)) for tensor in inputs])
        if problem is not None:
            raise ValueError(problem)


def input_problem(shape: MoEShape, inputs: Sequence[tuple[str, tuple[int, ...]]]) -> str | None:
    """What is wrong with a plugin's inputs, None if nothing is.

    inputs: TensorRT's name of the type, and the shape, where -1 stands for a size that is not known yet.
    """
    E, H, I, K = shape.experts, shape.hidden, shape.intermediate, shape.top_k  # noqa: E741 - as in the mathematics
    any_size = -1
    gate_up = ((E, 2 * I, H // 32, 16), (E, 2 * I, H // 32), (E, 2 * I))
    down = ((E, H, I // 32, 16), (E, H, I // 32), (E, H))
    shapes = ((any_size, H), (any_size, K), (any_size, K), *gate_up, *down)
    for name, kind, sizes, (found_kind, found) in zip(_INPUTS, _input_types(shape), shapes, inputs, strict=True):
        fits = len(found) == len(sizes) and all(any_size in (a, b) or a == b for a, b in zip(sizes, found, strict=True))
        if found_kind != kind or not fits:
            return f"{name} is {found_kind} {list(found)}, the kernels are for {kind} {list(sizes)}"
    return None


def _input_types(shape: MoEShape) -> tuple[str, ...]:
    """TensorRT's names for the types of the nine inputs."""
    return (_X_TYPES[shape.dtype], "FLOAT", "INT32", "INT8", "INT8", "BF16", "INT8", "INT8", "BF16")


class MoEPluginCreator:
    """Makes plugins from an ONNX node's attributes and, in an engine, from what was serialised."""

    def __init__(self, trt: Any, kernels: Kernels, bundle: bytes | None) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.trt, self.kernels, self.bundle = trt, kernels, bundle
        self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
        self.field_names = trt.PluginFieldCollection(
            [
                trt.PluginField("swiglu_alpha", b"", trt.PluginFieldType.FLOAT32),
                trt.PluginField("swiglu_limit", b"", trt.PluginFieldType.FLOAT32),
                trt.PluginField(KERNELS_FIELD, b"", trt.PluginFieldType.INT8),
            ]
        )
        self._plugin = make_moe_plugin(trt)

    @_reported
    def create_plugin(self, name: str, fields: Any, phase: Any) -> MoEPlugin:
        """Raises ValueError for attributes that the kernels were not compiled for, and where there are no kernels."""
        values = {field.name: field.data for field in fields}
        stored = self.bundle if phase == self.trt.TensorRTPhase.BUILD else values[KERNELS_FIELD].tobytes()
        if stored is None:
            raise ValueError("no kernels were compiled for this build")
        bundle, shape = self.kernels.read(stored)
        for key in ("swiglu_alpha", "swiglu_limit"):
            wanted, found = getattr(shape, key), float(values[key][0])
            if abs(wanted - found) > 1e-6 * abs(wanted):  # the field is a float32
                raise ValueError(f"{name} has {key} {found}, the kernels are for {wanted}")
        return self._plugin(self.trt, self.kernels, bundle, shape)


@functools.cache
def make_moe_plugin(trt: Any) -> type[MoEPlugin]:
    """The plugin class for one package: the module `tensorrt` or `tensorrt_rtx`."""
    bases = (MoEPlugin, trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    return type(f"{NAME}Plugin", bases, {})


def register(trt: Any, bundle: bytes | None, logger: Any) -> Kernels:
    """Makes the plugin known to one package, in this process; again with other kernels replaces them.

    bundle: a serialised KernelBundle, for building; None where engines are only loaded, which carry their own.
    logger: an ILogger of the package. Returns what the plugins share. Raises EngineBuildError if TensorRT refuses.
    """
    registry = trt.get_plugin_registry()
    before = registry.get_creator(NAME, VERSION, NAMESPACE)
    if before is not None:
        registry.deregister_creator(before)
    kernels = Kernels(lambda line: logger.log(trt.ILogger.Severity.ERROR, line))
    creator_type = type(f"{NAME}PluginCreator", (MoEPluginCreator, trt.IPluginCreatorV3One), {})
    creator = creator_type(trt, kernels, bundle)
    if not registry.register_creator(creator, NAMESPACE) or registry.get_creator(NAME, VERSION, NAMESPACE) is None:
        raise EngineBuildError(
            f"TensorRT does not register the plugin {NAME}", "report this with the output of --debug"
        )
    _CREATORS[trt] = creator
    return kernels


_CREATORS: dict[Any, Any] = {}
"""The registry holds bare pointers."""
